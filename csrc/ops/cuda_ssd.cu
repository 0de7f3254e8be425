// Launcher of SSD: checks, makes the tensor maps, deals heads or segments of them to CTAs, launches.

#include <algorithm>
#include <type_traits>

#include <torch/csrc/stable/ops.h>

#include "kernels/ssd_align.cuh"
#include "kernels/ssd_fwd.cuh"
#include "ops/cuda_device.h"
#include "ops/cuda_launchers.h"
#include "ops/cuda_ssd_arguments.h"

namespace shedder {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encode_function() {
    static const Encode function = [] {
        void *found = nullptr;
        cudaDriverEntryPointQueryResult result;
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
        return reinterpret_cast<Encode>(found);
    }();
    STD_TORCH_CHECK(function != nullptr, "shedder_cuda::ssd: the CUDA driver has no cuTensorMapEncodeTiled");
    return function;
}

CUtensorMap tensor_map(const char *name, ScalarType dtype, uint64_t address, int dimensions, const uint64_t *sizes,
                       const uint64_t *strides, const uint32_t *box) {
    const uint32_t steps[4] = {1, 1, 1, 1};
    CUtensorMap map;
    const CUresult result = encode_function()(
        &map,
        dtype == ScalarType::Half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, dimensions,
        reinterpret_cast<void *>(address), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    STD_TORCH_CHECK(result == CUDA_SUCCESS, "shedder_cuda::ssd: the CUDA driver makes no tensor map of ", name,
                    " (error ", static_cast<int>(result), ")");
    return map;
}

uint64_t address_of(const Tensor &t) { return reinterpret_cast<uint64_t>(t.const_data_ptr()); }

// Whether all rows of (batch, time, head or group, element) start at multiples of so many bytes.
bool is_aligned(const Tensor &t, uint64_t bytes) {
    uint64_t bits = address_of(t);
    for (int i = 0; i < 3; ++i)
        if (t.size(i) > 1) bits |= static_cast<uint64_t>(t.stride(i)) * 2;
    return bits % bytes == 0;
}

// The map of C or B: boxes of the rows that one of `cluster` CTAs brings.
CUtensorMap states_map(const char *name, ScalarType dtype, uint64_t address, int cluster, int64_t batch, int64_t rows,
                       int64_t groups, int64_t dstate, int64_t of_batch, int64_t of_row, int64_t of_group) {
    auto stride = [](int64_t size, int64_t elements) { return size > 1 ? static_cast<uint64_t>(elements) * 2 : 16; };
    const uint64_t sizes[4] = {static_cast<uint64_t>(dstate), static_cast<uint64_t>(rows),
                               static_cast<uint64_t>(groups), static_cast<uint64_t>(batch)};
    const uint64_t strides[3] = {stride(rows, of_row), stride(groups, of_group), stride(batch, of_batch)};
    const uint32_t box[4] = {64, static_cast<uint32_t>(kChunk / cluster), 1, 1};
    return tensor_map(name, dtype, address, 4, sizes, strides, box);
}

// Copies by ssd_align of tensors (batch, time, group or head, element) of the same shape, one behind another: of each row
// so many columns, zeros where there is no element.
struct AlignedCopies {
    Tensor memory;                                           // for torch to free in stream order
    int64_t rows;                                            // whole chunks
    int64_t of_batch, of_time, of_group, elements;           // strides; of a copy

    uint64_t address(int copy) const { return address_of(memory) + copy * elements * 2; }
};

AlignedCopies align(std::initializer_list<const Tensor *> tensors, int64_t columns, bool groups_apart, int32_t *tickets,
                    int64_t ticket_count, cudaStream_t stream) {
    const Tensor &like = **tensors.begin();
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
    a.tickets = tickets;
    a.ticket_count = static_cast<int>(ticket_count);
    auto start = [&](auto kernel, int lanes) {
        const int64_t in_block = kAlignThreads / lanes * kAlignRows;
        a.blocks = static_cast<int>((rows + in_block - 1) / in_block);
        const dim3 grid(blocks_for("ssd", batch * groups * a.blocks, 1), static_cast<unsigned>(tensors.size()));
        kernel<<<grid, kAlignThreads, 0, stream>>>(a);
    };
    if (columns <= 64) start(ssd_align<8>, 8);
    else if (columns <= 128) start(ssd_align<16>, 16);
    else start(ssd_align<32>, 32);
    return copies;
}

// The maps of C and B, or of copies of them, which are returned. Sets the tickets to zeros on the way.
std::optional<AlignedCopies> make_states_maps(SsdParams &p, const Tensor &B, const Tensor &C, int64_t columns,
                                              int64_t ticket_count, cudaStream_t stream) {
    const int64_t batch = B.size(0), length = B.size(1), groups = B.size(2);
    // 32 bytes are a sector of L2: boxes whose rows start between two of them read a quarter more.
    if (is_aligned(B, 32) && is_aligned(C, 32)) {
        auto map = [&](const char *name, const Tensor &t) {
            return states_map(name, t.scalar_type(), address_of(t), p.cluster, batch, length, groups, p.dstate,
                              t.stride(0), t.stride(1), t.stride(2));
        };
        p.C = map("C", C);
        p.B = map("B", B);
        if (ticket_count > 0) cudaMemsetAsync(p.tickets, 0, ticket_count * sizeof(int32_t), stream);
        return std::nullopt;
    }
    const AlignedCopies copies = align({&C, &B}, columns, true, p.tickets, ticket_count, stream);
    auto map = [&](const char *name, int copy) {
        return states_map(name, B.scalar_type(), copies.address(copy), p.cluster, batch, copies.rows, groups, columns,
                          copies.of_batch, copies.of_time, copies.of_group);
    };
    p.C = map("C", 0);
    p.B = map("B", 1);
    return copies;
}

// The last column of the last row is the tensor's last element: nothing behind it is read.
SsdOperand operand(const char *name, ScalarType dtype, uint64_t address, int64_t batch, int64_t rows, int64_t heads,
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
    o.map = tensor_map(name, dtype, address - first * 2, 3, sizes, strides, box);
    o.rest = tensor_map(name, dtype, address - first * 2, 3, sizes, strides, rest);
    o.first = static_cast<int>(first);
    o.head = static_cast<int>(of_head);
    o.batch = by_batch ? 0 : static_cast<int>(of_batch);
    o.batches = by_batch && of_batch > 0;
    return o;
}

// Whether the channels of both lie alike against the grid of 16 bytes.
bool lie_alike(const Tensor &x, const Tensor &z) {
    uint64_t bits = address_of(x) - address_of(z);
    for (int i : {0, 2})
        if (x.size(i) > 1) bits |= static_cast<uint64_t>(x.stride(i) - z.stride(i)) * 2;
    return bits % 16 == 0;
}

// The maps of x and z, or of copies of them, which are returned.
std::optional<AlignedCopies> make_channel_maps(SsdParams &p, const Tensor &x, const MaybeTensor &z,
                                               cudaStream_t stream) {
    auto fits = [](const Tensor &t) { return t.size(1) == 1 || (t.stride(1) % 8 == 0 && t.stride(1) > 0); };
    const int64_t batch = x.size(0), heads = x.size(2);
    if (fits(x) && (!z || (fits(*z) && lie_alike(x, *z)))) {
        auto map = [&](const char *name, const Tensor &t) {
            return operand(name, t.scalar_type(), address_of(t), batch, t.size(1), heads, t.size(3), t.stride(0),
                           t.stride(1), t.stride(2));
        };
        p.x = map("x", x);
        if (z) p.z = map("z", *z);
        return std::nullopt;
    }
    const int64_t columns = (x.size(3) + 7) / 8 * 8;
    const AlignedCopies copies = z ? align({&x, &*z}, columns, false, nullptr, 0, stream)
                                   : align({&x}, columns, false, nullptr, 0, stream);
    auto map = [&](const char *name, int copy) {
        return operand(name, x.scalar_type(), copies.address(copy), batch, copies.rows, heads, columns, copies.of_batch,
                       copies.of_time, copies.of_group);
    };
    p.x = map("x", 0);
    if (z) p.z = map("z", 1);
    return copies;
}

// Whether this device runs ssd_fwd: its instructions are those of compute capability 9.0 alone.
bool is_hopper(int32_t device) {
    return device_attribute(cudaDevAttrComputeCapabilityMajor, device) == 9
        && device_attribute(cudaDevAttrComputeCapabilityMinor, device) == 0;
}

// Concurrent segments of each head, where the heads leave room on the GPU for several of them at once: as many as take
// the least time, if that saves a twentieth. By times of an H200, in chunks of a whole sequence: a chunk that is passed
// twice takes 1.6, 1.3 times as long where two CTAs share a multiprocessor, and a hand-over 4.5.
int best_segments(int64_t units, int slots, int processors, int chunks) {
    int best = 1;
    double least = 0.95 * chunks;
    for (int count = 2; count <= std::min<int64_t>(slots / units, chunks); ++count) {
        const double crowd = count * units > processors ? 1.3 : 1.0;
        const double time = 1.6 * crowd * ((chunks + count - 1) / count) + 4.5 * (count - 1);
        if (time < least) best = count, least = time;
    }
    return best;
}

// CTAs that share what they read of B and C. The copies of boxes are counted line by line: heads that start anywhere
// lie in twice as many lines, and then the shares pay; else they cost more than they save. Measured on an H200
// (docs/measured-facts.md, SSD).
int best_cluster(const SsdParams &p, const Tensor &x, const MaybeTensor &z) {
    const bool anywhere = !is_aligned(x, 16) || (z && !is_aligned(*z, 16));
    return anywhere && p.states >= 2 * multiprocessors(x.get_device_index()) ? 2 : 1;
}

// In how many parts a unit is taken that is left over after the last full round: as many as there are clusters for,
// where the parts are long enough.
int best_parts(int left, int slots, int chunks) {
    constexpr int kMostParts = 4, kShortestPart = 2;
    const int parts = left == 0 ? 0 : std::min({slots / left, kMostParts, chunks / kShortestPart});
    return parts < 2 ? 0 : parts;
}

template <typename Input, int kStates16, bool kExtras>
void launch_with(SsdParams &p, const Tensor &B, const Tensor &C, int64_t segments, cudaStream_t stream) {
    constexpr int kShared = SsdShared<kStates16, kExtras>::kBytes;
    const auto kernel = ssd_fwd<Input, kStates16, kExtras>;
    const cudaError_t allowed =                              // of this device; each time, since it costs little
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
    STD_TORCH_CHECK(allowed == cudaSuccess, "shedder_cuda::ssd: ", cudaGetErrorString(allowed));

    const int chunks = (p.length + kChunk - 1) / kChunk;
    const int processors = multiprocessors(B.get_device_index());
    const int slots = processors * kSsdCtas<kStates16> / p.cluster;     // of clusters
    p.units = (p.states + p.cluster - 1) / p.cluster;
    if (segments == 0) segments = best_segments(p.units, slots, processors / p.cluster, chunks);
    p.clusters = p.units;
    p.rounds = 1;
    int64_t places = 0;                                      // of states that clusters leave
    if (segments > 1) {
        p.segment_chunks = static_cast<int>((chunks + segments - 1) / segments);
        p.clusters *= (chunks + p.segment_chunks - 1) / p.segment_chunks;
        places = p.clusters - p.units;
    } else if (p.units > slots) {
        const int left = p.units % slots, parts = best_parts(left, slots, chunks);
        if (parts > 0) {
            p.clusters = slots;
            p.rounds = p.units / slots;
            p.left = left;
            p.parts = parts;
            places = (2 * parts - 3) * left;                 // behind a part, and of heads that are interrupted
        }
    }
    places *= p.cluster;
    MaybeTensor carry, tickets;                    // freed by torch in the order of the stream
    if (places > 0) {
        carry = torch::stable::new_empty(B, {places * kStates16 * 8 * 128}, ScalarType::Float);
        tickets = torch::stable::new_empty(B, {1 + places}, ScalarType::Int);
        p.carry = static_cast<float *>(carry->mutable_data_ptr());
        p.tickets = static_cast<int32_t *>(tickets->mutable_data_ptr());
    }
    // Right before the kernel that may start with it.
    const auto aligned = make_states_maps(p, B, C, kStates16 * 16, places > 0 ? 1 + places : 0, stream);
    cudaLaunchConfig_t config{};
    config.gridDim = static_cast<unsigned>(p.clusters * p.cluster);
    config.blockDim = 256;
    config.dynamicSmemBytes = kShared;
    config.stream = stream;
    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {static_cast<unsigned>(p.cluster), 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;   // behind ssd_align, which lets it start
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.attrs = attributes;
    config.numAttrs = aligned ? 2 : 1;
    cudaLaunchKernelEx(&config, kernel, p);                  // check_launch sees an error
}

template <typename Input, int kStates16>
void launch(SsdParams &p, const Tensor &B, const Tensor &C, int64_t segments, cudaStream_t stream) {
    if (p.has_z || p.runs != nullptr) launch_with<Input, kStates16, true>(p, B, C, segments, stream);
    else launch_with<Input, kStates16, false>(p, B, C, segments, stream);
}

template <typename Input>
void launch_for_states(SsdParams &p, const Tensor &B, const Tensor &C, int64_t segments, cudaStream_t stream) {
    const int needed = (p.dstate + 15) / 16;
    if (needed <= 2) return launch<Input, 2>(p, B, C, segments, stream);
    if (needed <= 4) return launch<Input, 4>(p, B, C, segments, stream);
    if (needed <= 5) return launch<Input, 5>(p, B, C, segments, stream);
    if (needed <= 6) return launch<Input, 6>(p, B, C, segments, stream);
    if (needed <= 7) return launch<Input, 7>(p, B, C, segments, stream);
    if (needed <= 8) return launch<Input, 8>(p, B, C, segments, stream);
    if (needed <= 12) return launch<Input, 12>(p, B, C, segments, stream);
    return launch<Input, 16>(p, B, C, segments, stream);
}

}  // namespace

void ssd(const Tensor &x, const Tensor &dt, const Tensor &A, const Tensor &B, const Tensor &C, const MaybeTensor &D,
         const MaybeTensor &z, const MaybeTensor &dt_bias, bool dt_softplus, double dt_min, double dt_max,
         const Tensor &head_to_group, const MaybeTensor &initial_states, const MaybeTensor &runs, Tensor y,
         Tensor final_states, int64_t segments) {
    const ScalarType dtype = x.scalar_type();
    const bool negative_dt = dt_max < 0 || (!dt_softplus && dt_min < 0);     // possible: ssd_fwd takes its logarithm
    if (dtype == ScalarType::Float || negative_dt || !is_hopper(x.get_device_index()))
        return ssd_portable(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, head_to_group, initial_states,
                            runs, y, final_states);
    STD_TORCH_CHECK(0 <= segments && segments <= 1024,
                    "shedder_cuda::ssd: segments is ", segments, "; accepted: 0..1024");
    const Arguments arguments{"ssd", x.get_device_index()};
    SsdParams p{};
    const SsdSizes sizes = take_ssd_arguments(arguments, p, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max,
                                              head_to_group, initial_states, runs, y, final_states);
    if (sizes.states() == 0 || sizes.length == 0) return;

    p.has_z = z.has_value();
    p.states = static_cast<int>(sizes.states());
    arguments.launch(dtype, [&](auto *type, cudaStream_t stream) {
        using Input = std::remove_pointer_t<decltype(type)>;
        const auto copies = make_channel_maps(p, x, z, stream);
        p.cluster = copies ? 1 : best_cluster(p, x, z);
        if constexpr (sizeof(Input) == 2) launch_for_states<Input>(p, B, C, segments, stream);     // as checked above
    });
}

}  // namespace shedder

STABLE_TORCH_LIBRARY_FRAGMENT(shedder_cuda, m) {
    m.def("ssd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
          "bool dt_softplus, float dt_min, float dt_max, Tensor head_to_group, Tensor? initial_states, Tensor? runs, "
          "Tensor(a!) y, Tensor(b!) final_states, int segments) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shedder_cuda, CUDA, m) {
    m.impl("ssd", TORCH_BOX(&shedder::ssd));
}
