// Decode steps of the causal convolution; the state is the last K inputs, oldest first, or a ring of them.
//
// One thread owns (batch, channel), reads its window once and writes it back. Bound: bytes of the state.

#pragma once

#include "kernels/causal_conv1d.cuh"

namespace shedder {

struct CausalConv1dUpdateParams {
    CausalConv1dParams conv;                                 // x and y (batch, channel, token); no initial or final states
    void *state;
    ConvStrides state_strides;                               // slot, channel, place
    const int32_t *seen, *slots;                             // both may be null
    int64_t seen_stride, slots_stride;
    int64_t kept;                                            // K
};

template <typename T>
__global__ void __launch_bounds__(kConvThreads) causal_conv1d_step(const __grid_constant__ CausalConv1dUpdateParams q) {
    const CausalConv1dParams &p = q.conv;
    const unsigned task = blockIdx.x * kConvThreads + threadIdx.x;
    const int c = static_cast<int>(task % p.channels);
    const int64_t b = task / p.channels;
    if (b >= p.batch) return;
    T *y = static_cast<T *>(p.y) + b * p.y_strides.batch + c * p.y_strides.channel;
    wait_for_kernel_before();
    start_dependents();
    const int64_t slot = q.slots == nullptr ? b : q.slots[b * q.slots_stride];
    if (slot < 0) {                                          // a padding row of the batch
        for (int t = 0; t < p.length; ++t) y[t * p.y_strides.time] = from_float<T>(0.f);
        return;
    }
    T *state = static_cast<T *>(q.state) + slot * q.state_strides.batch + c * q.state_strides.channel;
    const T *x = static_cast<const T *>(p.x) + b * p.x_strides.batch + c * p.x_strides.channel;
    // Token t < 0 sits at (end + t) mod K.
    int64_t end = q.kept;
    if (q.seen != nullptr) {
        end = q.seen[b * q.seen_stride] % q.kept;
        if (end < kHistory) end += (kHistory + q.kept - 1) / q.kept * q.kept;
    }
    T window[kMaxWidth];
    float taps[kMaxWidth][1], bias[1];
    const int names[kMaxWidth] = {};
    load_conv_taps<false>(p, [&](int) { return c; }, taps, bias);
    const float tap[kMaxWidth] = {taps[0][0], taps[1][0], taps[2][0], taps[3][0]};
#pragma unroll
    for (int k = 0; k < kHistory; ++k) {
        int64_t place = end - kHistory + k;
        if (q.seen != nullptr) place %= q.kept;
        window[k + 1] = k >= kMaxWidth - p.width ? state[place * q.state_strides.time] : from_float<T>(0.f);
    }
    for (int t = 0; t < p.length; ++t) {
#pragma unroll
        for (int k = 0; k < kHistory; ++k) window[k] = window[k + 1];
        window[kHistory] = x[t * p.x_strides.time];
        float inputs[kMaxWidth];
#pragma unroll
        for (int k = 0; k < kMaxWidth; ++k) inputs[k] = to_float(window[k]);
        const float sum = conv_sum<false, false>(p, inputs, tap, bias[0], names);
        y[t * p.y_strides.time] = from_float<T>(p.silu ? silu_for<T>(sum) : sum);
    }
    if (q.seen == nullptr) {
        const int64_t moved = max(q.kept - p.length, int64_t{0});        // places that keep an older input
        for (int64_t k = 0; k < moved; ++k)
            state[k * q.state_strides.time] = state[(k + p.length) * q.state_strides.time];
        for (int64_t k = moved; k < q.kept; ++k)
            state[k * q.state_strides.time] = x[(k + p.length - q.kept) * p.x_strides.time];
    } else {
        for (int64_t t = max(p.length - q.kept, int64_t{0}); t < p.length; ++t)
            state[(end + t) % q.kept * q.state_strides.time] = x[t * p.x_strides.time];
    }
}

}  // namespace shedder
