// The warps that serve the consumer of ssd_fwd, and the shared memory through which they do.

#pragma once

#include <cstdint>

#include "kernels/copy_async.cuh"
#include "kernels/ssd_decays.cuh"
#include "kernels/ssd_pieces.cuh"
#include "kernels/ssd_rows.cuh"
#include "kernels/ssd_wgmma.cuh"

namespace shedder {

constexpr int kStages = 2;
constexpr int kRestBytes = kTileRows * 16;                    // of a box of the map `rest`
constexpr int kYTaken = 2, kYThere = 3;                      // named barriers of the consumer and who stores y
constexpr int kGivenBytes = kChunk * 16, kGivenPlaces = 4;   // of a chunk of y, from one head to the next

// What a call asks for, each by a kernel of its own: what one needs costs the others time.
enum class SsdForm : int {
    kPlain,                                                  // heads start where boxes of x do
    kAnywhere,                                               // or not, and neighbours may store y together
    kExtras,                                                 // z or runs, heads anywhere
    kWords,                                                  // x by words: copies of threads, for which ptxas puts four
                                                             // loads that do nothing behind each barrier
    kMixed,                                                  // channels of two heads in the 64 rows of a consumer
};

template <int kStates16, SsdForm kForm>
struct SsdShared {
    static constexpr bool kExtras = kForm == SsdForm::kExtras, kMixed = kForm == SsdForm::kMixed,
                          kPairs = kForm == SsdForm::kAnywhere,
                          kHasRest = kPairs || kExtras || kForm == SsdForm::kWords;      // columns behind boxes of x
    static constexpr int kTiles = (kStates16 + 3) / 4;       // of 64 states
    static constexpr int kInputs = kExtras ? 2 : 1;          // x, z
    static constexpr int kHeads = kMixed ? 2 : 1;
    static constexpr int kOperand = kTiles * kTileBytes;     // B or C
    static constexpr int kStage = 2 * kOperand + kInputs * kTileBytes;      // C, B, x, z
    static constexpr int kScores = kStages * kStage;         // S of each head
    static constexpr int kY = kScores + kHeads * kTileBytes;          // y, where z does not leave its tile to it
    static constexpr int kRest = kY + (kExtras ? 0 : kTileBytes);            // of x, z of each stage
    static constexpr int kDecays = kRest + (kHasRest ? kStages * kInputs * kRestBytes : 0);  // of each stage and head
    static constexpr int kGiven = kDecays + kStages * kHeads * sizeof(SsdDecays);
    // Barriers of each stage: C and B are there; the rest is; all is free. Of each place of kGiven.
    static constexpr int kStatesThere = kGiven + (kPairs ? kGivenPlaces * kGivenBytes : 0);
    static constexpr int kChannelsThere = kStatesThere + kStages * 8, kIsFree = kChannelsThere + kStages * 8;
    static constexpr int kGivenThere = kIsFree + kStages * 8;
    static constexpr int kPlace = kGivenThere + kGivenPlaces * 8;
    static constexpr int kBytes = kPlace + sizeof(SsdPlace) + 1024;        // and room to align the first tile
};

// States / 16 up to which three CTAs of a multiprocessor have registers enough.
template <SsdForm kForm>
constexpr int kFewStates16 = kForm == SsdForm::kPlain ? 3 : kForm == SsdForm::kAnywhere ? 2 : 0;
// CTAs of a multiprocessor. Where there are several, the consumer takes registers of the other warps.
template <int kStates16, SsdForm kForm>
constexpr int kSsdCtas = kStates16 > 8 ? 1 : kStates16 > kFewStates16<kForm> ? 2 : 3;
// Registers of a thread before that, in eights.
template <int kStates16, SsdForm kForm>
constexpr int kSsdRegisters = 65536 / 256 / kSsdCtas<kStates16, kForm> / 8 * 8;
// Warps 4 and 5 store y, which is the most work beside the products: on the schedulers of the consumer's warps that
// have the fewest scores. 6 copies, 7 prepares decays.
constexpr int kCopyWarp = 6;
template <int kStates16, SsdForm kForm>
constexpr int kServantRegisters =
    kForm == SsdForm::kExtras || kForm == SsdForm::kMixed ? 56 : kSsdCtas<kStates16, kForm> == 3 ? 40 : 48;
template <int kStates16, SsdForm kForm>
constexpr int kConsumerRegisters = 2 * kSsdRegisters<kStates16, kForm> - kServantRegisters<kStates16, kForm>;

// Shares of the rows of B and C that a CTA brings: all of them, or one that goes to all CTAs of its cluster.
struct SsdShares {
    int rows, first, last;
    uint32_t to_all;                                         // see copy_box
};

__device__ __forceinline__ SsdShares shares_of(const SsdParams &p, int rank, int unit) {
    const bool shared_by_all = is_shared(p, unit);
    return {kTileRows / p.cluster, shared_by_all ? rank : 0, shared_by_all ? rank : p.cluster - 1,
            shared_by_all && p.cluster > 1 ? (1u << p.cluster) - 1 : 0};
}

// C, unless only states are wanted, and B of a chunk, on their way. By one thread.
template <typename Shared>
__device__ __forceinline__ void copy_states(const SsdParams &p, const SsdShares &shares, int group, int batch, int local,
                                            int chunk, uint32_t stage_at, uint32_t states_there) {
    barrier_arrive_expecting(states_there, (2 - local) * Shared::kOperand);
#pragma unroll 1
    for (int part = shares.first; part <= shares.last; ++part)
#pragma unroll
        for (int t = 0; t < Shared::kTiles; ++t) {
            const uint32_t to = stage_at + t * kTileBytes + part * shares.rows * 128;
            const int row = chunk * kChunk + part * shares.rows;
            if (!local) copy_box(to, &p.C, t * 64, row, group, batch, states_there, shares.to_all);
            copy_box(to + Shared::kOperand, &p.B, t * 64, row, group, batch, states_there, shares.to_all);
        }
}

// The words of kBytes in which a chunk of x lies to the tile, `words` from each row on; the one behind column 63 to
// `rest_at`. By all lanes.
template <int kBytes>
__device__ __forceinline__ void copy_words(const char *x, int64_t pitch, int words, int rows, uint32_t x_at,
                                           uint32_t rest_at, int lane) {
    constexpr int kWords = 128 / kBytes, kRowsAtOnce = 32 / kWords;
    const int word = lane % kWords, row0 = lane / kWords;
    const auto copy = [&](auto all) {
        const char *from = x + row0 * pitch + word * kBytes;
#pragma unroll 1
        for (int first = row0; first < kChunk; first += 8, x_at += 8 * 128) {
#pragma unroll
            for (int i = 0; i < 8; i += kRowsAtOnce, from += kRowsAtOnce * pitch) {
                const bool there = decltype(all)::value || first + i < rows;
                copy_async_word<kBytes>(x_at + tile_offset(row0 + i, word * kBytes), there ? from : x, there);
            }
        }
    };
    if (word < words) {
        if (rows >= kChunk) copy(std::true_type{});
        else copy(std::false_type{});
    }
    if (words > kWords)
#pragma unroll 1
        for (int row = lane; row < kChunk; row += 32)
            copy_async_word<kBytes>(rest_at + row * 16, row < rows ? x + row * pitch + 128 : x, row < rows);
}

// The warp that copies, where x comes by words.
template <typename Shared>
__device__ __forceinline__ void copy_with_words(const SsdParams &p, const SsdPlace &place, uint32_t shared_at) {
    const int lane = threadIdx.x % 32;
    int stage = 0;
    uint32_t parity = 1;
#pragma unroll 1
    for (int i = 0; i < pieces_of(p, place); ++i) {
        const SsdPiece piece = piece_of(p, place, i);
        const SsdRows rows = rows_of<false>(p, piece.state);
        const int batch = piece.state / (p.heads * p.tiles), group = p.head_to_group[rows.head];
        const SsdShares shares = shares_of(p, place.rank, piece.unit);
        const int words = (rows.first + rows.channels + p.x.piece - 1) / p.x.piece;              // of a row
        const bool is_local = p.segment_chunks > 0 && piece.leaves >= 0;
#pragma unroll 1
        for (int local = is_local; local >= 0; --local)
#pragma unroll 1
            for (int chunk = piece.first; chunk < piece.last; ++chunk) {
                const uint32_t stage_at = shared_at + stage * Shared::kStage,
                               channels_there = shared_at + Shared::kChannelsThere + stage * 8;
                barrier_wait(shared_at + Shared::kIsFree + stage * 8, parity);
                if (one_of_warp())
                    copy_states<Shared>(p, shares, group, batch, local, chunk, stage_at,
                                        shared_at + Shared::kStatesThere + stage * 8);
                __syncwarp();
                const auto copy = [&](auto bytes) {
                    const char *const x = p.x_words + (batch * p.x_strides.batch + rows.x - rows.first
                                                       + chunk * kChunk * p.x_strides.time) * 2;
                    copy_words<decltype(bytes)::value>(x, p.x_strides.time * 2, words, p.length - chunk * kChunk,
                                                       stage_at + 2 * Shared::kOperand,
                                                       shared_at + Shared::kRest + stage * kRestBytes, lane);
                };
                if (p.x.piece == 4) copy(std::integral_constant<int, 8>{});
                else copy(std::integral_constant<int, 4>{});
                arrive_when_landed(channels_there);
                if (++stage == kStages) stage = 0, parity ^= 1;
            }
    }
}

// A warp that copies, and one that prepares decays.
template <typename Input, typename Shared>
__device__ __forceinline__ void produce(const SsdParams &p, const SsdPlace &place, char *shared, uint32_t shared_at) {
    constexpr bool kExtras = Shared::kExtras;
    const bool copies = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0) == kCopyWarp;
    const int lane = threadIdx.x % 32;
    const bool has_z = kExtras && p.has_z;
    int stage = 0;
    uint32_t parity = 1;
#pragma unroll 1
    for (int i = 0; i < pieces_of(p, place); ++i) {
        const SsdPiece piece = piece_of(p, place, i);
        const int batch = piece.state / (p.heads * p.tiles), tile = piece.state % (p.heads * p.tiles);
        const int head = tile / p.tiles, group = p.head_to_group[head];
        const bool is_local = p.segment_chunks > 0 && piece.leaves >= 0;
        if (copies) {
            if (!one_of_warp()) continue;
            const SsdRows rows = rows_of<kExtras>(p, piece.state);
            const SsdShares shares = shares_of(p, place.rank, piece.unit);
            const bool has_rest = Shared::kHasRest && rows.rest;
#pragma unroll 1
            for (int local = is_local; local >= 0; --local)
#pragma unroll 1
                for (int chunk = piece.first; chunk < piece.last; ++chunk) {
                    const int operands = 1 + (has_z && !local);
                    const uint32_t stage_at = shared_at + stage * Shared::kStage,
                                   x_at = stage_at + 2 * Shared::kOperand,
                                   rest_at = shared_at + Shared::kRest + stage * Shared::kInputs * kRestBytes;
                    const uint32_t states_there = shared_at + Shared::kStatesThere + stage * 8,
                                   channels_there = shared_at + Shared::kChannelsThere + stage * 8;
                    barrier_wait(shared_at + Shared::kIsFree + stage * 8, parity);
                    copy_states<Shared>(p, shares, group, batch, local, chunk, stage_at, states_there);
                    barrier_arrive_expecting(channels_there, operands * (kTileBytes + has_rest * kRestBytes));
#pragma unroll 1
                    for (int operand = 0; operand < operands; ++operand) {
                        const SsdOperand &from = operand == 0 ? p.x : p.z;
                        const int column = (operand == 0 ? rows.x : rows.z) & ~7, entry = batch * from.batches;
                        copy_box(x_at + operand * kTileBytes, &from.map, column, chunk * kChunk, entry, channels_there);
                        if (has_rest)
                            copy_box(rest_at + operand * kRestBytes, &from.rest, column + 64, chunk * kChunk, entry,
                                     channels_there);
                    }
                    if (++stage == kStages) stage = 0, parity ^= 1;
                }
        } else {
            // Where a state has channels of one head only, this twice.
            constexpr int kHeads = Shared::kHeads;
            const SsdHeads heads = heads_of<Shared::kMixed>(p, rows_of<kExtras>(p, piece.state));
            SsdSource sources[kHeads];
#pragma unroll
            for (int i = 0; i < kHeads; ++i) sources[i] = source_of(p, batch, heads.first + min(i, heads.count - 1));
#pragma unroll 1
            for (int local = is_local; local >= 0; --local) {
                uint2 next[kHeads];
#pragma unroll
                for (int i = 0; i < kHeads; ++i) next[i] = fetch_dt(p, sources[i], piece.first, lane);
#pragma unroll 1
                for (int chunk = piece.first; chunk < piece.last; ++chunk) {
                    SsdDecays *const decays = reinterpret_cast<SsdDecays *>(shared + Shared::kDecays) + stage * kHeads;
                    SsdSteps steps[kHeads];                  // found while the stage is still read
#pragma unroll
                    for (int i = 0; i < kHeads; ++i) {
                        const uint2 dt = next[i];
                        next[i] = fetch_dt(p, sources[i], chunk + 1, lane);
                        steps[i] = steps_of<Input, kExtras>(p, sources[i], chunk, lane, dt);
                    }
                    barrier_wait(shared_at + Shared::kIsFree + stage * 8, parity);
#pragma unroll
                    for (int i = 0; i < kHeads; ++i) write_decays(steps[i], lane, decays[i]);
                    barrier_arrive_by_warp(shared_at + Shared::kChannelsThere + stage * 8, lane);
                    if (++stage == kStages) stage = 0, parity ^= 1;
                }
            }
        }
    }
}

// Of two heads in a cluster the first gives the end of a chunk's rows to the second, which puts it before its own.
// Neither waits for room: the second has released the stage of chunk n - 2 when the first has found y of n, so what it
// was given of n - 3 is stored. Then stores `count` rows at `y`, the first channel of the first. By the two warps that
// store y.
template <typename Shared>
__device__ __forceinline__ void store_pair(const SsdParams &p, const SsdPairRows &pair, int rank, unsigned chunks,
                                           char *shared, uint32_t shared_at, unsigned thread, char *y, int64_t stride,
                                           int count, int chunk, int batch) {
    const unsigned place = chunks % kGivenPlaces;
    char *const tile = shared + Shared::kY;
    char *const given_at = shared + Shared::kGiven + place * kGivenBytes + thread * 16;
    const uint32_t barrier = shared_at + Shared::kGivenThere + place * 8;
    const auto piece = [&](int column) -> uint4 & {          // of 8 columns of this thread's row
        return *reinterpret_cast<uint4 *>(tile + tile_offset(thread, column * 16 & 127));
    };
    const uint4 end = piece(pair.pieces);
    uint4 apart = end;                                       // with another pair
    if (rank == 0) {
        *reinterpret_cast<uint4 *>(given_at) = end;
        apart = piece(7);
    } else {
        uint4 &first = piece(0);
        barrier_wait(barrier, chunks / kGivenPlaces & 1);
        const uint4 given = *reinterpret_cast<const uint4 *>(given_at), own = first;
        const auto joined = [&](int word, uint32_t given, uint32_t own) {
            const int elements = pair.ahead - 2 * word;
            return elements >= 2 ? given : elements == 1 ? __byte_perm(given, own, 0x7610) : own;
        };
        first = {joined(0, given.x, own.x), joined(1, given.y, own.y), joined(2, given.z, own.z),
                 joined(3, given.w, own.w)};
    }
    fence_for_copies();                                       // the copy engine reads it
    asm volatile("bar.sync 4, 64;" ::: "memory");
    if (thread < 32 && one_of_warp()) {
        if (rank == 0) send_bytes(shared_at + Shared::kGiven + place * kGivenBytes, kGivenBytes, barrier, 1);
        else barrier_arrive_expecting(barrier, kGivenBytes); // the next time
        store_box(p.y_maps + pair.pieces - p.headdim / 8 + 1, pair.column, 0, chunk * kChunk, batch,
                  shared_at + Shared::kY);
    }
    if (static_cast<int>(thread) < count) {
        char *const row = y + thread * stride;
        if (rank == 0) {                                     // elements `ahead` to 7 of the piece
            char *const start = row - pair.ahead * 2;
            if (pair.ahead == 2) *reinterpret_cast<uint32_t *>(start + 4) = apart.y;
            if (pair.ahead == 6) *reinterpret_cast<uint32_t *>(start + 12) = apart.w;
            else if (pair.ahead > 0) *reinterpret_cast<uint2 *>(start + 8) = {apart.z, apart.w};
        } else {                                             // 0 to behind - 1
            char *const start = row + (p.headdim - pair.behind) * 2;
            if (pair.behind >= 4) *reinterpret_cast<uint2 *>(start) = {apart.x, apart.y};
            if (pair.behind == 2) *reinterpret_cast<uint32_t *>(start) = apart.x;
            if (pair.behind == 6) *reinterpret_cast<uint32_t *>(start + 8) = apart.z;
        }
    }
    if (thread < 32 && one_of_warp()) wait_for_stores_to_read();
    __syncwarp();
}

// Two warps that store y.
template <typename Input, typename Shared>
__device__ __forceinline__ void store_y(const SsdParams &p, const SsdPlace &place, char *shared, uint32_t shared_at) {
    constexpr bool kExtras = Shared::kExtras;
    unsigned thread = threadIdx.x % 64;
    const int64_t stride = int64_t{p.heads} * p.headdim * 2;
    int stage = 0;
    unsigned chunks = 0;                                     // stored
#pragma unroll 1
    for (int i = 0; i < pieces_of(p, place); ++i) {
        const SsdPiece piece = piece_of(p, place, i);
        const SsdRows rows = rows_of<kExtras>(p, piece.state);
        const SsdPairRows pair = pair_rows_of(p, rows, place.rank);
        const int batch = piece.state / (p.heads * p.tiles);
        const int column = rows.head * p.headdim + rows.first_channel, y_part = column / p.y_columns,
                  y_column = column - y_part * p.y_columns;  // in parts of y_columns
        char *y = static_cast<char *>(p.y) + (batch * int64_t{p.length} + piece.first * kChunk) * stride + column * 2;
        if (p.segment_chunks > 0 && piece.leaves >= 0) stage = (stage + piece.last - piece.first) % kStages;
#pragma unroll 1
        for (int chunk = piece.first; chunk < piece.last; ++chunk) {
            const int tile_at = kExtras ? stage * Shared::kStage + 2 * Shared::kOperand + kTileBytes : Shared::kY;
            asm volatile("" : "+r"(thread));                 // hidden, else addresses fill the registers
            barrier_arrive_at<kYTaken>();
            barrier_sync_at<kYThere>();
            const int count = min(p.length - chunk * kChunk, kChunk);
            if (p.y_boxes == SsdBoxesOfY::kHeads) {
                if (thread == 0) {
                    fence_for_copies();
                    store_box(p.y_maps, y_column, y_part, chunk * kChunk, batch, shared_at + tile_at);
                    wait_for_stores_to_read();
                }
                __syncwarp();
            } else if (Shared::kPairs && p.y_boxes == SsdBoxesOfY::kPairs) {
                store_pair<Shared>(p, pair, place.rank, chunks++, shared, shared_at, thread, y, stride, count, chunk,
                                   batch);
            } else {
                store_rows(y, stride, shared + tile_at, rows.first, count, rows.channels, thread);
                if constexpr (kExtras) fence_for_copies();       // of z, to the same place
            }
            y += kChunk * stride;
            if constexpr (kExtras) barrier_arrive_by_warp(shared_at + Shared::kIsFree + stage * 8, thread % 32);
            if (++stage == kStages) stage = 0;
        }
    }
}

}  // namespace shedder
