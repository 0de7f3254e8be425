// Depthwise causal convolution along time, forward.
//
//   y[c,t] = act(bias[c] + sum_w weight[c,w] x[c, t - (W-1) + w])
//
// causal_conv1d_channels: channels adjacent in memory. A lane owns four channels and walks along time with the last three
//   inputs in registers, so that x is read once. (Eight channels would be 16 bytes of bf16, but taps and history take
//   166 registers then, and occupancy costs more than the wider access gains.)
// causal_conv1d_time: time adjacent in memory. A lane owns kVectors times 16 bytes of time; the three inputs before them
//   come from its neighbour.
// causal_conv1d_any: any strides, one thread for each channel.
// Bound: bytes of x and y. Rows that start off the grid are shifted in registers (row_vectors.cuh).

#pragma once

#include "kernels/pointwise.cuh"
#include "kernels/row_vectors.cuh"

namespace shedder {

struct ConvStrides {
    int64_t batch, channel, time;
};

struct CausalConv1dParams {
    const void *x, *initial_states;                          // initial_states may be null
    void *y, *final_states;                                  // final_states (batch, channel, width-1), contiguous
    Parameter weight, bias;
    const int32_t *seq_idx;                                  // null: one sequence in each row
    ConvStrides x_strides, y_strides, initial_strides;
    int64_t weight_channel_stride, weight_tap_stride, bias_stride, seq_idx_batch_stride, seq_idx_time_stride;
    int64_t batch;
    int channels, length;
    const void *x_end;                                       // beyond the last element of x
    int width, steps;                                        // steps: tokens that one thread walks over
    bool silu;
};

constexpr int kConvThreads = 128;
constexpr int kMaxWidth = 4;
constexpr int kHistory = kMaxWidth - 1;                      // inputs t-3, t-2, t-1
constexpr int kLaneChannels = 4;                             // of causal_conv1d_channels
constexpr int kConvVectors = 4;                              // of causal_conv1d_time: 64 bytes in flight for each lane

// The taps of kCount channels from c on, the newest last (a narrower filter leaves the first ones 0), and their biases.
template <int kCount>
__device__ inline void load_conv_taps(const CausalConv1dParams &p, int64_t c, float (&taps)[kMaxWidth][kCount],
                                      float (&bias)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        bias[i] = 0.f;
#pragma unroll
        for (int k = 0; k < kMaxWidth; ++k) taps[k][i] = 0.f;
    }
    const int absent = kMaxWidth - p.width;
    p.weight.visit([&](auto *weight) {
        weight += c * p.weight_channel_stride - absent * p.weight_tap_stride;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
#pragma unroll
            for (int k = 0; k < kMaxWidth; ++k)
                if (k >= absent && c + i < p.channels)
                    taps[k][i] = to_float(weight[i * p.weight_channel_stride + k * p.weight_tap_stride]);
        }
    });
    p.bias.visit([&](auto *from) {
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            if (c + i < p.channels) bias[i] = to_float(from[(c + i) * p.bias_stride]);
    });
}

// Input t of channel c, which before the row is an initial state or zero.
template <typename T>
__device__ inline float conv_input(const CausalConv1dParams &p, int64_t b, int64_t c, int64_t t) {
    if (t >= 0)
        return to_float(static_cast<const T *>(p.x)[b * p.x_strides.batch + c * p.x_strides.channel
                                                    + t * p.x_strides.time]);
    const int64_t k = t + p.width - 1;
    if (p.initial_states == nullptr || k < 0) return 0.f;
    return to_float(static_cast<const T *>(p.initial_states)[b * p.initial_strides.batch
                                                             + c * p.initial_strides.channel
                                                             + k * p.initial_strides.time]);
}

// The sequence of token t; tokens before the row count as its first sequence.
__device__ inline int conv_sequence(const CausalConv1dParams &p, int64_t b, int64_t t) {
    return __ldg(p.seq_idx + b * p.seq_idx_batch_stride + max(t, int64_t{0}) * p.seq_idx_time_stride);
}

// act(bias + taps), where window[k] is the input under tap k and names are the sequences of the four tokens.
template <bool kPacked>
__device__ inline float conv_output(const CausalConv1dParams &p, const float (&window)[kMaxWidth],
                                    const float (&taps)[kMaxWidth], float bias, const int (&names)[kMaxWidth]) {
    float y = bias;
#pragma unroll
    for (int k = 0; k < kMaxWidth; ++k) {
        bool reaches = k >= kMaxWidth - p.width;
        if constexpr (kPacked) reaches = reaches && names[k] == names[kHistory];
        if (reaches) y += taps[k] * window[k];
    }
    if (p.silu) y = fast_silu(y);
    if constexpr (kPacked)
        if (names[kHistory] < 0) y = 0.f;
    return y;
}

// The next kUnroll tokens are on their way while these are computed.
template <typename T, bool kAligned, bool kPacked>
__global__ void __launch_bounds__(kConvThreads) causal_conv1d_channels(const __grid_constant__ CausalConv1dParams p) {
    constexpr int kCount = kLaneChannels;
    constexpr int kUnroll = 4;
    const int lane = threadIdx.x % 32;
    const unsigned tiles = (p.channels + 32 * kCount - 1) / (32 * kCount);
    const unsigned chunks = (p.length + p.steps - 1) / p.steps;
    unsigned task = blockIdx.x * (kConvThreads / 32) + threadIdx.x / 32;
    const int c = static_cast<int>(task % tiles) * 32 * kCount + lane * kCount;
    task /= tiles;
    const int start = static_cast<int>(task % chunks) * p.steps;
    const int64_t b = task / chunks;
    if (b >= p.batch) return;                                // the whole warp
    const int end = min(start + p.steps, p.length);
    const T *x = static_cast<const T *>(p.x) + b * p.x_strides.batch;
    T *y = static_cast<T *>(p.y) + b * p.y_strides.batch;
    const T *x_end = static_cast<const T *>(p.x_end);
    const auto x_row = [&](int t) { return x + t * p.x_strides.time; };

    RowVector<T, kCount, kAligned> next[kUnroll], past[kHistory];
    int next_names[kUnroll] = {}, names[kMaxWidth] = {};
    const auto fetch = [&](int t) {
#pragma unroll
        for (int s = 0; s < kUnroll; ++s) {
            if (t + s >= end) break;
            next[s].fetch(x_row(t + s), c, p.channels, x_end);
            if constexpr (kPacked) next_names[s] = conv_sequence(p, b, t + s);
        }
    };
    fetch(start);
#pragma unroll
    for (int k = 0; k < kHistory; ++k) {
        const int t = start - kHistory + k;
        if (t >= 0) past[k].fetch(x_row(t), c, p.channels, x_end);
        if constexpr (kPacked) names[k] = conv_sequence(p, b, t);
    }
    float taps[kMaxWidth][kCount], bias[kCount], history[kHistory][kCount];
    load_conv_taps(p, c, taps, bias);
#pragma unroll
    for (int k = 0; k < kHistory; ++k) {
        const int t = start - kHistory + k;
        if (t >= 0) {
            const Packed<T, kCount> v = past[k].get(x_row(t), c, p.channels);
#pragma unroll
            for (int i = 0; i < kCount; ++i) history[k][i] = to_float(v.at[i]);
        } else {
#pragma unroll
            for (int i = 0; i < kCount; ++i) history[k][i] = c + i < p.channels ? conv_input<T>(p, b, c + i, t) : 0.f;
        }
    }

    for (int t = start; t < end; t += kUnroll) {
        Packed<T, kCount> inputs[kUnroll];
        int new_names[kUnroll];
#pragma unroll
        for (int s = 0; s < kUnroll; ++s) {
            inputs[s] = next[s].get(x_row(t + s), c, p.channels);
            new_names[s] = next_names[s];
        }
        fetch(t + kUnroll);
#pragma unroll
        for (int s = 0; s < kUnroll; ++s) {
            if (t + s >= end) break;
            Packed<T, kCount> outputs;
            names[kHistory] = new_names[s];
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const float newest = to_float(inputs[s].at[i]);
                const float window[kMaxWidth] = {history[0][i], history[1][i], history[2][i], newest};
                const float tap[kMaxWidth] = {taps[0][i], taps[1][i], taps[2][i], taps[3][i]};
                outputs.at[i] = from_float<T>(conv_output<kPacked>(p, window, tap, bias[i], names));
                history[0][i] = history[1][i];
                history[1][i] = history[2][i];
                history[2][i] = newest;
            }
#pragma unroll
            for (int k = 0; k < kHistory; ++k) names[k] = names[k + 1];
            store_row_vector<kAligned>(y + (t + s) * p.y_strides.time, c, p.channels, outputs);
        }
    }

    if (end == p.length) {
        T *final_states = static_cast<T *>(p.final_states);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            if (c + i >= p.channels) break;
#pragma unroll
            for (int k = 0; k < kHistory; ++k) {
                const int place = k - (kMaxWidth - p.width);
                if (place >= 0)
                    final_states[(b * p.channels + c + i) * (p.width - 1) + place] = from_float<T>(history[k][i]);
            }
        }
    }
}

template <typename T, bool kAligned, bool kPacked>
__global__ void __launch_bounds__(kConvThreads) causal_conv1d_time(const __grid_constant__ CausalConv1dParams p) {
    constexpr int kCount = 16 / sizeof(T);
    constexpr int kSpan = 32 * kCount;                       // tokens that the warp moves by one access
    constexpr int kEdge = sizeof(T) == 4 ? 1 : 2;            // the first word with a part of the inputs t-3 .. t-1
    constexpr unsigned kAll = 0xffffffffu;
    const int lane = threadIdx.x % 32;
    const unsigned chunks = (p.length + kSpan * kConvVectors - 1) / (kSpan * kConvVectors);
    unsigned task = blockIdx.x * (kConvThreads / 32) + threadIdx.x / 32;
    const int start = static_cast<int>(task % chunks) * kSpan * kConvVectors;
    task /= chunks;
    const int c = static_cast<int>(task % p.channels);
    const int64_t b = task / p.channels;
    if (b >= p.batch) return;
    const T *x = static_cast<const T *>(p.x) + b * p.x_strides.batch + c * p.x_strides.channel;
    T *y = static_cast<T *>(p.y) + b * p.y_strides.batch + c * p.y_strides.channel;

    RowVector<T, kCount, kAligned> fetched[kConvVectors];
#pragma unroll
    for (int v = 0; v < kConvVectors; ++v)
        if (start + v * kSpan < p.length)
            fetched[v].fetch(x, start + v * kSpan + lane * kCount, p.length, static_cast<const T *>(p.x_end));
    float before[kHistory] = {};                             // of the warp's first token
    if (lane == 0) {
#pragma unroll
        for (int k = 0; k < kHistory; ++k) before[k] = conv_input<T>(p, b, c, start - kHistory + k);
    }
    float taps[kMaxWidth][1], bias[1];
    load_conv_taps(p, c, taps, bias);
    const float tap[kMaxWidth] = {taps[0][0], taps[1][0], taps[2][0], taps[3][0]};

    Packed<T, kCount> previous;
#pragma unroll
    for (int v = 0; v < kConvVectors; ++v) {
        const int first = start + v * kSpan;
        if (first >= p.length) break;
        const int t = first + lane * kCount;
        const Packed<T, kCount> inputs = fetched[v].get(x, t, p.length);
        Packed<T, kCount> left;                              // the neighbour's vector, of which the end is wanted
#pragma unroll
        for (int i = kEdge; i < 4; ++i) {
            left.word[i] = __shfl_up_sync(kAll, inputs.word[i], 1);
            if (v > 0) {
                const uint32_t last = __shfl_sync(kAll, previous.word[i], 31);
                if (lane == 0) left.word[i] = last;
            }
        }
        previous = inputs;
        float row[kHistory + kCount];
        int names[kHistory + kCount] = {};
#pragma unroll
        for (int k = 0; k < kHistory; ++k)
            row[k] = v == 0 && lane == 0 ? before[k] : to_float(left.at[kCount - kHistory + k]);
#pragma unroll
        for (int i = 0; i < kCount; ++i) row[kHistory + i] = to_float(inputs.at[i]);
        if constexpr (kPacked) {
#pragma unroll
            for (int i = 0; i < kHistory + kCount; ++i)
                names[i] = t - kHistory + i < p.length ? conv_sequence(p, b, t - kHistory + i) : -1;
        }
        Packed<T, kCount> outputs;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const float window[kMaxWidth] = {row[i], row[i + 1], row[i + 2], row[i + 3]};
            const int named[kMaxWidth] = {names[i], names[i + 1], names[i + 2], names[i + 3]};
            outputs.at[i] = from_float<T>(conv_output<kPacked>(p, window, tap, bias[0], named));
        }
        store_row_vector<kAligned>(y, t, p.length, outputs);
    }

    if (start + kSpan * kConvVectors >= p.length && lane < p.width - 1)
        static_cast<T *>(p.final_states)[(b * p.channels + c) * (p.width - 1) + lane] =
            from_float<T>(conv_input<T>(p, b, c, p.length - (p.width - 1) + lane));
}

template <typename T>
__global__ void __launch_bounds__(kConvThreads) causal_conv1d_any(const __grid_constant__ CausalConv1dParams p) {
    const unsigned chunks = (p.length + p.steps - 1) / p.steps;
    unsigned task = blockIdx.x * kConvThreads + threadIdx.x;
    const int c = static_cast<int>(task % p.channels);
    task /= p.channels;
    const int start = static_cast<int>(task % chunks) * p.steps;
    const int64_t b = task / chunks;
    if (b >= p.batch) return;
    const int end = min(start + p.steps, p.length);
    float taps[kMaxWidth][1], bias[1], window[kMaxWidth] = {};
    int names[kMaxWidth] = {};
    const bool packed = p.seq_idx != nullptr;
    load_conv_taps(p, c, taps, bias);
    const float tap[kMaxWidth] = {taps[0][0], taps[1][0], taps[2][0], taps[3][0]};
#pragma unroll
    for (int k = 0; k < kHistory; ++k) {
        window[k + 1] = conv_input<T>(p, b, c, start - kHistory + k);
        if (packed) names[k + 1] = conv_sequence(p, b, start - kHistory + k);
    }
    T *y = static_cast<T *>(p.y) + b * p.y_strides.batch + c * p.y_strides.channel;
    for (int t = start; t < end; ++t) {
#pragma unroll
        for (int k = 0; k < kHistory; ++k) {
            window[k] = window[k + 1];
            names[k] = names[k + 1];
        }
        window[kHistory] = conv_input<T>(p, b, c, t);
        if (packed) names[kHistory] = conv_sequence(p, b, t);
        y[t * p.y_strides.time] = from_float<T>(conv_output<true>(p, window, tap, bias[0], names));
    }
    if (end == p.length)
#pragma unroll
        for (int k = 1; k < kMaxWidth; ++k) {
            const int place = k - (kMaxWidth - p.width) - 1;
            if (place >= 0)
                static_cast<T *>(p.final_states)[(b * p.channels + c) * (p.width - 1) + place] =
                    from_float<T>(window[k]);
        }
}

}  // namespace shedder
