// Copies into shared memory that need no registers on their way.

#pragma once

#include <cstdint>

namespace shedder {

__device__ inline unsigned shared_address(const void *p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }
__device__ inline void copy_async(uint4 *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(shared_address(to)), "l"(from) : "memory");
}

}  // namespace shedder
