// What a device has, asked once where the answer takes longer than a launch.

#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include <cuda_runtime.h>

namespace shedder {

constexpr int kMostDevices = 128;                            // torch takes 120

inline int device_attribute(cudaDeviceAttr attribute, int32_t device) {
    int value = 0;
    cudaDeviceGetAttribute(&value, attribute, device);
    return value;
}

inline int multiprocessors(int32_t device) {
    static std::array<std::atomic<int>, kMostDevices> known{};
    if (known[device] == 0) known[device] = device_attribute(cudaDevAttrMultiProcessorCount, device);
    return known[device];
}

inline int shared_bytes_of_cta(int32_t device) {
    return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

}  // namespace shedder
