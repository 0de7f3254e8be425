// One decode step of a Mamba-1 mixer between in_proj and out_proj, in one launch.
//
//   [x | z] = xz      x = silu(bias + sum_w weight_w (last inputs)_w)      [rank | B | C] = x_proj x
//   dt = softplus(dt_proj rank + dt_bias)      h = exp(dt A) h + dt B x      y = (sum_n C h + D x) silu(z)
//
// A cluster of CTAs owns a row of the batch, each CTA `share` of its channels. Each multiplies its columns of x_proj
// with its x; the parts of the product are sent into every CTA's shared memory, where each adds them up and goes on
// with its channels alone. kProductLanes threads share an output of x_proj, kChannelLanes a channel. What the second
// half reads is asked for before the first.
// A removed SSM has N = 0: y = D x silu(z).
// Bound: bytes of both weights, once for each row of the batch; at one row, the latencies one after another.

#pragma once

#include "kernels/step_mixer.cuh"

namespace shedder {

constexpr int kProductLanes = 8, kProductOutputs = 4, kChannelLanes = 4;
constexpr int kVectorStates = 4;

struct MambaInnerStepParams {
    CausalConv1dUpdateParams conv;                           // x: the first columns of xz; one token; y is not used
    const void *z, *x_proj, *dt_proj;                        // z: columns of xz, column_stride apart; weights as Input
    void *state, *y;                                         // y (batch, channels) contiguous
    const float *dt_bias, *A, *D;
    const int32_t *channel_to_group;                         // null: one group
    int64_t column_stride, x_proj_stride, dt_proj_stride, x_proj_column_stride, dt_proj_column_stride;
    int64_t slot_stride, channel_stride, state_n_stride, A_channel_stride, A_n_stride, D_stride, bias_stride,
        map_stride;
    int channels, rank, groups, dstate;
    int share, outputs;                                      // outputs: R + 2 G N
    bool whole_x_proj, whole_dt_proj, whole_states;          // rows move in 16 bytes, states and A in vectors
};

// Dynamic shared memory, in floats: x of the channels; the product's parts from each CTA, then their sums.
__host__ __device__ inline int64_t mamba_inner_step_shared_floats(const MambaInnerStepParams &p, int ranks) {
    return p.share + int64_t{p.outputs} * (ranks + 1) + 4;
}

// Rows first, first + 1, ... of a matrix, on their way into the second cache: each thread asks for some lines.
template <typename T>
__device__ inline void prefetch_rows(const T *first_row, int rows, int64_t row_stride, int64_t row_bytes) {
    const int lines = static_cast<int>((row_bytes + 127) / 128);
    for (int i = threadIdx.x; i < rows * lines; i += kMixerThreads)
        prefetch_line(reinterpret_cast<const char *>(first_row + i / lines * row_stride) + i % lines * 128);
}

// The part of a row of weights that one of kLanes lanes multiplies in one turn: 16 bytes, or as many single elements.
template <typename T, int kLanes, bool kWhole>
struct WeightPiece {
    static constexpr int kCount = 16 / sizeof(T), kTurn = kLanes * kCount;
    Packed<T, kCount> weights;

    static __device__ int place(int turn, int lane, int i) {
        return kWhole ? turn * kTurn + lane * kCount + i : turn * kTurn + i * kLanes + lane;
    }
    __device__ void fetch(const T *row, int64_t stride, int size, int turn, int lane) {
        weights = {};
        if constexpr (kWhole) {
            if (place(turn, lane, 0) < size)
                weights.word = *reinterpret_cast<const typename Packed<T, kCount>::Word *>(row + place(turn, lane, 0));
        } else {
#pragma unroll
            for (int i = 0; i < kCount; ++i)
                if (place(turn, lane, i) < size) weights.at[i] = row[place(turn, lane, i) * stride];
        }
    }
    // sum + weights times x; x[size] and beyond are not read.
    __device__ float times(const float *x, int size, int turn, int lane, float sum) const {
        if constexpr (kWhole) {
            if (place(turn, lane, 0) < size) {
                const float4 *from = reinterpret_cast<const float4 *>(x + place(turn, lane, 0));
#pragma unroll
                for (int i = 0; i < kCount / 4; ++i) {
                    const float4 four = from[i];
                    sum = fmaf(to_float(weights.at[4 * i]), four.x, sum);
                    sum = fmaf(to_float(weights.at[4 * i + 1]), four.y, sum);
                    sum = fmaf(to_float(weights.at[4 * i + 2]), four.z, sum);
                    sum = fmaf(to_float(weights.at[4 * i + 3]), four.w, sum);
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < kCount; ++i)
                if (place(turn, lane, i) < size) sum = fmaf(to_float(weights.at[i]), x[place(turn, lane, i)], sum);
        }
        return sum;
    }
};

// Outputs of x_proj from `size` columns; add(output, sum) is called in all lanes of an output.
template <typename T, bool kWhole, typename Add>
__device__ inline void project(const MambaInnerStepParams &p, const T *columns, const float *x, int size, Add add) {
    using Piece = WeightPiece<T, kProductLanes, kWhole>;
    constexpr int kSide = kMixerThreads / kProductLanes;     // outputs side by side
    const int lane = threadIdx.x % kProductLanes, first = threadIdx.x / kProductLanes;
    const int turns = (size + Piece::kTurn - 1) / Piece::kTurn;
    for (int base = first; base < p.outputs + first; base += kProductOutputs * kSide) {      // all lanes of a warp
        float sum[kProductOutputs] = {};
#pragma unroll 2
        for (int turn = 0; turn < turns; ++turn) {
            Piece piece[kProductOutputs];
#pragma unroll
            for (int j = 0; j < kProductOutputs; ++j)
                piece[j].fetch(columns + min(base + j * kSide, p.outputs - 1) * p.x_proj_stride, p.x_proj_column_stride,
                               base + j * kSide < p.outputs ? size : 0, turn, lane);
#pragma unroll
            for (int j = 0; j < kProductOutputs; ++j) sum[j] = piece[j].times(x, size, turn, lane, sum[j]);
        }
#pragma unroll
        for (int j = 0; j < kProductOutputs; ++j) {
#pragma unroll
            for (int offset = kProductLanes / 2; offset > 0; offset /= 2)
                sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], offset);
            if (base + j * kSide < p.outputs) add(base + j * kSide, sum[j]);
        }
    }
}

// One channel's row of dt_proj times `ranks`, the same in all lanes of the channel.
template <typename T, bool kWhole>
__device__ inline float project_dt(const MambaInnerStepParams &p, int64_t channel, const float *ranks) {
    using Piece = WeightPiece<T, kChannelLanes, kWhole>;
    const int lane = threadIdx.x % kChannelLanes;
    const T *row = static_cast<const T *>(p.dt_proj) + channel * p.dt_proj_stride;
    float sum = 0.f;
#pragma unroll 5
    for (int turn = 0; turn * Piece::kTurn < p.rank; ++turn) {
        Piece piece;
        piece.fetch(row, p.dt_proj_column_stride, p.rank, turn, lane);
        sum = piece.times(ranks, p.rank, turn, lane, sum);
    }
#pragma unroll
    for (int offset = kChannelLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return sum;
}

template <typename Input, typename State>
__global__ void __launch_bounds__(kMixerThreads, 1)
    mamba_inner_step_rows(const __grid_constant__ MambaInnerStepParams p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900           // which have clusters
    const int ranks = cluster_size(), rank = cluster_rank(), thread = threadIdx.x;
    const int first = min(rank * p.share, p.channels), rows = min(p.share, p.channels - first);
    const int64_t b = blockIdx.x / ranks;
    wait_for_kernel_before();
    const int64_t slot = p.conv.slots == nullptr ? b : p.conv.slots[b * p.conv.slots_stride];
    Input *y = static_cast<Input *>(p.y) + b * p.channels + first;
    if (slot < 0) {                                          // a padding row of the batch, for the whole cluster
        for (int c = thread; c < rows; c += kMixerThreads) y[c] = from_float<Input>(0.f);
        return;
    }
    __shared__ Inbox inbox;                                  // for the parts of x_proj's product
    if (thread == 0) inbox.open(p.outputs * ranks);
    __syncwarp();
    cluster_arrive();                                        // all CTAs run, their inboxes are open

    extern __shared__ float4 shared_vectors[];
    float *x = reinterpret_cast<float *>(shared_vectors), *sums = x + p.share;
    float *parts = sums + (p.outputs + 3) / 4 * 4;
    State *states = static_cast<State *>(p.state) + slot * p.slot_stride + first * p.channel_stride;
    const auto gate_of = [&](int c) {
        return static_cast<const Input *>(p.z)[b * p.conv.conv.x_strides.batch + (first + c) * p.column_stride];
    };
    if (p.whole_dt_proj)
        prefetch_rows(static_cast<const Input *>(p.dt_proj) + first * p.dt_proj_stride, rows, p.dt_proj_stride,
                      p.rank * sizeof(Input));
    if (p.whole_states) {
        prefetch_rows(states, rows, p.channel_stride, p.dstate * sizeof(State));
        prefetch_rows(p.A + first * p.A_channel_stride, rows, p.A_channel_stride, p.dstate * sizeof(float));
    }
    for (int c = thread; c < rows; c += kMixerThreads) {
        float value[1];
        conv_step<Input, 1>(p.conv, b, slot, {first + c}, {true}, value);
        x[c] = value[0];
        if (p.dstate == 0)
            y[c] = from_float<Input>(p.D[(first + c) * p.D_stride] * value[0] * silu_for<Input>(to_float(gate_of(c))));
    }
    __syncthreads();
    cluster_wait();
    if (p.dstate == 0) return;

    const auto hand_over = [&](int output, float sum) {
        for (int to = thread % kProductLanes; to < ranks; to += kProductLanes)
            inbox.send(to, parts + rank * p.outputs + output, sum);
    };
    const Input *columns = static_cast<const Input *>(p.x_proj) + first * p.x_proj_column_stride;
    if (p.whole_x_proj)
        project<Input, true>(p, columns, x, rows, hand_over);
    else
        project<Input, false>(p, columns, x, rows, hand_over);
    inbox.wait();
    for (int o = thread; o < p.outputs; o += kMixerThreads) {
        float sum = 0.f;
        for (int from = 0; from < ranks; ++from) sum += parts[from * p.outputs + o];
        sums[o] = sum;
    }
    __syncthreads();

    const int lane = thread % kChannelLanes;
    for (int base = 0; base < rows; base += kMixerThreads / kChannelLanes) {
        const int own = base + thread / kChannelLanes, c = min(own, rows - 1);
        const int64_t channel = first + c;
        const Input z = gate_of(c);
        const float D = p.D[channel * p.D_stride], bias = p.dt_bias[channel * p.bias_stride];
        const int group = p.channel_to_group == nullptr ? 0 : p.channel_to_group[channel * p.map_stride];
        const float *B = sums + p.rank + group * p.dstate, *C = B + p.groups * p.dstate;
        State *state = states + c * p.channel_stride;
        const float *A = p.A + channel * p.A_channel_stride;
        const float dt = p.whole_dt_proj ? project_dt<Input, true>(p, channel, sums)
                                         : project_dt<Input, false>(p, channel, sums);
        const float step = softplus(dt + bias), input = step * x[c];
        float sum = 0.f;
        const auto move = [&](int n, float rate, float old) {
            const float h = fast_exp2(step * (rate * kLog2e)) * old + input * B[n];
            sum = fmaf(C[n], h, sum);
            return h;
        };
        if (p.whole_states) {
            for (int n = lane * kVectorStates; n < p.dstate; n += kChannelLanes * kVectorStates) {
                using Vector = StepVector<State, kVectorStates>;
                Vector held = *reinterpret_cast<const Vector *>(state + n);
                const StepVector<float, kVectorStates> rate =
                    *reinterpret_cast<const StepVector<float, kVectorStates> *>(A + n);
#pragma unroll
                for (int i = 0; i < kVectorStates; ++i)
                    held.at[i] = from_float<State>(move(n + i, rate.at[i], to_float(held.at[i])));
                if (own < rows) *reinterpret_cast<Vector *>(state + n) = held;
            }
        } else {
            for (int n = lane; n < p.dstate; n += kChannelLanes) {
                const float h = move(n, A[n * p.A_n_stride], to_float(state[n * p.state_n_stride]));
                if (own < rows) state[n * p.state_n_stride] = from_float<State>(h);
            }
        }
#pragma unroll
        for (int offset = kChannelLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        if (lane == 0 && own < rows)
            y[c] = from_float<Input>(fmaf(D, x[c], sum) * silu_for<Input>(to_float(z)));
    }
#endif
}

}  // namespace shedder
