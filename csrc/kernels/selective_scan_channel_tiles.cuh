// What a warp of selective_scan_channels moves between memory and its tiles: rows of its channels (u, delta and z in, y
// out), rows of B and C, states.

#pragma once

#include <type_traits>

#include "kernels/copy_async.cuh"
#include "kernels/selective_scan_fwd.cuh"
#include "kernels/selective_scan_rows.cuh"

namespace shedder {

// kOnGrid_: all rows begin with a piece of memory. Else those of u, delta, z and y of a channel lie alike, and the
// channels of a warp are sixteen apart, so that its rows of y begin at the same place of a sector of 16 elements. They
// are taken to begin with the sector, `skew` steps earlier. Pieces of B and C begin anywhere.
template <typename Input_, int kStates_, int kLanes_, bool kOnGrid_>
struct ScanRows {
    using Input = Input_;
    static constexpr int kStates = kStates_, kLanes = kLanes_;
    static constexpr bool kOnGrid = kOnGrid_;
    static_assert(sizeof(Input) == 2 && (kLanes == 1 || kLanes == 2 || kLanes == 4));
    static constexpr int kChannels = 32 / kLanes, kApart = kOnGrid ? 1 : 16;
    // Of a tile; 32 where 64 take so much shared memory that a multiprocessor has room for fewer warps.
    static constexpr int kSteps = kLanes == 1 || (kLanes == 2 && kStates > 6) ? 32 : 64;
    static constexpr int kSlots = kStates * kLanes;          // states there is room for
    static constexpr int kRowPieces = kSteps / kPieceSteps;
    static constexpr int kRow = 16 * kRowPieces, kTile = kChannels * kRow;   // bytes: of a row, a tensor's tile
    static constexpr int kCopies = kRowPieces / kLanes;      // of a lane, for a tile of a tensor
    static constexpr int kOwn = kPieceSteps / kLanes;        // steps of a piece whose channel-only work a lane does
    // Words of B and C: those of a step neighbours, pieces padded to other banks.
    static constexpr int kBlockSteps = kStates % 2 == 0 ? 1 : 2;             // that a lane reads at a time
    static constexpr int kBlock = kBlockSteps * kStates * 2;
    static constexpr int kBCPiece = kPieceSteps * kSlots * 2 + (kRowPieces == 4 ? 8 : 4);
    static constexpr int kBCTile = kRowPieces * kBCPiece;
    static constexpr int kBCPieces = (kSlots * kRowPieces + 31) / 32;        // that a lane brings
    static constexpr int kStages = 2, kSharedBytes = kStages * 3 * kTile + 4 * kBCTile;

    // Byte of a tile at which piece `piece` of row `row` lies: neighbouring rows on different banks.
    static __device__ int at(int row, int piece) {
        return row * kRow + (piece ^ (kRowPieces == 4 ? row >> 1 & 3 : row & 7)) * 16;
    }
};

// The rows of a warp's channels. A lane copies pieces of some rows, and walks along a row of its own or a share of one.
template <typename Rows>
struct ScanChannelRows {
    using Input = typename Rows::Input;
    static constexpr int kLanes = Rows::kLanes, kSteps = Rows::kSteps, kOwn = Rows::kOwn, kApart = Rows::kApart;
    static constexpr int kCopiedRows = 32 / Rows::kRowPieces;                // between rows that a lane copies
    // The steps of a piece that belong to a lane, as they lie in memory.
    using Own = std::conditional_t<kLanes == 1, uint4, std::conditional_t<kLanes == 2, uint2, uint32_t>>;

    const SelectiveScanParams &p;
    char *const tiles;                                       // [stage][u, delta, z][kTile]
    const int first_channel, last;                           // of the warp; of all
    const int row, column, copied_row, copied_piece;
    const int behind;                                        // channels behind the first that this lane copies
    const int64_t channel;                                   // of this lane; the last one where it has none
    const int skew;                                          // steps before the rows
    const Input *u_at, *delta_at, *z_at;
    Input *y_at;

    __device__ __forceinline__ ScanChannelRows(const SelectiveScanParams &p, int64_t b, int first_channel, char *tiles)
        : p(p), tiles(tiles), first_channel(first_channel), last(p.channels - 1),
          row(threadIdx.x % 32 / kLanes), column(threadIdx.x % 32 % kLanes),
          copied_row(threadIdx.x % 32 / Rows::kRowPieces), copied_piece(threadIdx.x % 32 % Rows::kRowPieces),
          behind(last - first_channel - copied_row * kApart), channel(min(first_channel + row * kApart, last)),
          skew(Rows::kOnGrid ? 0 : within_sector(static_cast<const Input *>(p.y) + b * p.y_strides.batch
                                                 + first_channel * p.y_strides.channel)) {
        const auto first_of = [&](const void *tensor, const Strides3 &s) {
            return static_cast<const Input *>(tensor) + b * s.batch + (first_channel + copied_row * kApart) * s.channel
                + copied_piece * kPieceSteps - skew;
        };
        u_at = first_of(p.u, p.u_strides);
        delta_at = first_of(p.delta, p.delta_strides);
        z_at = first_of(p.z, p.z_strides);
        y_at = const_cast<Input *>(first_of(p.y, p.y_strides));
    }

    // The lines in which the rows of this lane's channel begin, on their way to L2.
    __device__ __forceinline__ void ask(int64_t b) const {
        const auto ask_for = [&](const void *tensor, const Strides3 &s) {
            prefetch_line(static_cast<const Input *>(tensor) + b * s.batch + channel * s.channel);
        };
        ask_for(p.u, p.u_strides);
        ask_for(p.delta, p.delta_strides);
        if (p.z != nullptr) ask_for(p.z, p.z_strides);
    }

    __device__ int length() const { return p.length + skew; }
    // Of the rows that this lane copies, `behind` channels behind the first: whether the i-th exists.
    __device__ static bool copies_row(int i, int behind) { return i * kCopiedRows * kApart <= behind; }
    __device__ char *tile_of(int stage, int tensor) const { return tiles + (stage * 3 + tensor) * Rows::kTile; }
    // Of this lane's steps of u.
    __device__ __forceinline__ char *place_of(int stage, int piece) const {
        return tile_of(stage, 0) + Rows::at(row, piece) + column * kOwn * 2;
    }

    // use(its row is this lane's i-th, where its piece lies) for each piece that a lane moves.
    template <int kUnrolled = Rows::kCopies, typename At, typename Use>
    __device__ __forceinline__ void each_piece(At *at, int64_t pitch, Use use) const {
#pragma unroll kUnrolled
        for (int i = 0; i < Rows::kCopies; ++i) use(i, at + i * kCopiedRows * kApart * pitch);
    }

    // The same of the rows that exist. On the grid without predicates where all do: those took 8 % of the time at 4
    // states.
    template <typename At, typename Use>
    __device__ __forceinline__ void each_existing_piece(At *at, int behind, int64_t pitch, Use use) const {
        if (Rows::kOnGrid && copies_row(Rows::kCopies - 1, behind))
            each_piece(at, pitch, use);
        else
            each_piece(at, pitch, [&](int i, At *at) { if (copies_row(i, behind)) use(i, at); });
    }

    // The next tile, of which `left` steps exist, on its way. Zeros for steps not there; anything for rows, and for
    // steps before them, of whose pieces none is read that might lie before a tensor.
    __device__ __forceinline__ void copy(int left, int stage) {
        const bool begun = Rows::kOnGrid || p.length - left + (copied_piece + 1) * kPieceSteps > 0;
        const int rows = begun ? behind : -1;
        if (left >= kSteps) {
            copy_whole(tile_of(stage, 0), u_at, rows, p.u_strides.channel);
            copy_whole(tile_of(stage, 1), delta_at, rows, p.delta_strides.channel);
            if (p.z != nullptr) copy_whole(tile_of(stage, 2), z_at, rows, p.z_strides.channel);
        } else {
#pragma unroll 1
            for (int tensor = 0; tensor < 2 + (p.z != nullptr); ++tensor) {
                const auto one_of = [&](auto u, auto delta, auto z) {
                    return tensor == 0 ? u : tensor == 1 ? delta : z;
                };
                copy_part(tile_of(stage, tensor), one_of(u_at, delta_at, z_at), rows, left,
                          static_cast<const Input *>(one_of(p.u, p.delta, p.z)),
                          *one_of(&p.u_strides, &p.delta_strides, &p.z_strides));
            }
        }
        u_at += kSteps, delta_at += kSteps, z_at += kSteps;
        copies_committed();
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

    // A tile of y to memory; `left` steps were left before it.
    __device__ __forceinline__ void store(int left, int stage, bool is_first) {
        char *const y_tile = tile_of(stage, 2);
        __syncwarp();
        const auto piece_of = [&](int i) {
            return *reinterpret_cast<const uint4 *>(y_tile + Rows::at(copied_row + i * kCopiedRows, copied_piece));
        };
        const int before = is_first ? skew : 0;              // steps before the rows
        if (left >= kSteps && before == 0) {
            each_existing_piece(y_at, behind, p.y_strides.channel,
                            [&](int i, Input *to) { *reinterpret_cast<uint4 *>(to) = piece_of(i); });
        } else {
            each_piece(y_at, p.y_strides.channel, [&](int i, Input *to) {
                const uint4 out = piece_of(i);
                const int end = copies_row(i, behind) ? left : 0;
#pragma unroll
                for (int k = 0; k < kPieceSteps; ++k)
                    if (before <= copied_piece * kPieceSteps + k && copied_piece * kPieceSteps + k < end)
                        to[k] = reinterpret_cast<const Input *>(&out)[k];
            });
        }
        y_at += kSteps;
    }

private:
    // Elements between the start of a sector and `at`.
    __device__ __forceinline__ static int within_sector(const Input *at) {
        return static_cast<int>(reinterpret_cast<uintptr_t>(at) / sizeof(Input) % 16);
    }

    __device__ __forceinline__ void copy_whole(char *to, const Input *from, int rows, int64_t pitch) const {
        each_existing_piece(from, rows, pitch, [&](int i, const Input *at) {
            copy_async_line(to + Rows::at(copied_row + i * kCopiedRows, copied_piece), at);
        });
    }

    __device__ __forceinline__ void copy_part(char *to, const Input *from, int rows, int left, const Input *tensor,
                                              const Strides3 &s) const {
        const auto part = [&](int i, auto copy) {
            const int there = copies_row(i, rows) ? left - copied_piece * kPieceSteps : 0;
            copy(to + Rows::at(copied_row + i * kCopiedRows, copied_piece), min(max(there, 0), kPieceSteps) * 2);
        };
        const Input *const end = tensor + (p.batch - 1) * s.batch + last * s.channel + p.length;
        const Input *const furthest = from + (Rows::kCopies - 1) * kCopiedRows * kApart * s.channel + kPieceSteps;
        if (!Rows::kOnGrid && __any_sync(0xffffffffu, furthest > end))       // of few warps: a loop, since it is long
            each_piece<1>(from, s.channel, [&](int i, const Input *at) {
                part(i, [&](char *to, int bytes) { copy_async_part(to, at, bytes, end); });
            });
        else
            each_piece(from, s.channel, [&](int i, const Input *at) {
                part(i, [&](char *to, int bytes) { copy_async_part(to, at, bytes); });
            });
    }
};

// The first `count` of elements of 16 bits become 0.
template <int kWords>
__device__ __forceinline__ void clear_first(uint32_t (&words)[kWords], int count) {
#pragma unroll
    for (int i = 0; i < kWords; ++i)
        words[i] = count >= 2 * i + 2 ? 0u : count == 2 * i + 1 ? words[i] & 0xffff0000u : words[i];
}

// The rows of B and C: a lane brings pieces of some, which wait in its registers, as the words of memory that they lie
// in, until the tile may hold them as floats. Steps count from `skew` before the rows.
template <typename Rows>
struct ScanStateRows {
    using Input = typename Rows::Input;
    struct Words {
        uint32_t word[kPieceSteps / 2 + !Rows::kOnGrid];     // off the grid a piece may begin within a word
    };

    const SelectiveScanParams &p;
    const int skew;
    const Input *const B_row, *const C_row;                  // of state 0, at step 0
    float *const tile;
    const int lane = threadIdx.x % 32;
    Words B[Rows::kBCPieces], C[Rows::kBCPieces];

    __device__ __forceinline__ ScanStateRows(const SelectiveScanParams &p, int64_t b, int skew, float *tile)
        : p(p), skew(skew),
          B_row(static_cast<const Input *>(p.B) + b * p.B_strides.batch - skew),
          C_row(static_cast<const Input *>(p.C) + b * p.C_strides.batch - skew), tile(tile) {}

    __device__ int2 place_of(int i) const {                  // of this lane's i-th piece: state, first step of the tile
        const int index = lane + 32 * i;
        return make_int2(index / Rows::kRowPieces, index % Rows::kRowPieces * kPieceSteps);
    }

    // The steps from `start` on, on their way. Zeros for steps not there.
    __device__ __forceinline__ void read(int start) {
        const auto all = [&](auto read_one) {
#pragma unroll
            for (int i = 0; i < Rows::kBCPieces; ++i) {
                const int2 place = place_of(i);
                if (place.x >= p.dstate) continue;
                B[i] = read_one(B_row + place.x * p.B_strides.state + start + place.y, start + place.y);
                C[i] = read_one(C_row + place.x * p.C_strides.state + start + place.y, start + place.y);
            }
        };
        // The last word may hold one step more.
        if (start >= skew && p.length + skew - start >= Rows::kSteps + !Rows::kOnGrid)
            all([](const Input *from, int) { return whole(from); });
        else
            all([&](const Input *from, int t) { return part(from, t - skew); });
    }

    // What `read` has brought, as floats in the tile.
    __device__ __forceinline__ void put() const {
#pragma unroll
        for (int i = 0; i < Rows::kBCPieces; ++i) {
            const int2 place = place_of(i);
            const int n = place.x;
            if (n >= p.dstate) continue;
            float *const to = tile + place.y / kPieceSteps * Rows::kBCPiece + n / Rows::kStates * Rows::kBlock
                + n % Rows::kStates * 2;
            const Piece<Input> b = steps_of(B[i], B_row + n * p.B_strides.state);
            const Piece<Input> c = steps_of(C[i], C_row + n * p.C_strides.state);
#pragma unroll
            for (int k = 0; k < kPieceSteps; ++k)
                *reinterpret_cast<float2 *>(to + k / Rows::kBlockSteps * Rows::kBlock * Rows::kLanes
                                            + k % Rows::kBlockSteps * Rows::kStates * 2) =
                    make_float2(b.get(k), c.get(k));
        }
    }

private:
    // Elements between the start of a word of memory and `at`.
    __device__ __forceinline__ static int within_word(const Input *at) {
        return Rows::kOnGrid ? 0 : static_cast<int>(reinterpret_cast<uintptr_t>(at) / 2 % 2);
    }

    // All 8 steps from `from` on exist.
    __device__ __forceinline__ static Words whole(const Input *from) {
        Words words;
        if constexpr (Rows::kOnGrid) {
            const Piece<Input> piece = read_whole_piece(from);
            memcpy(words.word, piece.word, sizeof(words));
        } else {
            const int within = within_word(from);
            const uint32_t *const at = reinterpret_cast<const uint32_t *>(from - within);
#pragma unroll
            for (int i = 0; i < kPieceSteps / 2; ++i) words.word[i] = at[i];
            words.word[kPieceSteps / 2] = at[kPieceSteps / 2 - 1 + within];  // no word of which no step is asked for
        }
        return words;
    }

    // `from` is step t of the row, of which some of the 8 may not exist.
    __device__ __forceinline__ Words part(const Input *from, int t) const {
        Words words;
        const int within = within_word(from);
        const auto element = [&](int k) {
            const int at = k - within;
            return 0 <= t + at && t + at < p.length ? reinterpret_cast<const uint16_t *>(from)[at] : uint16_t{0};
        };
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(words)) / 4; ++i)
            words.word[i] = element(2 * i) | static_cast<uint32_t>(element(2 * i + 1)) << 16;
        return words;
    }

    __device__ __forceinline__ static Piece<Input> steps_of(const Words &words, const Input *row) {
        Piece<Input> piece;
        const int within = within_word(row);
#pragma unroll
        for (int i = 0; i < kPieceSteps / 2; ++i)
            piece.word[i] = Rows::kOnGrid ? words.word[i]
                                          : __funnelshift_r(words.word[i], words.word[i + !Rows::kOnGrid], within * 16);
        return piece;
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
