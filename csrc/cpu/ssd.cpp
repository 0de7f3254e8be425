// SSD, forward, as its recurrence.
//
//   dt       = clamp(softplus(dt + bias), dt_min, dt_max)
//   h[t,p,n] = exp(dt[t] A) h[t-1,p,n] + dt[t] x[t,p] B[t,n]
//   y[t,p]   = (sum_n C[t,n] h[t,p,n] + D x[t,p]) silu(z[t,p])
//
// Lanes are channels (h, p) of one group, across heads, so that B and C are broadcast, no headdim wastes lanes and
// nothing is summed across lanes. A tile of kTile channels walks over blocks of kTime tokens; within a block, kBlock
// states at a time stay in registers for all its tokens. Three multiply-adds per (t, p, n), no loads but B and C: the
// chunked form would save less than a third of them.

#include "simd.h"

namespace shedder::cpu::SHEDDER_ISA {
namespace {

constexpr int kTime = 64;

struct Block {
    float decay[kTime * kTile], input[kTime * kTile], y[kTime * kTile], x[kTime * kTile];
    float panel_B[kTime * kBlock], panel_C[kTime * kBlock];
};

// Walks kStates states of kLanes channels over `length` tokens. B and C: [t][kStates].
template <int kStates>
void walk(const float *decay, const float *input, const float *B, const float *C, int64_t length, float *state,
          float *y) {
    Vec h[kStates];
#pragma GCC unroll 16
    for (int n = 0; n < kStates; ++n) h[n] = load(state + n * kTile);
    for (int64_t t = 0; t < length; ++t) {
        const Vec a = load(decay + t * kTile), in = load(input + t * kTile);
        Vec sum0 = load(y + t * kTile), sum1 = splat(0);
#pragma GCC unroll 16
        for (int n = 0; n < kStates; ++n) {
            h[n] = a * h[n] + in * splat(B[t * kStates + n]);
            if (n % 2)
                sum1 += h[n] * splat(C[t * kStates + n]);
            else
                sum0 += h[n] * splat(C[t * kStates + n]);
        }
        store(y + t * kTile, sum0 + sum1);
    }
#pragma GCC unroll 16
    for (int n = 0; n < kStates; ++n) store(state + n * kTile, h[n]);
}

// panel[t][n] for `count` states from `first`, contiguous.
void read_panel(const Array &a, int64_t base, int64_t first, int64_t count, int64_t token, int64_t length,
                float *panel) {
    for (int64_t t = 0; t < length; ++t)
        read_row(a, base + (token + t) * a.stride[1] + first * a.stride[3], a.stride[3], count, panel + t * count);
}

void scan_tile(const Ssd &p, int64_t batch, const Tile &tile) {
    Block block;
    float state[kMaxStates * kTile], skip[kTile] = {};
    int64_t head[kTile], within[kTile], at[kTile];
    const int64_t count = tile.count;
    auto offsets = [&](int64_t over_heads, int64_t over_headdim) {
        for (int64_t c = 0; c < count; ++c) at[c] = head[c] * over_heads + within[c] * over_headdim;
        return at;
    };
    for (int64_t c = 0; c < count; ++c) {
        const int64_t channel = p.order ? p.order[tile.first + c] : tile.first + c;
        head[c] = channel / p.headdim;
        within[c] = channel % p.headdim;
        if (p.D) skip[c] = read_one(p.D, head[c] * p.D.stride[0] + within[c] * p.D.stride[1]);
    }
    if (p.initial_states)
        read_tile<kTile>(p.initial_states, batch * p.initial_states.stride[0],
                         offsets(p.initial_states.stride[1], p.initial_states.stride[2]), count,
                         p.initial_states.stride[3], p.states, state);
    else
        std::memset(state, 0, sizeof(float) * p.states * kTile);
    if (count < kTile) std::memset(block.decay, 0, sizeof block.decay);
    if (count < kTile) std::memset(block.input, 0, sizeof block.input);

    const int32_t *names = p.seq_idx ? p.seq_idx + batch * p.length : nullptr;
    int32_t current = -1;                                                   // of the last token that is not padding
    bool reset[kTime] = {}, padding[kTime] = {};
    for (int64_t token = 0; token < p.length; token += kTime) {
        const int64_t length = p.length - token < kTime ? p.length - token : kTime;
        for (int64_t t = 0; names && t < length; ++t) {
            const int32_t name = names[token + t];
            padding[t] = name < 0;
            reset[t] = name >= 0 && current >= 0 && name != current;
            if (name >= 0) current = name;
        }
        for (int64_t c = 0; c < count;) {                                   // dt and decay: once for each head
            int64_t last = c;
            while (last < count && head[last] == head[c]) ++last;
            float dt[kTime] = {}, decay[kTime] = {};
            read_row(p.dt, batch * p.dt.stride[0] + token * p.dt.stride[1] + head[c] * p.dt.stride[2], p.dt.stride[1],
                     length, dt);
            const Vec A = splat(read_one(p.A, head[c] * p.A.stride[0]));
            const Vec bias = splat(p.dt_bias ? read_one(p.dt_bias, head[c] * p.dt_bias.stride[0]) : 0.0f);
            for (int64_t t = 0; t < length; t += kLanes) {
                Vec v = load(dt + t) + bias;
                if (p.dt_softplus) v = softplus(v);
                v = maximum(splat(p.dt_min), minimum(splat(p.dt_max), v));
                store(dt + t, v);
                store(decay + t, exp(v * A));
            }
            for (int64_t t = 0; t < length; ++t) {
                const float a = padding[t] ? 1.0f : reset[t] ? 0.0f : decay[t], d = padding[t] ? 0.0f : dt[t];
                for (int64_t i = c; i < last; ++i) block.decay[t * kTile + i] = a;
                for (int64_t i = c; i < last; ++i) block.input[t * kTile + i] = d;
            }
            c = last;
        }
        read_tile<kTile>(p.x, batch * p.x.stride[0] + token * p.x.stride[1], offsets(p.x.stride[2], p.x.stride[3]),
                         count, p.x.stride[1], length, block.x);
        for (int64_t t = 0; t < length; ++t) {
            if (padding[t]) std::memset(block.x + t * kTile, 0, sizeof(float) * kTile);
            for (int64_t c = 0; c < kTile; c += kLanes) {
                const int64_t i = t * kTile + c;
                const Vec x = load(block.x + i);
                store(block.input + i, load(block.input + i) * x);
                store(block.y + i, load(skip + c) * x);
            }
        }

        for (int64_t n = 0; n < p.states;) {
            const int64_t left = p.states - n;
            const int64_t states = left >= kBlock ? kBlock : left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
            read_panel(p.B, batch * p.B.stride[0] + tile.group * p.B.stride[2], n, states, token, length, block.panel_B);
            read_panel(p.C, batch * p.C.stride[0] + tile.group * p.C.stride[2], n, states, token, length, block.panel_C);
            auto go = states == 16 ? walk<kBlock> : states == 8 ? walk<8> : states == 4 ? walk<4>
                      : states == 2 ? walk<2> : walk<1>;
            for (int64_t c = 0; c < count; c += kLanes)
                go(block.decay + c, block.input + c, block.panel_B, block.panel_C, length, state + n * kTile + c,
                   block.y + c);
            n += states;
        }

        if (p.z) {
            read_tile<kTile>(p.z, batch * p.z.stride[0] + token * p.z.stride[1], offsets(p.z.stride[2], p.z.stride[3]),
                             count, p.z.stride[1], length, block.x);
            for (int64_t i = 0; i < length * kTile; i += kLanes)
                store(block.y + i, load(block.y + i) * silu(load(block.x + i)));
        }
        for (int64_t t = 0; names && t < length; ++t)
            if (padding[t]) std::memset(block.y + t * kTile, 0, sizeof(float) * kTile);
        write_tile<kTile>(p.y, batch * p.y.stride[0] + token * p.y.stride[1], offsets(p.y.stride[2], p.y.stride[3]),
                          count, p.y.stride[1], length, block.y);
    }
    write_tile<kTile>(p.final_states, batch * p.final_states.stride[0],
                      offsets(p.final_states.stride[1], p.final_states.stride[2]), count, p.final_states.stride[3],
                      p.states, state);
}

}  // namespace

void ssd(const Ssd &p, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) scan_tile(p, item / p.tile_count, p.tiles[item % p.tile_count]);
}

}  // namespace shedder::cpu::SHEDDER_ISA
