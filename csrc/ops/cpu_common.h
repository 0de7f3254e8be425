// What every CPU launcher needs: arrays out of tensors, checks that name op and argument, ranges split over threads.

#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/kernels.h"

namespace shedder::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The kernels of the widest instruction set that this machine has; SHEDDER_CPU_ISA may lower the choice.
const Kernels &kernels();

// The tensor as an array, its shape and dtype checked.
inline Array array(const char *op, const char *name, const Tensor &t, std::initializer_list<int64_t> shape) {
    const auto sizes = t.sizes(), strides = t.strides();
    bool fits = t.is_cpu() && sizes.size() == shape.size();
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = sizes[i] == shape.begin()[i];
    STD_TORCH_CHECK(fits, "shedder_cpu::", op, ": ", name, " has the wrong shape or is not on the CPU");
    Array a;
    switch (t.scalar_type()) {
        case ScalarType::Float: a.dtype = Dtype::f32; break;
        case ScalarType::BFloat16: a.dtype = Dtype::bf16; break;
        case ScalarType::Half: a.dtype = Dtype::f16; break;
        default: STD_TORCH_CHECK(false, "shedder_cpu::", op, ": ", name, " is not fp32, bf16 or fp16");
    }
    for (size_t i = 0; i < shape.size(); ++i) a.stride[i] = strides[i];
    a.data = t.data_ptr();
    return a;
}

inline Array array(const char *op, const char *name, const MaybeTensor &t, std::initializer_list<int64_t> shape) {
    return t ? array(op, name, *t, shape) : Array{};
}

// Contiguous int32 numbers, null if not given.
inline const int32_t *integers(const char *op, const char *name, const MaybeTensor &t, int64_t count) {
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Int && t->is_contiguous() && t->numel() == count,
                    "shedder_cpu::", op, ": ", name, " must be contiguous int32 on the CPU with ", count, " elements");
    return static_cast<const int32_t *>(t->const_data_ptr());
}

// The slot of each batch row's state, null where they lie in the batch's order; negative numbers are padding.
inline const int32_t *slot_numbers(const char *op, const MaybeTensor &t, int64_t batch, int64_t slots) {
    const int32_t *numbers = integers(op, "the slot numbers", t, batch);
    STD_TORCH_CHECK(numbers || slots == batch, "shedder_cpu::", op, ": there are ", slots, " slots for a batch of ",
                    batch);
    for (int64_t b = 0; numbers && b < batch; ++b)
        STD_TORCH_CHECK(numbers[b] < slots, "shedder_cpu::", op, ": slot ", numbers[b], " is asked for but there are ",
                        slots, " slots");
    return numbers;
}

// Channels sorted by the group they read, and cut into tiles within a group.
struct Tiling {
    std::vector<int32_t> order;       // empty: as they are
    std::vector<Tile> tiles;

    // channel_to_group(c) for c < channels, values in [0, groups).
    template <typename Map>
    Tiling(int64_t channels, int64_t groups, Map channel_to_group) {
        std::vector<int64_t> ends(groups, 0);
        if (groups == 1) {
            ends[0] = channels;
        } else {
            for (int64_t c = 0; c < channels; ++c) ++ends[channel_to_group(c)];
            for (int64_t g = 1; g < groups; ++g) ends[g] += ends[g - 1];
            std::vector<int64_t> next(groups, 0);
            for (int64_t g = 1; g < groups; ++g) next[g] = ends[g - 1];
            order.resize(channels);
            for (int64_t c = 0; c < channels; ++c) order[next[channel_to_group(c)]++] = static_cast<int32_t>(c);
        }
        for (int64_t g = 0, first = 0; g < groups; first = ends[g++])
            for (int64_t c = first; c < ends[g]; c += kTile)
                tiles.push_back({static_cast<int32_t>(c), static_cast<int32_t>(std::min<int64_t>(kTile, ends[g] - c)),
                                 static_cast<int32_t>(g)});
    }
};

// f(begin, end) over [0, items), split over torch's threads where the work is worth it; `cost` of one item in
// multiply-adds or so. A thread is worth waking for about 10 us of work.
template <typename F>
void split(int64_t items, int64_t cost, const F &f) {
    if (items > 0) torch::stable::parallel_for(0, items, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, cost)), f);
}

// The parts of a decode step, each split over threads.

inline int64_t tiles(int64_t channels) { return (channels + kConvTile - 1) / kConvTile; }

inline void split_conv1d_update(int64_t batch, const Conv1dUpdate &p) {
    split(batch * tiles(p.channels), kConvTile * (p.length * 8 + p.kept * 2),
          [&p](int64_t begin, int64_t end) { kernels().conv1d_update(p, begin, end); });
}

inline void split_state_update(int64_t batch, const StateUpdate &p) {
    split(batch * p.heads * p.headdim, p.states * 2 + 16,
          [&p](int64_t begin, int64_t end) { kernels().state_update(p, begin, end); });
}

inline void split_gated_rmsnorm(int64_t rows, int64_t channels, const GatedRmsNorm &p) {
    split(rows, channels * 4, [&p, channels](int64_t begin, int64_t end) {
        std::vector<float> scratch(channels + kMaxLanes);
        kernels().gated_rmsnorm(p, scratch.data(), begin, end);
    });
}

}  // namespace shedder::cpu
