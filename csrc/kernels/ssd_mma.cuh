// State-space duality (Mamba-2), forward, by mma.sync: 16-bit inputs on any GPU from compute capability 8.0 on, and
// fp32. On Hopper ssd_fwd.cuh is faster for 16-bit inputs.
//
//   dt       = clamp(softplus(dt + bias), dt_min, dt_max)
//   h[t,p,n] = exp(dt[t] A) h[t-1,p,n] + dt[t] x[t,p] B[t,n]
//   y[t,p]   = (sum_n C[t,n] h[t,p,n] + D x[t,p]) silu(z[t,p])
//
// In chunks of Q tokens, with s[t] = log2(e) * sum of dt A from the chunk's first token to t:
//
//   S[i,j] = (C[i] . B[j]) 2^(s[i] - s[j]) dt[j]   for j <= i
//   y^T    = (h C^T) 2^s + x^T S^T + D x^T
//   h      = 2^s[Q-1] h + (x 2^(s[Q-1] - s) dt)^T B
//
// A CTA owns 64 channels of one head and walks along the chunks, each of its four warps with the states of 16 channels
// in registers, as sums of mma. fp32 is split in two bf16, v = high + low to 2^-17 of it, and a product is the four of
// them. Other CTAs of the multiprocessor work while one waits for its copies.

#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/dependents.cuh"
#include "kernels/pointwise.cuh"
#include "kernels/shared_address.cuh"

namespace shedder {

struct SsdMmaStrides {                                       // in elements
    int64_t batch, time, head;                               // or group
};

struct SsdMmaParams {
    const void *x, *B, *C, *z, *dt;                          // Input; z may be null; dt is float where dt_float
    const float *A, *D, *dt_bias, *initial;                  // all but A may be null; initial as final_states
    const int32_t *runs;                                     // (batch, time), ~run for padding; may be null
    const int32_t *head_to_group;
    void *y;                                                 // (batch, time, head, channel)
    float *final_states;                                     // (batch, head, channel, state); may be null
    SsdMmaStrides x_strides, B_strides, C_strides, z_strides, dt_strides;
    int64_t A_stride, D_head_stride, D_channel_stride, dt_bias_stride;
    float dt_min, dt_max;
    int length, heads, headdim, dstate;
    int tiles;                                               // of 64 channels in a head
    int x_width, B_width, C_width;                           // bytes that the start of every row is a multiple of
    bool dt_softplus, dt_float;
};

constexpr int kMmaThreads = 128, kMmaRow = 128;              // bytes of a row of a tile: 64 columns of 16 bits

template <typename Input, int kStates16>
struct SsdMmaTile {
    using Operand = std::conditional_t<std::is_same_v<Input, float>, __nv_bfloat16, Input>;
    static constexpr int kParts = sizeof(Input) / 2;         // high and low of fp32
    // Shared memory of two CTAs on a multiprocessor of an A100, and registers of 256 states, decide.
    static constexpr int kChunk = kStates16 > (kParts == 2 ? 8 : 12) ? 32 : 64;
    static constexpr int kCtas = kStates16 <= (kParts == 2 ? 2 : 4) ? 3 : 2;
    static constexpr int kTile = kChunk * kMmaRow;
    static constexpr int kStateTiles = (kStates16 + 3) / 4;
    static constexpr int kOperandPart = kStateTiles * kTile; // of B or C
    static constexpr int kC = 0, kB = kC + kParts * kOperandPart, kX = kB + kParts * kOperandPart;
    static constexpr int kScores = kX + kParts * kTile, kDecays = kScores + kParts * kTile;
    static constexpr int kBytes = kDecays + kChunk * 24 + 16;
};

// What each token of a chunk contributes.
template <int kChunk>
struct SsdMmaDecays {
    float2 s[kChunk];                                        // the sum in two parts, since differences matter
    float dt[kChunk], from_state[kChunk], to_state[kChunk];  // 2^s; dt 2^(s[Q-1] - s)
    int run[kChunk];                                         // twice the run, plus one if y is shown
    float keep;                                              // 2^s[Q-1]
};

// Where column `column` of a row lies among the tiles of kTile bytes: pieces of 16 bytes change places with the row, so
// that 8 rows of one column lie in different banks.
template <int kTile>
__device__ __forceinline__ int mma_offset(int row, int column) {
    return column / 64 * kTile + row * kMmaRow + ((column % 64 * 2) ^ (row % 8 << 4));
}

__device__ __forceinline__ void load_blocks(uint32_t (&r)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

__device__ __forceinline__ void load_blocks_turned(uint32_t (&r)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// c (16 x 8) += a (16 x 16) b (16 x 8).
template <typename Operand>
__device__ __forceinline__ void mma(float *c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<Operand, __half>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 x 16 elements as ldmatrix gives them, of each part.
template <int kParts>
struct Blocks {
    uint32_t part[kParts][4];
};

// c[i] += a b[i / 2]'s columns i % 2 * 8 ... for kTiles tiles of 16 x 8; neighbours in time do not wait for each other.
template <typename Operand, int kTiles, int kParts>
__device__ __forceinline__ void mma_tiles(float (*c)[4], const Blocks<kParts> &a,
                                          const Blocks<kParts> (&b)[kTiles / 2]) {
#pragma unroll
    for (int product = 0; product < kParts * kParts; ++product)
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
            const uint32_t *columns = b[i / 2].part[product % kParts] + i % 2 * 2;
            mma<Operand>(c[i], a.part[product / kParts], columns[0], columns[1]);
        }
}

template <typename Operand>
__device__ __forceinline__ uint32_t mma_pack(float low, float high) {
    if constexpr (std::is_same_v<Operand, __half>) {
        const __half2 v = __floats2half2_rn(low, high);
        return reinterpret_cast<const uint32_t &>(v);
    } else {
        const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
        return reinterpret_cast<const uint32_t &>(v);
    }
}

template <typename Operand>
__device__ __forceinline__ float2 mma_unpack(uint32_t v) {
    if constexpr (std::is_same_v<Operand, __half>) return __half22float2(reinterpret_cast<const __half2 &>(v));
    else return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)};
}

// Two values in the parts of an operand.
template <typename Operand, int kParts>
__device__ __forceinline__ void split(uint32_t (&part)[kParts], float v, float w) {
    part[0] = mma_pack<Operand>(v, w);
    if constexpr (kParts == 2) {
        const float2 high = mma_unpack<Operand>(part[0]);
        part[1] = mma_pack<Operand>(v - high.x, w - high.y);
    }
}

struct SsdMmaRows {                                          // of one operand for a chunk
    const char *first;
    int64_t stride;                                          // bytes
    int count, columns;                                      // that exist; zeros stand for the others
};

constexpr int mma_lanes(int pieces) {                        // the next power of two
    int lanes = 1;
    while (lanes < pieces) lanes *= 2;
    return lanes;
}

// Rows of 16-bit elements: asynchronous copies of kBytes, or element by element for rows that start anywhere (2).
template <typename Input, int kTile, int kBytes, int kColumns>
__device__ __forceinline__ void copy_rows(char *to, const SsdMmaRows &rows, int thread) {
    constexpr int kElements = kBytes == 2 ? 2 : kBytes / 2, kLanes = mma_lanes(kColumns / kElements);
    constexpr int kStep = kMmaThreads / kLanes;
    const int column = thread % kLanes * kElements, row0 = thread / kLanes;
    if (column >= kColumns) return;
    const int valid = min(max(rows.columns - column, 0), kElements);
    const char *from = rows.first + row0 * rows.stride + (valid > 0 ? column * 2 : 0);
#pragma unroll 4
    for (int row = row0; row < kTile / kMmaRow; row += kStep, from += kStep * rows.stride) {
        const int count = row < rows.count ? valid : 0;
        char *const at = to + mma_offset<kTile>(row, column);
        if constexpr (kBytes == 16) {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                         ::"r"(shared_address(at)), "l"(count > 0 ? from : rows.first), "r"(count * 2) : "memory");
        } else if constexpr (kBytes > 2) {
            asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                         ::"r"(shared_address(at)), "l"(count > 0 ? from : rows.first), "n"(kBytes), "r"(count * 2)
                         : "memory");
        } else {
            const uint16_t *pair = reinterpret_cast<const uint16_t *>(from);
            const uint32_t low = count > 0 ? pair[0] : 0, high = count > 1 ? pair[1] : 0;
            *reinterpret_cast<uint32_t *>(at) = low | high << 16;
        }
    }
}

// Rows of fp32, split in high and low on their way: four elements at once, or two where rows start or end anywhere.
template <int kTile, int kPart, int kElements, int kColumns>
__device__ __forceinline__ void copy_rows_split(char *to, const SsdMmaRows &rows, int thread) {
    constexpr int kLanes = mma_lanes(kColumns / kElements), kStep = kMmaThreads / kLanes;
    const int column = thread % kLanes * kElements, row0 = thread / kLanes;
    if (column >= kColumns) return;
    const int valid = rows.columns - column;
    const char *from = rows.first + row0 * rows.stride + column * 4;
#pragma unroll 8
    for (int row = row0; row < kTile / kMmaRow; row += kStep, from += kStep * rows.stride) {
        float4 v{};
        if constexpr (kElements == 4) {
            if (row < rows.count && valid > 0) v = *reinterpret_cast<const float4 *>(from);
        } else {
            if (row < rows.count && valid > 0) v.x = reinterpret_cast<const float *>(from)[0];
            if (row < rows.count && valid > 1) v.y = reinterpret_cast<const float *>(from)[1];
        }
        char *const at = to + mma_offset<kTile>(row, column);
        uint32_t first[2], second[2];
        split<__nv_bfloat16, 2>(first, v.x, v.y);
        if constexpr (kElements == 4) {
            split<__nv_bfloat16, 2>(second, v.z, v.w);
            *reinterpret_cast<uint2 *>(at) = {first[0], second[0]};
            *reinterpret_cast<uint2 *>(at + kPart) = {first[1], second[1]};
        } else {
            *reinterpret_cast<uint32_t *>(at) = first[0];
            *reinterpret_cast<uint32_t *>(at + kPart) = first[1];
        }
    }
}

template <typename Input, int kTile, int kPart, int kColumns>
__device__ __forceinline__ void copy_rows(char *to, const SsdMmaRows &rows, int width, int thread) {
    if constexpr (sizeof(Input) == 4) {
        if (width == 16 && rows.columns % 4 == 0) copy_rows_split<kTile, kPart, 4, kColumns>(to, rows, thread);
        else copy_rows_split<kTile, kPart, 2, kColumns>(to, rows, thread);
    } else {
        if (width == 16) copy_rows<Input, kTile, 16, kColumns>(to, rows, thread);
        else if (width == 8) copy_rows<Input, kTile, 8, kColumns>(to, rows, thread);
        else if (width == 4) copy_rows<Input, kTile, 4, kColumns>(to, rows, thread);
        else copy_rows<Input, kTile, 2, kColumns>(to, rows, thread);
    }
}

// dt of a lane's tokens of a chunk as given.
template <typename Input, int kTokens>
__device__ __forceinline__ void fetch_dt(const SsdMmaParams &p, int64_t batch, int head, int first,
                                         float (&dt)[kTokens]) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
        const int64_t at = batch * p.dt_strides.batch + head * p.dt_strides.head
            + min(first + i, p.length - 1) * p.dt_strides.time;
        dt[i] = p.dt_float ? static_cast<const float *>(p.dt)[at] : to_float(static_cast<const Input *>(p.dt)[at]);
    }
}

// The decays of one chunk, by one warp.
template <int kChunk, int kTokens>
__device__ __forceinline__ void prepare_chunk(const SsdMmaParams &p, int64_t batch, int head, int chunk,
                                              float (&dt)[kTokens], SsdMmaDecays<kChunk> &to) {
    const int lane = threadIdx.x % 32;
    const float A = p.A[head * p.A_stride], bias = p.dt_bias == nullptr ? 0.f : p.dt_bias[head * p.dt_bias_stride];
    const int32_t *runs = p.runs == nullptr ? nullptr : p.runs + batch * p.length;
    double s[kTokens], sum = 0;
    int run[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
        const int t = chunk * kChunk + kTokens * lane + i;
        dt[i] += bias;
        if (p.dt_softplus) dt[i] = softplus(dt[i]);
        dt[i] = dt[i] < p.dt_min ? p.dt_min : dt[i];         // comparisons, so that NaN stays NaN
        dt[i] = dt[i] > p.dt_max ? p.dt_max : dt[i];
        bool shown = t < p.length;
        run[i] = runs == nullptr ? 0 : runs[min(t, p.length - 1)];
        shown = shown && run[i] >= 0;
        run[i] = run[i] < 0 ? ~run[i] : run[i];
        dt[i] = shown ? dt[i] : 0.f;
        to.run[kTokens * lane + i] = 2 * run[i] + shown;
        const double decay = static_cast<double>(dt[i]) * A * 1.4426950408889634;
        sum += decay < -160. ? -160. : decay;                // is 0 all the same, and the sum stays finite
        s[i] = sum;
    }
    double before = sum;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const double other = __shfl_up_sync(0xffffffffu, before, offset);
        if (lane >= offset) before += other;
    }
    const double total = __shfl_sync(0xffffffffu, before, 31);
    const int run_out = __shfl_sync(0xffffffffu, run[kTokens - 1], 31);
    int run_in = runs == nullptr || chunk == 0 ? 0 : runs[chunk * kChunk - 1];       // that the state belongs to
    run_in = run_in < 0 ? ~run_in : run_in;
    before -= sum;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
        const double here = before + s[i];
        const float high = static_cast<float>(here);
        const int t = kTokens * lane + i;
        to.s[t] = {high, static_cast<float>(here - high)};
        to.dt[t] = dt[i];
        to.from_state[t] = run[i] == run_in ? exp2f(high) : 0.f;
        to.to_state[t] = run[i] == run_out ? exp2f(static_cast<float>(total - here)) * dt[i] : 0.f;
    }
    if (lane == 0) to.keep = run_in == run_out ? exp2f(static_cast<float>(total)) : 0.f;
}

template <typename Input, int kStates16>
__global__ void __launch_bounds__(kMmaThreads, SsdMmaTile<Input, kStates16>::kCtas)
    ssd_mma(const __grid_constant__ SsdMmaParams p) {
    using Tile = SsdMmaTile<Input, kStates16>;
    using Operand = typename Tile::Operand;
    constexpr int kParts = Tile::kParts, kChunk = Tile::kChunk, kTile = Tile::kTile, kRows16 = kChunk / 16;
    constexpr bool kBounded = kStates16 > 12;                // loads that the compiler takes ahead: registers are short
    using Fragment = Blocks<kParts>;
    extern __shared__ __align__(128) char mma_memory[];
    SsdMmaDecays<kChunk> &decays = *reinterpret_cast<SsdMmaDecays<kChunk> *>(mma_memory + Tile::kDecays);
    const uint32_t shared_at = shared_address(mma_memory);

    wait_for_kernel_before();
    int head = blockIdx.x / p.tiles % p.heads, batch = blockIdx.x / p.tiles / p.heads;
    const int first_channel = blockIdx.x % p.tiles * 64, channels = min(p.headdim - first_channel, 64);
    const int warp = threadIdx.x / 32;
    const bool works = warp * 16 < channels;                 // else only copies and scores
    int thread = threadIdx.x;
    // Sums of mma: a lane holds rows g and g + 8, columns 2 q and 2 q + 1 of every 8.
    auto g = [&] { return thread / 4 % 8; };
    auto q = [&] { return thread % 4; };
    auto channel = [&](int e) { return warp * 16 + g() + e / 2 * 8; };
    auto state = [&](auto *states, int i, int e) {           // of sum e of columns i * 8 ...; null: there is none
        const int n = i * 8 + 2 * q() + e % 2, c = channel(e);
        const int64_t row = (int64_t{batch} * p.heads + head) * p.headdim + first_channel + c;
        return c < channels && n < p.dstate ? states + row * p.dstate + n : nullptr;
    };
    auto rows_of = [&](const void *data, const SsdMmaStrides &strides, int of_head, int first, int columns, int chunk) {
        const int64_t at = batch * strides.batch + chunk * kChunk * strides.time + of_head * strides.head + first;
        return SsdMmaRows{static_cast<const char *>(data) + at * int64_t{sizeof(Input)},
                          strides.time * int64_t{sizeof(Input)}, min(p.length - chunk * kChunk, kChunk), columns};
    };
    float skip[2] = {};
    if (p.D != nullptr)
        for (int i = 0; i < 2; ++i)
            if (channel(2 * i) < channels)
                skip[i] = p.D[head * p.D_head_stride + (first_channel + channel(2 * i)) * p.D_channel_stride];
    float h[kStates16 * 2][4] = {};
    if (p.initial != nullptr)
#pragma unroll
        for (int i = 0; i < kStates16 * 2; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (const float *from = state(p.initial, i, e)) h[i][e] = *from;

    const int chunks = (p.length + kChunk - 1) / kChunk;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
        asm volatile("" : "+r"(thread), "+r"(head), "+r"(batch));      // hidden, else addresses fill the registers
        float dt[kChunk / 32];
        if (warp == 0) fetch_dt<Input>(p, batch, head, chunk * kChunk + thread * (kChunk / 32), dt);
        __syncthreads();                                     // the tiles of the chunk before have been read
        const SsdMmaRows C = rows_of(p.C, p.C_strides, p.head_to_group[head], 0, p.dstate, chunk);
        copy_rows<Input, kTile, Tile::kOperandPart, kStates16 * 16>(mma_memory + Tile::kC, C, p.C_width, thread);
        const SsdMmaRows B = rows_of(p.B, p.B_strides, p.head_to_group[head], 0, p.dstate, chunk);
        copy_rows<Input, kTile, Tile::kOperandPart, kStates16 * 16>(mma_memory + Tile::kB, B, p.B_width, thread);
        const SsdMmaRows x = rows_of(p.x, p.x_strides, head, first_channel, channels, chunk);
        copy_rows<Input, kTile, kTile, 64>(mma_memory + Tile::kX, x, p.x_width, thread);
        if (warp == 0) prepare_chunk(p, batch, head, chunk, dt, decays);
        if constexpr (kParts == 1) asm volatile("cp.async.wait_all;" ::: "memory");
        __syncthreads();

        // Addresses of 16 x 16 elements for ldmatrix, blocks of 8 x 8 rows first or columns first; 16 columns on: ^ 32.
        const int lane = thread % 32;
        const int down_at = mma_offset<kTile>(lane % 16, lane / 16 * 8);
        const int across_at = mma_offset<kTile>(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
        auto place = [](int row16, int column16) { return column16 / 4 * kTile + row16 * 16 * kMmaRow; };
        auto load = [&](int operand, int part_bytes, int offset, int row16, int column16) {
            Fragment f;
#pragma unroll
            for (int part = 0; part < kParts; ++part)
                load_blocks(f.part[part], shared_at + operand + part * part_bytes + place(row16, column16)
                                              + (offset ^ column16 % 4 * 32));
            return f;
        };
        auto load_turned = [&](int operand, int part_bytes, int offset, int row16, int column16) {
            Fragment f;
#pragma unroll
            for (int part = 0; part < kParts; ++part)
                load_blocks_turned(f.part[part], shared_at + operand + part * part_bytes + place(row16, column16)
                                                     + (offset ^ column16 % 4 * 32));
            return f;
        };

        // S, by blocks of 16 x 16 at and below the diagonal.
#pragma unroll 1
        for (int block = warp; block < kRows16 * (kRows16 + 1) / 2; block += kMmaThreads / 32) {
            int bi = 0, bj = block;
            while (bj > bi) bj -= ++bi;
            float sums[2][4] = {};
#pragma unroll
            for (int k = 0; k < kStates16; ++k) {
                const Fragment a = load(Tile::kC, Tile::kOperandPart, down_at, bi, k);
                const Fragment b[1] = {load(Tile::kB, Tile::kOperandPart, across_at, bj, k)};
                mma_tiles<Operand, 2>(sums, a, b);
            }
#pragma unroll
            for (int down = 0; down < 2; ++down) {
                const int i = bi * 16 + g() + down * 8;
                const float2 s = decays.s[i];
                const int run = decays.run[i] >> 1;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int j = bj * 16 + half * 8 + 2 * q();
                    float v[2];
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const float2 from = decays.s[j + e];
                        const float weight = fast_exp2(s.x - from.x + (s.y - from.y)) * decays.dt[j + e];
                        const bool earlier = j + e <= i & run == decays.run[j + e] >> 1;
                        v[e] = earlier ? sums[half][2 * down + e] * weight : 0.f;
                    }
                    uint32_t parts[kParts];
                    split<Operand, kParts>(parts, v[0], v[1]);
#pragma unroll
                    for (int part = 0; part < kParts; ++part)
                        *reinterpret_cast<uint32_t *>(mma_memory + Tile::kScores + part * kTile
                                                      + mma_offset<kTile>(i, j)) = parts[part];
                }
            }
        }

        float y[kRows16 * 2][4] = {};
        if (works) {
#pragma unroll
            for (int k = 0; k < kStates16; ++k) {
                if (kBounded) __syncwarp();
                Fragment a;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    uint32_t parts[kParts];
                    split<Operand, kParts>(parts, h[2 * k + i / 2][i % 2 * 2], h[2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
                    for (int part = 0; part < kParts; ++part) a.part[part][i] = parts[part];
                }
#pragma unroll
                for (int row = 0; row < kRows16; row += 2) {
                    const Fragment b[2] = {load(Tile::kC, Tile::kOperandPart, across_at, row, k),
                                           load(Tile::kC, Tile::kOperandPart, across_at, row + 1, k)};
                    mma_tiles<Operand, 4>(y + 2 * row, a, b);
                }
            }
        }
        __syncthreads();                                     // S is there
        if (!works) continue;
#pragma unroll
        for (int i = 0; i < kRows16 * 2; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) y[i][e] *= decays.from_state[i * 8 + 2 * q() + e % 2];
        const float keep = decays.keep;
#pragma unroll
        for (int i = 0; i < kStates16 * 2; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) h[i][e] *= keep;

#pragma unroll
        for (int k = 0; k < kRows16; ++k) {                  // 16 tokens whose inputs are added
            const Fragment a = load_turned(Tile::kX, kTile, across_at, k, warp);
            Fragment weighted;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int t = k * 16 + i / 2 * 8 + 2 * q();
                float2 v = mma_unpack<Operand>(a.part[0][i]);
                if constexpr (kParts == 2) {
                    const float2 low = mma_unpack<Operand>(a.part[1][i]);
                    v = {v.x + low.x, v.y + low.y};
                }
                y[2 * k + i / 2][i % 2 * 2] += skip[i % 2] * v.x;
                y[2 * k + i / 2][i % 2 * 2 + 1] += skip[i % 2] * v.y;
                uint32_t parts[kParts];
                split<Operand, kParts>(parts, v.x * decays.to_state[t], v.y * decays.to_state[t + 1]);
#pragma unroll
                for (int part = 0; part < kParts; ++part) weighted.part[part][i] = parts[part];
            }
#pragma unroll
            for (int row = k; row < kRows16; ++row) {
                const Fragment b[1] = {load(Tile::kScores, kTile, across_at, row, k)};
                mma_tiles<Operand, 2>(y + 2 * row, a, b);
            }
#pragma unroll
            for (int n = 0; n + 1 < kStates16; n += 2) {
                if (kBounded) __syncwarp();
                const Fragment b[2] = {load_turned(Tile::kB, Tile::kOperandPart, down_at, k, n),
                                       load_turned(Tile::kB, Tile::kOperandPart, down_at, k, n + 1)};
                mma_tiles<Operand, 4>(h + 2 * n, weighted, b);
            }
            if constexpr (kStates16 % 2 == 1) {
                const Fragment b[1] = {load_turned(Tile::kB, Tile::kOperandPart, down_at, k, kStates16 - 1)};
                mma_tiles<Operand, 2>(h + 2 * kStates16 - 2, weighted, b);
            }
        }

        const int64_t first = int64_t{batch} * p.length + chunk * kChunk, y_stride = int64_t{p.heads} * p.headdim;
        Input *const y_at = static_cast<Input *>(p.y) + first * y_stride + head * p.headdim + first_channel;
        const Input *const z_at = p.z == nullptr ? nullptr : static_cast<const Input *>(p.z)
            + batch * p.z_strides.batch + chunk * kChunk * p.z_strides.time + head * p.z_strides.head + first_channel;
        const int count = p.length - chunk * kChunk;
        auto for_each = [&](auto apply) {
#pragma unroll
            for (int i = 0; i < kRows16 * 2; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int t = i * 8 + 2 * q() + e % 2, c = channel(e);
                    apply(y[i][e], t, c, t < count & c < channels);
                }
        };
        if (z_at != nullptr)
            for_each([&](float &v, int t, int c, bool exists) {
                v *= fast_silu(exists ? to_float(z_at[t * p.z_strides.time + c]) : 0.f);
            });
        if (p.runs != nullptr) for_each([&](float &v, int t, int, bool) { v = decays.run[t] & 1 ? v : 0.f; });
        for_each([&](float v, int t, int c, bool exists) {
            if (exists) y_at[t * y_stride + c] = from_float<Input>(v);
        });
    }

    if (p.final_states == nullptr) return;
#pragma unroll
    for (int i = 0; i < kStates16 * 2; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (float *to = state(p.final_states, i, e)) *to = h[i][e];
}

}  // namespace shedder
