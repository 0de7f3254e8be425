// What CTAs of a cluster tell one another without waiting for memory: a release in the barrier of the cluster would
// wait for all that a thread has written, to global memory too.

#pragma once

#include <cstdint>

#include "kernels/shared_address.cuh"

namespace shedder {

__device__ inline int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ inline int cluster_size() {
    int size;
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
    return size;
}

// All threads of the cluster come by. Orders what was read before against what is written after, not what was written.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// The same, ordering all that was written before, which it waits for.
__device__ inline void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Values that the CTAs of the cluster write into the shared memory of this one, and the count of what is still to come.
// One thread opens it before the cluster's first barrier; whoever reads waits.
struct Inbox {
    uint64_t pending;

    __device__ void open(unsigned values) {
        asm volatile("mbarrier.init.shared.b64 [%0], 1;" :: "r"(shared_address(&pending)));
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"(shared_address(&pending)),
                     "r"(values * static_cast<unsigned>(sizeof(float))) : "memory");
    }
    // place: of this CTA, as the inbox is; the value goes to that place of CTA `to`.
    __device__ void send(int to, float *place, float value) {
        asm volatile("{.reg .b32 at, box;\n"
                     "mapa.shared::cluster.u32 at, %0, %2;\n"
                     "mapa.shared::cluster.u32 box, %1, %2;\n"
                     "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [at], %3, [box];}"
                     :: "r"(shared_address(place)), "r"(shared_address(&pending)), "r"(to), "r"(__float_as_int(value))
                     : "memory");
    }
    __device__ void wait() {
        asm volatile("{.reg .pred all;\n"
                     "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 all, [%0], 0;\n"
                     "@!all bra again;}" :: "r"(shared_address(&pending)) : "memory");
    }
};

}  // namespace shedder
