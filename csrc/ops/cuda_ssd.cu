// Launcher of SSD: checks, chooses heads per CTA and segments of the sequence, launches.

#include <algorithm>
#include <optional>

#include <torch/csrc/stable/ops.h>

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

// The widest copy, in bytes, that the start of every row of 16-bit elements allows.
int copy_width(const Tensor &t) {
    uint64_t bits = reinterpret_cast<uint64_t>(t.const_data_ptr());
    for (int i = 0; i < 3; ++i)
        if (t.size(i) > 1) bits |= static_cast<uint64_t>(t.stride(i)) * 2;
    return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 2;
}

int processors(int device) {
    int count = 0;
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

// Concurrent segments of the sequence: where the heads leave room on the GPU for several of them at once, if that saves
// more than it costs. By times of an H200: a chunk of a segment takes as long as 2.2 of a whole sequence, since it is
// passed twice and shares a multiprocessor, and the hand-overs as long as 11.
int best_segments(int64_t columns, int slots, int chunks) {
    const int count = static_cast<int>(std::clamp<int64_t>(slots / columns, 1, std::min(chunks, 8)));
    return chunks * 2.2 / count + 11 < chunks ? count : 1;
}

template <typename Input, int kStates16, int kHeads, bool kGated>
void launch(SsdParams &p, int batch, int segments, const Tensor &like, cudaStream_t stream) {
    using Shared = SsdShared<kStates16, kHeads, kGated>;
    const auto kernel = ssd_fwd<Input, kStates16, kHeads, kGated>;
    const cudaError_t allowed =                              // of this device; each time, since it costs little
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shared::kBytes);
    STD_TORCH_CHECK(allowed == cudaSuccess, "shedder_cuda::ssd: ", cudaGetErrorString(allowed));

    const int all = p.heads * p.tiles;
    p.units = (all + kHeads - 1) / kHeads + (kHeads > 1 ? std::min(p.groups - 1, p.heads) : 0);
    p.columns = batch * p.units;
    const int chunks = (p.length + kChunk - 1) / kChunk;
    p.concurrent = segments <= 0;
    const int slots = processors(like.get_device_index()) * SsdResources<kStates16, kHeads>::kCtas;
    if (segments == 0) segments = best_segments(p.columns, slots, chunks);
    segments = std::abs(segments);
    p.segment_chunks = std::max(1, (chunks + segments - 1) / segments);
    p.segments = std::max(1, (chunks + p.segment_chunks - 1) / p.segment_chunks);
    std::optional<Tensor> carry, tickets;                    // freed by torch in the order of the stream
    if (p.segments > 1) {
        p.states = batch * all;
        const int64_t floats = int64_t{p.segments} * p.states * kStates16 * 8 * 128;
        carry = torch::stable::new_empty(like, {floats}, ScalarType::Float);
        const int64_t counters = 1 + int64_t{p.states};
        tickets = torch::stable::new_empty(like, {counters}, ScalarType::Int);
        p.carry = static_cast<float *>(carry->mutable_data_ptr());
        p.tickets = static_cast<int32_t *>(tickets->mutable_data_ptr());
        cudaMemsetAsync(p.tickets, 0, counters * sizeof(int32_t), stream);
    }
    kernel<<<p.columns * p.segments, 128 * (kHeads + 1), Shared::kBytes, stream>>>(p);
}

template <typename Input, int kStates16, int kHeads>
void launch_for_gate(SsdParams &p, int batch, int segments, const Tensor &like, cudaStream_t stream) {
    if (p.z != nullptr) launch<Input, kStates16, kHeads, true>(p, batch, segments, like, stream);
    else launch<Input, kStates16, kHeads, false>(p, batch, segments, like, stream);
}

template <typename Input, int kStates16>
void launch_for_heads(SsdParams &p, int batch, int heads_per_cta, int segments, const Tensor &like,
                      cudaStream_t stream) {
    if constexpr (kStates16 <= 8) {
        if (heads_per_cta == 2) return launch_for_gate<Input, kStates16, 2>(p, batch, segments, like, stream);
    }
    launch_for_gate<Input, kStates16, 1>(p, batch, segments, like, stream);
}

template <typename Input>
void launch_for_states(SsdParams &p, int batch, int heads_per_cta, int segments, const Tensor &like,
                       cudaStream_t stream) {
    const int needed = (p.dstate + 15) / 16;
    if (needed <= 2) return launch_for_heads<Input, 2>(p, batch, heads_per_cta, segments, like, stream);
    if (needed <= 4) return launch_for_heads<Input, 4>(p, batch, heads_per_cta, segments, like, stream);
    if (needed <= 5) return launch_for_heads<Input, 5>(p, batch, heads_per_cta, segments, like, stream);
    if (needed <= 6) return launch_for_heads<Input, 6>(p, batch, heads_per_cta, segments, like, stream);
    if (needed <= 7) return launch_for_heads<Input, 7>(p, batch, heads_per_cta, segments, like, stream);
    if (needed <= 8) return launch_for_heads<Input, 8>(p, batch, heads_per_cta, segments, like, stream);
    if (needed <= 12) return launch_for_heads<Input, 12>(p, batch, heads_per_cta, segments, like, stream);
    return launch_for_heads<Input, 16>(p, batch, heads_per_cta, segments, like, stream);
}

}  // namespace

void ssd(const Tensor &x, const Tensor &dt, const Tensor &A, const Tensor &B, const Tensor &C,
         const std::optional<Tensor> &D, const std::optional<Tensor> &z, const std::optional<Tensor> &dt_bias,
         bool dt_softplus, double dt_min, double dt_max, const Tensor &head_to_group,
         const std::optional<Tensor> &initial_states, const std::optional<Tensor> &runs, Tensor y,
         Tensor final_states, int64_t heads_per_cta, int64_t segments) {
    const ScalarType dtype = x.scalar_type();
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
    check(y, "y", x, dtype, {batch, length, heads, headdim});
    check(final_states, "final_states", x, ScalarType::Float, {batch, heads, headdim, dstate});
    STD_TORCH_CHECK(y.is_contiguous() && final_states.is_contiguous(),
                    "shedder_cuda::ssd: y or final_states is not contiguous");
    if (batch == 0 || heads == 0 || length == 0) return;

    auto floats = [](const std::optional<Tensor> &t) {
        return t ? static_cast<const float *>(t->const_data_ptr()) : nullptr;
    };
    SsdParams p{};
    p.x = x.const_data_ptr();
    p.B = B.const_data_ptr();
    p.C = C.const_data_ptr();
    p.z = z ? z->const_data_ptr() : nullptr;
    p.dt = dt.const_data_ptr();
    p.A = static_cast<const float *>(A.const_data_ptr());
    p.D = floats(D);
    p.dt_bias = floats(dt_bias);
    p.initial = floats(initial_states);
    p.runs = runs ? static_cast<const int32_t *>(runs->const_data_ptr()) : nullptr;
    p.head_to_group = static_cast<const int32_t *>(head_to_group.const_data_ptr());
    p.y = y.mutable_data_ptr();
    p.final_states = static_cast<float *>(final_states.mutable_data_ptr());
    p.x_strides = strides(x, "x");
    p.B_strides = strides(B, "B");
    p.C_strides = strides(C, "C");
    if (z) p.z_strides = strides(*z, "z");
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
    p.groups = static_cast<int>(groups);
    p.tiles = static_cast<int>((headdim + 63) / 64);
    p.x_width = copy_width(x);
    p.B_width = copy_width(B);
    p.C_width = copy_width(C);
    p.z_width = z ? copy_width(*z) : 16;
    p.odd = std::min({p.x_width, p.B_width, p.C_width, p.z_width}) == 2;
    p.dt_softplus = dt_softplus;
    p.dt_float = dt.scalar_type() == ScalarType::Float;

    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const cudaStream_t stream = current_stream(x.get_device_index());
    // One head a CTA is the fastest or nearly so at every shape measured; two that share B and C remain a choice.
    if (heads_per_cta == 0) heads_per_cta = 1;
    if (dtype == ScalarType::Half)
        launch_for_states<__half>(p, static_cast<int>(batch), static_cast<int>(heads_per_cta),
                                  static_cast<int>(segments), x, stream);
    else
        launch_for_states<__nv_bfloat16>(p, static_cast<int>(batch), static_cast<int>(heads_per_cta),
                                         static_cast<int>(segments), x, stream);
    check_launch("ssd");
}

}  // namespace shedder

STABLE_TORCH_LIBRARY_FRAGMENT(shedder_cuda, m) {
    m.def("ssd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
          "bool dt_softplus, float dt_min, float dt_max, Tensor head_to_group, Tensor? initial_states, Tensor? runs, "
          "Tensor(a!) y, Tensor(b!) final_states, int heads_per_cta, int segments) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shedder_cuda, CUDA, m) {
    m.impl("ssd", TORCH_BOX(&shedder::ssd));
}
