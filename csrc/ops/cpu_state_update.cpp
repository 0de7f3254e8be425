// Launcher of the decode step of the state on the CPU: checks, splits the rows of B x H x P over threads.

#include "ops/cpu_common.h"

namespace shedder::cpu {
namespace {

constexpr const char *kOp = "state_update";

void state_update(Tensor state, const Tensor &x, const Tensor &dt, const Tensor &A, const Tensor &B, const Tensor &C,
                  const MaybeTensor &D, const MaybeTensor &z, const MaybeTensor &dt_bias, bool dt_softplus,
                  const MaybeTensor &head_to_group, const MaybeTensor &state_batch_indices, Tensor y) {
    STD_TORCH_CHECK(state.dim() == 4 && x.dim() == 3 && B.dim() == 3,
                    "shedder_cpu::state_update takes state (slots, H, P, N), x (B, H, P), B and C (B, G, N)");
    const int64_t batch = x.size(0), heads = x.size(1), headdim = x.size(2), states = state.size(3);
    const int64_t slots = state.size(0), groups = B.size(1);
    STD_TORCH_CHECK(1 <= states && states <= kMaxStates, "shedder_cpu::state_update: N is ", states, "; accepted: 1..",
                    kMaxStates);
    StateUpdate p;
    p.state = array(kOp, "state", state, {slots, heads, headdim, states});
    p.x = array(kOp, "x", x, {batch, heads, headdim});
    p.dt = array(kOp, "dt", dt, {batch, heads, headdim});
    p.A = array(kOp, "A", A, {heads, headdim, states});
    p.B = array(kOp, "B", B, {batch, groups, states});
    p.C = array(kOp, "C", C, {batch, groups, states});
    p.D = array(kOp, "D", D, {heads, headdim});
    p.z = array(kOp, "z", z, {batch, heads, headdim});
    p.dt_bias = array(kOp, "dt_bias", dt_bias, {heads, headdim});
    p.y = array(kOp, "y", y, {batch, heads, headdim});
    p.dt_softplus = dt_softplus;
    if (groups > 1) p.head_to_group = integers(kOp, "head_to_group", head_to_group, heads == 1 ? headdim : heads);
    STD_TORCH_CHECK(groups == 1 || p.head_to_group, "shedder_cpu::state_update: head_to_group is needed for G > 1");
    p.state_batch_indices = slot_numbers(kOp, state_batch_indices, batch, slots);
    p.heads = heads;
    p.headdim = headdim;
    p.states = states;
    split_state_update(batch, p);
}

}  // namespace
}  // namespace shedder::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(shedder_cpu, m) {
    m.def("state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
          "Tensor? dt_bias, bool dt_softplus, Tensor? head_to_group, Tensor? state_batch_indices, "
          "Tensor(b!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shedder_cpu, CPU, m) { m.impl("state_update", TORCH_BOX(&shedder::cpu::state_update)); }
