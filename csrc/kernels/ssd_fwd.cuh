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
// `full` and `empty` of each stage: boxes of 64 columns by tensor maps (TMA), swizzled as wgmma reads them. One
// prepares decays. Two store y. Heads of fewer channels lie side by side in those 64 rows, two at most (kMixed): then
// S is weighed for each, and each adds to y what its own rows of x ask for.
//
// For each chunk and head the kernel reads 32 KB of B and C (N = 128) and 8 KB of x from L2. Where heads start
// anywhere, the CTAs of a cluster take neighbouring heads in step, and where these read the same group each brings a
// share of the rows of B and C into the shared memory of all.
//
// A tensor map wants rows and boxes to start at multiples of 16 bytes. B and C that do not (of 32, really), and x and z
// whose tokens do not, are copied first (ssd_align); but a large x whose tokens start at multiples of 8, or 4, is copied
// to shared memory by words of as many bytes instead. Of x and z the columns of a map are all elements between two
// tokens, and a box starts at the 8 columns that its first lies in. The rows of all products here are channels, which
// know nothing of one another: a first channel that lies `first` columns into its box is row `first` of h and y, and
// what lies behind the 64 columns takes the rows before it.
//
// Bound: shared memory, of whose cycles operands of products, decays and copies take three quarters
// (docs/measured-facts.md, SSD).

#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_runtime.h>

#include "kernels/cluster.cuh"
#include "kernels/dependents.cuh"
#include "kernels/ssd_pieces.cuh"
#include "kernels/ssd_servants.cuh"
#include "kernels/ssd_states.cuh"
#include "kernels/ssd_wgmma.cuh"

namespace shedder {

// Fragments of x as they enter the state: 16 bits of each value, and 16 more of the last 16 tokens, which decay the least
// and whose rounding would be most of the state's error.
struct SsdWeighted {
    uint32_t x[4][4], low[4];
};

// h = keep h + weighted^T B, left on its way.
template <int kStates16, typename Input>
__device__ __forceinline__ void add_to_state(float *h, const SsdWeighted &weighted, uint32_t B_tile, float keep) {
    constexpr int kTiles = (kStates16 + 3) / 4, kLast = kStates16 - (kTiles - 1) * 4;
#pragma unroll
    for (int i = 0; i < kStates16 * 8; ++i) h[i] *= keep;
    wgmma_fence();
    const auto add = [&](const uint32_t (&x)[4], int k) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            const uint32_t b = later(B_tile, tile * kTileBytes + k * 2048);
            if (tile + 1 < kTiles)
                wgmma_rs<Input, 64, 1>(h + tile * 32, x, b, true);
            else
                wgmma_rs<Input, kLast * 16, 1>(h + tile * 32, x, b, true);
        }
    };
#pragma unroll
    for (int k = 0; k < 4; ++k) add(weighted.x[k], k);
    add(weighted.low, 3);
    wgmma_commit();
}

template <typename Input>
__device__ __forceinline__ void weigh_for_state(const uint32_t (&x)[4][4], SsdWeighted &weighted,
                                                const SsdDecays &decays, int q) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float2 of = reinterpret_cast<const float2 *>(decays.to_state)[k * 8 + half * 4 + q];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float2 v = unpack<Input>(x[k][2 * half + i]);
                const float whole[2] = {v.x * of.x, v.y * of.y};
                const uint32_t high = pack<Input>(whole[0], whole[1]);
                weighted.x[k][2 * half + i] = high;
                if (k == 3) {
                    const float2 rounded = unpack<Input>(high);
                    weighted.low[2 * half + i] = pack<Input>(whole[0] - rounded.x, whole[1] - rounded.y);
                }
            }
        }
}

template <typename Input, int kStates16, SsdForm kForm>
__global__ void __launch_bounds__(256, kSsdCtas<kStates16, kForm>) ssd_fwd(const __grid_constant__ SsdParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Shared = SsdShared<kStates16, kForm>;
    constexpr bool kExtras = Shared::kExtras, kMixed = Shared::kMixed, kWords = kForm == SsdForm::kWords;
    constexpr int kCtas = kSsdCtas<kStates16, kForm>;
    extern __shared__ char shared_memory[];
    char *const shared = shared_memory + (-shared_address(shared_memory) & 1023);
    const uint32_t shared_at = shared_address(shared), states_there = shared_at + Shared::kStatesThere,
                   channels_there = shared_at + Shared::kChannelsThere, empty_at = shared_at + Shared::kIsFree;
    SsdPlace &place = *reinterpret_cast<SsdPlace *>(shared + Shared::kPlace);
    if (threadIdx.x == kCopyWarp * 32) {
        prefetch_map(&p.C);
        prefetch_map(&p.B);
        if (!kWords) prefetch_map(&p.x.map);
    }
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            barrier_init(states_there + i * 8, 1);
            barrier_init(channels_there + i * 8, (kWords ? 32 : 1) + kWarpArrivals);         // copies, decays
            barrier_init(empty_at + i * 8, (4 * p.cluster + (kExtras ? 2 : 0)) * kWarpArrivals);
        }
        for (int i = 0; i < kGivenPlaces; ++i) {
            const uint32_t given_at = shared_at + Shared::kGivenThere + i * 8;
            barrier_init(given_at, 1);
            if (Shared::kPairs) barrier_arrive_expecting(given_at, kGivenBytes);
        }
        barriers_are_there();
        place = place_of(p, static_cast<int>(blockIdx.x));
    }
    if (p.cluster > 1) cluster_sync();                       // all have begun: from here on their barriers are there
    else __syncthreads();
    wait_for_kernel_before();
    const int role = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    if (role >= 4) {
        if constexpr (kCtas > 1) give_registers<kServantRegisters<kStates16, kForm>>();
        if (role < kCopyWarp) store_y<Input, Shared>(p, place, shared, shared_at);
        else if (kWords && role == kCopyWarp) copy_with_words<Shared>(p, place, shared_at);
        else produce<Input, Shared>(p, place, shared, shared_at);
        return;
    }
    if constexpr (kCtas > 1) take_registers<kConsumerRegisters<kStates16, kForm>>();
    unsigned thread = threadIdx.x;
    const int warp = __shfl_sync(0xffffffffu, thread / 32, 0), lane = threadIdx.x % 32;

    // Fragments: this thread holds rows row0 and row0 + 8 (channels of h and y^T, tokens of S), columns 2 q, 2 q + 1
    // of every 8.
    const int row0 = warp * 16 + lane / 4, q = lane % 4;
    const uint32_t scores_at = shared_at + Shared::kScores;
    for (int i = threadIdx.x; i < Shared::kHeads * kTileBytes / 16; i += 128)
        reinterpret_cast<uint4 *>(shared + Shared::kScores)[i] = {};
    warpgroup_barrier(1);
    // Rows and columns of 8 x 8 blocks for ldmatrix and stmatrix: `down` rows then columns, `across` columns then rows.
    const int block = lane / 8;
    uint32_t x_offset = tile_offset(lane % 8 + 8 * (block >> 1), warp * 32 + (block & 1) * 16);
    auto rest_of = [&](int stage) { return shared_at + Shared::kRest + stage * Shared::kInputs * kRestBytes; };
    auto decays_of = [&](int stage, int head) -> const SsdDecays & {
        return reinterpret_cast<const SsdDecays *>(shared + Shared::kDecays)[stage * Shared::kHeads + head];
    };
    auto release_stage = [&](int stage) {                    // to all who copy into it
        barrier_arrive_by_warp(empty_at + stage * 8, lane, p.cluster);
    };
    int stage = 0;
    uint32_t parity = 0;
#pragma unroll 1
    for (int index = 0; index < pieces_of(p, place); ++index) {
        const SsdPiece piece = piece_of(p, place, index);
        const bool local = p.segment_chunks > 0 && piece.leaves >= 0;
        const SsdRows rows = rows_of<kExtras>(p, piece.state);
        const SsdHeads heads = heads_of<kMixed>(p, rows);
        int own_head = 0;                                    // which of them this warp's rows belong to
        if (kMixed) own_head = min((rows.first_channel + warp * 16) / p.mixed_headdim - heads.first, heads.count - 1);
        // Fragments of x or z: channels by tokens.
        auto load_channels = [&](uint32_t (&to)[4][4], uint32_t tile_at, uint32_t rest_at) {
#pragma unroll
            for (int k = 0; k < 4; ++k) load_transposed(to[k], tile_at + x_offset + k * 2048);
            const int lane = thread % 32;
            if (Shared::kHasRest && rows.rest && warp == 0) {            // before the first channel: the last ones
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
        float h[kStates16 * 8];
        // The state before the piece; first, of a segment, the one that it leaves.
#pragma unroll 1
        for (int leaves = local; leaves >= 0; --leaves) {
#pragma unroll
            for (int i = 0; i < kStates16 * 8; ++i) h[i] = 0.f;
            if (piece.takes < 0 && p.initial != nullptr) add_initial_state<kStates16>(p, piece.state, rows, q, h);
            if (piece.takes >= 0 && !leaves) add_states_left<kStates16>(p, piece, h);
            if (!leaves) break;
            float decay = 1.f;
#pragma unroll 1
            for (int chunk = piece.first; chunk < piece.last; ++chunk) {
                const uint32_t B_at = shared_at + stage * Shared::kStage + Shared::kOperand;
                const uint32_t x_at = B_at + Shared::kOperand;
                const SsdDecays &decays = decays_of(stage, own_head);
                barrier_wait(states_there + stage * 8, parity);
                barrier_wait(channels_there + stage * 8, parity);
                SsdWeighted weighted;
                load_channels(weighted.x, x_at, rest_of(stage));
                weigh_for_state<Input>(weighted.x, weighted, decays, q);
                add_to_state<kStates16, Input>(h, weighted, descriptor(B_at), decays.keep);
                decay *= decays.keep;
                wgmma_wait<0>();
                pin(h);
                release_stage(stage);
                if (kExtras && warp < 2) barrier_arrive_by_warp(empty_at + stage * 8, lane);  // there is no y to store
                if (++stage == kStages) stage = 0, parity ^= 1;
            }
            leave_state<kStates16>(p, h, piece.leaves, decay);
        }

        float skip[2] = {0.f, 0.f};
        if (p.D != nullptr)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                if (exists(rows, 8 * i)) {
                    int head = rows.head, channel = rows.first_channel + channel_of(rows, 8 * i);
                    if (kMixed) head = channel / p.mixed_headdim, channel %= p.mixed_headdim;
                    skip[i] = p.D[head * p.D_head_stride + channel * p.D_channel_stride];
                }

        uint32_t seen = 0;                                       // which of S's elements are not of a later token
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const int row = row0 + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * q + i % 2;
            if (column <= row) seen |= 1u << i;
        }
        uint32_t S_at = scores_at + tile_offset(warp * 16 + lane % 8 + 8 * (block & 1), (block >> 1) * 16);
        float S[32];
        uint32_t y_offset = x_offset;
        if (Shared::kPairs && p.y_boxes == SsdBoxesOfY::kPairs)     // whole pieces first
            y_offset = tile_offset(lane % 8 + 8 * (block >> 1),
                                   warp * 32 + (block & 1) * 16 - pair_rows_of(p, rows, place.rank).turn * 16 & 127);
        auto tile_of_C = [&](int stage) { return descriptor(shared_at + stage * Shared::kStage); };
        auto begin_scores = [&](int stage) {                 // C B^T of a stage, on its way
            const uint32_t C_tile = tile_of_C(stage), B_tile = later(C_tile, Shared::kOperand);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kStates16; ++k) {
                const int at = k / 4 * kTileBytes + k % 4 * 32;
                wgmma_ss<Input>(S, later(C_tile, at), later(B_tile, at), k > 0);
            }
            wgmma_commit();
        };
        auto take_scores = [&] {
            barrier_wait(states_there + stage * 8, parity);
            begin_scores(stage);
            wgmma_wait<0>();
            pin(S);
        };
        // Registers for S while the y before leaves, and for h C^T of all states on its way while x is loaded; else a few
        // states at a time.
        constexpr bool kHasRoom = kCtas == 2;
        constexpr int kBatch = kHasRoom || kStates16 < 4 ? kStates16 : 4;
        float y[32];
        uint32_t h16[kBatch][4];
        auto add_states = [&](int first, uint32_t C_tile) {
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
        // h C^T right behind S, and x while both are waited for: where x takes two loads in turn, the branch between which
        // keeps others waiting. Where one is enough, that costs more than it saves (measured on an H200).
        constexpr bool kTogether = kHasRoom && Shared::kHasRest && !kExtras;
        if constexpr (kHasRoom) take_scores();
        if constexpr (kTogether) add_states(0, tile_of_C(stage));
#pragma unroll 1
        for (int left = piece.last - piece.first; left > 0; --left) {
            const uint32_t B_at = shared_at + stage * Shared::kStage + Shared::kOperand, x_at = B_at + Shared::kOperand;
            const SsdDecays &decays = decays_of(stage, own_head);
            // Hidden, else addresses and single bits fill the registers.
            asm volatile("" : "+r"(S_at), "+r"(x_offset), "+r"(thread), "+r"(seen));
            if (Shared::kPairs) asm volatile("" : "+r"(y_offset));
            else y_offset = x_offset;
            const int row0 = thread / 32 * 16 + thread / 4 % 8, q = thread % 4;
            const uint32_t C_tile = tile_of_C(stage), B_tile = descriptor(B_at), S_tile = descriptor(scores_at);
            if constexpr (!kHasRoom) take_scores();
            barrier_wait(channels_there + stage * 8, parity);
            uint32_t x16[4][4];
            if constexpr (kTogether) load_channels(x16, x_at, rest_of(stage));
            const SsdDecays &first_decays = decays_of(stage, 0);
            auto s_rows_of = [&](const SsdDecays &decays) { return make_float2(decays.s[row0], decays.s[row0 + 8]); };
            const float2 s_rows = s_rows_of(first_decays);
            if constexpr (kHasRoom) {
                wgmma_wait<0>();
                pin(S);
                if constexpr (kTogether) pin(y);
            }
            if (kExtras && p.runs != nullptr) {
                const int run[2] = {decays.run[row0] >> 1, decays.run[row0 + 8] >> 1};
#pragma unroll
                for (int i = 0; i < 32; ++i)
                    if (decays.run[i / 4 * 8 + 2 * q + i % 2] >> 1 != run[i / 2 % 2]) S[i] = 0.f;
            }
            // S as the decays of a head weigh it, to a tile: the columns of this warp's 16 rows, some of later tokens,
            // and those before them, whose exponentials fall apart into one for a row and one for a column.
            auto weigh_of_warp = [&](const SsdDecays &decays, float2 s_rows, float (&weighted)[32], uint32_t to,
                                     auto before) {
                constexpr int kBefore = decltype(before)::value;
                const float s_row[2] = {s_rows.x, s_rows.y};
#pragma unroll
                for (int pair = 0; pair < kBefore; ++pair) {
                    const float anchor = decays.s[pair * 16 + 15];
                    const float of_row[2] = {exp2_fast(s_row[0] - anchor), exp2_fast(s_row[1] - anchor)};
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const float2 of = reinterpret_cast<const float2 *>(decays.anchored)[pair * 8 + half * 4 + q];
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            const int i = pair * 8 + half * 4 + j;
                            weighted[i] = S[i] * ((j % 2 ? of.y : of.x) * of_row[j / 2]);
                        }
                    }
                }
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float2 of = reinterpret_cast<const float2 *>(decays.columns)[kBefore * 8 + half * 4 + q];
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const int i = kBefore * 8 + half * 4 + j;
                        const float v = S[i] * exp2_fast(s_row[j / 2] - (j % 2 ? of.y : of.x));
                        weighted[i] = seen >> i & 1 ? v : 0.f;
                    }
                }
#pragma unroll
                for (int pair = 0; pair <= kBefore; ++pair) {
                    const float *v = weighted + pair * 8;
                    store_blocks(to ^ pair * 32, pack<Input>(v[0], v[1]), pack<Input>(v[2], v[3]),
                                 pack<Input>(v[4], v[5]), pack<Input>(v[6], v[7]));
                }
            };
            auto weigh_scores = [&](const SsdDecays &decays, float2 s_rows, float (&weighted)[32], uint32_t to) {
                if (warp & 2) {
                    if (warp & 1) weigh_of_warp(decays, s_rows, weighted, to, std::integral_constant<int, 3>{});
                    else weigh_of_warp(decays, s_rows, weighted, to, std::integral_constant<int, 2>{});
                } else {
                    if (warp & 1) weigh_of_warp(decays, s_rows, weighted, to, std::integral_constant<int, 1>{});
                    else weigh_of_warp(decays, s_rows, weighted, to, std::integral_constant<int, 0>{});
                }
            };
            if (kMixed) {                                    // where there is no second head, the first once more
                const SsdDecays &last_decays = decays_of(stage, heads.count - 1);
                float weighted[32];
                weigh_scores(last_decays, s_rows_of(last_decays), weighted, S_at + kTileBytes);
            }
            weigh_scores(first_decays, s_rows, S, S_at);
            fence_for_copies();

            if constexpr (!kTogether) add_states(0, C_tile);
            SsdWeighted weighted;
            if constexpr (kHasRoom) {
                if constexpr (!kTogether) load_channels(x16, x_at, rest_of(stage));
                weigh_for_state<Input>(x16, weighted, decays, q);
            }
            if constexpr (!kTogether) {
                wgmma_wait<0>();
                pin(y);
            }
#pragma unroll
            for (int first = kBatch; first < kStates16; first += kBatch) {
                add_states(first, C_tile);
                wgmma_wait<0>();
                pin(y);
            }
            if constexpr (!kHasRoom) {
                if constexpr (!kTogether) load_channels(x16, x_at, rest_of(stage));
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
            // y += x^T S^T; of mixed rows once for each head, zeros for the rows of the other.
            auto add_scores = [&](uint32_t S_tile, bool own) {
                uint32_t x[4][4];
#pragma unroll
                for (int k = 0; k < 4; ++k)
#pragma unroll
                    for (int i = 0; i < 4; ++i) x[k][i] = !kMixed || own ? x16[k][i] : 0;
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < 4; ++k) wgmma_rs<Input, 64, 0>(y, x[k], later(S_tile, k * 32), true);
            };
            add_scores(S_tile, own_head == 0);
            if (kMixed) add_scores(later(S_tile, kTileBytes), own_head == 1);
            wgmma_commit();

            // Read now, so that h is not scaled before these products are on their way.
            add_to_state<kStates16, Input>(h, weighted, B_tile, *static_cast<const volatile float *>(&decays.keep));

            wgmma_wait<1>();
            pin(y);
            if (kExtras && p.has_z) {
                uint32_t z16[4][4];
                load_channels(z16, x_at + kTileBytes, rest_of(stage) + kRestBytes);
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
                store_transposed(shared_at + y_tile + y_offset + pair * 2048, pack<Input>(v[0], v[1]),
                                 pack<Input>(v[2], v[3]), pack<Input>(v[4], v[5]), pack<Input>(v[6], v[7]));
            }
            barrier_arrive_at<kYThere>();
            if constexpr (kHasRoom) {                          // of the next chunk, or of whatever is there
                if (left > 1) barrier_wait(states_there + (stage ^ 1) * 8, parity ^ stage);
                begin_scores(stage ^ 1);
                wgmma_wait<1>();
                if constexpr (kTogether) {
                    pin(h);
                    add_states(0, tile_of_C(stage ^ 1));
                }
            } else {
                wgmma_wait<0>();
            }
            pin(h);
            release_stage(stage);
            if (++stage == kStages) stage = 0, parity ^= 1;
        }
        const SsdPiece ended = piece_of(p, place, index);
        if (ended.leaves >= 0) {
            if (p.segment_chunks > 0) continue;              // what it leaves is there since its local pass
            leave_state<kStates16>(p, h, ended.leaves, 1.f);
            continue;
        }
        if (p.final_states == nullptr) continue;
        const SsdRows rows_of_h = rows_of<kExtras>(p, ended.state);
        asm volatile("" : "+r"(thread));                     // hidden, else what follows is kept over the piece
        store_final_state<kStates16>(p, ended.state, rows_of_h, thread % 4, h);
    }
    if (p.cluster > 1) cluster_sync();                       // while others may still release stages of this CTA
#endif
}

}  // namespace shedder
