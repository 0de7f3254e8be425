// Launcher of the portable SSD: checks, chooses the kernel for the number of states, launches.

#include "kernels/ssd_mma.cuh"
#include "ops/cuda_launch.h"
#include "ops/cuda_launchers.h"
#include "ops/cuda_ssd_arguments.h"

namespace shedder {
namespace {

SsdMmaStrides strides(const Tensor &t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

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
    launch_ctas(kernel, {static_cast<unsigned>(ctas), kMmaThreads, Tile::kBytes}, stream, p);
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
                  const MaybeTensor &runs, Tensor y, MaybeTensor final_states) {
    const Arguments arguments{"ssd", x.get_device_index()};
    SsdMmaParams p{};
    const SsdSizes sizes = take_ssd_arguments(arguments, p, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max,
                                              head_to_group, initial_states, runs, y, final_states);
    if (sizes.states() == 0 || sizes.length == 0) return;

    p.x = x.const_data_ptr();
    p.B = B.const_data_ptr();
    p.C = C.const_data_ptr();
    p.z = z ? z->const_data_ptr() : nullptr;
    p.x_strides = strides(x);
    p.B_strides = strides(B);
    p.C_strides = strides(C);
    if (z) p.z_strides = strides(*z);
    p.x_width = row_width(x);
    p.B_width = row_width(B);
    p.C_width = row_width(C);
    arguments.launch(x.scalar_type(), [&](auto *type, cudaStream_t stream) {
        launch_for_states<std::remove_pointer_t<decltype(type)>>(p, sizes.states(), stream);
    });
}

}  // namespace shedder

STABLE_TORCH_LIBRARY_FRAGMENT(shedder_cuda, m) {
    m.def("ssd_portable(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
          "bool dt_softplus, float dt_min, float dt_max, Tensor head_to_group, Tensor? initial_states, Tensor? runs, "
          "Tensor(a!) y, Tensor(b!)? final_states) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shedder_cuda, CUDA, m) {
    m.impl("ssd_portable", TORCH_BOX(&shedder::ssd_portable));
}
