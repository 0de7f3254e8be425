// Depthwise causal convolution along time, over a whole sequence and by steps.
//
//   y[c,t] = act(bias[c] + sum_w weight[c,w] x[c, t - (W-1) + w])
//
// Lanes are channels, kConvTile of them at a time over blocks of kTime tokens; rows that lie contiguous along time
// take lanes along time instead. Taps that reach another sequence of a packed row read zero. Bound: one exp per output.

#include "simd.h"

namespace shedder::cpu::SHEDDER_ISA {
namespace {

constexpr int kTime = 64;
constexpr int kMaxHistory = kMaxWidth - 1;

struct Taps {
    float weight[kMaxWidth][kConvTile], bias[kConvTile];
};

void read_taps(const Array &weight, const Array &bias, int64_t width, int64_t first, int64_t count, Taps &taps) {
    std::memset(&taps, 0, sizeof taps);
    for (int64_t w = 0; w < width; ++w)
        read_row(weight, first * weight.stride[0] + w * weight.stride[1], weight.stride[0], count, taps.weight[w]);
    if (bias) read_row(bias, first * bias.stride[0], bias.stride[0], count, taps.bias);
}

// One token of kConvTile channels from the last kWidth inputs, oldest first. used[w] false: that tap reads zero.
template <int kWidth>
void one_token(const Taps &taps, const float *const *inputs, const bool *used, bool act, float *y) {
    for (int64_t c = 0; c < kConvTile; c += kLanes) {
        Vec v = load(taps.bias + c);
#pragma GCC unroll 4
        for (int w = 0; w < kWidth; ++w)
            if (!used || used[w]) v += load(taps.weight[w] + c) * load(inputs[w] + c);
        store(y + c, act ? silu(v) : v);
    }
}

using OneToken = void (*)(const Taps &, const float *const *, const bool *, bool, float *);

OneToken one_token_of(int64_t width) {
    constexpr OneToken table[kMaxWidth] = {one_token<1>, one_token<2>, one_token<3>, one_token<4>};
    return table[width - 1];
}

void lanes_along_channels(const Conv1d &p, int64_t batch, int64_t first, int64_t count) {
    Taps taps;
    float window[(kTime + kMaxHistory) * kConvTile], y[kTime * kConvTile];
    int64_t at[kConvTile], y_at[kConvTile];
    const int64_t history = p.width - 1;
    const OneToken one_token = one_token_of(p.width);
    read_taps(p.weight, p.bias, p.width, first, count, taps);
    std::memset(window, 0, sizeof window);
    if (p.initial_states)
        for (int64_t w = 0; w < history; ++w)
            read_row(p.initial_states, batch * p.initial_states.stride[0] + first * p.initial_states.stride[1] +
                     w * p.initial_states.stride[2], p.initial_states.stride[1], count, window + w * kConvTile);
    for (int64_t c = 0; c < count; ++c) at[c] = (first + c) * p.x.stride[1];
    for (int64_t c = 0; c < count; ++c) y_at[c] = (first + c) * p.y.stride[1];
    const int32_t *names = p.seq_idx ? p.seq_idx + batch * p.length : nullptr;

    for (int64_t token = 0; token < p.length; token += kTime) {
        const int64_t length = p.length - token < kTime ? p.length - token : kTime;
        read_tile<kConvTile>(p.x, batch * p.x.stride[0] + token * p.x.stride[2], at, count, p.x.stride[2], length,
                             window + history * kConvTile);
        for (int64_t t = 0; t < length; ++t) {
            const float *inputs[kMaxWidth];
            bool used[kMaxWidth];
            for (int64_t w = 0; w < p.width; ++w) {
                inputs[w] = window + (t + w) * kConvTile;
                const int64_t source = token + t - history + w;
                used[w] = !names || names[source < 0 ? 0 : source] == names[token + t];
            }
            if (names && names[token + t] < 0)
                std::memset(y + t * kConvTile, 0, sizeof(float) * kConvTile);
            else
                one_token(taps, inputs, names ? used : nullptr, p.silu, y + t * kConvTile);
        }
        write_tile<kConvTile>(p.y, batch * p.y.stride[0] + token * p.y.stride[2], y_at, count, p.y.stride[2], length, y);
        std::memmove(window, window + length * kConvTile, sizeof(float) * history * kConvTile);
    }
}

void lanes_along_time(const Conv1d &p, int64_t batch, int64_t channel) {
    constexpr int kRun = 512;
    float window[kRun + kMaxHistory + kLanes] = {}, y[kRun + kLanes];
    float weight[kMaxWidth];
    const int64_t history = p.width - 1;
    for (int64_t w = 0; w < p.width; ++w)
        weight[w] = read_one(p.weight, channel * p.weight.stride[0] + w * p.weight.stride[1]);
    const float bias = p.bias ? read_one(p.bias, channel * p.bias.stride[0]) : 0.0f;
    if (p.initial_states)
        read_row(p.initial_states, batch * p.initial_states.stride[0] + channel * p.initial_states.stride[1],
                 p.initial_states.stride[2], history, window);
    for (int64_t token = 0; token < p.length; token += kRun) {
        const int64_t length = p.length - token < kRun ? p.length - token : kRun;
        read_row(p.x, batch * p.x.stride[0] + channel * p.x.stride[1] + token * p.x.stride[2], p.x.stride[2], length,
                 window + history);
        for (int64_t t = 0; t < length; t += kLanes) {
            Vec v = splat(bias);
            for (int64_t w = 0; w < p.width; ++w) v += weight[w] * load(window + t + w);
            store(y + t, p.silu ? silu(v) : v);
        }
        write_row(p.y, batch * p.y.stride[0] + channel * p.y.stride[1] + token * p.y.stride[2], p.y.stride[2], length, y);
        std::memmove(window, window + length, sizeof(float) * history);
    }
}

// The last W-1 inputs of initial_states and x.
void write_final_states(const Conv1d &p, int64_t batch, int64_t first, int64_t count) {
    float row[kConvTile];
    const int64_t history = p.width - 1;
    for (int64_t w = 0; w < history; ++w) {
        const int64_t source = p.length - history + w;
        const Array &from = source < 0 ? p.initial_states : p.x;
        if (from)
            read_row(from, batch * from.stride[0] + first * from.stride[1] +
                     (source < 0 ? source + history : source) * from.stride[2], from.stride[1], count, row);
        else
            std::memset(row, 0, sizeof row);
        write_row(p.final_states, batch * p.final_states.stride[0] + first * p.final_states.stride[1] +
                  w * p.final_states.stride[2], p.final_states.stride[1], count, row);
    }
}

void step_tile(const Conv1dUpdate &p, int64_t batch, int64_t first, int64_t count) {
    Taps taps;
    float ring[kMaxWidth][kConvTile] = {}, y[kConvTile] = {};
    const int64_t history = p.width - 1;
    const OneToken one_token = one_token_of(p.width);
    const Array &state = p.conv_state;
    auto write_y = [&](int64_t t) {
        write_row(p.y, batch * p.y.stride[0] + first * p.y.stride[1] + t * p.y.stride[2], p.y.stride[1], count, y);
    };
    const int64_t slot = p.conv_state_indices ? p.conv_state_indices[batch] : batch;
    if (slot < 0) {
        for (int64_t t = 0; t < p.length; ++t) write_y(t);
        return;
    }
    read_taps(p.weight, p.bias, p.width, first, count, taps);
    const int64_t base = slot * state.stride[0] + first * state.stride[1];
    const int64_t seen = p.cache_seqlens ? p.cache_seqlens[batch] : 0;
    for (int64_t w = 0; w < history; ++w) {
        const int64_t at = p.cache_seqlens ? ((seen - history + w) % p.kept + p.kept) % p.kept : p.kept - history + w;
        read_row(state, base + at * state.stride[2], state.stride[1], count, ring[w]);
    }
    if (!p.cache_seqlens) {                                       // shift by S: the last K - S inputs move to the front
        float row[kConvTile];
        for (int64_t k = 0; k + p.length < p.kept; ++k) {
            read_row(state, base + (k + p.length) * state.stride[2], state.stride[1], count, row);
            write_row(state, base + k * state.stride[2], state.stride[1], count, row);
        }
    }
    for (int64_t t = 0; t < p.length; ++t) {
        float *newest = ring[(t + history) % p.width];
        read_row(p.x, batch * p.x.stride[0] + first * p.x.stride[1] + t * p.x.stride[2], p.x.stride[1], count, newest);
        const float *inputs[kMaxWidth];
        for (int64_t w = 0; w < p.width; ++w) inputs[w] = ring[(t + w) % p.width];
        one_token(taps, inputs, nullptr, p.silu, y);
        write_y(t);
        const int64_t at = p.cache_seqlens ? (seen + t) % p.kept : p.kept - p.length + t;
        if (at >= 0) write_row(state, base + at * state.stride[2], state.stride[1], count, newest);
    }
}

template <typename Params, typename Each>
void each_tile(const Params &p, int64_t begin, int64_t end, Each each) {
    const int64_t tiles = (p.channels + kConvTile - 1) / kConvTile;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item % tiles * kConvTile;
        each(item / tiles, first, p.channels - first < kConvTile ? p.channels - first : kConvTile);
    }
}

}  // namespace

void conv1d(const Conv1d &p, int64_t begin, int64_t end) {
    const bool along_time = p.x.stride[1] != 1 && p.x.stride[2] == 1 && !p.seq_idx;
    each_tile(p, begin, end, [&](int64_t batch, int64_t first, int64_t count) {
        if (along_time)
            for (int64_t c = first; c < first + count; ++c) lanes_along_time(p, batch, c);
        else
            lanes_along_channels(p, batch, first, count);
        write_final_states(p, batch, first, count);
    });
}

void conv1d_update(const Conv1dUpdate &p, int64_t begin, int64_t end) {
    each_tile(p, begin, end, [&](int64_t batch, int64_t first, int64_t count) { step_tile(p, batch, first, count); });
}

}  // namespace shedder::cpu::SHEDDER_ISA
