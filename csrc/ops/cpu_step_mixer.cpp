// Launcher of a whole Mamba-2 decode step between the two projections: convolution, state, gate and norm in one call.
//
// What passes between them stays in floats. Each part splits its own range over threads. Without ssm_state, dt_bias
// and A the SSM is removed: N = 0 and the columns are [z | x | padding].

#include <cmath>
#include <limits>
#include <memory>

#include "ops/cpu_common.h"

namespace shedder::cpu {
namespace {

constexpr const char *kOp = "step_mixer";

// Rows of floats that lie one behind the other, seen with more dimensions.
Array floats(float *data, int64_t row, int64_t outer = 1, int64_t inner = 1) {
    return {data, Dtype::f32, {row, outer, inner, 0}};
}

// Columns of a (B, columns) array, seen with one or two more dimensions.
Array columns(const Array &a, int64_t first, int64_t outer = 1, int64_t inner = 1) {
    Array part = a;
    part.data = static_cast<char *>(a.data) + first * a.stride[1] * (a.dtype == Dtype::f32 ? 4 : 2);
    part.stride[1] = outer * a.stride[1];
    part.stride[2] = inner * a.stride[1];
    return part;
}

// zxbcdt: (B, columns), [z | x | B | C | dt | padding]. D is (H,) or (H, P).
void step_mixer(const Tensor &zxbcdt, Tensor conv_state, MaybeTensor ssm_state, const Tensor &conv_weight,
                const MaybeTensor &conv_bias, const MaybeTensor &dt_bias, const MaybeTensor &A, const Tensor &D,
                const MaybeTensor &norm_weight, int64_t groups, const Tensor &head_to_group,
                std::vector<int64_t> segments, std::vector<double> eps, bool norm_before_gate, double dt_min,
                double dt_max, const MaybeTensor &cache_seqlens, const MaybeTensor &state_batch_indices, Tensor y) {
    STD_TORCH_CHECK(zxbcdt.dim() == 2 && conv_state.dim() == 3 && conv_weight.dim() == 2 &&
                        (!ssm_state || ssm_state->dim() == 4) && 1 <= D.dim() && D.dim() <= 2,
                    "shedder_cpu::step_mixer takes zxbcdt (B, columns), conv_state (slots, channels, K), "
                    "conv_weight (channels, W), ssm_state (slots, H, P, N), D (H,) or (H, P)");
    const bool has_ssm = ssm_state.has_value();
    const int64_t batch = zxbcdt.size(0), width = conv_weight.size(1), kept = conv_state.size(2);
    const int64_t slots = conv_state.size(0);
    const int64_t heads = D.size(0), states = has_ssm ? ssm_state->size(3) : 0;
    const int64_t channels = conv_weight.size(0), inner = channels - 2 * groups * states;
    STD_TORCH_CHECK(heads > 0 && inner > 0 && inner % heads == 0,
                    "shedder_cpu::step_mixer: conv_weight must have HP + 2GN rows");
    const int64_t headdim = inner / heads;
    STD_TORCH_CHECK(zxbcdt.size(1) >= inner + channels + (has_ssm ? heads : 0),
                    "shedder_cpu::step_mixer: zxbcdt has too few columns");
    STD_TORCH_CHECK(has_ssm == dt_bias.has_value() && has_ssm == A.has_value() && has_ssm == (states > 0),
                    "shedder_cpu::step_mixer takes ssm_state, dt_bias and A together, or none of them");
    STD_TORCH_CHECK(states <= kMaxStates && 1 <= width && width <= kMaxWidth &&
                        kept >= std::max<int64_t>(width - 1, cache_seqlens ? 1 : 0),
                    "shedder_cpu::step_mixer: N must be 1..", kMaxStates, ", W 1..", kMaxWidth,
                    ", K at least W - 1, of a ring at least 1");
    const Array in = array(kOp, "zxbcdt", zxbcdt, {batch, zxbcdt.size(1)});
    const std::unique_ptr<float[]> scratch(new float[batch * (channels + inner)]);
    float *const xBC = scratch.get(), *const gated = xBC + batch * channels;

    Conv1dUpdate conv;
    conv.x = columns(in, inner);
    conv.conv_state = array(kOp, "conv_state", conv_state, {slots, channels, kept});
    conv.cache_seqlens = integers(kOp, "cache_seqlens", cache_seqlens, batch);
    conv.conv_state_indices = slot_numbers(kOp, state_batch_indices, batch, slots);
    conv.weight = array(kOp, "conv_weight", conv_weight, {channels, width});
    conv.bias = array(kOp, "conv_bias", conv_bias, {channels});
    conv.y = floats(xBC, channels);
    conv.silu = true;
    conv.channels = channels;
    conv.length = 1;
    conv.width = width;
    conv.kept = kept;

    const Array out = array(kOp, "y", y, {batch, inner});
    StateUpdate step;
    step.state = array(kOp, "ssm_state", ssm_state, {slots, heads, headdim, states});
    step.state_batch_indices = conv.conv_state_indices;
    step.x = floats(xBC, channels, headdim);
    const int32_t *group = integers(kOp, "head_to_group", head_to_group, heads);
    float *B = xBC + inner, *C = B + groups * states;
    if (heads == 1) {                                    // the kernel would number channels: hand it the one group
        B += group[0] * states;
        C += group[0] * states;
    } else if (groups > 1) {
        step.head_to_group = group;
    }
    step.B = floats(B, channels, states);
    step.C = floats(C, channels, states);
    step.dt = columns(in, inner + channels, 1, 0);
    step.dt_bias = array(kOp, "dt_bias", dt_bias, {heads});
    step.A = array(kOp, "A", A, {heads});
    step.D = D.dim() == 2 ? array(kOp, "D", D, {heads, headdim}) : array(kOp, "D", D, {heads});
    if (norm_weight) {
        step.y = floats(gated, inner, headdim);
    } else {
        step.z = columns(in, 0, headdim);
        step.y = columns(out, 0, headdim);
    }
    step.dt_softplus = true;
    if (dt_min != 0.0 || !std::isinf(dt_max)) {                                         // (0, inf) clamps nothing
        step.dt_min = static_cast<float>(dt_min);
        step.dt_max = static_cast<float>(dt_max);
    }
    step.heads = heads;
    step.headdim = headdim;
    step.states = states;

    GatedRmsNorm norm;
    int64_t covered = 0;
    for (int64_t segment : segments) covered += segment;
    STD_TORCH_CHECK(!norm_weight || (covered == inner && eps.size() == segments.size()),
                    "shedder_cpu::step_mixer: segments must cover the ", inner, " channels and have one eps each");
    norm.x = floats(gated, inner);
    norm.weight = array(kOp, "norm_weight", norm_weight, {inner});
    norm.z = in;
    norm.y = out;
    norm.segments = segments.data();
    norm.eps = eps.data();
    norm.segment_count = static_cast<int64_t>(segments.size());
    norm.norm_before_gate = norm_before_gate;

    split_conv1d_update(batch, conv);
    split_state_update(batch, step);
    if (norm_weight) split_gated_rmsnorm(batch, inner, norm);
}

}  // namespace
}  // namespace shedder::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(shedder_cpu, m) {
    m.def("step_mixer(Tensor zxbcdt, Tensor(a!) conv_state, Tensor(b!)? ssm_state, Tensor conv_weight, "
          "Tensor? conv_bias, Tensor? dt_bias, Tensor? A, Tensor D, Tensor? norm_weight, int groups, "
          "Tensor head_to_group, int[] segments, float[] eps, bool norm_before_gate, float dt_min, float dt_max, "
          "Tensor? cache_seqlens, Tensor? state_batch_indices, Tensor(c!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shedder_cpu, CPU, m) { m.impl("step_mixer", TORCH_BOX(&shedder::cpu::step_mixer)); }
