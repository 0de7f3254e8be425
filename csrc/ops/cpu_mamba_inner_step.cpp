// Launcher of a whole Mamba-1 decode step between in_proj and out_proj: convolution, x_proj, dt_proj, state and gate in
// one call.
//
// What passes between them stays in floats. Each part splits its own range over threads. Without ssm_state, the two
// weights, dt_bias and A the SSM is removed: N = 0.

#include <memory>

#include "ops/cpu_common.h"

namespace shedder::cpu {
namespace {

constexpr const char *kOp = "mamba_inner_step";

// The floats of a (B, columns) buffer from `first` on.
Array floats(float *data, int64_t columns, int64_t first = 0) { return {data + first, Dtype::f32, {columns, 1, 1, 0}}; }

// y = x weight^T for any number of rows of floats.
void multiply(const Array &x, int64_t rows, int64_t inputs, const Array &weight, int64_t outputs, const Array &y) {
    for (int64_t first = 0; first < rows; first += kMaxLinearRows) {
        Linear p;
        p.x = x;
        p.x.data = static_cast<float *>(x.data) + first * x.stride[0];
        p.weight = weight;
        p.y = y;
        p.y.data = static_cast<float *>(y.data) + first * y.stride[0];
        p.rows = std::min<int64_t>(kMaxLinearRows, rows - first);
        p.inputs = inputs;
        split(outputs, inputs * p.rows / 2, [&p](int64_t begin, int64_t end) { kernels().linear(p, begin, end); });
    }
}

// A weight whose rows lie at any distance.
Array matrix(const char *name, const MaybeTensor &weight, int64_t outputs, int64_t inputs) {
    const Array a = array(kOp, name, weight, {outputs, inputs});
    STD_TORCH_CHECK(!weight || inputs <= 1 || a.stride[1] == 1, "shedder_cpu::mamba_inner_step: the last dimension of ",
                    name, " must be contiguous");
    return a;
}

// xz: (B, 2D), [x | z].
void mamba_inner_step(const Tensor &xz, Tensor conv_state, MaybeTensor ssm_state, const Tensor &conv_weight,
                      const MaybeTensor &conv_bias, const MaybeTensor &x_proj_weight,
                      const MaybeTensor &dt_proj_weight, const MaybeTensor &dt_bias, const MaybeTensor &A,
                      const Tensor &D, const MaybeTensor &channel_to_group, const MaybeTensor &cache_seqlens,
                      const MaybeTensor &state_batch_indices, Tensor y) {
    STD_TORCH_CHECK(xz.dim() == 2 && conv_state.dim() == 3 && conv_weight.dim() == 2,
                    "shedder_cpu::mamba_inner_step takes xz (B, 2D), conv_state (slots, D, K), conv_weight (D, W)");
    const bool has_ssm = A.has_value();
    STD_TORCH_CHECK(has_ssm == ssm_state.has_value() && has_ssm == x_proj_weight.has_value() &&
                        has_ssm == dt_proj_weight.has_value() && has_ssm == dt_bias.has_value(),
                    "shedder_cpu::mamba_inner_step takes ssm_state, x_proj_weight, dt_proj_weight, dt_bias and A "
                    "together, or none of them");
    STD_TORCH_CHECK(!has_ssm || (A->dim() == 2 && x_proj_weight->dim() == 2 && dt_proj_weight->dim() == 2),
                    "shedder_cpu::mamba_inner_step takes A (D, N), x_proj_weight (R + 2GN, D), dt_proj_weight (D, R)");
    const int64_t batch = xz.size(0), channels = conv_weight.size(0), width = conv_weight.size(1);
    const int64_t slots = conv_state.size(0), kept = conv_state.size(2);
    const int64_t states = has_ssm ? A->size(1) : 0, rank = has_ssm ? dt_proj_weight->size(1) : 0;
    const int64_t projected = has_ssm ? x_proj_weight->size(0) : 0;
    const int64_t groups = has_ssm ? (projected - rank) / (2 * states) : 1;
    STD_TORCH_CHECK(states <= kMaxStates && 1 <= width && width <= kMaxWidth &&
                        kept >= std::max<int64_t>(width - 1, cache_seqlens ? 1 : 0),
                    "shedder_cpu::mamba_inner_step: N must be 1..", kMaxStates, ", W 1..", kMaxWidth,
                    ", K at least W - 1, of a ring at least 1");
    STD_TORCH_CHECK(groups >= 1 && projected == rank + 2 * groups * states,
                    "shedder_cpu::mamba_inner_step: x_proj_weight must have R + 2GN rows");
    const Array in = array(kOp, "xz", xz, {batch, 2 * channels}), out = array(kOp, "y", y, {batch, channels});
    const std::unique_ptr<float[]> scratch(new float[batch * (2 * channels + projected)]);
    const Array x = floats(scratch.get(), channels), dt = floats(scratch.get() + batch * channels, channels);
    float *const rank_B_C = scratch.get() + 2 * batch * channels;

    Conv1dUpdate conv;
    conv.x = in;
    conv.conv_state = array(kOp, "conv_state", conv_state, {slots, channels, kept});
    conv.weight = array(kOp, "conv_weight", conv_weight, {channels, width});
    conv.bias = array(kOp, "conv_bias", conv_bias, {channels});
    conv.y = x;
    conv.silu = true;
    conv.cache_seqlens = integers(kOp, "cache_seqlens", cache_seqlens, batch);
    conv.conv_state_indices = slot_numbers(kOp, state_batch_indices, batch, slots);
    conv.channels = channels;
    conv.length = 1;
    conv.width = width;
    conv.kept = kept;

    StateUpdate step;                                        // the channels are the places of one head
    step.state = array(kOp, "ssm_state", ssm_state, {slots, channels, states});
    step.state.stride[3] = step.state.stride[2];
    step.state.stride[2] = step.state.stride[1];
    step.x = {x.data, Dtype::f32, {channels, 0, 1, 0}};
    step.dt = {dt.data, Dtype::f32, {channels, 0, 1, 0}};
    step.A = array(kOp, "A", A, {channels, states});
    step.A.stride[2] = step.A.stride[1];
    step.A.stride[1] = step.A.stride[0];
    step.B = {rank_B_C + rank, Dtype::f32, {projected, states, 1, 0}};
    step.C = {rank_B_C + rank + groups * states, Dtype::f32, {projected, states, 1, 0}};
    step.D = array(kOp, "D", D, {channels});
    step.D.stride[1] = step.D.stride[0];
    step.dt_bias = array(kOp, "dt_bias", dt_bias, {channels});
    step.dt_bias.stride[1] = step.dt_bias.stride[0];
    step.z = in;
    step.z.data = static_cast<char *>(in.data) + channels * in.stride[1] * (in.dtype == Dtype::f32 ? 4 : 2);
    step.z.stride[2] = in.stride[1];
    step.y = out;
    step.y.stride[2] = out.stride[1];
    step.dt_softplus = true;
    if (groups > 1) step.head_to_group = integers(kOp, "channel_to_group", channel_to_group, channels);
    STD_TORCH_CHECK(groups == 1 || step.head_to_group,
                    "shedder_cpu::mamba_inner_step: channel_to_group is needed for G > 1");
    step.state_batch_indices = conv.conv_state_indices;
    step.heads = 1;
    step.headdim = channels;
    step.states = states;
    const Array x_proj = matrix("x_proj_weight", x_proj_weight, projected, channels);
    const Array dt_proj = matrix("dt_proj_weight", dt_proj_weight, channels, rank);

    split_conv1d_update(batch, conv);
    if (has_ssm) {
        const Array products = floats(rank_B_C, projected);
        multiply(x, batch, channels, x_proj, projected, products);
        multiply(products, batch, rank, dt_proj, channels, dt);
    }
    split_state_update(batch, step);
}

}  // namespace
}  // namespace shedder::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(shedder_cpu, m) {
    m.def("mamba_inner_step(Tensor xz, Tensor(a!) conv_state, Tensor(b!)? ssm_state, Tensor conv_weight, "
          "Tensor? conv_bias, Tensor? x_proj_weight, Tensor? dt_proj_weight, Tensor? dt_bias, Tensor? A, Tensor D, "
          "Tensor? channel_to_group, Tensor? cache_seqlens, Tensor? state_batch_indices, Tensor(c!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shedder_cpu, CPU, m) {
    m.impl("mamba_inner_step", TORCH_BOX(&shedder::cpu::mamba_inner_step));
}
