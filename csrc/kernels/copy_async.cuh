// Copies into shared memory, and into L2, that need no registers on their way.

#pragma once

#include <cstdint>

#include "kernels/shared_address.cuh"

namespace shedder {

__device__ inline void copy_async(uint4 *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(shared_address(to)), "l"(from) : "memory");
}
// The rest of the line of 128 bytes comes into L2 with them.
__device__ inline void copy_async_line(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" :: "r"(shared_address(to)), "l"(from) : "memory");
}
// The first `bytes` of 16, zeros for the others; likewise.
__device__ inline void copy_async_part(void *to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
// The line of 128 bytes around an address, into L2.
__device__ inline void prefetch_line(const void *at) { asm volatile("prefetch.global.L2 [%0];" :: "l"(at)); }
__device__ inline void copies_committed() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All copies but those of the last kGroups commits.
template <int kGroups>
__device__ inline void copies_landed_but() {
    asm volatile("cp.async.wait_group %0;" :: "n"(kGroups) : "memory");
}
__device__ inline void copies_landed() { copies_landed_but<0>(); }

}  // namespace shedder
