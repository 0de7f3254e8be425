// Depthwise causal convolution along time, forward: what its kernels share.
//
//   y[c,t] = act(bias[c] + sum_w weight[c,w] x[c, t - (W-1) + w])
//
// Its kernels: causal_conv1d_channels where channels are adjacent in memory, causal_conv1d_time where time is, and
// causal_conv1d_any.
// Bound: bytes of x and y.

#pragma once

#include "kernels/conv_parts.cuh"
#include "kernels/dependents.cuh"
#include "kernels/pointwise.cuh"
#include "kernels/row_vectors.cuh"

namespace shedder {

struct ConvStrides {
    int64_t batch, channel, time;
};

struct CausalConv1dParams {
    const void *x, *initial_states;                          // initial_states may be null
    void *y, *final_states;                                  // final_states (batch, channel, width-1), contiguous, or null
    Parameter weight, bias;
    const int32_t *seq_idx;                                  // null: one sequence in each row
    ConvStrides x_strides, y_strides, initial_strides;
    int64_t weight_channel_stride, weight_tap_stride, bias_stride, seq_idx_batch_stride, seq_idx_time_stride;
    int64_t batch;
    int channels, length;
    int width, steps;                                        // steps: tokens that one thread or warp walks over
    bool silu;
    ConvParts parts;                                         // of y
};

constexpr int kConvThreads = 128;
constexpr int kMaxWidth = 4;
constexpr int kHistory = kMaxWidth - 1;                      // inputs t-3, t-2, t-1

// The taps of kCount channels, the newest last, and their biases. A narrower filter leaves the first taps 0; channels
// that do not exist read the last one. kFull: width 4, and the four taps of a channel are one aligned load.
template <bool kFull, int kCount, typename Channel>
__device__ inline void load_conv_taps(const CausalConv1dParams &p, Channel channel, float (&taps)[kMaxWidth][kCount],
                                      float (&bias)[kCount]) {
    p.weight.visit([&](auto *weight) {
        using W = std::remove_const_t<std::remove_pointer_t<decltype(weight)>>;
        Packed<W, kMaxWidth> all[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const int c = min(channel(i), p.channels - 1);
            if constexpr (kFull) {
                using Word = typename Packed<W, kMaxWidth>::Word;
                all[i].word = *reinterpret_cast<const Word *>(weight + int64_t{c} * kMaxWidth);
            } else {
#pragma unroll
                for (int k = 0; k < kMaxWidth; ++k) {
                    const int own = k - (kMaxWidth - p.width);
                    if (own >= 0) all[i].at[k] = weight[c * p.weight_channel_stride + own * p.weight_tap_stride];
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
#pragma unroll
            for (int k = 0; k < kMaxWidth; ++k) taps[k][i] = to_float(all[i].at[k]);
        }
    });
#pragma unroll
    for (int i = 0; i < kCount; ++i) bias[i] = 0.f;
    p.bias.visit([&](auto *from) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) bias[i] = to_float(from[min(channel(i), p.channels - 1) * p.bias_stride]);
    });
}

// Input t of channel c, which before the row is an initial state or zero.
template <typename T>
__device__ inline T conv_input(const CausalConv1dParams &p, int64_t b, int64_t c, int64_t t) {
    if (t >= 0)
        return static_cast<const T *>(p.x)[b * p.x_strides.batch + c * p.x_strides.channel + t * p.x_strides.time];
    const int64_t k = t + p.width - 1;
    if (p.initial_states == nullptr || k < 0) return from_float<T>(0.f);
    return static_cast<const T *>(p.initial_states)[b * p.initial_strides.batch + c * p.initial_strides.channel
                                                    + k * p.initial_strides.time];
}

// The sequence of token t; tokens before the row count as its first sequence.
__device__ inline int conv_sequence(const CausalConv1dParams &p, int64_t b, int64_t t) {
    return __ldg(p.seq_idx + b * p.seq_idx_batch_stride + max(t, int64_t{0}) * p.seq_idx_time_stride);
}

// bias + taps, where window[k] is the input under tap k and names are the sequences of the four tokens.
template <bool kFull, bool kPacked>
__device__ inline float conv_sum(const CausalConv1dParams &p, const float (&window)[kMaxWidth],
                                 const float (&taps)[kMaxWidth], float bias, const int (&names)[kMaxWidth]) {
    float y = bias;
#pragma unroll
    for (int k = 0; k < kMaxWidth; ++k) {
        bool reaches = kFull || k >= kMaxWidth - p.width;
        if constexpr (kPacked) reaches = reaches && names[k] == names[kHistory];
        if (reaches) y = fmaf(taps[k], window[k], y);
    }
    if constexpr (kPacked)
        if (names[kHistory] < 0) y = 0.f;                    // and silu(0) = 0
    return y;
}

}  // namespace shedder
