// Vectors of rows that start at any element.
//
// A compacted layout has rows of odd pitch, each of which lies differently against the grid of 16-byte words in memory.
// Whoever numbers the columns of a row from the grid point at or before its first element moves whole words, except
// the first and the last of the row, which go element by element.

#pragma once

#include <type_traits>

#include "kernels/pointwise.cuh"

namespace shedder {

template <int kBytes>
struct WordOf;
template <>
struct WordOf<8> {
    using type = uint2;
};
template <>
struct WordOf<16> {
    using type = uint4;
};

// kCount values as they lie in memory: taken apart only when they are used, since that waits for a load.
template <typename T, int kCount>
union Packed {
    using Word = typename WordOf<kCount * sizeof(T)>::type;
    Word word;
    T at[kCount];
    __device__ Packed() : word{} {}
    __device__ void get(float (&values)[kCount]) const {     // one instruction each
        if constexpr (std::is_same_v<T, __nv_bfloat16>) {
            const uint32_t *words = reinterpret_cast<const uint32_t *>(&word);
#pragma unroll
            for (int i = 0; i < kCount; i += 2) {
                values[i] = __uint_as_float(words[i / 2] << 16);
                values[i + 1] = __uint_as_float(words[i / 2] & 0xffff0000u);
            }
        } else {
#pragma unroll
            for (int i = 0; i < kCount; ++i) values[i] = to_float(at[i]);
        }
    }
    __device__ void set(const float (&values)[kCount]) {     // two roundings by one instruction
#pragma unroll
        for (int i = 0; i < kCount; i += 2) {
            if constexpr (std::is_same_v<T, __nv_bfloat16>)
                reinterpret_cast<__nv_bfloat162 &>(at[i]) = __floats2bfloat162_rn(values[i], values[i + 1]);
            else if constexpr (std::is_same_v<T, __half>)
                reinterpret_cast<__half2 &>(at[i]) = __floats2half2_rn(values[i], values[i + 1]);
            else
                at[i] = values[i], at[i + 1] = values[i + 1];
        }
    }
};

// to = *from where it exists. One predicated instruction: written as a branch, the compiler merges the old value by
// moves that wait for the load. 16 bytes: each word is read once; no .nc, which the assembler may put off until after a
// barrier. Less: neighbouring warps share lines, so that the L1 keeps them.
__device__ inline void load_if(bool exists, uint4 &to, const void *from) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];}"
                 : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w) : "l"(from), "r"(static_cast<unsigned>(exists)));
}
__device__ inline void load_if(bool exists, uint2 &to, const void *from) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; @p ld.global.nc.v2.u32 {%0, %1}, [%2];}"
                 : "+r"(to.x), "+r"(to.y) : "l"(from), "r"(static_cast<unsigned>(exists)));
}
__device__ inline void load_if(bool exists, uint16_t &to, const void *from) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.nc.u16 %0, [%1];}"
                 : "+h"(to) : "l"(from), "r"(static_cast<unsigned>(exists)));
}
__device__ inline void load_if(bool exists, uint32_t &to, const void *from) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.nc.u32 %0, [%1];}"
                 : "+r"(to) : "l"(from), "r"(static_cast<unsigned>(exists)));
}

// How many columns of T the grid point at or before `row` lies before it.
template <typename T, int kCount>
__host__ __device__ inline int columns_off_grid(const T *row) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % kCount);
}

// Where the rows of a tensor lie as seen from the columns of a warp.
enum class Grid {
    kWhole,                                                  // every vector on the grid and within its row
    kSame,                                                   // vectors on the grid; the first and the last stick out
    kOther                                                   // the grid of this tensor is another one
};

// kCount columns on their way: nothing in `fetch` waits for them.
template <typename T, int kCount, Grid kGrid>
struct RowVector {
    Packed<T, kCount> low, high;                             // high: only off the grid

    // from[0] .. from[kCount-1] where they exist, by reading the words of the grid that they lie in.
    __device__ void fetch(const T *from, bool exists) {
        using Word = typename Packed<T, kCount>::Word;
        const int before = kGrid == Grid::kOther ? columns_off_grid<T, kCount>(from) : 0;
        low.word = Word{};
        load_if(exists, low.word, from - before);
        if constexpr (kGrid == Grid::kOther) {
            high.word = Word{};
            load_if(exists && before != 0, high.word, from - before + kCount);
        }
    }
    // What `fetch` was asked for.
    __device__ Packed<T, kCount> get(const T *from) const {
        if constexpr (kGrid != Grid::kOther) {
            return low;
        } else {
            static_assert(sizeof(low.word) == 16);
            const int shift = columns_off_grid<T, kCount>(from) * static_cast<int>(sizeof(T));
            uint32_t w[8] = {low.word.x, low.word.y, low.word.z, low.word.w,
                             high.word.x, high.word.y, high.word.z, high.word.w};
            if (shift & 8) {
#pragma unroll
                for (int i = 0; i < 6; ++i) w[i] = w[i + 2];
            }
            if (shift & 4) {
#pragma unroll
                for (int i = 0; i < 5; ++i) w[i] = w[i + 1];
            }
            Packed<T, kCount> v;
            const int bits = shift & 2 ? 16 : 0;
            v.word = {__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits),
                      __funnelshift_r(w[2], w[3], bits), __funnelshift_r(w[3], w[4], bits)};
            return v;
        }
    }
};

// The counterpart of fetch for columns column .. column + kCount-1 of a row of `width`; not for Grid::kOther.
template <Grid kGrid, typename T, int kCount>
__device__ inline void store_row_vector(T *row, int column, int width, const Packed<T, kCount> &v) {
    using Word = typename Packed<T, kCount>::Word;
    if constexpr (kGrid == Grid::kWhole) {
        if (column < width) *reinterpret_cast<Word *>(row + column) = v.word;
    } else if (column >= 0 && column + kCount <= width) {
        *reinterpret_cast<Word *>(row + column) = v.word;
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            if (0 <= column + i && column + i < width) row[column + i] = v.at[i];
    }
}

}  // namespace shedder
