// One decode step of either family.
//
//   dt = softplus(dt + bias)      h = exp(dt A) h + dt B x      y = (sum_n C h + D x) silu(z)
//
// `lanes` neighbouring threads share a row (slot, head, p) of N states, kStates each, moved by accesses of kWidth states:
// 16 bytes, or single ones where rows of the state do not lie on the 16-byte grid. A warp task is kRows such rows for each thread, all
// read before the first is used.
//   kTied (Mamba-2, one dt and A for a head): the rows of a task are kRows places of P, so that B, C and the one
//   exponential serve them all.
//   Else (Mamba-1): they are kRows rows of the batch, so that A is read once for them.
// Bound: bytes of the state.

#pragma once

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
    int64_t batch, heads;
    int headdim, dstate, lanes;
    bool dt_softplus, group_per_place;                       // Mamba-1 with groups: the map numbers places
    bool A_vectors, BC_vectors;                              // their rows lie on the 16-byte grid
};

constexpr int kStepThreads = 128;
constexpr int kStepStates = 8;                               // of one thread

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth < 16 ? sizeof(T) * kWidth : 16) StepVector {
    T at[kWidth];
};

// Elements n .. n + kWidth-1 of a row of `size`; those beyond it are zero.
template <typename T, int kWidth>
__device__ inline void load_step_row(float (&out)[kStepStates], int access, const T *row, int n, int size,
                                     int64_t stride, bool vectors) {
    float *to = out + access * kWidth;
    if (kWidth > 1 && vectors) {
        StepVector<T, kWidth> v{};
        if (n < size) v = *reinterpret_cast<const StepVector<T, kWidth> *>(row + n);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) to[j] = to_float(v.at[j]);
    } else {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) to[j] = n + j < size ? to_float(row[(n + j) * stride]) : 0.f;
    }
}

template <typename Input, typename State, int kWidth, int kRows, bool kTied>
__global__ void __launch_bounds__(kStepThreads, 4) state_update_step(const __grid_constant__ StateUpdateParams p) {
    constexpr int kAccesses = kStepStates / kWidth;
    constexpr unsigned kAll = 0xffffffffu;
    const int rows = 32 / p.lanes;                           // side by side in the warp
    const int lane = threadIdx.x % 32 % p.lanes, sub = threadIdx.x % 32 / p.lanes;
    // Tied tasks: (batch, head, run of kRows * rows places). Else: (run of kRows of the batch, head, run of rows places).
    const int run = kTied ? rows * kRows : rows;
    const int64_t runs = (p.headdim + run - 1) / run;
    int64_t task = blockIdx.x * int64_t{kStepThreads / 32} + threadIdx.x / 32;
    const int64_t first_place = task % runs * run + sub;
    task /= runs;
    const int64_t head = task % p.heads;
    const int64_t first_batch = kTied ? task / p.heads : task / p.heads * kRows;
    if (first_batch >= p.batch) return;                      // the whole warp

    const auto n_of = [&](int access) { return (access * p.lanes + lane) * kWidth; };
    const auto offset_of = [&](int access) { return kWidth > 1 ? n_of(access) : n_of(access) * p.state_n_stride; };
    const auto batch_of = [&](int r) { return kTied ? first_batch : first_batch + r; };
    const auto place_of = [&](int r) { return kTied ? first_place + r * rows : first_place; };
    const auto exists = [&](int r) { return place_of(r) < p.headdim && batch_of(r) < p.batch; };

    State *row[kRows];                                       // null: padding, or nothing
    StepVector<State, kWidth> old[kRows][kAccesses];
    float x[kRows], dt[kRows], z[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        row[r] = nullptr;
        x[r] = dt[r] = z[r] = 0.f;
        if (!exists(r)) continue;
        const int64_t b = batch_of(r), place = place_of(r);
        const int64_t slot = p.slots == nullptr ? b : p.slots[b * p.slots_stride];
        if (slot < 0) continue;
        row[r] = static_cast<State *>(p.state) + slot * p.state_strides.batch + head * p.state_strides.head
            + place * p.state_strides.place;
#pragma unroll
        for (int a = 0; a < kAccesses; ++a)
            if (n_of(a) < p.dstate)
                old[r][a] = *reinterpret_cast<const StepVector<State, kWidth> *>(row[r] + offset_of(a));
        x[r] = to_float(static_cast<const Input *>(p.x)[b * p.x_strides.batch + head * p.x_strides.head
                                                        + place * p.x_strides.place]);
        dt[r] = p.dt[b * p.dt_strides.batch + head * p.dt_strides.head + place * p.dt_strides.place];
        if (p.z != nullptr)
            z[r] = to_float(static_cast<const Input *>(p.z)[b * p.z_strides.batch + head * p.z_strides.head
                                                            + place * p.z_strides.place]);
    }

    float A[kStepStates];
    float skip = 0.f, bias = 0.f;
    if constexpr (kTied) {
        A[0] = p.A[head * p.A_strides.head] * kLog2e;
        if (p.dt_bias != nullptr) bias = p.dt_bias[head * p.bias_head_stride];
    } else if (first_place < p.headdim) {
        const float *A_row = p.A + head * p.A_strides.head + first_place * p.A_strides.place;
#pragma unroll
        for (int a = 0; a < kAccesses; ++a)
            load_step_row<float, kWidth>(A, a, A_row, n_of(a), p.dstate, p.A_n_stride, p.A_vectors);
#pragma unroll
        for (int i = 0; i < kStepStates; ++i) A[i] *= kLog2e;
        if (p.dt_bias != nullptr) bias = p.dt_bias[head * p.bias_head_stride + first_place * p.bias_place_stride];
        if (p.D != nullptr) skip = p.D[head * p.D_head_stride + first_place * p.D_place_stride];
    }

    float B[kStepStates], C[kStepStates], step = 0.f, decay = 0.f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const int64_t b = batch_of(r), place = place_of(r);
        if (!kTied || r == 0) {                              // Mamba-1: other rows of the batch have other B and C
            if (b < p.batch && place < p.headdim) {
                const int64_t group = p.head_to_group == nullptr
                    ? 0 : p.head_to_group[(p.group_per_place ? place : head) * p.map_stride];
                const Input *B_row = static_cast<const Input *>(p.B) + b * p.B_batch_stride + group * p.B_group_stride;
                const Input *C_row = static_cast<const Input *>(p.C) + b * p.C_batch_stride + group * p.C_group_stride;
#pragma unroll
                for (int a = 0; a < kAccesses; ++a) {
                    load_step_row<Input, kWidth>(B, a, B_row, n_of(a), p.dstate, p.B_n_stride, p.BC_vectors);
                    load_step_row<Input, kWidth>(C, a, C_row, n_of(a), p.dstate, p.C_n_stride, p.BC_vectors);
                }
            }
            step = dt[r] + bias;
            if (p.dt_softplus) step = softplus(step);
            if constexpr (kTied) decay = fast_exp2(step * A[0]);
        }
        const float input = step * x[r];
        float sum = 0.f;
#pragma unroll
        for (int a = 0; a < kAccesses; ++a) {
            StepVector<State, kWidth> fresh;
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                const int i = a * kWidth + j;
                if constexpr (!kTied) decay = fast_exp2(step * A[i]);
                const float h = n_of(a) < p.dstate ? decay * to_float(old[r][a].at[j]) + input * B[i] : 0.f;
                sum += C[i] * h;
                fresh.at[j] = from_float<State>(h);
            }
            if (row[r] != nullptr && n_of(a) < p.dstate)
                *reinterpret_cast<StepVector<State, kWidth> *>(row[r] + offset_of(a)) = fresh;
        }
        for (int offset = p.lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
        if (lane != 0 || !exists(r)) continue;
        if constexpr (kTied)
            skip = p.D == nullptr ? 0.f : p.D[head * p.D_head_stride + place * p.D_place_stride];
        sum += skip * x[r];
        if (p.z != nullptr) sum *= fast_silu(z[r]);
        static_cast<Input *>(p.y)[(b * p.heads + head) * p.headdim + place] =
            from_float<Input>(row[r] == nullptr ? 0.f : sum);
    }
}

}  // namespace shedder
