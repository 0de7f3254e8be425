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
// A CTA is kHeads consumers and a producer, a warpgroup each. A consumer owns one head (64 of its channels) and walks
// along the chunks with h (P x N, fp32) in its registers: h never enters shared memory, since as an operand of h C^T
// it is converted in place. The heads are of one group and share the tiles of B and C. The producer keeps kStages
// chunks of B, C, x and decays on their way, through barriers `full` and `empty` of each stage.
//
// The sequence may be cut in segments: a CTA takes the next ticket, and its consumers wait for the state that the
// segment before them leaves in `carry`; tickets are drawn in order, so that CTA runs or has run. Segments follow one
// another, so that the last wave of CTAs is full, or, where there are few heads, are concurrent: each finds the state
// that it would leave behind from zeros first (a third of the work), and adds what the state before it decays to.

#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_runtime.h>

#include "kernels/ssd_rows.cuh"
#include "kernels/ssd_wgmma.cuh"

namespace shedder {

struct SsdStrides {                                          // in elements
    int64_t batch, time, head;                               // or group
};

struct SsdParams {
    const void *x, *B, *C, *z, *dt;                          // Input; z may be null; dt is float where dt_float
    const float *A, *D, *dt_bias, *initial;                  // all but A may be null; initial as final_states
    const int32_t *runs;                                     // (batch, time), ~run for padding; may be null
    const int32_t *head_to_group;
    void *y;                                                 // (batch, time, head, channel)
    float *final_states;                                     // (batch, head, channel, state)
    float *carry;                                            // a state for each (segment, batch, head, tile)
    int32_t *tickets;                                        // zeros: the next ticket, then segments done of each state
    SsdStrides x_strides, B_strides, C_strides, z_strides, dt_strides;
    int64_t A_stride, D_head_stride, D_channel_stride, dt_bias_stride;
    float dt_min, dt_max;
    int length, heads, headdim, dstate, groups;
    int tiles;                                               // of 64 channels in a head
    int units;                                               // CTAs of one batch entry and segment
    int columns;                                             // units of all batch entries
    int segments, segment_chunks;
    int states;                                              // batch * heads * tiles
    bool concurrent;                                         // segments run at once
    int x_width, B_width, C_width, z_width;                  // bytes of one copy: 16, 8, 4; 2: rows start anywhere
    bool odd;                                                // one of them is 2
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

struct SsdOperand {
    const char *first;                                       // row; null: no such operand
    int64_t stride;                                          // bytes
    int bytes, width;                                        // of a row; of one copy
};

// The heads of a CTA: kHeads neighbours of one group, counted in tiles of 64 channels. -1: none. One warp calls it.
struct SsdUnit {
    int ticket;
    int tile[4];                                             // head * tiles + tile
    float A[4], bias[4];                                     // of each head; A times log2(e)
    const char *dt[4];                                       // of the first token
    const int32_t *runs;                                     // of the first token; may be null
    SsdOperand operands[8];                                  // C, B, x of each head, z of each head
};

template <int kHeads>
__device__ void find_heads(const SsdParams &p, int unit, int *tile, int lane) {
    if (kHeads == 1 || p.groups == 1) {
        if (lane < kHeads) tile[lane] = unit * kHeads + lane < p.heads * p.tiles ? unit * kHeads + lane : -1;
        return;
    }
    if (lane < kHeads) tile[lane] = -1;
    __syncwarp();
    for (int group = 0; group < p.groups; ++group) {
        int members = 0;
        for (int first = 0; first < p.heads; first += 32) {
            const bool is = first + lane < p.heads && p.head_to_group[first + lane] == group;
            members += __popc(__ballot_sync(0xffffffffu, is));
        }
        const int units = (members * p.tiles + kHeads - 1) / kHeads;
        if (unit >= units) {
            unit -= units;
            continue;
        }
        int before = 0;                                      // members of the group before these 32 heads
        for (int first = 0; first < p.heads; first += 32) {
            const bool is = first + lane < p.heads && p.head_to_group[first + lane] == group;
            const uint32_t mask = __ballot_sync(0xffffffffu, is);
            const int rank = before + __popc(mask & ((1u << lane) - 1));
            if (is)
                for (int t = 0; t < p.tiles; ++t) {
                    const int slot = rank * p.tiles + t - unit * kHeads;
                    if (0 <= slot && slot < kHeads) tile[slot] = (first + lane) * p.tiles + t;
                }
            before += __popc(mask);
        }
        return;
    }
}

// What each token of a chunk contributes, for one head; two neighbouring tokens in each float4.
struct SsdDecays {
    float4 scores[kChunk / 2];                               // s, s, dt, dt
    float4 states[kChunk / 2];                               // 2^s, 2^s; dt 2^(s[63] - s) twice
    int run[kChunk];                                         // twice the run, plus one if y is shown
    float keep;                                              // 2^s[63]
    float unused[3];
};

template <int kStates16, int kHeads, bool kGated>
struct SsdShared {
    static constexpr int kStages = kHeads == 1 || kGated ? 2 : 4;
    static constexpr int kTiles = (kStates16 + 3) / 4;       // of 64 states
    static constexpr int kOperand = kTiles * kTileBytes;     // B or C
    static constexpr int kStage = 2 * kOperand + (kGated ? 2 : 1) * kHeads * kTileBytes;     // C, B, x, z
    static constexpr int kScores = kStages * kStage;         // S, then y, of each head
    static constexpr int kDecays = kScores + kHeads * kTileBytes;
    static constexpr int kBarriers = kDecays + kStages * kHeads * sizeof(SsdDecays);
    static constexpr int kUnit = kBarriers + kStages * 16;
    static constexpr int kBytes = kUnit + sizeof(SsdUnit) + 1024;         // and room to align the first tile
};

// CTAs of a multiprocessor, and registers of a thread: the consumers take what the producer gives.
template <int kStates16, int kHeads>
struct SsdResources {
    static constexpr int kCtas = kHeads == 1 && kStates16 <= 8 ? 2 : 1;
    static constexpr bool kMoves = kStates16 <= 8;
    static constexpr int kProducer = kHeads == 1 ? 64 : 72, kConsumer = kHeads == 1 ? 192 : 216;
};

// dt of two neighbouring tokens of the unit's head `slot` in each lane, as given.
template <typename Input>
__device__ __forceinline__ float2 fetch_dt(const SsdParams &p, const SsdUnit &unit, int slot, int chunk, int lane) {
    float raw[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64_t at = min(chunk * kChunk + 2 * lane + i, p.length - 1) * p.dt_strides.time;
        raw[i] = p.dt_float ? reinterpret_cast<const float *>(unit.dt[slot])[at]
                            : static_cast<float>(reinterpret_cast<const Input *>(unit.dt[slot])[at]);
    }
    return {raw[0], raw[1]};
}

// The decays of one head and chunk, by one warp.
__device__ __forceinline__ void prepare_decays(const SsdParams &p, const SsdUnit &unit, int slot, int chunk, int lane,
                                               float2 raw, SsdDecays &to) {
    float dt[2] = {raw.x, raw.y}, decay[2];
    int run[2] = {0, 0};
    bool shown[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int t = chunk * kChunk + 2 * lane + i;
        shown[i] = t < p.length;
        dt[i] += unit.bias[slot];
        if (p.dt_softplus) dt[i] = ssd_softplus(dt[i]);
        dt[i] = dt[i] < p.dt_min ? p.dt_min : dt[i];     // comparisons, so that NaN stays NaN
        dt[i] = dt[i] > p.dt_max ? p.dt_max : dt[i];
        if (p.runs != nullptr) {
            run[i] = unit.runs[min(t, p.length - 1)];
            shown[i] = shown[i] && run[i] >= 0;
            run[i] = run[i] < 0 ? ~run[i] : run[i];
        }
        dt[i] = shown[i] ? dt[i] : 0.f;
        decay[i] = dt[i] * unit.A[slot];
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
    if (p.runs != nullptr && chunk > 0) run_in = unit.runs[chunk * kChunk - 1];
    run_in = run_in < 0 ? ~run_in : run_in;
    float from_state[2], to_state[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        from_state[i] = run[i] == run_in ? exp2_fast(s[i]) : 0.f;
        to_state[i] = run[i] == run_out ? exp2_fast(total - s[i]) * dt[i] : 0.f;
    }
    to.scores[lane] = {s[0], s[1], dt[0], dt[1]};
    to.states[lane] = {from_state[0], from_state[1], to_state[0], to_state[1]};
    reinterpret_cast<int2 *>(to.run)[lane] = {2 * run[0] + shown[0], 2 * run[1] + shown[1]};
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

template <typename Input, int kStates16, int kHeads, bool kGated>
__global__ void __launch_bounds__(128 * (kHeads + 1), SsdResources<kStates16, kHeads>::kCtas)
    ssd_fwd(const __grid_constant__ SsdParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Shared = SsdShared<kStates16, kHeads, kGated>;
    using Resources = SsdResources<kStates16, kHeads>;
    constexpr int kStages = Shared::kStages;
    extern __shared__ char shared_memory[];
    char *const shared = shared_memory + (-shared_address(shared_memory) & 1023);
    const uint32_t shared_at = shared_address(shared), full_at = shared_at + Shared::kBarriers,
                   empty_at = full_at + kStages * 8;
    SsdUnit &unit = *reinterpret_cast<SsdUnit *>(shared + Shared::kUnit);

    const int slot = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);       // the warpgroup
    unsigned thread = threadIdx.x % 128;
    const int warp = __shfl_sync(0xffffffffu, thread / 32, 0), lane = threadIdx.x % 32;
    if (threadIdx.x < 32) {
        int ticket = blockIdx.x;
        if (p.segments > 1) {
            if (lane == 0) ticket = atomicAdd(p.tickets, 1);
            ticket = __shfl_sync(0xffffffffu, ticket, 0);
        }
        if (lane == 0) unit.ticket = ticket;
        find_heads<kHeads>(p, ticket % p.columns % p.units, unit.tile, lane);
        __syncwarp();
        if (lane == 0) {
            int consumers = 0;
            for (int i = 0; i < kHeads; ++i) consumers += unit.tile[i] >= 0;
            for (int i = 0; i < kStages; ++i) {
                barrier_init(full_at + i * 8, 128 + 4);
                barrier_init(empty_at + i * 8, max(4 * consumers, 1));
            }
        }
        const int64_t batch = ticket % p.columns / p.units;
        if (unit.tile[0] >= 0 && lane < 2 + 2 * kHeads) {
            const int tile = unit.tile[lane < 2 ? 0 : (lane - 2) % kHeads], head = max(tile, 0) / p.tiles;
            const bool is_x = lane < 2 + kHeads;
            const char *base = static_cast<const char *>(lane == 0 ? p.C : lane == 1 ? p.B : is_x ? p.x : p.z);
            const SsdStrides &strides =
                lane == 0 ? p.C_strides : lane == 1 ? p.B_strides : is_x ? p.x_strides : p.z_strides;
            const int64_t of_head = (lane < 2 ? p.head_to_group[head] : head) * strides.head;
            const int first_channel = lane < 2 ? 0 : max(tile, 0) % p.tiles * 64;
            unit.operands[lane] = {
                tile < 0 ? nullptr : base + (batch * strides.batch + of_head + first_channel) * 2, strides.time * 2,
                (lane < 2 ? p.dstate : min(p.headdim - first_channel, 64)) * 2,
                lane == 0 ? p.C_width : lane == 1 ? p.B_width : is_x ? p.x_width : p.z_width};
            if (2 <= lane && lane < 2 + kHeads) {
                unit.A[lane - 2] = p.A[head * p.A_stride] * 1.4426950408889634f;
                unit.bias[lane - 2] = p.dt_bias == nullptr ? 0.f : p.dt_bias[head * p.dt_bias_stride];
                unit.dt[lane - 2] = static_cast<const char *>(p.dt)
                    + (batch * p.dt_strides.batch + head * p.dt_strides.head) * (p.dt_float ? 4 : 2);
            }
            if (lane == 0 && p.runs != nullptr) unit.runs = p.runs + batch * p.length;
        }
    }
    __syncthreads();
    if (unit.tile[0] < 0) return;                            // fewer units than the most there could be
    const int segment = unit.ticket / p.columns;
    const int64_t batch = unit.ticket % p.columns / p.units;
    const int chunks = (p.length + kChunk - 1) / kChunk;
    const int first_chunk = segment * p.segment_chunks, last_chunk = min(first_chunk + p.segment_chunks, chunks);

    if (slot == kHeads) {
        if constexpr (Resources::kMoves) give_registers<Resources::kProducer>();
        auto for_each_operand = [&](int chunk, int stage, bool local, auto &&apply) {
#pragma unroll 1
            for (int i = local ? 1 : 0; i < (kGated ? 2 + 2 * kHeads : 2 + kHeads); ++i) {   // no C in a local pass
                const SsdOperand &operand = unit.operands[i];
                if (operand.first == nullptr) continue;
                const SsdRows rows{operand.first + chunk * kChunk * operand.stride, operand.stride,
                                   min(p.length - chunk * kChunk, kChunk), operand.bytes};
                const int at = stage * Shared::kStage
                    + (i < 2 ? i * Shared::kOperand : 2 * Shared::kOperand + (i - 2) * kTileBytes);
                if (i < 2) apply(std::integral_constant<int, kStates16 * 32>(), at, rows, operand.width);
                else apply(std::integral_constant<int, 128>(), at, rows, operand.width);
            }
        };
        int stage = 0;
        uint32_t parity = 1;
#pragma unroll 1
        for (int local = p.concurrent && last_chunk < chunks; local >= 0; --local)
#pragma unroll 1
            for (int chunk = first_chunk; chunk < last_chunk; ++chunk) {
                asm volatile("" : "+r"(thread));             // hidden, else addresses fill the registers
                const int warp = thread / 32, lane = thread % 32;
                const int head = (warp - chunk * kHeads) & 3;        // whose decays are this warp's, in turns
                const bool prepares = head < kHeads && unit.tile[min(head, kHeads - 1)] >= 0;
                float2 dt{};
                if (prepares) dt = fetch_dt<Input>(p, unit, head, chunk, lane);
                barrier_wait(empty_at + stage * 8, parity);
                for_each_operand(chunk, stage, local, [&](auto row_bytes, int at, const SsdRows &rows, int width) {
                    copy_rows<row_bytes()>(shared_at + at, rows, width, thread);
                });
                if (prepares)
                    prepare_decays(p, unit, head, chunk, lane, dt,
                                   reinterpret_cast<SsdDecays *>(shared + Shared::kDecays)[stage * kHeads + head]);
                if (p.odd) {
                    copy_wait();
                    warpgroup_barrier(1 + kHeads);
                    for_each_operand(chunk, stage, local, [&](auto row_bytes, int at, const SsdRows &rows, int width) {
                        if (width == 2) shift_odd_rows<row_bytes()>(shared + at, rows, thread);
                    });
                }
                barrier_arrive_after_copies(full_at + stage * 8);
                __syncwarp();
                if (lane == 0) barrier_arrive(full_at + stage * 8);
                if (++stage == kStages) stage = 0, parity ^= 1;
            }
        copy_wait();
        return;
    }

    if constexpr (Resources::kMoves) take_registers<Resources::kConsumer>();
    const int tile = unit.tile[slot];
    if (tile < 0) return;
    const int64_t head = tile / p.tiles;
    const int first_channel = tile % p.tiles * 64, channels = min(p.headdim - first_channel, 64);

    // Fragments: this thread holds rows row0 and row0 + 8 (channels of h and y^T, tokens of S), columns 2 q, 2 q + 1
    // of every 8.
    const int row0 = warp * 16 + lane / 4, q = lane % 4;
    float skip[2] = {0.f, 0.f};
    if (p.D != nullptr)
        for (int i = 0; i < 2; ++i)
            if (row0 + 8 * i < channels)
                skip[i] = p.D[head * p.D_head_stride + (first_channel + row0 + 8 * i) * p.D_channel_stride];
    float h[kStates16 * 8];
    // Where the state lies: found anew each time, since registers are short in the loop over chunks.
    auto state = [&] { return unit.ticket % p.columns / p.units * (p.heads * p.tiles) + unit.tile[slot]; };
    auto done = [&] { return p.tickets + 1 + state(); };     // segments
    auto carry = [&](int of) {
        return p.carry + (of * int64_t{p.states} + state()) * (kStates16 * 8 * 128) + threadIdx.x % 128;
    };
    auto state_rows = [&](auto *states) {                    // of this thread
        const int first_row = state() % p.tiles * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
        return states + (int64_t{state() / p.tiles} * p.headdim + first_row) * p.dstate + threadIdx.x % 4 * 2;
    };
    auto await_carry = [&] {
        if (thread == 0) {
            int now;
            do
                asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(done()) : "memory");
            while (now < segment);
        }
        warpgroup_barrier(1 + slot);
    };
    auto publish_carry = [&] {
        __threadfence();
        warpgroup_barrier(1 + slot);
        if (thread == 0)
            asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(done()), "r"(segment + 1) : "memory");
    };
    const uint32_t scores_at = shared_at + Shared::kScores + slot * kTileBytes;
    char *const scores = shared + Shared::kScores + slot * kTileBytes;
    // Rows and columns of 8 x 8 blocks for ldmatrix and stmatrix: `down` rows then columns, `across` columns then rows.
    const int block = lane / 8;
    uint32_t S_at = scores_at + tile_offset(warp * 16 + lane % 8 + 8 * (block & 1), (block >> 1) * 16);
    uint32_t x_offset = tile_offset(lane % 8 + 8 * (block >> 1), warp * 32 + (block & 1) * 16);
    const int64_t y_stride = int64_t{p.heads} * p.headdim * 2;
    char *y_at = static_cast<char *>(p.y) + (batch * p.length + first_chunk * kChunk) * y_stride
        + (head * p.headdim + first_channel) * 2;

    int stage = 0;
    uint32_t parity = 0;
    const bool local = p.concurrent && last_chunk < chunks;
    float kept = 1.f;
    if (local) {
#pragma unroll
        for (int i = 0; i < kStates16 * 8; ++i) h[i] = 0.f;
#pragma unroll 1
        for (int chunk = first_chunk; chunk < last_chunk; ++chunk) {
            const uint32_t B_at = shared_at + stage * Shared::kStage + Shared::kOperand;
            const uint32_t x_at = B_at + Shared::kOperand + slot * kTileBytes;
            const SsdDecays &decays =
                reinterpret_cast<const SsdDecays *>(shared + Shared::kDecays)[stage * kHeads + slot];
            barrier_wait(full_at + stage * 8, parity);
            fence_for_wgmma();
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
            if (++stage == kStages) stage = 0, parity ^= 1;
        }
    }
    // h becomes the state before the segment; a local pass leaves the state behind it to the next one.
    if (segment > 0) await_carry();
    {
        const float *before = segment > 0 ? carry(segment - 1) : p.initial == nullptr ? nullptr : state_rows(p.initial);
        float *const behind = carry(segment);
#pragma unroll
        for (int i = 0; i < kStates16 * 8; ++i) {
            const int down = i / 2 % 2 * 8, n = i / 4 * 8 + i % 2;
            float v = 0.f;
            if (segment > 0) v = __ldcg(before + i * 128);
            else if (before != nullptr && row0 + down < channels && n < p.dstate - 2 * q)
                v = before[down * p.dstate + n];
            if (local) __stcg(behind + i * 128, h[i] + kept * v);
            h[i] = v;
            if (i % 16 == 15) asm volatile("" ::: "memory");         // not all loads at once: registers are short
        }
    }
    if (local) publish_carry();

#pragma unroll 1
    for (int chunk = first_chunk; chunk < last_chunk; ++chunk) {
        const uint32_t C_at = shared_at + stage * Shared::kStage, B_at = C_at + Shared::kOperand;
        const uint32_t x_at = B_at + Shared::kOperand + slot * kTileBytes;
        const SsdDecays &decays = reinterpret_cast<const SsdDecays *>(shared + Shared::kDecays)[stage * kHeads + slot];
        asm volatile("" : "+r"(S_at), "+r"(x_offset), "+r"(thread));       // hidden, else addresses fill the registers
        const int lane = thread % 32, row0 = thread / 32 * 16 + thread / 4 % 8, q = thread % 4;
        const uint64_t C_tile = descriptor(C_at), B_tile = descriptor(B_at), S_tile = descriptor(scores_at);
        barrier_wait(full_at + stage * 8, parity);
        fence_for_wgmma();                                   // copies are not wgmma's own way into shared memory

        float S[32], y[32];
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kStates16; ++k) {
            const int at = k / 4 * kTileBytes + k % 4 * 32;
            wgmma_ss<Input>(S, later(C_tile, at), later(B_tile, at), k > 0);
        }
        wgmma_commit();

        // h C^T: on its way while S is weighted, or, where registers are too few for both, a few states at a time.
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
                wgmma_rs<Input, 64, 0>(y, h16[k], later(C_tile, (first + k) / 4 * kTileBytes + (first + k) % 4 * 32),
                                       first + k > 0);
            wgmma_commit();
        };
        if constexpr (kAtOnce) add_states(0);
        wgmma_wait<kAtOnce ? 1 : 0>();
        pin(S);
        const float *s_of = reinterpret_cast<const float *>(decays.scores + row0 / 2) + row0 % 2;
        const float s_row[2] = {s_of[0], s_of[16]};
        if (p.runs != nullptr) {
            const int run[2] = {decays.run[row0] >> 1, decays.run[row0 + 8] >> 1};
#pragma unroll
            for (int i = 0; i < 32; ++i)
                if (decays.run[i / 4 * 8 + 2 * q + i % 2] >> 1 != run[i / 2 % 2]) S[i] = 0.f;
        }
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {           // 16 columns
            uint32_t packed[4] = {0, 0, 0, 0};           // nothing of a later token
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (pair > warp) continue;
                const float4 of = decays.scores[pair * 8 + half * 4 + q];
                float *v = S + pair * 8 + half * 4;
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    v[2 * i] *= exp2_fast(s_row[i] - of.x) * of.z;
                    v[2 * i + 1] *= exp2_fast(s_row[i] - of.y) * of.w;
                    if (pair == warp && half >= i) {
                        if (half > i || 2 * q > lane / 4) v[2 * i] = 0.f;
                        if (half > i || 2 * q + 1 > lane / 4) v[2 * i + 1] = 0.f;
                    }
                    packed[2 * half + i] = pack<Input>(v[2 * i], v[2 * i + 1]);
                }
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
        const float keep = decays.keep;
        warpgroup_barrier(1 + slot);                         // S is there
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) wgmma_rs<Input, 64, 0>(y, x16[k], later(S_tile, k * 32), true);
        wgmma_commit();

        add_to_state<kStates16, Input>(h, weighted, B_tile, keep);

        wgmma_wait<1>();
        pin(y);
        if constexpr (kGated) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                uint32_t z16[4];
                load_transposed(z16, x_at + kHeads * kTileBytes + x_offset + k * 2048);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float2 z = unpack<Input>(z16[i]);
                    y[k * 8 + 2 * i] *= z.x / (1.f + exp2_fast(-1.4426950408889634f * z.x));
                    y[k * 8 + 2 * i + 1] *= z.y / (1.f + exp2_fast(-1.4426950408889634f * z.y));
                }
            }
        }
        if (p.runs != nullptr) {
#pragma unroll
            for (int i = 0; i < 32; ++i)
                if (!(decays.run[i / 4 * 8 + 2 * q + i % 2] & 1)) y[i] = 0.f;
        }
        warpgroup_barrier(1 + slot);                         // S has been read
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            const float *v = y + pair * 8;
            store_transposed(scores_at + x_offset + pair * 2048, pack<Input>(v[0], v[1]), pack<Input>(v[2], v[3]),
                             pack<Input>(v[4], v[5]), pack<Input>(v[6], v[7]));
        }
        warpgroup_barrier(1 + slot);
        {
            const int count = min(p.length - chunk * kChunk, kChunk);
            if (p.headdim % 8 == 0) store_aligned_rows<16>(y_at, y_stride, scores, count, channels, thread);
            else if (p.headdim % 4 == 0) store_aligned_rows<8>(y_at, y_stride, scores, count, channels, thread);
            else if (p.headdim % 2 == 0) store_aligned_rows<4>(y_at, y_stride, scores, count, channels, thread);
            else store_odd_rows(y_at, y_stride, scores, count, channels, thread);
            y_at += kChunk * y_stride;
        }
        wgmma_wait<0>();
        pin(h);
        __syncwarp();
        if (lane == 0) barrier_arrive(empty_at + stage * 8);
        if (++stage == kStages) stage = 0, parity ^= 1;
    }

    if (last_chunk < chunks) {
        if (p.concurrent) return;
        float *const to = carry(segment);
#pragma unroll
        for (int i = 0; i < kStates16 * 8; ++i) __stcg(to + i * 128, h[i]);
        publish_carry();
        return;
    }
#pragma unroll
    for (int down = 0; down < 2; ++down) {
        float *to = state_rows(p.final_states) + down * 8 * p.dstate;
        if (row0 + down * 8 < channels)
#pragma unroll
            for (int i = 0; i < kStates16 * 4; ++i)
                if (i / 2 * 8 + i % 2 < p.dstate - 2 * q) to[i / 2 * 8 + i % 2] = h[i / 2 * 4 + down * 2 + i % 2];
    }
#endif
}

}  // namespace shedder
