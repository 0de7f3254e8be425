// The table of kernels of one instruction set.

#include "simd.h"

#define SHEDDER_NAME_(isa) #isa
#define SHEDDER_NAME(isa) SHEDDER_NAME_(isa)

namespace shedder::cpu::SHEDDER_ISA {

void selective_scan(const SelectiveScan &, int64_t, int64_t);
void ssd(const Ssd &, int64_t, int64_t);
void state_update(const StateUpdate &, int64_t, int64_t);
void conv1d(const Conv1d &, int64_t, int64_t);
void conv1d_update(const Conv1dUpdate &, int64_t, int64_t);
void gated_rmsnorm(const GatedRmsNorm &, float *, int64_t, int64_t);
void linear(const Linear &, int64_t, int64_t);

const Kernels &kernels() {
    static constexpr Kernels table = {SHEDDER_NAME(SHEDDER_ISA), selective_scan, ssd, state_update, conv1d,
                                      conv1d_update, gated_rmsnorm, linear};
    return table;
}

}  // namespace shedder::cpu::SHEDDER_ISA
