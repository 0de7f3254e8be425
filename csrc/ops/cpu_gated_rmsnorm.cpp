// Launcher of the gated RMSNorm on the CPU: checks, splits the rows over threads.

#include "ops/cpu_common.h"

namespace shedder::cpu {
namespace {

constexpr const char *kOp = "gated_rmsnorm";

void gated_rmsnorm(const Tensor &x, const Tensor &weight, const MaybeTensor &bias, const MaybeTensor &z,
                   std::vector<int64_t> segments, std::vector<double> eps, bool norm_before_gate, Tensor y) {
    STD_TORCH_CHECK(x.dim() == 2, "shedder_cpu::gated_rmsnorm takes x (rows, D)");
    const int64_t rows = x.size(0), channels = x.size(1);
    int64_t covered = 0;
    for (int64_t segment : segments) covered += segment;
    STD_TORCH_CHECK(covered == channels && eps.size() == segments.size(),
                    "shedder_cpu::gated_rmsnorm: segments must cover the ", channels, " channels and have one eps each");
    GatedRmsNorm p;
    p.x = array(kOp, "x", x, {rows, channels});
    p.weight = array(kOp, "weight", weight, {channels});
    p.bias = array(kOp, "bias", bias, {channels});
    p.z = array(kOp, "z", z, {rows, channels});
    p.y = array(kOp, "y", y, {rows, channels});
    p.segments = segments.data();
    p.eps = eps.data();
    p.segment_count = static_cast<int64_t>(segments.size());
    p.norm_before_gate = norm_before_gate;
    split_gated_rmsnorm(rows, channels, p);
}

}  // namespace
}  // namespace shedder::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(shedder_cpu, m) {
    m.def("gated_rmsnorm(Tensor x, Tensor weight, Tensor? bias, Tensor? z, int[] segments, float[] eps, "
          "bool norm_before_gate, Tensor(a!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shedder_cpu, CPU, m) { m.impl("gated_rmsnorm", TORCH_BOX(&shedder::cpu::gated_rmsnorm)); }
