// What is left of a Mamba layer whose state-space part is removed: convolution, gain, gate and norm in one pass.
//
//   u = D silu(conv(x))      y = norm(u silu(z))   or   norm(u) silu(z)   or, without a norm, u silu(z)
//
// A CTA owns all channels of a run of tokens and walks along time, two tokens at a turn; a thread owns 16 bytes of
// channels of one segment of the norm. What the inputs so far add to the next three outputs is carried in registers
// (causal_conv1d_channels.cuh), other numbers of a channel in shared memory, so that no register is spilled. Tokens on
// their way wait in a ring in shared memory, of which each thread fills and reads its own words only, so that they need
// neither registers nor barriers. Half of the lanes sum up the one token, half the other: one barrier for both.
// Bound: bytes of x, z and y.

#pragma once

#include "kernels/causal_conv1d.cuh"
#include "kernels/copy_async.cuh"
#include "kernels/row_vectors.cuh"

namespace shedder {

constexpr int kRemovedThreads = 640, kHalfRemovedThreads = 320;    // one CTA on a multiprocessor, and two
constexpr int kRemovedTurns = 3;                             // in the ring, of two tokens each
constexpr int kRemovedSegments = 64;

struct RemovedSSMParams {
    CausalConv1dParams conv;                                 // x and y with channels adjacent; no seq_idx
    const void *z;
    ConvStrides z_strides;
    Parameter norm_weight;                                   // absent: no norm
    const float *D;                                          // null: no gain
    int64_t norm_weight_stride, D_head_stride, D_place_stride;
    int headdim, segments;
    int bounds[kRemovedSegments + 1];                        // channels bounds[s] .. bounds[s+1]-1 are segment s
    int groups[kRemovedSegments + 1];                        // and groups[s] .. groups[s+1]-1 own them
    float inverse[kRemovedSegments], eps[kRemovedSegments];  // 1 / channels, and eps, of each segment
};

// Of each channel, in shared memory: half its bias and half its two older taps (silu_of_half takes half the sums), its
// gain and its weight in the norm.
enum RemovedNumber { kHalfBias, kOldestTap, kOlderTap, kGain, kNormWeight, kRemovedNumbers };

struct alignas(16) Quad {
    float at[4];
};

// Dynamic shared memory: the ring, x then z of each token; the numbers of channels.
template <typename T>
constexpr int64_t removed_ssm_shared_bytes(int threads) {
    return int64_t{threads} * (4 * kRemovedTurns * 16 + kRemovedNumbers * 4 * (16 / sizeof(T)));
}

// kThreads: at least those of the CTA; the distance of rows in shared memory. kPlain: width 4, and all parameters but D
// are of type T, the four taps of a channel one aligned word.
template <typename T, int kThreads, bool kNormBeforeGate, int kLanes, bool kPlain>
__global__ void __launch_bounds__(kThreads, kRemovedThreads / kThreads) removed_ssm_fwd(
    const __grid_constant__ RemovedSSMParams q) {
    constexpr int kCount = 16 / sizeof(T), kQuads = kCount / 4, kHalf = kLanes / 2;
    constexpr unsigned kAll = 0xffffffffu;
    extern __shared__ uint4 ring[];
    __shared__ float partial[2][2][kThreads / kLanes];       // of even and odd turns, of each token, from kLanes lanes
    const CausalConv1dParams &p = q.conv;
    const int thread = threadIdx.x;
    Quad *const numbers = reinterpret_cast<Quad *>(ring + 4 * kRemovedTurns * kThreads) + thread;
    const auto number = [&](RemovedNumber which, int quad) -> Quad & {
        return numbers[(which * kQuads + quad) * kThreads];
    };
    wait_for_kernel_before();
    const bool normed = q.norm_weight.present();

    const int group = thread / kLanes;
    int s = 0;
    if (kLanes < 32)
        while (s + 1 < q.segments && q.groups[s + 1] <= group) ++s;
    int c = q.bounds[s] + (thread - q.groups[s] * kLanes) * kCount;
    const bool exists = c < q.bounds[s + 1];
    if (!exists) c = 0;                                      // reads the first channels, writes nothing

    const int64_t b = blockIdx.y;
    const int start = static_cast<int>(blockIdx.x) * p.steps;
    const int end = min(start + p.steps, p.length);
    // Rows of tokens, the same in all threads.
    const T *x = static_cast<const T *>(p.x) + b * p.x_strides.batch + start * p.x_strides.time;
    const T *z = static_cast<const T *>(q.z) + b * q.z_strides.batch + start * q.z_strides.time;
    T *y = static_cast<T *>(p.y) + b * p.y_strides.batch + start * p.y_strides.time;

    uint4 *const mine = ring + thread;
    const T *next_x = x, *next_z = z;
    const auto request = [&](int t, int place) {             // tokens t and t + 1, one turn after the other
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            if (t + k < end) {
                copy_async(mine + place + 2 * k * kThreads, next_x + c);
                copy_async(mine + place + (2 * k + 1) * kThreads, next_z + c);
                next_x += p.x_strides.time;
                next_z += q.z_strides.time;
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
#pragma unroll
    for (int ahead = 0; ahead < kRemovedTurns; ++ahead) request(start + 2 * ahead, 4 * ahead * kThreads);

    // All that a CTA begins with is on its way before any of it is waited for.
    Packed<T, kCount> past[kHistory];
    const bool continues = start >= kHistory;
#pragma unroll
    for (int k = 0; k < kHistory; ++k)
        load_if(continues, past[k].word, x + (k - kHistory) * p.x_strides.time + c);
    float taps[2][kCount], carried[kHistory][kCount];        // half of the newer taps, of the sums to come
    {
        float all_taps[kMaxWidth][kCount], bias[kCount], gain[kCount], weight[kCount];
        int head = c / q.headdim, channel = c % q.headdim;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            gain[i] = q.D == nullptr ? 1.f : q.D[head * q.D_head_stride + channel * q.D_place_stride];
            if (++channel == q.headdim) channel = 0, ++head;
        }
        if constexpr (kPlain) {
            const T *from = static_cast<const T *>(p.weight.data);
            const bool has_bias = p.bias.present();          // a parameter that is absent is read elsewhere, not used
            const T *biases = has_bias ? static_cast<const T *>(p.bias.data) : from;
            const T *weights = normed ? static_cast<const T *>(q.norm_weight.data) : from;
            Packed<T, kMaxWidth> packed_taps[kCount];
            T packed_bias[kCount], packed_weight[kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                packed_taps[i].word = reinterpret_cast<const typename Packed<T, kMaxWidth>::Word *>(from)[c + i];
                packed_bias[i] = biases[(c + i) * p.bias_stride];
                packed_weight[i] = weights[(c + i) * q.norm_weight_stride];
            }
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                bias[i] = has_bias ? to_float(packed_bias[i]) : 0.f;
                weight[i] = to_float(packed_weight[i]);
#pragma unroll
                for (int k = 0; k < kMaxWidth; ++k) all_taps[k][i] = to_float(packed_taps[i].at[k]);
            }
        } else {
            load_conv_taps<false>(p, [&](int i) { return c + i; }, all_taps, bias);
            q.norm_weight.visit([&](auto *from) {
#pragma unroll
                for (int i = 0; i < kCount; ++i) weight[i] = to_float(from[(c + i) * q.norm_weight_stride]);
            });
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            number(kHalfBias, i / 4).at[i % 4] = 0.5f * bias[i];
            number(kOldestTap, i / 4).at[i % 4] = 0.5f * all_taps[0][i];
            number(kOlderTap, i / 4).at[i % 4] = 0.5f * all_taps[1][i];
            number(kGain, i / 4).at[i % 4] = gain[i];
            number(kNormWeight, i / 4).at[i % 4] = weight[i];
#pragma unroll
            for (int k = 0; k < 2; ++k) taps[k][i] = 0.5f * all_taps[2 + k][i];
#pragma unroll
            for (int k = 0; k < kHistory; ++k) carried[k][i] = 0.5f * bias[i];
        }
    }
    // Four channels of kTokens tokens: half their sums.
    const auto convolve = [&](const auto &inputs, int quad, auto &sums) {
        constexpr int kTokens = std::extent_v<std::remove_reference_t<decltype(inputs)>>;
        const int absent = kPlain ? 0 : kMaxWidth - p.width;
        const Quad bias = number(kHalfBias, quad), oldest = number(kOldestTap, quad), older = number(kOlderTap, quad);
#pragma unroll
        for (int k = 0; k < kTokens; ++k) {
            float x[kCount];
            inputs[k].get(x);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int i = 4 * quad + j;
                sums[k][i] = fmaf(taps[1][i], x[i], carried[0][i]);
                carried[0][i] = absent < 3 ? fmaf(taps[0][i], x[i], carried[1][i]) : carried[1][i];
                carried[1][i] = absent < 2 ? fmaf(older.at[j], x[i], carried[2][i]) : carried[2][i];
                carried[2][i] = absent < 1 ? fmaf(oldest.at[j], x[i], bias.at[j]) : bias.at[j];
            }
        }
    };
    if (!continues) {
#pragma unroll
        for (int k = 0; k < kHistory; ++k) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) past[k].at[i] = conv_input<T>(p, b, c + i, start - kHistory + k);
        }
    }
    float unused[kHistory][kCount];
#pragma unroll
    for (int i = 0; i < kQuads; ++i) convolve(past, i, unused);

    int own_end = exists ? end : start;                      // of what this thread writes
    int place = 0, phase = 0;
    asm volatile("" : "+r"(own_end), "+r"(c));               // kept, not computed again
#pragma unroll 1
    for (int t = start; t < end; t += 2) {
        asm volatile("cp.async.wait_group %0;" :: "n"(kRemovedTurns - 1) : "memory");
        float value[2][kCount], sum[2] = {};
        Packed<T, kCount> inputs[2], gates[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) inputs[k].word = mine[place + 2 * k * kThreads];
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
            convolve(inputs, i, value);
            const Quad gain = number(kGain, i);
#pragma unroll
            for (int k = 0; k < 2; ++k) {
#pragma unroll
                for (int j = 0; j < 4; ++j) value[k][4 * i + j] = silu_of_half<T>(value[k][4 * i + j]) * gain.at[j];
            }
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) gates[k].word = mine[place + (2 * k + 1) * kThreads];
        const auto gate = [&](int k) {
            float gates_at[kCount];
            gates[k].get(gates_at);
#pragma unroll
            for (int i = 0; i < kCount; ++i) value[k][i] *= silu_of_half<T>(0.5f * gates_at[i]);
        };
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            if (!kNormBeforeGate) gate(k);
#pragma unroll
            for (int i = 0; i < kCount; ++i) sum[k] = fmaf(value[k][i], value[k][i], sum[k]);
        }
        request(t + 2 * kRemovedTurns, place);
        if (normed) {
            unsigned own;                                    // the thread, read again: what follows from it is not kept
            asm volatile("mov.u32 %0, %%tid.x;" : "=r"(own));
            const bool second = own % kLanes >= kHalf;       // half of the lanes sum up the second token
            if (own_end == start) sum[0] = sum[1] = 0.f;
            float part = second ? sum[1] : sum[0];
            part += __shfl_xor_sync(kAll, second ? sum[0] : sum[1], kHalf);
#pragma unroll
            for (int offset = kHalf / 2; offset > 0; offset /= 2) part += __shfl_xor_sync(kAll, part, offset);
            if (own % kHalf == 0) partial[phase][second][own / kLanes] = part;
            __syncthreads();
            part = 0.f;
            if (kLanes < 32) asm volatile("" : "+r"(s));     // what follows from s is not kept in registers
            const int last_group = q.groups[s + 1];
#pragma unroll 1
            for (int i = q.groups[s] + own % kHalf; i < last_group; i += kHalf) part += partial[phase][second][i];
#pragma unroll
            for (int offset = kHalf / 2; offset > 0; offset /= 2) part += __shfl_xor_sync(kAll, part, offset);
            const float scale = rsqrtf(fmaf(part, q.inverse[s], q.eps[s]));
            const float other = __shfl_xor_sync(kAll, scale, kHalf);
            phase ^= 1;
#pragma unroll
            for (int i = 0; i < kQuads; ++i) {
                const Quad weight = number(kNormWeight, i);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    value[0][4 * i + j] *= (second ? other : scale) * weight.at[j];
                    value[1][4 * i + j] *= (second ? scale : other) * weight.at[j];
                }
            }
        }
        place = place == 4 * (kRemovedTurns - 1) * kThreads ? 0 : place + 4 * kThreads;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            if (kNormBeforeGate) gate(k);
            Packed<T, kCount> out;
            out.set(value[k]);
            if (t + k < own_end) *reinterpret_cast<typename Packed<T, kCount>::Word *>(y + c) = out.word;
            y += p.y_strides.time;
        }
    }
}

}  // namespace shedder
