// Selective scan, forward.
//
//   delta  = softplus(delta + bias)
//   h[t,n] = exp(delta[t] A[n]) h[t-1,n] + delta[t] B[t,n] u[t]
//   y[t]   = (sum_n C[t,n] h[t,n] + D u[t]) silu(z[t])
//
// Lanes are channels of one group, so that B and C are broadcast and nothing is summed across lanes. A tile of
// kTile channels walks over blocks of kTime tokens; within a block, kBlock states at a time stay in registers
// for all its tokens. Bound: one exp2 per (t, n).

#include "simd.h"

namespace shedder::cpu::SHEDDER_ISA {
namespace {

constexpr int kTime = 64;

struct Block {
    float u[kTime * kTile], delta[kTime * kTile], y[kTime * kTile];
    bool reset[kTime], padding[kTime];
    bool any_reset, any_padding;
};

// Walks kStates states of kLanes channels over `length` tokens. B and C: [t][kStates], or [kStates][kTile] if constant.
template <int kStates, bool kConstantB, bool kConstantC>
void walk(const Block &in, int lane, int64_t length, const float *A, const float *B, const float *C, float *state,
          float *y) {
    Vec h[kStates];
#pragma GCC unroll 16
    for (int n = 0; n < kStates; ++n) h[n] = load(state + n * kTile);
    for (int64_t t = 0; t < length; ++t) {
        const Vec delta = load(in.delta + t * kTile + lane), input = delta * load(in.u + t * kTile + lane);
        Vec sum0 = load(y + t * kTile), sum1 = splat(0);
        if (in.any_reset && in.reset[t])
#pragma GCC unroll 16
            for (int n = 0; n < kStates; ++n) h[n] = splat(0);
#pragma GCC unroll 16
        for (int n = 0; n < kStates; ++n) {
            const Vec b = kConstantB ? load(B + n * kTile) : splat(B[t * kStates + n]);
            const Vec c = kConstantC ? load(C + n * kTile) : splat(C[t * kStates + n]);
            h[n] = exp2(delta * load(A + n * kTile)) * h[n] + input * b;
            if (n % 2)
                sum1 += c * h[n];
            else
                sum0 += c * h[n];
        }
        store(y + t * kTile, sum0 + sum1);
    }
#pragma GCC unroll 16
    for (int n = 0; n < kStates; ++n) store(state + n * kTile, h[n]);
}

template <int kStates>
void walk_lanes(const SelectiveScan &p, Block &block, int64_t count, int64_t length, const float *A, const float *B,
                const float *C, float *state) {
    for (int lane = 0; lane < count; lane += kLanes) {
        auto go = p.constant_B ? (p.constant_C ? walk<kStates, true, true> : walk<kStates, true, false>)
                               : (p.constant_C ? walk<kStates, false, true> : walk<kStates, false, false>);
        go(block, lane, length, A + lane, B + (p.constant_B ? lane : 0), C + (p.constant_C ? lane : 0), state + lane,
           block.y + lane);
    }
}

// panel[t][n] for `count` states from `first`, contiguous.
void read_panel(const Array &a, int64_t base, int64_t first, int64_t count, int64_t token, int64_t length,
                float *panel) {
    const int64_t over_states = a.stride[2], over_time = a.stride[3];
    if (over_time == 1 && over_states != 1) {
        float row[kTime];
        for (int64_t n = 0; n < count; ++n) {
            read_row(a, base + (first + n) * over_states + token, 1, length, row);
            for (int64_t t = 0; t < length; ++t) panel[t * count + n] = row[t];
        }
        return;
    }
    for (int64_t t = 0; t < length; ++t)
        read_row(a, base + first * over_states + (token + t) * over_time, over_states, count, panel + t * count);
}

void scan_tile(const SelectiveScan &p, int64_t batch, const Tile &tile) {
    Block block;
    float A[kMaxStates * kTile], state[kMaxStates * kTile], bias[kTile] = {}, skip[kTile] = {};
    float panel_B[kTime * kBlock], panel_C[kTime * kBlock];
    float fixed_B[kBlock * kTile], fixed_C[kBlock * kTile];
    int64_t channel[kTile], at[kTile];
    const int64_t count = tile.count;
    auto offsets = [&](int64_t stride) {
        for (int64_t c = 0; c < count; ++c) at[c] = channel[c] * stride;
        return at;
    };

    for (int64_t c = 0; c < count; ++c) channel[c] = p.order ? p.order[tile.first + c] : tile.first + c;
    for (int64_t c = 0; c < count; ++c) {
        if (p.delta_bias) bias[c] = read_one(p.delta_bias, channel[c] * p.delta_bias.stride[0]);
        if (p.D) skip[c] = read_one(p.D, channel[c] * p.D.stride[0]);
    }
    read_tile<kTile>(p.A, 0, offsets(p.A.stride[0]), count, p.A.stride[1], p.states, A);
    for (int64_t i = 0; i < p.states * kTile; ++i) A[i] *= 1.44269504088896341f;           // exp(x) = exp2(x log2 e)
    if (p.initial_state)
        read_tile<kTile>(p.initial_state, batch * p.initial_state.stride[0], offsets(p.initial_state.stride[1]), count,
                         p.initial_state.stride[2], p.states, state);
    else
        std::memset(state, 0, sizeof(float) * p.states * kTile);

    const int32_t *names = p.seq_idx ? p.seq_idx + batch * p.length : nullptr;
    int32_t current = -1;                                                                   // of the last real token
    block.any_reset = block.any_padding = false;
    for (int64_t token = 0; token < p.length; token += kTime) {
        const int64_t length = p.length - token < kTime ? p.length - token : kTime;
        read_tile<kTile>(p.u, batch * p.u.stride[0] + token * p.u.stride[2], offsets(p.u.stride[1]), count,
                         p.u.stride[2], length, block.u);
        read_tile<kTile>(p.delta, batch * p.delta.stride[0] + token * p.delta.stride[2], offsets(p.delta.stride[1]),
                         count, p.delta.stride[2], length, block.delta);
        for (int64_t t = 0; t < length; ++t)
            for (int64_t c = 0; c < kTile; c += kLanes) {
                float *delta = block.delta + t * kTile + c;
                const Vec biased = load(delta) + load(bias + c);
                store(delta, p.delta_softplus ? softplus(biased) : biased);
                store(block.y + t * kTile + c, load(skip + c) * load(block.u + t * kTile + c));
            }
        if (names) {
            block.any_reset = block.any_padding = false;
            for (int64_t t = 0; t < length; ++t) {
                const int32_t name = names[token + t];
                block.padding[t] = name < 0;
                block.reset[t] = name >= 0 && current >= 0 && name != current;
                if (name >= 0) current = name;
                block.any_reset |= block.reset[t];
                block.any_padding |= block.padding[t];
                if (block.padding[t])
                    for (int64_t c = 0; c < kTile; ++c) block.delta[t * kTile + c] = block.u[t * kTile + c] = 0;
            }
        }

        for (int64_t n = 0; n < p.states;) {
            const int64_t left = p.states - n;
            const int64_t states = left >= kBlock ? kBlock : left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
            const float *B = panel_B, *C = panel_C;
            if (p.constant_B) {
                read_tile<kTile>(p.B, n * p.B.stride[1], offsets(p.B.stride[0]), count, p.B.stride[1], states, fixed_B);
                B = fixed_B;
            } else {
                read_panel(p.B, batch * p.B.stride[0] + tile.group * p.B.stride[1], n, states, token, length, panel_B);
            }
            if (p.constant_C) {
                read_tile<kTile>(p.C, n * p.C.stride[1], offsets(p.C.stride[0]), count, p.C.stride[1], states, fixed_C);
                C = fixed_C;
            } else {
                read_panel(p.C, batch * p.C.stride[0] + tile.group * p.C.stride[1], n, states, token, length, panel_C);
            }
            auto go = states == 16 ? walk_lanes<kBlock> : states == 8 ? walk_lanes<8> : states == 4 ? walk_lanes<4>
                      : states == 2 ? walk_lanes<2> : walk_lanes<1>;
            go(p, block, count, length, A + n * kTile, B, C, state + n * kTile);
            n += states;
        }

        if (p.z) {
            read_tile<kTile>(p.z, batch * p.z.stride[0] + token * p.z.stride[2], offsets(p.z.stride[1]), count,
                             p.z.stride[2], length, block.u);
            for (int64_t i = 0; i < length * kTile; i += kLanes)
                store(block.y + i, load(block.y + i) * silu(load(block.u + i)));
        }
        for (int64_t t = 0; names && t < length; ++t)
            if (block.padding[t]) std::memset(block.y + t * kTile, 0, sizeof(float) * kTile);
        write_tile<kTile>(p.y, batch * p.y.stride[0] + token * p.y.stride[2], offsets(p.y.stride[1]), count,
                          p.y.stride[2], length, block.y);
    }
    write_tile<kTile>(p.final_state, batch * p.final_state.stride[0], offsets(p.final_state.stride[1]), count,
                      p.final_state.stride[2], p.states, state);
}

}  // namespace

void selective_scan(const SelectiveScan &p, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) scan_tile(p, item / p.tile_count, p.tiles[item % p.tile_count]);
}

}  // namespace shedder::cpu::SHEDDER_ISA
