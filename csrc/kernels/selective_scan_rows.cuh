// How the selective scan reads and writes the rows of its tensors along time: pieces of 8 steps.

#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/pointwise.cuh"

namespace shedder {

// How a row of one channel (or one state) along time is read or written. Decided by the launcher for all rows at once.
enum class Access : int {
    kVector,    // 16 bytes at a time: steps adjacent, every row aligned
    kShifted,   // steps adjacent, rows at any offset: 16-byte reads shifted into place, 2-byte writes by neighbours
    kStrided,   // one element at a time
};

// The rows of u, delta, z and y are all accessed in the same way, those of B and C in another.
struct ScanTileAccess {
    Access rows, BC;
};

constexpr int kPieceSteps = 8;

template <typename Input>
struct alignas(16) Piece {
    uint32_t word[kPieceSteps * sizeof(Input) / 4];

    static __device__ float low(uint32_t pair) {
        if constexpr (std::is_same_v<Input, __nv_bfloat16>) return __uint_as_float(pair << 16);
        else return __low2float(*reinterpret_cast<const __half2 *>(&pair));
    }
    static __device__ float high(uint32_t pair) {
        if constexpr (std::is_same_v<Input, __nv_bfloat16>) return __uint_as_float(pair & 0xffff0000u);
        else return __high2float(*reinterpret_cast<const __half2 *>(&pair));
    }
    __device__ float get(int i) const {
        if constexpr (sizeof(Input) == 4) return __uint_as_float(word[i]);
        else return i % 2 ? high(word[i / 2]) : low(word[i / 2]);
    }
};

// 8 steps of a row, adjacent, the first on the 16-byte grid.
template <typename Input>
__device__ inline Piece<Input> read_whole_piece(const Input *at) {
    Piece<Input> piece;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(piece)) / 16; ++i) {
        const uint4 v = reinterpret_cast<const uint4 *>(at)[i];
        piece.word[4 * i] = v.x;
        piece.word[4 * i + 1] = v.y;
        piece.word[4 * i + 2] = v.z;
        piece.word[4 * i + 3] = v.w;
    }
    return piece;
}

template <typename Input>
__device__ inline void write_whole_piece(Input *at, const float (&y)[kPieceSteps]) {
    alignas(16) Input out[kPieceSteps];
#pragma unroll
    for (int i = 0; i < kPieceSteps; ++i) out[i] = from_float<Input>(y[i]);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(out)) / 16; ++i)
        reinterpret_cast<uint4 *>(at)[i] = reinterpret_cast<const uint4 *>(out)[i];
}

// The 8 steps of a row from `at`, of which `left` exist; zeros for the others.
template <typename Input>
__device__ inline Piece<Input> read_piece(const Input *at, int64_t stride, int left, Access access) {
    Piece<Input> piece;
    constexpr int kWords = sizeof(piece.word) / 4;
    if (access == Access::kVector && left >= kPieceSteps) return read_whole_piece(at);
    if constexpr (sizeof(Input) == 2) {
        if (access == Access::kShifted && left >= 2 * kPieceSteps) {           // both words lie in the row
            const uintptr_t address = reinterpret_cast<uintptr_t>(at);
            const uint4 *from = reinterpret_cast<const uint4 *>(address & ~uintptr_t{15});
            const int offset = static_cast<int>(address & 15) / 2;
            const uint4 a = from[0];
            const uint4 b = offset == 0 ? make_uint4(0, 0, 0, 0) : from[1];
            uint32_t w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
            for (int i = 0; i < 6; ++i) w[i] = offset & 4 ? w[i + 2] : w[i];
#pragma unroll
            for (int i = 0; i < 5; ++i) w[i] = offset & 2 ? w[i + 1] : w[i];
#pragma unroll
            for (int i = 0; i < 4; ++i) piece.word[i] = __funnelshift_r(w[i], w[i + 1], (offset & 1) * 16);
            return piece;
        }
        uint16_t half[kPieceSteps];
        if (left >= kPieceSteps) {
            const uint16_t *from = reinterpret_cast<const uint16_t *>(at);
#pragma unroll
            for (int i = 0; i < kPieceSteps; ++i, from += stride) half[i] = *from;
        } else
#pragma unroll
        for (int i = 0; i < kPieceSteps; ++i)
            half[i] = i < left ? reinterpret_cast<const uint16_t *>(at)[i * stride] : uint16_t{0};
#pragma unroll
        for (int i = 0; i < kWords; ++i) piece.word[i] = half[2 * i] | static_cast<uint32_t>(half[2 * i + 1]) << 16;
    } else {
#pragma unroll
        for (int i = 0; i < kPieceSteps; ++i)
            piece.word[i] = i < left ? __float_as_uint(at[i * stride]) : 0u;
    }
    return piece;
}

template <typename Input>
__device__ inline void write_piece(Input *at, int64_t stride, int left, Access access,
                                   const float (&y)[kPieceSteps]) {
    if (access == Access::kVector && left >= kPieceSteps) return write_whole_piece(at, y);
    if (left >= kPieceSteps) {
#pragma unroll
        for (int i = 0; i < kPieceSteps; ++i, at += stride) *at = from_float<Input>(y[i]);
    } else {
#pragma unroll
        for (int i = 0; i < kPieceSteps; ++i, at += stride)
            if (i < left) *at = from_float<Input>(y[i]);
    }
}

// y of `steps` steps, pieces kPiece floats apart, by 16 neighbouring threads: words of two elements where the row has
// them.
template <int kPiece, typename Input>
__device__ inline void write_row(Input *row, const float *y, int steps, int thread) {
    auto at = [&](int t) { return y[t / kPieceSteps * kPiece + t % kPieceSteps]; };
    if constexpr (sizeof(Input) == 4) {
        for (int t = thread; t < steps; t += 16) row[t] = at(t);
    } else {
        const int odd = reinterpret_cast<uintptr_t>(row) / 2 % 2;
        if (odd && thread == 0) row[0] = from_float<Input>(at(0));
        for (int t = 2 * thread + odd; t < steps; t += 32) {
            const Input first = from_float<Input>(at(t));
            if (t + 1 < steps) {
                Input pair[2] = {first, from_float<Input>(at(t + 1))};
                uint32_t word;
                memcpy(&word, pair, 4);
                *reinterpret_cast<uint32_t *>(row + t) = word;
            } else {
                row[t] = first;
            }
        }
    }
}

}  // namespace shedder
