// Tensor maps, through which the copy engine reads and writes boxes of a tensor of 16-bit elements.

#pragma once

#include <cstdint>

#include <cuda.h>
#include <cuda_runtime.h>

#include "ops/cuda_common.h"

namespace shedder {

using Encode = decltype(&cuTensorMapEncodeTiled);

inline Encode encode_function() {
    static const Encode function = [] {
        void *found = nullptr;
        cudaDriverEntryPointQueryResult result;
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
        return reinterpret_cast<Encode>(found);
    }();
    STD_TORCH_CHECK(function != nullptr, "shedder_cuda: the CUDA driver has no cuTensorMapEncodeTiled");
    return function;
}

// From an element to the next along an axis of `size` that are so many elements of 16 bits apart. A map wants a stride
// where there is but one, too.
inline uint64_t map_stride(int64_t size, int64_t elements) {
    return size > 1 ? static_cast<uint64_t>(elements) * 2 : 16;
}

// sizes, box: elements, the adjacent ones first. strides: bytes, of all dimensions but the first; multiples of 16, as
// `address` is.
inline CUtensorMap tensor_map(const char *op, const char *name, uint64_t address, int dimensions,
                              const uint64_t *sizes, const uint64_t *strides, const uint32_t *box,
                              CUtensorMapSwizzle swizzle) {
    const uint32_t steps[4] = {1, 1, 1, 1};
    CUtensorMap map;
    const CUresult result = encode_function()(
        &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, dimensions, reinterpret_cast<void *>(address), sizes, strides, box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    STD_TORCH_CHECK(result == CUDA_SUCCESS, "shedder_cuda::", op, ": the CUDA driver makes no tensor map of ", name,
                    " (error ", static_cast<int>(result), ")");
    return map;
}

}  // namespace shedder
