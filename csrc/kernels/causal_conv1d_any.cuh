// Causal convolution (causal_conv1d.cuh) at any strides: one thread for each channel.

#pragma once

#include "kernels/causal_conv1d.cuh"

namespace shedder {

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
    wait_for_kernel_before();
    load_conv_taps<false>(p, [&](int) { return c; }, taps, bias);
    const float tap[kMaxWidth] = {taps[0][0], taps[1][0], taps[2][0], taps[3][0]};
#pragma unroll
    for (int k = 0; k < kHistory; ++k) {
        window[k + 1] = to_float(conv_input<T>(p, b, c, start - kHistory + k));
        if (packed) names[k + 1] = conv_sequence(p, b, start - kHistory + k);
    }
    T *y = static_cast<T *>(p.y) + b * p.y_strides.batch + p.parts.column(c) * p.y_strides.channel;
    for (int t = start; t < end; ++t) {
#pragma unroll
        for (int k = 0; k < kHistory; ++k) {
            window[k] = window[k + 1];
            names[k] = names[k + 1];
        }
        window[kHistory] = to_float(conv_input<T>(p, b, c, t));
        if (packed) names[kHistory] = conv_sequence(p, b, t);
        const float sum = conv_sum<false, true>(p, window, tap, bias[0], names);
        y[t * p.y_strides.time] = from_float<T>(p.silu ? silu_for<T>(sum) : sum);
    }
    if (end == p.length && p.final_states != nullptr)
        for (int k = 0; k < p.width - 1; ++k)
            static_cast<T *>(p.final_states)[(b * p.channels + c) * (p.width - 1) + k] =
                conv_input<T>(p, b, c, p.length - (p.width - 1) + k);
}

}  // namespace shedder
