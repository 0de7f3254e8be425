// Selective scan with complex A (S4D and its like), forward.
//
//   delta  = softplus(delta + bias)
//   h[t,n] = exp(delta[t] A[n]) h[t-1,n] + delta[t] B[t,n] u[t]          complex
//   y[t]   = (2 Re sum_n C[t,n] h[t,n] + D u[t]) silu(z[t])
//
// kLanes neighbouring threads own one channel, kStates states each, and walk along t with h in registers. Of the steps
// of a piece a lane prepares and finishes its own, and the sums over states are exchanged among lanes; the next piece
// is on its way meanwhile. B and C pass through shared memory once for all channels of the CTA; channels of several
// groups are done one group after the other, and a B or C that does not change with time lies there for each thread.
// Bound by arithmetic: 30 instructions a state and step, of which 20 are sine and cosine, exact to the last bits since
// a slowly decaying state adds up the errors of a thousand angles.

#pragma once

#include "kernels/selective_scan_fwd.cuh"

namespace shedder {

template <int kStates, int kLanes>
struct ComplexTile {
    static constexpr bool kFew = kStates == 1;               // few channels: latency counts, else instructions
    static constexpr int kThreads = kFew ? 64 : 128;
    static constexpr int kCtas = kStates == 8 ? 3 : kStates == 4 ? 7 : 4;            // that the registers have room for
    static constexpr int kPiece = !kFew ? 4 : kLanes < 16 ? kLanes : 16;             // steps
    static constexpr int kN = kStates * kLanes;
    static constexpr int kLongest = kFew ? 128 : 64, kFitting = (kFew ? 2048 : 1024) / kN;
    static constexpr int kSteps = kFitting > kLongest ? kLongest : kFitting < 8 ? 8 : kFitting;      // of B and C
    static constexpr int kPitch = kN + 2;                    // keeps 16 bytes, and steps in other banks
    static constexpr int kElements = kSteps * kPitch > kThreads * kStates ? kSteps * kPitch : kThreads * kStates;
};

// Rows of (state, time) pairs of real and imaginary part, for all channels: to[t][n], zeros where there are none.
template <typename Input, typename Tile>
__device__ __forceinline__ void load_complex_tile(float2 *to, const Input *from, const Strides4 &strides, int states,
                                                  int steps) {
#pragma unroll 4
    for (int i = threadIdx.x; i < Tile::kSteps * Tile::kN; i += Tile::kThreads) {
        const int t = i % Tile::kSteps, n = i / Tile::kSteps;
        float2 v = {0.f, 0.f};
        if (n < states && t < steps) {
            const Input *at = from + n * strides.state + 2 * t * strides.time;
            v = {to_float(at[0]), to_float(at[strides.time])};
        }
        to[t * Tile::kPitch + n] = v;
    }
}

// The sums over kLanes lanes of kCount values: each lane keeps its share, from the first place on.
template <int kCount, int kLanes, int kPiece>
__device__ __forceinline__ void sum_over_lanes(float (&v)[kPiece], int lane) {
    if constexpr (kLanes > 1) {
        if constexpr (kCount > 1) {
            const bool upper = lane % kLanes >= kLanes / 2;
#pragma unroll
            for (int i = 0; i < kCount / 2; ++i) {
                const float sent = upper ? v[i] : v[i + kCount / 2];
                const float kept = upper ? v[i + kCount / 2] : v[i];
                v[i] = kept + __shfl_xor_sync(0xffffffffu, sent, kLanes / 2);
            }
            sum_over_lanes<kCount / 2, kLanes / 2>(v, lane);
        } else {
            v[0] += __shfl_xor_sync(0xffffffffu, v[0], kLanes / 2);
            sum_over_lanes<1, kLanes / 2>(v, lane);
        }
    }
}

// p.A, p.initial_state, p.final_state, and B and C constant in time: pairs of real and imaginary part; p.A's strides
// count pairs. p.B and p.C that change: strides.time is that of the 2 L numbers of a row. p.seq_idx: runs, ~run for
// padding.
template <typename Input, int kStates, int kLanes>
__global__ void __launch_bounds__(ComplexTile<kStates, kLanes>::kThreads, ComplexTile<kStates, kLanes>::kCtas)
    selective_scan_complex(const __grid_constant__ SelectiveScanParams p, int groups) {
    using Tile = ComplexTile<kStates, kLanes>;
    constexpr int kChannels = Tile::kThreads / kLanes, kPiece = Tile::kPiece;
    constexpr int kSharing = kLanes < kPiece ? kLanes : kPiece;                      // lanes with steps of their own
    constexpr int kOwn = kPiece / kSharing;                                          // steps of each of them
    constexpr int kRepeats = kLanes / kSharing;                                      // lanes with the same steps
    __shared__ __align__(16) float2 B_shared[Tile::kElements], C_shared[Tile::kElements];

    const int lane = threadIdx.x % kLanes;
    const int channel = blockIdx.x * kChannels + threadIdx.x / kLanes;
    const bool exists = channel < p.channels;
    const int64_t c = exists ? channel : p.channels - 1, b = blockIdx.y;
    const int first = lane * kStates, first_own = lane / kRepeats * kOwn;

    const Input *u = static_cast<const Input *>(p.u) + b * p.u_strides.batch + c * p.u_strides.channel;
    const Input *delta = static_cast<const Input *>(p.delta) + b * p.delta_strides.batch + c * p.delta_strides.channel;
    const Input *z = p.z == nullptr
        ? nullptr : static_cast<const Input *>(p.z) + b * p.z_strides.batch + c * p.z_strides.channel;
    Input *y = static_cast<Input *>(p.y) + b * p.y_strides.batch + c * p.y_strides.channel;
    const int32_t *runs = p.seq_idx == nullptr ? nullptr : p.seq_idx + b * p.length;
    const int64_t state_row = (b * p.channels + c) * p.dstate;
    wait_for_kernel_before();
    const float skip = p.D == nullptr ? 0.f : p.D[c * p.D_stride];
    const float bias = p.delta_bias == nullptr ? 0.f : p.delta_bias[c * p.delta_bias_stride];

    // exp(delta A) = 2^(delta A_real) (cos + i sin)(pi delta A_turn)
    float A_real[kStates], A_turn[kStates];
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
        const bool real = first + i < p.dstate;
        const float *a = p.A + 2 * (c * p.A_channel_stride + (first + i) * p.A_state_stride);
        A_real[i] = real ? a[0] * kLog2e : 0.f;
        A_turn[i] = real ? a[1] * 0.318309886183790672f : 0.f;
    }
    auto constant = [&](const void *tensor, const Strides4 &strides, float2 *shared) {
#pragma unroll
        for (int i = 0; i < kStates; ++i)
            shared[threadIdx.x * kStates + i] = first + i < p.dstate
                ? static_cast<const float2 *>(tensor)[c * strides.group + (first + i) * strides.state]
                : float2{0.f, 0.f};
    };
    if (p.constant_B) constant(p.B, p.B_strides, B_shared);
    if (p.constant_C) constant(p.C, p.C_strides, C_shared);
    const float2 *const B_first = B_shared + (p.constant_B ? threadIdx.x * kStates : first);
    const float2 *const C_first = C_shared + (p.constant_C ? threadIdx.x * kStates : first);
    const int B_pitch = p.constant_B ? 0 : Tile::kPitch, C_pitch = p.constant_C ? 0 : Tile::kPitch;

    const int my_group = p.channel_to_group == nullptr ? 0 : p.channel_to_group[c];
#pragma unroll 1
    for (int group = 0; group < groups; ++group) {
        const bool mine = exists && my_group == group;
        if (!__syncthreads_or(mine)) continue;
        const bool warp_works = __any_sync(0xffffffffu, mine);
        float2 h[kStates];
#pragma unroll
        for (int i = 0; i < kStates; ++i)
            h[i] = p.initial_state == nullptr || first + i >= p.dstate
                ? float2{0.f, 0.f} : reinterpret_cast<const float2 *>(p.initial_state)[state_row + first + i];
        int run = 0;
        float next_u[kOwn], next_step[kOwn], next_z[kOwn];   // as given
        auto fetch = [&](int piece) {
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
                const int64_t t = piece + first_own + i;
                const bool there = t < p.length;
                next_u[i] = there ? to_float(u[t * p.u_strides.time]) : 0.f;
                next_step[i] = there ? to_float(delta[t * p.delta_strides.time]) : 0.f;
                next_z[i] = there && z != nullptr ? to_float(z[t * p.z_strides.time]) : 0.f;
            }
        };
        fetch(0);

#pragma unroll 1
        for (int t0 = 0; t0 < p.length; t0 += Tile::kSteps) {
            const int steps = min(p.length - t0, Tile::kSteps);
            auto load = [&](const void *tensor, const Strides4 &strides, float2 *to) {
                const int64_t at = b * strides.batch + group * strides.group + 2 * int64_t{t0} * strides.time;
                load_complex_tile<Input, Tile>(to, static_cast<const Input *>(tensor) + at, strides, p.dstate, steps);
            };
            __syncthreads();
            if (!p.constant_B) load(p.B, p.B_strides, B_shared);
            if (!p.constant_C) load(p.C, p.C_strides, C_shared);
            __syncthreads();
            if (!warp_works) continue;

#pragma unroll 1
            for (int piece = 0; piece < steps; piece += kPiece) {
                float own_u[kOwn], own_step[kOwn], own_z[kOwn];
                bool shown[kOwn];
#pragma unroll
                for (int i = 0; i < kOwn; ++i) {
                    const int64_t t = t0 + piece + first_own + i;
                    own_u[i] = next_u[i];
                    own_z[i] = next_z[i];
                    own_step[i] = next_step[i] + bias;
                    if (p.delta_softplus) own_step[i] = softplus(own_step[i]);
                    shown[i] = t < p.length && (runs == nullptr || runs[t] >= 0);
                    own_step[i] = shown[i] ? own_step[i] : 0.f;
                }
                fetch(t0 + piece + kPiece);
                float sums[kPiece];
#pragma unroll
                for (int s = 0; s < kPiece; ++s) {
                    if (!Tile::kFew) __syncwarp();           // bounds what the compiler takes ahead: registers
                    const int owner = s / kOwn * kRepeats;
                    const float step = __shfl_sync(0xffffffffu, own_step[s % kOwn], owner, kLanes);
                    const float input = step * __shfl_sync(0xffffffffu, own_u[s % kOwn], owner, kLanes);
                    if (runs != nullptr && piece + s < steps) {
                        const int named = runs[t0 + piece + s], now = named < 0 ? ~named : named;
                        if (now != run)
#pragma unroll
                            for (int i = 0; i < kStates; ++i) h[i] = {0.f, 0.f};
                        run = now;
                    }
                    const float2 *B = B_first + (piece + s) * B_pitch, *C = C_first + (piece + s) * C_pitch;
                    float sum = 0.f;
#pragma unroll
                    for (int i = 0; i < kStates; ++i) {
                        float sine, cosine;
                        sincospif(step * A_turn[i], &sine, &cosine);
                        const float decay = fast_exp2(step * A_real[i]);
                        const float real = decay * cosine, imaginary = decay * sine;
                        h[i] = {fmaf(real, h[i].x, fmaf(-imaginary, h[i].y, input * B[i].x)),
                                fmaf(real, h[i].y, fmaf(imaginary, h[i].x, input * B[i].y))};
                        sum = fmaf(C[i].x, h[i].x, fmaf(-C[i].y, h[i].y, sum));
                    }
                    sums[s] = sum;
                }
                sum_over_lanes<kPiece, kLanes>(sums, lane);
#pragma unroll
                for (int i = 0; i < kOwn; ++i) {
                    const int64_t t = t0 + piece + first_own + i;
                    if (!mine || t >= p.length || lane % kRepeats != 0) continue;
                    float out = fmaf(skip, own_u[i], 2.f * sums[i]);
                    if (z != nullptr) out *= silu(own_z[i]);
                    y[t * p.y_strides.time] = from_float<Input>(shown[i] ? out : 0.f);
                }
            }
        }
        if (!mine || p.final_state == nullptr) continue;
#pragma unroll
        for (int i = 0; i < kStates; ++i)
            if (first + i < p.dstate) reinterpret_cast<float2 *>(p.final_state)[state_row + first + i] = h[i];
    }
}

}  // namespace shedder
