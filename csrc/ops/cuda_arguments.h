// Tensors as the memory-bound kernels take them, checked; every message names the op and the argument.

#pragma once

#include <initializer_list>
#include <optional>

#include "kernels/pointwise.cuh"
#include "ops/cuda_common.h"

namespace shedder {

using MaybeTensor = std::optional<Tensor>;

// use(a null pointer of the type), for a dtype that the kernels take.
template <typename Use>
void with_type(const char *op, ScalarType dtype, Use use) {
    switch (dtype) {
        case ScalarType::Float: return use(static_cast<float *>(nullptr));
        case ScalarType::Half: return use(static_cast<__half *>(nullptr));
        case ScalarType::BFloat16: return use(static_cast<__nv_bfloat16 *>(nullptr));
        default: STD_TORCH_CHECK(false, "shedder_cuda::", op, " takes fp32, fp16 and bf16");
    }
}

// The device and name of one call, against which its arguments are checked.
struct Arguments {
    const char *op;
    int32_t device;

    void check(const Tensor &t, const char *name, std::initializer_list<int64_t> shape) const {
        STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device, "shedder_cuda::", op, ": ", name,
                        " is on another device");
        bool fits = t.dim() == static_cast<int64_t>(shape.size());
        for (size_t i = 0; fits && i < shape.size(); ++i) fits = t.size(i) == shape.begin()[i];
        STD_TORCH_CHECK(fits, "shedder_cuda::", op, ": ", name, " has the wrong shape");
    }
    void check(const Tensor &t, const char *name, ScalarType dtype, std::initializer_list<int64_t> shape) const {
        check(t, name, shape);
        STD_TORCH_CHECK(t.scalar_type() == dtype, "shedder_cuda::", op, ": ", name, " has the wrong dtype");
    }
    Parameter parameter(const Tensor &t, const char *name, std::initializer_list<int64_t> shape) const {
        check(t, name, shape);
        switch (t.scalar_type()) {
            case ScalarType::Float: return {t.const_data_ptr(), FloatKind::kFloat};
            case ScalarType::Half: return {t.const_data_ptr(), FloatKind::kHalf};
            case ScalarType::BFloat16: return {t.const_data_ptr(), FloatKind::kBFloat16};
            default: STD_TORCH_CHECK(false, "shedder_cuda::", op, ": ", name, " must be fp32, fp16 or bf16");
        }
    }
    Parameter parameter(const MaybeTensor &t, const char *name, std::initializer_list<int64_t> shape) const {
        return t ? parameter(*t, name, shape) : Parameter{nullptr, FloatKind::kNone};
    }
    const float *floats(const MaybeTensor &t, const char *name, std::initializer_list<int64_t> shape) const {
        if (!t) return nullptr;
        check(*t, name, ScalarType::Float, shape);
        return static_cast<const float *>(t->const_data_ptr());
    }
    const int32_t *integers(const MaybeTensor &t, const char *name, std::initializer_list<int64_t> shape) const {
        if (!t) return nullptr;
        check(*t, name, ScalarType::Int, shape);
        return static_cast<const int32_t *>(t->const_data_ptr());
    }
    void check_contiguous(const MaybeTensor &t, const char *name) const {
        STD_TORCH_CHECK(!t || t->is_contiguous(), "shedder_cuda::", op, ": ", name, " is not contiguous");
    }
    // launch(a null pointer of the type, the stream that torch works on).
    template <typename Launch>
    void launch(ScalarType dtype, Launch launch) const {
        const torch::stable::accelerator::DeviceGuard guard(device);
        const cudaStream_t stream = current_stream(device);
        with_type(op, dtype, [&](auto *type) { launch(type, stream); });
        check_launch(op);
    }
};

// Whether every row of a tensor lies on a grid of words: its first address, and each of the distances between rows.
inline bool on_grid(const void *data, int64_t element_size, std::initializer_list<int64_t> distances,
                    int64_t word = 16) {
    bool fits = reinterpret_cast<uintptr_t>(data) % word == 0;
    for (int64_t distance : distances) fits = fits && distance * element_size % word == 0;
    return fits;
}

// Whether the rows of two tensors lie alike against the 16-byte grid; differences: of the distances between rows.
inline bool lie_alike(const void *data, const void *other, int64_t element_size,
                      std::initializer_list<int64_t> differences) {
    const uintptr_t apart = reinterpret_cast<uintptr_t>(data) - reinterpret_cast<uintptr_t>(other);
    return on_grid(reinterpret_cast<const void *>(apart), element_size, differences);
}

// Blocks for `tasks` of which each takes `per_block`. Kernels number tasks by 32 bits: a division of 64 costs as much as
// 25 products.
inline unsigned blocks_for(const char *op, int64_t tasks, int64_t per_block) {
    const int64_t blocks = (tasks + per_block - 1) / per_block;
    STD_TORCH_CHECK(blocks * per_block < (int64_t{1} << 32) && blocks < (int64_t{1} << 31), "shedder_cuda::", op,
                    ": the tensors are too large");
    return static_cast<unsigned>(blocks);
}

}  // namespace shedder
