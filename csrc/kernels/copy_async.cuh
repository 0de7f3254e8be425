// Copies into shared memory, and into L2, that need no registers on their way.

#pragma once

#include <cstdint>

#include "kernels/shared_address.cuh"

namespace shedder {

__device__ inline void copy_async(uint4 *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(shared_address(to)), "l"(from) : "memory");
}
// The first `bytes` of 16, zeros for the others. The rest of the line of 128 bytes comes into L2 with them.
__device__ inline void copy_async_part(void *to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
// The same of an even number of bytes where memory may end before all 16, at `end`: then they come at once. An
// asynchronous copy leaves alone what it does not count, but compute-sanitizer takes it for read.
__device__ inline void copy_async_part(void *to, const void *from, int bytes, const void *end) {
    if (bytes % 16 == 0 || static_cast<const char *>(from) + 16 <= static_cast<const char *>(end))
        return copy_async_part(to, from, bytes);
    const char *const behind_8 = static_cast<const char *>(from) + (bytes & 8), *const behind_4 = behind_8 + (bytes & 4);
    uint2 first{};
    uint32_t word = 0, half = 0;
    if (bytes & 8) first = *static_cast<const uint2 *>(from);
    if (bytes & 4) word = *reinterpret_cast<const uint32_t *>(behind_8);
    if (bytes & 2) half = *reinterpret_cast<const uint16_t *>(behind_4);
    const uint2 last = bytes & 4 ? make_uint2(word, half) : make_uint2(half, 0);
    *static_cast<uint4 *>(to) =
        bytes & 8 ? make_uint4(first.x, first.y, last.x, last.y) : make_uint4(last.x, last.y, 0, 0);
}
// kBytes of 4, 8; zeros where there is nothing to copy.
template <int kBytes>
__device__ inline void copy_async_word(uint32_t to, const void *from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :: "r"(to), "l"(from), "n"(kBytes), "r"(there ? kBytes : 0) : "memory");
}
// This thread arrives at a barrier in shared memory when all its copies so far have landed.
__device__ inline void arrive_when_landed(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(barrier) : "memory");
}
// The line of 128 bytes around an address, into L2.
__device__ inline void prefetch_line(const void *at) { asm volatile("prefetch.global.L2 [%0];" :: "l"(at)); }
__device__ inline void copies_committed() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All copies but those of the last kGroups commits.
template <int kGroups>
__device__ inline void copies_landed_but() {
    asm volatile("cp.async.wait_group %0;" :: "n"(kGroups) : "memory");
}

}  // namespace shedder
