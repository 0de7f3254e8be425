// Rows of y from SSD's tiles in shared memory to memory.
//
// A row of y, the channels of one head and token, starts at any element. Where rows are whole pieces of 16 bytes, or
// two heads in a cluster make such of theirs but for the ends (ssd_servants.cuh), the copy engine stores them, which
// knows no smaller ones, unless they lie in their tile otherwise than in memory. Else, where both allow, a row goes as
// pieces of 16, 8 or 4 bytes, or as the words of memory that lie wholly in it, and the halves of words at its ends.

#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/ssd_wgmma.cuh"

namespace shedder {

// Elements `by` to `by` + 7 of the 16 in a and b; only the lowest three bits of `by` count.
__device__ __forceinline__ uint4 joined(uint4 a, uint4 b, int by) {
    uint32_t v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 6; ++i) v[i] = by & 4 ? v[i + 2] : v[i];
#pragma unroll
    for (int i = 0; i < 5; ++i) v[i] = by & 2 ? v[i + 1] : v[i];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = __funnelshift_r(v[i], v[i + 1], (by & 1) * 16);
    return {v[0], v[1], v[2], v[3]};
}

// Pieces of one column of a tile, of every kStep-th row from row0 on, to memory: as many at a time as hide their
// latency. piece_of(turn, down): of the row that lies `down` bytes below row0, whose swizzle differs by `turn`.
template <int kStep, typename PieceOf>
__device__ __forceinline__ void store_column(char *to, int64_t step, int row0, int rows, PieceOf piece_of) {
    constexpr int kCount = 64 / kStep < 8 ? 64 / kStep : 8;
    const auto store = [&](auto all) {
#pragma unroll 1
        for (int first = 0; first < kTileRows; first += kCount * kStep) {
            decltype(piece_of(0, 0)) v[kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) {               // bits of row0 or of what is added, none of both
                const int row = first + i * kStep;
                v[i] = piece_of((row & 7) << 4, row * 128);
            }
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                if (decltype(all)::value || row0 + first + i * kStep < rows)
                    *reinterpret_cast<decltype(&v[i])>(to) = v[i];
                to += step;
            }
        }
    };
    if (rows == kTileRows) store(std::true_type{});
    else store(std::false_type{});
}

// Pieces of kBytes, which in the tile lie as in memory: y is where column 0 of the first row would be.
template <int kBytes>
__device__ __forceinline__ void store_pieces(char *y, int64_t stride, const char *tile, int first, int rows,
                                             int channels, unsigned thread) {
    using Piece = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t>>;
    constexpr int kLanes = 128 / kBytes, kStep = 64 / kLanes;
    const int at_byte = thread % kLanes * kBytes, row0 = static_cast<int>(thread / kLanes);
    const int byte = at_byte < first * 2 ? at_byte + 128 : at_byte;          // behind column 63 comes column 0
    if ((first + channels) * 2 <= byte) return;
    const uint32_t at = tile_offset(row0, at_byte);
    store_column<kStep>(y + row0 * stride + byte, kStep * stride, row0, rows, [&](uint32_t turn, uint32_t down) {
        return *reinterpret_cast<const Piece *>(tile + (at ^ turn) + down);
    });
}

// Words of memory, and halves of words at the ends of rows.
__device__ __forceinline__ void store_words(char *y, int64_t stride, const char *tile, int first, int rows,
                                            int channels, unsigned thread) {
    const auto halves_before = [](const char *row) {
        return static_cast<int>(reinterpret_cast<uintptr_t>(row) / 2 & 1);
    };
    const int lane = thread % 32, row0 = thread / 32;        // every second row, so that words lie alike in all
    const int channel = 2 * lane - halves_before(y + row0 * stride);         // the first of this lane's word
    if (0 <= channel && channel + 2 <= channels) {
        const int word = (first + channel) / 2;
        const uint32_t low = tile_offset(row0, word % 32 * 4), high = tile_offset(row0, (word + 1) % 32 * 4);
        char *const to = y + row0 * stride + channel * 2;
        const auto load = [&](uint32_t at, uint32_t turn, uint32_t down) {
            return *reinterpret_cast<const uint32_t *>(tile + (at ^ turn) + down);
        };
        if (first + channel & 1)                             // the same for all lanes
            store_column<2>(to, 2 * stride, row0, rows, [&](uint32_t turn, uint32_t down) {
                return __funnelshift_r(load(low, turn, down), load(high, turn, down), 16);
            });
        else
            store_column<2>(to, 2 * stride, row0, rows,
                            [&](uint32_t turn, uint32_t down) { return load(low, turn, down); });
    }
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));     // anew, else what follows is found early and spills
    const int token = static_cast<int>(thread % 64);
    if (token >= rows) return;
    char *const row = y + token * stride;
    const auto store_half = [&](int channel) {
        *reinterpret_cast<uint16_t *>(row + channel * 2) = *reinterpret_cast<const uint16_t *>(
            tile + tile_offset(token, (first + channel & 63) * 2));
    };
    const int before = halves_before(row);
    if (before) store_half(0);
    if (before + channels & 1) store_half(channels - 1);
}

// 64 threads store `rows` rows of `channels` elements, `stride` bytes apart; channel c lies in column first + c, modulo
// 64.
__device__ __forceinline__ void store_rows(char *y, int64_t stride, const char *tile, int first, int rows, int channels,
                                           unsigned thread) {
    char *const column0 = y - first * 2;
    // Bits of what a piece must divide.
    const unsigned apart = static_cast<unsigned>(stride) | static_cast<unsigned>(reinterpret_cast<uintptr_t>(column0))
        | static_cast<unsigned>(first * 2 | channels * 2);
    if (apart % 4 != 0) store_words(y, stride, tile, first, rows, channels, thread);
    else if (apart % 16 == 0) store_pieces<16>(column0, stride, tile, first, rows, channels, thread);
    else if (apart % 8 == 0) store_pieces<8>(column0, stride, tile, first, rows, channels, thread);
    else store_pieces<4>(column0, stride, tile, first, rows, channels, thread);
}

}  // namespace shedder
