// One decode step of either family.
//
//   dt = softplus(dt + bias)      h = exp(dt A) h + dt B x      y = (sum_n C h + D x) silu(z)
//
// `lanes` neighbouring threads share a row (slot, head, p) of N states, kOwn each, moved by accesses of kWidth states: 16
// bytes, or single ones where a row of states, A, B or C does not lie on the 16-byte grid. A warp task is kRows such rows
// for each thread. Where there are few rows, a step takes as long as a thread's instructions before its last load: then
// kRows is 1, and kOwn as small as 32 lanes allow. All loads come first, none under a branch that waits for it; rows that
// do not exist read a neighbour instead and write nothing.
//   kTied (Mamba-2, one dt and A for a head): the rows of a task are kRows places of P, so that B, C and the one
//   exponential serve them all.
//   Else (Mamba-1): they are kRows rows of the batch, so that A is read once for them.
// state_update_channels: Mamba-1 with one group and at most 16 states. A warp owns 32 channels and walks over rows of the
//   batch, a thread has all states of a channel: A is read once, and the states of the next kStepDepth rows are on their
//   way into shared memory, between which and global memory the warp moves whole words, whatever N is.
// Bound: bytes of the state.

#pragma once

#include "kernels/copy_async.cuh"
#include "kernels/dependents.cuh"
#include "kernels/pointwise.cuh"
#include "kernels/row_vectors.cuh"

namespace shedder {

struct StepStrides {
    int64_t batch, head, place;                              // place: the channel p of the head
};

// Division of numbers below 2^31 by one that the launcher knows: a product instead of some 30 instructions.
struct Divisor {
    unsigned divisor = 1, factor = 0;
    int shift = 0;

    Divisor() = default;
    explicit Divisor(unsigned by) : divisor(by) {
        if (by == 1) return;
        int bits = 0;
        while ((uint64_t{1} << bits) < by) ++bits;
        factor = static_cast<unsigned>(((uint64_t{1} << (31 + bits)) + by - 1) / by);
        shift = bits - 1;
    }
    __device__ unsigned quotient(unsigned n) const { return factor == 0 ? n : __umulhi(n, factor) >> shift; }
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
    int batch, heads, headdim, dstate, rows;                 // rows: of the batch, that one warp walks over
    int lane_bits;                                           // 2^lane_bits lanes share a row of states
    Divisor by_runs, by_heads;                               // runs of places; heads
    bool dt_softplus, group_per_place;                       // Mamba-1 with groups: the map numbers places
};

constexpr int kStepThreads = 128;
constexpr int kStepStates = 8, kFewStepStates = 2;           // of one thread; where there are few rows

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth < 16 ? sizeof(T) * kWidth : 16) StepVector {
    T at[kWidth];
};

// use(access, its first element, where that lies) for the accesses of kWidth elements that a lane has in a row. One
// address from the other: at small sizes the step takes as long as its instructions before the last load.
template <int kWidth, int kOwn, typename T, typename Use>
__device__ inline void each_access(T *row, int lane, int lanes, int64_t stride, Use use) {
    const int64_t apart = kWidth > 1 ? kWidth : stride, step = lanes * apart;
    T *at = row + lane * apart;
    int n = lane * kWidth;
#pragma unroll
    for (int a = 0; a < kOwn / kWidth; ++a, n += lanes * kWidth, at += step) use(a, n, at);
}

// kOwn elements of a row, as they are stored: those of `lane` in accesses of kWidth.
template <typename T, int kWidth, int kOwn>
struct StepStates {
    StepVector<T, kWidth> part[kOwn / kWidth];

    __device__ void fetch(const T *row, int lane, int lanes, int size, int64_t stride) {
        each_access<kWidth, kOwn>(row, lane, lanes, stride, [&](int a, int n, const T *at) {
            if (n < size) part[a] = *reinterpret_cast<const StepVector<T, kWidth> *>(at);
            else part[a] = StepVector<T, kWidth>{};
        });
    }
    __device__ float operator[](int i) const { return to_float(part[i / kWidth].at[i % kWidth]); }
};

template <typename Input, typename State, int kWidth, int kOwn, int kRows, bool kTied>
__global__ void __launch_bounds__(kStepThreads) state_update_step(const __grid_constant__ StateUpdateParams p) {
    constexpr unsigned kAll = 0xffffffffu;
    constexpr int kOthers = kTied ? 1 : kRows;               // different B and C
    const int lanes = 1 << p.lane_bits, rows = 32 >> p.lane_bits;            // rows: side by side in the warp
    const int lane = threadIdx.x & (lanes - 1), sub = threadIdx.x % 32 >> p.lane_bits;
    // Tied tasks: (batch, head, run of kRows * rows places). Else: (run of kRows of the batch, head, run of rows places).
    const unsigned run = kTied ? rows * kRows : rows, task = blockIdx.x * (kStepThreads / 32) + threadIdx.x / 32;
    const unsigned with_head = p.by_runs.quotient(task), batches = p.by_heads.quotient(with_head);
    const int first_place = static_cast<int>((task - with_head * p.by_runs.divisor) * run) + sub;
    const unsigned head = with_head - batches * p.by_heads.divisor;
    const int first_batch = static_cast<int>(batches) * (kTied ? 1 : kRows);
    if (first_batch >= p.batch) return;                      // the whole warp
    wait_for_kernel_before();
    start_dependents();

    bool exists[kRows];
    unsigned b[kRows], place[kRows];                         // no signs to extend in addresses
    int slot[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const int batch = kTied ? first_batch : first_batch + r, spot = kTied ? first_place + r * rows : first_place;
        exists[r] = batch < p.batch && spot < p.headdim;
        b[r] = min(batch, p.batch - 1);
        place[r] = min(spot, p.headdim - 1);
        slot[r] = static_cast<int>(b[r]);
    }
    if (p.slots != nullptr) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) slot[r] = p.slots[b[r] * p.slots_stride];
    }

    State *row[kRows];
    StepStates<State, kWidth, kOwn> old[kRows];
    StepStates<Input, kWidth, kOwn> B[kOthers], C[kOthers];
    StepStates<float, kWidth, kOwn> A;
    Input x[kRows], z[kRows];
    float dt[kOthers], skip[kRows], bias = 0.f, decay = 0.f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        row[r] = static_cast<State *>(p.state) + static_cast<unsigned>(max(slot[r], 0)) * p.state_strides.batch
            + head * p.state_strides.head + place[r] * p.state_strides.place;
        old[r].fetch(row[r], lane, lanes, slot[r] < 0 ? 0 : p.dstate, p.state_n_stride);
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
        A.fetch(p.A + head * p.A_strides.head + place[0] * p.A_strides.place, lane, lanes, p.dstate, p.A_n_stride);
    if (p.dt_bias != nullptr) bias = p.dt_bias[head * p.bias_head_stride + place[0] * p.bias_place_stride];
    unsigned group = 0;
    if (p.head_to_group != nullptr) group = p.head_to_group[(p.group_per_place ? place[0] : head) * p.map_stride];
#pragma unroll
    for (int r = 0; r < kOthers; ++r) {
        B[r].fetch(static_cast<const Input *>(p.B) + b[r] * p.B_batch_stride + group * p.B_group_stride, lane, lanes,
                   p.dstate, p.B_n_stride);
        C[r].fetch(static_cast<const Input *>(p.C) + b[r] * p.C_batch_stride + group * p.C_group_stride, lane, lanes,
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
        each_access<kWidth, kOwn>(row[r], lane, lanes, p.state_n_stride, [&](int a, int n, State *at) {
            StepVector<State, kWidth> fresh;
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                const int i = a * kWidth + j;
                if constexpr (!kTied) decay = fast_exp2(step * (A[i] * kLog2e));
                const float h = decay * old[r][i] + input * B[shared(r)][i];      // beyond N: B and C are 0
                sum += C[shared(r)][i] * h;
                fresh.at[j] = from_float<State>(h);
            }
            if (moves && n < p.dstate) *reinterpret_cast<StepVector<State, kWidth> *>(at) = fresh;
        });
        for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
        if (lane != 0 || !exists[r]) continue;
        sum += skip[r] * current;
        if (p.z != nullptr) sum *= fast_silu(to_float(z[r]));
        static_cast<Input *>(p.y)[(int64_t{b[r]} * p.heads + head) * p.headdim + place[r]] =
            from_float<Input>(slot[r] < 0 ? 0.f : sum);
    }
}

constexpr int kChannelStates = 16;
constexpr int kStepDepth = 4;                                // rows of the batch on their way

// kStates is N, a multiple of 4, or 0: any N up to kChannelStates. Rows of states are adjacent, those of a slot on the
// 16-byte grid. dt is of the type of x.
template <typename Input, typename State, int kExact>
__global__ void __launch_bounds__(kStepThreads, sizeof(State) == 4 ? 5 : 6) state_update_channels(
    const __grid_constant__ StateUpdateParams p) {
    constexpr int kStates = kExact ? kExact : kChannelStates, kWord = 16 / sizeof(State);
    constexpr int kWidth = !kExact ? 1 : kStates % kWord == 0 ? kWord : 4;   // of an access to shared memory
    constexpr int kAWidth = kExact ? 4 : 1, kWords = 32 * kStates / kWord;   // kWords: of a row of the warp
    using Bits = std::conditional_t<sizeof(Input) == 4, uint32_t, uint16_t>;
    using Access = StepVector<State, kWidth>;
    __shared__ uint4 tiles[kStepThreads / 32 * kStepDepth * kWords];
    __shared__ float shared[kStepThreads / 32][2][kChannelStates];         // B and C
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_place = (blockIdx.x * (kStepThreads / 32) + warp) * 32;
    if (first_place >= p.headdim) return;                    // the whole warp
    const int dstate = kExact ? kExact : p.dstate;
    const bool exists = first_place + lane < p.headdim;
    const int d = exists ? first_place + lane : p.headdim - 1;             // who has no channel reads the last one
    const int elements = min(p.headdim - first_place, 32) * dstate;
    int words = elements / kWord, own_offset = (d - first_place) * dstate;
    const int first = blockIdx.y * p.rows;
    int end = min(first + p.rows, p.batch);

    const auto slot_of = [&](int row) { return p.slots == nullptr ? row : p.slots[row * p.slots_stride]; };
    State *states_of_slot_0 = static_cast<State *>(p.state) + int64_t{first_place} * dstate + lane * kWord;
    int place = warp * kStepDepth * kWords + lane;           // this lane's first word in the ring
    asm volatile("" : "+r"(words), "+r"(own_offset), "+r"(end), "+l"(states_of_slot_0));   // kept, not computed again
    const auto request = [&](int row, int place) {
        const int slot = row < end ? slot_of(row) : -1;
        if (slot >= 0) {
            const State *from = states_of_slot_0 + slot * p.state_strides.batch;
#pragma unroll
            for (int i = 0; i < kWords; i += 32)
                if (i + lane < words) copy_async(tiles + place + i, from + i * kWord);
#pragma unroll 1
            for (int i = words * kWord; i + lane < elements; i += 32)
                reinterpret_cast<State *>(tiles + place - lane)[i + lane] = from[i - lane * (kWord - 1)];
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    wait_for_kernel_before();
    start_dependents();
#pragma unroll
    for (int ahead = 0; ahead < kStepDepth; ++ahead) request(first + ahead, place + ahead * kWords);

    Bits x{}, z{}, dt{}, BC{};                               // of the next row
    const int n = lane % kChannelStates;
    const bool of_B = lane < kChannelStates, is_state = n < dstate;
    const int own_n = min(n, dstate - 1);
    const Input *next_x = static_cast<const Input *>(p.x) + first * p.x_strides.batch + d * p.x_strides.place;
    const Input *next_dt = static_cast<const Input *>(p.dt.data) + first * p.dt_strides.batch + d * p.dt_strides.place;
    const Input *next_z = p.z == nullptr ? next_x            // read, not used
        : static_cast<const Input *>(p.z) + first * p.z_strides.batch + d * p.z_strides.place;
    const Input *next_BC = of_B ? static_cast<const Input *>(p.B) + first * p.B_batch_stride + own_n * p.B_n_stride
                                : static_cast<const Input *>(p.C) + first * p.C_batch_stride + own_n * p.C_n_stride;
    const int64_t BC_stride = of_B ? p.B_batch_stride : p.C_batch_stride;
    const auto fetch = [&](bool row_exists) {
        load_if(row_exists, x, next_x);
        load_if(row_exists, z, next_z);
        load_if(row_exists, dt, next_dt);
        load_if(row_exists, BC, next_BC);
        next_x += p.x_strides.batch;
        next_z += p.z_strides.batch;                         // 0 without z
        next_dt += p.dt_strides.batch;
        next_BC += BC_stride;
    };
    fetch(true);
    float A[kStates], skip = 0.f, bias = 0.f;
    const float *A_row = p.A + d * p.A_strides.place;
#pragma unroll
    for (int a = 0; a < kStates / kAWidth; ++a) {
        StepVector<float, kAWidth> part{};
        if (a * kAWidth < dstate)
            part = *reinterpret_cast<const StepVector<float, kAWidth> *>(A_row + a * kAWidth * p.A_n_stride);
#pragma unroll
        for (int i = 0; i < kAWidth; ++i) A[a * kAWidth + i] = part.at[i];
    }
    if (p.D != nullptr) skip = p.D[d * p.D_place_stride];
    if (p.dt_bias != nullptr) bias = p.dt_bias[d * p.bias_place_stride];
#pragma unroll
    for (int i = 0; i < kStates; ++i) A[i] *= kLog2e;

    const auto typed = [](const Bits &bits) { return to_float(reinterpret_cast<const Input &>(bits)); };
    Input *y = static_cast<Input *>(p.y) + int64_t{first} * p.headdim + d;
    const int last_place = place + (kStepDepth - 1) * kWords;
#pragma unroll 1
    for (int row = first; row < end; ++row) {
        float step = typed(dt) + bias;
        if (p.dt_softplus) step = fast_softplus(step);
        const float current = typed(x), input = step * current, gate = typed(z);
        shared[warp][0][lane] = is_state ? typed(BC) : 0.f;
        fetch(row + 1 < end);
        asm volatile("cp.async.wait_group %0;" :: "n"(kStepDepth - 1) : "memory");
        __syncwarp();

        Access *own = reinterpret_cast<Access *>(reinterpret_cast<State *>(tiles + place - lane) + own_offset);
        Access states[kStates / kWidth];
#pragma unroll
        for (int a = 0; a < kStates / kWidth; ++a) states[a] = exists && a * kWidth < dstate ? own[a] : Access{};
        float sum = skip * current;
#pragma unroll
        for (int a = 0; a < kStates / 4; ++a) {
            const float4 B = reinterpret_cast<const float4 *>(shared[warp][0])[a];
            const float4 C = reinterpret_cast<const float4 *>(shared[warp][1])[a];
            const float B_at[4] = {B.x, B.y, B.z, B.w}, C_at[4] = {C.x, C.y, C.z, C.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {                    // beyond N all is 0
                State &state = states[(a * 4 + i) / kWidth].at[(a * 4 + i) % kWidth];
                const float h = fmaf(fast_exp2(step * A[a * 4 + i]), to_float(state), input * B_at[i]);
                sum = fmaf(C_at[i], h, sum);
                state = from_float<State>(h);
            }
        }
        const int slot = slot_of(row);
        if (p.z != nullptr) sum *= silu_for<Input>(gate);
        if (exists) {
#pragma unroll
            for (int a = 0; a < kStates / kWidth; ++a)
                if (a * kWidth < dstate) own[a] = states[a];
            *y = from_float<Input>(slot < 0 ? 0.f : sum);
        }
        y += p.headdim;
        __syncwarp();
        if (slot >= 0) {
            State *to = states_of_slot_0 + slot * p.state_strides.batch;
#pragma unroll
            for (int i = 0; i < kWords; i += 32)
                if (i + lane < words) *reinterpret_cast<uint4 *>(to + i * kWord) = tiles[place + i];
#pragma unroll 1
            for (int i = words * kWord; i + lane < elements; i += 32)
                to[i - lane * (kWord - 1)] = reinterpret_cast<const State *>(tiles + place - lane)[i + lane];
        }
        __syncwarp();                                        // read before the next row comes in
        request(row + kStepDepth, place);
        place = place == last_place ? last_place - (kStepDepth - 1) * kWords : place + kWords;
    }
}

}  // namespace shedder
