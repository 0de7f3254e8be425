// Launches of kernels.

#pragma once

#include <cuda_runtime.h>

#include "ops/cuda_device.h"

namespace shedder {

struct Ctas {
    dim3 grid;
    unsigned threads;
    int64_t shared_bytes = 0;
    unsigned cluster = 0;                                    // CTAs of one, along x; 0: there are none
};

// Whether kernels of this library may begin before the one before has ended: those that run on the current device were
// compiled for one that has the instruction to wait for it.
inline bool launches_overlap(const void *kernel) {
    enum { kUnknown, kNo, kYes };
    static std::array<std::atomic<int>, kMostDevices> known{};
    int device = 0;
    cudaGetDevice(&device);
    if (known[device] == kUnknown) {
        cudaFuncAttributes compiled{};
        cudaFuncGetAttributes(&compiled, kernel);
        known[device] = compiled.ptxVersion >= 90 ? kYes : kNo;
    }
    return known[device] == kYes;
}

// On the current device; check_launch sees an error. The kernel waits for the one before it in the stream by itself
// (kernels/dependents.cuh): so the time that a launch takes passes while that one ends.
template <typename Kernel, typename... Params>
void launch_ctas(Kernel kernel, const Ctas &ctas, cudaStream_t stream, const Params &...params) {
    cudaLaunchAttribute attributes[2]{};
    cudaLaunchConfig_t config{};
    config.gridDim = ctas.grid;
    config.blockDim = ctas.threads;
    config.dynamicSmemBytes = ctas.shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    if (launches_overlap(reinterpret_cast<const void *>(kernel))) {
        cudaLaunchAttribute &overlap = attributes[config.numAttrs++];
        overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        overlap.val.programmaticStreamSerializationAllowed = 1;
    }
    if (ctas.cluster > 0) {
        cudaLaunchAttribute &cluster = attributes[config.numAttrs++];
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {ctas.cluster, 1, 1};
    }
    cudaLaunchKernelEx(&config, kernel, params...);
}

}  // namespace shedder
