// The convolution of a decode step, as the launchers of steps take its arguments.

#pragma once

#include <algorithm>

#include "kernels/causal_conv1d_update.cuh"
#include "ops/cuda_arguments.h"

namespace shedder {

inline ConvStrides conv_strides(const Tensor &t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

// conv_state (slots, channels, K) of q, whose batch, channels and width are set.
inline void take_conv_state(const Arguments &arguments, CausalConv1dUpdateParams &q, ScalarType dtype,
                            const Tensor &conv_state, const MaybeTensor &cache_seqlens, const MaybeTensor &indices,
                            const char *indices_name) {
    STD_TORCH_CHECK(conv_state.dim() == 3, "shedder_cuda::", arguments.op, " takes conv_state (slots, D, K)");
    const int64_t slots = conv_state.size(0);
    q.kept = conv_state.size(2);
    arguments.check(conv_state, "conv_state", dtype, {slots, q.conv.channels, q.kept});
    STD_TORCH_CHECK(indices || slots >= q.conv.batch, "shedder_cuda::", arguments.op, ": conv_state has ", slots,
                    " slots for a batch of ", q.conv.batch);
    STD_TORCH_CHECK(q.kept >= std::max(q.conv.width - 1, cache_seqlens ? 1 : 0), "shedder_cuda::", arguments.op,
                    ": conv_state keeps ", q.kept, " inputs, too few for W");
    q.state = conv_state.mutable_data_ptr();
    q.state_strides = conv_strides(conv_state);
    q.seen = arguments.integers(cache_seqlens, "cache_seqlens", {q.conv.batch});
    q.seen_stride = cache_seqlens ? cache_seqlens->stride(0) : 0;
    q.slots = arguments.integers(indices, indices_name, {q.conv.batch});
    q.slots_stride = indices ? indices->stride(0) : 0;
}

// The step before SiLU of a mixer: x (batch, channels) lies in the rows of its in_proj's output; weight (channels, W)
// and bias are of its type.
inline CausalConv1dUpdateParams mixer_conv(const Arguments &arguments, ScalarType dtype, int64_t batch, const void *x,
                                           int64_t row_stride, int64_t column_stride, const Tensor &weight,
                                           const MaybeTensor &bias, const Tensor &conv_state,
                                           const MaybeTensor &cache_seqlens, const MaybeTensor &state_batch_indices) {
    const int64_t channels = weight.size(0), width = weight.size(1);
    STD_TORCH_CHECK(1 <= width && width <= kMaxWidth && channels < (int64_t{1} << 30), "shedder_cuda::", arguments.op,
                    ": W is ", width, " and channels are ", channels, "; accepted: 1..4, and below 2^30");
    CausalConv1dUpdateParams q{};
    q.conv.batch = batch;
    q.conv.channels = static_cast<int>(channels);
    q.conv.length = 1;
    q.conv.width = static_cast<int>(width);
    q.conv.x = x;
    q.conv.x_strides = {row_stride, column_stride, 0};
    arguments.check(weight, "conv_weight", dtype, {channels, width});
    q.conv.weight = arguments.parameter(weight, "conv_weight", {channels, width});
    q.conv.weight_channel_stride = weight.stride(0);
    q.conv.weight_tap_stride = weight.stride(1);
    if (bias) arguments.check(*bias, "conv_bias", dtype, {channels});
    q.conv.bias = arguments.parameter(bias, "conv_bias", {channels});
    q.conv.bias_stride = bias ? bias->stride(0) : 0;
    q.conv.silu = true;
    take_conv_state(arguments, q, dtype, conv_state, cache_seqlens, state_batch_indices, "state_batch_indices");
    return q;
}

}  // namespace shedder
