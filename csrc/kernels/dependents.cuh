// Launches that overlap (ops/cuda_launch.h): the CTAs of a kernel may take their places in the GPU as soon as all CTAs of
// the kernel before it in its stream have ended, or have called start_dependents(). Then they take what places are free,
// more on some multiprocessors than on others: good where kernels are as short as a launch, bad where they are long.

#pragma once

namespace shedder {

__device__ inline void start_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Every kernel calls this before it reads or writes memory: from here on what the kernel before has written is there, and
// what it reads may be overwritten.
__device__ inline void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace shedder
