// Launcher of the portable SSD: checks, chooses the kernel for the number of states, launches.

#include "kernels/ssd_mma.cuh"
#include "ops/cuda_arguments.h"
#include "ops/cuda_launchers.h"

namespace shedder {
namespace {

SsdMmaStrides strides(const Tensor &t, const char *name) {
    STD_TORCH_CHECK(t.dim() < 4 || t.size(3) == 1 || t.stride(3) == 1,
                    "shedder_cuda::ssd: the last dimension of ", name, " is not contiguous");
    return {t.stride(0), t.stride(1), t.stride(2)};
}

// The most bytes, up to 16, of which the start of every row is a multiple.
int row_width(const Tensor &t) {
    uint64_t bits = reinterpret_cast<uint64_t>(t.const_data_ptr());
    for (int i = 0; i < 3; ++i)
        if (t.size(i) > 1) bits |= static_cast<uint64_t>(t.stride(i) * element_size(t.scalar_type()));
    return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 2;
}

template <typename Input, int kStates16>
void launch(const SsdMmaParams &p, int64_t ctas, cudaStream_t stream) {
    using Tile = SsdMmaTile<Input, kStates16>;
    const auto kernel = ssd_mma<Input, kStates16>;
    const cudaError_t allowed =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kBytes);
    STD_TORCH_CHECK(allowed == cudaSuccess, "shedder_cuda::ssd: ", Tile::kBytes, " bytes of shared memory: ",
                    cudaGetErrorString(allowed));
    kernel<<<static_cast<unsigned>(ctas), kMmaThreads, Tile::kBytes, stream>>>(p);
}

template <typename Input>
void launch_for_states(const SsdMmaParams &p, int64_t ctas, cudaStream_t stream) {
    if constexpr (sizeof(Input) == 4) {
        if (p.dstate <= 32) return launch<Input, 2>(p, ctas, stream);
        if (p.dstate <= 64) return launch<Input, 4>(p, ctas, stream);
        if (p.dstate <= 96) return launch<Input, 6>(p, ctas, stream);
        if (p.dstate <= 112) return launch<Input, 7>(p, ctas, stream);
        if (p.dstate <= 128) return launch<Input, 8>(p, ctas, stream);
        if (p.dstate <= 192) return launch<Input, 12>(p, ctas, stream);
        return launch<Input, 16>(p, ctas, stream);
    } else {
        if (p.dstate <= 64) return launch<Input, 4>(p, ctas, stream);
        if (p.dstate <= 128) return launch<Input, 8>(p, ctas, stream);
        return launch<Input, 16>(p, ctas, stream);
    }
}

}  // namespace

void ssd_portable(const Tensor &x, const Tensor &dt, const Tensor &A, const Tensor &B, const Tensor &C,
                  const MaybeTensor &D, const MaybeTensor &z, const MaybeTensor &dt_bias, bool dt_softplus,
                  double dt_min, double dt_max, const Tensor &head_to_group, const MaybeTensor &initial_states,
                  const MaybeTensor &runs, Tensor y, Tensor final_states) {
    const ScalarType dtype = x.scalar_type();
    STD_TORCH_CHECK(x.dim() == 4 && B.dim() == 4, "shedder_cuda::ssd takes x (B, L, H, P), B and C (B, L, G, N)");
    const int64_t batch = x.size(0), length = x.size(1), heads = x.size(2), headdim = x.size(3);
    const int64_t groups = B.size(2), dstate = B.size(3), tiles = (headdim + 63) / 64, ctas = batch * heads * tiles;
    STD_TORCH_CHECK(1 <= dstate && dstate <= 256, "shedder_cuda::ssd: N is ", dstate, "; accepted: 1..256");
    STD_TORCH_CHECK(1 <= headdim && headdim <= 1024, "shedder_cuda::ssd: P is ", headdim, "; accepted: 1..1024");
    STD_TORCH_CHECK(length < (int64_t{1} << 31) - 128, "shedder_cuda::ssd: L must be below 2^31");
    STD_TORCH_CHECK(ctas < int64_t{1} << 31, "shedder_cuda::ssd: batch times heads is too large");
    const Arguments arguments{"ssd", x.get_device_index()};
    const bool dt_float = dt.scalar_type() == ScalarType::Float;
    arguments.check(dt, "dt", dt_float ? ScalarType::Float : dtype, {batch, length, heads});
    arguments.check(A, "A", ScalarType::Float, {heads});
    arguments.check(B, "B", dtype, {batch, length, groups, dstate});
    arguments.check(C, "C", dtype, {batch, length, groups, dstate});
    if (z) arguments.check(*z, "z", dtype, {batch, length, heads, headdim});
    arguments.check(y, "y", dtype, {batch, length, heads, headdim});
    arguments.check(final_states, "final_states", ScalarType::Float, {batch, heads, headdim, dstate});
    const bool D_of_channels = D && D->dim() == 2;
    SsdMmaParams p{};
    p.A = static_cast<const float *>(A.const_data_ptr());
    if (D_of_channels) p.D = arguments.floats(D, "D", {heads, headdim});
    else p.D = arguments.floats(D, "D", {heads});
    p.dt_bias = arguments.floats(dt_bias, "dt_bias", {heads});
    p.initial = arguments.floats(initial_states, "initial_states", {batch, heads, headdim, dstate});
    p.runs = arguments.integers(runs, "runs", {batch, length});
    p.head_to_group = arguments.integers(head_to_group, "head_to_group", {heads});
    arguments.check_contiguous(head_to_group, "head_to_group");
    arguments.check_contiguous(initial_states, "initial_states");
    arguments.check_contiguous(runs, "runs");
    arguments.check_contiguous(y, "y");
    arguments.check_contiguous(final_states, "final_states");
    if (ctas == 0 || length == 0) return;

    p.x = x.const_data_ptr();
    p.B = B.const_data_ptr();
    p.C = C.const_data_ptr();
    p.z = z ? z->const_data_ptr() : nullptr;
    p.dt = dt.const_data_ptr();
    p.y = y.mutable_data_ptr();
    p.final_states = static_cast<float *>(final_states.mutable_data_ptr());
    p.x_strides = strides(x, "x");
    p.B_strides = strides(B, "B");
    p.C_strides = strides(C, "C");
    if (z) p.z_strides = strides(*z, "z");
    p.dt_strides = strides(dt, "dt");
    p.A_stride = A.stride(0);
    p.D_head_stride = D ? D->stride(0) : 0;
    p.D_channel_stride = D_of_channels ? D->stride(1) : 0;
    p.dt_bias_stride = dt_bias ? dt_bias->stride(0) : 0;
    p.dt_min = static_cast<float>(dt_min);
    p.dt_max = static_cast<float>(dt_max);
    p.length = static_cast<int>(length);
    p.heads = static_cast<int>(heads);
    p.headdim = static_cast<int>(headdim);
    p.dstate = static_cast<int>(dstate);
    p.tiles = static_cast<int>(tiles);
    p.x_width = row_width(x);
    p.B_width = row_width(B);
    p.C_width = row_width(C);
    p.dt_softplus = dt_softplus;
    p.dt_float = dt_float;

    arguments.launch(dtype, [&](auto *type, cudaStream_t stream) {
        launch_for_states<std::remove_pointer_t<decltype(type)>>(p, ctas, stream);
    });
}

}  // namespace shedder

STABLE_TORCH_LIBRARY_FRAGMENT(shedder_cuda, m) {
    m.def("ssd_portable(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
          "bool dt_softplus, float dt_min, float dt_max, Tensor head_to_group, Tensor? initial_states, Tensor? runs, "
          "Tensor(a!) y, Tensor(b!) final_states) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shedder_cuda, CUDA, m) {
    m.impl("ssd_portable", TORCH_BOX(&shedder::ssd_portable));
}
