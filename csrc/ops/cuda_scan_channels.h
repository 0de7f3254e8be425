// The launcher of the selective scan's form for many channels: kernels enough for a translation unit of its own.

#pragma once

#include <cuda_runtime.h>

#include "kernels/selective_scan_fwd.cuh"
#include "ops/cuda_common.h"

namespace shedder {

// Input: fp16 or bf16; one group, N up to 16, steps adjacent. on_grid: all rows start at multiples of 16 bytes; else
// those of u, delta, z and y of a channel lie alike against them. u: as in p, for the allocator of its memory.
template <typename Input>
void launch_scan_channels(const SelectiveScanParams &p, bool on_grid, const Tensor &u, cudaStream_t stream);

}  // namespace shedder
