// Rows of SSD's operands and of y between memory and tiles of shared memory, by the 128 threads of a warpgroup.
//
// Rows in: cp.async of 16, 8 or 4 bytes, as wide as the start of every row allows. Rows that start at odd elements are
// copied by the aligned words around them, then shifted by one element where they lie.

#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/ssd_wgmma.cuh"

namespace shedder {

struct SsdRows {                                             // rows of one operand for a chunk
    const char *first;
    int64_t stride;                                          // bytes
    int count, bytes;                                        // rows that exist; bytes of each
};

constexpr int lanes_of(int pieces) {                         // the next power of two
    int lanes = 1;
    while (lanes < pieces) lanes *= 2;
    return lanes;
}

// What of a row's start is not a whole word: 2 bytes, or none.
__device__ __forceinline__ int skew_of(const char *row) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(row) & 2);
}

template <int kBytes, int kRowBytes>
__device__ __forceinline__ void copy_rows_by(uint32_t tile, const SsdRows &rows, unsigned thread) {
    constexpr int kLanes = lanes_of(kRowBytes / kBytes) < 64 ? lanes_of(kRowBytes / kBytes) : 64, kStep = 128 / kLanes;
    const int row0 = static_cast<int>(thread / kLanes);
    const char *const first = rows.first + row0 * rows.stride;
    const int skew = kBytes == 4 ? skew_of(first) : 0;       // of all rows of this thread, since kStep is even
#pragma unroll
    for (int group = 0; group < kRowBytes; group += kLanes * kBytes) {
        const int byte = group + thread % kLanes * kBytes;
        if (byte >= kRowBytes) break;
        const int valid = min(max(skew + rows.bytes - byte, 0), kBytes);
        const char *from = first - skew + (valid > 0 ? byte : 0);
        const uint32_t to = tile + tile_offset(row0, byte);
#pragma unroll 2
        for (int i = 0; i < kTileRows; i += kStep) {
            // Adding i to row0 turns bits of row % 8 only where row0 has none: kStep is a power of two.
            copy_async<kBytes>((to ^ (i & 7) << 4) + i * 128, from, row0 + i < rows.count ? valid : 0);
            from += kStep * rows.stride;
        }
    }
}

template <int kRowBytes>
__device__ __forceinline__ void copy_rows(uint32_t tile, const SsdRows &rows, int width, unsigned thread) {
    if (width == 16) copy_rows_by<16, kRowBytes>(tile, rows, thread);
    else if (width == 8) copy_rows_by<8, kRowBytes>(tile, rows, thread);
    else copy_rows_by<4, kRowBytes>(tile, rows, thread);
}

// Every row that copy_rows found to start at an odd element: all rows, every second one, or none. 16 bytes a lane.
template <int kRowBytes>
__device__ __forceinline__ void shift_odd_rows(char *tile, const SsdRows &rows, unsigned thread) {
    constexpr int kLanes = lanes_of(kRowBytes / 16);
    const bool first_is_odd = skew_of(rows.first) != 0, in_turns = rows.stride & 2;
    if (!first_is_odd && !in_turns) return;
    const int byte = thread % kLanes * 16;
#pragma unroll 2
    for (int i = thread / kLanes; i < (in_turns ? kTileRows / 2 : kTileRows); i += 128 / kLanes) {
        const int row = in_turns ? 2 * i + !first_is_odd : i;
        uint4 v{};
        uint32_t next = 0;
        if (byte < kRowBytes) {
            v = *reinterpret_cast<const uint4 *>(tile + tile_offset(row, byte));
            if (byte + 16 < kRowBytes)
                next = *reinterpret_cast<const uint32_t *>(tile + tile_offset(row, byte + 16));
            else if (rows.bytes == kRowBytes && row < rows.count)    // a full row: its last element has not been copied
                next = *reinterpret_cast<const uint16_t *>(rows.first + row * rows.stride + kRowBytes - 2);
        }
        __syncwarp();                                        // a row lies with one warp
        if (byte < kRowBytes)
            *reinterpret_cast<uint4 *>(tile + tile_offset(row, byte)) = {
                __funnelshift_r(v.x, v.y, 16), __funnelshift_r(v.y, v.z, 16), __funnelshift_r(v.z, v.w, 16),
                __funnelshift_r(v.w, next, 16)};
    }
}

// The y of one head and chunk from its tile to memory: rows of `channels` elements, `stride` bytes apart.
template <int kBytes>
__device__ __forceinline__ void store_aligned_rows(char *y, int64_t stride, const char *tile, int rows, int channels,
                                                   unsigned thread) {
    using Piece = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t>>;
    constexpr int kLanes = 128 / kBytes, kStep = 128 / kLanes;
    const int byte = thread % kLanes * kBytes, row0 = static_cast<int>(thread / kLanes);
    if (byte >= channels * 2) return;
    char *to = y + row0 * stride + byte;
    const uint32_t at = tile_offset(row0, byte);
#pragma unroll
    for (int i = 0; i < kTileRows; i += kStep) {
        if (row0 + i < rows)
            *reinterpret_cast<Piece *>(to) = *reinterpret_cast<const Piece *>(tile + (at ^ (i & 7) << 4) + i * 128);
        to += kStep * stride;
    }
}

// Rows of an odd number of channels: the aligned words around them, halves at their ends.
__device__ __forceinline__ void store_odd_rows(char *y, int64_t stride, const char *tile, int rows, int channels,
                                               unsigned thread) {
    const int lane = thread % 32, row0 = thread / 32;
    char *to = y + row0 * stride;
    const int byte = lane * 4 - skew_of(to);                 // of the row, at which this lane's word lies
    const bool low = byte >= 0 && byte < channels * 2, high = byte + 2 < channels * 2;
    const uint32_t low_at = tile_offset(row0, max(byte, 0)), high_at = tile_offset(row0, min(byte + 2, 126));
    to += byte;
#pragma unroll 4
    for (int i = 0; i < kTileRows; i += 4) {
        if (row0 + i < rows) {
            const uint32_t v = *reinterpret_cast<const uint16_t *>(tile + (low_at ^ (i & 7) << 4) + i * 128);
            const uint32_t w = *reinterpret_cast<const uint16_t *>(tile + (high_at ^ (i & 7) << 4) + i * 128);
            if (low && high) *reinterpret_cast<uint32_t *>(to) = v | w << 16;
            else if (low) *reinterpret_cast<uint16_t *>(to) = static_cast<uint16_t>(v);
            else if (high) *reinterpret_cast<uint16_t *>(to + 2) = static_cast<uint16_t>(w);
            if (channels == 64 && byte == 122)               // the 65th half word
                *reinterpret_cast<uint16_t *>(to + 4) =
                    *reinterpret_cast<const uint16_t *>(tile + tile_offset(row0 + i, 126));
        }
        to += 4 * stride;
    }
}

}  // namespace shedder
