// Vector accesses to rows that start at any element.
//
// A compacted layout has rows of odd pitch, so that each row lies differently against the grid of 8- or 16-byte words in
// memory. Here lane i of a warp always owns the same kCount columns, whatever the row's address: a load fetches the two
// words of the grid around them, and shifts when they have come; a store shifts with the neighbouring lane and writes
// the word between. Only the first and last columns of a warp's run, and the end of a row, go element by element.

#pragma once

#include "kernels/pointwise.cuh"

namespace shedder {

// kCount values as they lie in memory: 8 or 16 bytes.
template <typename T, int kCount>
union Packed {
    static constexpr int kWords = kCount * sizeof(T) / 4;
    static_assert(kWords == 2 || kWords == 4);
    uint32_t word[kWords];
    T at[kCount];
    __device__ Packed() {
#pragma unroll
        for (int i = 0; i < kWords; ++i) word[i] = 0;
    }
};

__device__ inline void load_words(uint32_t (&to)[4], const void *from) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
}
__device__ inline void load_words(uint32_t (&to)[2], const void *from) {
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from));
}
// The same for words that the neighbouring lane reads too.
__device__ inline void load_shared_words(uint32_t (&to)[4], const void *from) {
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
}
__device__ inline void load_shared_words(uint32_t (&to)[2], const void *from) {
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from));
}
__device__ inline void store_words(void *to, const uint32_t (&from)[4]) {
    *static_cast<uint4 *>(to) = {from[0], from[1], from[2], from[3]};
}
__device__ inline void store_words(void *to, const uint32_t (&from)[2]) {
    *static_cast<uint2 *>(to) = {from[0], from[1]};
}

// Bytes of an address above the grid of words of kBytes.
template <int kBytes>
__device__ inline int shift_of(const void *address) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(address)) & (kBytes - 1);
}

// Bytes shift .. shift + 4 kWords - 1 of low followed by high; shift is even and below 4 kWords.
template <int kWords>
__device__ inline void shift_words(uint32_t (&to)[kWords], const uint32_t (&low)[kWords], const uint32_t (&high)[kWords],
                                   int shift) {
    uint32_t w[2 * kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
        w[i] = low[i];
        w[kWords + i] = high[i];
    }
    if constexpr (kWords == 4) {
        if (shift & 8) {
#pragma unroll
            for (int i = 0; i < 6; ++i) w[i] = w[i + 2];
        }
    }
    if (shift & 4) {
#pragma unroll
        for (int i = 0; i <= kWords; ++i) w[i] = w[i + 1];
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) to[i] = __funnelshift_r(w[i], w[i + 1], (shift & 2) * 8);
}

// A vector on its way: fetched, not yet shifted. Nothing here waits for it.
template <typename T, int kCount, bool kAligned>
struct RowVector {
    static constexpr int kBytes = kCount * sizeof(T);
    Packed<T, kCount> low, high;

    // Columns column .. column + kCount-1 of a row of `width`; nothing at or beyond `end` is touched.
    __device__ void fetch(const T *row, int column, int width, const T *end) {
        if (column >= width) return;
        const T *from = row + column;
        if constexpr (kAligned) {
            load_words(low.word, from);
        } else {
            const int shift = shift_of<kBytes>(from);
            const char *grid = reinterpret_cast<const char *>(from) - shift;
            const bool both = shift != 0 && column + (kBytes - shift) / static_cast<int>(sizeof(T)) < width;
            if (grid + (both ? 2 * kBytes : kBytes) <= reinterpret_cast<const char *>(end)) {
                load_shared_words(low.word, grid);
                if (both) load_shared_words(high.word, grid + kBytes);
            } else {                                         // the end of the last row
                const int skipped = shift / static_cast<int>(sizeof(T));
#pragma unroll
                for (int i = 0; i < 2 * kCount; ++i) {
                    const int c = i - skipped;
                    if (0 <= c && c < kCount && column + c < width)
                        (i < kCount ? low.at[i % kCount] : high.at[i % kCount]) = from[c];
                }
            }
        }
    }
    // What `fetch` was asked for; columns beyond the width are zero.
    __device__ Packed<T, kCount> get(const T *row, int column, int width) const {
        if constexpr (kAligned) return low;
        Packed<T, kCount> v;
        shift_words(v.word, low.word, high.word, shift_of<kBytes>(row + column));
        if (column + kCount > width) {
#pragma unroll
            for (int i = 0; i < kCount; ++i)
                if (column + i >= width) v.at[i] = from_float<T>(0.f);
        }
        return v;
    }
};

// Every lane of the warp calls it with column = first + lane * kCount, also those beyond the width.
template <bool kAligned, typename T, int kCount>
__device__ inline void store_row_vector(T *row, int column, int width, const Packed<T, kCount> &v) {
    constexpr int kBytes = kCount * sizeof(T);
    T *to = row + column;
    const int shift = kAligned ? 0 : shift_of<kBytes>(to);
    if (shift == 0) {
        if (column + kCount <= width) {
            store_words(to, v.word);
        } else if (!kAligned) {
#pragma unroll
            for (int i = 0; i < kCount; ++i)
                if (column + i < width) to[i] = v.at[i];
        }
        return;
    }
    const int lane = threadIdx.x % 32;
    const int before = shift / static_cast<int>(sizeof(T));        // columns of the word that the left lane owns
    Packed<T, kCount> left, mixed;
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) left.word[i] = __shfl_up_sync(0xffffffffu, v.word[i], 1);
    shift_words(mixed.word, left.word, v.word, kBytes - shift);
    if (lane > 0) {
        if (column - before + kCount <= width) {
            store_words(to - before, mixed.word);
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
