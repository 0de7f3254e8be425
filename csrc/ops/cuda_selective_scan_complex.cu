// Launcher of the selective scan with complex A: checks, chooses lanes and states of a thread, launches.

#include <algorithm>

#include "kernels/selective_scan_complex.cuh"
#include "ops/cuda_arguments.h"
#include "ops/cuda_launch.h"

namespace shedder {
namespace {

constexpr int64_t kFewStates = 1 << 17;                      // of all channels: below, a thread takes one

Strides3 strides3(const Tensor &t) { return {t.stride(0), t.stride(1), t.stride(2)}; }
// Of B or C: (B, G, N, 2L), or (D, N, 2) where the group stands for the channel and strides count pairs.
Strides4 strides4(const Tensor &t) {
    if (t.dim() == 3) return {0, t.stride(0) / 2, t.stride(1) / 2, 0};
    return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

template <typename Input, int kStates, int kLanes>
void launch(const SelectiveScanParams &p, int groups, cudaStream_t stream) {
    constexpr int kThreads = ComplexTile<kStates, kLanes>::kThreads, kChannels = kThreads / kLanes;
    const dim3 grid((p.channels + kChannels - 1) / kChannels, p.batch);
    launch_ctas(selective_scan_complex<Input, kStates, kLanes>, {grid, kThreads}, stream, p, groups);
}

template <typename Input>
void launch(const SelectiveScanParams &p, int groups, cudaStream_t stream) {
    if (int64_t{p.batch} * p.channels * p.dstate < kFewStates && p.dstate <= 32) {
        if (p.dstate <= 8) return launch<Input, 1, 8>(p, groups, stream);
        if (p.dstate <= 16) return launch<Input, 1, 16>(p, groups, stream);
        return launch<Input, 1, 32>(p, groups, stream);
    }
    if (p.dstate <= 8) return launch<Input, 2, 4>(p, groups, stream);
    if (p.dstate <= 16) return launch<Input, 4, 4>(p, groups, stream);
    if (p.dstate <= 32) return launch<Input, 4, 8>(p, groups, stream);
    if (p.dstate <= 64) return launch<Input, 4, 16>(p, groups, stream);
    if (p.dstate <= 128) return launch<Input, 4, 32>(p, groups, stream);
    return launch<Input, 8, 32>(p, groups, stream);
}

}  // namespace

// Complex tensors come as floats with a last dimension of 2; runs as of shedder.triton_kernels.packed.
void scan_complex(const Tensor &u, const Tensor &delta, const Tensor &A, const Tensor &B, const Tensor &C,
                  const MaybeTensor &D, const MaybeTensor &z, const MaybeTensor &delta_bias,
                  bool delta_softplus, const MaybeTensor &initial_state, const MaybeTensor &channel_to_group,
                  const MaybeTensor &runs, Tensor y, MaybeTensor final_state) {
    STD_TORCH_CHECK(u.dim() == 3 && A.dim() == 3 && (B.dim() == 4 || B.dim() == 3) && (C.dim() == 4 || C.dim() == 3),
                    "shedder_cuda::selective_scan_complex takes u (B, D, L), A (D, N, 2), B and C (B, G, N, 2L) or "
                    "(D, N, 2)");
    const ScalarType dtype = u.scalar_type();
    const int64_t batch = u.size(0), channels = u.size(1), length = u.size(2), dstate = A.size(1);
    const bool constant_B = B.dim() == 3, constant_C = C.dim() == 3;
    const int64_t groups = !constant_B ? B.size(1) : !constant_C ? C.size(1) : 1;
    const Arguments arguments{"selective_scan_complex", u.get_device_index()};
    STD_TORCH_CHECK(1 <= dstate && dstate <= 256,
                    "shedder_cuda::selective_scan_complex: N is ", dstate, "; accepted: 1..256");
    // Batches are the y dimension of the grid.
    STD_TORCH_CHECK(batch <= 65535,
                    "shedder_cuda::selective_scan_complex: batch is ", batch, "; accepted: up to 65535");
    STD_TORCH_CHECK(std::max({channels, length, groups}) < (int64_t{1} << 30),
                    "shedder_cuda::selective_scan_complex: D and L must be below 2^30");
    STD_TORCH_CHECK(groups == 1 || channel_to_group.has_value(),
                    "shedder_cuda::selective_scan_complex: channel_to_group is needed for more than one group");
    auto check_pairs = [&](const Tensor &t, const char *name, std::initializer_list<int64_t> shape) {
        arguments.check(t, name, ScalarType::Float, shape);
        const int64_t last = t.dim() - 1;
        bool paired = t.stride(last) == 1;
        for (int64_t i = 0; i < last; ++i) paired = paired && (t.size(i) == 1 || t.stride(i) % 2 == 0);
        STD_TORCH_CHECK(paired && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 8 == 0,
                        "shedder_cuda::selective_scan_complex: ", name, " is no view of a complex tensor");
        return static_cast<const float *>(t.const_data_ptr());
    };
    auto check_input = [&](const Tensor &t, const char *name) {
        if (t.dim() == 3) check_pairs(t, name, {channels, dstate, 2});
        else arguments.check(t, name, dtype, {batch, groups, dstate, 2 * length});
        return t.const_data_ptr();
    };
    SelectiveScanParams p{};
    p.A = check_pairs(A, "A", {channels, dstate, 2});
    p.B = check_input(B, "B");
    p.C = check_input(C, "C");
    p.D = arguments.floats(D, "D", {channels});
    p.delta_bias = arguments.floats(delta_bias, "delta_bias", {channels});
    arguments.check(delta, "delta", dtype, {batch, channels, length});
    if (z) arguments.check(*z, "z", dtype, {batch, channels, length});
    arguments.check(y, "y", dtype, {batch, channels, length});
    if (initial_state) p.initial_state = check_pairs(*initial_state, "initial_state", {batch, channels, dstate, 2});
    if (final_state) check_pairs(*final_state, "final_state", {batch, channels, dstate, 2});
    p.channel_to_group = arguments.integers(channel_to_group, "channel_to_group", {channels});
    p.seq_idx = arguments.integers(runs, "runs", {batch, length});
    arguments.check_contiguous(initial_state, "initial_state");
    arguments.check_contiguous(channel_to_group, "channel_to_group");
    arguments.check_contiguous(runs, "runs");
    arguments.check_contiguous(final_state, "final_state");
    if (batch == 0 || channels == 0) return;

    p.u = u.const_data_ptr();
    p.delta = delta.const_data_ptr();
    p.z = z ? z->const_data_ptr() : nullptr;
    p.y = y.mutable_data_ptr();
    p.final_state = final_state ? static_cast<float *>(final_state->mutable_data_ptr()) : nullptr;
    if (groups == 1) p.channel_to_group = nullptr;
    p.u_strides = strides3(u);
    p.delta_strides = strides3(delta);
    if (z) p.z_strides = strides3(*z);
    p.y_strides = strides3(y);
    p.B_strides = strides4(B);
    p.C_strides = strides4(C);
    p.A_channel_stride = A.stride(0) / 2;
    p.A_state_stride = A.stride(1) / 2;
    p.D_stride = D ? D->stride(0) : 0;
    p.delta_bias_stride = delta_bias ? delta_bias->stride(0) : 0;
    p.batch = static_cast<int>(batch);
    p.channels = static_cast<int>(channels);
    p.length = static_cast<int>(length);
    p.dstate = static_cast<int>(dstate);
    p.delta_softplus = delta_softplus;
    p.constant_B = constant_B;
    p.constant_C = constant_C;

    arguments.launch(dtype, [&](auto *type, cudaStream_t stream) {
        launch<std::remove_pointer_t<decltype(type)>>(p, static_cast<int>(groups), stream);
    });
}

}  // namespace shedder

STABLE_TORCH_LIBRARY_FRAGMENT(shedder_cuda, m) {
    m.def("selective_scan_complex(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
          "Tensor? delta_bias, bool delta_softplus, Tensor? initial_state, Tensor? channel_to_group, Tensor? runs, "
          "Tensor(a!) y, Tensor(b!)? final_state) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shedder_cuda, CUDA, m) {
    m.impl("selective_scan_complex", TORCH_BOX(&shedder::scan_complex));
}
