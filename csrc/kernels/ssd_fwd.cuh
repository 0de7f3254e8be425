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
// One warpgroup owns one head (64 of its channels) and walks along the chunks with h (P x N, fp32) in its registers:
// h never enters shared memory, since as an operand of h C^T it is converted in place. kHeads warpgroups of a CTA
// are heads of one group and share the tiles of B and C, which arrive by cp.async one chunk ahead. Where the heads
// would fill the last wave of CTAs badly, the sequence is cut in segments: a CTA takes the next ticket and waits for
// the state that the segment before it leaves in `carry`; tickets are drawn in order, so that CTA runs or has run.
//
// Rows of any alignment: cp.async of 16 or 8 bytes; other rows are copied as the aligned 16 bytes around them and
// shifted into place by the warp that copied them. Bound: tensor cores and shared memory at N = 128.

#pragma once

#include <cstdint>

#include <cuda_runtime.h>

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
    float *carry;                                            // a state for each (batch, head, tile); with segments
    int32_t *tickets;                                        // zeros: the next ticket, then segments done by column
    SsdStrides x_strides, B_strides, C_strides, z_strides, dt_strides;
    int64_t A_stride, D_head_stride, D_channel_stride, dt_bias_stride;
    float dt_min, dt_max;
    int length, heads, headdim, dstate, groups;
    int tiles;                                               // of 64 channels in a head
    int units;                                               // CTAs of one batch entry and segment
    int columns;                                             // units of all batch entries
    int segments, segment_chunks;
    int x_width, B_width, C_width;                           // bytes of one copy: 16, 8; 2: rows start anywhere
    bool dt_softplus, dt_float;
};

constexpr int kChunk = 64;

// What each token of a chunk contributes, for one head.
struct SsdDecays {
    float s[kChunk], dt[kChunk];
    float from_state[kChunk], to_state[kChunk];              // 2^s, and dt 2^(s[63] - s)
    int run[kChunk];                                         // twice the run, plus one if y is shown
    float keep;                                              // 2^s[63]
    float unused[3];
};

template <int kStates16, int kHeads>
struct SsdShared {
    static constexpr int kTiles = (kStates16 + 3) / 4;       // of 64 states
    static constexpr int kOperand = kTiles * kTileBytes;     // B or C
    static constexpr int kStage = 2 * kOperand + kHeads * kTileBytes;
    static constexpr int kScores = 2 * kStage;               // S, then y, of each head
    static constexpr int kDecays = kScores + kHeads * kTileBytes;
    static constexpr int kUnit = kDecays + 2 * kHeads * sizeof(SsdDecays);
    static constexpr int kBytes = kUnit + 64 + 1024;         // and room to align the first tile
};

struct SsdRows {                                             // rows of one operand for a chunk
    const char *first;
    int64_t stride;                                          // bytes
    int count, bytes;                                        // rows that exist; bytes of each
};

template <int kBytes, int kRowBytes, int kThreads>
__device__ __forceinline__ void copy_rows_by(uint32_t tile, const SsdRows &rows, int thread) {
    constexpr int kPieces = kRowBytes / kBytes;
#pragma unroll 4
    for (int i = thread; i < kTileRows * kPieces; i += kThreads) {
        const int row = i / kPieces, byte = i % kPieces * kBytes;
        const int valid = row < rows.count ? min(max(rows.bytes - byte, 0), kBytes) : 0;
        const char *from = rows.first + (valid > 0 ? row * rows.stride + byte : 0);
        copy_async<kBytes>(tile + tile_offset(row, byte), from, valid);
    }
}

// Rows that start anywhere: the aligned 16 bytes around them, one piece for each of kLanes lanes. Rows stay with one
// warp, which shifts them into place when they have arrived.
template <int kRowBytes>
constexpr int kOddLanes = kRowBytes <= 128 ? 8 : kRowBytes <= 256 ? 16 : 32;

template <int kRowBytes, int kThreads>
__device__ __forceinline__ void copy_odd_rows(uint32_t tile, const SsdRows &rows, int thread) {
    constexpr int kLanes = kOddLanes<kRowBytes>;
    const int byte = thread % kLanes * 16;
    if (byte >= kRowBytes) return;
#pragma unroll 1
    for (int row = thread / kLanes; row < kTileRows; row += kThreads / kLanes) {
        const char *from = rows.first + (row < rows.count ? row * rows.stride : 0);
        const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(from) & 15);
        const int valid = row < rows.count ? min(max(skew + rows.bytes - byte, 0), 16) : 0;
        copy_async<16>(tile + tile_offset(row, byte), from - skew + (valid > 0 ? byte : 0), valid);
    }
}

template <int kRowBytes, int kThreads>
__device__ __forceinline__ void shift_odd_rows(char *tile, const SsdRows &rows, int thread) {
    constexpr int kLanes = kOddLanes<kRowBytes>;
    const int byte = thread % kLanes * 16;
#pragma unroll 1
    for (int row = thread / kLanes; row < kTileRows; row += kThreads / kLanes) {
        const char *from = rows.first + (row < rows.count ? row * rows.stride : 0);
        const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(from) & 15);
        const bool mine = byte < kRowBytes && skew != 0 && row < rows.count;
        uint4 low{}, high{};
        if (mine) {
            low = *reinterpret_cast<const uint4 *>(tile + tile_offset(row, byte));
            if (byte + 16 < kRowBytes) {
                high = *reinterpret_cast<const uint4 *>(tile + tile_offset(row, byte + 16));
            } else if (skew + rows.bytes > kRowBytes) {      // a full row: its end has not been copied
                uint16_t end[8] = {};
                for (int at = kRowBytes - skew; at < rows.bytes; at += 2)
                    end[(at - kRowBytes + skew) / 2] = *reinterpret_cast<const uint16_t *>(from + at);
                high = {end[0] | uint32_t{end[1]} << 16, end[2] | uint32_t{end[3]} << 16,
                        end[4] | uint32_t{end[5]} << 16, end[6] | uint32_t{end[7]} << 16};
            }
        }
        __syncwarp();
        if (!mine) continue;
        uint32_t v[7] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z};
        const uint32_t last = high.w;
        uint32_t w[6], u[5];
        const bool two = skew & 8, one = skew & 4;
#pragma unroll
        for (int i = 0; i < 5; ++i) w[i] = two ? v[i + 2] : v[i];
        w[5] = two ? last : v[5];
#pragma unroll
        for (int i = 0; i < 5; ++i) u[i] = one ? w[i + 1] : w[i];
        const int bits = (skew & 2) * 8;
        *reinterpret_cast<uint4 *>(tile + tile_offset(row, byte)) = {
            __funnelshift_r(u[0], u[1], bits), __funnelshift_r(u[1], u[2], bits),
            __funnelshift_r(u[2], u[3], bits), __funnelshift_r(u[3], u[4], bits)};
    }
}

template <int kRowBytes, int kThreads>
__device__ __forceinline__ void copy_rows(uint32_t tile, const SsdRows &rows, int width, int thread) {
    switch (width) {
        case 16: return copy_rows_by<16, kRowBytes, kThreads>(tile, rows, thread);
        case 8: return copy_rows_by<8, kRowBytes, kThreads>(tile, rows, thread);
        default: return copy_odd_rows<kRowBytes, kThreads>(tile, rows, thread);
    }
}

// The y of one head and chunk from its tile to memory: rows of `count` channels, `stride` elements apart.
template <int kBytes>
__device__ __forceinline__ void store_rows_by(char *y, int64_t stride, const char *tile, int rows, int channels,
                                              int thread) {
    using Piece = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t>>;
    constexpr int kPieces = 128 / kBytes;
#pragma unroll
    for (int i = thread; i < kTileRows * kPieces; i += 128) {
        const int row = i / kPieces, byte = i % kPieces * kBytes;
        if (row < rows && byte < channels * 2)
            *reinterpret_cast<Piece *>(y + row * stride * 2 + byte) =
                *reinterpret_cast<const Piece *>(tile + tile_offset(row, byte));
    }
}

// Rows of an odd number of channels: the aligned words around them, halves at their ends.
__device__ __forceinline__ void store_odd_rows(char *y, int64_t stride, const char *tile, int rows, int channels,
                                               int thread) {
    const int lane = thread % 32;
#pragma unroll 4
    for (int row = thread / 32; row < rows; row += 4) {
        char *to = y + row * stride * 2;
        const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(to) & 2);
        const uint32_t v = *reinterpret_cast<const uint32_t *>(tile + tile_offset(row, lane * 4));
        const uint32_t before = __shfl_up_sync(0xffffffffu, v, 1);
        const uint32_t word = skew ? __funnelshift_r(before, v, 16) : v;
        const int byte = lane * 4 - skew;                    // of the row, at which this word lies
        if (byte >= 0 && byte + 4 <= channels * 2) {
            *reinterpret_cast<uint32_t *>(to + byte) = word;
        } else if (byte < 0) {
            *reinterpret_cast<uint16_t *>(to) = static_cast<uint16_t>(word >> 16);
        } else if (byte + 2 <= channels * 2) {
            *reinterpret_cast<uint16_t *>(to + byte) = static_cast<uint16_t>(word);
        }
        if (skew != 0 && lane == 31 && channels == 64)       // the 65th half word
            *reinterpret_cast<uint16_t *>(to + 126) = static_cast<uint16_t>(v >> 16);
    }
}

// log(1 + exp(x)), with the small values of very negative x.
__device__ inline float ssd_softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }

// The heads of a CTA: kHeads neighbours of one group, counted in tiles of 64 channels. -1: none. One warp calls it.
struct SsdUnit {
    int ticket;
    int tile[4];                                             // head * tiles + tile
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

template <typename Input, int kStates16, int kHeads>
__global__ void __launch_bounds__(128 * kHeads, kHeads == 1 && kStates16 <= 8 ? 2 : 1)
    ssd_fwd(const __grid_constant__ SsdParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Shared = SsdShared<kStates16, kHeads>;
    constexpr int kThreads = 128 * kHeads;
    constexpr int kOperandRow = kStates16 * 32;              // bytes of a padded row of B or C
    extern __shared__ char shared_memory[];
    char *const shared = shared_memory + (-shared_address(shared_memory) & 1023);
    const uint32_t shared_at = shared_address(shared);
    SsdUnit &unit = *reinterpret_cast<SsdUnit *>(shared + Shared::kUnit);

    const int slot = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);       // the warpgroup
    const int thread = threadIdx.x % 128, warp = __shfl_sync(0xffffffffu, thread / 32, 0), lane = threadIdx.x % 32;
    if (threadIdx.x < 32) {
        int ticket = blockIdx.x;
        if (p.segments > 1) {
            if (lane == 0) ticket = atomicAdd(p.tickets, 1);
            ticket = __shfl_sync(0xffffffffu, ticket, 0);
        }
        if (lane == 0) unit.ticket = ticket;
        find_heads<kHeads>(p, ticket % p.columns % p.units, unit.tile, lane);
    }
    __syncthreads();
    if (unit.tile[0] < 0) return;                            // fewer units than the most there could be
    const int segment = unit.ticket / p.columns, column = unit.ticket % p.columns;
    const int64_t batch = column / p.units;
    const int chunks = (p.length + kChunk - 1) / kChunk;
    const int first_chunk = segment * p.segment_chunks, last_chunk = min(first_chunk + p.segment_chunks, chunks);
    const int64_t group = p.head_to_group[unit.tile[0] / p.tiles];
    const bool active = unit.tile[slot] >= 0;
    const int tile = active ? unit.tile[slot] : unit.tile[0];
    const int64_t head = tile / p.tiles;
    const int first_channel = tile % p.tiles * 64, channels = min(p.headdim - first_channel, 64);

    const Input *x = static_cast<const Input *>(p.x) + batch * p.x_strides.batch + head * p.x_strides.head
        + first_channel;
    const Input *B = static_cast<const Input *>(p.B) + batch * p.B_strides.batch + group * p.B_strides.head;
    const Input *C = static_cast<const Input *>(p.C) + batch * p.C_strides.batch + group * p.C_strides.head;
    auto rows = [&](const Input *base, int64_t stride, int elements, int chunk) {
        return SsdRows{reinterpret_cast<const char *>(base + chunk * int64_t{kChunk} * stride), stride * 2,
                       min(p.length - chunk * kChunk, kChunk), elements * 2};
    };
    auto fetch = [&](int chunk) {
        const uint32_t stage = shared_at + (chunk & 1) * Shared::kStage;
        copy_rows<kOperandRow, kThreads>(stage, rows(C, p.C_strides.time, p.dstate, chunk), p.C_width, threadIdx.x);
        copy_rows<kOperandRow, kThreads>(stage + Shared::kOperand, rows(B, p.B_strides.time, p.dstate, chunk),
                                         p.B_width, threadIdx.x);
        if (active)
            copy_rows<128, 128>(stage + 2 * Shared::kOperand + slot * kTileBytes,
                                rows(x, p.x_strides.time, channels, chunk), p.x_width, thread);
        copy_commit();
    };
    auto arrive = [&](int chunk) {
        char *stage = shared + (chunk & 1) * Shared::kStage;
        copy_wait<0>();
        __syncwarp();
        if (p.C_width == 2)
            shift_odd_rows<kOperandRow, kThreads>(stage, rows(C, p.C_strides.time, p.dstate, chunk), threadIdx.x);
        if (p.B_width == 2)
            shift_odd_rows<kOperandRow, kThreads>(stage + Shared::kOperand,
                                                  rows(B, p.B_strides.time, p.dstate, chunk), threadIdx.x);
        if (p.x_width == 2 && active)
            shift_odd_rows<128, 128>(stage + 2 * Shared::kOperand + slot * kTileBytes,
                                     rows(x, p.x_strides.time, channels, chunk), thread);
        fence_for_wgmma();
        __syncthreads();
    };
    fetch(first_chunk);

    // The first warp of a warpgroup prepares the decays, two neighbouring tokens in each lane.
    const float A = p.A[head * p.A_stride] * 1.4426950408889634f;
    const float bias = p.dt_bias == nullptr ? 0.f : p.dt_bias[head * p.dt_bias_stride];
    const int64_t dt_base = batch * p.dt_strides.batch + head * p.dt_strides.head;
    const int32_t *runs = p.runs == nullptr ? nullptr : p.runs + batch * p.length;
    int run_in = 0;                                          // that the state belongs to
    if (runs != nullptr && first_chunk > 0) {
        run_in = runs[first_chunk * kChunk - 1];
        run_in = run_in < 0 ? ~run_in : run_in;
    }
    auto fetch_dt = [&](int chunk) {
        float raw[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int t = min(chunk * kChunk + 2 * lane + i, p.length - 1);
            const int64_t at = dt_base + t * p.dt_strides.time;
            raw[i] = p.dt_float ? static_cast<const float *>(p.dt)[at]
                                : static_cast<float>(static_cast<const Input *>(p.dt)[at]);
        }
        return float2{raw[0], raw[1]};
    };
    auto prepare = [&](int chunk, float2 raw) {
        SsdDecays &to = reinterpret_cast<SsdDecays *>(shared + Shared::kDecays)[(chunk & 1) * kHeads + slot];
        float dt[2] = {raw.x, raw.y}, decay[2];
        int run[2] = {0, 0};
        bool shown[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int t = chunk * kChunk + 2 * lane + i;
            shown[i] = t < p.length;
            dt[i] += bias;
            if (p.dt_softplus) dt[i] = ssd_softplus(dt[i]);
            dt[i] = dt[i] < p.dt_min ? p.dt_min : dt[i];     // comparisons, so that NaN stays NaN
            dt[i] = dt[i] > p.dt_max ? p.dt_max : dt[i];
            if (runs != nullptr) {
                run[i] = runs[min(t, p.length - 1)];
                shown[i] = shown[i] && run[i] >= 0;
                run[i] = run[i] < 0 ? ~run[i] : run[i];
            }
            dt[i] = shown[i] ? dt[i] : 0.f;
            decay[i] = dt[i] * A;
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
        float from_state[2], to_state[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            from_state[i] = run[i] == run_in ? exp2_fast(s[i]) : 0.f;
            to_state[i] = run[i] == run_out ? exp2_fast(total - s[i]) * dt[i] : 0.f;
        }
        reinterpret_cast<float2 *>(to.s)[lane] = {s[0], s[1]};
        reinterpret_cast<float2 *>(to.dt)[lane] = {dt[0], dt[1]};
        reinterpret_cast<float2 *>(to.from_state)[lane] = {from_state[0], from_state[1]};
        reinterpret_cast<float2 *>(to.to_state)[lane] = {to_state[0], to_state[1]};
        reinterpret_cast<int2 *>(to.run)[lane] = {2 * run[0] + shown[0], 2 * run[1] + shown[1]};
        if (lane == 0) to.keep = run_in == run_out ? exp2_fast(total) : 0.f;
        run_in = run_out;
    };
    float2 next_dt{0.f, 0.f};
    if (warp == 0) {
        prepare(first_chunk, fetch_dt(first_chunk));
        next_dt = fetch_dt(first_chunk + 1);
    }

    // Fragments: this thread holds rows row0 and row0 + 8 (channels of h and y^T, tokens of S), columns 2 q, 2 q + 1
    // of every 8.
    const int row0 = warp * 16 + lane / 4, q = lane % 4;
    float skip[2] = {0.f, 0.f};
    if (p.D != nullptr)
        for (int i = 0; i < 2; ++i)
            if (row0 + 8 * i < channels)
                skip[i] = p.D[head * p.D_head_stride + (first_channel + row0 + 8 * i) * p.D_channel_stride];
    float h[kStates16 * 8];
    auto carry = [&] { return p.carry + (batch * p.heads * p.tiles + tile) * (kStates16 * 8 * 128) + thread; };
    auto state_row = [&] { return (batch * p.heads + head) * p.headdim + first_channel; };
    if (segment > 0) {
        if (threadIdx.x == 0) {
            int done;
            do
                asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
                             : "=r"(done) : "l"(p.tickets + 1 + column) : "memory");
            while (done < segment);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kStates16 * 8; ++i) h[i] = active ? __ldcg(carry() + i * 128) : 0.f;
    } else {
#pragma unroll
        for (int i = 0; i < kStates16 * 8; ++i) {
            const int row = row0 + 8 * (i / 2 % 2), n = i / 4 * 8 + 2 * q + i % 2;
            h[i] = p.initial != nullptr && row < channels && n < p.dstate
                ? p.initial[(state_row() + row) * p.dstate + n] : 0.f;
        }
    }

    const uint32_t scores_at = shared_at + Shared::kScores + slot * kTileBytes;
    char *const scores = shared + Shared::kScores + slot * kTileBytes;
    // Rows and columns of 8 x 8 blocks for ldmatrix and stmatrix: `down` rows then columns, `across` columns then rows.
    const int block = lane / 8, down_row = lane % 8 + 8 * (block & 1), across_row = lane % 8 + 8 * (block >> 1);

    for (int chunk = first_chunk; chunk < last_chunk; ++chunk) {
        arrive(chunk);
        const bool more = chunk + 1 < last_chunk;
        if (!active) {
            if (more) fetch(chunk + 1);
            continue;
        }
        const uint32_t C_at = shared_at + (chunk & 1) * Shared::kStage, B_at = C_at + Shared::kOperand;
        const uint32_t x_at = B_at + Shared::kOperand + slot * kTileBytes;
        const SsdDecays &decays = reinterpret_cast<SsdDecays *>(shared + Shared::kDecays)[(chunk & 1) * kHeads + slot];

        {   // S, to shared memory
            float S[32];
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kStates16; ++k) {
                const int at = k / 4 * kTileBytes + k % 4 * 32;
                wgmma_ss<Input>(S, descriptor(C_at + at), descriptor(B_at + at), k > 0);
            }
            wgmma_commit();
            wgmma_wait<0>();
            pin(S);
            const float s_row[2] = {decays.s[row0], decays.s[row0 + 8]};
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {           // 16 columns
                uint32_t packed[4] = {0, 0, 0, 0};           // nothing of a later token
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    if (pair > warp) continue;
                    const int column = pair * 16 + half * 8 + 2 * q;
                    const float2 s = *reinterpret_cast<const float2 *>(decays.s + column);
                    const float2 dt = *reinterpret_cast<const float2 *>(decays.dt + column);
                    float *v = S + pair * 8 + half * 4;
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        v[2 * i] *= exp2_fast(s_row[i] - s.x) * dt.x;
                        v[2 * i + 1] *= exp2_fast(s_row[i] - s.y) * dt.y;
                        if (pair == warp) {
                            if (column > row0 + 8 * i) v[2 * i] = 0.f;
                            if (column + 1 > row0 + 8 * i) v[2 * i + 1] = 0.f;
                        }
                        if (runs != nullptr) {
                            const int run = decays.run[row0 + 8 * i] >> 1;
                            if (decays.run[column] >> 1 != run) v[2 * i] = 0.f;
                            if (decays.run[column + 1] >> 1 != run) v[2 * i + 1] = 0.f;
                        }
                        packed[2 * half + i] = pack<Input>(v[2 * i], v[2 * i + 1]);
                    }
                }
                store_blocks(scores_at + tile_offset(warp * 16 + down_row, pair * 32 + (block >> 1) * 16),
                             packed[0], packed[1], packed[2], packed[3]);
            }
            fence_for_wgmma();
        }

        // Only here: the fence above would wait for copies in flight.
        if (more) fetch(chunk + 1);
        if (more && warp == 0) {                             // which has the least to do for S
            prepare(chunk + 1, next_dt);
            if (chunk + 2 < last_chunk) next_dt = fetch_dt(chunk + 2);
        }

        float y[32];
        constexpr int kBatch = kStates16 < 8 ? kStates16 : 8;
#pragma unroll
        for (int first = 0; first < kStates16; first += kBatch) {
            uint32_t h16[kBatch][4];
#pragma unroll
            for (int k = 0; k < kBatch; ++k)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    h16[k][i] = first + k < kStates16
                        ? pack<Input>(h[(first + k) * 8 + 2 * i], h[(first + k) * 8 + 2 * i + 1]) : 0u;
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kBatch; ++k)
                if (first + k < kStates16)
                    wgmma_rs<Input, 64, 0>(y, h16[k], descriptor(C_at + (first + k) / 4 * kTileBytes + k % 4 * 32),
                                           first + k > 0);
            wgmma_commit();
            if (first + kBatch < kStates16) {
                wgmma_wait<0>();
                pin(y);
            }
        }
        wgmma_wait<0>();
        pin(y);
        uint32_t x16[4][4];
#pragma unroll
        for (int k = 0; k < 4; ++k)
            load_transposed(x16[k], x_at + tile_offset(k * 16 + across_row, warp * 32 + (block & 1) * 16));
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float2 from_state =
                    *reinterpret_cast<const float2 *>(decays.from_state + k * 16 + half * 8 + 2 * q);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float2 v = unpack<Input>(x16[k][2 * half + i]);
                    float *to = y + k * 8 + half * 4 + 2 * i;
                    to[0] = to[0] * from_state.x + skip[i] * v.x;
                    to[1] = to[1] * from_state.y + skip[i] * v.y;
                }
            }
        warpgroup_barrier(1 + slot);                         // S is there
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) wgmma_rs<Input, 64, 0>(y, x16[k], descriptor(scores_at + k * 32), true);
        wgmma_commit();

        uint32_t weighted[4][4];
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float2 to_state = *reinterpret_cast<const float2 *>(decays.to_state + k * 16 + half * 8 + 2 * q);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float2 v = unpack<Input>(x16[k][2 * half + i]);
                    weighted[k][2 * half + i] = pack<Input>(v.x * to_state.x, v.y * to_state.y);
                }
            }
        const float keep = decays.keep;
#pragma unroll
        for (int i = 0; i < kStates16 * 8; ++i) h[i] *= keep;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int block64 = 0; block64 < Shared::kTiles; ++block64) {
                const uint64_t b = descriptor(B_at + block64 * kTileBytes + k * 2048);
                constexpr int kLast = kStates16 - (Shared::kTiles - 1) * 4;
                if (block64 + 1 < Shared::kTiles)
                    wgmma_rs<Input, 64, 1>(h + block64 * 32, weighted[k], b, true);
                else
                    wgmma_rs<Input, kLast * 16, 1>(h + block64 * 32, weighted[k], b, true);
            }
        wgmma_commit();

        wgmma_wait<1>();
        pin(y);
        if (p.z != nullptr) {
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                const int row = row0 + 8 * (i / 2 % 2), column = i / 4 * 8 + 2 * q + i % 2;
                const int t = chunk * kChunk + column;
                if (row < channels && t < p.length) {
                    const int64_t at = batch * p.z_strides.batch + t * p.z_strides.time + head * p.z_strides.head;
                    const float z = static_cast<float>(static_cast<const Input *>(p.z)[at + first_channel + row]);
                    y[i] *= z / (1.f + exp2_fast(-1.4426950408889634f * z));
                }
            }
        }
        warpgroup_barrier(1 + slot);                         // S has been read
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            float *v = y + pair * 8;
            if (runs != nullptr) {
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    if (!(decays.run[pair * 16 + i / 4 * 8 + 2 * q + i % 2] & 1)) v[i] = 0.f;
            }
            store_transposed(scores_at + tile_offset(pair * 16 + across_row, warp * 32 + (block & 1) * 16),
                             pack<Input>(v[0], v[1]), pack<Input>(v[2], v[3]), pack<Input>(v[4], v[5]),
                             pack<Input>(v[6], v[7]));
        }
        warpgroup_barrier(1 + slot);
        {
            const int64_t stride = int64_t{p.heads} * p.headdim;
            char *to = static_cast<char *>(p.y)
                + ((batch * p.length + chunk * kChunk) * stride + head * p.headdim + first_channel) * 2;
            const int count = min(p.length - chunk * kChunk, kChunk);
            if (p.headdim % 8 == 0) store_rows_by<16>(to, stride, scores, count, channels, thread);
            else if (p.headdim % 4 == 0) store_rows_by<8>(to, stride, scores, count, channels, thread);
            else if (p.headdim % 2 == 0) store_rows_by<4>(to, stride, scores, count, channels, thread);
            else store_odd_rows(to, stride, scores, count, channels, thread);
        }
        wgmma_wait<0>();
        pin(h);
    }

    if (last_chunk < chunks) {
        if (active)
#pragma unroll
            for (int i = 0; i < kStates16 * 8; ++i) __stcg(carry() + i * 128, h[i]);
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0)
            asm volatile("st.release.gpu.global.s32 [%0], %1;"
                         ::"l"(p.tickets + 1 + column), "r"(segment + 1) : "memory");
    } else if (active) {
#pragma unroll
        for (int i = 0; i < kStates16 * 8; ++i) {
            const int row = row0 + 8 * (i / 2 % 2), n = i / 4 * 8 + 2 * q + i % 2;
            if (row < channels && n < p.dstate) p.final_states[(state_row() + row) * p.dstate + n] = h[i];
        }
    }
#endif
}

}  // namespace shedder
