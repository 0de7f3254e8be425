// What a warp of selective_scan_channels moves between memory and its tiles: rows of its channels (u, delta and z in, y
// out), rows of B and C, states.

#pragma once

#include <type_traits>

#include "kernels/copy_async.cuh"
#include "kernels/copy_engine.cuh"
#include "kernels/selective_scan_fwd.cuh"
#include "kernels/selective_scan_rows.cuh"
#include "kernels/selective_scan_state_words.cuh"

namespace shedder {

// States above which a multiprocessor has no room for 12 half warps with tiles of 64 steps.
constexpr int kManyScanStates = 10;

// kOnGrid_: all rows begin with a piece of memory. Else those of u, delta, z and y of a channel lie alike, and the
// channels of a warp are sixteen apart, so that its rows of y begin at the same place of a sector of 16 elements. They
// are taken to begin with the sector, `skew` steps earlier. kSteps_: of a tile.
template <typename Input_, int kStates_, int kLanes_, bool kOnGrid_, int kSteps_>
struct ScanRows {
    using Input = Input_;
    static constexpr int kStates = kStates_, kLanes = kLanes_, kSteps = kSteps_;
    static constexpr bool kOnGrid = kOnGrid_;
    static_assert(sizeof(Input) == 2 && (kLanes == 1 || kLanes == 2 || kLanes == 4));
    static constexpr int kChannels = 32 / kLanes, kApart = kOnGrid ? 1 : 16;
    static constexpr int kSlots = kStates * kLanes;          // states there is room for
    static constexpr int kRowPieces = kSteps / kPieceSteps;
    static constexpr int kRow = 16 * kRowPieces, kTile = kChannels * kRow;   // bytes: of a row, a tensor's tile
    static constexpr int kOwn = kPieceSteps / kLanes;        // steps of a piece whose channel-only work a lane does
    // Words of B and C: those of a step neighbours, pieces padded to other banks.
    static constexpr int kBlockSteps = kStates % 2 == 0 ? 1 : 2;             // that a lane reads at a time
    static constexpr int kBlock = kBlockSteps * kStates * 2;
    static constexpr int kBCPiece = kPieceSteps * kSlots * 2 + (kRowPieces == 4 ? 8 : 4);
    static constexpr int kBCTile = kRowPieces * kBCPiece;
    static constexpr int kBCPieces = (kSlots * kRowPieces + 31) / 32;        // that a lane brings
    static constexpr int kStages = 2, kBarrierBytes = 8 * kStages;
    static constexpr int kSharedBytes = kStages * 3 * kTile + kBarrierBytes + 4 * kBCTile;

    // Float of the tile of B and C at which those of a state at a step lie.
    static __device__ constexpr int word_of(int step, int n) {
        const int k = step % kPieceSteps;
        return step / kPieceSteps * kBCPiece + k / kBlockSteps * kBlock * kLanes + n / kStates * kBlock
            + k % kBlockSteps * kStates * 2 + n % kStates * 2;
    }
    // Byte of a tile at which piece `piece` of row `row` lies: neighbouring rows on different banks, in the copy
    // engine's swizzle of as many bytes as a row has.
    static __device__ int at(int row, int piece) {
        return row * kRow + (piece ^ (kRowPieces == 4 ? row >> 1 & 3 : row & 7)) * 16;
    }
};

// Tensors whose rows a warp brings, in the order of its tiles.
enum ScanTensor : int { kU, kDelta, kZ, kScanTensors };

// The maps through which the copy engine brings them, for warps of 32, 16 and 8 channels. On the grid a map has the
// axes (step, channel, batch). Off it all rows of a tensor are counted through, and every sixteenth from the r-th on,
// from the piece in which it begins, are the (step, row / 16) of a map of their own, [r].
template <bool kOnGrid>
struct ScanMaps {
    CUtensorMap of[3][kScanTensors][kOnGrid ? 1 : 16];
    int rows_of_batch[kScanTensors];                         // off the grid: rows from a batch entry to the next
};

// The rows of a warp's channels. The copy engine brings them, one box for a tile of a tensor; a lane walks along a row
// of its own or a share of one, and stores pieces of some.
template <typename Rows>
struct ScanChannelRows {
    using Input = typename Rows::Input;
    static constexpr int kLanes = Rows::kLanes, kSteps = Rows::kSteps, kOwn = Rows::kOwn, kApart = Rows::kApart;
    // The steps of a piece that belong to a lane, as they lie in memory.
    using Own = std::conditional_t<kLanes == 1, uint4, std::conditional_t<kLanes == 2, uint2, uint32_t>>;

    const SelectiveScanParams &p;
    const ScanMaps<Rows::kOnGrid> &maps;
    char *const tiles;                                       // [stage][u, delta, z][kTile]; a barrier for each stage
    const int b, first_channel;
    const int row, column, stored_row, stored_piece;
    const int64_t channel;                                   // of this lane; the last one where it has none
    const int skew;                                          // steps before the rows
    Input *y_at;                                             // in the next tile, the first piece that this lane stores

    __device__ __forceinline__ ScanChannelRows(const SelectiveScanParams &p, const ScanMaps<Rows::kOnGrid> &maps, int b,
                                               int first_channel, char *tiles)
        : p(p), maps(maps), tiles(tiles), b(b), first_channel(first_channel), row(threadIdx.x % 32 / kLanes),
          column(threadIdx.x % 32 % kLanes), stored_row(threadIdx.x % 32 / Rows::kRowPieces),
          stored_piece(threadIdx.x % 32 % Rows::kRowPieces), channel(min(first_channel + row * kApart, p.channels - 1)),
          skew(Rows::kOnGrid ? 0 : within_sector(y_row(first_channel))),
          y_at(y_row(first_channel + stored_row * kApart) + stored_piece * kPieceSteps - skew) {
        if (threadIdx.x % 32 == 0) {
            for (int tensor = kU; tensor < kScanTensors; ++tensor) prefetch_map(map_of(tensor));
            for (int tile = 0; tile < Rows::kStages; ++tile) barrier_init(barrier(tile), 1);
            barriers_are_there();
        }
        __syncwarp();
    }

    // The lines in which the rows of this lane's channel begin, on their way to L2.
    __device__ __forceinline__ void ask() const {
        const auto ask_for = [&](const void *tensor, const Strides3 &s) {
            prefetch_line(static_cast<const Input *>(tensor) + b * s.batch + channel * s.channel);
        };
        ask_for(p.u, p.u_strides);
        ask_for(p.delta, p.delta_strides);
        if (p.z != nullptr) ask_for(p.z, p.z_strides);
    }

    __device__ int length() const { return p.length + skew; }
    // Of this lane's steps of u.
    __device__ __forceinline__ char *place_of(int tile, int piece) const {
        return tile_of(tile, kU) + Rows::at(row, piece) + column * kOwn * 2;
    }

    // A tile on its way. Anything for rows not there, and for steps before and behind the rows.
    __device__ __forceinline__ void bring(int tile) const {
        if (!one_of_warp()) return;
        barrier_arrive_expecting(barrier(tile), (p.z == nullptr ? 2 : 3) * Rows::kTile);
        copy(kU, tile);
        copy(kDelta, tile);
        if (p.z != nullptr) copy(kZ, tile);
    }
    __device__ __forceinline__ void wait_for(int tile) const {
        barrier_wait(barrier(tile), tile / Rows::kStages % 2);
        __syncwarp();
    }

    __device__ __forceinline__ static Own take(const char *from) { return *reinterpret_cast<const Own *>(from); }
    static __device__ __forceinline__ void unpack(const Own &from, float (&to)[kOwn]) {
        const uint32_t *const words = reinterpret_cast<const uint32_t *>(&from);
#pragma unroll
        for (int k = 0; k < kOwn; ++k)
            to[k] = k % 2 ? Piece<Input>::high(words[k / 2]) : Piece<Input>::low(words[k / 2]);
    }

    // y of this lane's steps where their z was.
    __device__ __forceinline__ static void put_y(char *at, const float (&y)[kOwn]) {
        alignas(16) Input out[kOwn];
#pragma unroll
        for (int k = 0; k < kOwn; ++k) out[k] = from_float<Input>(y[k]);
        *reinterpret_cast<Own *>(at) = *reinterpret_cast<const Own *>(out);
    }

    // A tile of y to memory.
    __device__ __forceinline__ void store(int tile) {
        const char *const y_tile = tile_of(tile, kZ);
        const int start = tile * kSteps, left = length() - start;
        fence_for_copies();                                  // of z to the same place
        __syncwarp();
        const auto exists = [&](int row) { return first_channel + row * kApart < p.channels; };
        const auto store_whole = [](Input *to, const char *from) {
            *reinterpret_cast<uint4 *>(to) = *reinterpret_cast<const uint4 *>(from);
        };
        const bool all_steps = left >= kSteps && start >= skew;
        if (all_steps && exists(Rows::kChannels - 1)) {
            each_piece(y_tile, [&](int, Input *to, const char *from) { store_whole(to, from); });
        } else if (all_steps) {
            each_piece(y_tile, [&](int row, Input *to, const char *from) { if (exists(row)) store_whole(to, from); });
        } else {
            const int step = stored_piece * kPieceSteps, first = max(skew - start - step, 0);
            each_piece<1>(y_tile, [&](int row, Input *to, const char *from) {
                const int end = exists(row) ? min(left - step, kPieceSteps) : 0;
                if (first == 0 && end == kPieceSteps) return store_whole(to, from);
#pragma unroll 1
                for (int k = first; k < end; ++k) to[k] = reinterpret_cast<const Input *>(from)[k];
            });
        }
        y_at += kSteps;
    }

private:
    __device__ char *tile_of(int tile, int tensor) const {
        return tiles + (tile % Rows::kStages * 3 + tensor) * Rows::kTile;
    }
    __device__ uint32_t barrier(int tile) const {
        return shared_address(tiles) + Rows::kStages * 3 * Rows::kTile + tile % Rows::kStages * 8;
    }
    __device__ Input *y_row(int channel) const {
        return static_cast<Input *>(p.y) + b * p.y_strides.batch + channel * p.y_strides.channel;
    }
    // Elements between the start of a sector and `at`.
    __device__ __forceinline__ static int within_sector(const Input *at) {
        return static_cast<int>(reinterpret_cast<uintptr_t>(at) / sizeof(Input) % 16);
    }

    // Of a tensor's rows, counted through.
    __device__ __forceinline__ int first_row(int tensor) const {
        return b * maps.rows_of_batch[tensor] + first_channel;
    }
    __device__ __forceinline__ const CUtensorMap *map_of(int tensor) const {
        return &maps.of[kLanes / 2][tensor][Rows::kOnGrid ? 0 : first_row(tensor) % kApart];
    }
    __device__ __forceinline__ void copy(int tensor, int tile) const {
        const uint32_t to = shared_address(tile_of(tile, tensor));
        const int step = tile * kSteps - skew / kPieceSteps * kPieceSteps;
        if constexpr (Rows::kOnGrid) copy_box(to, map_of(tensor), step, first_channel, b, barrier(tile));
        else copy_box(to, map_of(tensor), step, first_row(tensor) / kApart, 0, barrier(tile));
    }

    // use(row, in memory, in the tile) for each piece of y that a lane stores.
    template <int kUnrolled = 4, typename Use>
    __device__ __forceinline__ void each_piece(const char *y_tile, Use use) const {
        constexpr int kRowsAtOnce = 32 / Rows::kRowPieces;
#pragma unroll kUnrolled
        for (int i = 0; i < Rows::kChannels / kRowsAtOnce; ++i) {
            const int row = stored_row + i * kRowsAtOnce;
            use(row, y_at + i * kRowsAtOnce * kApart * p.y_strides.channel, y_tile + Rows::at(row, stored_piece));
        }
    }
};

// Zeros for the elements of 16 bits that do not lie in [first, end).
template <int kWords>
__device__ __forceinline__ void keep_elements(uint32_t (&words)[kWords], int first, int end) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
        const bool low = first <= 2 * i && 2 * i < end, high = first <= 2 * i + 1 && 2 * i + 1 < end;
        words[i] &= (low ? 0xffffu : 0u) | (high ? 0xffff0000u : 0u);
    }
}

// B and C of a tile: a lane brings some of them, which wait in its registers, as they lie in memory, until the tile may
// hold them as floats. On the grid it brings pieces of their rows.
template <typename Rows>
struct ScanStateRows {
    using Input = typename Rows::Input;

    const Input *B_at[Rows::kBCPieces], *C_at[Rows::kBCPieces];              // of the next tile
    float *tile_at[Rows::kBCPieces];                         // null: this lane brings nothing
    int left;                                                // steps of the rows from these on
    Piece<Input> B[Rows::kBCPieces], C[Rows::kBCPieces];

    __device__ __forceinline__ ScanStateRows(const SelectiveScanParams &p, const uint32_t *, int b, int, float *tile) {
        const int lane = threadIdx.x % 32, piece = lane % Rows::kRowPieces;
        if (p.dstate != Rows::kSlots)                        // zeros for states not there
            for (int i = lane; i < Rows::kBCTile; i += 32) tile[i] = 0.f;
        left = p.length - piece * kPieceSteps;
#pragma unroll
        for (int i = 0; i < Rows::kBCPieces; ++i) {
            const int n = (lane + 32 * i) / Rows::kRowPieces;
            const auto at = [&](const void *tensor, const Strides4 &s) {
                return static_cast<const Input *>(tensor) + b * s.batch + n * s.state + piece * kPieceSteps;
            };
            B_at[i] = at(p.B, p.B_strides);
            C_at[i] = at(p.C, p.C_strides);
            tile_at[i] = n < p.dstate ? tile + Rows::word_of(piece * kPieceSteps, n) : nullptr;
        }
    }

    // The next tile's, on their way. Zeros for steps not there.
    __device__ __forceinline__ void read() {
#pragma unroll
        for (int i = 0; i < Rows::kBCPieces; ++i) {
            if (tile_at[i] != nullptr) {
                B[i] = left >= kPieceSteps ? read_whole_piece(B_at[i]) : first_steps(B_at[i]);
                C[i] = left >= kPieceSteps ? read_whole_piece(C_at[i]) : first_steps(C_at[i]);
            }
            B_at[i] += Rows::kSteps, C_at[i] += Rows::kSteps;
        }
        left -= Rows::kSteps;
    }

    // What `read` has brought, as floats in the tile.
    __device__ __forceinline__ void put() const {
#pragma unroll
        for (int i = 0; i < Rows::kBCPieces; ++i)
            if (tile_at[i] != nullptr)
#pragma unroll
                for (int k = 0; k < kPieceSteps; ++k)
                    *reinterpret_cast<float2 *>(tile_at[i] + Rows::word_of(k, 0)) =
                        make_float2(B[i].get(k), C[i].get(k));
    }

private:
    // `left` steps of a row, and zeros: each step that is read pushes those behind it on. Not unrolled: the loop over
    // tiles, which comes here once, is to stay short.
    __device__ __forceinline__ Piece<Input> first_steps(const Input *from) const {
        Piece<Input> piece{};
#pragma unroll 1
        for (int k = left - 1; k >= 0; --k) {
#pragma unroll
            for (int i = kPieceSteps / 2 - 1; i > 0; --i)
                piece.word[i] = __funnelshift_l(piece.word[i - 1], piece.word[i], 16);
            piece.word[0] = piece.word[0] << 16 | reinterpret_cast<const uint16_t *>(from)[k];
        }
        return piece;
    }
};

// Off the grid it brings words (B, C) of four states of some steps, as selective_scan_state_words leaves them. Steps
// count from `skew` before the rows.
template <typename Rows>
struct ScanStateWords {
    using Input = typename Rows::Input;
    static constexpr int kPitch = scan_word_pitch(Rows::kSlots);
    static constexpr int kStepLanes = kPitch / 4, kStepsAtOnce = 32 / kStepLanes;
    static_assert(Rows::kApart <= kScanWordsBefore && Rows::kSteps <= kScanWordsBehind);

    float *const tile;
    const int first_state = threadIdx.x % kStepLanes * 4, first_step = threadIdx.x % 32 / kStepLanes;
    const uint4 *at;                                         // this lane's, of the next tile
    uint4 words[Rows::kSteps / kStepsAtOnce];

    __device__ __forceinline__ ScanStateWords(const SelectiveScanParams &p, const uint32_t *words, int b, int skew,
                                              float *tile)
        : tile(tile), at(reinterpret_cast<const uint4 *>(
              words + (scan_word_row(p.length, b) - skew + first_step) * kPitch + first_state)) {}

    __device__ __forceinline__ void read() {
#pragma unroll
        for (int i = 0; i < Rows::kSteps / kStepsAtOnce; ++i) words[i] = at[i * kStepsAtOnce * kStepLanes];
        at += Rows::kSteps * kStepLanes;
    }

    __device__ __forceinline__ void put() const {
#pragma unroll
        for (int i = 0; i < Rows::kSteps / kStepsAtOnce; ++i) {
            const uint32_t word[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
#pragma unroll
            for (int k = 0; k < 4; ++k)
                if (first_state + k < Rows::kSlots)
                    *reinterpret_cast<float2 *>(tile + Rows::word_of(first_step + i * kStepsAtOnce, first_state + k)) =
                        make_float2(Piece<Input>::low(word[k]), Piece<Input>::high(word[k]));
        }
    }
};

// Whether a lane's states of a row of N floats, `stride` apart, are moved 16 bytes at a time.
template <int kStates>
__device__ __forceinline__ bool in_fours(const float *row, int64_t stride, int dstate) {
    return kStates % 4 == 0 && stride == 1 && dstate % 4 == 0 && reinterpret_cast<uintptr_t>(row) % 16 == 0;
}

// States first .. first + kStates-1 of a row of N floats; zeros for those it has not.
template <int kStates>
__device__ __forceinline__ void load_states(float (&to)[kStates], const float *row, int64_t stride, int first,
                                            int dstate) {
    if (in_fours<kStates>(row, stride, dstate)) {
#pragma unroll
        for (int i = 0; i + 4 <= kStates; i += 4) {
            const float4 v = first + i < dstate ? *reinterpret_cast<const float4 *>(row + first + i) : float4{};
            to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < kStates; ++i) to[i] = first + i < dstate ? row[(first + i) * stride] : 0.f;
    }
}

template <int kStates>
__device__ __forceinline__ void store_states(float *row, const float (&h)[kStates], int first, int dstate) {
    if (in_fours<kStates>(row, 1, dstate)) {
#pragma unroll
        for (int i = 0; i + 4 <= kStates; i += 4)
            if (first + i < dstate)
                *reinterpret_cast<float4 *>(row + first + i) = make_float4(h[i], h[i + 1], h[i + 2], h[i + 3]);
    } else {
#pragma unroll
        for (int i = 0; i < kStates; ++i)
            if (first + i < dstate) row[first + i] = h[i];
    }
}

}  // namespace shedder
