// The address of a place in shared memory, as instructions on shared memory take it.

#pragma once

#include <cstdint>

namespace shedder {

__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

}  // namespace shedder
