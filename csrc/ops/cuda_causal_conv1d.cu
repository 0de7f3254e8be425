// Launchers of the causal convolution: checks, the choice by what is adjacent in memory, launch.

#include <algorithm>

#include "kernels/causal_conv1d_any.cuh"
#include "kernels/causal_conv1d_channels.cuh"
#include "kernels/causal_conv1d_time.cuh"
#include "ops/cuda_conv_step.h"
#include "ops/cuda_device.h"
#include "ops/cuda_launch.h"
#include "ops/cuda_launchers.h"

namespace shedder {
namespace {

constexpr int64_t kMostChannels = int64_t{1} << 30;

CausalConv1dParams conv_params(const Arguments &arguments, const Tensor &x, const Tensor &weight,
                               const MaybeTensor &bias, bool silu, const Tensor &y) {
    STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2, "shedder_cuda::", arguments.op,
                    " takes x (B, D, L) and weight (D, W)");
    CausalConv1dParams p{};
    p.batch = x.size(0);
    STD_TORCH_CHECK(std::max(x.size(1), x.size(2)) < kMostChannels, "shedder_cuda::", arguments.op,
                    ": D and L must be below 2^30");
    p.channels = static_cast<int>(x.size(1));
    p.length = static_cast<int>(x.size(2));
    const int64_t width = weight.size(1);
    STD_TORCH_CHECK(1 <= width && width <= kMaxWidth, "shedder_cuda::", arguments.op, ": W is ", width,
                    "; accepted: 1..4");
    p.width = static_cast<int>(width);
    p.weight = arguments.parameter(weight, "weight", {p.channels, width});
    p.bias = arguments.parameter(bias, "bias", {p.channels});
    arguments.check(y, "y", x.scalar_type(), {p.batch, p.channels, p.length});
    p.weight_channel_stride = weight.stride(0);
    p.weight_tap_stride = weight.stride(1);
    p.bias_stride = bias ? bias->stride(0) : 0;
    p.x = x.const_data_ptr();
    p.y = y.mutable_data_ptr();
    p.x_strides = conv_strides(x);
    p.y_strides = conv_strides(y);
    p.silu = silu;
    return p;
}

// Tokens that one thread walks over: 32 (the three before them are read again), fewer where that leaves multiprocessors
// with less than two CTAs. Measured with 5376 channels: at B1 L512 4, 8, 16, 32 tokens take 8.4, 6.7, 6.5, 7.8 us, at
// B8 L2048 32 and 64 the same.
int64_t steps_for(int64_t length, int64_t warps_of_a_chunk, int32_t device) {
    const int64_t least = int64_t{2} * multiprocessors(device) * (kConvThreads / 32);
    int64_t steps = 32;
    while (steps > 4 && (length + steps - 1) / steps * warps_of_a_chunk < least) steps /= 2;
    return steps;
}

template <typename T, bool kFull, bool kPacked>
void launch_conv(CausalConv1dParams &p, int32_t device, cudaStream_t stream) {
    constexpr const char *kOp = "causal_conv1d";
    constexpr int64_t size = sizeof(T), kWarps = kConvThreads / 32;
    const ConvStrides &x = p.x_strides, &y = p.y_strides;
    constexpr int64_t kBytes = kLaneChannels * size;
    if (p.channels >= kTileChannels && x.channel == 1 && y.channel == 1
        && on_grid(p.y, size, {y.batch, y.time}, kBytes)) {
        const int64_t tiles = (p.channels + kTileChannels - 1) / kTileChannels;
        p.steps = static_cast<int>(steps_for(p.length, tiles * p.batch, device));
        const unsigned blocks = blocks_for(kOp, p.batch * tiles * ((p.length + p.steps - 1) / p.steps), kWarps);
        if (on_grid(p.x, size, {x.batch, x.time}))
            launch_ctas(causal_conv1d_channels<T, true, kFull, kPacked>, {blocks, kConvThreads}, stream, p);
        else
            launch_ctas(causal_conv1d_channels<T, false, kFull, kPacked>, {blocks, kConvThreads}, stream, p);
        return;
    }
    if (p.length > 1 && x.time == 1 && y.time == 1) {
        constexpr int64_t kCount = 16 / size, kStep = 32 * kCount * kConvVectors;
        const int64_t rows = p.batch * p.channels;
        const bool same = lie_alike(p.x, p.y, size, {x.channel - y.channel, x.batch - y.batch});
        const bool whole = same && p.length % kCount == 0 && on_grid(p.x, size, {x.batch, x.channel});
        const int64_t columns = p.length + (whole ? 0 : kCount - 1);
        // A warp walks over its row, unless there are too few rows or the row is too long for the number of blocks.
        int64_t steps = (columns + kStep - 1) / kStep * kStep;
        while (steps > kStep && rows * ((columns + steps - 1) / steps) < 8192)
            steps = (steps / 2 + kStep - 1) / kStep * kStep;
        steps = std::max(steps, (columns / 65535 + kStep) / kStep * kStep);
        p.steps = static_cast<int>(steps);
        const dim3 blocks(blocks_for(kOp, rows, kWarps), static_cast<unsigned>((columns + steps - 1) / steps));
        if (whole)
            launch_ctas(causal_conv1d_time<T, kFull, kPacked, Grid::kWhole>, {blocks, kConvThreads}, stream, p);
        else if (same)
            launch_ctas(causal_conv1d_time<T, kFull, kPacked, Grid::kSame>, {blocks, kConvThreads}, stream, p);
        else
            launch_ctas(causal_conv1d_time<T, kFull, kPacked, Grid::kOther>, {blocks, kConvThreads}, stream, p);
        return;
    }
    p.steps = static_cast<int>(steps_for(p.length, (p.batch * p.channels + 31) / 32, device));
    const int64_t tasks = p.batch * p.channels * ((p.length + p.steps - 1) / p.steps);
    launch_ctas(causal_conv1d_any<T>, {blocks_for(kOp, tasks, kConvThreads), kConvThreads}, stream, p);
}

template <typename T>
void launch_conv(CausalConv1dParams &p, int32_t device, cudaStream_t stream) {
    const int64_t tap = p.weight.kind == FloatKind::kFloat ? 4 : 2;
    const bool full = p.width == kMaxWidth && p.weight_tap_stride == 1 && p.weight_channel_stride == kMaxWidth
        && reinterpret_cast<uintptr_t>(p.weight.data) % (kMaxWidth * tap) == 0;
    const bool packed = p.seq_idx != nullptr;
    const auto launch = full ? packed ? launch_conv<T, true, true> : launch_conv<T, true, false>
                             : packed ? launch_conv<T, false, true> : launch_conv<T, false, false>;
    launch(p, device, stream);
}

}  // namespace

void causal_conv1d(const Tensor &x, const Tensor &weight, const MaybeTensor &bias, bool silu,
                   const MaybeTensor &initial_states, const MaybeTensor &seq_idx, Tensor y, MaybeTensor final_states) {
    constexpr ConvParts kAllSideBySide{kMostChannels, 1, 0, 0};
    causal_conv1d_to_parts(x, weight, bias, silu, initial_states, seq_idx, y, final_states, kAllSideBySide);
}

void causal_conv1d_to_parts(const Tensor &x, const Tensor &weight, const MaybeTensor &bias, bool silu,
                            const MaybeTensor &initial_states, const MaybeTensor &seq_idx, Tensor y,
                            MaybeTensor final_states, const ConvParts &parts) {
    const Arguments arguments{"causal_conv1d", x.get_device_index()};
    CausalConv1dParams p = conv_params(arguments, x, weight, bias, silu, y);
    p.parts = parts;
    const int64_t history = p.width - 1;
    if (final_states) {
        arguments.check(*final_states, "final_states", x.scalar_type(), {p.batch, p.channels, history});
        arguments.check_contiguous(final_states, "final_states");
        p.final_states = final_states->mutable_data_ptr();
    }
    if (initial_states) {
        arguments.check(*initial_states, "initial_states", x.scalar_type(), {p.batch, p.channels, history});
        p.initial_states = history > 0 ? initial_states->const_data_ptr() : nullptr;
        p.initial_strides = conv_strides(*initial_states);
    }
    p.seq_idx = arguments.integers(seq_idx, "seq_idx", {p.batch, p.length});
    if (seq_idx) {
        p.seq_idx_batch_stride = seq_idx->stride(0);
        p.seq_idx_time_stride = seq_idx->stride(1);
    }
    STD_TORCH_CHECK(p.length > 0, "shedder_cuda::causal_conv1d: L is 0; accepted: 1 and more");
    if (p.batch == 0 || p.channels == 0) return;
    arguments.launch(x.scalar_type(), [&](auto *type, cudaStream_t stream) {
        launch_conv<std::remove_pointer_t<decltype(type)>>(p, arguments.device, stream);
    });
}

void causal_conv1d_update(const Tensor &x, Tensor conv_state, const Tensor &weight, const MaybeTensor &bias, bool silu,
                          const MaybeTensor &cache_seqlens, const MaybeTensor &conv_state_indices, Tensor y) {
    const Arguments arguments{"causal_conv1d_update", x.get_device_index()};
    CausalConv1dUpdateParams q{};
    q.conv = conv_params(arguments, x, weight, bias, silu, y);
    take_conv_state(arguments, q, x.scalar_type(), conv_state, cache_seqlens, conv_state_indices,
                    "conv_state_indices");
    const int64_t tasks = q.conv.batch * q.conv.channels;
    if (tasks == 0) return;
    arguments.launch(x.scalar_type(), [&](auto *type, cudaStream_t stream) {
        using T = std::remove_pointer_t<decltype(type)>;
        launch_ctas(causal_conv1d_step<T>, {blocks_for(arguments.op, tasks, kConvThreads), kConvThreads}, stream, q);
    });
}

}  // namespace shedder

STABLE_TORCH_LIBRARY_FRAGMENT(shedder_cuda, m) {
    m.def("causal_conv1d(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_states, Tensor? seq_idx, "
          "Tensor(a!) y, Tensor(b!)? final_states) -> ()");
    m.def("causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu, "
          "Tensor? cache_seqlens, Tensor? conv_state_indices, Tensor(b!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shedder_cuda, CUDA, m) {
    m.impl("causal_conv1d", TORCH_BOX(&shedder::causal_conv1d));
    m.impl("causal_conv1d_update", TORCH_BOX(&shedder::causal_conv1d_update));
}
