// Chooses once, at the first call, the instruction set whose kernels run.

#include <cstdlib>
#include <cstring>

#include "ops/cpu_common.h"

namespace shedder::cpu {

namespace base { const Kernels &kernels(); }
#ifdef SHEDDER_HAS_v3
namespace v3 { const Kernels &kernels(); }
#endif
#ifdef SHEDDER_HAS_v4
namespace v4 { const Kernels &kernels(); }
#endif
#ifdef SHEDDER_HAS_v4bf16
namespace v4bf16 { const Kernels &kernels(); }
#endif

namespace {

// Levels from the widest down: those from SHEDDER_CPU_ISA (or the widest) on are allowed, the first that runs is taken.
const Kernels &choose() {
#if defined(__x86_64__)
    const char *wanted = std::getenv("SHEDDER_CPU_ISA");
    bool allowed = !wanted || !*wanted;
    auto allow = [&](const char *level) { return allowed = allowed || !std::strcmp(wanted, level); };
    __builtin_cpu_init();
    [[maybe_unused]] const bool v3_runs =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    [[maybe_unused]] const bool v4_runs =
        v3_runs && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef SHEDDER_HAS_v4bf16
    if (allow("v4bf16") && v4_runs && __builtin_cpu_supports("avx512bf16")) return v4bf16::kernels();
#endif
#ifdef SHEDDER_HAS_v4
    if (allow("v4") && v4_runs) return v4::kernels();
#endif
#ifdef SHEDDER_HAS_v3
    if (allow("v3") && v3_runs) return v3::kernels();
#endif
    (void)allow;
#endif
    return base::kernels();
}

}  // namespace

const Kernels &kernels() {
    static const Kernels &chosen = choose();
    return chosen;
}

}  // namespace shedder::cpu

extern "C" __attribute__((visibility("default"))) const char *shedder_cpu_isa() {
    return shedder::cpu::kernels().isa;
}
