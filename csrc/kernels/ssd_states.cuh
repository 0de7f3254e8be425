// States of ssd_fwd on their way between memory and the registers of a consumer: the initial and the final ones, and those
// that CTAs leave to others.
//
// The thread holds rows 16 warp + lane / 4 and 8 more of h, of every 8 states the two from 2 (lane % 4) on.

#pragma once

#include <cstdint>

#include "kernels/ssd_pieces.cuh"
#include "kernels/ssd_wgmma.cuh"

namespace shedder {

// Of a state that waits in `carry`: fragments of 128 threads, and a decay of each.
template <int kStates16>
constexpr int kCarryFloats = (kStates16 * 8 + 1) * 128;

// The channel of this thread's row, or of the one `down` below it, and its place in states; found anew at each use:
// registers are short.
__device__ __forceinline__ int channel_of(const SsdRows &rows, int down) {
    unsigned thread = threadIdx.x;
    asm volatile("" : "+r"(thread));
    return static_cast<int>(thread / 32 * 16 + thread % 32 / 4) + down - rows.first & 63;
}
__device__ __forceinline__ bool exists(const SsdRows &rows, int down) { return channel_of(rows, down) < rows.channels; }
template <typename Float>
__device__ __forceinline__ Float *state_row(const SsdParams &p, Float *states, int state, const SsdRows &rows,
                                            int down) {
    return states + (int64_t{state / p.tiles} * p.headdim + rows.first_channel + channel_of(rows, down)) * p.dstate
        + threadIdx.x % 4 * 2;
}

// h += factor times a state; pair(i): its elements i and i + 1.
template <int kStates16, typename Pair>
__device__ __forceinline__ void add_state(float (&h)[kStates16 * 8], float factor, Pair &&pair) {
    constexpr int kCount = kStates16 * 8, kAtOnce = kStates16 <= 8 ? kCount : 16;    // or registers are short
#pragma unroll
    for (int first = 0; first < kCount; first += kAtOnce) {
        float2 state[kAtOnce / 2];
#pragma unroll
        for (int i = 0; i < kAtOnce; i += 2) state[i / 2] = pair(first + i);
#pragma unroll
        for (int i = 0; i < kAtOnce; i += 2) {
            h[first + i] += factor * state[i / 2].x;
            h[first + i + 1] += factor * state[i / 2].y;
        }
        if constexpr (kAtOnce < kCount) asm volatile("" ::: "memory");
    }
}

// q: lane % 4.
template <int kStates16>
__device__ __forceinline__ void add_initial_state(const SsdParams &p, int state, const SsdRows &rows, int q,
                                                  float (&h)[kStates16 * 8]) {
    const float *const initial[2] = {state_row(p, p.initial, state, rows, 0), state_row(p, p.initial, state, rows, 8)};
    const int states[2] = {exists(rows, 0) ? p.dstate - 2 * q : 0, exists(rows, 8) ? p.dstate - 2 * q : 0};
    const bool in_pairs = p.dstate % 2 == 0 && reinterpret_cast<uintptr_t>(p.initial) % 8 == 0;
    add_state<kStates16>(h, 1.f, [&](int i) {
        const float *const from = initial[i / 2 % 2] + i / 4 * 8;
        const int left = states[i / 2 % 2] - i / 4 * 8;
        if (in_pairs) return left > 0 ? *reinterpret_cast<const float2 *>(from) : float2{};
        return make_float2(left > 0 ? from[0] : 0.f, left > 1 ? from[1] : 0.f);
    });
}

// Where a state that is left waits, and the words that say that it is there, one for each CTA that takes it.
template <int kStates16>
__device__ __forceinline__ float *carry_of(const SsdParams &p, int of) {
    return p.carry + of * int64_t{kCarryFloats<kStates16>} + threadIdx.x;
}
__device__ __forceinline__ uint64_t *is_left(const SsdParams &p, int of) { return p.is_left + of * int64_t{p.takers}; }

// The states that a piece takes, as they have decayed since.
template <int kStates16>
__device__ __forceinline__ void add_states_left(const SsdParams &p, const SsdPiece &piece, float (&h)[kStates16 * 8]) {
    for (int i = threadIdx.x; i < piece.taken; i += 128) {
        uint64_t *const word = is_left(p, piece.takes - i * piece.apart) + i;
        while (acquire(word) != p.call) {}
        *word = 0;                                           // for the call to come by the same name: a graph's
    }
    warpgroup_barrier(1);
    float decay = 1.f;                                       // from the end of a segment to the start of this one
#pragma unroll 1
    for (int i = 0; i < piece.taken; ++i) {
        const float *const state = carry_of<kStates16>(p, piece.takes - i * piece.apart);
        add_state<kStates16>(h, decay, [&](int i) {
            return make_float2(__ldcg(state + i * 128), __ldcg(state + (i + 1) * 128));
        });
        decay *= __ldcg(state + kStates16 * 8 * 128);
    }
}

// decay: of this thread's rows over the segment that the state ends.
template <int kStates16>
__device__ __forceinline__ void leave_state(const SsdParams &p, const float (&h)[kStates16 * 8], int of, float decay) {
    float *const to = carry_of<kStates16>(p, of);
#pragma unroll
    for (int i = 0; i < kStates16 * 8; ++i) __stcg(to + i * 128, h[i]);
    __stcg(to + kStates16 * 8 * 128, decay);
    __threadfence();
    warpgroup_barrier(1);
    for (int i = threadIdx.x; i < p.takers; i += 128) release(is_left(p, of) + i, p.call);
}

template <int kStates16>
__device__ __forceinline__ void store_final_state(const SsdParams &p, int state, const SsdRows &rows, int q,
                                                  const float (&h)[kStates16 * 8]) {
#pragma unroll
    for (int down = 0; down < 2; ++down) {
        float *const to = state_row(p, p.final_states, state, rows, down * 8);
        const bool there = exists(rows, down * 8);
        // Two states at a time. A row that lies between pairs of memory, one of an odd number of states, takes the
        // first of each pair from the lane before.
        const bool between = reinterpret_cast<uintptr_t>(to) & 4;
        float *const pairs = to - between;
        const int left = there ? p.dstate - 2 * q + between : 0;             // states from there on
        float behind = 0.f;
#pragma unroll
        for (int i = 0; i < kStates16 * 2; ++i) {
            float2 pair{h[i * 4 + down * 2], h[i * 4 + down * 2 + 1]};
            if (p.dstate % 2 != 0) {
                const float given = q == 3 ? behind : pair.y;
                behind = pair.y;
                const float taken = __shfl_sync(0xffffffffu, given, q + 3, 4);
                if (between) pair = {taken, pair.x};
            }
            if (i == 0 && between && q == 0) {
                if (left > 1) pairs[1] = pair.y;
            } else if (i * 8 + 1 < left) {
                *reinterpret_cast<float2 *>(pairs + i * 8) = pair;
            } else if (i * 8 < left) {
                pairs[i * 8] = pair.x;
            }
        }
    }
}

}  // namespace shedder
