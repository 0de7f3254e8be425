// Causal convolution (causal_conv1d.cuh) where channels are adjacent in memory.
//
// A lane owns four channels and walks along time. What the inputs so far add to the next three outputs is carried in
// registers, so that each input is converted and multiplied once:
//
//   y_t = w3 x_t + a0        a0 = w2 x_t + a1        a1 = w1 x_t + a2        a2 = w0 x_t + bias
//
// Rows of x come into shared memory a few tokens ahead, as the 16-byte pieces of memory that they lie in: so a lane
// finds its channels wherever a row starts, and what is on its way takes no registers.

#pragma once

#include <type_traits>

#include "kernels/causal_conv1d.cuh"
#include "kernels/copy_async.cuh"

namespace shedder {

constexpr int kLaneChannels = 4;
constexpr int kTileChannels = 32 * kLaneChannels;            // of a warp

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
template <typename T, bool kFull, bool kPacked>
constexpr int kChannelsCtas = kFull && !kPacked && sizeof(T) == 2 ? 5 : 4;

// A warp's channels, from `first` on, and tokens. kAtEnd: among them the last ones of x.
template <typename T, bool kOnGrid, bool kFull, bool kPacked, bool kAtEnd>
__device__ __forceinline__ void convolve_channels(const CausalConv1dParams &p, int64_t b, int first, int start, int end,
                                                  ChannelRows<T, kOnGrid> &rows) {
    using Rows = ChannelRows<T, kOnGrid>;
    constexpr int kCount = kLaneChannels, kGroup = Rows::kGroup, kAhead = Rows::kAhead;
    const int lane = threadIdx.x % 32, own = first + lane * kCount;
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
            if (left[i] > 0 && there > 0) {
                char *const to = rows.bytes[slot] + index * 16;
                if constexpr (kAtEnd)
                    copy_async_part(to, from[i] - skew, min(there, 16),
                                    static_cast<const T *>(p.x) + b * p.x_strides.batch
                                        + (p.length - 1) * p.x_strides.time + p.channels);
                else
                    copy_async_part(to, from[i] - skew, min(there, 16));
            }
            from[i] += kGroup * pitch;
            left[i] -= kGroup;
        }
        copies_committed();
    };
    wait_for_kernel_before();
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

    // Whether those of this lane's channels that exist lie in a vector of y. What follows a row's last channel in it is
    // the row's padding, which the last row has not.
    const int column = p.parts.column(own), last = min(own + kCount, p.channels) - 1;
    const bool exists = own < p.channels, whole = own + kCount <= p.channels || b + 1 < p.batch || end < p.length;
    const bool adjacent = exists && whole && column % kCount == 0 && p.parts.column(last) - column == last - own;
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
        if (exists && !adjacent) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                T *const at = to + p.parts.column(own + i);
#pragma unroll
                for (int s = 0; s < kGroup; ++s)
                    if (t + s < end && own + i < p.channels) at[s * p.y_strides.time] = outputs[s].at[i];
            }
        }
        to += kGroup * p.y_strides.time;
    }

    if (end == p.length && p.final_states != nullptr) {
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

// Rows of y lie on the grid of a lane's words; kOnGrid: those of x on that of 16-byte pieces.
template <typename T, bool kOnGrid, bool kFull, bool kPacked>
__global__ void __launch_bounds__(kConvThreads, kChannelsCtas<T, kFull, kPacked>) causal_conv1d_channels(
    const __grid_constant__ CausalConv1dParams p) {
    __shared__ ChannelRows<T, kOnGrid> rows[kConvThreads / 32];
    const unsigned tiles = (p.channels + kTileChannels - 1) / kTileChannels;
    const unsigned chunks = (p.length + p.steps - 1) / p.steps;
    unsigned task = blockIdx.x * (kConvThreads / 32) + threadIdx.x / 32;
    const int first = static_cast<int>(task % tiles) * kTileChannels;
    task /= tiles;
    const int start = static_cast<int>(task % chunks) * p.steps, end = min(start + p.steps, p.length);
    const int64_t b = task / chunks;
    if (b >= p.batch) return;                                // the whole warp
    const bool at_end = b == p.batch - 1 && end == p.length && first + kTileChannels >= p.channels;
    const auto convolve = [&](auto at_end) {
        convolve_channels<T, kOnGrid, kFull, kPacked, decltype(at_end)::value>(p, b, first, start, end,
                                                                               rows[threadIdx.x / 32]);
    };
    if (!kOnGrid && at_end) convolve(std::bool_constant<!kOnGrid>{});
    else convolve(std::false_type{});
}

}  // namespace shedder
