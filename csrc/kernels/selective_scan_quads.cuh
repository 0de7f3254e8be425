// Selective scan, forward, the fast form; selective_scan_fwd.cuh has the recurrence and the form for everything else.
//
// A warp owns 16 channels and walks along t with h in registers. Four lanes share two channels, c and c + 8; a lane
// holds kStates states of each. kSplit warps share the states of the same 16 channels, for many states and for few
// channels.
// Time goes by tiles. In a tile the team of kSplit warps
//   1. reads u and delta in pieces of 8 steps of a channel, and puts (delta, delta u) of each step into shared memory;
//   2. walks; lanes exchange the sums over their states, each ends with every fourth step, left in shared memory;
//   3. takes the sums back in pieces, adds D u, multiplies by silu(z), writes.
// B and C of a tile enter shared memory as floats once for the CTA, while it walks through the tile before.
//
// Where there are few channels, the CTAs of a cluster take a segment of the sequence each. A first pass over all
// segments but the last finds the decay and the final state of each, the second starts from what came before.
//
// Bound: one ex2 per (t, n); close behind it the issue slots, 5 for each (t, n) and about 50 for each t.

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

template <int kWords>
__device__ inline void load_words(float (&to)[kWords], const float *from) {
    if constexpr (kWords == 1) {
        to[0] = *from;
    } else if constexpr (kWords == 2) {
        const float2 v = *reinterpret_cast<const float2 *>(from);
        to[0] = v.x, to[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < kWords; i += 4) {
            const float4 v = *reinterpret_cast<const float4 *>(from + i);
            to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
        }
    }
}

// Four neighbouring lanes with the sums of four steps each: lane c of them gets the whole sum of step c.
__device__ inline float exchange(const float (&v)[4], int c) {
    const bool upper = c & 2, odd = c & 1;
    const float even_step = (upper ? v[2] : v[0]) + __shfl_xor_sync(0xffffffffu, upper ? v[0] : v[2], 2);
    const float odd_step = (upper ? v[3] : v[1]) + __shfl_xor_sync(0xffffffffu, upper ? v[1] : v[3], 2);
    return (odd ? odd_step : even_step) + __shfl_xor_sync(0xffffffffu, odd ? even_step : odd_step, 1);
}

constexpr int kTileChannels = 16;

// The rows of u, delta, z and y are all accessed in the same way, those of B and C in another.
struct ScanQuadsAccess {
    Access rows, BC;
};

template <int kStates_, int kSplit_, int kTiles_, int kSteps_>
struct ScanQuads {
    static constexpr int kStates = kStates_;                             // of one lane
    static constexpr int kSplit = kSplit_;                               // warps that share the states of a tile
    static constexpr int kTiles = kTiles_;                               // of 16 channels, in a CTA
    static constexpr int kSteps = kSteps_;
    static constexpr int kTeam = 32 * kSplit, kThreads = kTeam * kTiles;
    static constexpr int kSlots = 4 * kStates * kSplit;                  // states there is room for
    static constexpr int kRowPieces = kSteps / kPieceSteps;
    static constexpr int kPieces = kTileChannels * kRowPieces > kTeam ? 2 : 1;       // of a thread; two: of channels
    static constexpr int kPieceRows = kTileChannels / kPieces;                       // c and c + 8
    static_assert(kPieceRows * kRowPieces <= kTeam && 2 * kSlots <= kThreads);
    // Threads beside each other bring the rows of B, then those of C; kBCStride pieces of each row at a time.
    static constexpr int kBCStride = kThreads / (2 * kSlots) < kRowPieces ? kThreads / (2 * kSlots) : kRowPieces;
    static constexpr int kBCPieces = (kRowPieces + kBCStride - 1) / kBCStride;
    // Floats of shared memory. A part is what one warp reads of B and C in a step.
    static constexpr int kWords = kStates <= 2 ? kStates : (kStates + 3) / 4 * 4;    // of one lane's B, then of its C
    static constexpr int kPart = 8 * kWords;
    static constexpr int kBCRow = kSplit * kPart;
    static constexpr int kStepPiece = 4 * (kPieceSteps + 1);             // 8 steps of channels c and c + 8; 16 bytes
    static constexpr int kStepRow = kRowPieces * kStepPiece + 4;         // apart, so that writers miss each other
    static constexpr int kSumRow = kSteps + 4;
    static constexpr int kTileFloats = 8 * kStepRow + kSplit * kTileChannels * kSumRow;
    static constexpr int kSharedBytes = 4 * (2 * kSteps * kBCRow + kTiles * kTileFloats);
};

// kAligned: all rows lie on the 16-byte grid, steps adjacent.
template <typename Input, typename Shape, int kMinBlocks, bool kAligned, bool kSegmented>
__global__ void __launch_bounds__(Shape::kThreads, kMinBlocks)
selective_scan_quads(const __grid_constant__ SelectiveScanParams p, const __grid_constant__ ScanQuadsAccess access) {
    constexpr int kStates = Shape::kStates, kSplit = Shape::kSplit, kSteps = Shape::kSteps;
    constexpr int kTeam = Shape::kTeam, kPieces = Shape::kPieces, kBCPieces = Shape::kBCPieces;
    constexpr int kStepRow = Shape::kStepRow, kSumRow = Shape::kSumRow, kBCRow = Shape::kBCRow;
    constexpr int kWords = Shape::kWords;
    extern __shared__ float4 shared_memory[];
    const int team = threadIdx.x / kTeam, member = threadIdx.x % kTeam;
    const int part = member / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
    float *const BC_tiles = reinterpret_cast<float *>(shared_memory);             // [2][kSteps][kBCRow]
    float *const step_rows = BC_tiles + 2 * kSteps * kBCRow + team * Shape::kTileFloats;
    float *const sum_rows = step_rows + 8 * kStepRow;                             // [kSplit][kTileChannels][kSumRow]

    const int first_channel = (blockIdx.y * Shape::kTiles + team) * kTileChannels, last = p.channels - 1;
    const int64_t b = blockIdx.z;
    int from = 0, length = p.length;                         // the steps of this CTA
    if constexpr (kSegmented) {
        const int tiles = (p.length + kSteps - 1) / kSteps, share = (tiles + gridDim.x - 1) / gridDim.x * kSteps;
        from = min(static_cast<int>(blockIdx.x) * share, p.length);
        length = min(from + share, p.length);
    }
    auto team_barrier = [&] {
        if constexpr (kSplit == 1) __syncwarp();
        else if constexpr (Shape::kTiles == 1) __syncthreads();
        else asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(kTeam) : "memory");
    };

    // ---- B and C: each thread brings pieces of one row
    const Access BC_access = kAligned ? Access::kVector : access.BC;
    const int BC_row = threadIdx.x % (2 * Shape::kSlots), BC_piece = threadIdx.x / (2 * Shape::kSlots);
    const bool is_B = BC_row < Shape::kSlots;
    const int BC_state = is_B ? BC_row : BC_row - Shape::kSlots;
    const bool brings_BC = BC_state < p.dstate && BC_piece < Shape::kBCStride;
    const int64_t BC_time = is_B ? p.B_strides.time : p.C_strides.time;
    const Input *BC_at = is_B
        ? static_cast<const Input *>(p.B) + b * p.B_strides.batch + BC_state * p.B_strides.state
        : static_cast<const Input *>(p.C) + b * p.C_strides.batch + BC_state * p.C_strides.state;
    BC_at += BC_piece * kPieceSteps * BC_time;
    Piece<Input> BC[kBCPieces];
    auto read_BC = [&](int start) {
        if (!brings_BC) return;
#pragma unroll
        for (int i = 0; i < kBCPieces; ++i) {
            const int q = i * Shape::kBCStride;
            if (q + BC_piece < Shape::kRowPieces)
                BC[i] = read_piece(BC_at + (start + q * kPieceSteps) * BC_time, BC_time,
                                   length - start - (q + BC_piece) * kPieceSteps, BC_access);
        }
    };
    // The lane in column c of four holds the states n with n % 4 = c.
    const int BC_put = BC_piece * kPieceSteps * kBCRow + BC_state / (4 * kStates) * Shape::kPart
        + (is_B ? 0 : 4 * kWords) + BC_state % 4 * kWords + BC_state / 4 % kStates;
    auto put_BC = [&](float *tile) {
        if (!brings_BC) return;
#pragma unroll
        for (int i = 0; i < kBCPieces; ++i) {
            const int q = i * Shape::kBCStride;
            if (q + BC_piece >= Shape::kRowPieces) continue;
#pragma unroll
            for (int k = 0; k < kPieceSteps; ++k)
                tile[BC_put + (q * kPieceSteps + k) * kBCRow] = BC[i].get(k);
        }
    };

    // ---- u, delta, z, y: pieces of this team's channels
    const Access row_access = kAligned ? Access::kVector : access.rows;
    const bool time_first = row_access != Access::kStrided;
    const int piece_channel = time_first ? member / Shape::kRowPieces : member % Shape::kPieceRows;
    const int piece_step = (time_first ? member % Shape::kRowPieces : member / Shape::kPieceRows) * kPieceSteps;
    const bool has_piece = piece_channel < Shape::kPieceRows && piece_step < kSteps;
    bool there[kPieces];
    float bias[kPieces], skip[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
        const int64_t c = first_channel + piece_channel + 8 * i;
        there[i] = has_piece && c <= last;
        bias[i] = there[i] && p.delta_bias != nullptr ? p.delta_bias[c * p.delta_bias_stride] : 0.f;
        skip[i] = there[i] && p.D != nullptr ? p.D[c * p.D_stride] : 0.f;
    }
    auto first_of = [&](const void *tensor, const Strides3 &s) {                  // of piece 0 in the first tile
        return static_cast<const Input *>(tensor) + b * s.batch + (first_channel + piece_channel) * s.channel
            + piece_step * s.time;
    };
    const Input *const u_at = first_of(p.u, p.u_strides), *const delta_at = first_of(p.delta, p.delta_strides);
    const Input *const z_at = first_of(p.z, p.z_strides);
    Input *const y_at = const_cast<Input *>(first_of(p.y, p.y_strides));
    auto read = [&](Piece<Input> (&to)[kPieces], const Input *at, const Strides3 &s, int start) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i)
            if (there[i])
                to[i] = read_piece(at + i * 8 * s.channel + start * s.time, s.time, length - start - piece_step,
                                   row_access);
    };
    Piece<Input> u_next[kPieces] = {}, delta_next[kPieces] = {};

    // ---- the state, of channels row and row + 8
    float A[2][kStates], h[2][kStates];
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < kStates; ++i) {
            const int64_t c = min(first_channel + row + 8 * j, last);
            const int n = (part * kStates + i) * 4 + column;
            A[j][i] = n < p.dstate ? p.A[c * p.A_channel_stride + n * p.A_state_stride] * kLog2e : 0.f;
            h[j][i] = 0.f;
        }
    auto state_at = [&](int j, int i) {                      // in (batch, channel, state); negative: not there
        const int c = first_channel + row + 8 * j, n = (part * kStates + i) * 4 + column;
        return c <= last && n < p.dstate ? (b * p.channels + c) * p.dstate + n : int64_t{-1};
    };

    if (p.dstate != Shape::kSlots || kWords != kStates) {          // zeros for states not there
        for (int i = threadIdx.x; i < 2 * kSteps * kBCRow; i += Shape::kThreads) BC_tiles[i] = 0.f;
        __syncthreads();
    }

    float delta_sum[2] = {0.f, 0.f};
    // One pass over the steps of this CTA. Without output it only carries the state and adds up delta.
    auto pass = [&](auto with_output) {
        constexpr bool kOutput = decltype(with_output)::value;
        read_BC(from);
        read(u_next, u_at, p.u_strides, from);
        read(delta_next, delta_at, p.delta_strides, from);
        put_BC(BC_tiles);
        int parity = 0;
        for (int start = from; start < length; start += kSteps, parity ^= 1) {
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
            if (start + kSteps > length)
#pragma unroll
                for (int i = 0; i < kPieces; ++i)
#pragma unroll
                    for (int k = 0; k < kPieceSteps; ++k)
                        if (start + piece_step + k >= length) d[i][k] = 0.f;        // the state passes by
            Piece<Input> u[kPieces], z[kPieces] = {};
#pragma unroll
            for (int i = 0; i < kPieces; ++i) u[i] = u_next[i];
            if (has_piece) {
                float *to = step_rows + piece_channel % 8 * kStepRow + piece_step / kPieceSteps * Shape::kStepPiece;
                auto input = [&](int i, int k) { return d[i][k] * u[i].get(k); };
#pragma unroll
                for (int k = 0; k < kPieceSteps; ++k, to += 4) {
                    if constexpr (kPieces == 2) {
                        *reinterpret_cast<float4 *>(to) = make_float4(d[0][k], d[1][k], input(0, k), input(1, k));
                    } else {
                        to[piece_channel / 8] = d[0][k];
                        to[2 + piece_channel / 8] = input(0, k);
                    }
                }
            }
            __syncthreads();                                 // this tile of B and C, and the other team members' steps
            if (kOutput && p.z != nullptr) read(z, z_at, p.z_strides, start);
            const bool more = start + kSteps < length;
            if (more) {
                read(u_next, u_at, p.u_strides, start + kSteps);
                read(delta_next, delta_at, p.delta_strides, start + kSteps);
                read_BC(start + kSteps);
            }

            const int steps = min(kSteps, length - start);
            const float *step_at = step_rows + row * kStepRow;
            const float *BC_at = BC_tiles + parity * kSteps * kBCRow + part * Shape::kPart + column * kWords;
            float *sum_at = sum_rows + (part * kTileChannels + row) * kSumRow + column;
            for (int s = 0; s < steps; s += kPieceSteps) {
                float sum[2][4];                             // of four steps of both channels
#pragma unroll
                for (int t = 0; t < kPieceSteps; ++t) {
                    const float4 step = *reinterpret_cast<const float4 *>(step_at + 4 * t);
                    float B[kWords], C[kWords], y[2] = {0.f, 0.f};
                    load_words(B, BC_at + t * kBCRow);
                    if constexpr (kOutput) load_words(C, BC_at + t * kBCRow + 4 * kWords);
                    else delta_sum[0] += step.x, delta_sum[1] += step.y;
#pragma unroll
                    for (int i = 0; i < kStates; ++i) {
                        h[0][i] = fmaf(fast_exp2(step.x * A[0][i]), h[0][i], step.z * B[i]);
                        h[1][i] = fmaf(fast_exp2(step.y * A[1][i]), h[1][i], step.w * B[i]);
                        if constexpr (kOutput) {
                            y[0] = i == 0 ? C[0] * h[0][0] : fmaf(C[i], h[0][i], y[0]);
                            y[1] = i == 0 ? C[0] * h[1][0] : fmaf(C[i], h[1][i], y[1]);
                        }
                    }
                    sum[0][t % 4] = y[0], sum[1][t % 4] = y[1];
                    if (kOutput && t % 4 == 3) {
                        sum_at[t - 3] = exchange(sum[0], column);
                        sum_at[8 * kSumRow + t - 3] = exchange(sum[1], column);
                    }
                }
                step_at += Shape::kStepPiece;
                BC_at += kPieceSteps * kBCRow;
                sum_at += kPieceSteps;
            }
            team_barrier();

            if constexpr (kOutput) {
#pragma unroll
                for (int i = 0; i < kPieces; ++i) {
                    if (!there[i]) continue;
                    float *const sums = sum_rows + (piece_channel + 8 * i) * kSumRow + piece_step;
                    float y[kPieceSteps];
                    load_words(y, sums);
#pragma unroll
                    for (int other = 1; other < kSplit; ++other) {
                        float more_y[kPieceSteps];
                        load_words(more_y, sums + other * kTileChannels * kSumRow);
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
                            *reinterpret_cast<float4 *>(sums + k) = make_float4(y[k], y[k + 1], y[k + 2], y[k + 3]);
                    } else {
                        write_piece(y_at + i * 8 * p.y_strides.channel + start * p.y_strides.time, p.y_strides.time,
                                    length - start - piece_step, row_access, y);
                    }
                }
                if (row_access == Access::kShifted) {
                    team_barrier();
                    const int count = min(kTileChannels, p.channels - first_channel);
                    for (int c = member / 16; c < count; c += kTeam / 16) {          // half a warp a row
                        Input *row_at = static_cast<Input *>(p.y) + b * p.y_strides.batch
                            + (first_channel + c) * p.y_strides.channel + start;
                        write_row<1>(row_at, sum_rows + c * kSumRow, steps, member % 16);
                    }
                    team_barrier();
                }
            }
            if (more) put_BC(BC_tiles + (parity ^ 1) * kSteps * kBCRow);
        }
    };

    auto start_state = [&] {
#pragma unroll
        for (int j = 0; j < 2; ++j)
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
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int i = 0; i < kStates; ++i) {
                effect[(j * kStates + i) * Shape::kThreads] = fast_exp2(delta_sum[j] * A[j][i]);
                effect[((2 + j) * kStates + i) * Shape::kThreads] = h[j][i];
            }
        cluster.sync();
        start_state();
        for (unsigned before = 0; before < blockIdx.x; ++before) {
            const float *theirs = cluster.map_shared_rank(effect, before);
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int i = 0; i < kStates; ++i)
                    h[j][i] = fmaf(theirs[(j * kStates + i) * Shape::kThreads], h[j][i],
                                   theirs[((2 + j) * kStates + i) * Shape::kThreads]);
        }
        cluster.sync();
        for (int i = threadIdx.x; i < 2 * kSteps * kBCRow; i += Shape::kThreads) BC_tiles[i] = 0.f;
        __syncthreads();
    } else
#endif
    {
        start_state();
    }
    pass(std::true_type{});

    if (p.final_state == nullptr || (kSegmented && blockIdx.x + 1 < gridDim.x)) return;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < kStates; ++i)
            if (const int64_t at = state_at(j, i); at >= 0) p.final_state[at] = h[j][i];
}

}  // namespace shedder
