// Selective scan, forward, the fast form; selective_scan_fwd.cuh has the recurrence and the form for everything else.
//
// kLanes neighbouring lanes of a warp share kOwn channels and walk along t with h in registers, kStates states of each
// channel in a lane. kSplit warps, a team, share the states of the same tile of channels, for many states and for few
// channels. Time goes by tiles too. In a tile the team
//   1. reads u and delta in pieces of 8 steps of a channel, and puts (delta, delta u) of each step into shared memory;
//   2. walks; lanes exchange the sums over their states, each ends with some steps of one channel, and leaves them in
//      shared memory;
//   3. takes the sums back in pieces, adds D u, multiplies by silu(z), writes.
// B and C of a tile enter shared memory once for the CTA, while it walks through the tile before.
//
// Where there are few channels, the CTAs of a cluster take a segment of the sequence each. A first pass over all
// segments but the last finds the decay and the final state of each, the second starts from what came before.
//
// Three units are close to their limits: MUFU by one ex2 per (t, n), the issue slots by 5 instructions for each (t, n)
// and about 35 for each t, and the path from shared memory to the registers, which carries 4 bytes a lane and cycle
// whether lanes read the same word or not: hence B and C of a 2-byte type packed into one word.

#pragma once

#include <type_traits>

#include <cooperative_groups.h>

#include "kernels/selective_scan_fwd.cuh"
#include "kernels/selective_scan_rows.cuh"

namespace shedder {

// log(1 + exp(x)) = max(x, 0) + log1p(e) with e = exp(-|x|) in (0, 1]; log1p(e) / e by a polynomial, to 1.3e-6 of it:
// enough under the rounding of a 2-byte input. fp32 takes the exact one.
template <typename Input>
__device__ inline float softplus_to(float x) {
    if constexpr (sizeof(Input) == 4) return softplus(x);
    const float e = fast_exp2(-kLog2e * fabsf(x));
    float p = 0.014141016639769077f;
    p = fmaf(p, e, -0.06640177965164185f);
    p = fmaf(p, e, 0.14922384917736053f);
    p = fmaf(p, e, -0.23503859341144562f);
    p = fmaf(p, e, 0.3310944736003876f);
    p = fmaf(p, e, -0.4998696446418762f);
    p = fmaf(p, e, 0.9999987483024597f);
    return fmaf(p, e, fmaxf(x, 0.f));
}

template <typename Input>
__device__ inline float silu_to(float x) {
    if constexpr (sizeof(Input) == 4) return silu(x);
    else return silu_for<Input>(x);
}

// Words of shared memory, 16 bytes at a time.
template <int kWords>
__device__ inline void load_words(float (&to)[kWords], const float *from) {
    static_assert(kWords % 4 == 0);
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
        const float4 v = *reinterpret_cast<const float4 *>(from + i);
        to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
    }
}

// The sums over one lane's states of four steps of its channels become sums over all states: of kKept steps of the
// channel that it holds first, from step column % (kLanes / kOwn) * kKept on. A lane's second channel is the first one
// of the lane kLanes / 2 away.
template <int kLanes, int kOwn>
__device__ inline void exchange(const float (&of)[kOwn][4], int column, float (&sum)[4]) {
#pragma unroll
    for (int t = 0; t < 4; ++t) {
        sum[t] = of[0][t];
        if constexpr (kOwn == 2) sum[t] += __shfl_xor_sync(0xffffffffu, of[1][t], kLanes / 2);
    }
#pragma unroll
    for (int width = kLanes / kOwn / 2, left = 2; width > 0; width /= 2, left /= 2) {
        const bool upper = column & width;
#pragma unroll
        for (int i = 0; i < left; ++i) {
            const float give = upper ? sum[i] : sum[i + left], keep = upper ? sum[i + left] : sum[i];
            sum[i] = keep + __shfl_xor_sync(0xffffffffu, give, width);
        }
    }
}

// B and C of one state and step in shared memory: both 2-byte values in one word, or two floats.
template <typename Input>
struct BCWord {
    using Type = uint32_t;
    static __device__ uint32_t make(const Piece<Input> &B, const Piece<Input> &C, int k) {
        return __byte_perm(B.word[k / 2], C.word[k / 2], k % 2 ? 0x7632 : 0x5410);
    }
    static __device__ float B(const float *at) { return Piece<Input>::low(__float_as_uint(*at)); }
    static __device__ float C(const float *at) { return Piece<Input>::high(__float_as_uint(*at)); }
};
template <>
struct BCWord<float> {
    using Type = float2;
    static __device__ float2 make(const Piece<float> &B, const Piece<float> &C, int k) {
        return make_float2(B.get(k), C.get(k));
    }
    static __device__ float B(const float *at) { return at[0]; }
    static __device__ float C(const float *at) { return at[1]; }
};

template <typename Input_, int kStates_, int kLanes_, int kOwn_, int kSplit_, int kTiles_, int kSteps_>
struct ScanTile {
    using Input = Input_;
    static constexpr int kStates = kStates_;                             // of one lane and channel
    static constexpr int kLanes = kLanes_, kOwn = kOwn_;                 // lanes that share kOwn channels
    static constexpr int kSplit = kSplit_;                               // warps that share the states of a tile
    static constexpr int kTiles = kTiles_;                               // in a CTA
    static constexpr int kSteps = kSteps_;
    static constexpr int kChannels = 32 / kLanes * kOwn;                 // of a tile
    static constexpr int kTeam = 32 * kSplit, kThreads = kTeam * kTiles;
    static constexpr int kSlots = kStates * kLanes * kSplit;             // states there is room for
    static constexpr int kRowPieces = kSteps / kPieceSteps;
    static constexpr int kPieces = (kChannels * kRowPieces + kTeam - 1) / kTeam;     // of a thread, of channels
    static constexpr int kPieceRows = kChannels / kPieces;                           // kPieceRows apart
    static constexpr int kBCRows = kThreads / kRowPieces;                // of B and C that threads bring at a time
    static constexpr int kBCPieces = (kSlots + kBCRows - 1) / kBCRows;
    static constexpr int kKept = 4 * kOwn / kLanes;                      // of four steps, after an exchange
    // What comes next is read before the walk while registers last, after it where the walk needs them.
    static constexpr bool kReadsAhead = kOwn * kStates + kPieces <= 5;
    static constexpr int kUnroll = kOwn * kStates <= 2 ? 2 : 1;          // of 8 steps of the walk
    static_assert(kLanes % kOwn == 0 && kPieceRows * kRowPieces <= kTeam && kThreads % kRowPieces == 0);
    // Words of shared memory. Paddings keep neighbours, and neighbours in time, on different banks.
    static constexpr int kStateWords = sizeof(typename BCWord<Input>::Type) / 4;  // of B and C
    static constexpr int kLaneWords = kStates * kStateWords;             // of a step
    static constexpr int kBlockSteps = kLaneWords % 4 == 0 ? 1 : kLaneWords % 2 == 0 ? 2 : 4;
    static constexpr int kBlock = kBlockSteps * kLaneWords;              // that one lane reads at a time
    static constexpr int kBCRow = kSlots * kStateWords;
    static constexpr int kBCPiece = kPieceSteps * kBCRow + (kRowPieces >= 8 ? 4 : 8);
    static constexpr int kBCTile = kRowPieces * kBCPiece;
    static constexpr int kStepPiece = kRowPieces >= 8 ? 20 : kRowPieces == 4 ? 24 : 16;
    static constexpr int kStepRow = kRowPieces * kStepPiece + 4;
    static constexpr int kSumPiece = kRowPieces >= 8 ? 12 : 8;
    static constexpr int kSumRow = kRowPieces * kSumPiece + 4;
    static constexpr int kTileWords = kChannels * (kStepRow + kSplit * kSumRow);
    static constexpr int kSharedBytes = 4 * (2 * kBCTile + kTiles * kTileWords);
};

// What a CTA does: its channels of batch entry b begin with `first`. kAligned: all rows lie on the 16-byte grid, steps
// adjacent.
template <typename Tile, bool kAligned, bool kSegmented>
__device__ __forceinline__ void scan_tiles(const SelectiveScanParams &p, const ScanTileAccess &access, int64_t b,
                                           int first) {
    using Input = typename Tile::Input;
    using Word = BCWord<Input>;
    constexpr int kStates = Tile::kStates, kLanes = Tile::kLanes, kOwn = Tile::kOwn, kSplit = Tile::kSplit;
    constexpr int kSteps = Tile::kSteps, kTeam = Tile::kTeam, kPieces = Tile::kPieces, kKept = Tile::kKept;
    constexpr int kChannels = Tile::kChannels, kStepRow = Tile::kStepRow, kSumRow = Tile::kSumRow;
    constexpr int kBCPieces = Tile::kBCPieces, kBCTile = Tile::kBCTile;
    extern __shared__ float4 shared_memory[];
    const int team = threadIdx.x / kTeam, member = threadIdx.x % kTeam;
    const int part = member / 32, row = threadIdx.x % 32 / kLanes, column = threadIdx.x % kLanes;
    float *const BC_tiles = reinterpret_cast<float *>(shared_memory);             // [2][kRowPieces][kBCPiece]
    float *const step_rows = BC_tiles + 2 * kBCTile + team * Tile::kTileWords;
    float *const sum_rows = step_rows + kChannels * kStepRow;                     // [kSplit][kChannels][kSumRow]

    const int first_channel = first + team * kChannels, last = p.channels - 1;
    int from = 0, length = p.length;                         // the steps of this CTA
    if constexpr (kSegmented) {
        const int tiles = (p.length + kSteps - 1) / kSteps, share = (tiles + gridDim.x - 1) / gridDim.x * kSteps;
        from = min(static_cast<int>(blockIdx.x) * share, p.length);
        length = min(from + share, p.length);
    }
    auto team_barrier = [&] {
        if constexpr (kSplit == 1) __syncwarp();
        else if constexpr (Tile::kTiles == 1) __syncthreads();
        else asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(kTeam) : "memory");
    };

    wait_for_kernel_before();

    // ---- B and C: each thread brings pieces of rows, kBCRows apart
    const Access BC_access = kAligned ? Access::kVector : access.BC;
    const bool BC_time_first = BC_access != Access::kStrided;
    const int BC_state = BC_time_first ? threadIdx.x / Tile::kRowPieces : threadIdx.x % Tile::kBCRows;
    const int BC_step = (BC_time_first ? threadIdx.x % Tile::kRowPieces : threadIdx.x / Tile::kBCRows) * kPieceSteps;
    const int64_t B_time = kAligned ? 1 : p.B_strides.time, C_time = kAligned ? 1 : p.C_strides.time;
    Piece<Input> B_next[kBCPieces], C_next[kBCPieces];
    auto BC_row_of = [&](const void *tensor, const Strides4 &s) {                 // of row 0 in the first tile
        return static_cast<const Input *>(tensor) + b * s.batch + BC_state * s.state
            + (from + BC_step) * (kAligned ? 1 : s.time);
    };
    auto read_BC = [&](const Input *B_at, const Input *C_at, int left) {
        auto all = [&](auto read_one) {
#pragma unroll
            for (int i = 0; i < kBCPieces; ++i) {
                if (BC_state + i * Tile::kBCRows >= p.dstate) continue;
                B_next[i] = read_one(B_at + i * Tile::kBCRows * p.B_strides.state, B_time);
                C_next[i] = read_one(C_at + i * Tile::kBCRows * p.C_strides.state, C_time);
            }
        };
        if (kAligned && left >= kSteps)
            all([](const Input *from, int64_t) { return read_whole_piece(from); });
        else
            all([&](const Input *from, int64_t time) { return read_piece(from, time, left - BC_step, BC_access); });
    };
    auto put_BC = [&](float *tile) {
#pragma unroll
        for (int i = 0; i < kBCPieces; ++i) {
            const int n = BC_state + i * Tile::kBCRows;
            if (n >= p.dstate) continue;
            constexpr int kBlockSteps = Tile::kBlockSteps;
            float *const to = tile + BC_step / kPieceSteps * Tile::kBCPiece + n / kStates * Tile::kBlock
                + n % kStates * Tile::kStateWords;
#pragma unroll
            for (int k = 0; k < kPieceSteps; ++k)
                *reinterpret_cast<typename Word::Type *>(to + k / kBlockSteps * kBlockSteps * Tile::kBCRow
                                                         + k % kBlockSteps * Tile::kLaneWords) =
                    Word::make(B_next[i], C_next[i], k);
        }
    };

    // ---- u, delta, z, y: pieces of this team's channels
    const Access row_access = kAligned ? Access::kVector : access.rows;
    const bool time_first = row_access != Access::kStrided;
    const int piece_channel = time_first ? member / Tile::kRowPieces : member % Tile::kPieceRows;
    const int piece_step = (time_first ? member % Tile::kRowPieces : member / Tile::kPieceRows) * kPieceSteps;
    const bool has_piece = piece_channel < Tile::kPieceRows && piece_step < kSteps;
    bool there[kPieces];
    float bias[kPieces], skip[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
        const int64_t c = first_channel + piece_channel + i * Tile::kPieceRows;
        there[i] = has_piece && c <= last;
        bias[i] = there[i] && p.delta_bias != nullptr ? p.delta_bias[c * p.delta_bias_stride] : 0.f;
        skip[i] = there[i] && p.D != nullptr ? p.D[c * p.D_stride] : 0.f;
    }
    auto time_of = [&](const auto &s) { return kAligned ? int64_t{1} : s.time; };
    auto first_of = [&](const void *tensor, const Strides3 &s) {                  // of piece 0 in the first tile
        return static_cast<const Input *>(tensor) + b * s.batch + (first_channel + piece_channel) * s.channel
            + (from + piece_step) * time_of(s);
    };
    auto read = [&](Piece<Input> (&to)[kPieces], const Input *at, const Strides3 &s, int left) {
        auto all = [&](auto read_one) {
#pragma unroll
            for (int i = 0; i < kPieces; ++i)
                if (there[i]) to[i] = read_one(at + i * Tile::kPieceRows * s.channel);
        };
        if (kAligned && left >= kSteps)                      // one branch for all
            all([](const Input *from) { return read_whole_piece(from); });
        else
            all([&](const Input *from) { return read_piece(from, time_of(s), left - piece_step, row_access); });
    };
    Piece<Input> u_next[kPieces] = {}, delta_next[kPieces] = {};

    // ---- the state, of channels `first` and, where a lane has two, `second`
    const int first_row = kOwn * row + (kOwn == 2 ? column / (kLanes / 2) : 0);
    auto row_of = [&](int j) { return j == 0 ? first_row : first_row ^ 1; };
    const int first_state = (part * kLanes + column) * kStates;
    float A[kOwn][kStates], h[kOwn][kStates];
#pragma unroll
    for (int j = 0; j < kOwn; ++j)
#pragma unroll
        for (int i = 0; i < kStates; ++i) {
            const int64_t c = min(first_channel + row_of(j), last);
            const int n = first_state + i;
            A[j][i] = n < p.dstate ? p.A[c * p.A_channel_stride + n * p.A_state_stride] * kLog2e : 0.f;
            h[j][i] = 0.f;
        }
    auto state_at = [&](int j, int i) {                      // in (batch, channel, state); negative: not there
        const int c = first_channel + row_of(j), n = first_state + i;
        return c <= last && n < p.dstate ? (b * p.channels + c) * p.dstate + n : int64_t{-1};
    };

    if (p.dstate != Tile::kSlots) {                          // zeros for states not there
        for (int i = threadIdx.x; i < 2 * kBCTile; i += Tile::kThreads) BC_tiles[i] = 0.f;
        __syncthreads();
    }

    float delta_sum[kOwn] = {};
    // One pass over the steps of this CTA. Without output it only carries the state and adds up delta.
    auto pass = [&](auto with_output) {
        constexpr bool kOutput = decltype(with_output)::value;
        const Input *u_at = first_of(p.u, p.u_strides), *delta_at = first_of(p.delta, p.delta_strides);
        const Input *z_at = first_of(p.z, p.z_strides);
        const Input *B_at = BC_row_of(p.B, p.B_strides), *C_at = BC_row_of(p.C, p.C_strides);
        Input *y_at = const_cast<Input *>(first_of(p.y, p.y_strides));
        read_BC(B_at, C_at, length - from);
        read(u_next, u_at, p.u_strides, length - from);
        read(delta_next, delta_at, p.delta_strides, length - from);
        put_BC(BC_tiles);
        int parity = 0;
        for (int start = from; start < length; start += kSteps, parity ^= 1) {
            const int left = length - start;
            float d[kPieces][kPieceSteps];
#pragma unroll
            for (int i = 0; i < kPieces; ++i)
#pragma unroll
                for (int k = 0; k < kPieceSteps; ++k) d[i][k] = delta_next[i].get(k) + bias[i];
            if (p.delta_softplus)                            // one branch for all: their latencies overlap
#pragma unroll
                for (int i = 0; i < kPieces; ++i)
#pragma unroll
                    for (int k = 0; k < kPieceSteps; ++k) d[i][k] = softplus_to<Input>(d[i][k]);
            if (left < kSteps)
#pragma unroll
                for (int i = 0; i < kPieces; ++i)
#pragma unroll
                    for (int k = 0; k < kPieceSteps; ++k)
                        if (piece_step + k >= left) d[i][k] = 0.f;     // the state passes by
            Piece<Input> u[kPieces], z[kPieces] = {};
#pragma unroll
            for (int i = 0; i < kPieces; ++i) {
                u[i] = u_next[i];
                if (!has_piece) continue;
                float4 *to = reinterpret_cast<float4 *>(step_rows + (piece_channel + i * Tile::kPieceRows) * kStepRow
                                                        + piece_step / kPieceSteps * Tile::kStepPiece);
#pragma unroll
                for (int k = 0; k < kPieceSteps; k += 2)
                    to[k / 2] = make_float4(d[i][k], d[i][k] * u[i].get(k), d[i][k + 1], d[i][k + 1] * u[i].get(k + 1));
            }
            __syncthreads();                                 // this tile of B and C, and the other team members' steps
            const bool more = left > kSteps;
            auto read_next = [&] {
                if (kOutput && p.z != nullptr) read(z, z_at, p.z_strides, left);
                if (!more) return;
                u_at += kSteps * time_of(p.u_strides);
                delta_at += kSteps * time_of(p.delta_strides);
                B_at += kSteps * B_time;
                C_at += kSteps * C_time;
                read(u_next, u_at, p.u_strides, left - kSteps);
                read(delta_next, delta_at, p.delta_strides, left - kSteps);
                read_BC(B_at, C_at, left - kSteps);
            };
            if (Tile::kReadsAhead) read_next();

            const int steps = min(kSteps, left);
            const float *step_at = step_rows + first_row * kStepRow;
            const int to_second = kOwn == 2 ? (row_of(1) - first_row) * kStepRow : 0;
            const float *tile_at = BC_tiles + parity * kBCTile + (part * kLanes + column) * Tile::kBlock;
            float *sum_at = sum_rows + (part * kChannels + first_row) * kSumRow + column % (kLanes / kOwn) * kKept;
#pragma unroll Tile::kUnroll
            for (int s = 0; s < steps; s += kPieceSteps) {
                float4 pair[kPieceSteps / 2][kOwn];          // (delta, delta u) of two steps
                float decay[kPieceSteps][kOwn][kStates];
                float BC[kPieceSteps / Tile::kBlockSteps][Tile::kBlock];
                float sums[2][kOwn][4];                      // of four steps
                auto take = [&](int q) {                     // what does not depend on h
#pragma unroll
                    for (int j = 0; j < kOwn; ++j)
                        pair[q][j] = *reinterpret_cast<const float4 *>(step_at + j * to_second + 4 * q);
#pragma unroll
                    for (int t = 2 * q; t < 2 * q + 2; ++t) {
                        if (t % Tile::kBlockSteps == 0)
                            load_words(BC[t / Tile::kBlockSteps], tile_at + t * Tile::kBCRow);
#pragma unroll
                        for (int j = 0; j < kOwn; ++j)
#pragma unroll
                            for (int i = 0; i < kStates; ++i)
                                decay[t][j][i] = fast_exp2((t % 2 ? pair[q][j].z : pair[q][j].x) * A[j][i]);
                    }
                };
                auto update = [&](int t) {
                    const float *const words = BC[t / Tile::kBlockSteps] + t % Tile::kBlockSteps * Tile::kLaneWords;
#pragma unroll
                    for (int j = 0; j < kOwn; ++j) {
                        const float input = t % 2 ? pair[t / 2][j].w : pair[t / 2][j].y;
                        float y = 0.f;
#pragma unroll
                        for (int i = 0; i < kStates; ++i) {
                            const float *const word = words + i * Tile::kStateWords;
                            h[j][i] = fmaf(decay[t][j][i], h[j][i], input * Word::B(word));
                            if constexpr (kOutput)
                                y = i == 0 ? Word::C(word) * h[j][0] : fmaf(Word::C(word), h[j][i], y);
                        }
                        sums[t / 4][j][t % 4] = y;
                        if constexpr (!kOutput) delta_sum[j] += t % 2 ? pair[t / 2][j].z : pair[t / 2][j].x;
                    }
                };
                auto finish = [&](int half) {
                    if constexpr (!kOutput) return;
                    float sum[4];
                    exchange<kLanes, kOwn>(sums[half], column, sum);
                    float *const to = sum_at + 4 * half;
                    if constexpr (kKept == 1) *to = sum[0];
                    else if constexpr (kKept == 2) *reinterpret_cast<float2 *>(to) = make_float2(sum[0], sum[1]);
                    else *reinterpret_cast<float4 *>(to) = make_float4(sum[0], sum[1], sum[2], sum[3]);
                };
                // Ahead of what depends on h, and sums behind it, so that ptxas lets their latencies overlap.
                take(0);
#pragma unroll
                for (int q = 0; q < kPieceSteps / 2; ++q) {
                    if (q + 1 < kPieceSteps / 2) take(q + 1);
                    if (q == 2) finish(0);
                    update(2 * q);
                    update(2 * q + 1);
                }
                finish(1);
                step_at += Tile::kStepPiece;
                tile_at += Tile::kBCPiece;
                sum_at += Tile::kSumPiece;
            }
            if (!Tile::kReadsAhead) read_next();
            team_barrier();

            if constexpr (kOutput) {
#pragma unroll
                for (int i = 0; i < kPieces; ++i) {
                    if (!there[i]) continue;
                    float *const sum = sum_rows + (piece_channel + i * Tile::kPieceRows) * kSumRow
                        + piece_step / kPieceSteps * Tile::kSumPiece;
                    float y[kPieceSteps];
                    load_words(y, sum);
#pragma unroll
                    for (int other = 1; other < kSplit; ++other) {
                        float more_y[kPieceSteps];
                        load_words(more_y, sum + other * kChannels * kSumRow);
#pragma unroll
                        for (int k = 0; k < kPieceSteps; ++k) y[k] += more_y[k];
                    }
#pragma unroll
                    for (int k = 0; k < kPieceSteps; ++k) y[k] = fmaf(skip[i], u[i].get(k), y[k]);
                    if (p.z != nullptr)
#pragma unroll
                        for (int k = 0; k < kPieceSteps; ++k) y[k] *= silu_to<Input>(z[i].get(k));
                    if (row_access == Access::kShifted) {                            // written below, by neighbours
#pragma unroll
                        for (int k = 0; k < kPieceSteps; k += 4)
                            *reinterpret_cast<float4 *>(sum + k) = make_float4(y[k], y[k + 1], y[k + 2], y[k + 3]);
                    } else {
                        Input *const to = y_at + i * Tile::kPieceRows * p.y_strides.channel;
                        if (kAligned && left >= kSteps) write_whole_piece(to, y);
                        else write_piece(to, time_of(p.y_strides), left - piece_step, row_access, y);
                    }
                }
                if (row_access == Access::kShifted) {
                    team_barrier();
                    const int count = min(kChannels, p.channels - first_channel);
                    for (int c = member / 16; c < count; c += kTeam / 16) {          // half a warp a row
                        Input *row_at = static_cast<Input *>(p.y) + b * p.y_strides.batch
                            + (first_channel + c) * p.y_strides.channel + start;
                        write_row<Tile::kSumPiece>(row_at, sum_rows + c * kSumRow, steps, member % 16);
                    }
                    team_barrier();
                }
                y_at += kSteps * time_of(p.y_strides);
                z_at += kSteps * time_of(p.z_strides);
            }
            if (more) put_BC(BC_tiles + (parity ^ 1) * kBCTile);
        }
    };

    auto start_state = [&] {
#pragma unroll
        for (int j = 0; j < kOwn; ++j)
#pragma unroll
            for (int i = 0; i < kStates; ++i) {
                const int64_t at = state_at(j, i);
                h[j][i] = at < 0 || p.initial_state == nullptr ? 0.f : p.initial_state[at];
            }
    };
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900           // which have clusters
    if constexpr (kSegmented) {
        // The same thread of every CTA of the cluster holds the same channels and states: it leaves there what its
        // segment does to them, starting from zero, and reads what those before did.
        namespace cg = cooperative_groups;
        const cg::cluster_group cluster = cg::this_cluster();
        if (blockIdx.x + 1 < gridDim.x) pass(std::false_type{});
        __syncthreads();
        float *const effect = BC_tiles + threadIdx.x;        // [decay, state][j][i], a thread beside the other
        constexpr int kHalf = kOwn * kStates * Tile::kThreads;
        static_assert(2 * kHalf <= 2 * kBCTile);
#pragma unroll
        for (int j = 0; j < kOwn; ++j)
#pragma unroll
            for (int i = 0; i < kStates; ++i) {
                effect[(j * kStates + i) * Tile::kThreads] = fast_exp2(delta_sum[j] * A[j][i]);
                effect[kHalf + (j * kStates + i) * Tile::kThreads] = h[j][i];
            }
        cluster.sync();
        start_state();
        for (unsigned before = 0; before < blockIdx.x; ++before) {
            const float *theirs = cluster.map_shared_rank(effect, before);
#pragma unroll
            for (int j = 0; j < kOwn; ++j)
#pragma unroll
                for (int i = 0; i < kStates; ++i)
                    h[j][i] = fmaf(theirs[(j * kStates + i) * Tile::kThreads], h[j][i],
                                   theirs[kHalf + (j * kStates + i) * Tile::kThreads]);
        }
        cluster.sync();
        for (int i = threadIdx.x; i < 2 * kBCTile; i += Tile::kThreads) BC_tiles[i] = 0.f;
        __syncthreads();
    } else
#endif
    {
        start_state();
    }
    pass(std::true_type{});

    if (p.final_state == nullptr || (kSegmented && blockIdx.x + 1 < gridDim.x)) return;
#pragma unroll
    for (int j = 0; j < kOwn; ++j)
#pragma unroll
        for (int i = 0; i < kStates; ++i)
            if (const int64_t at = state_at(j, i); at >= 0) p.final_state[at] = h[j][i];
}

template <typename Tile, int kMinBlocks, bool kAligned, bool kSegmented>
__global__ void __launch_bounds__(Tile::kThreads, kMinBlocks)
selective_scan_tiled(const __grid_constant__ SelectiveScanParams p, const __grid_constant__ ScanTileAccess access) {
    const int cta = kSegmented ? blockIdx.y : blockIdx.x;    // x has room for many, but clusters lie along it
    scan_tiles<Tile, kAligned, kSegmented>(p, access, blockIdx.z, cta * Tile::kTiles * Tile::kChannels);
}

// Of each batch entry the first channels in `wide` CTAs of many, the others in `thin` ones of few: whole rounds of the
// multiprocessors by the former, what is left over by CTAs that do less for each scheduler.
template <typename Wide, typename Thin, int kMinBlocks, bool kAligned>
__global__ void __launch_bounds__(Wide::kThreads, kMinBlocks)
selective_scan_two_tiles(const __grid_constant__ SelectiveScanParams p, const __grid_constant__ ScanTileAccess access,
                         int wide, int thin) {
    static_assert(Wide::kThreads == Thin::kThreads);
    constexpr int kWide = Wide::kTiles * Wide::kChannels, kThin = Thin::kTiles * Thin::kChannels;
    const int cta = blockIdx.x, others = cta - wide * p.batch;
    if (others < 0) scan_tiles<Wide, kAligned, false>(p, access, cta / wide, cta % wide * kWide);
    else scan_tiles<Thin, kAligned, false>(p, access, others / thin, wide * kWide + others % thin * kThin);
}

}  // namespace shedder
