// Launcher of the selective scan on the CPU: checks, cuts the channels into tiles, splits batch x tiles over threads.

#include "ops/cpu_common.h"

namespace shedder::cpu {
namespace {

constexpr const char *kOp = "selective_scan";

void selective_scan(const Tensor &u, const Tensor &delta, const Tensor &A, const Tensor &B, const Tensor &C,
                    const MaybeTensor &D, const MaybeTensor &z, const MaybeTensor &delta_bias, bool delta_softplus,
                    const MaybeTensor &initial_state, const MaybeTensor &channel_to_group, const MaybeTensor &seq_idx,
                    Tensor y, Tensor final_state) {
    STD_TORCH_CHECK(u.dim() == 3 && A.dim() == 2 && (B.dim() == 4 || B.dim() == 2) && (C.dim() == 4 || C.dim() == 2),
                    "shedder_cpu::selective_scan takes u (B, D, L), A (D, N), B and C (B, G, N, L) or (D, N)");
    const int64_t batch = u.size(0), channels = u.size(1), length = u.size(2), states = A.size(1);
    const int64_t groups = B.dim() == 4 ? B.size(1) : C.dim() == 4 ? C.size(1) : 1;
    STD_TORCH_CHECK(1 <= states && states <= kMaxStates, "shedder_cpu::selective_scan: N is ", states,
                    "; accepted: 1..", kMaxStates);
    SelectiveScan p;
    p.u = array(kOp, "u", u, {batch, channels, length});
    p.delta = array(kOp, "delta", delta, {batch, channels, length});
    p.A = array(kOp, "A", A, {channels, states});
    p.constant_B = B.dim() == 2;
    p.constant_C = C.dim() == 2;
    p.B = p.constant_B ? array(kOp, "B", B, {channels, states}) : array(kOp, "B", B, {batch, groups, states, length});
    p.C = p.constant_C ? array(kOp, "C", C, {channels, states}) : array(kOp, "C", C, {batch, groups, states, length});
    p.D = array(kOp, "D", D, {channels});
    p.z = array(kOp, "z", z, {batch, channels, length});
    p.delta_bias = array(kOp, "delta_bias", delta_bias, {channels});
    p.initial_state = array(kOp, "initial_state", initial_state, {batch, channels, states});
    p.y = array(kOp, "y", y, {batch, channels, length});
    p.final_state = array(kOp, "final_state", final_state, {batch, channels, states});
    p.seq_idx = integers(kOp, "seq_idx", seq_idx, batch * length);
    const int32_t *group = integers(kOp, "channel_to_group", channel_to_group, channels);
    STD_TORCH_CHECK(groups == 1 || group, "shedder_cpu::selective_scan: channel_to_group is needed for G > 1");
    p.delta_softplus = delta_softplus;
    p.length = length;
    p.states = states;
    const Tiling tiling(channels, groups, [group](int64_t c) { return group[c]; });
    p.order = tiling.order.empty() ? nullptr : tiling.order.data();
    p.tiles = tiling.tiles.data();
    p.tile_count = static_cast<int64_t>(tiling.tiles.size());
    split(batch * p.tile_count, kTile * states * (length + 1) * 4,
          [&p](int64_t begin, int64_t end) { kernels().selective_scan(p, begin, end); });
}

}  // namespace
}  // namespace shedder::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(shedder_cpu, m) {
    m.def("selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
          "Tensor? delta_bias, bool delta_softplus, Tensor? initial_state, Tensor? channel_to_group, "
          "Tensor? seq_idx, Tensor(a!) y, Tensor(b!) final_state) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shedder_cpu, CPU, m) { m.impl("selective_scan", TORCH_BOX(&shedder::cpu::selective_scan)); }
