// Launcher of SSD: checks, makes the tensor maps, deals heads or segments of them to CTAs, launches.

#include <algorithm>
#include <optional>

#include <torch/csrc/stable/ops.h>

#include "kernels/ssd_align.cuh"
#include "kernels/ssd_fwd.cuh"
#include "ops/cuda_common.h"
#include "ops/cuda_launchers.h"

namespace shedder {
namespace {

void check(const Tensor &t, const char *name, const Tensor &like, ScalarType dtype,
           std::initializer_list<int64_t> shape) {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(),
                    "shedder_cuda::ssd: ", name, " is not on the device of x");
    STD_TORCH_CHECK(t.scalar_type() == dtype, "shedder_cuda::ssd: ", name, " has the wrong dtype");
    bool fits = t.dim() == static_cast<int64_t>(shape.size());
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = t.size(i) == shape.begin()[i];
    STD_TORCH_CHECK(fits, "shedder_cuda::ssd: ", name, " has the wrong shape");
}

// The strides of a (batch, time, head, element) tensor whose elements are neighbours.
SsdStrides strides(const Tensor &t, const char *name) {
    STD_TORCH_CHECK(t.dim() < 4 || t.size(3) == 1 || t.stride(3) == 1,
                    "shedder_cuda::ssd: the last dimension of ", name, " is not contiguous");
    return {t.stride(0), t.stride(1), t.stride(2)};
}

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

// Whether all rows of (batch, time, group, state) start at multiples of 16 bytes.
bool is_aligned(const Tensor &t) {
    uint64_t bits = address_of(t);
    for (int i = 0; i < 3; ++i)
        if (t.size(i) > 1) bits |= static_cast<uint64_t>(t.stride(i)) * 2;
    return bits % 16 == 0;
}

// The map of C or B.
CUtensorMap states_map(const char *name, ScalarType dtype, uint64_t address, int64_t batch, int64_t rows,
                       int64_t groups, int64_t dstate, int64_t of_batch, int64_t of_row, int64_t of_group) {
    auto stride = [](int64_t size, int64_t elements) { return size > 1 ? static_cast<uint64_t>(elements) * 2 : 16; };
    const uint64_t sizes[4] = {static_cast<uint64_t>(dstate), static_cast<uint64_t>(rows),
                               static_cast<uint64_t>(groups), static_cast<uint64_t>(batch)};
    const uint64_t strides[3] = {stride(rows, of_row), stride(groups, of_group), stride(batch, of_batch)};
    const uint32_t box[4] = {64, kChunk, 1, 1};
    return tensor_map(name, dtype, address, 4, sizes, strides, box);
}

// The maps of C and B, or of copies of them that are aligned: these are returned, for torch to free in stream order.
std::optional<Tensor> make_states_maps(SsdParams &p, const Tensor &B, const Tensor &C, int64_t columns,
                                       cudaStream_t stream) {
    const int64_t batch = B.size(0), length = B.size(1), groups = B.size(2);
    if (!p.turns && is_aligned(B) && is_aligned(C)) {
        p.C = states_map("C", C.scalar_type(), address_of(C), batch, length, groups, p.dstate, C.stride(0), C.stride(1),
                         C.stride(2));
        p.B = states_map("B", B.scalar_type(), address_of(B), batch, length, groups, p.dstate, B.stride(0), B.stride(1),
                         B.stride(2));
        return std::nullopt;
    }
    const int64_t rows = (length + kChunk - 1) / kChunk * kChunk;
    const int64_t of_group = rows * columns, of_batch = groups * of_group, elements = batch * of_batch;
    const Tensor aligned = torch::stable::new_empty(B, {2, elements});
    SsdAlignParams a{};
    a.C = static_cast<const uint16_t *>(C.const_data_ptr());
    a.B = static_cast<const uint16_t *>(B.const_data_ptr());
    for (int i = 0; i < 3; ++i) {
        a.C_strides[i] = C.stride(i);
        a.B_strides[i] = B.stride(i);
    }
    a.to = static_cast<uint4 *>(aligned.mutable_data_ptr());
    a.pieces = elements / 8;
    a.length = p.length;
    a.rows = static_cast<int>(rows);
    a.groups = static_cast<int>(groups);
    a.dstate = p.dstate;
    a.columns = static_cast<int>(columns);
    a.turns = p.turns;
    ssd_align<<<dim3(static_cast<unsigned>((a.pieces + 255) / 256), 2), 256, 0, stream>>>(a);
    const uint64_t address = address_of(aligned);
    p.C = states_map("C", C.scalar_type(), address, batch, rows, groups, columns, of_batch, columns, of_group);
    p.B = states_map("B", B.scalar_type(), address + elements * 2, batch, rows, groups, columns, of_batch, columns,
                     of_group);
    return aligned;
}

// A row of the first map is a token and the `turns` - 1 before the next row's. Where the last row has fewer, the second
// map is without it: so the last column of the last row is the tensor's last element, and nothing behind it is read.
SsdOperand operand(const Tensor &t, const char *name, int64_t turns, bool shifts) {
    const int64_t batch = t.size(0), length = t.size(1), heads = t.size(2), width = t.size(3);
    const int64_t of_batch = batch > 1 ? t.stride(0) : 0, of_head = heads > 1 ? t.stride(2) : 0;
    const int64_t of_time = length > 1 ? t.stride(1) : 8;
    const bool by_batch = of_batch % 8 == 0;
    const uint64_t first = address_of(t) % 16 / 2, address = address_of(t) - first * 2;
    SsdOperand o{};
    for (const int fewer : {0, 1}) {
        const int64_t rows = fewer ? length / turns : (length + turns - 1) / turns;
        const int64_t last = fewer ? turns - 1 : (length - 1) % turns;       // token of the last row
        if (fewer && (rows == 0 || length % turns == 0)) {
            o.map[1] = o.map[0];
            o.rest[1] = o.rest[0];
            break;
        }
        const uint64_t columns =
            first + (by_batch ? 0 : (batch - 1) * of_batch) + (heads - 1) * of_head + last * of_time + width;
        STD_TORCH_CHECK(columns + turns * of_time < uint64_t{1} << 31, "shedder_cuda::ssd: the heads of ", name,
                        " (or its batch entries, off 16 bytes) spread over 2^31 elements");
        const uint64_t sizes[3] = {columns, static_cast<uint64_t>(rows), static_cast<uint64_t>(by_batch ? batch : 1)};
        const uint64_t strides[2] = {static_cast<uint64_t>(turns * of_time) * 2,
                                     by_batch && of_batch > 0 ? static_cast<uint64_t>(of_batch) * 2 : 16};
        const uint32_t box_rows = static_cast<uint32_t>(kChunk / turns), box[3] = {64, box_rows, 1},
                       rest[3] = {8, box_rows, 1};
        o.map[fewer] = tensor_map(name, t.scalar_type(), address, 3, sizes, strides, box);
        if (shifts) o.rest[fewer] = tensor_map(name, t.scalar_type(), address, 3, sizes, strides, rest);
    }
    o.first = static_cast<int>(first);
    o.head = static_cast<int>(of_head);
    o.time = static_cast<int>(of_time);
    o.batch = by_batch ? 0 : static_cast<int>(of_batch);
    o.batches = by_batch && of_batch > 0;
    return o;
}

int processors(int device) {
    int count = 0;
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

// Whether this device runs ssd_fwd: its instructions are those of compute capability 9.0 alone.
bool is_hopper(int device) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return major == 9 && minor == 0;
}

// Concurrent segments of each head: where the heads leave room on the GPU for several of them at once, if that saves
// more than it costs. By times of an H200: a chunk of a segment takes as long as 2.2 of a whole sequence, since it is
// passed twice and shares a multiprocessor, and the hand-overs as long as 11.
int best_segments(int64_t states, int slots, int chunks) {
    const int count = static_cast<int>(std::clamp<int64_t>(slots / states, 1, chunks));
    return chunks * 2.2 / count + 11 < chunks ? count : 1;
}

template <typename Input, int kStates16, bool kExtras>
void launch_with(SsdParams &p, const Tensor &B, const Tensor &C, int64_t segments, cudaStream_t stream) {
    constexpr int kShared = SsdShared<kStates16, kExtras>::kBytes;
    const auto kernel = ssd_fwd<Input, kStates16, kExtras>;
    const cudaError_t allowed =                              // of this device; each time, since it costs little
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
    STD_TORCH_CHECK(allowed == cudaSuccess, "shedder_cuda::ssd: ", cudaGetErrorString(allowed));

    const std::optional<Tensor> aligned = make_states_maps(p, B, C, kStates16 * 16, stream);
    const int chunks = (p.length + kChunk - 1) / kChunk;
    const int slots = processors(B.get_device_index()) * kSsdCtas<kStates16>;
    if (segments == 0) segments = best_segments(p.states, slots, chunks);
    p.ctas = p.states;
    p.rounds = 1;
    int carries = 0;                                         // states that CTAs leave to others
    if (segments > 1) {
        p.segment_chunks = static_cast<int>((chunks + segments - 1) / segments);
        p.ctas *= (chunks + p.segment_chunks - 1) / p.segment_chunks;
        carries = p.ctas - p.states;
    } else if (const int left = p.states % slots; p.states > slots && 0 < left && left <= slots / 2 && chunks > 1) {
        p.ctas = slots;
        p.rounds = p.states / slots;
        p.halved = carries = left;
    }
    std::optional<Tensor> carry, tickets;                    // freed by torch in the order of the stream
    if (carries > 0) {
        carry = torch::stable::new_empty(B, {int64_t{carries} * kStates16 * 8 * 128}, ScalarType::Float);
        tickets = torch::stable::new_empty(B, {int64_t{carries} + 1}, ScalarType::Int);
        p.carry = static_cast<float *>(carry->mutable_data_ptr());
        p.tickets = static_cast<int32_t *>(tickets->mutable_data_ptr());
        cudaMemsetAsync(p.tickets, 0, (carries + size_t{1}) * sizeof(int32_t), stream);
    }
    kernel<<<p.ctas, 256, kShared, stream>>>(p);
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

void ssd(const Tensor &x, const Tensor &dt, const Tensor &A, const Tensor &B, const Tensor &C,
         const std::optional<Tensor> &D, const std::optional<Tensor> &z, const std::optional<Tensor> &dt_bias,
         bool dt_softplus, double dt_min, double dt_max, const Tensor &head_to_group,
         const std::optional<Tensor> &initial_states, const std::optional<Tensor> &runs, Tensor y,
         Tensor final_states, int64_t segments) {
    const ScalarType dtype = x.scalar_type();
    if (dtype == ScalarType::Float || !is_hopper(x.get_device_index()))
        return ssd_portable(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, head_to_group, initial_states,
                            runs, y, final_states);
    STD_TORCH_CHECK(x.dim() == 4 && B.dim() == 4, "shedder_cuda::ssd takes x (B, L, H, P), B and C (B, L, G, N)");
    const int64_t batch = x.size(0), length = x.size(1), heads = x.size(2), headdim = x.size(3);
    const int64_t groups = B.size(2), dstate = B.size(3);
    STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                    "shedder_cuda::ssd: x must be fp16 or bf16");
    STD_TORCH_CHECK(1 <= dstate && dstate <= 256, "shedder_cuda::ssd: N is ", dstate, "; accepted: 1..256");
    STD_TORCH_CHECK(1 <= headdim && headdim <= 1024, "shedder_cuda::ssd: P is ", headdim, "; accepted: 1..1024");
    STD_TORCH_CHECK(length < (int64_t{1} << 31) - 128, "shedder_cuda::ssd: L must be below 2^31");
    STD_TORCH_CHECK(batch * heads * ((headdim + 63) / 64) < (int64_t{1} << 27),
                    "shedder_cuda::ssd: batch times heads is too large");
    check(dt, "dt", x, dt.scalar_type() == ScalarType::Float ? ScalarType::Float : dtype, {batch, length, heads});
    check(A, "A", x, ScalarType::Float, {heads});
    check(B, "B", x, dtype, {batch, length, groups, dstate});
    check(C, "C", x, dtype, {batch, length, groups, dstate});
    if (D && D->dim() == 1) check(*D, "D", x, ScalarType::Float, {heads});
    else if (D) check(*D, "D", x, ScalarType::Float, {heads, headdim});
    if (z) check(*z, "z", x, dtype, {batch, length, heads, headdim});
    if (dt_bias) check(*dt_bias, "dt_bias", x, ScalarType::Float, {heads});
    check(head_to_group, "head_to_group", x, ScalarType::Int, {heads});
    STD_TORCH_CHECK(head_to_group.is_contiguous(), "shedder_cuda::ssd: head_to_group is not contiguous");
    if (initial_states) {
        check(*initial_states, "initial_states", x, ScalarType::Float, {batch, heads, headdim, dstate});
        STD_TORCH_CHECK(initial_states->is_contiguous(), "shedder_cuda::ssd: initial_states is not contiguous");
    }
    if (runs) {
        check(*runs, "runs", x, ScalarType::Int, {batch, length});
        STD_TORCH_CHECK(runs->is_contiguous(), "shedder_cuda::ssd: runs is not contiguous");
    }
    STD_TORCH_CHECK(0 <= segments && segments <= 1024,
                    "shedder_cuda::ssd: segments is ", segments, "; accepted: 0..1024");
    for (const auto &[t, name] : {std::pair(&x, "x"), {&B, "B"}, {&C, "C"}, {z ? &*z : &x, "z"}})
        STD_TORCH_CHECK(t->size(3) == 1 || t->stride(3) == 1,
                        "shedder_cuda::ssd: the last dimension of ", name, " is not contiguous");
    check(y, "y", x, dtype, {batch, length, heads, headdim});
    check(final_states, "final_states", x, ScalarType::Float, {batch, heads, headdim, dstate});
    STD_TORCH_CHECK(y.is_contiguous() && final_states.is_contiguous(),
                    "shedder_cuda::ssd: y or final_states is not contiguous");
    if (batch == 0 || heads == 0 || length == 0) return;

    auto floats = [](const std::optional<Tensor> &t) {
        return t ? static_cast<const float *>(t->const_data_ptr()) : nullptr;
    };
    SsdParams p{};
    auto pitch_fits = [](const Tensor &t) { return t.size(1) == 1 || t.stride(1) % 8 == 0; };
    p.turns = !pitch_fits(x) || (z && !pitch_fits(*z));
    p.shifts = !is_aligned(x) || (z && !is_aligned(*z));
    p.x = operand(x, "x", p.turns ? 8 : 1, p.shifts);
    if (z) p.z = operand(*z, "z", p.turns ? 8 : 1, p.shifts);
    p.has_z = z.has_value();
    p.dt = dt.const_data_ptr();
    p.A = static_cast<const float *>(A.const_data_ptr());
    p.D = floats(D);
    p.dt_bias = floats(dt_bias);
    p.initial = floats(initial_states);
    p.runs = runs ? static_cast<const int32_t *>(runs->const_data_ptr()) : nullptr;
    p.head_to_group = static_cast<const int32_t *>(head_to_group.const_data_ptr());
    p.y = y.mutable_data_ptr();
    p.final_states = static_cast<float *>(final_states.mutable_data_ptr());
    p.dt_strides = strides(dt, "dt");
    p.A_stride = A.stride(0);
    p.D_head_stride = D ? D->stride(0) : 0;
    p.D_channel_stride = D && D->dim() == 2 ? D->stride(1) : 0;
    p.dt_bias_stride = dt_bias ? dt_bias->stride(0) : 0;
    p.dt_min = static_cast<float>(dt_min);
    p.dt_max = static_cast<float>(dt_max);
    p.length = static_cast<int>(length);
    p.heads = static_cast<int>(heads);
    p.headdim = static_cast<int>(headdim);
    p.dstate = static_cast<int>(dstate);
    p.tiles = static_cast<int>((headdim + 63) / 64);
    p.states = static_cast<int>(batch * heads * p.tiles);
    p.dt_softplus = dt_softplus;
    p.dt_float = dt.scalar_type() == ScalarType::Float;

    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const cudaStream_t stream = current_stream(x.get_device_index());
    if (dtype == ScalarType::Half) launch_for_states<__half>(p, B, C, segments, stream);
    else
    launch_for_states<__nv_bfloat16>(p, B, C, segments, stream);
    check_launch("ssd");
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
