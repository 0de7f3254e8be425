// The copy engine of Hopper and its barriers: boxes of tensor maps to and from shared memory.

#pragma once

#include <cstdint>

#include <cuda.h>

#include "kernels/shared_address.cuh"

namespace shedder {

// A tensor map among the parameters of the kernel, on its way to where the copy engine reads it.
__device__ __forceinline__ void prefetch_map(const CUtensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// True in one thread of a warp, the same one each time; all of the warp come here together. The compiler knows that it
// is one, where after a comparison with the lane's number it loops over what the threads that pass may hold.
__device__ __forceinline__ bool one_of_warp() {
    uint32_t one;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(one));
    return one;
}
// A box of a tensor map to shared memory, first column first; its bytes count for `barrier`. By one thread.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap *map, int column, int row, int batch,
                                         uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
                 "[%1, {%2, %3, %4}], [%5];"
                 ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(batch), "r"(barrier) : "memory");
}
// to_all: bits of the CTAs of the cluster that the box goes to, each at the same place and with the same barrier; 0:
// here.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap *map, int column, int row, int group, int batch,
                                         uint32_t barrier, uint32_t to_all) {
    if (to_all != 0) {
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                     "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;"
                     ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(group), "r"(batch), "r"(barrier),
                       "h"(static_cast<uint16_t>(to_all)) : "memory");
        return;
    }
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
                 "[%1, {%2, %3, %4, %5}], [%6];"
                 ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(group), "r"(batch), "r"(barrier) : "memory");
}

// A tile to a box of a tensor map, what lies outside of the tensor left out. By one thread, which waits for the tile to
// be read.
__device__ __forceinline__ void store_box(const CUtensorMap *map, int column, int group, int row, int batch,
                                          uint32_t from) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];\n"
                 "cp.async.bulk.commit_group;"
                 ::"l"(map), "r"(column), "r"(group), "r"(row), "r"(batch), "r"(from) : "memory");
}
__device__ __forceinline__ void wait_for_stores_to_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Shared memory to the same place in that of a CTA of the cluster, where its bytes count for `barrier`. By one thread.
__device__ __forceinline__ void send_bytes(uint32_t from, int bytes, uint32_t barrier, int rank) {
    asm volatile("{\n.reg .b32 there, barrier;\nmapa.shared::cluster.u32 there, %0, %3;\n"
                 "mapa.shared::cluster.u32 barrier, %2, %3;\n"
                 "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [there], [%0], %1, [barrier];\n}"
                 ::"r"(from), "r"(bytes), "r"(barrier), "r"(rank) : "memory");
}

// A barrier in shared memory completes a phase, of parity 0, 1, 0, ..., when `count` arrivals have come.
__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Barriers just initialized are seen by copies of boxes.
__device__ __forceinline__ void barriers_are_there() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expecting(uint32_t barrier, int bytes) {  // in this phase
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// At the same place in the shared memory of a CTA of the cluster.
__device__ __forceinline__ void barrier_arrive_remote(uint32_t barrier, int rank) {
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier), "r"(rank) : "memory");
}
// A warp arrives by one lane, after the others. compute-sanitizer's racecheck takes that for the arrival of this lane
// alone: compiled with SHEDDER_SANITIZER all arrive.
#ifdef SHEDDER_SANITIZER
constexpr int kWarpArrivals = 32;
#else
constexpr int kWarpArrivals = 1;
#endif
__device__ __forceinline__ void barrier_arrive_by_warp(uint32_t barrier, int lane) {
    __syncwarp();
    if (lane < kWarpArrivals) barrier_arrive(barrier);
}
// At the same place in all CTAs of a cluster.
__device__ __forceinline__ void barrier_arrive_by_warp(uint32_t barrier, int lane, int ranks) {
    __syncwarp();
    if constexpr (kWarpArrivals == 1) {
        if (lane < ranks) barrier_arrive_remote(barrier, lane);
    } else {
        for (int rank = 0; rank < ranks; ++rank) barrier_arrive_remote(barrier, rank);
    }
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    while (!done);
}

// What was written to shared memory, by these threads or before a barrier that they waited at, is seen by copies of
// boxes, and wgmma: theirs, and those of others after the next barrier.
__device__ __forceinline__ void fence_for_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace shedder
