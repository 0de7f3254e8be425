// Launcher of a Mamba-1 mixer's decode step: checks, CTAs for a row of the batch, launch.

#include <algorithm>
#include <type_traits>

#include "kernels/mamba_inner_step.cuh"
#include "ops/cuda_cluster.h"
#include "ops/cuda_conv_step.h"
#include "ops/cuda_launchers.h"

namespace shedder {
namespace {

constexpr const char *kInnerOp = "mamba_inner_step";
constexpr int64_t kMostOutputs = 2048;                       // R + 2 G N: the parts of x_proj's product
constexpr int kLeastShare = 32;                              // channels that are worth a CTA beyond the second

template <typename Input, typename State>
void launch_inner_step(MambaInnerStepParams &p, int32_t device, cudaStream_t stream) {
    int ranks = largest_cluster(device);
    while (ranks > 2 && (ranks - 1) * kLeastShare >= p.channels) ranks /= 2;
    p.share = ((p.channels + ranks - 1) / ranks + 7) / 8 * 8;
    STD_TORCH_CHECK(p.share <= kMixerShare, "shedder_cuda::mamba_inner_step: D is ", p.channels, "; accepted: up to ",
                    ranks * kMixerShare);
    launch_clusters(kInnerOp, mamba_inner_step_rows<Input, State>, p.conv.conv.batch, ranks, kMixerThreads,
                    mamba_inner_step_shared_floats(p, ranks) * 4, device, stream, p);
}

}  // namespace

// xz: (B, 2D), [x | z].
void mamba_inner_step(const Tensor &xz, Tensor conv_state, MaybeTensor ssm_state, const Tensor &conv_weight,
                      const MaybeTensor &conv_bias, const MaybeTensor &x_proj_weight,
                      const MaybeTensor &dt_proj_weight, const MaybeTensor &dt_bias, const MaybeTensor &A,
                      const Tensor &D, const MaybeTensor &channel_to_group, const MaybeTensor &cache_seqlens,
                      const MaybeTensor &state_batch_indices, Tensor y) {
    const Arguments arguments{kInnerOp, xz.get_device_index()};
    STD_TORCH_CHECK(xz.dim() == 2 && conv_state.dim() == 3 && conv_weight.dim() == 2,
                    "shedder_cuda::mamba_inner_step takes xz (B, 2D), conv_state (slots, D, K), conv_weight (D, W)");
    const bool has_ssm = A.has_value();
    STD_TORCH_CHECK(has_ssm == ssm_state.has_value() && has_ssm == x_proj_weight.has_value()
                        && has_ssm == dt_proj_weight.has_value() && has_ssm == dt_bias.has_value(),
                    "shedder_cuda::mamba_inner_step takes ssm_state, x_proj_weight, dt_proj_weight, dt_bias and A "
                    "together, or none of them");
    STD_TORCH_CHECK(!has_ssm || (A->dim() == 2 && ssm_state->dim() == 3 && x_proj_weight->dim() == 2
                                 && dt_proj_weight->dim() == 2),
                    "shedder_cuda::mamba_inner_step takes ssm_state (slots, D, N), A (D, N), x_proj_weight "
                    "(R + 2GN, D), dt_proj_weight (D, R)");
    const ScalarType dtype = xz.scalar_type();
    const int64_t size = element_size(dtype), batch = xz.size(0), channels = conv_weight.size(0);
    const int64_t slots = conv_state.size(0);
    const int64_t dstate = has_ssm ? A->size(1) : 0, rank = has_ssm ? dt_proj_weight->size(1) : 0;
    const int64_t outputs = has_ssm ? x_proj_weight->size(0) : 0;
    const int64_t groups = dstate > 0 ? (outputs - rank) / (2 * dstate) : 1;
    STD_TORCH_CHECK(1 <= channels && (!has_ssm || dstate > 0) && dstate <= 256 && batch < (int64_t{1} << 26),
                    "shedder_cuda::mamba_inner_step: D is ", channels, ", N is ", dstate, ", B is ", batch,
                    "; accepted: D from 1, N 1..256, B below 2^26");
    STD_TORCH_CHECK(groups >= 1 && outputs == rank + 2 * groups * dstate && outputs <= kMostOutputs,
                    "shedder_cuda::mamba_inner_step: x_proj_weight has ", outputs,
                    " rows; accepted: R + 2GN, up to ", kMostOutputs);
    MambaInnerStepParams p{};
    arguments.check(xz, "xz", {batch, 2 * channels});
    with_type(kInnerOp, dtype, [](auto *) {});
    p.conv = mixer_conv(arguments, dtype, batch, xz.const_data_ptr(), xz.stride(0), xz.stride(1), conv_weight,
                        conv_bias, conv_state, cache_seqlens, state_batch_indices);

    p.column_stride = xz.stride(1);
    p.z = static_cast<const char *>(xz.const_data_ptr()) + channels * p.column_stride * size;
    p.channels = static_cast<int>(channels);
    p.rank = static_cast<int>(rank);
    p.groups = static_cast<int>(groups);
    p.dstate = static_cast<int>(dstate);
    p.outputs = static_cast<int>(outputs);
    p.D = arguments.floats(D, "D", {channels});
    p.D_stride = D.stride(0);
    if (has_ssm) {
        arguments.check(*x_proj_weight, "x_proj_weight", dtype, {outputs, channels});
        p.x_proj = x_proj_weight->const_data_ptr();
        p.x_proj_stride = x_proj_weight->stride(0);
        p.x_proj_column_stride = x_proj_weight->stride(1);
        arguments.check(*dt_proj_weight, "dt_proj_weight", dtype, {channels, rank});
        p.dt_proj = dt_proj_weight->const_data_ptr();
        p.dt_proj_stride = dt_proj_weight->stride(0);
        p.dt_proj_column_stride = dt_proj_weight->stride(1);
        p.dt_bias = arguments.floats(dt_bias, "dt_bias", {channels});
        p.bias_stride = dt_bias->stride(0);
        p.A = arguments.floats(A, "A", {channels, dstate});
        p.A_channel_stride = A->stride(0);
        p.A_n_stride = A->stride(1);
        arguments.check(*ssm_state, "ssm_state", {slots, channels, dstate});
        p.state = ssm_state->mutable_data_ptr();
        p.slot_stride = ssm_state->stride(0);
        p.channel_stride = ssm_state->stride(1);
        p.state_n_stride = ssm_state->stride(2);
        if (groups > 1) {
            STD_TORCH_CHECK(channel_to_group,
                            "shedder_cuda::mamba_inner_step: channel_to_group is needed for more than one group");
            p.channel_to_group = arguments.integers(channel_to_group, "channel_to_group", {channels});
            p.map_stride = channel_to_group->stride(0);
        }
    }
    const auto whole = [&](const void *weight, int64_t columns, int64_t row_stride, int64_t column_stride) {
        return column_stride == 1 && columns * size % 16 == 0 && on_grid(weight, size, {row_stride});
    };
    p.whole_x_proj = whole(p.x_proj, channels, p.x_proj_stride, p.x_proj_column_stride);
    p.whole_dt_proj = whole(p.dt_proj, rank, p.dt_proj_stride, p.dt_proj_column_stride);
    arguments.check(y, "y", dtype, {batch, channels});
    STD_TORCH_CHECK(y.is_contiguous(), "shedder_cuda::mamba_inner_step: y is not contiguous");
    p.y = y.mutable_data_ptr();
    if (batch == 0) return;

    arguments.launch(dtype, [&](auto *input, cudaStream_t stream) {
        using Input = std::remove_pointer_t<decltype(input)>;
        if (!has_ssm) return launch_inner_step<Input, float>(p, arguments.device, stream);
        with_type(kInnerOp, ssm_state->scalar_type(), [&](auto *kept) {
            using State = std::remove_pointer_t<decltype(kept)>;
            p.whole_states = dstate % kVectorStates == 0 && p.state_n_stride == 1 && p.A_n_stride == 1
                && on_grid(p.A, 4, {p.A_channel_stride})
                && on_grid(p.state, sizeof(State), {p.slot_stride, p.channel_stride}, kVectorStates * sizeof(State));
            launch_inner_step<Input, State>(p, arguments.device, stream);
        });
    });
}

}  // namespace shedder

STABLE_TORCH_LIBRARY_FRAGMENT(shedder_cuda, m) {
    m.def("mamba_inner_step(Tensor xz, Tensor(a!) conv_state, Tensor(b!)? ssm_state, Tensor conv_weight, "
          "Tensor? conv_bias, Tensor? x_proj_weight, Tensor? dt_proj_weight, Tensor? dt_bias, Tensor? A, Tensor D, "
          "Tensor? channel_to_group, Tensor? cache_seqlens, Tensor? state_batch_indices, Tensor(c!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shedder_cuda, CUDA, m) { m.impl("mamba_inner_step", TORCH_BOX(&shedder::mamba_inner_step)); }
