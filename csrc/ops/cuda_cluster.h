// Launches of clusters.

#pragma once

#include <array>
#include <atomic>

#include "ops/cuda_common.h"
#include "ops/cuda_launch.h"

namespace shedder {

// CTAs of a cluster: 16 on the GPUs of data centres, 8 elsewhere, 1 where there are no clusters.
inline int largest_cluster(int32_t device) {
    static std::array<std::atomic<int>, kMostDevices> known{};
    if (known[device] == 0) {
        const int major = device_attribute(cudaDevAttrComputeCapabilityMajor, device);
        known[device] = major == 9 || major == 10 ? 16 : device_attribute(cudaDevAttrClusterLaunch, device) ? 8 : 1;
    }
    return known[device];
}

// `clusters` clusters of `ranks` CTAs; check_launch sees an error.
template <typename Params>
void launch_clusters(const char *op, void (*kernel)(Params), int64_t clusters, int ranks, int threads,
                     int64_t shared_bytes, int32_t device, cudaStream_t stream, const Params &params) {
    STD_TORCH_CHECK(device < kMostDevices && largest_cluster(device) > 1, "shedder_cuda::", op,
                    " needs a GPU with clusters (compute capability 9.0 or above)");
    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    launch_ctas(kernel, {static_cast<unsigned>(clusters * ranks), static_cast<unsigned>(threads), shared_bytes,
                         static_cast<unsigned>(ranks)}, stream, params);
}

}  // namespace shedder
