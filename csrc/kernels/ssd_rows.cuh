// Rows of SSD's tiles in shared memory: shifted to the first column, and y to memory.

#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/ssd_wgmma.cuh"

namespace shedder {

// The row of a tile that holds token i of a chunk, and the other way round, where rows come in turns of 8 tokens.
__host__ __device__ constexpr int turned(int i) { return (i & 7) << 3 | i >> 3; }

// Rows of a tile moved to its first column from column `skew`, below 8; `rest` has the 8 columns behind each row. A
// warp moves 8 rows, a lane a quarter of one.
__device__ __forceinline__ void shift_rows(char *tile, const char *rest, int row, int quarter, int skew) {
    if (skew == 0) return;
    uint4 *const to[2] = {reinterpret_cast<uint4 *>(tile + tile_offset(row, quarter * 32)),
                          reinterpret_cast<uint4 *>(tile + tile_offset(row, quarter * 32 + 16))};
    const uint4 a = *to[0], b = *to[1];
    const uint4 c = *reinterpret_cast<const uint4 *>(quarter == 3 ? rest + row * 16
                                                                  : tile + tile_offset(row, quarter * 32 + 32));
    __syncwarp();
    uint32_t v[12] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w, c.x, c.y, c.z, c.w};
    if (skew & 4)
#pragma unroll
        for (int i = 0; i < 10; ++i) v[i] = v[i + 2];
    if (skew & 2)
#pragma unroll
        for (int i = 0; i < 9; ++i) v[i] = v[i + 1];
    if (skew & 1)
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = __funnelshift_r(v[i], v[i + 1], 16);
    *to[0] = {v[0], v[1], v[2], v[3]};
    *to[1] = {v[4], v[5], v[6], v[7]};
}

// The y of one head and chunk from its tile to memory: rows of `channels` elements, `stride` bytes apart.
template <bool kTurns, int kBytes>
__device__ __forceinline__ void store_aligned_rows(char *y, int64_t stride, const char *tile, int rows, int channels,
                                                   unsigned thread) {
    using Piece = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t>>;
    constexpr int kLanes = 128 / kBytes, kStep = 64 / kLanes;
    const int byte = thread % kLanes * kBytes, row0 = static_cast<int>(thread / kLanes);
    if (byte >= channels * 2) return;
    char *to = y + row0 * stride + byte;
    const uint32_t at = tile_offset(kTurns ? turned(row0) : row0, byte);
#pragma unroll 4
    for (int i = 0; i < kTileRows; i += kStep) {
        const int row = kTurns ? turned(i) : i;              // bits of `row0` or of `i`, none of both
        const Piece v = *reinterpret_cast<const Piece *>(tile + (at ^ (row & 7) << 4) + row * 128);
        if (row0 + i < rows) *reinterpret_cast<Piece *>(to) = v;
        to += kStep * stride;
    }
}

// Rows of an odd number of channels: the aligned words around them, halves at their ends.
template <bool kTurns>
__device__ __forceinline__ void store_odd_rows(char *y, int64_t stride, const char *tile, int rows, int channels,
                                               unsigned thread) {
    const int lane = thread % 32, row0 = thread / 32;
    char *to = y + row0 * stride;
    const int byte = lane * 4 - static_cast<int>(reinterpret_cast<uintptr_t>(to) & 2);   // of the row: this lane's word
    const bool low = byte >= 0 && byte < channels * 2, high = byte + 2 < channels * 2;
    const int first = kTurns ? turned(row0) : row0;
    const uint32_t low_at = tile_offset(first, max(byte, 0)), high_at = tile_offset(first, min(byte + 2, 126));
    to += byte;
#pragma unroll 4
    for (int i = 0; i < kTileRows; i += 2) {                 // an even number of rows on, so words lie alike
        const int row = kTurns ? turned(i) : i;
        const uint32_t v = *reinterpret_cast<const uint16_t *>(tile + (low_at ^ (row & 7) << 4) + row * 128);
        const uint32_t w = *reinterpret_cast<const uint16_t *>(tile + (high_at ^ (row & 7) << 4) + row * 128);
        const bool exists = row0 + i < rows;
        if (exists && low && high) *reinterpret_cast<uint32_t *>(to) = v | w << 16;
        if (exists && low && !high) *reinterpret_cast<uint16_t *>(to) = static_cast<uint16_t>(v);
        if (exists && !low && high) *reinterpret_cast<uint16_t *>(to + 2) = static_cast<uint16_t>(w);
        to += 2 * stride;
    }
    // 64 channels from the middle of a word end in a 33rd word.
    const int last = static_cast<int>(thread);
    if (channels == 64 && last < min(rows, kTileRows) && reinterpret_cast<uintptr_t>(y + last * stride) & 2)
        *reinterpret_cast<uint16_t *>(y + last * stride + 126) =
            *reinterpret_cast<const uint16_t *>(tile + tile_offset(kTurns ? turned(last) : last, 126));
}

template <bool kTurns>
__device__ __forceinline__ void store_rows(char *y, int64_t stride, const char *tile, int rows, int channels,
                                           int headdim, unsigned thread) {
    if (headdim % 8 == 0) store_aligned_rows<kTurns, 16>(y, stride, tile, rows, channels, thread);
    else if (headdim % 4 == 0) store_aligned_rows<kTurns, 8>(y, stride, tile, rows, channels, thread);
    else if (headdim % 2 == 0) store_aligned_rows<kTurns, 4>(y, stride, tile, rows, channels, thread);
    else store_odd_rows<kTurns>(y, stride, tile, rows, channels, thread);
}

}  // namespace shedder
