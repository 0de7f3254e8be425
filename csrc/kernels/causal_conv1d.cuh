// Depthwise causal convolution along time, forward.
//
//   y[c,t] = act(bias[c] + sum_w weight[c,w] x[c, t - (W-1) + w])
//
// causal_conv1d_channels: channels adjacent in memory. A lane owns four channels and walks along time. What the inputs
//   so far add to the next three outputs is carried in registers, so that each input is converted and multiplied once:
//       y_t = w3 x_t + a0        a0 = w2 x_t + a1        a1 = w1 x_t + a2        a2 = w0 x_t + bias
//   Rows of x come into shared memory a few tokens ahead, as the 16-byte pieces of memory that they lie in: so a lane
//   finds its channels wherever a row starts, and what is on its way takes no registers.
// causal_conv1d_time: time adjacent in memory. A lane owns 16 bytes of time on the grid of the row; the three inputs
//   before them come from its neighbour.
// causal_conv1d_any: any strides, one thread for each channel.
// Bound: bytes of x and y.

#pragma once

#include "kernels/copy_async.cuh"
#include "kernels/pointwise.cuh"
#include "kernels/row_vectors.cuh"

namespace shedder {

struct ConvStrides {
    int64_t batch, channel, time;
};

struct CausalConv1dParams {
    const void *x, *initial_states;                          // initial_states may be null
    void *y, *final_states;                                  // final_states (batch, channel, width-1), contiguous
    Parameter weight, bias;
    const int32_t *seq_idx;                                  // null: one sequence in each row
    ConvStrides x_strides, y_strides, initial_strides;
    int64_t weight_channel_stride, weight_tap_stride, bias_stride, seq_idx_batch_stride, seq_idx_time_stride;
    int64_t batch;
    int channels, length;
    int width, steps;                                        // steps: tokens that one thread or warp walks over
    bool silu;
    // The columns of y: the first `whole` channels lie side by side; from column parts_at on parts of `part` channels
    // each, whose first ones are part_pitch columns apart.
    int whole, part, parts_at, part_pitch;
    __device__ int column(int channel) const {
        const int behind = channel - whole;
        return behind < 0 ? channel : parts_at + behind / part * part_pitch + behind % part;
    }
};

constexpr int kConvThreads = 128;
constexpr int kMaxWidth = 4;
constexpr int kHistory = kMaxWidth - 1;                      // inputs t-3, t-2, t-1
constexpr int kLaneChannels = 4;                             // of causal_conv1d_channels
constexpr int kTileChannels = 32 * kLaneChannels;
constexpr int kConvVectors = 2;                              // of causal_conv1d_time: in flight for each lane

// The taps of kCount channels, the newest last, and their biases. A narrower filter leaves the first taps 0; channels
// that do not exist read the last one. kFull: width 4, and the four taps of a channel are one aligned load.
template <bool kFull, int kCount, typename Channel>
__device__ inline void load_conv_taps(const CausalConv1dParams &p, Channel channel, float (&taps)[kMaxWidth][kCount],
                                      float (&bias)[kCount]) {
    p.weight.visit([&](auto *weight) {
        using W = std::remove_const_t<std::remove_pointer_t<decltype(weight)>>;
        Packed<W, kMaxWidth> all[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const int c = min(channel(i), p.channels - 1);
            if constexpr (kFull) {
                using Word = typename Packed<W, kMaxWidth>::Word;
                all[i].word = *reinterpret_cast<const Word *>(weight + int64_t{c} * kMaxWidth);
            } else {
#pragma unroll
                for (int k = 0; k < kMaxWidth; ++k) {
                    const int own = k - (kMaxWidth - p.width);
                    if (own >= 0) all[i].at[k] = weight[c * p.weight_channel_stride + own * p.weight_tap_stride];
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
#pragma unroll
            for (int k = 0; k < kMaxWidth; ++k) taps[k][i] = to_float(all[i].at[k]);
        }
    });
#pragma unroll
    for (int i = 0; i < kCount; ++i) bias[i] = 0.f;
    p.bias.visit([&](auto *from) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) bias[i] = to_float(from[min(channel(i), p.channels - 1) * p.bias_stride]);
    });
}

// Input t of channel c, which before the row is an initial state or zero.
template <typename T>
__device__ inline T conv_input(const CausalConv1dParams &p, int64_t b, int64_t c, int64_t t) {
    if (t >= 0)
        return static_cast<const T *>(p.x)[b * p.x_strides.batch + c * p.x_strides.channel + t * p.x_strides.time];
    const int64_t k = t + p.width - 1;
    if (p.initial_states == nullptr || k < 0) return from_float<T>(0.f);
    return static_cast<const T *>(p.initial_states)[b * p.initial_strides.batch + c * p.initial_strides.channel
                                                    + k * p.initial_strides.time];
}

// The sequence of token t; tokens before the row count as its first sequence.
__device__ inline int conv_sequence(const CausalConv1dParams &p, int64_t b, int64_t t) {
    return __ldg(p.seq_idx + b * p.seq_idx_batch_stride + max(t, int64_t{0}) * p.seq_idx_time_stride);
}

// bias + taps, where window[k] is the input under tap k and names are the sequences of the four tokens.
template <bool kFull, bool kPacked>
__device__ inline float conv_sum(const CausalConv1dParams &p, const float (&window)[kMaxWidth],
                                 const float (&taps)[kMaxWidth], float bias, const int (&names)[kMaxWidth]) {
    float y = bias;
#pragma unroll
    for (int k = 0; k < kMaxWidth; ++k) {
        bool reaches = kFull || k >= kMaxWidth - p.width;
        if constexpr (kPacked) reaches = reaches && names[k] == names[kHistory];
        if (reaches) y = fmaf(taps[k], window[k], y);
    }
    if constexpr (kPacked)
        if (names[kHistory] < 0) y = 0.f;                    // and silu(0) = 0
    return y;
}

// One branch around many values, so that their chains of instructions overlap.
template <typename T, int kRows, int kCount>
__device__ inline void conv_activate(const CausalConv1dParams &p, float (&sums)[kRows][kCount]) {
    if (!p.silu) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) sums[r][i] = silu_for<T>(sums[r][i]);
    }
}

// Rows of a warp's tile in shared memory, kGroup tokens at a time: the 16-byte pieces of memory that they lie in.
// kOnGrid: rows begin with a piece.
template <typename T, bool kOnGrid>
struct ChannelRows {
    static constexpr int kGroup = 4, kAhead = 4;             // groups that are on their way
    static constexpr int kWord = 16 / sizeof(T);
    static constexpr int kPieces = kTileChannels / kWord + !kOnGrid;
    static constexpr int kRowBytes = kPieces * 16, kGroupBytes = kGroup * kRowBytes;
    static constexpr int kCopies = (kGroup * kPieces + 31) / 32;             // of a lane, for a group
    alignas(16) char bytes[kAhead][kGroupBytes];

    // Four channels of this lane, of a token whose row begins `skew` bytes into its first piece.
    __device__ Packed<T, kLaneChannels> at(int slot, int token, int skew) const {
        const char *const from =
            bytes[slot] + token * kRowBytes + threadIdx.x % 32 * (kLaneChannels * static_cast<int>(sizeof(T)));
        Packed<T, kLaneChannels> v;
        if constexpr (kOnGrid) {
            v.word = *reinterpret_cast<const typename Packed<T, kLaneChannels>::Word *>(from);
        } else {
            constexpr int kWords = kLaneChannels * sizeof(T) / 4, kRead = kWords + (sizeof(T) < 4);
            uint32_t words[kWords + 1];
#pragma unroll
            for (int i = 0; i < kRead; ++i) words[i] = reinterpret_cast<const uint32_t *>(from + (skew & ~3))[i];
#pragma unroll
            for (int i = 0; i < kWords; ++i)
                reinterpret_cast<uint32_t *>(&v.word)[i] =
                    sizeof(T) < 4 ? __funnelshift_r(words[i], words[i + 1], (skew & 2) * 8) : words[i];
        }
        return v;
    }
};

// CTAs of a multiprocessor, without spills.
template <typename T, bool kOnGrid, bool kFull, bool kPacked>
constexpr int kChannelsCtas = kFull && !kPacked && sizeof(T) == 2 ? 5 : 4;

// Rows of y lie on the grid of 16-byte accesses; kOnGrid: those of x too.
template <typename T, bool kOnGrid, bool kFull, bool kPacked>
__global__ void __launch_bounds__(kConvThreads, kChannelsCtas<T, kOnGrid, kFull, kPacked>) causal_conv1d_channels(
    const __grid_constant__ CausalConv1dParams p) {
    using Rows = ChannelRows<T, kOnGrid>;
    constexpr int kCount = kLaneChannels, kGroup = Rows::kGroup, kAhead = Rows::kAhead;
    __shared__ Rows shared_rows[kConvThreads / 32];
    Rows &rows = shared_rows[threadIdx.x / 32];
    const int lane = threadIdx.x % 32;
    const unsigned tiles = (p.channels + kTileChannels - 1) / kTileChannels;
    const unsigned chunks = (p.length + p.steps - 1) / p.steps;
    unsigned task = blockIdx.x * (kConvThreads / 32) + threadIdx.x / 32;
    const int first = static_cast<int>(task % tiles) * kTileChannels, own = first + lane * kCount;
    task /= tiles;
    const int start = static_cast<int>(task % chunks) * p.steps;
    const int64_t b = task / chunks;
    if (b >= p.batch) return;                                // the whole warp
    const int end = min(start + p.steps, p.length);
    const auto channel = [&](int i) { return min(own + i, p.channels - 1); };

    // ---- rows on their way: first the kGroup tokens before the chunk
    int t = start > 0 ? start - kGroup : 0;
    const char *const row = static_cast<const char *>(p.x)
        + (b * p.x_strides.batch + t * p.x_strides.time + first) * static_cast<int64_t>(sizeof(T));
    const int64_t pitch = p.x_strides.time * static_cast<int64_t>(sizeof(T));
    const int row_bytes = min(p.channels - first, kTileChannels) * static_cast<int>(sizeof(T));
    const char *from[Rows::kCopies];                         // anywhere in the piece that a lane copies next
    int left[Rows::kCopies];                                 // tokens from there to the end of the chunk
#pragma unroll
    for (int i = 0; i < Rows::kCopies; ++i) {
        const int index = lane + 32 * i, token = index / Rows::kPieces;
        from[i] = row + token * pitch + index % Rows::kPieces * 16;
        left[i] = token < kGroup ? end - t - token : 0;
    }
    const auto skew_of = [](const char *at) { return static_cast<int>(reinterpret_cast<uintptr_t>(at) & 15); };
    const auto fetch = [&](int slot) {
#pragma unroll
        for (int i = 0; i < Rows::kCopies; ++i) {
            const int index = lane + 32 * i, skew = skew_of(from[i]);
            const int there = row_bytes + skew - index % Rows::kPieces * 16;     // bytes from the piece on
            if (left[i] > 0 && there > 0)
                copy_async_part(rows.bytes[slot] + index * 16, from[i] - skew, min(there, 16));
            from[i] += kGroup * pitch;
            left[i] -= kGroup;
        }
        copies_committed();
    };
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot) fetch(slot);

    float taps[kMaxWidth][kCount], bias[kCount];
    load_conv_taps<kFull>(p, channel, taps, bias);
    const float part = p.silu ? 0.5f : 1.f;                  // silu_of_half takes half of a sum
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        bias[i] *= part;
#pragma unroll
        for (int k = 0; k < kMaxWidth; ++k) taps[k][i] *= part;
    }

    // Packed sequences: the names of the next tokens say which outputs the newest input reaches.
    int names[kGroup + kHistory] = {};
    const auto name_of = [&](int t) { return conv_sequence(p, b, min(t, p.length - 1)); };
    const auto add = [&](const float (&x)[kCount], const int *names, float (&carried)[kHistory][kCount],
                         float (&sums)[kCount]) {
        const int absent = kFull ? 0 : kMaxWidth - p.width;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            sums[i] = fmaf(taps[kHistory][i], x[i], carried[0][i]);
#pragma unroll
            for (int k = 0; k < kHistory; ++k) {             // to output t + 1 + k
                const float older = k + 1 < kHistory ? carried[k + 1][i] : bias[i];
                bool reaches = kHistory - 1 - k >= absent;
                if constexpr (kPacked) reaches = reaches && names[k + 1] == names[0];
                carried[k][i] = reaches ? fmaf(taps[kHistory - 1 - k][i], x[i], older) : older;
            }
        }
    };
    float carried[kHistory][kCount];
#pragma unroll
    for (int k = 0; k < kHistory; ++k) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) carried[k][i] = bias[i];
    }
    if (start == 0 && p.initial_states != nullptr) {
#pragma unroll
        for (int k = 0; k < kHistory + kHistory; ++k) names[k] = kPacked ? name_of(k - kHistory) : 0;
#pragma unroll
        for (int k = 0; k < kHistory; ++k) {
            float x[kCount], unused[kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) x[i] = to_float(conv_input<T>(p, b, channel(i), k - kHistory));
            add(x, names + k, carried, unused);
        }
    }

    // Whether this lane's channels exist and are a vector of y.
    const int column = p.column(own);
    const bool adjacent =
        own + kCount <= p.channels && column % kCount == 0 && p.column(own + kCount - 1) == column + kCount - 1;
    T *to = static_cast<T *>(p.y) + b * p.y_strides.batch + start * p.y_strides.time;
    const char *read = row;                                  // of token t; only its low bits count
    for (int slot = 0; t < end; t += kGroup, slot = slot + 1 == kAhead ? 0 : slot + 1) {
        if constexpr (kPacked) {
#pragma unroll
            for (int k = 0; k < kGroup + kHistory; ++k) names[k] = name_of(t + k);
        }
        copies_landed_but<kAhead - 1>();
        __syncwarp();
        float sums[kGroup][kCount];
#pragma unroll
        for (int s = 0; s < kGroup; ++s) {
            float x[kCount];
            rows.at(slot, s, skew_of(read + s * pitch)).get(x);
            add(x, names + s, carried, sums[s]);
        }
        read += kGroup * pitch;
        __syncwarp();
        fetch(slot);
        if (t < start) continue;
        if (p.silu) {                                        // one branch, so that the chains of instructions overlap
#pragma unroll
            for (int s = 0; s < kGroup; ++s) {
#pragma unroll
                for (int i = 0; i < kCount; ++i) sums[s][i] = silu_of_half<T>(sums[s][i]);
            }
        }
        if constexpr (kPacked) {
#pragma unroll
            for (int s = 0; s < kGroup; ++s) {
#pragma unroll
                for (int i = 0; i < kCount; ++i) sums[s][i] = names[s] < 0 ? 0.f : sums[s][i];
            }
        }
        Packed<T, kCount> outputs[kGroup];
#pragma unroll
        for (int s = 0; s < kGroup; ++s) {
            outputs[s].set(sums[s]);
            if (t + s < end && adjacent)
                *reinterpret_cast<typename Packed<T, kCount>::Word *>(to + column + s * p.y_strides.time) =
                    outputs[s].word;
        }
        if (!adjacent) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                T *const at = to + p.column(own + i);
#pragma unroll
                for (int s = 0; s < kGroup; ++s)
                    if (t + s < end && own + i < p.channels) at[s * p.y_strides.time] = outputs[s].at[i];
            }
        }
        to += kGroup * p.y_strides.time;
    }

    if (end == p.length) {
        T *final_states = static_cast<T *>(p.final_states) + b * p.channels * (p.width - 1);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const int64_t c = channel(i);
#pragma unroll 1
            for (int k = 0; k < p.width - 1; ++k)
                final_states[c * (p.width - 1) + k] = conv_input<T>(p, b, c, p.length - (p.width - 1) + k);
        }
    }
}

// kGrid: of y as seen from x. kSame: rows start off the grid, both alike; kOther: y goes element by element.
template <typename T, bool kFull, bool kPacked, Grid kGrid>
__global__ void __launch_bounds__(kConvThreads) causal_conv1d_time(const __grid_constant__ CausalConv1dParams p) {
    constexpr int kCount = 16 / sizeof(T);
    constexpr int kSpan = 32 * kCount;                       // tokens that the warp moves by one access
    constexpr unsigned kAll = 0xffffffffu;
    const int lane = threadIdx.x % 32;
    const unsigned row = blockIdx.x * (kConvThreads / 32) + threadIdx.x / 32;
    const int64_t b = row / static_cast<unsigned>(p.channels);
    const int c = static_cast<int>(row % static_cast<unsigned>(p.channels));
    if (b >= p.batch) return;                                // the whole warp
    const T *x = static_cast<const T *>(p.x) + b * p.x_strides.batch + c * p.x_strides.channel;
    T *y = static_cast<T *>(p.y) + b * p.y_strides.batch + c * p.y_strides.channel;
    const int before = kGrid == Grid::kWhole ? 0 : columns_off_grid<T, kCount>(x);
    const int start = static_cast<int>(blockIdx.y) * p.steps - before, end = min(start + p.steps, p.length);
    if (start >= end) return;

    const T *initial = nullptr;
    if (p.initial_states != nullptr)
        initial = static_cast<const T *>(p.initial_states) + b * p.initial_strides.batch
            + c * p.initial_strides.channel;
    const auto input = [&](int t) {                          // conv_input of this row
        const int k = t + p.width - 1;
        if (t >= 0) return x[t];
        return initial != nullptr && k >= 0 ? initial[k * p.initial_strides.time] : from_float<T>(0.f);
    };
    Packed<T, kCount> next[kConvVectors];
    const auto fetch = [&](int first) {
#pragma unroll
        for (int v = 0; v < kConvVectors; ++v) {
            const int t = first + v * kSpan + lane * kCount;
            const bool whole = kGrid == Grid::kWhole ? t < end : t >= 0 && t + kCount <= p.length;
            load_if(whole, next[v].word, x + t);
            if (kGrid != Grid::kWhole && !whole) {
#pragma unroll
                for (int i = 0; i < kCount; ++i)
                    if (t + i < p.length) next[v].at[i] = input(t + i);
            }
        }
    };
    fetch(start);
    // The last lanes hold the inputs before `start`.
    const T edge = lane < 32 - kHistory ? from_float<T>(0.f) : input(start - 32 + lane);
    float taps[kMaxWidth][1], bias[1];
    load_conv_taps<kFull>(p, [&](int) { return c; }, taps, bias);
    const float tap[kMaxWidth] = {taps[0][0], taps[1][0], taps[2][0], taps[3][0]};
    float previous[kHistory];                                // in lane 0: the inputs before its vector
#pragma unroll
    for (int k = 0; k < kHistory; ++k) previous[k] = __shfl_sync(kAll, to_float(edge), 32 - kHistory + k);

    for (int first = start; first < end; first += kConvVectors * kSpan) {
        Packed<T, kCount> inputs[kConvVectors];
#pragma unroll
        for (int v = 0; v < kConvVectors; ++v) inputs[v] = next[v];
        if (first + kConvVectors * kSpan < end) fetch(first + kConvVectors * kSpan);
#pragma unroll
        for (int v = 0; v < kConvVectors; ++v) {
            const int t = first + v * kSpan + lane * kCount;
            float window[kHistory + kCount];
            int names[kHistory + kCount] = {};
#pragma unroll
            for (int i = 0; i < kCount; ++i) window[kHistory + i] = to_float(inputs[v].at[i]);
#pragma unroll
            for (int k = 0; k < kHistory; ++k) {
                const float left = __shfl_sync(kAll, window[kCount + k], lane + 31);      // of lane 31 for lane 0
                window[k] = lane == 0 ? previous[k] : left;
                previous[k] = left;
            }
            if constexpr (kPacked) {
#pragma unroll
                for (int i = 0; i < kHistory + kCount; ++i)
                    names[i] = conv_sequence(p, b, min(t - kHistory + i, p.length - 1));
            }
            float sums[1][kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const float under[kMaxWidth] = {window[i], window[i + 1], window[i + 2], window[i + 3]};
                const int named[kMaxWidth] = {names[i], names[i + 1], names[i + 2], names[i + 3]};
                sums[0][i] = conv_sum<kFull, kPacked>(p, under, tap, bias[0], named);
            }
            Packed<T, kCount> outputs;
            conv_activate<T>(p, sums);
            outputs.set(sums[0]);
            if constexpr (kGrid != Grid::kOther) {
                store_row_vector<kGrid>(y, t, end, outputs);
            } else {
#pragma unroll
                for (int i = 0; i < kCount; ++i)
                    if (0 <= t + i && t + i < end) y[t + i] = outputs.at[i];
            }
        }
    }
    if (end == p.length && lane < p.width - 1)
        static_cast<T *>(p.final_states)[(b * p.channels + c) * (p.width - 1) + lane] =
            input(p.length - (p.width - 1) + lane);
}

template <typename T>
__global__ void __launch_bounds__(kConvThreads) causal_conv1d_any(const __grid_constant__ CausalConv1dParams p) {
    const unsigned chunks = (p.length + p.steps - 1) / p.steps;
    unsigned task = blockIdx.x * kConvThreads + threadIdx.x;
    const int c = static_cast<int>(task % p.channels);
    task /= p.channels;
    const int start = static_cast<int>(task % chunks) * p.steps;
    const int64_t b = task / chunks;
    if (b >= p.batch) return;
    const int end = min(start + p.steps, p.length);
    float taps[kMaxWidth][1], bias[1], window[kMaxWidth] = {};
    int names[kMaxWidth] = {};
    const bool packed = p.seq_idx != nullptr;
    load_conv_taps<false>(p, [&](int) { return c; }, taps, bias);
    const float tap[kMaxWidth] = {taps[0][0], taps[1][0], taps[2][0], taps[3][0]};
#pragma unroll
    for (int k = 0; k < kHistory; ++k) {
        window[k + 1] = to_float(conv_input<T>(p, b, c, start - kHistory + k));
        if (packed) names[k + 1] = conv_sequence(p, b, start - kHistory + k);
    }
    T *y = static_cast<T *>(p.y) + b * p.y_strides.batch + p.column(c) * p.y_strides.channel;
    for (int t = start; t < end; ++t) {
#pragma unroll
        for (int k = 0; k < kHistory; ++k) {
            window[k] = window[k + 1];
            names[k] = names[k + 1];
        }
        window[kHistory] = to_float(conv_input<T>(p, b, c, t));
        if (packed) names[kHistory] = conv_sequence(p, b, t);
        const float sum = conv_sum<false, true>(p, window, tap, bias[0], names);
        y[t * p.y_strides.time] = from_float<T>(p.silu ? silu_for<T>(sum) : sum);
    }
    if (end == p.length)
        for (int k = 0; k < p.width - 1; ++k)
            static_cast<T *>(p.final_states)[(b * p.channels + c) * (p.width - 1) + k] =
                conv_input<T>(p, b, c, p.length - (p.width - 1) + k);
}

}  // namespace shedder
