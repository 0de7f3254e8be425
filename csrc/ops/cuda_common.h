// What every CUDA launcher needs: the current stream of torch, and checks that name the op.

#pragma once

#include <cuda_runtime.h>

#include <string>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace shedder {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The stream that torch works on for this device. Looked up at the first call: libtorch_cuda is not linked, so that
// this library also loads under a torch without CUDA.
cudaStream_t current_stream(int32_t device_index);

void check_launch(const char *op);

inline int64_t element_size(ScalarType dtype) { return dtype == ScalarType::Float ? 4 : 2; }

}  // namespace shedder
