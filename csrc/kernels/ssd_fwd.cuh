// State-space duality (Mamba-2), forward, on Hopper's tensor cores.
//
//   dt       = clamp(softplus(dt + bias), dt_min, dt_max)
//   h[t,p,n] = exp(dt[t] A) h[t-1,p,n] + dt[t] x[t,p] B[t,n]
//   y[t,p]   = (sum_n C[t,n] h[t,p,n] + D x[t,p]) silu(z[t,p])
//
// In chunks of 64 tokens, with s[t] = log2(e) * sum of dt A from the chunk's first token to t:
//
//   S[i,j] = (C[i] . B[j]) 2^(s[i] - s[j]) dt[j]   for j <= i; dt, which is not negative, as 2^log2(dt)
//   y^T    = (h C^T) 2^s + x^T S^T + D x^T
//   h      = 2^s[63] h + (x 2^(s[63] - s) dt)^T B
//
// A CTA is a warpgroup that multiplies, the consumer, and warps that serve it. The consumer owns one head (64 of its
// channels) and walks along the chunks with h (P x N, fp32) in its registers: h never enters shared memory, since as an
// operand of h C^T it is converted in place. One warp keeps two chunks of C, B, x and z on their way, through barriers
// `full` and `empty` of each stage: boxes of 64 columns by tensor maps (TMA), swizzled as wgmma reads them. One prepares
// decays. Two store y.
//
// What the kernel reads from L2 bounds it: for each chunk and head 32 KB of B and C (N = 128), 8 KB of x. So the CTAs of
// a cluster take neighbouring heads in step, and where these read the same group each brings a share of the rows of B
// and C into the shared memory of all.
//
// A tensor map wants rows and boxes to start at multiples of 16 bytes. B and C that do not (of 32, really) are copied
// first (ssd_align). Of x and z the columns of a map are all elements between two rows, and a box starts at the 8
// columns that its first lies in. The rows of all products here are channels, which know nothing of one another: a first
// channel that lies `first` columns into its box is row `first` of h and y, and what lies behind the 64 columns takes the
// rows before it. Where a token's pitch is no multiple of 16 bytes, rows are 8 tokens apart and a box holds every eighth
// token of a chunk: then row 8 a + b of a tile is token 8 b + a, of all tiles. Sums over tokens do not care; channels,
// which lie otherwise in each of the eight, are moved between lanes.
//
// A cluster takes its heads in rounds, neighbours side by side, so that what they read lies together in L2. What is left
// over after the last full round is taken in parts by several clusters, one after another along the sequence: the first
// before all else, the last after all else, those between in the middle of another head, so that nobody waits. Where
// there are few heads, a cluster takes a segment of its heads instead: it finds the states that the segment would leave
// behind from zeros, waits for those before the segment, leaves what they decay to plus its own, and only then walks
// along its chunks for y. States wait in `carry`. Tickets are drawn in order, so that the cluster waited for runs or has
// run.

#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda.h>
#include <cuda_runtime.h>

#include "kernels/cluster.cuh"
#include "kernels/dependents.cuh"
#include "kernels/ssd_rows.cuh"
#include "kernels/ssd_wgmma.cuh"

namespace shedder {

struct SsdStrides {                                          // in elements
    int64_t batch, time, head;                               // or group
};

// Tensor maps of x or z: (batch, row, column); a row is one token, or the first of 8 tokens.
struct SsdOperand {
    CUtensorMap map[2], rest[2];                             // boxes of 64 columns; of the 8 columns behind them
    int first, head, time;                                   // columns: of the first token, from head to head, ...
    int batch, batches;                                      // columns between batch entries and 0, or 0 and 1
};

struct SsdParams {
    CUtensorMap C, B;                                        // (batch, group, row, state): Input; a share of 64 rows
    SsdOperand x, z;                                         // Input; z where has_z
    bool has_z;
    bool turns;                                              // rows of x and z are 8 tokens apart
    const void *dt;                                          // Input, or float where dt_float
    const float *A, *D, *dt_bias, *initial;                  // all but A may be null; initial as final_states
    const int32_t *runs;                                     // (batch, time), ~run for padding; may be null
    const int32_t *head_to_group;
    void *y;                                                 // (batch, time, head, channel)
    float *final_states;                                     // (batch, head, channel, state)
    float *carry;                                            // states that CTAs leave to others, or to themselves
    int32_t *tickets;                                        // zeros: the next ticket, then whether each state is left
    SsdStrides dt_strides;
    int64_t A_stride, D_head_stride, D_channel_stride, dt_bias_stride;
    float dt_min, dt_max;
    int length, heads, headdim, dstate;
    int tiles;                                               // of 64 channels in a head
    int states;                                              // batch * heads * tiles
    int cluster;                                             // CTAs that take neighbouring states, a unit of them
    int units;                                               // of states; the last may repeat its last state
    int clusters, rounds;                                    // rounds of whole units
    int left, parts;                                         // units left over, and the parts that each is taken in
    int segment_chunks;                                      // where clusters take segments of units; else 0
    bool dt_softplus, dt_float;
};

constexpr int kChunk = 64;

// log(1 + exp(x)), with the small values of very negative x: there the first terms of the series.
__device__ __forceinline__ float ssd_softplus(float x) {
    const float e = exp2_fast(x * 1.4426950408889634f);
    const float series = e * (1.f - e * (1.f / 2 - e * (1.f / 3 - e * (1.f / 4 - e * (1.f / 5)))));
    const float log = 0.6931471805599453f * log2_fast(1.f + e);
    return x > 20.f ? x : e < 0.0625f ? series : log;
}

// Where a CTA stands in the grid. Lies in shared memory: registers are short.
struct SsdPlace {
    int ticket, rank;                                        // of the cluster, and in it
    int part;                                                // that it takes of a unit left over; below 0: none
};

struct SsdPiece {                                            // chunks of one head (of one of its tiles)
    int unit, state, first, last;
    int takes, leaves;                                       // places of the states before and behind; -1: none
};

__device__ __forceinline__ int pieces_of(const SsdParams &p, const SsdPlace &place) {
    const bool interrupts = 0 < place.part && place.part < p.parts - 1;      // a head: then that is two pieces
    return p.rounds + (place.part >= 0) + interrupts;
}

__device__ __forceinline__ SsdPiece piece_of(const SsdParams &p, const SsdPlace &place, int piece) {
    const int chunks = (p.length + kChunk - 1) / kChunk, ticket = place.ticket;
    SsdPiece of{ticket, 0, 0, chunks, -1, -1};
    int takes = -1, leaves = -1;                             // of clusters
    if (p.segment_chunks > 0) {
        of.unit = ticket % p.units;
        of.first = ticket / p.units * p.segment_chunks;
        of.last = min(of.first + p.segment_chunks, chunks);
        takes = ticket - p.units;
        leaves = of.last < chunks ? ticket : -1;
    } else {
        const int part = place.part, between = part < p.parts - 1;
        // The place of the part among the pieces, and where it interrupts the first head.
        const int at = part <= 0 ? 0 : between ? 1 : p.rounds, interrupt = part > 0 && between ? part * chunks / (p.parts - 1) : 0;
        if (part >= 0 && piece == at) {
            of.unit = p.rounds * p.clusters + ticket - part * p.left;
            of.first = part * chunks / p.parts;
            of.last = (part + 1) * chunks / p.parts;
            takes = ticket - p.left;
            leaves = between ? ticket : -1;
        } else {
            const int own = piece - (part >= 0 && piece > at) - (interrupt > 0 && piece > at);
            const int resumed = (p.parts - 2) * p.left + ticket;             // behind the places of parts
            of.unit = own * p.clusters + ticket;
            if (interrupt > 0 && piece == 0) of.last = interrupt, leaves = resumed;
            if (interrupt > 0 && piece == 2) of.first = interrupt, of.unit = ticket, takes = resumed;
        }
    }
    of.state = min(of.unit * p.cluster + place.rank, p.states - 1);
    of.takes = takes < 0 ? -1 : takes * p.cluster + place.rank;
    of.leaves = leaves < 0 ? -1 : leaves * p.cluster + place.rank;
    return of;
}

// Whether all states of a unit read the same B and C.
__device__ __forceinline__ bool is_shared(const SsdParams &p, int unit) {
    const int in_batch = p.heads * p.tiles, first = unit * p.cluster;
    bool same = true;
    for (int rank = 1; rank < p.cluster; ++rank) {
        const int state = min(first + rank, p.states - 1);
        same = same && state / in_batch == first / in_batch
            && p.head_to_group[state % in_batch / p.tiles] == p.head_to_group[first % in_batch / p.tiles];
    }
    return same;
}

// The channels of a state, and how they lie in the boxes of x and z and in the rows of h and y: channel c is row first + c,
// modulo 64.
struct SsdRows {
    int head, first_channel, channels;
    int x, z;                                                // columns of the first channel of the first token
    int first;
    bool rest;                                               // channels lie behind the boxes of 64 columns
    bool moves;                                              // fragments of x and z are moved to their rows
};

template <bool kExtras>
__device__ __forceinline__ SsdRows rows_of(const SsdParams &p, int state) {
    const bool has_z = kExtras && p.has_z;
    const int in_batch = p.heads * p.tiles, batch = state / in_batch, tile = state % in_batch;
    SsdRows rows;
    rows.head = tile / p.tiles;
    rows.first_channel = tile % p.tiles * 64;
    rows.channels = min(p.headdim - rows.first_channel, 64);
    auto column_of = [&](const SsdOperand &from) {
        return from.first + batch * from.batch + rows.head * from.head + rows.first_channel;
    };
    rows.x = column_of(p.x);
    rows.z = has_z ? column_of(p.z) : rows.x;
    rows.moves = kExtras && (p.turns || (rows.x & 7) != (rows.z & 7));
    rows.first = rows.moves ? 0 : rows.x & 7;
    rows.rest = kExtras && p.turns || max(rows.x & 7, rows.z & 7) + rows.channels > 64;
    return rows;
}

// What each token of a chunk contributes, for one head.
struct SsdDecays {
    float s[kChunk];
    float columns[kChunk];                                   // s - log2(dt)
    float anchored[kChunk];                                  // dt 2^(s[e] - s), e the last token of the 16 it is among
    float from_state[kChunk];                                // 2^s
    float to_state[kChunk];                                  // dt 2^(s[63] - s)
    int run[kChunk];                                         // twice the run, plus one if y is shown
    float keep;                                              // 2^s[63]
    float unused[3];
};

constexpr int kStages = 2;
constexpr int kYTaken = 2, kYThere = 3;                      // named barriers of the consumer and who stores y

template <int kStates16, bool kExtras>
struct SsdShared {
    static constexpr int kTiles = (kStates16 + 3) / 4;       // of 64 states
    static constexpr int kOperand = kTiles * kTileBytes;     // B or C
    static constexpr int kStage = 2 * kOperand + (kExtras ? 2 : 1) * kTileBytes;        // C, B, x, z
    static constexpr int kScores = kStages * kStage;         // S
    static constexpr int kY = kScores + kTileBytes;          // y, where z does not leave its tile to it
    static constexpr int kRest = kY + (kExtras ? 0 : kTileBytes);            // of x, z of each stage: the map `rest`
    static constexpr int kDecays = kRest + kStages * (kExtras ? 2 : 1) * kTileRows * 16;
    static constexpr int kBarriers = kDecays + kStages * sizeof(SsdDecays);  // full, empty
    static constexpr int kPlace = kBarriers + kStages * 16;
    static constexpr int kBytes = kPlace + 16 + 1024;          // and room to align the first tile
};

// CTAs of a multiprocessor. Where there are two, the consumer takes registers of the other warps.
template <int kStates16>
constexpr int kSsdCtas = kStates16 <= 8 ? 2 : 1;
// Warps 4 and 5 store y, which is the most work beside the products: on the schedulers of the consumer's warps that have
// the fewest scores. 6 copies, 7 prepares decays.
constexpr int kCopyWarp = 6;
template <bool kExtras>
constexpr int kServantRegisters = kExtras ? 56 : 48;
template <bool kExtras>
constexpr int kConsumerRegisters = kExtras ? 200 : 208;

// Where the producer finds dt of one head.
struct SsdSource {
    float A, bias;                                           // A times log2(e)
    const char *dt;                                          // of the first token
    const int32_t *runs;                                     // of the first token; may be null
};

// dt of two neighbouring tokens in each lane, as given.
template <typename Input>
__device__ __forceinline__ float2 fetch_dt(const SsdParams &p, const SsdSource &source, int chunk, int lane) {
    float raw[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64_t at = min(chunk * kChunk + 2 * lane + i, p.length - 1) * p.dt_strides.time;
        raw[i] = p.dt_float ? reinterpret_cast<const float *>(source.dt)[at]
                            : static_cast<float>(reinterpret_cast<const Input *>(source.dt)[at]);
    }
    return {raw[0], raw[1]};
}

// The decays of a chunk, by one warp.
template <bool kExtras>
__device__ __forceinline__ void prepare_decays(const SsdParams &p, const SsdSource &source, int chunk, int lane,
                                               float2 raw, SsdDecays &to) {
    float dt[2] = {raw.x, raw.y}, decay[2];
    int run[2] = {0, 0};
    bool shown[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int t = chunk * kChunk + 2 * lane + i;
        shown[i] = t < p.length;
        dt[i] += source.bias;
        if (p.dt_softplus) dt[i] = ssd_softplus(dt[i]);
        dt[i] = dt[i] < p.dt_min ? p.dt_min : dt[i];     // comparisons, so that NaN stays NaN
        dt[i] = dt[i] > p.dt_max ? p.dt_max : dt[i];
        if (p.runs != nullptr) {
            run[i] = source.runs[min(t, p.length - 1)];
            shown[i] = shown[i] && run[i] >= 0;
            run[i] = run[i] < 0 ? ~run[i] : run[i];
        }
        dt[i] = shown[i] ? dt[i] : 0.f;
        decay[i] = dt[i] * source.A;
        decay[i] = decay[i] < -160.f ? -160.f : decay[i];        // is 0 all the same, and s keeps its digits
    }
    float sum = decay[0] + decay[1];
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const float other = __shfl_up_sync(0xffffffffu, sum, offset);
        if (lane >= offset) sum += other;
    }
    const float s[2] = {sum - decay[1], sum};
    const float anchor = __shfl_sync(0xffffffffu, sum, lane | 7);
    const float total = __shfl_sync(0xffffffffu, sum, 31);
    const int run_out = __shfl_sync(0xffffffffu, run[1], 31);
    int run_in = 0;                                      // that the state belongs to
    if (p.runs != nullptr && chunk > 0) run_in = source.runs[chunk * kChunk - 1];
    run_in = run_in < 0 ? ~run_in : run_in;
    float from_state[2], to_state[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        from_state[i] = run[i] == run_in ? exp2_fast(s[i]) : 0.f;
        to_state[i] = run[i] == run_out ? exp2_fast(total - s[i]) * dt[i] : 0.f;
    }
    if (kExtras && p.turns) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = turned(2 * lane + i);
            to.s[row] = s[i];
            to.columns[row] = s[i] - log2_fast(dt[i]);
            to.from_state[row] = from_state[i];
            to.to_state[row] = to_state[i];
            to.run[row] = 2 * run[i] + shown[i];
        }
    } else {
        reinterpret_cast<float2 *>(to.s)[lane] = {s[0], s[1]};
        reinterpret_cast<float2 *>(to.columns)[lane] = {s[0] - log2_fast(dt[0]), s[1] - log2_fast(dt[1])};
        reinterpret_cast<float2 *>(to.anchored)[lane] = {exp2_fast(anchor - s[0]) * dt[0],
                                                         exp2_fast(anchor - s[1]) * dt[1]};
        reinterpret_cast<float2 *>(to.from_state)[lane] = {from_state[0], from_state[1]};
        reinterpret_cast<float2 *>(to.to_state)[lane] = {to_state[0], to_state[1]};
        reinterpret_cast<int2 *>(to.run)[lane] = {2 * run[0] + shown[0], 2 * run[1] + shown[1]};
    }
    if (lane == 0) to.keep = run_in == run_out ? exp2_fast(total) : 0.f;
}

// h = keep h + weighted^T B, left on its way.
template <int kStates16, typename Input>
__device__ __forceinline__ void add_to_state(float *h, const uint32_t (&weighted)[4][4], uint64_t B_tile, float keep) {
    constexpr int kTiles = (kStates16 + 3) / 4, kLast = kStates16 - (kTiles - 1) * 4;
#pragma unroll
    for (int i = 0; i < kStates16 * 8; ++i) h[i] *= keep;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            const uint64_t b = later(B_tile, tile * kTileBytes + k * 2048);
            if (tile + 1 < kTiles)
                wgmma_rs<Input, 64, 1>(h + tile * 32, weighted[k], b, true);
            else
                wgmma_rs<Input, kLast * 16, 1>(h + tile * 32, weighted[k], b, true);
        }
    wgmma_commit();
}

// Fragments of x as they enter the state.
template <typename Input>
__device__ __forceinline__ void weigh_for_state(const uint32_t (&x)[4][4], uint32_t (&weighted)[4][4],
                                                const SsdDecays &decays, int q) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float2 of = reinterpret_cast<const float2 *>(decays.to_state)[k * 8 + half * 4 + q];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float2 v = unpack<Input>(x[k][2 * half + i]);
                weighted[k][2 * half + i] = pack<Input>(v.x * of.x, v.y * of.y);
            }
        }
}

// A warp that copies, and one that prepares decays.
template <typename Input, int kStates16, bool kExtras>
__device__ __forceinline__ void produce(const SsdParams &p, const SsdPlace &place, char *shared, uint32_t shared_at) {
    using Shared = SsdShared<kStates16, kExtras>;
    constexpr int kRestBytes = kTileRows * 16;
    const bool copies = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0) == kCopyWarp;
    const int lane = threadIdx.x % 32;
    const bool has_z = kExtras && p.has_z;
    const int turns = kExtras && p.turns ? 8 : 1, remainder = kExtras && p.turns ? p.length % 8 : 1;
    const uint32_t full_at = shared_at + Shared::kBarriers, empty_at = full_at + kStages * 8;
    int stage = 0;
    uint32_t parity = 1;
#pragma unroll 1
    for (int i = 0; i < pieces_of(p, place); ++i) {
        const SsdPiece piece = piece_of(p, place, i);
        const int batch = piece.state / (p.heads * p.tiles), tile = piece.state % (p.heads * p.tiles);
        const int head = tile / p.tiles, group = p.head_to_group[head];
        const bool is_local = p.segment_chunks > 0 && piece.leaves >= 0;
        if (copies) {
            if (lane > 0) continue;
            const SsdRows rows = rows_of<kExtras>(p, piece.state);
            // B and C by shares of rows: all of them, or one that goes to all CTAs of the cluster.
            const bool shared_by_all = is_shared(p, piece.unit);
            const int share = kTileRows / p.cluster, first_share = shared_by_all ? place.rank : 0,
                      last_share = shared_by_all ? place.rank : p.cluster - 1;
            const uint32_t to_all = shared_by_all && p.cluster > 1 ? (1u << p.cluster) - 1 : 0;
#pragma unroll 1
            for (int local = is_local; local >= 0; --local)
#pragma unroll 1
                for (int chunk = piece.first; chunk < piece.last; ++chunk) {
                    const int operands = 1 + (has_z && !local);
                    const uint32_t stage_at = shared_at + stage * Shared::kStage, x_at = stage_at + 2 * Shared::kOperand,
                                   rest_at = shared_at + Shared::kRest + stage * (kExtras ? 2 : 1) * kRestBytes;
                    const uint32_t full = full_at + stage * 8;
                    barrier_wait(empty_at + stage * 8, parity);
                    barrier_arrive_expecting(full, (2 - local) * Shared::kOperand
                                                       + operands * (kTileBytes + rows.rest * kRestBytes));
#pragma unroll 1
                    for (int part = first_share; part <= last_share; ++part)
#pragma unroll
                        for (int t = 0; t < Shared::kTiles; ++t) {
                            const uint32_t to = stage_at + t * kTileBytes + part * share * 128;
                            const int row = chunk * kChunk + part * share;
                            if (!local) copy_box(to, &p.C, t * 64, row, group, batch, full, to_all);
                            copy_box(to + Shared::kOperand, &p.B, t * 64, row, group, batch, full, to_all);
                        }
#pragma unroll 1
                    for (int operand = 0; operand < operands; ++operand) {
                        const SsdOperand &from = operand == 0 ? p.x : p.z;
                        int column = operand == 0 ? rows.x : rows.z;
#pragma unroll 1
                        for (int turn = 0; turn < turns; ++turn) {
                            const bool fewer = turn >= remainder;      // of these tokens than of the first of 8
                            const int row = chunk * (kChunk / turns) + (fewer && p.length < 8);    // 1: none
                            const int entry = batch * from.batches;
                            copy_box(x_at + operand * kTileBytes + turn * 1024, &from.map[fewer], column & ~7, row, entry,
                                     full);
                            if (chunk + 1 < piece.last)      // the next one into L2
                                prefetch_box(&from.map[fewer], column & ~7, row + kChunk / turns, entry);
                            if (rows.rest)
                                copy_box(rest_at + operand * kRestBytes + turn * 128, &from.rest[fewer],
                                         (column & ~7) + 64, row, entry, full);
                            column += from.time;
                        }
                    }
                    if (++stage == kStages) stage = 0, parity ^= 1;
                }
        } else {
            SsdSource source;
            source.A = p.A[head * p.A_stride] * 1.4426950408889634f;
            source.bias = p.dt_bias == nullptr ? 0.f : p.dt_bias[head * p.dt_bias_stride];
            source.dt = static_cast<const char *>(p.dt)
                + (batch * p.dt_strides.batch + head * p.dt_strides.head) * (p.dt_float ? 4 : 2);
            source.runs = p.runs == nullptr ? nullptr : p.runs + batch * int64_t{p.length};
#pragma unroll 1
            for (int local = is_local; local >= 0; --local)
#pragma unroll 1
                for (int chunk = piece.first; chunk < piece.last; ++chunk) {
                    const float2 dt = fetch_dt<Input>(p, source, chunk, lane);
                    barrier_wait(empty_at + stage * 8, parity);
                    prepare_decays<kExtras>(p, source, chunk, lane, dt,
                                            reinterpret_cast<SsdDecays *>(shared + Shared::kDecays)[stage]);
                    __syncwarp();
                    if (lane == 0) barrier_arrive(full_at + stage * 8);
                    if (++stage == kStages) stage = 0, parity ^= 1;
                }
        }
    }
}

// Two warps that store y.
template <typename Input, int kStates16, bool kExtras>
__device__ __forceinline__ void store_y(const SsdParams &p, const SsdPlace &place, char *shared, uint32_t shared_at) {
    using Shared = SsdShared<kStates16, kExtras>;
    unsigned thread = threadIdx.x % 64;
    const int64_t stride = int64_t{p.heads} * p.headdim * 2;
    int stage = 0;
#pragma unroll 1
    for (int i = 0; i < pieces_of(p, place); ++i) {
        const SsdPiece piece = piece_of(p, place, i);
        const SsdRows rows = rows_of<kExtras>(p, piece.state);
        char *y = static_cast<char *>(p.y)
            + (piece.state / (p.heads * p.tiles) * int64_t{p.length} + piece.first * kChunk) * stride
            + (rows.head * p.headdim + rows.first_channel) * 2;
        if (p.segment_chunks > 0 && piece.leaves >= 0) stage = (stage + piece.last - piece.first) % kStages;
#pragma unroll 1
        for (int chunk = piece.first; chunk < piece.last; ++chunk) {
            const char *const from = shared + (kExtras ? stage * Shared::kStage + 2 * Shared::kOperand + kTileBytes
                                                       : Shared::kY);
            asm volatile("" : "+r"(thread));                 // hidden, else addresses fill the registers
            barrier_arrive_at<kYTaken>();
            barrier_sync_at<kYThere>();
            const int count = min(p.length - chunk * kChunk, kChunk);
            if (kExtras && p.turns) store_rows<true>(y, stride, from, rows.first, count, rows.channels, thread);
            else store_rows<false>(y, stride, from, rows.first, count, rows.channels, thread);
            y += kChunk * stride;
            if constexpr (kExtras) {
                __syncwarp();
                if (thread % 32 == 0) barrier_arrive(shared_at + Shared::kBarriers + (kStages + stage) * 8);
            }
            if (++stage == kStages) stage = 0;
        }
    }
}

// kExtras: z, runs or turns may be given.
template <typename Input, int kStates16, bool kExtras>
__global__ void __launch_bounds__(256, kSsdCtas<kStates16>) ssd_fwd(const __grid_constant__ SsdParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Shared = SsdShared<kStates16, kExtras>;
    extern __shared__ char shared_memory[];
    char *const shared = shared_memory + (-shared_address(shared_memory) & 1023);
    const uint32_t shared_at = shared_address(shared), full_at = shared_at + Shared::kBarriers,
                   empty_at = full_at + kStages * 8;
    SsdPlace &place = *reinterpret_cast<SsdPlace *>(shared + Shared::kPlace);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            barrier_init(full_at + i * 8, 2);
            barrier_init(empty_at + i * 8, 4 * p.cluster + (kExtras ? 2 : 0));
        }
        barriers_are_there();
        place.rank = p.cluster > 1 ? cluster_rank() : 0;
        if (place.rank == 0) {
            const int ticket = p.tickets != nullptr ? atomicAdd(p.tickets, 1) : static_cast<int>(blockIdx.x) / p.cluster;
            const int part = ticket < p.left * p.parts ? ticket / p.left : -1;
            for (int other = 0; other < p.cluster; ++other) {
                store_remote(shared_address(&place.ticket), other, ticket);
                store_remote(shared_address(&place.part), other, part);
            }
        }
    }
    if (p.cluster > 1) cluster_sync();
    else __syncthreads();
    wait_for_kernel_before();
    const int role = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    if (role >= 4) {
        if constexpr (kSsdCtas<kStates16> == 2) give_registers<kServantRegisters<kExtras>>();
        if (role < kCopyWarp) store_y<Input, kStates16, kExtras>(p, place, shared, shared_at);
        else produce<Input, kStates16, kExtras>(p, place, shared, shared_at);
        return;
    }
    if constexpr (kSsdCtas<kStates16> == 2) take_registers<kConsumerRegisters<kExtras>>();
    unsigned thread = threadIdx.x;
    const int warp = __shfl_sync(0xffffffffu, thread / 32, 0), lane = threadIdx.x % 32;

    // Fragments: this thread holds rows row0 and row0 + 8 (channels of h and y^T, tokens of S), columns 2 q, 2 q + 1
    // of every 8.
    const int row0 = warp * 16 + lane / 4, q = lane % 4;
    const uint32_t scores_at = shared_at + Shared::kScores;
    for (int i = threadIdx.x; i < kTileBytes / 16; i += 128)
        reinterpret_cast<uint4 *>(shared + Shared::kScores)[i] = {};
    warpgroup_barrier(1);
    // Rows and columns of 8 x 8 blocks for ldmatrix and stmatrix: `down` rows then columns, `across` columns then rows.
    const int block = lane / 8;
    uint32_t x_offset = tile_offset(lane % 8 + 8 * (block >> 1), warp * 32 + (block & 1) * 16);
    auto rest_of = [&](int stage) { return shared_at + Shared::kRest + stage * (kExtras ? 2 : 1) * kTileRows * 16; };
    auto decays_of = [&](int stage) -> const SsdDecays & {
        return reinterpret_cast<const SsdDecays *>(shared + Shared::kDecays)[stage];
    };
    // The state that a CTA leaves, and whether it is there.
    auto carry = [&](int of) { return p.carry + of * int64_t{kStates16 * 8 * 128} + threadIdx.x; };
    auto is_left = [&](int of) { return p.tickets + 1 + of; };
    auto leave = [&](int of) {
        __threadfence();
        warpgroup_barrier(1);
        if (threadIdx.x == 0) release_one(is_left(of));
    };
    auto release = [&](int stage) {                          // to all who copy into it
        __syncwarp();
        if (lane < p.cluster) barrier_arrive_remote(empty_at + stage * 8, lane);
    };
    // The channels of this thread's rows, and their places in states; found anew where they are used: registers are short.
    auto channel_of = [&](const SsdRows &rows, int down) {
        unsigned thread = threadIdx.x;
        asm volatile("" : "+r"(thread));
        return static_cast<int>(thread / 32 * 16 + thread % 32 / 4) + down - rows.first & 63;
    };
    auto exists = [&](const SsdRows &rows, int down) { return channel_of(rows, down) < rows.channels; };
    auto state_row = [&](auto *states, int state, const SsdRows &rows, int down) {
        return states + (int64_t{state / p.tiles} * p.headdim + rows.first_channel + channel_of(rows, down)) * p.dstate
            + threadIdx.x % 4 * 2;
    };
    int stage = 0;
    uint32_t parity = 0;
#pragma unroll 1
    for (int index = 0; index < pieces_of(p, place); ++index) {
        const SsdPiece piece = piece_of(p, place, index);
        const bool local = p.segment_chunks > 0 && piece.leaves >= 0;
        const SsdRows rows = rows_of<kExtras>(p, piece.state);
        // Fragments of x or z: channels by tokens.
        auto load_channels = [&](uint32_t (&to)[4][4], uint32_t tile_at, uint32_t rest_at, int column, int time) {
#pragma unroll
            for (int k = 0; k < 4; ++k) load_transposed(to[k], tile_at + x_offset + k * 2048);
            const int lane = thread % 32;
            if (kExtras && rows.moves) {
                // The 8 channels behind those of this warp, for 32 tokens at a time.
                const uint32_t next_at = warp < 3 ? tile_at + tile_offset(lane, (warp + 1) * 32) : rest_at + lane * 16;
                const int next_step = warp < 3 ? 4096 : 512;
                uint32_t next[2][4];
#pragma unroll
                for (int k = 0; k < 2; ++k) load_transposed(next[k], next_at + k * next_step);
#pragma unroll
                for (int eight = 0; eight < 8; ++eight) {    // tokens
                    uint32_t *const own = to[eight / 2] + eight % 2 * 2;
                    const int by = column + (p.turns ? eight * time : 0) & 7;
                    own[0] = rows_up(own[0], own[1], by, lane);
                    own[1] = rows_up(own[1], next[eight / 4][eight % 4], by, lane);
                }
            } else if (rows.rest && warp == 0) {             // before the first channel: the last ones
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    uint32_t rest[4];
                    load_transposed(rest, rest_at + lane * 16 + k * 512);
#pragma unroll
                    for (int eight = 0; eight < 4; ++eight) {
                        uint32_t &own = to[2 * k + eight / 2][eight % 2 * 2];
                        own = lane / 4 < rows.first ? rest[eight] : own;
                    }
                }
            }
        };
        float h[kStates16 * 8], kept = 1.f;
#pragma unroll
        for (int i = 0; i < kStates16 * 8; ++i) h[i] = 0.f;
        if (local) {
#pragma unroll 1
            for (int chunk = piece.first; chunk < piece.last; ++chunk) {
                const uint32_t B_at = shared_at + stage * Shared::kStage + Shared::kOperand;
                const uint32_t x_at = B_at + Shared::kOperand;
                const SsdDecays &decays = decays_of(stage);
                barrier_wait(full_at + stage * 8, parity);
                uint32_t weighted[4][4];
                load_channels(weighted, x_at, rest_of(stage), rows.x, p.x.time);
                weigh_for_state<Input>(weighted, weighted, decays, q);
                add_to_state<kStates16, Input>(h, weighted, descriptor(B_at), decays.keep);
                kept *= decays.keep;
                wgmma_wait<0>();
                pin(h);
                release(stage);
                if (kExtras && lane == 0 && warp < 2) barrier_arrive(empty_at + stage * 8);  // there is no y to store
                if (++stage == kStages) stage = 0, parity ^= 1;
            }
        }
        // h becomes the state before the piece; a local pass leaves the state behind it.
        auto take_state = [&](auto &&element) {
            constexpr int kCount = kStates16 * 8, kAtOnce = kStates16 <= 8 ? kCount : 16;    // or registers are short
#pragma unroll
            for (int first = 0; first < kCount; first += kAtOnce) {
                float own[kAtOnce];
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) {
                    own[i] = h[first + i];
                    h[first + i] = element(first + i);
                }
                if (local)
#pragma unroll
                    for (int i = 0; i < kAtOnce; ++i)
                        __stcg(carry(piece.leaves) + (first + i) * 128, own[i] + kept * h[first + i]);
                if constexpr (kAtOnce < kCount) asm volatile("" ::: "memory");
            }
        };
        if (piece.takes >= 0) {
            if (threadIdx.x == 0)
                while (acquire(is_left(piece.takes)) == 0) {}
            warpgroup_barrier(1);
            const float *const left = carry(piece.takes);
            take_state([&](int i) { return __ldcg(left + i * 128); });
        } else if (p.initial != nullptr) {
            const float *const initial[2] = {state_row(p.initial, piece.state, rows, 0),
                                             state_row(p.initial, piece.state, rows, 8)};
            const bool there[2] = {exists(rows, 0), exists(rows, 8)};
            take_state([&](int i) {
                const int n = i / 4 * 8 + i % 2;
                return there[i / 2 % 2] && n < p.dstate - 2 * q ? initial[i / 2 % 2][n] : 0.f;
            });
        } else {
            take_state([](int) { return 0.f; });
        }
        if (local) leave(piece.leaves);

        float skip[2] = {0.f, 0.f};
        if (p.D != nullptr)
            for (int i = 0; i < 2; ++i)
                if (exists(rows, 8 * i))
                    skip[i] = p.D[rows.head * p.D_head_stride
                                  + (rows.first_channel + channel_of(rows, 8 * i)) * p.D_channel_stride];

        uint32_t seen = 0;                                       // which of S's elements are not of a later token
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const int row = row0 + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * q + i % 2;
            if (kExtras && p.turns ? turned(column) <= turned(row) : column <= row) seen |= 1u << i;
        }
        uint32_t S_at = scores_at + tile_offset(warp * 16 + lane % 8 + 8 * (block & 1), (block >> 1) * 16);
        float S[32];
        auto begin_scores = [&](int stage) {                 // C B^T of a stage, on its way
            const uint64_t C_tile = descriptor(shared_at + stage * Shared::kStage);
            const uint64_t B_tile = later(C_tile, Shared::kOperand);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kStates16; ++k) {
                const int at = k / 4 * kTileBytes + k % 4 * 32;
                wgmma_ss<Input>(S, later(C_tile, at), later(B_tile, at), k > 0);
            }
            wgmma_commit();
        };
        auto take_scores = [&] {
            barrier_wait(full_at + stage * 8, parity);
            begin_scores(stage);
            wgmma_wait<0>();
            pin(S);
        };
        constexpr bool kEarly = kStates16 <= 8;              // S while the y before leaves; else registers are short
        if constexpr (kEarly) take_scores();
#pragma unroll 1
        for (int left = piece.last - piece.first; left > 0; --left) {
            const uint32_t C_at = shared_at + stage * Shared::kStage, B_at = C_at + Shared::kOperand;
            const uint32_t x_at = B_at + Shared::kOperand;
            const SsdDecays &decays = decays_of(stage);
            // Hidden, else addresses and single bits fill the registers.
            asm volatile("" : "+r"(S_at), "+r"(x_offset), "+r"(thread), "+r"(seen));
            const int row0 = thread / 32 * 16 + thread / 4 % 8, q = thread % 4;
            const uint64_t C_tile = descriptor(C_at), B_tile = descriptor(B_at), S_tile = descriptor(scores_at);
            float y[32];
            if constexpr (!kEarly) take_scores();
            const float s_row[2] = {decays.s[row0], decays.s[row0 + 8]};
            if (kExtras && p.runs != nullptr) {
                const int run[2] = {decays.run[row0] >> 1, decays.run[row0 + 8] >> 1};
#pragma unroll
                for (int i = 0; i < 32; ++i)
                    if (decays.run[i / 4 * 8 + 2 * q + i % 2] >> 1 != run[i / 2 % 2]) S[i] = 0.f;
            }
            auto store_pair = [&](int pair) {
                const float *v = S + pair * 8;
                store_blocks(S_at ^ pair * 32, pack<Input>(v[0], v[1]), pack<Input>(v[2], v[3]), pack<Input>(v[4], v[5]),
                             pack<Input>(v[6], v[7]));
            };
            // 16 columns, some of later tokens than their rows.
            auto weigh_masked = [&](int pair) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float2 of = reinterpret_cast<const float2 *>(decays.columns)[pair * 8 + half * 4 + q];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float &v = S[pair * 8 + half * 4 + i];
                        v *= exp2_fast(s_row[i / 2] - (i % 2 ? of.y : of.x));
                        v = seen >> (pair * 8 + half * 4 + i) & 1 ? v : 0.f;
                    }
                }
            };
            // The columns of this warp's 16 rows, and those before them, whose exponentials fall apart into one for a row
            // and one for a column. The others stay 0.
            auto weigh = [&](auto before) {
                constexpr int kBefore = decltype(before)::value;
#pragma unroll
                for (int pair = 0; pair < kBefore; ++pair) {
                    const float anchor = decays.s[pair * 16 + 15];
                    const float of_row[2] = {exp2_fast(s_row[0] - anchor), exp2_fast(s_row[1] - anchor)};
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const float2 of = reinterpret_cast<const float2 *>(decays.anchored)[pair * 8 + half * 4 + q];
#pragma unroll
                        for (int i = 0; i < 4; ++i)
                            S[pair * 8 + half * 4 + i] *= (i % 2 ? of.y : of.x) * of_row[i / 2];
                    }
                }
                weigh_masked(kBefore);
#pragma unroll
                for (int pair = 0; pair <= kBefore; ++pair) store_pair(pair);
            };
            if (kExtras && p.turns) {
#pragma unroll
                for (int pair = 0; pair < 4; ++pair) weigh_masked(pair);
#pragma unroll
                for (int pair = 0; pair < 4; ++pair) store_pair(pair);
            } else if (warp & 2) {
                if (warp & 1) weigh(std::integral_constant<int, 3>{});
                else weigh(std::integral_constant<int, 2>{});
            } else {
                if (warp & 1) weigh(std::integral_constant<int, 1>{});
                else weigh(std::integral_constant<int, 0>{});
            }
            fence_for_wgmma();

            // h C^T: on its way while x is weighted, or, where registers are too few for both, a few states at a time.
            constexpr bool kAtOnce = kStates16 <= 8;
            constexpr int kBatch = kAtOnce ? kStates16 : 4;
            uint32_t h16[kBatch][4];
            auto add_states = [&](int first) {
#pragma unroll
                for (int k = 0; k < kBatch; ++k)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        h16[k][i] = pack<Input>(h[(first + k) * 8 + 2 * i], h[(first + k) * 8 + 2 * i + 1]);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < kBatch; ++k)
                    wgmma_rs<Input, 64, 0>(
                        y, h16[k], later(C_tile, (first + k) / 4 * kTileBytes + (first + k) % 4 * 32), first + k > 0);
                wgmma_commit();
            };
            add_states(0);
            uint32_t x16[4][4], weighted[4][4];
            if constexpr (kAtOnce) {
                load_channels(x16, x_at, rest_of(stage), rows.x, p.x.time);
                weigh_for_state<Input>(x16, weighted, decays, q);
            }
            wgmma_wait<0>();
            pin(y);
#pragma unroll
            for (int first = kBatch; first < kStates16; first += kBatch) {
                add_states(first);
                wgmma_wait<0>();
                pin(y);
            }
            if constexpr (!kAtOnce) {
                load_channels(x16, x_at, rest_of(stage), rows.x, p.x.time);
                weigh_for_state<Input>(x16, weighted, decays, q);
            }
#pragma unroll
            for (int k = 0; k < 4; ++k)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float2 of = reinterpret_cast<const float2 *>(decays.from_state)[k * 8 + half * 4 + q];
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const float2 v = unpack<Input>(x16[k][2 * half + i]);
                        float *to = y + k * 8 + half * 4 + 2 * i;
                        to[0] = to[0] * of.x + skip[i] * v.x;
                        to[1] = to[1] * of.y + skip[i] * v.y;
                    }
                }
            warpgroup_barrier(1);                            // S is there
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; ++k) wgmma_rs<Input, 64, 0>(y, x16[k], later(S_tile, k * 32), true);
            wgmma_commit();

            // Read now, so that h is not scaled before these products are on their way.
            add_to_state<kStates16, Input>(h, weighted, B_tile, *static_cast<const volatile float *>(&decays.keep));

            wgmma_wait<1>();
            pin(y);
            if constexpr (kEarly) {                          // of the next chunk, or of whatever is there
                if (left > 1) barrier_wait(full_at + (stage ^ 1) * 8, parity ^ stage);
                begin_scores(stage ^ 1);
            }
            if (kExtras && p.has_z) {
                uint32_t z16[4][4];
                load_channels(z16, x_at + kTileBytes, rest_of(stage) + kTileRows * 16, rows.z, p.z.time);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float2 z = unpack<Input>(z16[k][i]);
                        y[k * 8 + 2 * i] *= z.x / (1.f + exp2_fast(-1.4426950408889634f * z.x));
                        y[k * 8 + 2 * i + 1] *= z.y / (1.f + exp2_fast(-1.4426950408889634f * z.y));
                    }
                }
            }
            if (kExtras && p.runs != nullptr) {
#pragma unroll
                for (int i = 0; i < 32; ++i)
                    if (!(decays.run[i / 4 * 8 + 2 * q + i % 2] & 1)) y[i] = 0.f;
            }
            const int y_tile = kExtras ? stage * Shared::kStage + 2 * Shared::kOperand + kTileBytes : Shared::kY;
            barrier_sync_at<kYTaken>();                      // by whom it is stored; S has been read
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {
                const float *v = y + pair * 8;
                store_transposed(shared_at + y_tile + x_offset + pair * 2048, pack<Input>(v[0], v[1]),
                                 pack<Input>(v[2], v[3]), pack<Input>(v[4], v[5]), pack<Input>(v[6], v[7]));
            }
            if constexpr (kExtras) fence_for_wgmma();        // y lies where the next z comes
            barrier_arrive_at<kYThere>();
            wgmma_wait<0>();
            pin(h);
            if constexpr (kEarly) pin(S);
            release(stage);
            if (++stage == kStages) stage = 0, parity ^= 1;
        }
        const SsdPiece ended = piece_of(p, place, index);
        if (ended.leaves >= 0) {
            if (p.segment_chunks > 0) continue;              // what it leaves is there since its local pass
            float *const behind = carry(ended.leaves);
#pragma unroll
            for (int i = 0; i < kStates16 * 8; ++i) __stcg(behind + i * 128, h[i]);
            leave(ended.leaves);
            continue;
        }
        const SsdRows rows_of_h = rows_of<kExtras>(p, ended.state);
#pragma unroll
        for (int down = 0; down < 2; ++down) {
            float *const to = state_row(p.final_states, ended.state, rows_of_h, down * 8);
            if (exists(rows_of_h, down * 8))
#pragma unroll
                for (int i = 0; i < kStates16 * 4; ++i)
                    if (i / 2 * 8 + i % 2 < p.dstate - 2 * q) to[i / 2 * 8 + i % 2] = h[i / 2 * 4 + down * 2 + i % 2];
        }
    }
    if (p.cluster > 1) cluster_sync();                       // while others may still release stages of this CTA
#endif
}

}  // namespace shedder
