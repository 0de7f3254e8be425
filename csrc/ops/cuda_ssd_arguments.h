// The arguments that both kernels of the SSD take: checked, and put where both have them in their parameters.

#pragma once

#include <utility>

#include "ops/cuda_arguments.h"

namespace shedder {

struct SsdSizes {
    int64_t batch, length, heads, headdim, groups, dstate;

    int64_t tiles() const { return (headdim + 63) / 64; }    // of 64 channels in a head
    int64_t states() const { return batch * heads * tiles(); }
};

// Params: SsdParams or SsdMmaParams; x, B, C and z, which each kernel reads in its own way, are only checked.
template <typename Params>
SsdSizes take_ssd_arguments(const Arguments &arguments, Params &p, const Tensor &x, const Tensor &dt, const Tensor &A,
                            const Tensor &B, const Tensor &C, const MaybeTensor &D, const MaybeTensor &z,
                            const MaybeTensor &dt_bias, bool dt_softplus, double dt_min, double dt_max,
                            const Tensor &head_to_group, const MaybeTensor &initial_states, const MaybeTensor &runs,
                            Tensor y, MaybeTensor final_states) {
    STD_TORCH_CHECK(x.dim() == 4 && B.dim() == 4, "shedder_cuda::ssd takes x (B, L, H, P), B and C (B, L, G, N)");
    const SsdSizes sizes{x.size(0), x.size(1), x.size(2), x.size(3), B.size(2), B.size(3)};
    const auto [batch, length, heads, headdim, groups, dstate] = sizes;
    STD_TORCH_CHECK(1 <= dstate && dstate <= 256, "shedder_cuda::ssd: N is ", dstate, "; accepted: 1..256");
    STD_TORCH_CHECK(1 <= headdim && headdim <= 1024, "shedder_cuda::ssd: P is ", headdim, "; accepted: 1..1024");
    STD_TORCH_CHECK(length < (int64_t{1} << 31) - 128, "shedder_cuda::ssd: L must be below 2^31");
    STD_TORCH_CHECK(sizes.states() < (int64_t{1} << 27), "shedder_cuda::ssd: batch times heads is too large");
    const ScalarType dtype = x.scalar_type();
    with_type(arguments.op, dtype, [](auto *) {});
    const bool dt_float = dt.scalar_type() == ScalarType::Float;
    arguments.check(dt, "dt", dt_float ? ScalarType::Float : dtype, {batch, length, heads});
    arguments.check(A, "A", ScalarType::Float, {heads});
    arguments.check(B, "B", dtype, {batch, length, groups, dstate});
    arguments.check(C, "C", dtype, {batch, length, groups, dstate});
    if (z) arguments.check(*z, "z", dtype, {batch, length, heads, headdim});
    arguments.check(y, "y", dtype, {batch, length, heads, headdim});
    if (final_states)
        arguments.check(*final_states, "final_states", ScalarType::Float, {batch, heads, headdim, dstate});
    arguments.check_contiguous(head_to_group, "head_to_group");
    arguments.check_contiguous(initial_states, "initial_states");
    arguments.check_contiguous(runs, "runs");
    arguments.check_contiguous(y, "y");
    arguments.check_contiguous(final_states, "final_states");
    for (const auto &[t, name] : {std::pair(&x, "x"), {&B, "B"}, {&C, "C"}, {z ? &*z : &x, "z"}})
        STD_TORCH_CHECK(t->size(3) == 1 || t->stride(3) == 1,
                        "shedder_cuda::ssd: the last dimension of ", name, " is not contiguous");

    const bool D_of_channels = D && D->dim() == 2;
    if (D_of_channels) p.D = arguments.floats(D, "D", {heads, headdim});
    else p.D = arguments.floats(D, "D", {heads});
    p.dt_bias = arguments.floats(dt_bias, "dt_bias", {heads});
    p.initial = arguments.floats(initial_states, "initial_states", {batch, heads, headdim, dstate});
    p.runs = arguments.integers(runs, "runs", {batch, length});
    p.head_to_group = arguments.integers(head_to_group, "head_to_group", {heads});
    p.dt = dt.const_data_ptr();
    p.A = static_cast<const float *>(A.const_data_ptr());
    p.y = y.mutable_data_ptr();
    p.final_states = final_states ? static_cast<float *>(final_states->mutable_data_ptr()) : nullptr;
    p.dt_strides = {dt.stride(0), dt.stride(1), dt.stride(2)};
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
    p.tiles = static_cast<int>(sizes.tiles());
    p.dt_softplus = dt_softplus;
    p.dt_float = dt_float;
    return sizes;
}

}  // namespace shedder
