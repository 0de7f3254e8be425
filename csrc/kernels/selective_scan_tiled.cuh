// Selective scan, forward, a fast form for up to 16 states; selective_scan_fwd.cuh has the recurrence,
// selective_scan_quads.cuh the form for more states and for very few channels.
//
// kLanes neighbouring threads of a warp own kChannels channels together, kStates states each, and walk along t with h
// in registers. Time goes by tiles. In a tile a warp
//   1. reads u and delta of its channels in pieces of 8 steps, and puts (delta, delta u) of each step into shared
//      memory;
//   2. walks: h of each step from (delta, delta u), B and C; lanes exchange their sums so that each ends with the y of
//      one (channel, step), and leave it in the place of delta;
//   3. takes y back in pieces, adds D u, multiplies by silu(z), writes.
// B and C of a tile enter shared memory as floats once for the CTA, while it walks through the tile before. Only they
// are shared between warps: one barrier a tile. Bound: one ex2 per (t, n); close behind it the issue slots, 4 and a
// fraction for each (t, n) and about 30 for each t.

#pragma once

#include "kernels/selective_scan_fwd.cuh"
#include "kernels/selective_scan_rows.cuh"

namespace shedder {

__device__ inline float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float lg2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

constexpr float kLn2 = 0.6931471805599453f;

// softplus and silu in base 2, to about 3e-6: enough under the rounding of a 2-byte input. fp32 takes the exact ones.
template <typename Input>
__device__ inline float softplus_of(float x) {
    if constexpr (sizeof(Input) == 4) {
        return softplus(x);
    } else {
        const float e = ex2(x * kLog2e);
        const float log = lg2(1.f + e) * kLn2;
        const float series = e * (1.f + e * (-0.5f + e * (0.33333333f + e * -0.25f)));   // 1 + e loses a small e
        const float value = e < 0.05f ? series : log;
        return x > 20.f ? x : value;
    }
}
template <typename Input, bool kTanh>
__device__ inline float silu_of(float x) {
    if constexpr (sizeof(Input) == 4) {
        return silu(x);
    } else if constexpr (kTanh) {
        float tanh_half;
        asm("tanh.approx.f32 %0, %1;" : "=f"(tanh_half) : "f"(0.5f * x));
        return fmaf(0.5f * x, tanh_half, 0.5f * x);
    } else {
        return __fdividef(x, 1.f + ex2(-x * kLog2e));
    }
}

// Keeps the compiler from computing what follows from x before the loop and holding it in registers throughout.
__device__ inline int computed_here(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

template <int kStates_, int kLanes_, int kChannels_, int kWarps_>
struct ScanTile {
    static constexpr int kStates = kStates_, kLanes = kLanes_, kChannels = kChannels_, kWarps = kWarps_;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kGroups = 32 / kLanes;                          // lane groups of a warp
    static constexpr int kWarpChannels = kGroups * kChannels;
    static constexpr int kSteps = kWarpChannels == 4 && kStates * kLanes <= 16 ? 64 : 32;     // 64: a piece per lane
    static constexpr int kRowPieces = kSteps / kPieceSteps;
    static constexpr int kWarpPieces = kWarpChannels * kRowPieces;
    static constexpr int kPieces = (kWarpPieces + 31) / 32;              // of each thread
    static constexpr int kRow = 2 * kSteps + 4;                          // floats; an odd number of 16-byte units
    static constexpr int kLaneWords = kStates == 1 ? 2 : (2 * kStates + 3) / 4 * 4;   // B then C of one lane's states
    static constexpr int kBCRow = kLanes * kLaneWords;                   // floats of one step
    static constexpr int kBCPieces = (2 * kStates * kLanes * kRowPieces + kThreads - 1) / kThreads;
    static constexpr int kSharedBytes = 4 * (2 * kSteps * kBCRow + kWarps * kWarpChannels * kRow);
    static constexpr int kRound = (kLanes < 8 ? kLanes : 8) / kChannels > 1 ? (kLanes < 8 ? kLanes : 8) / kChannels : 1;
    static constexpr int kBlock = kRound > 2 ? kRound : 2;               // steps between two exchanges; an exchange
                                                                         // ends kRound steps of kChannels channels
};

// kMinBlocks: CTAs per SM that the registers must leave room for.
template <typename Input, typename Tile, int kMinBlocks = 1, bool kTanh = std::is_same_v<Input, __nv_bfloat16>,
          int kUnroll = 1>
__global__ void __launch_bounds__(Tile::kThreads, kMinBlocks)
selective_scan_tiled(const __grid_constant__ SelectiveScanParams p, const __grid_constant__ ScanAccess access) {
    constexpr int kStates = Tile::kStates, kLanes = Tile::kLanes, kChannels = Tile::kChannels;
    constexpr int kSteps = Tile::kSteps, kPieces = Tile::kPieces, kBCPieces = Tile::kBCPieces;
    extern __shared__ float4 shared_memory[];
    float *const BC_tiles = reinterpret_cast<float *>(shared_memory);             // [2][kSteps][kBCRow]
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float *const rows = BC_tiles + 2 * kSteps * Tile::kBCRow + warp * Tile::kWarpChannels * Tile::kRow;

    const int first_channel = (blockIdx.x * Tile::kWarps + warp) * Tile::kWarpChannels;
    const int64_t b = blockIdx.y;
    const int length = p.length, last = p.channels - 1;

    // ---- B and C: each thread brings the same rows and steps of every tile
    const int64_t group = p.channel_to_group == nullptr ? 0 : p.channel_to_group[min(first_channel, last)];
    int BC_row[kBCPieces], BC_step[kBCPieces];                                    // rows of B, then those of C
#pragma unroll
    for (int i = 0; i < kBCPieces; ++i) {
        const int index = i * Tile::kThreads + threadIdx.x;
        BC_row[i] = index % (2 * p.dstate);
        BC_step[i] = index / (2 * p.dstate) * kPieceSteps;                        // kSteps or more: nothing to bring
    }
    Piece<Input> BC[kBCPieces];
    auto read_BC = [&](int start) {
#pragma unroll
        for (int i = 0; i < kBCPieces; ++i) {
            if (BC_step[i] >= kSteps) continue;
            const int row = computed_here(BC_row[i]);
            const bool is_B = row < p.dstate;
            const Strides4 &s = is_B ? p.B_strides : p.C_strides;
            const Input *from = static_cast<const Input *>(is_B ? p.B : p.C)
                + b * s.batch + group * s.group + (is_B ? row : row - p.dstate) * s.state;
            const int t = start + BC_step[i];
            BC[i] = read_piece(from + t * s.time, s.time, length - t, is_B ? access.B : access.C);
        }
    };
    auto put_BC = [&](float *tile) {
#pragma unroll
        for (int i = 0; i < kBCPieces; ++i) {
            if (BC_step[i] >= kSteps) continue;
            const int row = computed_here(BC_row[i]);
            const int n = row < p.dstate ? row : row - p.dstate;
            float *to = tile + BC_step[i] * Tile::kBCRow + n / kStates * Tile::kLaneWords + n % kStates
                + (row < p.dstate ? 0 : kStates);
#pragma unroll
            for (int k = 0; k < kPieceSteps; ++k) to[k * Tile::kBCRow] = BC[i].get(k);
        }
    };

    // ---- u, delta, z, y: pieces of this warp's channels
    const bool time_first = access.u != Access::kStrided;
    auto piece_channel = [&](int i) {
        const int index = i * 32 + computed_here(lane);
        return time_first ? index / Tile::kRowPieces : index % Tile::kWarpChannels;
    };
    auto piece_step = [&](int i) {
        const int index = i * 32 + computed_here(lane);
        return (time_first ? index % Tile::kRowPieces : index / Tile::kWarpChannels) * kPieceSteps;
    };
    auto piece_there = [&](int i) { return Tile::kWarpPieces % 32 == 0 || i * 32 + lane < Tile::kWarpPieces; };
    auto row_of = [&](const void *tensor, const Strides3 &s, int i) {              // spare pieces follow the last
        const int64_t c = min(first_channel + piece_channel(i), last);
        return static_cast<const Input *>(tensor) + b * s.batch + c * s.channel;
    };
    float bias[kPieces], skip[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
        const int64_t c = min(first_channel + piece_channel(i), last);
        bias[i] = p.delta_bias == nullptr ? 0.f : p.delta_bias[c * p.delta_bias_stride];
        skip[i] = p.D == nullptr ? 0.f : p.D[c * p.D_stride];
    }
    Piece<Input> u_next[kPieces], delta_next[kPieces];
    auto read_inputs = [&](int start) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            const int t = start + piece_step(i);
            const Input *u_row = row_of(p.u, p.u_strides, i), *delta_row = row_of(p.delta, p.delta_strides, i);
            u_next[i] = read_piece(u_row + t * p.u_strides.time, p.u_strides.time, length - t, access.u);
            delta_next[i] = read_piece(delta_row + t * p.delta_strides.time, p.delta_strides.time, length - t,
                                       access.delta);
        }
    };

    // ---- the state
    const int my_group = lane / kLanes, my_lane = lane % kLanes, first = my_lane * kStates;
    float A[kChannels][kStates], h[kChannels][kStates];
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
        const int64_t c = min(first_channel + my_group + j * Tile::kGroups, last);
#pragma unroll
        for (int i = 0; i < kStates; ++i) {
            const int n = first + i;
            const bool real = n < p.dstate;
            A[j][i] = real ? p.A[c * p.A_channel_stride + n * p.A_state_stride] * kLog2e : 0.f;
            h[j][i] = real && p.initial_state != nullptr ? p.initial_state[(b * p.channels + c) * p.dstate + n] : 0.f;
        }
    }

    read_BC(0);
    read_inputs(0);
    if (p.dstate != kStates * kLanes || Tile::kLaneWords != 2 * kStates) {          // zeros for states not there
        for (int i = threadIdx.x; i < 2 * kSteps * Tile::kBCRow; i += Tile::kThreads) BC_tiles[i] = 0.f;
        __syncthreads();
    }
    put_BC(BC_tiles);
    __syncthreads();

    int parity = 0;
    for (int start = 0; start < length; start += kSteps, parity ^= 1) {
        const float *const BC_tile = BC_tiles + parity * kSteps * Tile::kBCRow + my_lane * Tile::kLaneWords;
        Piece<Input> u[kPieces], z[kPieces];
        float d[kPieces][kPieceSteps];                       // one branch for all: their latencies overlap
#pragma unroll
        for (int i = 0; i < kPieces; ++i)
#pragma unroll
            for (int k = 0; k < kPieceSteps; ++k) d[i][k] = delta_next[i].get(k) + bias[i];
        if (p.delta_softplus)
#pragma unroll
            for (int i = 0; i < kPieces; ++i)
#pragma unroll
                for (int k = 0; k < kPieceSteps; ++k) d[i][k] = softplus_of<Input>(d[i][k]);
        if (start + kSteps > length)
#pragma unroll
            for (int i = 0; i < kPieces; ++i)
#pragma unroll
                for (int k = 0; k < kPieceSteps; ++k)
                    if (start + piece_step(i) + k >= length) d[i][k] = 0.f;          // the state passes by
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            u[i] = u_next[i];
            if (!piece_there(i)) continue;
            float4 *to = reinterpret_cast<float4 *>(rows + piece_channel(i) * Tile::kRow + 2 * piece_step(i));
#pragma unroll
            for (int k = 0; k < kPieceSteps; k += 2)
                to[k / 2] = make_float4(d[i][k], d[i][k] * u[i].get(k), d[i][k + 1], d[i][k + 1] * u[i].get(k + 1));
        }
        if (p.z != nullptr)
#pragma unroll
            for (int i = 0; i < kPieces; ++i) {
                const int t = start + piece_step(i);
                z[i] = read_piece(row_of(p.z, p.z_strides, i) + t * p.z_strides.time, p.z_strides.time, length - t,
                                  access.z);
            }
        const bool more = start + kSteps < length;
        if (more) {
            read_inputs(start + kSteps);
            read_BC(start + kSteps);
        }
        __syncwarp();

        constexpr int kBlock = Tile::kBlock, kRound = Tile::kRound;
        constexpr int kSums = kChannels * kRound;                                    // of one exchange
        static_assert(kLanes == 1 || kLanes % kSums == 0);
        constexpr int kOwners = kLanes == 1 ? 1 : kLanes / kSums;                    // lanes that end with the same sum
        const int steps = min(kSteps, length - start);
        const float *step_at = rows + my_group * Tile::kRow;                         // (delta, delta u), then y
        const int my_sum = my_lane / kOwners;
        float *y_at = rows + (my_group + my_sum / kRound * Tile::kGroups) * Tile::kRow + 2 * (my_sum % kRound);
        const float *BC_at = BC_tile;
#pragma unroll kUnroll
        for (int s = 0; s < steps; s += kBlock) {
            float sum[kChannels][kBlock];
#pragma unroll
            for (int t = 0; t < kBlock; t += 2) {
                float4 pair[kChannels];
#pragma unroll
                for (int j = 0; j < kChannels; ++j)
                    pair[j] = *reinterpret_cast<const float4 *>(step_at + j * Tile::kGroups * Tile::kRow + 2 * t);
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    float bc[Tile::kLaneWords];
                    const float *from = BC_at + (t + m) * Tile::kBCRow;
                    if constexpr (kStates == 1) {
                        *reinterpret_cast<float2 *>(bc) = *reinterpret_cast<const float2 *>(from);
                    } else {
#pragma unroll
                        for (int i = 0; i < Tile::kLaneWords; i += 4)
                            *reinterpret_cast<float4 *>(bc + i) = *reinterpret_cast<const float4 *>(from + i);
                    }
#pragma unroll
                    for (int j = 0; j < kChannels; ++j) {
                        const float d = m ? pair[j].z : pair[j].x, du = m ? pair[j].w : pair[j].y;
                        float y = 0.f;
#pragma unroll
                        for (int i = 0; i < kStates; ++i) {
                            h[j][i] = fmaf(ex2(d * A[j][i]), h[j][i], du * bc[i]);
                            y = i == 0 ? bc[kStates] * h[j][0] : fmaf(bc[kStates + i], h[j][i], y);
                        }
                        sum[j][t + m] = y;
                    }
                }
            }
            // Lanes exchange until each holds the whole sum of one (channel, step) of the round.
#pragma unroll
            for (int round = 0; round < kBlock; round += kRound) {
                float v[kChannels * kRound];
#pragma unroll
                for (int j = 0; j < kChannels; ++j)
#pragma unroll
                    for (int t = 0; t < kRound; ++t) v[j * kRound + t] = sum[j][round + t];
#pragma unroll
                for (int level = 1; kLanes >> level > 0; ++level) {
                    const int width = kLanes >> level, left = kSums >> level;
                    const bool upper = my_lane & width;
                    if (left == 0) v[0] += __shfl_xor_sync(0xffffffffu, v[0], width);
#pragma unroll
                    for (int i = 0; i < left; ++i) {
                        const float give = upper ? v[i] : v[i + left], keep = upper ? v[i + left] : v[i];
                        v[i] = keep + __shfl_xor_sync(0xffffffffu, give, width);
                    }
                }
                if (kOwners == 1 || my_lane % kOwners == 0)
#pragma unroll
                for (int j = 0; j < (kLanes == 1 ? kChannels : 1); ++j)
                    y_at[j * Tile::kGroups * Tile::kRow + 2 * round] = v[j];
            }
            step_at += 2 * kBlock;
            y_at += 2 * kBlock;
            BC_at += kBlock * Tile::kBCRow;
        }
        __syncwarp();

#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            if (!piece_there(i)) continue;
            float4 *from = reinterpret_cast<float4 *>(rows + piece_channel(i) * Tile::kRow + 2 * piece_step(i));
            float y[kPieceSteps];
#pragma unroll
            for (int k = 0; k < kPieceSteps; k += 2) {
                const float4 pair = from[k / 2];
                y[k] = pair.x;
                y[k + 1] = pair.z;
            }
#pragma unroll
            for (int k = 0; k < kPieceSteps; ++k) y[k] = fmaf(skip[i], u[i].get(k), y[k]);
            if (p.z != nullptr)
#pragma unroll
                for (int k = 0; k < kPieceSteps; ++k) y[k] *= silu_of<Input, kTanh>(z[i].get(k));
            if (access.y == Access::kShifted) {                                     // written below, by neighbours
#pragma unroll
                for (int k = 0; k < kPieceSteps; k += 2)
                    from[k / 2] = make_float4(y[k], 0.f, y[k + 1], 0.f);
            } else if (first_channel + piece_channel(i) <= last) {
                const int t = start + piece_step(i);
                write_piece(const_cast<Input *>(row_of(p.y, p.y_strides, i)) + t * p.y_strides.time, p.y_strides.time,
                            length - t, access.y, y);
            }
        }
        if (access.y == Access::kShifted) {
            __syncwarp();
            const int count = min(Tile::kWarpChannels, p.channels - first_channel);
            for (int c = lane / 16; c < count; c += 2) {     // half a warp a row
                Input *row = static_cast<Input *>(p.y) + b * p.y_strides.batch
                    + (first_channel + c) * p.y_strides.channel + start;
                write_row<2>(row, rows + c * Tile::kRow, steps, lane % 16);
            }
            __syncwarp();
        }
        if (more) put_BC(BC_tiles + (parity ^ 1) * kSteps * Tile::kBCRow);
        __syncthreads();
    }

    if (p.final_state == nullptr) return;
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
        const int c = first_channel + my_group + j * Tile::kGroups;
#pragma unroll
        for (int i = 0; i < kStates; ++i)
            if (c <= last && first + i < p.dstate)
                p.final_state[(b * p.channels + c) * p.dstate + first + i] = h[j][i];
    }
}

}  // namespace shedder
