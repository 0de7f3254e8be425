// Selective scan, forward.
//
//   delta  = softplus(delta + bias)
//   h[t,n] = exp(delta[t] A[n]) h[t-1,n] + delta[t] B[t,n] u[t]
//   y[t]   = (sum_n C[t,n] h[t,n] + D u[t]) silu(z[t])
//
// The form for every case: any group for any channel, B and C that do not change with time, packed sequences. Where all
// channels read one group selective_scan_tiled.cuh is many times faster.
//
// kLanes neighbouring threads of a warp own one channel, kStates states each, and walk along t with h in registers;
// the sum over n crosses the lanes by shuffles. Each thread reads its own B and C from global memory.

#pragma once

#include <cstdint>

#include "kernels/dependents.cuh"
#include "kernels/pointwise.cuh"

namespace shedder {

struct Strides3 {
    int64_t batch, channel, time;
};

struct Strides4 {
    int64_t batch, group, state, time;
};

struct SelectiveScanParams {
    const void *u, *delta, *B, *C, *z;                       // Input; z may be null
    const float *A, *D, *delta_bias, *initial_state;         // all but A may be null
    void *y;
    float *final_state;                                      // (batch, channel, state) contiguous, as initial_state
    const int32_t *channel_to_group;                         // null: one group
    const int32_t *seq_idx;                                  // (batch, length) contiguous; null: one sequence
    Strides3 u_strides, delta_strides, z_strides, y_strides;
    Strides4 B_strides, C_strides;
    int64_t A_channel_stride, A_state_stride, D_stride, delta_bias_stride;
    int batch, channels, length, dstate;
    bool delta_softplus;
    bool constant_B, constant_C;                             // float (channel, state): strides.group is the channel's
};

constexpr int kScanThreads = 128;

template <typename Input, int kStates, int kLanes>
__global__ void __launch_bounds__(kScanThreads) selective_scan_fwd(SelectiveScanParams p) {
    constexpr int kChannels = kScanThreads / kLanes;
    const int lane = threadIdx.x % kLanes;
    const int channel = blockIdx.x * kChannels + threadIdx.x / kLanes;
    const bool active = channel < p.channels;
    const int64_t c = active ? channel : p.channels - 1;     // spare threads follow the last channel and never write
    const int64_t b = blockIdx.y;
    const int first = lane * kStates;

    const Input *u = static_cast<const Input *>(p.u) + b * p.u_strides.batch + c * p.u_strides.channel;
    const Input *delta = static_cast<const Input *>(p.delta) + b * p.delta_strides.batch + c * p.delta_strides.channel;
    const Input *z = p.z == nullptr
        ? nullptr : static_cast<const Input *>(p.z) + b * p.z_strides.batch + c * p.z_strides.channel;
    Input *y = static_cast<Input *>(p.y) + b * p.y_strides.batch + c * p.y_strides.channel;
    wait_for_kernel_before();
    const int64_t group = p.channel_to_group == nullptr ? 0 : p.channel_to_group[c];
    const int64_t B_row = b * p.B_strides.batch + (p.constant_B ? c : group) * p.B_strides.group;
    const int64_t C_row = b * p.C_strides.batch + (p.constant_C ? c : group) * p.C_strides.group;
    auto element = [](const void *tensor, bool constant, int64_t at) {
        return constant ? static_cast<const float *>(tensor)[at] : to_float(static_cast<const Input *>(tensor)[at]);
    };
    const int64_t state_row = (b * p.channels + c) * p.dstate;

    float A[kStates], h[kStates];
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
        const int n = first + i;
        const bool real = n < p.dstate;
        A[i] = real ? p.A[c * p.A_channel_stride + n * p.A_state_stride] * kLog2e : 0.f;
        h[i] = real && p.initial_state != nullptr ? p.initial_state[state_row + n] : 0.f;
    }
    const float skip = p.D == nullptr ? 0.f : p.D[c * p.D_stride];
    const float bias = p.delta_bias == nullptr ? 0.f : p.delta_bias[c * p.delta_bias_stride];

    const int32_t *seq_idx = p.seq_idx == nullptr ? nullptr : p.seq_idx + b * p.length;
    int sequence = -1;                                       // none yet
    for (int64_t t = 0; t < p.length; ++t) {
        const float u_t = to_float(u[t * p.u_strides.time]);
        float step = to_float(delta[t * p.delta_strides.time]) + bias;
        step = p.delta_softplus ? softplus(step) : step;
        bool padding = false;
        if (seq_idx != nullptr) {
            const int name = seq_idx[t];
            padding = name < 0;
            if (padding) step = 0.f;
            else {
                if (sequence >= 0 && name != sequence)
#pragma unroll
                    for (int i = 0; i < kStates; ++i) h[i] = 0.f;
                sequence = name;
            }
        }
        const float input = step * u_t;
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < kStates; ++i) {
            const int n = first + i;
            const bool real = n < p.dstate;
            const float B_t = real
                ? element(p.B, p.constant_B, B_row + n * p.B_strides.state + t * p.B_strides.time) : 0.f;
            const float C_t = real
                ? element(p.C, p.constant_C, C_row + n * p.C_strides.state + t * p.C_strides.time) : 0.f;
            h[i] = exp2f(step * A[i]) * h[i] + input * B_t;
            sum += C_t * h[i];
        }
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        if (active && lane == 0) {
            sum += skip * u_t;
            if (z != nullptr) sum *= silu(to_float(z[t * p.z_strides.time]));
            y[t * p.y_strides.time] = from_float<Input>(padding ? 0.f : sum);
        }
    }
    if (!active || p.final_state == nullptr) return;
#pragma unroll
    for (int i = 0; i < kStates; ++i)
        if (first + i < p.dstate) p.final_state[state_row + first + i] = h[i];
}

}  // namespace shedder
