// Launcher of the selective scan: checks, chooses the states per thread, launches.

#include <algorithm>
#include <optional>

#include "kernels/selective_scan_fwd.cuh"
#include "ops/cuda_common.h"

namespace shedder {
namespace {

Strides3 strides3(const Tensor &t) { return {t.stride(0), t.stride(1), t.stride(2)}; }
Strides4 strides4(const Tensor &t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

void check(const Tensor &t, const char *name, const Tensor &like, ScalarType dtype,
           std::initializer_list<int64_t> shape) {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(),
                    "shedder_cuda::selective_scan: ", name, " is not on the device of u");
    STD_TORCH_CHECK(t.scalar_type() == dtype, "shedder_cuda::selective_scan: ", name, " has the wrong dtype");
    bool fits = t.dim() == static_cast<int64_t>(shape.size());
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = t.size(i) == shape.begin()[i];
    STD_TORCH_CHECK(fits, "shedder_cuda::selective_scan: ", name, " has the wrong shape");
}

template <typename Input, int kStates, int kLanes>
void launch(const SelectiveScanParams &p, bool one_group, cudaStream_t stream) {
    constexpr int kChannels = kScanThreads / kLanes;
    const dim3 grid((p.channels + kChannels - 1) / kChannels, p.batch);
    if (one_group)
        selective_scan_fwd<Input, kStates, kLanes, true><<<grid, kScanThreads, 0, stream>>>(p);
    else
        selective_scan_fwd<Input, kStates, kLanes, false><<<grid, kScanThreads, 0, stream>>>(p);
}

template <typename Input>
void launch_for_dstate(const SelectiveScanParams &p, bool one_group, cudaStream_t stream) {
    if (p.dstate <= 8) return launch<Input, 8, 1>(p, one_group, stream);
    if (p.dstate <= 16) return launch<Input, 16, 1>(p, one_group, stream);
    if (p.dstate <= 32) return launch<Input, 16, 2>(p, one_group, stream);
    if (p.dstate <= 64) return launch<Input, 16, 4>(p, one_group, stream);
    if (p.dstate <= 128) return launch<Input, 16, 8>(p, one_group, stream);
    return launch<Input, 16, 16>(p, one_group, stream);
}

void selective_scan(const Tensor &u, const Tensor &delta, const Tensor &A, const Tensor &B, const Tensor &C,
                    const std::optional<Tensor> &D, const std::optional<Tensor> &z,
                    const std::optional<Tensor> &delta_bias, bool delta_softplus,
                    const std::optional<Tensor> &initial_state, const std::optional<Tensor> &channel_to_group,
                    Tensor y, Tensor final_state) {
    const ScalarType dtype = u.scalar_type();
    STD_TORCH_CHECK(u.dim() == 3 && A.dim() == 2 && B.dim() == 4 && C.dim() == 4,
                    "shedder_cuda::selective_scan takes u (B, D, L), A (D, N), B and C (B, G, N, L)");
    const int64_t batch = u.size(0), channels = u.size(1), length = u.size(2), dstate = A.size(1), groups = B.size(1);
    STD_TORCH_CHECK(1 <= dstate && dstate <= 256, "shedder_cuda::selective_scan: N is ", dstate, "; accepted: 1..256");
    // Batches are the y dimension of the grid.
    STD_TORCH_CHECK(batch <= 65535, "shedder_cuda::selective_scan: batch is ", batch, "; accepted: up to 65535");
    STD_TORCH_CHECK(std::max(channels, length) < (int64_t{1} << 31) - 16,
                    "shedder_cuda::selective_scan: D and L must be below 2^31");
    STD_TORCH_CHECK(groups == 1 || channel_to_group.has_value(),
                    "shedder_cuda::selective_scan: channel_to_group is needed for more than one group");
    check(delta, "delta", u, dtype, {batch, channels, length});
    check(A, "A", u, ScalarType::Float, {channels, dstate});
    check(B, "B", u, dtype, {batch, groups, dstate, length});
    check(C, "C", u, dtype, {batch, groups, dstate, length});
    if (D) check(*D, "D", u, ScalarType::Float, {channels});
    if (z) check(*z, "z", u, dtype, {batch, channels, length});
    if (delta_bias) check(*delta_bias, "delta_bias", u, ScalarType::Float, {channels});
    if (initial_state) {
        check(*initial_state, "initial_state", u, ScalarType::Float, {batch, channels, dstate});
        STD_TORCH_CHECK(initial_state->is_contiguous(), "shedder_cuda::selective_scan: initial_state is not contiguous");
    }
    if (channel_to_group) {
        check(*channel_to_group, "channel_to_group", u, ScalarType::Int, {channels});
        STD_TORCH_CHECK(channel_to_group->is_contiguous(),
                        "shedder_cuda::selective_scan: channel_to_group is not contiguous");
    }
    check(y, "y", u, dtype, {batch, channels, length});
    check(final_state, "final_state", u, ScalarType::Float, {batch, channels, dstate});
    STD_TORCH_CHECK(final_state.is_contiguous(), "shedder_cuda::selective_scan: final_state is not contiguous");
    if (batch == 0 || channels == 0) return;

    auto floats = [](const std::optional<Tensor> &t) {
        return t ? static_cast<const float *>(t->const_data_ptr()) : nullptr;
    };
    SelectiveScanParams p{};
    p.u = u.const_data_ptr();
    p.delta = delta.const_data_ptr();
    p.A = static_cast<const float *>(A.const_data_ptr());
    p.B = B.const_data_ptr();
    p.C = C.const_data_ptr();
    p.z = z ? z->const_data_ptr() : nullptr;
    p.D = floats(D);
    p.delta_bias = floats(delta_bias);
    p.initial_state = floats(initial_state);
    p.y = y.mutable_data_ptr();
    p.final_state = static_cast<float *>(final_state.mutable_data_ptr());
    const bool one_group = groups == 1;
    p.channel_to_group = one_group ? nullptr : static_cast<const int32_t *>(channel_to_group->const_data_ptr());
    p.u_strides = strides3(u);
    p.delta_strides = strides3(delta);
    if (z) p.z_strides = strides3(*z);
    p.y_strides = strides3(y);
    p.B_strides = strides4(B);
    p.C_strides = strides4(C);
    p.A_channel_stride = A.stride(0);
    p.A_state_stride = A.stride(1);
    p.D_stride = D ? D->stride(0) : 0;
    p.delta_bias_stride = delta_bias ? delta_bias->stride(0) : 0;
    p.batch = static_cast<int>(batch);
    p.channels = static_cast<int>(channels);
    p.length = static_cast<int>(length);
    p.dstate = static_cast<int>(dstate);
    p.delta_softplus = delta_softplus;

    const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
    const cudaStream_t stream = current_stream(u.get_device_index());
    switch (dtype) {
        case ScalarType::Float: launch_for_dstate<float>(p, one_group, stream); break;
        case ScalarType::Half: launch_for_dstate<__half>(p, one_group, stream); break;
        case ScalarType::BFloat16: launch_for_dstate<__nv_bfloat16>(p, one_group, stream); break;
        default: STD_TORCH_CHECK(false, "shedder_cuda::selective_scan: u must be fp32, fp16 or bf16");
    }
    check_launch("selective_scan");
}

}  // namespace
}  // namespace shedder

STABLE_TORCH_LIBRARY_FRAGMENT(shedder_cuda, m) {
    m.def("selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
          "Tensor? delta_bias, bool delta_softplus, Tensor? initial_state, Tensor? channel_to_group, "
          "Tensor(a!) y, Tensor(b!) final_state) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shedder_cuda, CUDA, m) {
    m.impl("selective_scan", TORCH_BOX(&shedder::selective_scan));
}
