// Selective scan, forward, the form for many channels; selective_scan_fwd.cuh has the recurrence and the form for
// everything else.
//
// A lane owns a channel, or two or four neighbouring lanes share one, and walks along t with h in registers. No warp
// waits for another: CTAs only see to it that all schedulers get as many. Where all warps run at once, a CTA fills a
// multiprocessor, so that those of the scan that follows may come early and do not crowd on some.
// Time goes by tiles: the copy engine brings boxes of u, delta and z to shared memory while the tile before is walked
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
// with the sector, up to 15 steps before its rows, in which nothing happens. So all its pieces are whole in memory, but
// for the ends of y; nor is a sector of y written in two parts, which takes long. B and C, which no such choice of
// channels helps, are laid out anew first (selective_scan_state_words.cuh).
//
// Bound: the issue slots and MUFU, one ex2 for each (t, n), or bytes where states are few.

#pragma once

#include <algorithm>

#include "kernels/selective_scan_channel_tiles.cuh"
#include "kernels/selective_scan_tiled.cuh"

namespace shedder {

// The channels of one warp, from the first on.
template <typename Rows>
__device__ __forceinline__ void scan_channels(const SelectiveScanParams &p, const ScanMaps<Rows::kOnGrid> &maps,
                                              const uint32_t *state_words, int b, int first_channel, char *shared) {
    using Input = typename Rows::Input;
    using Own = typename ScanChannelRows<Rows>::Own;
    constexpr int kStates = Rows::kStates, kLanes = Rows::kLanes, kSteps = Rows::kSteps, kOwn = Rows::kOwn;
    float *const BC_tile = reinterpret_cast<float *>(shared + Rows::kStages * 3 * Rows::kTile + Rows::kBarrierBytes);
    ScanChannelRows<Rows> rows(p, maps, b, first_channel, shared);
    using StateTile = std::conditional_t<Rows::kOnGrid, ScanStateRows<Rows>, ScanStateWords<Rows>>;
    StateTile BC(p, state_words, b, rows.skew, BC_tile);
    const int column = rows.column, first_state = column * kStates;
    const int64_t channel = rows.channel, state_row = (int64_t{b} * p.channels + channel) * p.dstate;

    rows.ask();
    wait_for_kernel_before();
    rows.bring(0);
    BC.read();
    float A[kStates], h[kStates] = {};
    load_states(A, p.A + channel * p.A_channel_stride, p.A_state_stride, first_state, p.dstate);
    if (p.initial_state != nullptr) load_states(h, p.initial_state + state_row, 1, first_state, p.dstate);
#pragma unroll
    for (int i = 0; i < kStates; ++i) A[i] *= kLog2e;
    const float skip = p.D == nullptr ? 0.f : p.D[channel * p.D_stride];
    const float bias = p.delta_bias == nullptr ? 0.f : p.delta_bias[channel * p.delta_bias_stride];
    rows.wait_for(0);
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
    // Outside of these steps of its piece, which begins with step 0, the state passes by.
    auto keep_steps = [&](Prepared &of, int first, int end) {
        first -= column * kOwn, end -= column * kOwn;
        keep_elements(reinterpret_cast<uint32_t (&)[kOwn / 2]>(of.u), first, end);
#pragma unroll
        for (int k = 0; k < kOwn; ++k)
            if (k < first || k >= end) of.delta[k] = 0.f;
    };
    const int first_piece = rows.skew / kPieceSteps;
    Prepared own = prepare(rows.place_of(0, first_piece));
    if (!Rows::kOnGrid) keep_steps(own, rows.skew % kPieceSteps, kPieceSteps);

    for (int start = 0, tile = 0; start < rows.length(); start += kSteps, ++tile) {
        const int left = rows.length() - start;
        const bool more = left > kSteps;
        __syncwarp();                                        // B and C of this tile are there
        if (more) {
            rows.bring(tile + 1);
            BC.read();
        }
        auto walk = [&](int piece) {
            const int follows = (piece + 1) % Rows::kRowPieces;
            Prepared next = prepare(rows.place_of(tile + (follows == 0), follows));
            float u[kOwn], own_input[kOwn];
            rows.unpack(own.u, u);
#pragma unroll
            for (int k = 0; k < kOwn; ++k) own_input[k] = own.delta[k] * u[k];
            float delta[kPieceSteps], input[kPieceSteps];
#pragma unroll
            for (int k = 0; k < kPieceSteps; ++k) {
                if constexpr (kLanes == 1) {
                    delta[k] = own.delta[k];
                    input[k] = own_input[k];
                } else {
                    delta[k] = __shfl_sync(0xffffffffu, own.delta[k % kOwn], k / kOwn, kLanes);
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
            // Steps whose decays are taken ahead of the updates: more where two half warps have a scheduler to themselves.
            constexpr int kAhead = kLanes == 2 && Rows::kSlots > kManyScanStates && kSteps == 64 ? 4 : 2;
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
            own = next;
        };
        const int steps = min(left, kSteps), whole_pieces = steps / kPieceSteps;
        int piece = start == 0 ? first_piece : 0;
#pragma unroll 1
        for (int end = whole_pieces;; ++end) {               // once more for a piece of which only some steps exist
#pragma unroll 1
            for (; piece < end; ++piece) {
                walk(piece);
                if (more && piece + 2 == Rows::kRowPieces) rows.wait_for(tile + 1);   // the last one looks into it
            }
            if (end * kPieceSteps >= steps) break;
            keep_steps(own, 0, steps - end * kPieceSteps);
        }
        rows.store(tile);
        if (more) BC.put();                                  // no lane reads this tile's any more: `store` saw to it
    }

    int thread = threadIdx.x;
    if (!Rows::kOnGrid) asm volatile("" : "+r"(thread));     // else where h goes fills registers meanwhile
    const int own_channel = first_channel + thread % 32 / kLanes * Rows::kApart;
    if (p.final_state != nullptr && own_channel < p.channels)
        store_states(p.final_state + (int64_t{b} * p.channels + own_channel) * p.dstate, h,
                     thread % kLanes * kStates, p.dstate);
}

// Of each batch entry the first channels in shares of 32, the next in shares of 16, the others in shares of 8. Off the
// grid the shares of a kind are multiples of sixteen, which lie one channel from another.
struct ScanDeal {
    int wide, half, quarter;                                 // shares of 32, 16, 8 channels in a batch entry
};

constexpr int kMostScanSlots = 16;                           // states that there are kernels for

// kWide: with shares of 32.
template <typename Input, int kSlots, bool kOnGrid_, bool kWide_>
struct ScanKinds {
    static constexpr bool kOnGrid = kOnGrid_, kWide = kWide_;
    // With shares of 32 there are three warps for each scheduler.
    static constexpr int kHalfSteps = kWide && kSlots > kManyScanStates ? 32 : 64;
    using Wide = ScanRows<Input, kSlots, 1, kOnGrid, 32>;
    using Half = ScanRows<Input, (kSlots + 1) / 2, 2, kOnGrid, kHalfSteps>;
    using Quarter = ScanRows<Input, (kSlots + 3) / 4, 4, kOnGrid, 64>;
    // Swizzles begin with multiples of 1024 bytes.
    static constexpr int kWarpBytes =
        (std::max({kWide ? Wide::kSharedBytes : 0, Half::kSharedBytes, Quarter::kSharedBytes}) + 1023) / 1024 * 1024;
    // A warp for each scheduler of a multiprocessor takes up so much shared memory; three, or two, what there is.
    static constexpr int kRoundBytes = 4 * kWarpBytes, kMostRounds = std::min(227 * 1024 / kRoundBytes, 3);
    static_assert(kMostRounds > 1 && 2 * kMostRounds * kRoundBytes > 227 * 1024);
};

// Neighbouring shares go to the four schedulers of a multiprocessor, then to the next one.
template <typename Input, int kSlots, bool kOnGrid, bool kWide>
__global__ void
__launch_bounds__(128 * ScanKinds<Input, kSlots, kOnGrid, kWide>::kMostRounds, 1) selective_scan_channels(
    const __grid_constant__ SelectiveScanParams p, const __grid_constant__ ScanDeal deal,
    const __grid_constant__ ScanMaps<kOnGrid> maps, const uint32_t *state_words) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900           // which have the copy engine
    using Kinds = ScanKinds<Input, kSlots, kOnGrid, kWide>;
    extern __shared__ __align__(1024) char scan_tiles[];
    if (blockDim.x > 128) start_dependents();                // a CTA has a multiprocessor to itself
    const int wide = deal.wide * p.batch, half = deal.half * p.batch;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    const int share = (warp / 4 * gridDim.x + blockIdx.x) * 4 + warp % 4;
    auto take = [&](auto rows, int index, int in_batch, int before) {
        char *const shared = scan_tiles + warp * Kinds::kWarpBytes;
        constexpr int kChannels = decltype(rows)::kChannels, kApart = decltype(rows)::kApart;
        const int b = index / in_batch, in = index % in_batch;
        // Off the grid neighbouring shares read through the same maps.
        const int of_map = in_batch / kApart, first = before + in / of_map + in % of_map * kApart * kChannels;
        if (b < p.batch && first < p.channels) scan_channels<decltype(rows)>(p, maps, state_words, b, first, shared);
    };
    if constexpr (kWide)
        if (share < wide) return take(typename Kinds::Wide{}, share, deal.wide, 0);
    if (share < wide + half) take(typename Kinds::Half{}, share - wide, deal.half, deal.wide * 32);
    else if (deal.quarter > 0)
        take(typename Kinds::Quarter{}, share - wide - half, deal.quarter, deal.wide * 32 + deal.half * 16);
#endif
}

}  // namespace shedder
