// Causal convolution (causal_conv1d.cuh) where time is adjacent in memory.
//
// A lane owns 16 bytes of time on the grid of the row; the three inputs before them come from its neighbour.

#pragma once

#include "kernels/causal_conv1d.cuh"

namespace shedder {

constexpr int kConvVectors = 2;                              // in flight for each lane

// One branch around many values, so that their chains of instructions overlap.
template <typename T, int kRows, int kCount>
__device__ inline void conv_activate(const CausalConv1dParams &p, float (&sums)[kRows][kCount]) {
    if (!p.silu) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) sums[r][i] = silu_for<T>(sums[r][i]);
    }
}

// kGrid: of y as seen from x. kSame: rows start off the grid, both alike; kOther: y goes element by element.
template <typename T, bool kFull, bool kPacked, Grid kGrid>
__global__ void __launch_bounds__(kConvThreads) causal_conv1d_time(const __grid_constant__ CausalConv1dParams p) {
    constexpr int kCount = 16 / sizeof(T);
    constexpr int kSpan = 32 * kCount;                       // tokens that the warp moves by one access
    constexpr unsigned kAll = 0xffffffffu;
    const int lane = threadIdx.x % 32;
    const unsigned row = blockIdx.x * (kConvThreads / 32) + threadIdx.x / 32;
    const int64_t b = row / static_cast<unsigned>(p.channels);
    const int c = static_cast<int>(row % static_cast<unsigned>(p.channels));
    if (b >= p.batch) return;                                // the whole warp
    const T *x = static_cast<const T *>(p.x) + b * p.x_strides.batch + c * p.x_strides.channel;
    T *y = static_cast<T *>(p.y) + b * p.y_strides.batch + c * p.y_strides.channel;
    const int before = kGrid == Grid::kWhole ? 0 : columns_off_grid<T, kCount>(x);
    const int start = static_cast<int>(blockIdx.y) * p.steps - before, end = min(start + p.steps, p.length);
    if (start >= end) return;

    const T *initial = nullptr;
    if (p.initial_states != nullptr)
        initial = static_cast<const T *>(p.initial_states) + b * p.initial_strides.batch
            + c * p.initial_strides.channel;
    const auto input = [&](int t) {                          // conv_input of this row
        const int k = t + p.width - 1;
        if (t >= 0) return x[t];
        return initial != nullptr && k >= 0 ? initial[k * p.initial_strides.time] : from_float<T>(0.f);
    };
    Packed<T, kCount> next[kConvVectors];
    const auto fetch = [&](int first) {
#pragma unroll
        for (int v = 0; v < kConvVectors; ++v) {
            const int t = first + v * kSpan + lane * kCount;
            const bool whole = kGrid == Grid::kWhole ? t < end : t >= 0 && t + kCount <= p.length;
            load_if(whole, next[v].word, x + t);
            if (kGrid != Grid::kWhole && !whole) {
#pragma unroll
                for (int i = 0; i < kCount; ++i)
                    if (t + i < p.length) next[v].at[i] = input(t + i);
            }
        }
    };
    wait_for_kernel_before();
    fetch(start);
    // The last lanes hold the inputs before `start`.
    const T edge = lane < 32 - kHistory ? from_float<T>(0.f) : input(start - 32 + lane);
    float taps[kMaxWidth][1], bias[1];
    load_conv_taps<kFull>(p, [&](int) { return c; }, taps, bias);
    const float tap[kMaxWidth] = {taps[0][0], taps[1][0], taps[2][0], taps[3][0]};
    float previous[kHistory];                                // in lane 0: the inputs before its vector
#pragma unroll
    for (int k = 0; k < kHistory; ++k) previous[k] = __shfl_sync(kAll, to_float(edge), 32 - kHistory + k);

    for (int first = start; first < end; first += kConvVectors * kSpan) {
        Packed<T, kCount> inputs[kConvVectors];
#pragma unroll
        for (int v = 0; v < kConvVectors; ++v) inputs[v] = next[v];
        if (first + kConvVectors * kSpan < end) fetch(first + kConvVectors * kSpan);
#pragma unroll
        for (int v = 0; v < kConvVectors; ++v) {
            const int t = first + v * kSpan + lane * kCount;
            float window[kHistory + kCount];
            int names[kHistory + kCount] = {};
#pragma unroll
            for (int i = 0; i < kCount; ++i) window[kHistory + i] = to_float(inputs[v].at[i]);
#pragma unroll
            for (int k = 0; k < kHistory; ++k) {
                const float left = __shfl_sync(kAll, window[kCount + k], lane + 31);      // of lane 31 for lane 0
                window[k] = lane == 0 ? previous[k] : left;
                previous[k] = left;
            }
            if constexpr (kPacked) {
#pragma unroll
                for (int i = 0; i < kHistory + kCount; ++i)
                    names[i] = conv_sequence(p, b, min(t - kHistory + i, p.length - 1));
            }
            float sums[1][kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const float under[kMaxWidth] = {window[i], window[i + 1], window[i + 2], window[i + 3]};
                const int named[kMaxWidth] = {names[i], names[i + 1], names[i + 2], names[i + 3]};
                sums[0][i] = conv_sum<kFull, kPacked>(p, under, tap, bias[0], named);
            }
            Packed<T, kCount> outputs;
            conv_activate<T>(p, sums);
            outputs.set(sums[0]);
            if constexpr (kGrid != Grid::kOther) {
                store_row_vector<kGrid>(y, t, end, outputs);
            } else {
#pragma unroll
                for (int i = 0; i < kCount; ++i)
                    if (0 <= t + i && t + i < end) y[t + i] = outputs.at[i];
            }
        }
    }
    if (end == p.length && lane < p.width - 1 && p.final_states != nullptr)
        static_cast<T *>(p.final_states)[(b * p.channels + c) * (p.width - 1) + lane] =
            input(p.length - (p.width - 1) + lane);
}

}  // namespace shedder
