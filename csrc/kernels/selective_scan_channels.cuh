// Selective scan, forward, the form for many channels; selective_scan_fwd.cuh has the recurrence and the form for
// everything else.
//
// A lane owns a channel, or two or four neighbouring lanes share one, and walks along t with h in registers. No warp
// waits for another: the four of a CTA only see to it that all schedulers of a multiprocessor get as many.
// Time goes by tiles: rows of u, delta and z enter shared memory by asynchronous copies while the tile before is walked
// through; a lane takes its own row from there in pieces of 8 steps, does what belongs to the channel alone (softplus,
// D, SiLU) in registers, and puts y where z was. B and C of a tile lie in shared memory as floats, side by side, which
// all lanes read at once. Against tiles shared by a team (selective_scan_tiled.cuh) the path out of shared memory
// carries a half to a third: (delta, delta u) and the sums over states never pass through it.
//
// A channel costs least where a lane has it to itself. But 5120 channels of 8 batch entries are 2.4 such warps for each
// scheduler of an H200, and the third would be there for some only. So a grid has CTAs of three kinds: whole rounds of
// schedulers get warps of 32 channels, what is left over goes to warps of 16 or 8 channels that have less to do.
//
// Rows off the 16-byte grid (L that is no multiple of 8) enter as the pieces of memory that they lie in, one more than
// on the grid, and lanes read words from their row's own place on. y leaves likewise: what does not fill a piece stays
// in shared memory for the next tile.
//
// Bound: the issue slots and MUFU, one ex2 for each (t, n), or bytes where states are few.

#pragma once

#include <algorithm>

#include "kernels/copy_async.cuh"
#include "kernels/selective_scan_tiled.cuh"

namespace shedder {

// kOnGrid_: all rows begin with a piece of memory. Else those of u, delta, z and y of a channel lie alike.
template <typename Input_, int kStates_, int kLanes_, bool kOnGrid_>
struct ScanRows {
    using Input = Input_;
    static constexpr int kStates = kStates_, kLanes = kLanes_;
    static constexpr bool kOnGrid = kOnGrid_;
    static_assert(sizeof(Input) == 2 && (kLanes == 1 || kLanes == 2 || kLanes == 4));
    static constexpr int kChannels = 32 / kLanes;
    // Of a tile; where 64 take so much shared memory that one CTA fills a multiprocessor, 32.
    static constexpr int kSteps = kLanes == 1 || (kLanes == 2 && kStates > 7 && !kOnGrid) ? 32 : 64;
    static constexpr int kSlots = kStates * kLanes;          // states there is room for
    static constexpr int kRowPieces = kSteps / kPieceSteps;
    static constexpr int kMemoryPieces = kRowPieces + !kOnGrid;              // that a row's steps lie in
    static constexpr int kRow = 16 * kMemoryPieces, kTile = kChannels * kRow;        // bytes: of a row, a tensor's tile
    static constexpr int kCopies = kRowPieces / kLanes;      // of a lane, for a tile of a tensor
    static constexpr int kOwn = kPieceSteps / kLanes;        // steps of a piece whose channel-only work a lane does
    // Words of B and C: those of a step neighbours, pieces padded to other banks.
    static constexpr int kBlockSteps = kStates % 2 == 0 ? 1 : 2;             // that a lane reads at a time
    static constexpr int kBlock = kBlockSteps * kStates * 2;
    static constexpr int kBCPiece = kPieceSteps * kSlots * 2 + (kRowPieces == 4 ? 8 : 4);
    static constexpr int kBCTile = kRowPieces * kBCPiece;
    static constexpr int kBCPieces = (kSlots * kRowPieces + 31) / 32;        // that a lane brings
    static constexpr int kStages = 2;
    static constexpr int kSharedBytes = kStages * (3 * kTile + 4 * kBCTile);

    // Byte of a tile at which piece `piece` of row `row` lies: neighbouring rows on different banks.
    static __device__ int at(int row, int piece) {
        return row * kRow + (kOnGrid ? piece ^ (kLanes == 1 ? row >> 1 & 3 : row & 7) : piece) * 16;
    }
};

// The channels of one warp, from the first on.
template <typename Rows>
__device__ __forceinline__ void scan_channels(const SelectiveScanParams &p, int64_t b, int first_channel,
                                              char *shared) {
    using Input = typename Rows::Input;
    constexpr int kStates = Rows::kStates, kLanes = Rows::kLanes, kSteps = Rows::kSteps, kOwn = Rows::kOwn;
    char *const tiles = shared;                              // [stage][u, delta, z][kTile]
    float *const BC_tiles = reinterpret_cast<float *>(tiles + Rows::kStages * 3 * Rows::kTile);   // [stage][kBCTile]
    const int lane = threadIdx.x % 32, row = lane / kLanes, column = lane % kLanes;
    const int last = p.channels - 1;
    const int64_t channel = min(first_channel + row, last);
    const bool exists = first_channel + row <= last;

    // ---- u, delta, z on their way in, y out: a lane moves pieces of rows kCopiedRows apart. Zeros for rows not there.
    const int copied_row = lane / Rows::kRowPieces, copied_piece = lane % Rows::kRowPieces;
    constexpr int kCopiedRows = 32 / Rows::kRowPieces;
    auto first_of = [&](const void *tensor, const Strides3 &s) {
        return static_cast<const Input *>(tensor) + b * s.batch + (first_channel + copied_row) * s.channel
            + copied_piece * kPieceSteps;
    };
    auto copies_row = [&](int i) { return first_channel + copied_row + i * kCopiedRows <= last; };
    const bool all_rows = first_channel + Rows::kChannels - 1 <= last;
    // Steps of memory between the start of a piece and a row's own.
    auto skew_of = [](const Input *at) {
        return Rows::kOnGrid ? 0 : static_cast<int>(reinterpret_cast<uintptr_t>(at) / sizeof(Input) % kPieceSteps);
    };
    const Input *u_at = first_of(p.u, p.u_strides), *delta_at = first_of(p.delta, p.delta_strides);
    const Input *z_at = first_of(p.z, p.z_strides);
    Input *y_at = const_cast<Input *>(first_of(p.y, p.y_strides));
    // use(its row is this lane's i-th, piece, where it begins in memory, skew) for each piece that a lane moves.
    auto each_piece = [&](auto and_behind, auto *at, int64_t pitch, auto use) {
        auto of_row = [&](int i, int piece, auto *from) {
            const int skew = skew_of(from);
            use(i, piece, from - skew, skew);
        };
#pragma unroll
        for (int i = 0; i < Rows::kCopies; ++i) of_row(i, copied_piece, at + i * kCopiedRows * pitch);
        if (decltype(and_behind)::value && copied_piece == Rows::kRowPieces - 1)
#pragma unroll
            for (int i = 0; i < Rows::kCopies; ++i)
                of_row(i, Rows::kRowPieces, at + i * kCopiedRows * pitch + kPieceSteps);
    };
    constexpr std::bool_constant<!Rows::kOnGrid> kAllPieces{};
    auto copy_tile = [&](int left, int stage) {
        char *const to = tiles + stage * 3 * Rows::kTile;
        auto all = [&](auto copy_one) {
            auto copy = [&](char *to, const Input *&from, int64_t pitch) {
                each_piece(kAllPieces, from, pitch, [&](int i, int piece, const Input *at, int skew) {
                    copy_one(i, to + Rows::at(copied_row + i * kCopiedRows, piece), at, skew - piece * kPieceSteps);
                });
                from += kSteps;
            };
            copy(to, u_at, p.u_strides.channel);
            copy(to + Rows::kTile, delta_at, p.delta_strides.channel);
            if (p.z != nullptr) copy(to + 2 * Rows::kTile, z_at, p.z_strides.channel);
        };
        if (all_rows && left >= kSteps + !Rows::kOnGrid * kPieceSteps)
            all([](int, char *to, const Input *from, int) { copy_async_line(to, from); });
        else
            all([&](int i, char *to, const Input *from, int before) {
                copy_async_part(to, from, copies_row(i) ? min(max(left + before, 0), kPieceSteps) * 2 : 0);
            });
        copies_committed();
    };

    // ---- B and C: a lane brings pieces of rows. Off the grid the pieces of memory wait where their floats will lie.
    Piece<Input> B_next[Rows::kBCPieces], C_next[Rows::kBCPieces];
    auto BC_place = [&](int i) {                             // (state, first step)
        const int index = lane + 32 * i;
        return make_int2(index / Rows::kRowPieces, index % Rows::kRowPieces * kPieceSteps);
    };
    const Input *const B_row = static_cast<const Input *>(p.B) + b * p.B_strides.batch;
    const Input *const C_row = static_cast<const Input *>(p.C) + b * p.C_strides.batch;
    auto read_BC = [&](int start, float *tile) {
        if constexpr (Rows::kOnGrid) {
            auto all = [&](auto read_one) {
#pragma unroll
                for (int i = 0; i < Rows::kBCPieces; ++i) {
                    const int2 place = BC_place(i);
                    if (place.x >= p.dstate) continue;
                    B_next[i] = read_one(B_row + place.x * p.B_strides.state + start + place.y, start + place.y);
                    C_next[i] = read_one(C_row + place.x * p.C_strides.state + start + place.y, start + place.y);
                }
            };
            if (p.length - start >= kSteps)
                all([](const Input *from, int) { return read_whole_piece(from); });
            else
                all([&](const Input *from, int t) { return read_piece(from, 1, p.length - t, Access::kVector); });
        } else {
            auto copy = [&](char *to, const Input *rows, int64_t pitch) {
                for (int i = lane; i < p.dstate * Rows::kMemoryPieces; i += 32) {
                    const int first = i % Rows::kMemoryPieces * kPieceSteps;
                    const Input *const from = rows + i / Rows::kMemoryPieces * pitch + start;
                    const int skew = skew_of(from), there = p.length - start + skew - first;
                    copy_async_part(to + i * 16, from - skew + first, min(max(there, 0), kPieceSteps) * 2);
                }
            };
            char *const raw = reinterpret_cast<char *>(tile);
            copy(raw, B_row, p.B_strides.state);
            copy(raw + Rows::kSlots * Rows::kRow, C_row, p.C_strides.state);
            copies_committed();
        }
    };
    auto take_BC = [&](const float *tile) {                  // off the grid: what read_BC brought
        auto take = [&](const char *raw, int2 place, const Input *row) {
            Piece<Input> piece{};
            if (place.x >= p.dstate) return piece;
            const int skew = skew_of(row), first = place.y + skew;
            const uint32_t *const from = reinterpret_cast<const uint32_t *>(raw + place.x * Rows::kRow) + first / 2;
#pragma unroll
            for (int i = 0; i < kPieceSteps / 2; ++i)
                piece.word[i] = __funnelshift_r(from[i], from[i + 1], skew % 2 * 16);
            return piece;
        };
        const char *const raw = reinterpret_cast<const char *>(tile);
#pragma unroll
        for (int i = 0; i < Rows::kBCPieces; ++i) {
            const int2 place = BC_place(i);
            B_next[i] = take(raw, place, B_row + place.x * p.B_strides.state);
            C_next[i] = take(raw + Rows::kSlots * Rows::kRow, place, C_row + place.x * p.C_strides.state);
        }
        __syncwarp();
    };
    auto put_BC = [&](float *tile) {
        if (!Rows::kOnGrid) take_BC(tile);
#pragma unroll
        for (int i = 0; i < Rows::kBCPieces; ++i) {
            const int2 place = BC_place(i);
            const int n = place.x;
            if (n >= (Rows::kOnGrid ? p.dstate : Rows::kSlots)) continue;
            float *const to =
                tile + place.y / kPieceSteps * Rows::kBCPiece + n / kStates * Rows::kBlock + n % kStates * 2;
#pragma unroll
            for (int k = 0; k < kPieceSteps; ++k)
                *reinterpret_cast<float2 *>(to + k / Rows::kBlockSteps * Rows::kBlock * kLanes
                                            + k % Rows::kBlockSteps * kStates * 2) =
                    make_float2(B_next[i].get(k), C_next[i].get(k));
        }
    };

    copy_tile(p.length, 0);
    read_BC(0, BC_tiles);
    if (Rows::kOnGrid && p.dstate != Rows::kSlots)           // zeros for states not there
        for (int i = lane; i < Rows::kStages * Rows::kBCTile; i += 32) BC_tiles[i] = 0.f;
    float A[kStates], h[kStates];
    const int64_t state_row = (b * p.channels + channel) * p.dstate;
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
        const int n = column * kStates + i;
        const bool real = n < p.dstate;
        A[i] = real ? p.A[channel * p.A_channel_stride + n * p.A_state_stride] * kLog2e : 0.f;
        h[i] = real && p.initial_state != nullptr ? p.initial_state[state_row + n] : 0.f;
    }
    const float skip = p.D == nullptr ? 0.f : p.D[channel * p.D_stride];
    const float bias = p.delta_bias == nullptr ? 0.f : p.delta_bias[channel * p.delta_bias_stride];
    auto tile_landed = [&] {
        copies_landed();
        __syncwarp();
    };
    tile_landed();
    put_BC(BC_tiles);

    using Own = std::conditional_t<kLanes == 1, uint4, std::conditional_t<kLanes == 2, uint2, uint32_t>>;
    const int skew = skew_of(static_cast<const Input *>(p.u) + b * p.u_strides.batch + channel * p.u_strides.channel);
    auto place_of = [&](int stage, int piece) {              // of this lane's steps of u: of the word they begin in
        return tiles + stage * 3 * Rows::kTile + Rows::at(row, piece) + column * kOwn * 2 + skew / 2 * 4;
    };
    // What belongs to the channel alone. Taken a piece ahead and without branches, so that it mingles with the walk.
    struct Prepared {
        char *at;                                            // in shared memory
        Own u;                                               // as it lies in memory: half the registers
        float delta[kOwn], gate[kOwn];
    };
    auto take_own = [&](const char *from) {
        if constexpr (Rows::kOnGrid) {
            return *reinterpret_cast<const Own *>(from);
        } else {
            uint32_t words[kOwn / 2 + 1];
#pragma unroll
            for (int i = 0; i <= kOwn / 2; ++i) words[i] = reinterpret_cast<const uint32_t *>(from)[i];
            Own own;
#pragma unroll
            for (int i = 0; i < kOwn / 2; ++i)
                reinterpret_cast<uint32_t *>(&own)[i] = __funnelshift_r(words[i], words[i + 1], skew % 2 * 16);
            return own;
        }
    };
    auto unpack_own = [](const Own &from, float (&to)[kOwn]) {
        const uint32_t *const words = reinterpret_cast<const uint32_t *>(&from);
#pragma unroll
        for (int k = 0; k < kOwn; ++k)
            to[k] = k % 2 ? Piece<Input>::high(words[k / 2]) : Piece<Input>::low(words[k / 2]);
    };
    auto prepare = [&](char *at) {
        Prepared to;
        to.at = at;
        to.u = take_own(at);
        unpack_own(take_own(at + Rows::kTile), to.delta);
        unpack_own(take_own(at + 2 * Rows::kTile), to.gate);
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
            const float delta = to.delta[k] + bias, positive = softplus_to<Input>(delta);
            to.delta[k] = p.delta_softplus ? positive : delta;
            const float gate = silu_to<Input>(to.gate[k]);
            to.gate[k] = p.z != nullptr ? gate : 1.f;
        }
        return to;
    };
    // y goes where z was. pending: off the grid, the lane's last word: its upper step may be the lower one of another.
    uint32_t pending = 0;
    auto put_y = [&](char *at, const float (&y)[kOwn]) {
        alignas(16) Input out[kOwn];
#pragma unroll
        for (int k = 0; k < kOwn; ++k) out[k] = from_float<Input>(y[k]);
        if constexpr (Rows::kOnGrid) {
            *reinterpret_cast<Own *>(at) = *reinterpret_cast<const Own *>(out);
        } else {
            const uint32_t *const words = reinterpret_cast<const uint32_t *>(out);
            const uint32_t newest = words[kOwn / 2 - 1];
            uint32_t before = pending;
            if constexpr (kLanes > 1)
                before = __shfl_sync(0xffffffffu, column == kLanes - 1 ? pending : newest, column + kLanes - 1, kLanes);
#pragma unroll
            for (int i = 0; i < kOwn / 2; ++i) {
                reinterpret_cast<uint32_t *>(at)[i] = __funnelshift_rc(before, words[i], skew % 2 ? 16 : 32);
                before = words[i];
            }
            pending = newest;
        }
    };
    tile_landed();
    Prepared own = prepare(place_of(0, 0));

    for (int start = 0, stage = 0; start < p.length; start += kSteps, stage ^= 1) {
        const int left = p.length - start;
        const bool more = left > kSteps;
        __syncwarp();                                        // B and C of this tile are there, y before it is out
        if (more) {
            copy_tile(left - kSteps, stage ^ 1);
            read_BC(start + kSteps, BC_tiles + (stage ^ 1) * Rows::kBCTile);
        }
        const float *const BC_tile = BC_tiles + stage * Rows::kBCTile;
        // A piece of which `steps` exist; kWhole: all.
        auto walk = [&](auto whole, int piece, int steps) {
            constexpr bool kWhole = decltype(whole)::value;
            Prepared next;
            if (kWhole) {
                const int follows = (piece + 1) % Rows::kRowPieces;
                next = prepare(place_of(stage ^ (follows == 0), follows));
            }
            float (&own_delta)[kOwn] = own.delta;
            float u[kOwn], own_input[kOwn];
            unpack_own(own.u, u);
            if (!kWhole)
#pragma unroll
                for (int k = 0; k < kOwn; ++k)
                    if (column * kOwn + k >= steps) own_delta[k] = 0.f;      // the state passes by
#pragma unroll
            for (int k = 0; k < kOwn; ++k) own_input[k] = own_delta[k] * u[k];
            float delta[kPieceSteps], input[kPieceSteps];
#pragma unroll
            for (int k = 0; k < kPieceSteps; ++k) {
                if constexpr (kLanes == 1) {
                    delta[k] = own_delta[k];
                    input[k] = own_input[k];
                } else {
                    delta[k] = __shfl_sync(0xffffffffu, own_delta[k % kOwn], k / kOwn, kLanes);
                    input[k] = __shfl_sync(0xffffffffu, own_input[k % kOwn], k / kOwn, kLanes);
                }
            }

            float decay[kPieceSteps][kStates], BC[kPieceSteps / Rows::kBlockSteps][Rows::kBlock], sums[kPieceSteps];
            const float *const words_at = BC_tile + piece * Rows::kBCPiece + column * Rows::kBlock;
            auto take = [&](int t) {                         // what does not depend on h
                if (t % Rows::kBlockSteps == 0) load_words(BC[t / Rows::kBlockSteps], words_at + t * Rows::kSlots * 2);
#pragma unroll
                for (int i = 0; i < kStates; ++i) decay[t][i] = fast_exp2(delta[t] * A[i]);
            };
            auto update = [&](int t) {
                const float *const words = BC[t / Rows::kBlockSteps] + t % Rows::kBlockSteps * kStates * 2;
                float y = kLanes == 1 ? skip * u[t % kOwn] : 0.f;
#pragma unroll
                for (int i = 0; i < kStates; ++i) {
                    h[i] = fmaf(decay[t][i], h[i], input[t] * words[2 * i]);
                    y = fmaf(words[2 * i + 1], h[i], y);
                }
                sums[t] = y;
            };
            constexpr int kAhead = 2;                        // steps whose decays are taken ahead of the updates
#pragma unroll
            for (int t = 0; t < kAhead; ++t) take(t);
#pragma unroll
            for (int t = 0; t < kPieceSteps; ++t) {
                if (t % 2 == 0)
#pragma unroll
                    for (int i = t + kAhead; i < min(t + kAhead + 2, kPieceSteps); ++i) take(i);
                update(t);
            }

            // Sums over the states of all lanes; each keeps those of its own steps.
#pragma unroll
            for (int width = kLanes / 2, left = kPieceSteps / 2; width > 0; width /= 2, left /= 2) {
                const bool upper = column & width;
#pragma unroll
                for (int k = 0; k < left; ++k) {
                    const float give = upper ? sums[k] : sums[k + left], keep = upper ? sums[k + left] : sums[k];
                    sums[k] = keep + __shfl_xor_sync(0xffffffffu, give, width);
                }
            }
            float y[kOwn];
#pragma unroll
            for (int k = 0; k < kOwn; ++k)
                y[k] = (kLanes == 1 ? sums[k] : fmaf(skip, u[k], sums[k])) * own.gate[k];
            put_y(own.at + 2 * Rows::kTile, y);
            if (kWhole) own = next;
        };
        const int steps = min(left, kSteps), whole_pieces = steps / kPieceSteps;
#pragma unroll 1
        for (int piece = 0; piece < whole_pieces; ++piece) {
            walk(std::true_type{}, piece, kPieceSteps);
            if (piece + 2 == Rows::kRowPieces) tile_landed();                // the last one looks into the next tile
        }
        if (steps % kPieceSteps > 0) walk(std::false_type{}, whole_pieces, steps % kPieceSteps);
        char *const y_tile = tiles + stage * 3 * Rows::kTile + 2 * Rows::kTile;
        if (!Rows::kOnGrid && !more && skew % 2 && column == kLanes - 1) {
            const int last_step = (steps + kPieceSteps - 1) / kPieceSteps * kPieceSteps + skew - 1;
            reinterpret_cast<uint16_t *>(y_tile + row * Rows::kRow)[last_step] = static_cast<uint16_t>(pending >> 16);
        }
        __syncwarp();
        if (!Rows::kOnGrid && more) {                        // what the last piece is too short for, to the next tile
            const uint32_t *const from = reinterpret_cast<const uint32_t *>(y_tile + row * Rows::kRow) + kSteps / 2;
            char *const next_tile = tiles + (stage ^ 1) * 3 * Rows::kTile + 2 * Rows::kTile;
            for (int word = column; word < skew / 2; word += kLanes)
                reinterpret_cast<uint32_t *>(next_tile + row * Rows::kRow)[word] = from[word];
        }
        auto store_all = [&](auto and_behind, auto store_one) {
            each_piece(and_behind, y_at, p.y_strides.channel, [&](int i, int piece, Input *to, int skew) {
                store_one(i, piece, to, *reinterpret_cast<const uint4 *>(
                    y_tile + Rows::at(copied_row + i * kCopiedRows, piece)), skew);
            });
        };
        if (all_rows && (Rows::kOnGrid ? left >= kSteps : more && start > 0))
            store_all(std::false_type{},
                      [](int, int, Input *to, uint4 out, int) { *reinterpret_cast<uint4 *>(to) = out; });
        else
            store_all(kAllPieces, [&](int i, int piece, Input *to, uint4 out, int skew) {
                const int before = start == 0 ? skew : 0, end = copies_row(i) ? more ? kSteps : left + skew : 0;
#pragma unroll
                for (int k = 0; k < kPieceSteps; ++k)
                    if (before <= piece * kPieceSteps + k && piece * kPieceSteps + k < end)
                        to[k] = reinterpret_cast<const Input *>(&out)[k];
            });
        y_at += kSteps;
        if (more) put_BC(BC_tiles + (stage ^ 1) * Rows::kBCTile);
    }

    if (p.final_state == nullptr || !exists) return;
#pragma unroll
    for (int i = 0; i < kStates; ++i)
        if (column * kStates + i < p.dstate) p.final_state[state_row + column * kStates + i] = h[i];
}

// A grid of three kinds of warps: of each batch entry the first channels by warps that have 32 each, the next by warps
// of 16, the others by warps of 8. CTAs of a kind are neighbours, their four warps on the four schedulers.
struct ScanDeal {
    int wide, half, quarter;                                 // warps of 32, 16, 8 channels in a batch entry
    int first_half, first_quarter, ctas;                     // CTAs before those of a kind, and all
};

constexpr int kMostScanSlots = 16;                           // states that there are kernels for
constexpr int kScanWarps = 4;                                // of a CTA

template <typename Input, int kSlots, bool kOnGrid>
struct ScanKinds {
    using Wide = ScanRows<Input, kSlots, 1, kOnGrid>;
    using Half = ScanRows<Input, (kSlots + 1) / 2, 2, kOnGrid>;
    using Quarter = ScanRows<Input, (kSlots + 3) / 4, 4, kOnGrid>;
    static constexpr int kWarpBytes = std::max({Wide::kSharedBytes, Half::kSharedBytes, Quarter::kSharedBytes});
};

template <typename Input, int kSlots, bool kOnGrid>
__global__ void __launch_bounds__(32 * kScanWarps, kOnGrid || kSlots <= 8 ? 3 : 2) selective_scan_channels(
    const __grid_constant__ SelectiveScanParams p, const __grid_constant__ ScanDeal deal) {
    using Kinds = ScanKinds<Input, kSlots, kOnGrid>;
    extern __shared__ float4 shared_memory[];
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    char *const shared = reinterpret_cast<char *>(shared_memory) + warp * Kinds::kWarpBytes;
    const int cta = blockIdx.x;
    auto take = [&](auto rows, int first_cta, int in_batch, int before) {
        const int index = (cta - first_cta) * kScanWarps + warp, b = index / in_batch;
        if (b < p.batch)
            scan_channels<decltype(rows)>(p, b, before + index % in_batch * decltype(rows)::kChannels, shared);
    };
    if (cta < deal.first_half) take(typename Kinds::Wide{}, 0, deal.wide, 0);
    else if (cta < deal.first_quarter) take(typename Kinds::Half{}, deal.first_half, deal.half, deal.wide * 32);
    else take(typename Kinds::Quarter{}, deal.first_quarter, deal.quarter, deal.wide * 32 + deal.half * 16);
}

}  // namespace shedder
