// 16-byte accesses to rows that start at any element.
//
// A compacted layout has rows of odd pitch, so that each row lies differently against the 16-byte grid of memory. Here
// lane i of a warp always owns the same kElements<T> columns, whatever the row's address: a load takes the two aligned
// vectors around them and shifts; a store shifts with the neighbouring lane and writes the aligned vector between.
// Only the first and last columns of a warp's run, and the end of a row, go element by element.

#pragma once

#include "kernels/pointwise.cuh"

namespace shedder {

template <typename T>
constexpr int kElements = 16 / sizeof(T);

// kElements<T> values as they lie in memory.
template <typename T>
union Packed {
    uint4 vector;
    uint32_t word[4];
    T at[kElements<T>];
    __device__ Packed() : vector{0, 0, 0, 0} {}
};

// Bytes shift .. shift+15 of low followed by high; 0 <= shift < 16, even.
__device__ inline uint4 shift_bytes(uint4 low, uint4 high, int shift) {
    uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    if (shift & 8) {
#pragma unroll
        for (int i = 0; i < 6; ++i) w[i] = w[i + 2];
    }
    if (shift & 4) {
#pragma unroll
        for (int i = 0; i < 5; ++i) w[i] = w[i + 1];
    }
    const int bits = (shift & 2) * 8;
    return {__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits), __funnelshift_r(w[2], w[3], bits),
            __funnelshift_r(w[3], w[4], bits)};
}

// Streamed: read once, so not worth a place in L1.
__device__ inline uint4 load_stream(const uint4 *from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

// Columns column .. column + kElements-1 of a row of `width`; those beyond it are zero.
template <typename T, bool kAligned>
__device__ inline Packed<T> load_row_vector(const T *row, int64_t column, int64_t width) {
    Packed<T> v;
    const T *from = row + column;
    if (column + kElements<T> <= width) {
        if constexpr (kAligned) {
            v.vector = load_stream(reinterpret_cast<const uint4 *>(from));
        } else {
            const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(from) & 15);
            const uint4 *grid = reinterpret_cast<const uint4 *>(reinterpret_cast<uintptr_t>(from) - shift);
            const uint4 low = __ldg(grid);
            const uint4 high = shift ? __ldg(grid + 1) : low;
            v.vector = shift_bytes(low, high, shift);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kElements<T>; ++i)
            if (column + i < width) v.at[i] = from[i];
    }
    return v;
}

// The inverse; every lane of the warp calls it with column = first + lane * kElements, also those beyond the width.
template <typename T, bool kAligned>
__device__ inline void store_row_vector(T *row, int64_t column, int64_t width, const Packed<T> &v) {
    constexpr int kCount = kElements<T>;
    T *to = row + column;
    const int shift = kAligned ? 0 : static_cast<int>(reinterpret_cast<uintptr_t>(to) & 15);
    if (shift == 0) {
        if (column + kCount <= width) {
            *reinterpret_cast<uint4 *>(to) = v.vector;
        } else {
#pragma unroll
            for (int i = 0; i < kCount; ++i)
                if (column + i < width) to[i] = v.at[i];
        }
        return;
    }
    const int lane = threadIdx.x % 32;
    const int before = shift / static_cast<int>(sizeof(T));        // columns of the aligned vector that the left lane owns
    Packed<T> left, mixed;
#pragma unroll
    for (int i = 0; i < 4; ++i) left.word[i] = __shfl_up_sync(0xffffffffu, v.word[i], 1);
    mixed.vector = shift_bytes(left.vector, v.vector, 16 - shift);
    if (lane > 0) {
        if (column - before + kCount <= width) {
            *reinterpret_cast<uint4 *>(to - before) = mixed.vector;
        } else {
#pragma unroll
            for (int i = 0; i < kCount; ++i)
                if (column - before + i < width) to[i - before] = mixed.at[i];
        }
    }
    if (lane == 0 || lane == 31) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const bool mine = lane == 0 ? i < kCount - before : i >= kCount - before;
            if (mine && column + i < width) to[i] = v.at[i];
        }
    }
}

}  // namespace shedder
