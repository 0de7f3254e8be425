// The tensor maps through which ssd_fwd reads C, B, x and z, and the copies of what none reads well.

#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "kernels/ssd_align.cuh"
#include "kernels/ssd_pieces.cuh"
#include "ops/cuda_arguments.h"
#include "ops/cuda_launch.h"
#include "ops/cuda_tensor_map.h"

namespace shedder {

inline uint64_t address_of(const Tensor &t) { return reinterpret_cast<uint64_t>(t.const_data_ptr()); }

// Boxes at least 16 columns wide lie in shared memory in the swizzle of wgmma's operands.
inline CUtensorMap ssd_map(const char *name, uint64_t address, int dimensions, const uint64_t *sizes,
                           const uint64_t *strides, const uint32_t *box) {
    return tensor_map("ssd", name, address, dimensions, sizes, strides, box,
                      box[0] >= 16 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE);
}

// The addresses at which the parts of a tensor along its first `dimensions` start, or'ed: a power of two that divides
// this divides them all.
inline uint64_t bits_of_starts(const Tensor &t, int dimensions) {
    uint64_t bits = address_of(t);
    for (int i = 0; i < dimensions; ++i)
        if (t.size(i) > 1) bits |= static_cast<uint64_t>(t.stride(i)) * 2;
    return bits;
}

// Whether all rows of (batch, time, head or group, element) start at multiples of so many bytes.
inline bool is_aligned(const Tensor &t, uint64_t bytes) { return bits_of_starts(t, 3) % bytes == 0; }

// The map of C or B: boxes of the rows that one of `cluster` CTAs brings.
inline CUtensorMap states_map(const char *name, uint64_t address, int cluster, int64_t batch, int64_t rows,
                              int64_t groups, int64_t dstate, int64_t of_batch, int64_t of_row, int64_t of_group) {
    const uint64_t sizes[4] = {static_cast<uint64_t>(dstate), static_cast<uint64_t>(rows),
                               static_cast<uint64_t>(groups), static_cast<uint64_t>(batch)};
    const uint64_t strides[3] = {map_stride(rows, of_row), map_stride(groups, of_group), map_stride(batch, of_batch)};
    const uint32_t box[4] = {64, static_cast<uint32_t>(kChunk / cluster), 1, 1};
    return ssd_map(name, address, 4, sizes, strides, box);
}

// Copies by ssd_align of tensors (batch, time, group or head, element) of the same shape, one behind another.
struct AlignedCopies {
    Tensor memory;                                           // for torch to free in stream order
    int64_t rows;                                            // whole chunks
    int64_t of_batch, of_time, of_group, elements;           // strides; of a copy

    uint64_t address(int copy) const { return address_of(memory) + copy * elements * 2; }
};

// Of each row so many columns, zeros where there is no element. groups_apart: all rows of a group before those of the
// next; else the groups of a token side by side.
inline AlignedCopies copy_aligned(const std::vector<const Tensor *> &tensors, int64_t columns, bool groups_apart,
                                  cudaStream_t stream) {
    const Tensor &like = *tensors[0];
    const int64_t batch = like.size(0), length = like.size(1), groups = like.size(2);
    const int64_t rows = (length + kChunk - 1) / kChunk * kChunk;
    const int64_t pitch = (columns + 63) / 64 * 64;          // whole lines of L2
    const int64_t of_time = groups_apart ? pitch : groups * pitch, of_group = groups_apart ? rows * pitch : pitch;
    const int64_t of_batch = rows * groups * pitch, elements = batch * of_batch;
    AlignedCopies copies{torch::stable::new_empty(like, {static_cast<int64_t>(tensors.size()), elements}), rows,
                         of_batch, of_time, of_group, elements};
    SsdAlignParams a{};
    SsdAlignOperand *next = a.operands;
    uint4 *to = static_cast<uint4 *>(copies.memory.mutable_data_ptr());
    for (const Tensor *t : tensors) {
        SsdAlignOperand &o = *next++;
        o = {static_cast<const uint16_t *>(t->const_data_ptr()), nullptr, t->stride(0), t->stride(1), t->stride(2), to};
        o.end = o.from + t->size(3);
        for (int i = 0; i < 3; ++i) o.end += (t->size(i) - 1) * t->stride(i);
        to += elements / 8;
    }
    a.length = static_cast<int>(length);
    a.rows = static_cast<int>(rows);
    a.groups = static_cast<int>(groups);
    a.width = static_cast<int>(like.size(3));
    a.pieces = static_cast<int>(columns / 8);
    a.to_batch = of_batch / 8;
    a.to_time = of_time / 8;
    a.to_group = of_group / 8;
    auto start = [&](auto kernel, int lanes) {
        const int64_t in_block = kAlignThreads / lanes * kAlignRows;
        a.blocks = static_cast<int>((rows + in_block - 1) / in_block);
        const dim3 grid(blocks_for("ssd", batch * groups * a.blocks, 1), static_cast<unsigned>(tensors.size()));
        launch_ctas(kernel, {grid, kAlignThreads}, stream, a);
    };
    if (columns <= 64) start(ssd_align<8>, 8);
    else if (columns <= 128) start(ssd_align<16>, 16);
    else start(ssd_align<32>, 32);
    return copies;
}

// The maps of C and B, or of copies of them, which are returned.
inline std::optional<AlignedCopies> make_states_maps(SsdParams &p, const Tensor &B, const Tensor &C, int64_t columns,
                                                     cudaStream_t stream) {
    const int64_t batch = B.size(0), length = B.size(1), groups = B.size(2);
    // 32 bytes are a sector of L2: boxes whose rows start between two of them read a quarter more.
    std::vector<const Tensor *> unfit;
    for (const Tensor *t : {&C, &B})
        if (!is_aligned(*t, 32)) unfit.push_back(t);
    std::optional<AlignedCopies> copies;
    if (!unfit.empty()) copies = copy_aligned(unfit, columns, true, stream);
    auto map = [&](const char *name, const Tensor &t) {
        const auto copy = std::find(unfit.begin(), unfit.end(), &t);
        if (copy == unfit.end())
            return states_map(name, address_of(t), p.cluster, batch, length, groups, p.dstate, t.stride(0), t.stride(1),
                              t.stride(2));
        return states_map(name, copies->address(static_cast<int>(copy - unfit.begin())), p.cluster, batch, copies->rows,
                          groups, columns, copies->of_batch, copies->of_time, copies->of_group);
    };
    p.C = map("C", C);
    p.B = map("B", B);
    return copies;
}

// The maps of x or z. The last column of the last row is the tensor's last element: nothing behind it is read.
inline SsdOperand channels_map(const char *name, uint64_t address, int64_t batch, int64_t rows, int64_t heads,
                               int64_t width, int64_t of_batch, int64_t of_time, int64_t of_head) {
    if (batch == 1) of_batch = 0;
    if (heads == 1) of_head = 0;
    if (rows == 1) of_time = 8;
    const bool by_batch = of_batch % 8 == 0;
    const uint64_t first = address % 16 / 2;
    const uint64_t columns = first + (by_batch ? 0 : (batch - 1) * of_batch) + (heads - 1) * of_head + width;
    STD_TORCH_CHECK(columns + of_time < uint64_t{1} << 31, "shedder_cuda::ssd: the heads of ", name,
                    " (or its batch entries, off 16 bytes) spread over 2^31 elements");
    const uint64_t sizes[3] = {columns, static_cast<uint64_t>(rows), static_cast<uint64_t>(by_batch ? batch : 1)};
    const uint64_t strides[2] = {static_cast<uint64_t>(of_time) * 2,
                                 by_batch && of_batch > 0 ? static_cast<uint64_t>(of_batch) * 2 : 16};
    const uint32_t box[3] = {64, kChunk, 1}, rest[3] = {8, kChunk, 1};
    SsdOperand o{};
    o.map = ssd_map(name, address - first * 2, 3, sizes, strides, box);
    o.rest = ssd_map(name, address - first * 2, 3, sizes, strides, rest);
    o.first = static_cast<int>(first);
    o.head = static_cast<int>(of_head);
    o.piece = 8;
    o.batch = by_batch ? 0 : static_cast<int>(of_batch);
    o.batches = by_batch && of_batch > 0;
    return o;
}

constexpr int kMostStatesWithWords = 128;

// The bytes of words that x comes in where no map reads it: all of which lie in its rows of (head, channel), and where
// a copy of x would take longer. 0: x is copied.
inline int word_of_x(const Tensor &x) {
    constexpr int64_t kLeastBytes = 8 << 20;                 // measured on an H200 (docs/measured-facts.md, SSD)
    const int64_t width = (x.size(2) - 1) * x.stride(2) + x.size(3);
    if (x.numel() * 2 < kLeastBytes || x.stride(2) < 0 || width >= int64_t{1} << 31) return 0;
    const uint64_t bits = bits_of_starts(x, 2) | static_cast<uint64_t>(width) * 2;
    return bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 0;
}

// The maps of x and z, or of copies of them, which are returned; or where words of x are.
inline std::optional<AlignedCopies> make_channels_maps(SsdParams &p, const Tensor &x, const MaybeTensor &z,
                                                       cudaStream_t stream) {
    auto fits = [](const Tensor &t) { return t.size(1) == 1 || (t.stride(1) % 8 == 0 && t.stride(1) > 0); };
    const int64_t batch = x.size(0), heads = x.size(2);
    auto difference = [&](int i) { return x.size(i) > 1 ? x.stride(i) - z->stride(i) : 0; };
    if (fits(x)
        && (!z || (fits(*z) && lie_alike(x.const_data_ptr(), z->const_data_ptr(), 2, {difference(0), difference(2)})))) {
        auto map = [&](const char *name, const Tensor &t) {
            return channels_map(name, address_of(t), batch, t.size(1), heads, t.size(3), t.stride(0), t.stride(1),
                                t.stride(2));
        };
        p.x = map("x", x);
        if (z) p.z = map("z", *z);
        return std::nullopt;
    }
    const bool may_be_words = !z && p.runs == nullptr && p.dstate <= kMostStatesWithWords;
    if (const int word = may_be_words ? word_of_x(x) : 0; word > 0) {
        p.x_words = static_cast<const char *>(x.const_data_ptr());
        p.x_strides = {x.stride(0), x.stride(1), x.stride(2)};
        p.x.head = static_cast<int>(heads > 1 ? x.stride(2) : 0);
        p.x.piece = word / 2;
        return std::nullopt;
    }
    const int64_t columns = (x.size(3) + 7) / 8 * 8;
    std::vector<const Tensor *> given{&x};
    if (z) given.push_back(&*z);
    const AlignedCopies copies = copy_aligned(given, columns, false, stream);
    auto map = [&](const char *name, int copy) {
        return channels_map(name, copies.address(copy), batch, copies.rows, heads, columns, copies.of_batch,
                            copies.of_time, copies.of_group);
    };
    p.x = map("x", 0);
    if (z) p.z = map("z", 1);
    return copies;
}

// Whether entries of the batch, and heads, start where boxes of x may.
inline bool entries_start_with_boxes(const SsdParams &p) { return p.x.first == 0 && p.x.batch % 8 == 0; }
inline bool heads_start_with_boxes(const SsdParams &p) {
    return entries_start_with_boxes(p) && (p.heads == 1 || p.x.head % 8 == 0);
}

// The maps of y where its rows are whole pieces of 16 bytes, or two neighbours in a cluster make such of theirs, and
// rows of x lie alike.
inline void make_y_maps(SsdParams &p, const Tensor &y) {
    const uint64_t heads = p.heads, headdim = p.headdim, token = heads * headdim;
    p.y_boxes = SsdBoxesOfY::kNone;
    p.y_columns = p.tile < 64 ? p.tile : p.headdim;
    if (!entries_start_with_boxes(p) || address_of(y) % 16 != 0 || token % 8 != 0) return;
    auto map = [&](uint64_t columns, uint64_t of_box) {      // that lie side by side
        const uint64_t sizes[4] = {columns, token / columns, static_cast<uint64_t>(y.size(1)),
                                   static_cast<uint64_t>(y.size(0))};
        const uint64_t strides[3] = {columns * 2, token * 2, sizes[2] * token * 2};
        const uint32_t box[4] = {static_cast<uint32_t>(of_box), 1, kChunk, 1};
        return ssd_map("y", address_of(y), 4, sizes, strides, box);
    };
    if (headdim % 8 == 0 && heads_start_with_boxes(p)) {
        if (token % p.y_columns != 0) return;                // the last tile of a token would store more than its own
        p.y_boxes = SsdBoxesOfY::kHeads;
        p.y_maps[0] = map(p.y_columns, 64);
    } else if (headdim % 8 != 0 && 24 < headdim && headdim < 64 && heads % 2 == 0 && p.x.head % 8 == headdim % 8
               && p.x_words == nullptr && p.cluster == 2 && !p.has_z && p.runs == nullptr) {
        p.y_boxes = SsdBoxesOfY::kPairs;
        for (int i = 0; i < 3; ++i) p.y_maps[i] = map(token, (headdim / 8 + i - 1) * 8);
    }
}

}  // namespace shedder
