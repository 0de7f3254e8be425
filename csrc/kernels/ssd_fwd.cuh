// State-space duality (Mamba-2), forward, on Hopper's tensor cores.
//
//   dt       = clamp(softplus(dt + bias), dt_min, dt_max)
//   h[t,p,n] = exp(dt[t] A) h[t-1,p,n] + dt[t] x[t,p] B[t,n]
//   y[t,p]   = (sum_n C[t,n] h[t,p,n] + D x[t,p]) silu(z[t,p])
//
// In chunks of 64 tokens, with s[t] = log2(e) * sum of dt A from the chunk's first token to t:
//
//   S[i,j] = (C[i] . B[j]) 2^(s[i] - s[j]) dt[j]   for j <= i
//   y^T    = (h C^T) 2^s + x^T S^T + D x^T
//   h      = 2^s[63] h + (x 2^(s[63] - s) dt)^T B
//
// A CTA is a warpgroup that multiplies, the consumer, and four warps that serve it. The consumer owns one head (64 of
// its channels) and walks along the chunks with h (P x N, fp32) in its registers: h never enters shared memory, since
// as an operand of h C^T it is converted in place. One warp keeps two chunks of C, B, x, z and decays on their way,
// through barriers `full` and `empty` of each stage: boxes of 64 columns by tensor maps (TMA), swizzled as wgmma reads
// them. One shifts rows that have to be, once they have `landed`. Two store y.
//
// A tensor map wants rows and boxes to start at multiples of 16 bytes. B and C that do not are copied first
// (ssd_align). Of x and z the columns of a map are all elements between two rows; a box starts at the 8 columns that
// its first lies in, and what it brought is shifted. Where a token's pitch is no multiple of 16 bytes, rows are 8
// tokens apart and a box holds every eighth token of a chunk: then row 8 a + b of a tile is token 8 b + a, of all
// tiles. Sums over tokens do not care.
//
// A CTA takes the heads of its ticket in rounds, neighbours side by side, so that what they read lies together in L2.
// What is left over after the last full round is taken in halves: some CTAs take the first half of such a head before
// all else and leave the state behind it in `carry`, as many others take the second half after all else: nobody waits.
// Where there are few heads, a CTA takes a segment of one head instead: it finds the state that the segment would leave
// behind from zeros, waits for the state before the segment, leaves what that decays to plus its own, and only then
// walks along its chunks for y. Tickets are drawn in order, so that the CTA waited for runs or has run.

#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda.h>
#include <cuda_runtime.h>

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
    CUtensorMap C, B;                                        // (batch, group, row of a chunk, state): Input
    SsdOperand x, z;                                         // Input; z where has_z
    bool has_z;
    bool turns;                                              // rows of x and z are 8 tokens apart
    bool shifts;                                             // rows of x or z do not start at multiples of 16 bytes
    const void *dt;                                          // Input, or float where dt_float
    const float *A, *D, *dt_bias, *initial;                  // all but A may be null; initial as final_states
    const int32_t *runs;                                     // (batch, time), ~run for padding; may be null
    const int32_t *head_to_group;
    void *y;                                                 // (batch, time, head, channel)
    float *final_states;                                     // (batch, head, channel, state)
    float *carry;                                            // the state that each CTA leaves to another
    int32_t *tickets;                                        // zeros: the next ticket, then whether each state is left
    SsdStrides dt_strides;
    int64_t A_stride, D_head_stride, D_channel_stride, dt_bias_stride;
    float dt_min, dt_max;
    int length, heads, headdim, dstate;
    int tiles;                                               // of 64 channels in a head
    int states;                                              // batch * heads * tiles
    int ctas, rounds, halved;                                // rounds of whole heads; heads taken in halves after them
    int segment_chunks;                                      // where CTAs take segments of heads; else 0
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

struct SsdPiece {                                            // chunks of one head (of one of its tiles)
    int state, first, last;
};

__device__ __forceinline__ int pieces_of(const SsdParams &p, int ticket) {
    return (ticket < p.halved) + p.rounds + (ticket >= p.ctas - p.halved);
}

__device__ __forceinline__ SsdPiece piece_of(const SsdParams &p, int ticket, int piece) {
    const int chunks = (p.length + kChunk - 1) / kChunk;
    if (p.segment_chunks > 0) {
        const int first = ticket / p.states * p.segment_chunks;
        return {ticket % p.states, first, min(first + p.segment_chunks, chunks)};
    }
    const int round = piece - (ticket < p.halved);
    if (round < 0) return {p.rounds * p.ctas + ticket, 0, chunks / 2};
    if (round < p.rounds) return {round * p.ctas + ticket, 0, chunks};
    return {p.rounds * p.ctas + ticket - (p.ctas - p.halved), chunks / 2, chunks};
}

// The CTA that leaves the state which the CTA of a ticket waits for.
__device__ __forceinline__ int before(const SsdParams &p, int ticket) {
    return ticket - (p.segment_chunks > 0 ? p.states : p.ctas - p.halved);
}

// What each token of a chunk contributes, for one head; two neighbouring rows in each float4.
struct SsdDecays {
    float4 scores[kChunk / 2];                               // s, s, dt, dt
    float4 states[kChunk / 2];                               // 2^s, 2^s; dt 2^(s[63] - s) twice
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
    static constexpr int kBarriers = kDecays + kStages * sizeof(SsdDecays);  // full, empty, landed
    static constexpr int kTicket = kBarriers + kStages * 24;
    static constexpr int kBytes = kTicket + 16 + 1024;          // and room to align the first tile
};

// CTAs of a multiprocessor. Where there are two, the consumer takes registers of the other warps.
template <int kStates16>
constexpr int kSsdCtas = kStates16 <= 8 ? 2 : 1;
constexpr int kServantRegisters = 40, kConsumerRegisters = 216;

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
    if (p.turns) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = turned(2 * lane + i), at = row / 2 * 4 + row % 2;
            float *const scores = reinterpret_cast<float *>(to.scores) + at;
            float *const states = reinterpret_cast<float *>(to.states) + at;
            scores[0] = s[i];
            scores[2] = dt[i];
            states[0] = from_state[i];
            states[2] = to_state[i];
            to.run[row] = 2 * run[i] + shown[i];
        }
    } else {
        to.scores[lane] = {s[0], s[1], dt[0], dt[1]};
        to.states[lane] = {from_state[0], from_state[1], to_state[0], to_state[1]};
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

// A warp that copies and prepares decays, and one that shifts rows which have to be.
template <typename Input, int kStates16, bool kExtras>
__device__ __forceinline__ void produce(const SsdParams &p, int ticket, char *shared, uint32_t shared_at) {
    using Shared = SsdShared<kStates16, kExtras>;
    constexpr int kRestBytes = kTileRows * 16;
    const bool copies = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0) == 4;
    const int lane = threadIdx.x % 32;
    const int chunks = (p.length + kChunk - 1) / kChunk;
    const bool has_z = kExtras && p.has_z;
    const int turns = p.turns ? 8 : 1, remainder = p.turns ? p.length % 8 : 1;
    const uint32_t full_at = shared_at + Shared::kBarriers, empty_at = full_at + kStages * 8,
                   landed_at = p.shifts ? empty_at + kStages * 8 : full_at;
    int stage = 0;
    uint32_t parity = 1;
    const int pieces = pieces_of(p, ticket);
#pragma unroll 1
    for (int i = 0; i < pieces; ++i) {
        const SsdPiece piece = piece_of(p, ticket, i);
        const int batch = piece.state / (p.heads * p.tiles), tile = piece.state % (p.heads * p.tiles);
        const int head = tile / p.tiles, group = p.head_to_group[head], first_channel = tile % p.tiles * 64;
        SsdSource source;
        source.A = p.A[head * p.A_stride] * 1.4426950408889634f;
        source.bias = p.dt_bias == nullptr ? 0.f : p.dt_bias[head * p.dt_bias_stride];
        source.dt = static_cast<const char *>(p.dt)
            + (batch * p.dt_strides.batch + head * p.dt_strides.head) * (p.dt_float ? 4 : 2);
        source.runs = p.runs == nullptr ? nullptr : p.runs + batch * int64_t{p.length};
        auto column_of = [&](const SsdOperand &from) {       // of the first token
            return from.first + batch * from.batch + head * from.head + first_channel;
        };
        auto has_rest = [&](const SsdOperand &from) {        // whether rows reach beyond the box of 64 columns
            return p.shifts && (p.turns || (column_of(from) & 7) + min(p.headdim - first_channel, 64) > 64);
        };
#pragma unroll 1
        for (int local = p.segment_chunks > 0 && piece.last < chunks; local >= 0; --local)
#pragma unroll 1
            for (int chunk = piece.first; chunk < piece.last; ++chunk) {
                const int operands = 1 + (has_z && !local);
                const uint32_t stage_at = stage * Shared::kStage, x_at = stage_at + 2 * Shared::kOperand,
                               rest_at = Shared::kRest + stage * (kExtras ? 2 : 1) * kRestBytes;
                if (copies) {
                    const float2 dt = fetch_dt<Input>(p, source, chunk, lane);
                    barrier_wait(empty_at + stage * 8, parity);
                    if (lane == 0) {
                        const uint32_t landed = landed_at + stage * 8;
                        barrier_expect(landed, (2 - local) * Shared::kOperand + operands * kTileBytes
                                                   + (has_rest(p.x) + (operands == 2 && has_rest(p.z))) * kRestBytes);
                        if (p.shifts) barrier_arrive(landed);
#pragma unroll
                        for (int t = 0; t < Shared::kTiles; ++t) {
                            const uint32_t to = shared_at + stage_at + t * kTileBytes;
                            if (!local) copy_box(to, &p.C, t * 64, chunk * kChunk, group, batch, landed);
                            copy_box(to + Shared::kOperand, &p.B, t * 64, chunk * kChunk, group, batch, landed);
                        }
#pragma unroll 1
                        for (int operand = 0; operand < operands; ++operand) {
                            const SsdOperand &from = operand == 0 ? p.x : p.z;
                            const bool rest = has_rest(from);
                            int column = column_of(from);
#pragma unroll 1
                            for (int turn = 0; turn < turns; ++turn) {
                                const bool fewer = turn >= remainder;  // of these tokens than of the first of 8
                                const int row = chunk * (kChunk / turns) + (fewer && p.length < 8);    // 1: none
                                const int entry = batch * from.batches;
                                copy_box(shared_at + x_at + operand * kTileBytes + turn * 1024, &from.map[fewer],
                                         column & ~7, row, entry, landed);
                                if (rest)
                                    copy_box(shared_at + rest_at + operand * kRestBytes + turn * 128, &from.rest[fewer],
                                             (column & ~7) + 64, row, entry, landed);
                                column += from.time;
                            }
                        }
                    }
                    __syncwarp();
                    prepare_decays(p, source, chunk, lane, dt,
                                   reinterpret_cast<SsdDecays *>(shared + Shared::kDecays)[stage]);
                } else {
                    barrier_wait(landed_at + stage * 8, parity ^ 1);
                    for (int operand = 0; operand < operands; ++operand) {
                        const SsdOperand &from = operand == 0 ? p.x : p.z;
                        const int column = column_of(from);
#pragma unroll 2
                        for (int eight = 0; eight < 8; ++eight)
                            shift_rows(shared + x_at + operand * kTileBytes, shared + rest_at + operand * kRestBytes,
                                       eight * 8 + lane / 4, lane % 4, column + (p.turns ? eight * from.time : 0) & 7);
                    }
                    fence_for_wgmma();
                }
                __syncwarp();
                if (lane == 0) barrier_arrive(full_at + stage * 8);
                if (++stage == kStages) stage = 0, parity ^= 1;
            }
    }
}

// Two warps that store y.
template <typename Input, int kStates16, bool kExtras>
__device__ __forceinline__ void store_y(const SsdParams &p, int ticket, char *shared, uint32_t shared_at) {
    using Shared = SsdShared<kStates16, kExtras>;
    unsigned thread = threadIdx.x % 64;
    const int chunks = (p.length + kChunk - 1) / kChunk, pieces = pieces_of(p, ticket);
    const int64_t stride = int64_t{p.heads} * p.headdim * 2;
    int stage = 0;
#pragma unroll 1
    for (int i = 0; i < pieces; ++i) {
        const SsdPiece piece = piece_of(p, ticket, i);
        const int tile = piece.state % (p.heads * p.tiles), first_channel = tile % p.tiles * 64;
        const int channels = min(p.headdim - first_channel, 64);
        char *y = static_cast<char *>(p.y)
            + (piece.state / (p.heads * p.tiles) * int64_t{p.length} + piece.first * kChunk) * stride
            + (tile / p.tiles * p.headdim + first_channel) * 2;
        if (p.segment_chunks > 0 && piece.last < chunks) stage = (stage + piece.last - piece.first) % kStages;
#pragma unroll 1
        for (int chunk = piece.first; chunk < piece.last; ++chunk) {
            const char *const from = shared + (kExtras ? stage * Shared::kStage + 2 * Shared::kOperand + kTileBytes
                                                       : Shared::kY);
            asm volatile("" : "+r"(thread));                 // hidden, else addresses fill the registers
            barrier_arrive_at<kYTaken>();
            barrier_sync_at<kYThere>();
            const int count = min(p.length - chunk * kChunk, kChunk);
            if (p.turns) store_rows<true>(y, stride, from, count, channels, p.headdim, thread);
            else store_rows<false>(y, stride, from, count, channels, p.headdim, thread);
            y += kChunk * stride;
            if constexpr (kExtras) {
                __syncwarp();
                if (thread % 32 == 0) barrier_arrive(shared_at + Shared::kBarriers + (kStages + stage) * 8);
            }
            if (++stage == kStages) stage = 0;
        }
    }
}

// kExtras: z or runs may be given.
template <typename Input, int kStates16, bool kExtras>
__global__ void __launch_bounds__(256, kSsdCtas<kStates16>) ssd_fwd(const __grid_constant__ SsdParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Shared = SsdShared<kStates16, kExtras>;
    extern __shared__ char shared_memory[];
    char *const shared = shared_memory + (-shared_address(shared_memory) & 1023);
    const uint32_t shared_at = shared_address(shared), full_at = shared_at + Shared::kBarriers,
                   empty_at = full_at + kStages * 8;
    const int chunks = (p.length + kChunk - 1) / kChunk;
    if (threadIdx.x == 0) {
        *reinterpret_cast<int *>(shared + Shared::kTicket) =
            p.tickets != nullptr ? atomicAdd(p.tickets, 1) : static_cast<int>(blockIdx.x);
        for (int i = 0; i < kStages; ++i) {
            barrier_init(full_at + i * 8, p.shifts ? 2 : 1);
            barrier_init(empty_at + i * 8, kExtras ? 6 : 4);
            barrier_init(empty_at + (kStages + i) * 8, 1);
        }
        barriers_are_there();
    }
    __syncthreads();
    const int ticket = *reinterpret_cast<const int *>(shared + Shared::kTicket);
    const int role = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    if (role >= 4) {
        if constexpr (kSsdCtas<kStates16> == 2) give_registers<kServantRegisters>();
        if (role >= 6) store_y<Input, kStates16, kExtras>(p, ticket, shared, shared_at);
        else if (role == 4 || p.shifts) produce<Input, kStates16, kExtras>(p, ticket, shared, shared_at);
        return;
    }
    if constexpr (kSsdCtas<kStates16> == 2) take_registers<kConsumerRegisters>();
    unsigned thread = threadIdx.x;
    const int warp = __shfl_sync(0xffffffffu, thread / 32, 0), lane = threadIdx.x % 32;

    // Fragments: this thread holds rows row0 and row0 + 8 (channels of h and y^T, tokens of S), columns 2 q, 2 q + 1
    // of every 8.
    const int row0 = warp * 16 + lane / 4, q = lane % 4;
    uint32_t seen = 0;                                       // which of S's elements are not of a later token
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        const int row = row0 + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * q + i % 2;
        if (p.turns ? turned(column) <= turned(row) : column <= row) seen |= 1u << i;
    }
    const int last_pair = p.turns ? 3 : warp;                // of S's columns with a token that is seen
    const uint32_t scores_at = shared_at + Shared::kScores;
    // Rows and columns of 8 x 8 blocks for ldmatrix and stmatrix: `down` rows then columns, `across` columns then rows.
    const int block = lane / 8;
    uint32_t S_at = scores_at + tile_offset(warp * 16 + lane % 8 + 8 * (block & 1), (block >> 1) * 16);
    uint32_t x_offset = tile_offset(lane % 8 + 8 * (block >> 1), warp * 32 + (block & 1) * 16);
    auto decays_of = [&](int stage) -> const SsdDecays & {
        return reinterpret_cast<const SsdDecays *>(shared + Shared::kDecays)[stage];
    };
    // The state that a CTA leaves, and whether it is there.
    auto carry = [&](int of) { return p.carry + of * int64_t{kStates16 * 8 * 128} + threadIdx.x; };
    auto is_left = [&](int of) { return p.tickets + 1 + of; };
    auto leave = [&] {
        __threadfence();
        warpgroup_barrier(1);
        if (threadIdx.x == 0)
            asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(is_left(ticket)) : "memory");
    };
    auto state_rows = [&](auto *states, int state) {         // of this thread
        const int row = state % p.tiles * 64 + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
        return states + (int64_t{state / p.tiles} * p.headdim + row) * p.dstate + threadIdx.x % 4 * 2;
    };

    int stage = 0;
    uint32_t parity = 0;
    const int pieces = pieces_of(p, ticket);
#pragma unroll 1
    for (int index = 0; index < pieces; ++index) {
        const SsdPiece piece = piece_of(p, ticket, index);
        const int tile = piece.state % (p.heads * p.tiles), head = tile / p.tiles;
        const int first_channel = tile % p.tiles * 64, channels = min(p.headdim - first_channel, 64);
        const bool local = p.segment_chunks > 0 && piece.last < chunks;
        float h[kStates16 * 8], kept = 1.f;
        if (local) {
#pragma unroll
            for (int i = 0; i < kStates16 * 8; ++i) h[i] = 0.f;
#pragma unroll 1
            for (int chunk = piece.first; chunk < piece.last; ++chunk) {
                const uint32_t B_at = shared_at + stage * Shared::kStage + Shared::kOperand;
                const uint32_t x_at = B_at + Shared::kOperand;
                const SsdDecays &decays = decays_of(stage);
                barrier_wait(full_at + stage * 8, parity);
                uint32_t weighted[4][4];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    load_transposed(weighted[k], x_at + x_offset + k * 2048);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float4 of = decays.states[k * 8 + i / 2 * 4 + q];
                        const float2 v = unpack<Input>(weighted[k][i]);
                        weighted[k][i] = pack<Input>(v.x * of.z, v.y * of.w);
                    }
                }
                add_to_state<kStates16, Input>(h, weighted, descriptor(B_at), decays.keep);
                kept *= decays.keep;
                wgmma_wait<0>();
                pin(h);
                __syncwarp();
                if (lane == 0) barrier_arrive(empty_at + stage * 8);
                if (kExtras && lane == 0 && warp < 2) barrier_arrive(empty_at + stage * 8);  // there is no y to store
                if (++stage == kStages) stage = 0, parity ^= 1;
            }
        }
        // h becomes the state before the piece; a local pass leaves the state behind it.
        auto take_state = [&](auto &&element) {              // a few loads at a time, since registers are short
            if (local)
#pragma unroll
                for (int i = 0; i < kStates16 * 8; ++i) {
                    __stcg(carry(ticket) + i * 128, h[i] + kept * element(i));
                    if (i % 8 == 7) asm volatile("" ::: "memory");
                }
#pragma unroll
            for (int i = 0; i < kStates16 * 8; ++i) {
                h[i] = element(i);
                if (i % 16 == 15) asm volatile("" ::: "memory");
            }
        };
        if (piece.first > 0) {
            if (threadIdx.x == 0) {
                int there;
                do
                    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
                                 : "=r"(there) : "l"(is_left(before(p, ticket))) : "memory");
                while (!there);
            }
            warpgroup_barrier(1);
            const float *const left = carry(before(p, ticket));
            take_state([&](int i) { return __ldcg(left + i * 128); });
        } else if (p.initial != nullptr) {
            const float *const initial = state_rows(p.initial, piece.state);
            take_state([&](int i) {
                const int down = i / 2 % 2 * 8, n = i / 4 * 8 + i % 2;
                return row0 + down < channels && n < p.dstate - 2 * q ? initial[down * p.dstate + n] : 0.f;
            });
        } else {
            take_state([](int) { return 0.f; });
        }
        if (local) leave();

        float skip[2] = {0.f, 0.f};
        if (p.D != nullptr)
            for (int i = 0; i < 2; ++i)
                if (row0 + 8 * i < channels)
                    skip[i] = p.D[head * p.D_head_stride + (first_channel + row0 + 8 * i) * p.D_channel_stride];

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
        for (int chunk = piece.first; chunk < piece.last; ++chunk) {
            const uint32_t C_at = shared_at + stage * Shared::kStage, B_at = C_at + Shared::kOperand;
            const uint32_t x_at = B_at + Shared::kOperand;
            const SsdDecays &decays = decays_of(stage);
            asm volatile("" : "+r"(S_at), "+r"(x_offset), "+r"(thread));   // hidden, else addresses fill the registers
            const int row0 = thread / 32 * 16 + thread / 4 % 8, q = thread % 4;
            const uint64_t C_tile = descriptor(C_at), B_tile = descriptor(B_at), S_tile = descriptor(scores_at);
            float y[32];
            // h C^T: on its way while S is weighted, or, where registers are too few for both, a few states at a time.
            constexpr bool kAtOnce = kStates16 <= 8;
            if constexpr (!kEarly) take_scores();
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
            if constexpr (kAtOnce) add_states(0);
            const float *s_of = reinterpret_cast<const float *>(decays.scores + row0 / 2) + row0 % 2;
            const float s_row[2] = {s_of[0], s_of[16]};
            if (kExtras && p.runs != nullptr) {
                const int run[2] = {decays.run[row0] >> 1, decays.run[row0 + 8] >> 1};
#pragma unroll
                for (int i = 0; i < 32; ++i)
                    if (decays.run[i / 4 * 8 + 2 * q + i % 2] >> 1 != run[i / 2 % 2]) S[i] = 0.f;
            }
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {           // 16 columns
                uint32_t packed[4] = {0, 0, 0, 0};
                if (pair <= last_pair) {
                    float *v = S + pair * 8;
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const float4 of = decays.scores[pair * 8 + half * 4 + q];
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            v[half * 4 + 2 * i] *= exp2_fast(s_row[i] - of.x) * of.z;
                            v[half * 4 + 2 * i + 1] *= exp2_fast(s_row[i] - of.y) * of.w;
                        }
                    }
                    if (p.turns || pair == last_pair)
#pragma unroll
                        for (int i = 0; i < 8; ++i) v[i] = seen >> (pair * 8 + i) & 1 ? v[i] : 0.f;
#pragma unroll
                    for (int i = 0; i < 4; ++i) packed[i] = pack<Input>(v[2 * i], v[2 * i + 1]);
                }
                store_blocks(S_at ^ pair * 32, packed[0], packed[1], packed[2], packed[3]);
            }
            fence_for_wgmma();

            wgmma_wait<0>();
            pin(y);
#pragma unroll
            for (int first = kAtOnce ? kBatch : 0; first < kStates16; first += kBatch) {
                add_states(first);
                wgmma_wait<0>();
                pin(y);
            }
            uint32_t x16[4][4], weighted[4][4];
#pragma unroll
            for (int k = 0; k < 4; ++k)
                load_transposed(x16[k], x_at + x_offset + k * 2048);
#pragma unroll
            for (int k = 0; k < 4; ++k)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float4 of = decays.states[k * 8 + half * 4 + q];
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const float2 v = unpack<Input>(x16[k][2 * half + i]);
                        float *to = y + k * 8 + half * 4 + 2 * i;
                        to[0] = to[0] * of.x + skip[i] * v.x;
                        to[1] = to[1] * of.y + skip[i] * v.y;
                        weighted[k][2 * half + i] = pack<Input>(v.x * of.z, v.y * of.w);
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
                if (chunk + 1 < piece.last) barrier_wait(full_at + (stage ^ 1) * 8, parity ^ stage);
                begin_scores(stage ^ 1);
            }
            if (kExtras && p.has_z) {
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    uint32_t z16[4];
                    load_transposed(z16, x_at + kTileBytes + x_offset + k * 2048);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float2 z = unpack<Input>(z16[i]);
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
            __syncwarp();
            if (lane == 0) barrier_arrive(empty_at + stage * 8);
            if (++stage == kStages) stage = 0, parity ^= 1;
        }
        if (piece.last < chunks) {
            if (local) continue;
            float *const behind = carry(ticket);
#pragma unroll
            for (int i = 0; i < kStates16 * 8; ++i) __stcg(behind + i * 128, h[i]);
            leave();
            continue;
        }
#pragma unroll
        for (int down = 0; down < 2; ++down) {
            float *to = state_rows(p.final_states, piece.state) + down * 8 * p.dstate;
            if (row0 + down * 8 < channels)
#pragma unroll
                for (int i = 0; i < kStates16 * 4; ++i)
                    if (i / 2 * 8 + i % 2 < p.dstate - 2 * q) to[i / 2 * 8 + i % 2] = h[i / 2 * 4 + down * 2 + i % 2];
        }
    }
#endif
}

}  // namespace shedder
