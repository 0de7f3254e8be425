// One decode step of a Mamba-2 mixer between its projections, in one launch.
//
//   [z | x | B | C | dt] = zxbcdt                    x, B, C = silu(bias + sum_w weight_w (last inputs)_w)
//   dt = clamp(softplus(dt + dt_bias))               h = exp(dt A) h + dt B x         v = sum_n C h + D x
//   y = norm(v silu(z))   or   norm(v) silu(z)   or   v silu(z)         norm over segments of the H P rows
//
// A cluster of CTAs owns a row of the batch, each CTA `share` of its H P rows (h, p) of states. What the CTAs need of
// one another costs no second launch: each convolves B and C by itself, and their inputs move on behind a barrier of
// the cluster; the sums of squares are sent into every CTA's shared memory.
// `lanes` neighbouring threads share a row of N states, kStepStates each, as in state_update.cuh. A thread holds states
// of kRows rows; those that it moves on make room for the next ones on their way; the first come in under the
// convolution.
// A removed SSM has N = 0 and no dt. Bound: bytes of the state; at small batches, the latencies one after another.

#pragma once

#include "kernels/causal_conv1d_update.cuh"
#include "kernels/cluster.cuh"
#include "kernels/state_update.cuh"

namespace shedder {

constexpr int kMixerThreads = 512;
constexpr int kMixerShare = 2048;                            // rows of a CTA, at most
constexpr int kMixerSegments = 128;

struct StepMixerParams {
    CausalConv1dUpdateParams conv;                           // x: the columns x, B, C; one token; y is not used
    const void *z, *dt, *norm_weight;                        // columns of zxbcdt, column_stride apart; null: no norm
    void *state, *y;                                         // y (batch, rows) contiguous
    const float *dt_bias, *A, *D;
    const int32_t *head_to_group;
    StepStrides state_strides;
    int64_t row_stride;                                      // of states; negative where rows lie unevenly
    int64_t column_stride, state_n_stride, bias_stride, A_stride, D_head_stride, D_place_stride, map_stride,
        norm_weight_stride;
    int heads, headdim, groups, dstate, lanes;
    int share, segments;
    float dt_min, dt_max;
    bool norm_before_gate;
    int bounds[kMixerSegments + 1];                          // rows bounds[s] .. bounds[s+1]-1 are segment s
    float inverse[kMixerSegments], eps[kMixerSegments];      // 1 / rows, and eps, of each segment
};

// Dynamic shared memory, in floats: of each row its decay and dt x (then the sum over states), D x, z, the norm's
// weight and group; B and C; sums of squares of each warp and of each CTA of the cluster.
__host__ __device__ inline int64_t step_mixer_shared_floats(const StepMixerParams &p, int ranks) {
    return int64_t{6} * p.share + 2 * p.groups * p.dstate + p.segments * (kMixerThreads / 32 + ranks);
}

// The convolution's next output for kCount channels of batch row b; `moves`: their inputs move on. Weight and bias are
// of the type of the inputs: nothing waits before all loads are on their way.
template <typename T, int kCount>
__device__ inline void conv_step(const CausalConv1dUpdateParams &q, int64_t b, int64_t slot,
                                 const int (&channel)[kCount], const bool (&moves)[kCount], float (&y)[kCount]) {
    const CausalConv1dParams &p = q.conv;
    int64_t end = q.kept;                                    // input -t sits at (end - t) mod K
    if (q.seen != nullptr) {
        end = q.seen[b * q.seen_stride] % q.kept;
        if (end < kHistory) end += (kHistory + q.kept - 1) / q.kept * q.kept;
    }
    const auto place = [&](int64_t at) { return (q.seen == nullptr ? at : at % q.kept) * q.state_strides.time; };
    const int absent = kMaxWidth - p.width;                  // taps that a narrower filter leaves out
    T window[kCount][kMaxWidth], tap[kCount][kMaxWidth], bias[kCount], *state[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const T *weight = static_cast<const T *>(p.weight.data) + channel[i] * p.weight_channel_stride;
        state[i] = static_cast<T *>(q.state) + slot * q.state_strides.batch + channel[i] * q.state_strides.channel;
        window[i][kHistory] = static_cast<const T *>(p.x)[b * p.x_strides.batch + channel[i] * p.x_strides.channel];
        bias[i] = from_float<T>(0.f);
        if (p.bias.present()) bias[i] = static_cast<const T *>(p.bias.data)[channel[i] * p.bias_stride];
#pragma unroll
        for (int k = 0; k < kMaxWidth; ++k) {
            tap[i][k] = from_float<T>(0.f);
            if (k >= absent) tap[i][k] = weight[(k - absent) * p.weight_tap_stride];
            if (k == kHistory) continue;
            window[i][k] = from_float<T>(0.f);
            if (k >= absent) window[i][k] = state[i][place(end - kHistory + k)];
        }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        y[i] = to_float(bias[i]);
#pragma unroll
        for (int k = 0; k < kMaxWidth; ++k) y[i] = fmaf(to_float(tap[i][k]), to_float(window[i][k]), y[i]);
        y[i] = fast_silu(y[i]);                              // B and C go on in fp32: no silu_for here
        if (!moves[i]) continue;
        if (q.seen != nullptr) {
            state[i][place(end)] = window[i][kHistory];
        } else {
#pragma unroll 1
            for (int64_t k = 0; k + p.width < q.kept; ++k)
                state[i][k * q.state_strides.time] = state[i][(k + 1) * q.state_strides.time];
#pragma unroll
            for (int k = 0; k < kMaxWidth; ++k) {
                const int64_t at = q.kept - kMaxWidth + k;
                if (k >= absent && at >= 0) state[i][at * q.state_strides.time] = window[i][k];
            }
        }
    }
}

// kStepStates states of a row, those of `lane` in accesses of kWidth; where there are none, what was held stays.
template <typename State, int kWidth>
struct HeldStates {
    StepVector<State, kWidth> part[kStepStates / kWidth];

    __device__ void fetch(bool exists, const State *row, int lane, const StepMixerParams &p) {
#pragma unroll
        for (int a = 0; a < kStepStates / kWidth; ++a) {
            const int n = (a * p.lanes + lane) * kWidth;
            if constexpr (kWidth > 1) {                      // one predicated load, see load_if
                uint4 &to = reinterpret_cast<uint4 &>(part[a]);
                asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];}"
                             : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
                             : "l"(row + n), "r"(static_cast<unsigned>(exists && n < p.dstate)));
            } else {
                if (exists && n < p.dstate) part[a].at[0] = row[n * p.state_n_stride];
            }
        }
    }
    __device__ float operator[](int i) const { return to_float(part[i / kWidth].at[i % kWidth]); }
};

template <typename Input, typename State, int kWidth>
__global__ void __launch_bounds__(kMixerThreads) step_mixer_rows(const __grid_constant__ StepMixerParams p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900           // which have clusters
    constexpr int kWarps = kMixerThreads / 32, kItems = 1;
    constexpr int kRows = kWidth > 1 && sizeof(State) == 2 ? 4 : 2;
    constexpr unsigned kAll = 0xffffffffu;
    const int ranks = cluster_size(), rank = cluster_rank();
    const int thread = threadIdx.x, warp = thread / 32, inner = p.heads * p.headdim;
    const int first = min(rank * p.share, inner), rows = min(p.share, inner - first);
    const int64_t b = blockIdx.x / ranks;
    wait_for_kernel_before();
    const int64_t slot = p.conv.slots == nullptr ? b : p.conv.slots[b * p.conv.slots_stride];
    Input *y = static_cast<Input *>(p.y) + b * inner + first;
    if (slot < 0) {                                          // a padding row of the batch, for the whole cluster
        for (int r = thread; r < rows; r += kMixerThreads) y[r] = from_float<Input>(0.f);
        return;
    }
    __shared__ Inbox inbox;                                  // for the sums of squares
    if (thread == 0) inbox.open(p.segments * ranks);
    __syncwarp();
    cluster_arrive();                                        // 1: all CTAs run, their inboxes are open

    extern __shared__ float2 shared[];
    float2 *rates = shared;                                  // decay, and dt x, in whose place the sum comes
    float *skip = reinterpret_cast<float *>(rates + p.share), *gate = skip + p.share, *norm = gate + p.share;
    int *group_of = reinterpret_cast<int *>(norm + p.share);
    float *B = reinterpret_cast<float *>(group_of + p.share), *C = B + p.groups * p.dstate;
    float *of_warps = C + p.groups * p.dstate, *of_ranks = of_warps + p.segments * kWarps;

    const int lane = thread % p.lanes, sub = thread / p.lanes, subs = kMixerThreads / p.lanes;
    State *const states_of_slot = static_cast<State *>(p.state) + slot * p.state_strides.batch;
    const auto states_of = [&](int r) {
        const int row = first + r;
        if (kWidth > 1 || p.row_stride >= 0) return states_of_slot + row * p.row_stride;
        return states_of_slot + row / p.headdim * p.state_strides.head + row % p.headdim * p.state_strides.place;
    };
    HeldStates<State, kWidth> held[kRows] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) held[i].fetch(i * subs + sub < rows, states_of(i * subs + sub), lane, p);

    // x of the rows, then B and C of the groups from `low` on that the rows' heads read.
    int low = 0, used = p.groups;
    if (p.groups > 1) {
        int high = low = p.head_to_group[first < inner ? first / p.headdim * p.map_stride : 0];
        for (int h = first / p.headdim + thread % 32; h * p.headdim < first + rows; h += 32) {
            low = min(low, p.head_to_group[h * p.map_stride]);
            high = max(high, p.head_to_group[h * p.map_stride]);
        }
        low = __reduce_min_sync(kAll, low);
        used = __reduce_max_sync(kAll, high) - low + 1;
    }
    const int states = used * p.dstate, items = rows + 2 * states;
    const Input *const norm_weight = static_cast<const Input *>(p.norm_weight);
    for (int from = thread; from < items; from += kItems * kMixerThreads) {
        int channel[kItems];
        bool moves[kItems];
        Input z[kItems], dt[kItems], weight[kItems];
        float D[kItems], A[kItems], dt_bias[kItems], value[kItems];
        int group[kItems];
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            const int item = from + i * kMixerThreads, other = item - rows;
            const int row = min(first + item, inner - 1), head = row / p.headdim;
            moves[i] = other < 0;
            channel[i] = row;
            if (other >= 0)
                channel[i] = min(inner + low * p.dstate + other + (other < states ? 0 : p.groups * p.dstate - states),
                                 p.conv.conv.channels - 1);
            z[i] = static_cast<const Input *>(p.z)[b * p.conv.conv.x_strides.batch + row * p.column_stride];
            D[i] = p.D[head * p.D_head_stride + (row - head * p.headdim) * p.D_place_stride];
            group[i] = 0;
            if (p.groups > 1) group[i] = p.head_to_group[head * p.map_stride];
            weight[i] = dt[i] = from_float<Input>(0.f);
            if (norm_weight != nullptr) weight[i] = norm_weight[row * p.norm_weight_stride];
            A[i] = dt_bias[i] = 0.f;
            if (p.dstate > 0) {
                dt[i] = static_cast<const Input *>(p.dt)[b * p.conv.conv.x_strides.batch + head * p.column_stride];
                A[i] = p.A[head * p.A_stride];
                dt_bias[i] = p.dt_bias[head * p.bias_stride];
            }
        }
        conv_step<Input>(p.conv, b, slot, channel, moves, value);
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            const int item = from + i * kMixerThreads;
            if (item >= items) continue;
            if (item >= rows) {
                B[channel[i] - inner] = value[i];            // and C behind it
                continue;
            }
            const float step = fminf(fmaxf(softplus(to_float(dt[i]) + dt_bias[i]), p.dt_min), p.dt_max);
            rates[item] = {fast_exp2(step * (A[i] * kLog2e)), p.dstate > 0 ? step * value[i] : 0.f};
            skip[item] = D[i] * value[i];
            gate[item] = to_float(z[i]);
            norm[item] = to_float(weight[i]);
            group_of[item] = group[i];
        }
    }
    __syncthreads();
    cluster_wait();
    cluster_arrive();                                        // 2: all CTAs have read the inputs of B and C

    int held_group = -1;
    float own_B[kStepStates] = {}, own_C[kStepStates] = {};
#pragma unroll 1
    for (int base = sub; p.dstate > 0 && base < rows + sub; base += kRows * subs) {      // all lanes of a warp
        float sum[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int r = base + i * subs;
            const bool exists = r < rows;
            float2 rate{};
            if (exists) rate = rates[r];                     // no other row's: its sum may be coming in
            const int group = p.groups > 1 ? group_of[exists ? r : 0] : 0;
            if (held_group != group) {
                held_group = group;
#pragma unroll
                for (int a = 0; a < kStepStates; ++a) {
                    const int n = (a / kWidth * p.lanes + lane) * kWidth + a % kWidth;
                    own_B[a] = n < p.dstate ? B[group * p.dstate + n] : 0.f;
                    own_C[a] = n < p.dstate ? C[group * p.dstate + n] : 0.f;
                }
            }
            State *to = states_of(r);
            sum[i] = 0.f;
#pragma unroll
            for (int a = 0; a < kStepStates / kWidth; ++a) {
                float fresh[kWidth];
                const int n = (a * p.lanes + lane) * kWidth;
#pragma unroll
                for (int j = 0; j < kWidth; ++j) {
                    fresh[j] = fmaf(rate.x, held[i][a * kWidth + j], rate.y * own_B[a * kWidth + j]);
                    sum[i] = fmaf(own_C[a * kWidth + j], fresh[j], sum[i]);
                }
                if (!exists || n >= p.dstate) continue;
                if constexpr (kWidth > 1) {
                    Packed<State, kWidth> out;
                    out.set(fresh);
                    *reinterpret_cast<typename Packed<State, kWidth>::Word *>(to + n) = out.word;
                } else {
                    to[n * p.state_n_stride] = from_float<State>(fresh[0]);
                }
            }
            held[i].fetch(r + kRows * subs < rows, states_of(r + kRows * subs), lane, p);
        }
        for (int offset = p.lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
            for (int i = 0; i < kRows; ++i) sum[i] += __shfl_xor_sync(kAll, sum[i], offset);
        }
        __syncwarp();                                        // the lanes of a row have read what stood here
#pragma unroll
        for (int i = 0; i < kRows; ++i)
            if (const int r = base + i * subs; lane == 0 && r < rows) rates[r].y = sum[i];
    }
    __syncthreads();

    const bool normed = norm_weight != nullptr, late = normed && p.norm_before_gate;     // the gate
    const auto gated = [&](int r) { return (rates[r].y + skip[r]) * (late ? 1.f : silu_for<Input>(gate[r])); };
    if (normed) {
        for (int s = 0; s < p.segments; ++s) {
            const int begin = max(p.bounds[s] - first, 0), end = min(p.bounds[s + 1] - first, rows);
            float sum = 0.f;
#pragma unroll 1
            for (int r = begin + thread; r < end; r += kMixerThreads) {
                const float value = gated(r);
                sum = fmaf(value, value, sum);
            }
#pragma unroll
            for (int offset = 16; begin < end && offset > 0; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
            if (thread % 32 == 0) of_warps[s * kWarps + warp] = sum;
        }
        __syncthreads();
        for (int i = thread; i < p.segments * ranks; i += kMixerThreads) {
            const int s = i / ranks;
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) sum += of_warps[s * kWarps + w];
            inbox.send(i % ranks, of_ranks + rank * p.segments + s, sum);
        }
    }
    __syncwarp();
    cluster_wait();
    // Each CTA moves the inputs of its share of B and C.
    for (int c = rank * kMixerThreads + thread; c < 2 * p.groups * p.dstate; c += ranks * kMixerThreads) {
        float unused[1];
        conv_step<Input, 1>(p.conv, b, slot, {inner + c}, {true}, unused);
    }
    if (normed) inbox.wait();
    for (int r = thread; r < rows; r += kMixerThreads) {
        float value = gated(r);
        if (normed) {
            int s = 0;
            while (p.bounds[s + 1] <= first + r) ++s;
            float sum = 0.f;
            for (int other = 0; other < ranks; ++other) sum += of_ranks[other * p.segments + s];
            value *= rsqrtf(fmaf(sum, p.inverse[s], p.eps[s])) * norm[r];
        }
        y[r] = from_float<Input>(late ? value * silu_for<Input>(gate[r]) : value);
    }
#endif
}

}  // namespace shedder
