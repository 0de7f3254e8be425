// Launcher of SSD on the CPU: checks, cuts the channels of all heads into tiles, splits batch x tiles over threads.

#include <cmath>
#include <limits>

#include "ops/cpu_common.h"

namespace shedder::cpu {
namespace {

constexpr const char *kOp = "ssd";

// D is (H, P); D per head is passed expanded over P.
void ssd(const Tensor &x, const Tensor &dt, const Tensor &A, const Tensor &B, const Tensor &C, const MaybeTensor &D,
         const MaybeTensor &z, const MaybeTensor &dt_bias, bool dt_softplus, double dt_min, double dt_max,
         const Tensor &head_to_group, const MaybeTensor &initial_states, const MaybeTensor &seq_idx, Tensor y,
         Tensor final_states) {
    STD_TORCH_CHECK(x.dim() == 4 && B.dim() == 4, "shedder_cpu::ssd takes x (B, L, H, P), B and C (B, L, G, N)");
    const int64_t batch = x.size(0), length = x.size(1), heads = x.size(2), headdim = x.size(3);
    const int64_t groups = B.size(2), states = B.size(3);
    STD_TORCH_CHECK(1 <= states && states <= kMaxStates, "shedder_cpu::ssd: N is ", states, "; accepted: 1..", kMaxStates);
    Ssd p;
    p.x = array(kOp, "x", x, {batch, length, heads, headdim});
    p.dt = array(kOp, "dt", dt, {batch, length, heads});
    p.A = array(kOp, "A", A, {heads});
    p.B = array(kOp, "B", B, {batch, length, groups, states});
    p.C = array(kOp, "C", C, {batch, length, groups, states});
    p.D = array(kOp, "D", D, {heads, headdim});
    p.z = array(kOp, "z", z, {batch, length, heads, headdim});
    p.dt_bias = array(kOp, "dt_bias", dt_bias, {heads});
    p.initial_states = array(kOp, "initial_states", initial_states, {batch, heads, headdim, states});
    p.y = array(kOp, "y", y, {batch, length, heads, headdim});
    p.final_states = array(kOp, "final_states", final_states, {batch, heads, headdim, states});
    p.seq_idx = integers(kOp, "seq_idx", seq_idx, batch * length);
    const int32_t *group = integers(kOp, "head_to_group", head_to_group, heads);
    p.dt_softplus = dt_softplus;
    const bool is_limited = dt_min != 0.0 || !std::isinf(dt_max);                       // (0, inf) clamps nothing
    p.dt_min = is_limited ? static_cast<float>(dt_min) : -std::numeric_limits<float>::infinity();
    p.dt_max = static_cast<float>(dt_max);
    p.length = length;
    p.headdim = headdim;
    p.states = states;
    const Tiling tiling(heads * headdim, groups, [group, headdim](int64_t c) { return group[c / headdim]; });
    p.order = tiling.order.empty() ? nullptr : tiling.order.data();
    p.tiles = tiling.tiles.data();
    p.tile_count = static_cast<int64_t>(tiling.tiles.size());
    split(batch * p.tile_count, kTile * states * (length + 1),
          [&p](int64_t begin, int64_t end) { kernels().ssd(p, begin, end); });
}

}  // namespace
}  // namespace shedder::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(shedder_cpu, m) {
    m.def("ssd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
          "bool dt_softplus, float dt_min, float dt_max, Tensor head_to_group, Tensor? initial_states, "
          "Tensor? seq_idx, Tensor(a!) y, Tensor(b!) final_states) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shedder_cpu, CPU, m) { m.impl("ssd", TORCH_BOX(&shedder::cpu::ssd)); }
