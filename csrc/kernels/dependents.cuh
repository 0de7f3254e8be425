// Launches that overlap: the CTAs of a kernel launched as dependent may start as soon as all CTAs of the kernel before
// it in its stream have called start_dependents(), or have ended.

#pragma once

namespace shedder {

__device__ inline void start_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// What the kernel before has written is there from here on, and what it reads may be overwritten.
__device__ inline void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace shedder
