// One decode step of either family.
//
//   dt = softplus(dt + bias)      h = exp(dt A) h + dt B x      y = (sum_n C h + D x) silu(z)
//
// `lanes` neighbouring threads share a row (slot, head, p) of N states, kStepStates each, moved by accesses of kWidth
// states: 16 bytes, or single ones where a row of states, A, B or C does not lie on the 16-byte grid. A warp task is kRows
// such rows for each thread. All loads come first, none under a branch that waits for it; rows that do not exist read
// a neighbour instead and write nothing.
//   kTied (Mamba-2, one dt and A for a head): the rows of a task are kRows places of P, so that B, C and the one
//   exponential serve them all.
//   Else (Mamba-1): they are kRows rows of the batch, so that A is read once for them.
// state_update_channels: Mamba-1 with one group and at most 16 states. A thread owns all states of a channel in kRows
//   rows of the batch, so that what a channel costs besides its states is paid once, and A is read once for the rows.
//   States pass through shared memory, between which and global memory a CTA moves whole words, whatever their number.
// Bound: bytes of the state.

#pragma once

#include "kernels/copy_async.cuh"
#include "kernels/pointwise.cuh"

namespace shedder {

struct StepStrides {
    int64_t batch, head, place;                              // place: the channel p of the head
};

struct StateUpdateParams {
    void *state, *y;                                         // y (batch, head, place) contiguous
    const void *x, *z, *B, *C;                               // Input; z may be null
    Parameter dt;
    const float *A, *D, *dt_bias;                            // D and dt_bias may be null
    const int32_t *head_to_group, *slots;                    // null: one group; row b of the batch is slot b
    StepStrides state_strides, x_strides, dt_strides, z_strides, A_strides;      // A_strides.batch is unused
    int64_t state_n_stride, A_n_stride, B_batch_stride, B_group_stride, B_n_stride, C_batch_stride, C_group_stride,
        C_n_stride, D_head_stride, D_place_stride, bias_head_stride, bias_place_stride, map_stride, slots_stride;
    int batch, heads, headdim, dstate, lanes;
    bool dt_softplus, group_per_place;                       // Mamba-1 with groups: the map numbers places
};

constexpr int kStepThreads = 128;
constexpr int kStepStates = 8;                               // of one thread

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth < 16 ? sizeof(T) * kWidth : 16) StepVector {
    T at[kWidth];
};

// kStepStates elements of a row, as they are stored: those of `lane` in accesses of kWidth.
template <typename T, int kWidth>
struct StepStates {
    StepVector<T, kWidth> part[kStepStates / kWidth];

    __device__ void fetch(const T *row, int lane, int lanes, int size, int64_t stride) {
#pragma unroll
        for (int a = 0; a < kStepStates / kWidth; ++a) {
            const int n = (a * lanes + lane) * kWidth;
            if (n < size)
                part[a] = *reinterpret_cast<const StepVector<T, kWidth> *>(row + (kWidth > 1 ? n : n * stride));
            else
                part[a] = StepVector<T, kWidth>{};
        }
    }
    __device__ float operator[](int i) const { return to_float(part[i / kWidth].at[i % kWidth]); }
};

template <typename Input, typename State, int kWidth, int kRows, bool kTied>
__global__ void __launch_bounds__(kStepThreads) state_update_step(const __grid_constant__ StateUpdateParams p) {
    constexpr unsigned kAll = 0xffffffffu;
    constexpr int kOthers = kTied ? 1 : kRows;               // different B and C
    const int rows = 32 / p.lanes;                           // side by side in the warp
    const int lane = threadIdx.x % p.lanes, sub = threadIdx.x % 32 / p.lanes;
    // Tied tasks: (batch, head, run of kRows * rows places). Else: (run of kRows of the batch, head, run of rows places).
    const unsigned run = kTied ? rows * kRows : rows;
    const unsigned runs = (p.headdim + run - 1) / run;
    unsigned task = blockIdx.x * (kStepThreads / 32) + threadIdx.x / 32;
    const int first_place = static_cast<int>(task % runs * run) + sub;
    task /= runs;
    const int head = static_cast<int>(task % p.heads);
    const int first_batch = static_cast<int>(task / p.heads) * (kTied ? 1 : kRows);
    if (first_batch >= p.batch) return;                      // the whole warp

    bool exists[kRows];
    int64_t b[kRows], slot[kRows];
    int place[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const int batch = kTied ? first_batch : first_batch + r, spot = kTied ? first_place + r * rows : first_place;
        exists[r] = batch < p.batch && spot < p.headdim;
        b[r] = min(batch, p.batch - 1);
        place[r] = min(spot, p.headdim - 1);
        slot[r] = b[r];
    }
    if (p.slots != nullptr) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) slot[r] = p.slots[b[r] * p.slots_stride];
    }

    State *row[kRows];
    StepStates<State, kWidth> old[kRows];
    StepStates<Input, kWidth> B[kOthers], C[kOthers];
    StepStates<float, kWidth> A;
    Input x[kRows], z[kRows];
    float dt[kOthers], skip[kRows], bias = 0.f, decay = 0.f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        row[r] = static_cast<State *>(p.state) + slot[r] * p.state_strides.batch + head * p.state_strides.head
            + place[r] * p.state_strides.place;
        old[r].fetch(row[r], lane, p.lanes, slot[r] < 0 ? 0 : p.dstate, p.state_n_stride);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        x[r] = static_cast<const Input *>(p.x)[b[r] * p.x_strides.batch + head * p.x_strides.head
                                               + place[r] * p.x_strides.place];
        z[r] = from_float<Input>(0.f);
        skip[r] = 0.f;
    }
    if (p.z != nullptr) {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
            z[r] = static_cast<const Input *>(p.z)[b[r] * p.z_strides.batch + head * p.z_strides.head
                                                   + place[r] * p.z_strides.place];
    }
    if (p.D != nullptr) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) skip[r] = p.D[head * p.D_head_stride + place[r] * p.D_place_stride];
    }
    if constexpr (kTied)
        decay = p.A[head * p.A_strides.head] * kLog2e;
    else
        A.fetch(p.A + head * p.A_strides.head + place[0] * p.A_strides.place, lane, p.lanes, p.dstate, p.A_n_stride);
    if (p.dt_bias != nullptr) bias = p.dt_bias[head * p.bias_head_stride + place[0] * p.bias_place_stride];
    int64_t group = 0;
    if (p.head_to_group != nullptr) group = p.head_to_group[(p.group_per_place ? place[0] : head) * p.map_stride];
#pragma unroll
    for (int r = 0; r < kOthers; ++r) {
        B[r].fetch(static_cast<const Input *>(p.B) + b[r] * p.B_batch_stride + group * p.B_group_stride, lane, p.lanes,
                   p.dstate, p.B_n_stride);
        C[r].fetch(static_cast<const Input *>(p.C) + b[r] * p.C_batch_stride + group * p.C_group_stride, lane, p.lanes,
                   p.dstate, p.C_n_stride);
    }
    p.dt.visit([&](auto *from) {
#pragma unroll
        for (int r = 0; r < kOthers; ++r)
            dt[r] = to_float(from[b[r] * p.dt_strides.batch + head * p.dt_strides.head + place[r] * p.dt_strides.place]);
    });

#pragma unroll
    for (int r = 0; r < kOthers; ++r) {
        dt[r] += bias;
        if (p.dt_softplus) dt[r] = softplus(dt[r]);
    }
    if constexpr (kTied) decay = fast_exp2(dt[0] * decay);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        constexpr auto shared = [](int r) { return kTied ? 0 : r; };
        const float step = dt[shared(r)], current = to_float(x[r]), input = step * current;
        const bool moves = exists[r] && slot[r] >= 0;
        float sum = 0.f;
#pragma unroll
        for (int a = 0; a < kStepStates / kWidth; ++a) {
            StepVector<State, kWidth> fresh;
            const int n = (a * p.lanes + lane) * kWidth;
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                const int i = a * kWidth + j;
                if constexpr (!kTied) decay = fast_exp2(step * (A[i] * kLog2e));
                const float h = decay * old[r][i] + input * B[shared(r)][i];      // beyond N: B and C are 0
                sum += C[shared(r)][i] * h;
                fresh.at[j] = from_float<State>(h);
            }
            if (moves && n < p.dstate)
                *reinterpret_cast<StepVector<State, kWidth> *>(row[r] + (kWidth > 1 ? n : n * p.state_n_stride)) = fresh;
        }
        for (int offset = p.lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
        if (lane != 0 || !exists[r]) continue;
        sum += skip[r] * current;
        if (p.z != nullptr) sum *= fast_silu(to_float(z[r]));
        static_cast<Input *>(p.y)[(b[r] * p.heads + head) * p.headdim + place[r]] =
            from_float<Input>(slot[r] < 0 ? 0.f : sum);
    }
}

constexpr int kChannelStates = 16;

// kWidth states are one access to shared memory. Rows of states are adjacent, those of a slot on the 16-byte grid.
template <typename Input, typename State, int kWidth, int kRows>
__global__ void __launch_bounds__(kStepThreads) state_update_channels(const __grid_constant__ StateUpdateParams p) {
    constexpr int kStates = kChannelStates, kAWidth = kWidth > 1 ? 4 : 1;
    static_assert(kRows * 2 * kStates <= kStepThreads);
    __shared__ float4 shared[kRows][2][kStates / 4];         // B and C of each row
    __shared__ uint4 tile[kRows][kStepThreads * kStates * sizeof(State) / 16];
    const int first = blockIdx.y * kRows, first_place = blockIdx.x * kStepThreads, place = first_place + threadIdx.x;
    const int elements = min(p.headdim - first_place, kStepThreads) * p.dstate;
    constexpr int kWord = 16 / sizeof(State);
    const bool exists = place < p.headdim;
    const int d = min(place, p.headdim - 1);                 // who has no channel reads the last one and writes nothing

    int64_t b[kRows], slot[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) slot[r] = b[r] = min(first + r, p.batch - 1);
    if (p.slots != nullptr) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) slot[r] = p.slots[b[r] * p.slots_stride];
    }
    State *from[kRows];                                      // of the CTA
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        from[r] = static_cast<State *>(p.state) + max(slot[r], int64_t{0}) * p.state_strides.batch
            + int64_t{first_place} * p.dstate;
        for (int i = threadIdx.x; i < elements / kWord; i += kStepThreads) copy_async(tile[r] + i, from[r] + i * kWord);
        for (int i = elements / kWord * kWord + threadIdx.x; i < elements; i += kStepThreads)
            reinterpret_cast<State *>(tile[r])[i] = from[r][i];
    }
    Input x[kRows], z[kRows];
    float dt[kRows], A[kStates], skip = 0.f, bias = 0.f;
    {                                                        // thread (r, B or C, n)
        const int n = threadIdx.x % kStates, of_c = threadIdx.x / kStates % 2, r = threadIdx.x / (2 * kStates);
        if (r < kRows) {
            const int64_t batch = min(first + r, p.batch - 1);
            const Input *from = of_c ? static_cast<const Input *>(p.C) + batch * p.C_batch_stride + n * p.C_n_stride
                                     : static_cast<const Input *>(p.B) + batch * p.B_batch_stride + n * p.B_n_stride;
            reinterpret_cast<float *>(shared[r][of_c])[n] = n < p.dstate ? to_float(*from) : 0.f;
        }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        x[r] = static_cast<const Input *>(p.x)[b[r] * p.x_strides.batch + d * p.x_strides.place];
        z[r] = from_float<Input>(0.f);
    }
    if (p.z != nullptr) {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
            z[r] = static_cast<const Input *>(p.z)[b[r] * p.z_strides.batch + d * p.z_strides.place];
    }
    p.dt.visit([&](auto *from) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) dt[r] = to_float(from[b[r] * p.dt_strides.batch + d * p.dt_strides.place]);
    });
    const float *A_row = p.A + d * p.A_strides.place;
#pragma unroll
    for (int a = 0; a < kStates / kAWidth; ++a) {
        StepVector<float, kAWidth> part{};
        if (a * kAWidth < p.dstate)
            part = *reinterpret_cast<const StepVector<float, kAWidth> *>(A_row + a * kAWidth * p.A_n_stride);
#pragma unroll
        for (int i = 0; i < kAWidth; ++i) A[a * kAWidth + i] = part.at[i];
    }
    if (p.D != nullptr) skip = p.D[d * p.D_place_stride];
    if (p.dt_bias != nullptr) bias = p.dt_bias[d * p.bias_place_stride];
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();

#pragma unroll
    for (int n = 0; n < kStates; ++n) A[n] *= kLog2e;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        float step = dt[r] + bias;
        if (p.dt_softplus) step = fast_softplus(step);
        const float current = to_float(x[r]), input = step * current;
        using Access = StepVector<State, kWidth>;
        Access *own = reinterpret_cast<Access *>(reinterpret_cast<State *>(tile[r]) + (d - first_place) * p.dstate);
        Access states[kStates / kWidth];
#pragma unroll
        for (int a = 0; a < kStates / kWidth; ++a)
            if (a * kWidth < p.dstate) states[a] = own[a];
        float sum = skip * current;
#pragma unroll
        for (int a = 0; a < kStates / 4; ++a) {
            const float4 B = shared[r][0][a], C = shared[r][1][a];
            const float B_at[4] = {B.x, B.y, B.z, B.w}, C_at[4] = {C.x, C.y, C.z, C.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int n = a * 4 + i;
                State &state = states[n / kWidth].at[n % kWidth];
                const float h = fmaf(fast_exp2(step * A[n]), to_float(state), input * B_at[i]);
                if (n < p.dstate) sum = fmaf(C_at[i], h, sum);
                state = from_float<State>(h);
            }
        }
#pragma unroll
        for (int a = 0; a < kStates / kWidth; ++a)
            if (exists && a * kWidth < p.dstate) own[a] = states[a];
        if (!exists || first + r >= p.batch) continue;
        if (p.z != nullptr) sum *= silu_for<Input>(to_float(z[r]));
        static_cast<Input *>(p.y)[b[r] * p.headdim + d] = from_float<Input>(slot[r] < 0 ? 0.f : sum);
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        if (first + r >= p.batch || slot[r] < 0) continue;
        for (int i = threadIdx.x; i < elements / kWord; i += kStepThreads)
            *reinterpret_cast<uint4 *>(from[r] + i * kWord) = tile[r][i];
        for (int i = elements / kWord * kWord + threadIdx.x; i < elements; i += kStepThreads)
            from[r][i] = reinterpret_cast<const State *>(tile[r])[i];
    }
}

}  // namespace shedder
