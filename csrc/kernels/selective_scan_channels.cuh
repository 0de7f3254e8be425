// Selective scan, forward, the form for many channels; selective_scan_fwd.cuh has the recurrence and the form for
// everything else.
//
// A lane owns a channel, or two or four neighbouring lanes share one, and walks along t with h in registers. No warp
// waits for another: CTAs only see to it that all schedulers get as many. Where all warps run at once, a CTA fills a
// multiprocessor, so that those of the scan that follows may come early and do not crowd on some.
// Time goes by tiles: rows of u, delta and z enter shared memory by asynchronous copies while the tile before is walked
// through; a lane takes its own row from there in pieces of 8 steps, does what belongs to the channel alone (softplus,
// D, SiLU) in registers, and puts y where z was. B and C of a tile lie in shared memory as floats, side by side, which
// all lanes read at once. Against tiles shared by a team (selective_scan_tiled.cuh) the path out of shared memory
// carries a half to a third: (delta, delta u) and the sums over states never pass through it.
//
// A channel costs least where a lane has it to itself, if warps are enough to hide each other's waiting. But 5120
// channels of 8 batch entries are 2.4 such warps for each scheduler of an H200, and the third would be there for some
// only. So a warp's share is 32, 16 or 8 channels, and each scheduler gets the same shares.
//
// Rows off the 16-byte grid (L that is no multiple of 8): those of every eighth channel begin at the same place of a
// piece, those of every sixteenth at the same place of a sector of 32 bytes. A warp takes such channels, and begins
// with the sector, up to 15 steps before its rows, in which nothing happens. So all its pieces are whole in memory,
// and only those of B and C, and the ends of y, are not; nor is a sector of y written in two parts, which takes long.
//
// Bound: the issue slots and MUFU, one ex2 for each (t, n), or bytes where states are few.

#pragma once

#include <algorithm>

#include "kernels/selective_scan_channel_tiles.cuh"
#include "kernels/selective_scan_tiled.cuh"

namespace shedder {

// The channels of one warp, from the first on.
template <typename Rows>
__device__ __forceinline__ void scan_channels(const SelectiveScanParams &p, int64_t b, int first_channel,
                                              char *shared) {
    using Input = typename Rows::Input;
    using Own = typename ScanChannelRows<Rows>::Own;
    constexpr int kStates = Rows::kStates, kLanes = Rows::kLanes, kSteps = Rows::kSteps, kOwn = Rows::kOwn;
    float *const BC_tile = reinterpret_cast<float *>(shared + Rows::kStages * 3 * Rows::kTile);
    ScanChannelRows<Rows> rows(p, b, first_channel, shared);
    ScanStateRows<Rows> BC(p, b, rows.skew, BC_tile);
    const int column = rows.column, first_state = column * kStates;
    const int64_t channel = rows.channel, state_row = (b * p.channels + channel) * p.dstate;

    rows.ask(b);
    wait_for_kernel_before();
    rows.copy(rows.length(), 0);
    BC.read(0);
    if (p.dstate != Rows::kSlots)                            // zeros for states not there
        for (int i = threadIdx.x % 32; i < Rows::kBCTile; i += 32) BC_tile[i] = 0.f;
    float A[kStates], h[kStates] = {};
    load_states(A, p.A + channel * p.A_channel_stride, p.A_state_stride, first_state, p.dstate);
    if (p.initial_state != nullptr) load_states(h, p.initial_state + state_row, 1, first_state, p.dstate);
#pragma unroll
    for (int i = 0; i < kStates; ++i) A[i] *= kLog2e;
    const float skip = p.D == nullptr ? 0.f : p.D[channel * p.D_stride];
    const float bias = p.delta_bias == nullptr ? 0.f : p.delta_bias[channel * p.delta_bias_stride];
    auto tile_landed = [&] {
        copies_landed();
        __syncwarp();
    };
    tile_landed();
    BC.put();

    // What belongs to the channel alone. Taken a piece ahead and without branches, so that it mingles with the walk.
    struct Prepared {
        char *at;                                            // in shared memory
        Own u;                                               // as it lies in memory: half the registers
        float delta[kOwn], gate[kOwn];
    };
    auto prepare = [&](char *at) {
        Prepared to;
        to.at = at;
        to.u = rows.take(at);
        rows.unpack(rows.take(at + Rows::kTile), to.delta);
        rows.unpack(rows.take(at + 2 * Rows::kTile), to.gate);
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
            const float delta = to.delta[k] + bias, positive = softplus_to<Input>(delta);
            to.delta[k] = p.delta_softplus ? positive : delta;
            const float gate = silu_to<Input>(to.gate[k]);
            to.gate[k] = p.z != nullptr ? gate : 1.f;
        }
        return to;
    };
    const int first_piece = rows.skew / kPieceSteps;
    Prepared own = prepare(rows.place_of(0, first_piece));
    if (!Rows::kOnGrid) {                                    // before the rows the state passes by
        const int before = rows.skew % kPieceSteps - column * kOwn;
        clear_first(reinterpret_cast<uint32_t (&)[kOwn / 2]>(own.u), before);
#pragma unroll
        for (int k = 0; k < kOwn; ++k)
            if (k < before) own.delta[k] = 0.f;
    }

    for (int start = 0, stage = 0; start < rows.length(); start += kSteps, stage ^= 1) {
        const int left = rows.length() - start;
        const bool more = left > kSteps;
        __syncwarp();                                        // B and C of this tile are there, y before it is out
        if (more) {
            rows.copy(left - kSteps, stage ^ 1);
            BC.read(start + kSteps);
        }
        // A piece of which `steps` exist; kWhole: all.
        auto walk = [&](auto whole, int piece, int steps) {
            constexpr bool kWhole = decltype(whole)::value;
            Prepared next;
            if (kWhole) {
                const int follows = (piece + 1) % Rows::kRowPieces;
                next = prepare(rows.place_of(stage ^ (follows == 0), follows));
            }
            float (&own_delta)[kOwn] = own.delta;
            float u[kOwn], own_input[kOwn];
            rows.unpack(own.u, u);
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

            float decay[kPieceSteps][kStates], words[kPieceSteps / Rows::kBlockSteps][Rows::kBlock], sums[kPieceSteps];
            const float *const words_at = BC_tile + piece * Rows::kBCPiece + column * Rows::kBlock;
            auto take = [&](int t) {                         // what does not depend on h
                if (t % Rows::kBlockSteps == 0)
                    load_words(words[t / Rows::kBlockSteps], words_at + t * Rows::kSlots * 2);
#pragma unroll
                for (int i = 0; i < kStates; ++i) decay[t][i] = fast_exp2(delta[t] * A[i]);
            };
            auto update = [&](int t) {
                const float *const BC = words[t / Rows::kBlockSteps] + t % Rows::kBlockSteps * kStates * 2;
                float y = kLanes == 1 ? skip * u[t % kOwn] : 0.f;
#pragma unroll
                for (int i = 0; i < kStates; ++i) {
                    h[i] = fmaf(decay[t][i], h[i], input[t] * BC[2 * i]);
                    y = fmaf(BC[2 * i + 1], h[i], y);
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
            rows.put_y(own.at + 2 * Rows::kTile, y);
            if (kWhole) own = next;
        };
        const int steps = min(left, kSteps), whole_pieces = steps / kPieceSteps;
#pragma unroll 1
        for (int piece = start == 0 ? first_piece : 0; piece < whole_pieces; ++piece) {
            walk(std::true_type{}, piece, kPieceSteps);
            if (piece + 2 == Rows::kRowPieces) tile_landed();                // the last one looks into the next tile
        }
        if (steps % kPieceSteps > 0) walk(std::false_type{}, whole_pieces, steps % kPieceSteps);
        rows.store(left, stage, start == 0);
        if (more) BC.put();                                  // no lane reads this tile's any more: `store` saw to it
    }

    int thread = threadIdx.x;
    if (!Rows::kOnGrid) asm volatile("" : "+r"(thread));     // else where h goes fills registers meanwhile
    const int own_channel = first_channel + thread % 32 / kLanes * Rows::kApart;
    if (p.final_state != nullptr && own_channel < p.channels)
        store_states(p.final_state + (b * p.channels + own_channel) * p.dstate, h, thread % kLanes * kStates, p.dstate);
}

// Of each batch entry the first channels in shares of 32, the next in shares of 16, the others in shares of 8. Off the
// grid the shares of a kind are multiples of sixteen, which lie one channel from another.
struct ScanDeal {
    int wide, half, quarter;                                 // shares of 32, 16, 8 channels in a batch entry
};

constexpr int kMostScanSlots = 16;                           // states that there are kernels for

template <typename Input, int kSlots, bool kOnGrid>
struct ScanKinds {
    using Wide = ScanRows<Input, kSlots, 1, kOnGrid>;
    using Half = ScanRows<Input, (kSlots + 1) / 2, 2, kOnGrid>;
    using Quarter = ScanRows<Input, (kSlots + 3) / 4, 4, kOnGrid>;
    static constexpr int kWarpBytes = std::max({Wide::kSharedBytes, Half::kSharedBytes, Quarter::kSharedBytes});
    // A warp for each scheduler of a multiprocessor takes up so much shared memory; three, or two, what there is.
    static constexpr int kRoundBytes = 4 * kWarpBytes, kMostRounds = std::min(227 * 1024 / kRoundBytes, 3);
    static_assert(kMostRounds > 1 && 2 * kMostRounds * kRoundBytes > 227 * 1024);
};

// Neighbouring shares go to the four schedulers of a multiprocessor, then to the next one.
template <typename Input, int kSlots, bool kOnGrid>
__global__ void __launch_bounds__(128 * ScanKinds<Input, kSlots, kOnGrid>::kMostRounds, 1) selective_scan_channels(
    const __grid_constant__ SelectiveScanParams p, const __grid_constant__ ScanDeal deal) {
    using Kinds = ScanKinds<Input, kSlots, kOnGrid>;
    extern __shared__ float4 shared_memory[];
    if (blockDim.x > 128) start_dependents();                // a CTA has a multiprocessor to itself
    const int wide = deal.wide * p.batch, half = deal.half * p.batch;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    const int share = (warp / 4 * gridDim.x + blockIdx.x) * 4 + warp % 4;
    auto take = [&](auto rows, int index, int in_batch, int before) {
        char *const shared = reinterpret_cast<char *>(shared_memory) + warp * Kinds::kWarpBytes;
        constexpr int kChannels = decltype(rows)::kChannels, kApart = decltype(rows)::kApart;
        const int b = index / in_batch, in = index % in_batch;
        const int first = before + in / kApart * kApart * kChannels + in % kApart;
        if (b < p.batch && first < p.channels) scan_channels<decltype(rows)>(p, b, first, shared);
    };
    if (share < wide) take(typename Kinds::Wide{}, share, deal.wide, 0);
    else if (share < wide + half) take(typename Kinds::Half{}, share - wide, deal.half, deal.wide * 32);
    else if (deal.quarter > 0)
        take(typename Kinds::Quarter{}, share - wide - half, deal.quarter, deal.wide * 32 + deal.half * 16);
}

}  // namespace shedder
