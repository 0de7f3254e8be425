// What is left of a Mamba layer whose state-space part is removed: convolution, gain, gate and norm in one pass.
//
//   u = D silu(conv(x))      y = norm(u silu(z))   or   norm(u) silu(z)   or, without a norm, u silu(z)
//
// A CTA owns all channels of a run of tokens and walks along time; a thread owns 16 bytes of channels of one segment of
// the norm. What the inputs so far add to the next three outputs is carried in registers (causal_conv1d.cuh). Tokens on
// their way wait in a ring in shared memory, of which each thread fills and reads its own words only, so that they
// need neither registers nor barriers. A token is scaled one token after it was summed: meanwhile it waits in its words of
// the ring, so that between two barriers there is work that needs neither.
// Bound: bytes of x, z and y.

#pragma once

#include "kernels/causal_conv1d.cuh"
#include "kernels/copy_async.cuh"
#include "kernels/row_vectors.cuh"

namespace shedder {

constexpr int kRemovedThreads = 640, kFewRemovedThreads = 256;
constexpr int kRemovedDepth = 7;                             // tokens in the ring
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

// Dynamic shared memory: the ring, x then z of each token; biases; gains; weights of the norm.
template <typename T>
constexpr int64_t removed_ssm_shared_bytes(int threads) {
    return int64_t{threads} * (2 * kRemovedDepth * 16 + 3 * 4 * (16 / sizeof(T)));
}

// kThreads: at least those of the CTA; the distance of rows in shared memory.
template <typename T, int kThreads, bool kNormBeforeGate, int kLanes, bool kFull>
__global__ void __launch_bounds__(kThreads) removed_ssm_fwd(const __grid_constant__ RemovedSSMParams q) {
    constexpr int kCount = 16 / sizeof(T), kQuads = kCount / 4;
    constexpr unsigned kAll = 0xffffffffu;
    extern __shared__ uint4 ring[];
    __shared__ float partial[2][kThreads / kLanes];          // of even and odd tokens, from kLanes lanes each
    const CausalConv1dParams &p = q.conv;
        const int thread = threadIdx.x;
    float4 *biases = reinterpret_cast<float4 *>(ring + 2 * kRemovedDepth * kThreads) + thread;
    float4 *gains = biases + kQuads * kThreads, *weights = gains + kQuads * kThreads;
    const bool normed = q.norm_weight.present();

    const int group = thread / kLanes;
    int s = 0;
    while (s + 1 < q.segments && q.groups[s + 1] <= group) ++s;
    int c = q.bounds[s] + (thread - q.groups[s] * kLanes) * kCount;
    const bool exists = c < q.bounds[s + 1];
    if (!exists) c = 0;                                      // reads the first channels, writes nothing

    const int64_t b = blockIdx.y;
    const int start = static_cast<int>(blockIdx.x) * p.steps, end = min(start + p.steps, p.length);
    const T *x = static_cast<const T *>(p.x) + b * p.x_strides.batch + start * p.x_strides.time + c;
    const T *z = static_cast<const T *>(q.z) + b * q.z_strides.batch + start * q.z_strides.time + c;
    T *y = static_cast<T *>(p.y) + b * p.y_strides.batch + start * p.y_strides.time + c;

    uint4 *const mine = ring + thread;
    const T *next_x = x, *next_z = z;
    const auto request = [&](int t, int place) {             // token t, one after the other, into place of the ring
        if (t < end) {
            copy_async(mine + place, next_x);
            copy_async(mine + place + kThreads, next_z);
            next_x += p.x_strides.time;
            next_z += q.z_strides.time;
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
#pragma unroll
    for (int ahead = 0; ahead < kRemovedDepth; ++ahead) request(start + ahead, 2 * ahead * kThreads);

    float taps[kMaxWidth][kCount], carried[kHistory][kCount];
    {
        float bias[kCount], gain[kCount], weight[kCount];
        load_conv_taps<kFull>(p, [&](int i) { return c + i; }, taps, bias);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            gain[i] = q.D == nullptr ? 1.f
                : q.D[(c + i) / q.headdim * q.D_head_stride + (c + i) % q.headdim * q.D_place_stride];
            weight[i] = normed ? q.norm_weight[(c + i) * q.norm_weight_stride] : 1.f;
#pragma unroll
            for (int k = 0; k < kHistory; ++k) carried[k][i] = bias[i];
        }
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
            biases[i * kThreads] = {bias[4 * i], bias[4 * i + 1], bias[4 * i + 2], bias[4 * i + 3]};
            gains[i * kThreads] = {gain[4 * i], gain[4 * i + 1], gain[4 * i + 2], gain[4 * i + 3]};
            weights[i * kThreads] = {weight[4 * i], weight[4 * i + 1], weight[4 * i + 2], weight[4 * i + 3]};
        }
    }
    const auto add = [&](const Packed<T, kCount> &inputs, float (&sums)[kCount]) {
        const int absent = kFull ? 0 : kMaxWidth - p.width;
        float bias[kCount];
#pragma unroll
        for (int i = 0; i < kQuads; ++i) *reinterpret_cast<float4 *>(bias + 4 * i) = biases[i * kThreads];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const float input = to_float(inputs.at[i]);
            sums[i] = fmaf(taps[kHistory][i], input, carried[0][i]);
#pragma unroll
            for (int k = 0; k < kHistory; ++k) {             // to output t + 1 + k
                const float older = k + 1 < kHistory ? carried[k + 1][i] : bias[i];
                carried[k][i] = kHistory - 1 - k >= absent ? fmaf(taps[kHistory - 1 - k][i], input, older) : older;
            }
        }
    };
#pragma unroll 1
    for (int t = start - kHistory; t < start; ++t) {
        Packed<T, kCount> inputs;
        float unused[kCount];
        if (t >= 0) {
            load_if(true, inputs.word, x + (t - start) * p.x_strides.time);
        } else {
#pragma unroll
            for (int i = 0; i < kCount; ++i) inputs.at[i] = conv_input<T>(p, b, c + i, t);
        }
        add(inputs, unused);
    }
    const auto scale_by = [&](float (&values)[kCount], const float4 *factors) {
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
            const float4 f = factors[i * kThreads];
            values[4 * i] *= f.x;
            values[4 * i + 1] *= f.y;
            values[4 * i + 2] *= f.z;
            values[4 * i + 3] *= f.w;
        }
    };

    const int last_place = 2 * (kRemovedDepth - 1) * kThreads, count = end - start;
    // Token j, in `place` of the ring: its values, and their part in the sum.
    const auto sum_up = [&](int j, int place) {
        asm volatile("cp.async.wait_group %0;" :: "n"(kRemovedDepth - 2) : "memory");
        Packed<T, kCount> inputs, gate;
        inputs.word = mine[place];
        gate.word = mine[place + kThreads];
        float value[kCount], sum = 0.f;
        add(inputs, value);
#pragma unroll
        for (int i = 0; i < kCount; ++i) value[i] = silu_for<T>(value[i]);
        scale_by(value, gains);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const float gated = value[i] * silu_for<T>(to_float(gate.at[i]));
            const float counted = kNormBeforeGate ? value[i] : gated;
            sum = fmaf(counted, counted, sum);
            value[i] = gated;
        }
#pragma unroll
        for (int i = 0; i < kQuads; ++i)
            reinterpret_cast<float4 &>(mine[place + i * kThreads]) = {value[4 * i], value[4 * i + 1], value[4 * i + 2],
                                                                     value[4 * i + 3]};
        if (!exists) sum = 0.f;
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
        if (thread % kLanes == 0) partial[j % 2][group] = sum;
    };
    // Token j scaled and written; its place goes to the token that comes kRemovedDepth later.
    const auto finish = [&](int j, int place) {
        float scale = 1.f, value[kCount];
        if (normed) {
            float sum = 0.f;
            asm volatile("" : "+r"(s));                      // what follows from s is not kept in registers
            const int last_group = q.groups[s + 1];
#pragma unroll 1
            for (int i = q.groups[s] + thread % kLanes; i < last_group; i += kLanes) sum += partial[j % 2][i];
#pragma unroll
            for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
            scale = rsqrtf(fmaf(sum, q.inverse[s], q.eps[s]));
        }
#pragma unroll
        for (int i = 0; i < kQuads; ++i)
            *reinterpret_cast<float4 *>(value + 4 * i) = reinterpret_cast<const float4 &>(mine[place + i * kThreads]);
        request(start + j + kRemovedDepth, place);
        scale_by(value, weights);
#pragma unroll
        for (int i = 0; i < kCount; ++i) value[i] *= scale;
        Packed<T, kCount> out;
        out.set(value);
        if (exists) *reinterpret_cast<typename Packed<T, kCount>::Word *>(y) = out.word;
        y += p.y_strides.time;
    };
    int place = 0;
    sum_up(0, 0);
    __syncthreads();
#pragma unroll 1
    for (int j = 1; j < count; ++j) {
        const int next = place == last_place ? 0 : place + 2 * kThreads;
        sum_up(j, next);
        finish(j - 1, place);
        __syncthreads();
        place = next;
    }
    finish(count - 1, place);
}

}  // namespace shedder
