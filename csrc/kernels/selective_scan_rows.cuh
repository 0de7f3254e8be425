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

struct ScanAccess {
    Access u, delta, z, y, B, C;
};

constexpr int kPieceSteps = 8;

template <typename Input>
struct alignas(16) Piece {
    uint32_t word[kPieceSteps * sizeof(Input) / 4];

    __device__ float get(int i) const {
        if constexpr (sizeof(Input) == 4) {
            return __uint_as_float(word[i]);
        } else if constexpr (std::is_same_v<Input, __nv_bfloat16>) {
            return __uint_as_float(i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16);
        } else {
            const __half2 pair = *reinterpret_cast<const __half2 *>(&word[i / 2]);
            return i % 2 ? __high2float(pair) : __low2float(pair);
        }
    }
};

// The 8 steps of a row from `at`, of which `left` exist; zeros for the others.
template <typename Input>
__device__ inline Piece<Input> read_piece(const Input *at, int64_t stride, int left, Access access) {
    Piece<Input> piece;
    constexpr int kWords = sizeof(piece.word) / 4;
    if (access == Access::kVector && left >= kPieceSteps) {
        const uint4 *from = reinterpret_cast<const uint4 *>(at);
#pragma unroll
        for (int i = 0; i < kWords / 4; ++i) {
            const uint4 v = from[i];
            piece.word[4 * i] = v.x;
            piece.word[4 * i + 1] = v.y;
            piece.word[4 * i + 2] = v.z;
            piece.word[4 * i + 3] = v.w;
        }
        return piece;
    }
    if constexpr (sizeof(Input) == 2) {
        if (access == Access::kShifted && left >= kPieceSteps) {
            const uintptr_t address = reinterpret_cast<uintptr_t>(at);
            const uint4 *from = reinterpret_cast<const uint4 *>(address & ~uintptr_t{15});
            const int offset = static_cast<int>(address & 15) / 2;
            const uint4 a = from[0];
            const uint4 b = offset == 0 ? make_uint4(0, 0, 0, 0) : from[1];    // holds a wanted element, or is not read
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
    if (access == Access::kVector && left >= kPieceSteps) {
        alignas(16) Input out[kPieceSteps];
#pragma unroll
        for (int i = 0; i < kPieceSteps; ++i) out[i] = from_float<Input>(y[i]);
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(out)) / 16; ++i)
            reinterpret_cast<uint4 *>(at)[i] = reinterpret_cast<const uint4 *>(out)[i];
        return;
    }
    if (left >= kPieceSteps) {
#pragma unroll
        for (int i = 0; i < kPieceSteps; ++i, at += stride) *at = from_float<Input>(y[i]);
    } else {
#pragma unroll
        for (int i = 0; i < kPieceSteps; ++i, at += stride)
            if (i < left) *at = from_float<Input>(y[i]);
    }
}

// y of `steps` steps, kStride floats apart, by 16 neighbouring threads: words of two elements where the row has them.
template <int kStride, typename Input>
__device__ inline void write_row(Input *row, const float *y, int steps, int thread) {
    if constexpr (sizeof(Input) == 4) {
        for (int t = thread; t < steps; t += 16) row[t] = y[kStride * t];
    } else {
        const int odd = reinterpret_cast<uintptr_t>(row) / 2 % 2;
        if (odd && thread == 0) row[0] = from_float<Input>(y[0]);
        for (int t = 2 * thread + odd; t < steps; t += 32) {
            const Input first = from_float<Input>(y[kStride * t]);
            if (t + 1 < steps) {
                Input pair[2] = {first, from_float<Input>(y[kStride * (t + 1)])};
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
