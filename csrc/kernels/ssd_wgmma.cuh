// The tensor core of Hopper, as SSD uses it: wgmma with 16-bit operands and fp32 sums, tiles of 64 rows of 128 bytes
// in the 128-byte swizzle, boxes of tensor maps copied into them, fragments moved between registers and shared memory.
//
// One tile serves both ways round: rows as the reduced dimension ("transposed", MN-major) or as the other (K-major).

#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/shared_address.cuh"

namespace shedder {

constexpr int kTileRows = 64;
constexpr int kTileBytes = kTileRows * 128;               // 64 columns of 16 bits; wider operands take several tiles

// Byte of a tile (or of a row of tiles, for byte >= 128) at which byte `byte` of row `row` lies.
__device__ __forceinline__ uint32_t tile_offset(int row, int byte) {
    return (byte >> 7) * kTileBytes + row * 128 + (((byte >> 4 & 7) ^ (row & 7)) << 4) + (byte & 15);
}

// Descriptor of an operand that starts at a shared address: 128-byte swizzle, 1024 bytes from one 8 rows to the next.
// Not wider than one tile along the swizzled dimension, so the leading offset is never used.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
    return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 | (address & 0x3ffff) >> 4;
}

// The descriptor of an operand `bytes` further on: one addition, since addresses do not carry out of their field.
__device__ __forceinline__ uint64_t later(uint64_t descriptor, int bytes) {
    const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4);
    return descriptor & 0xffffffff00000000u | low;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of these registers across.
template <int kCount>
__device__ __forceinline__ void pin(float (&r)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(r[i])::"memory");
}

#define SHEDDER_R8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define SHEDDER_R0 SHEDDER_R8(0, 1, 2, 3, 4, 5, 6, 7)
#define SHEDDER_R1 SHEDDER_R8(8, 9, 10, 11, 12, 13, 14, 15)
#define SHEDDER_R2 SHEDDER_R8(16, 17, 18, 19, 20, 21, 22, 23)
#define SHEDDER_R3 SHEDDER_R8(24, 25, 26, 27, 28, 29, 30, 31)
#define SHEDDER_OUT8(d, i)                                                                                         \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),    \
        "+f"(d[i + 7])

// d (64 x N) = A B + (accumulate ? d : 0); A (64 x 16) in registers, B (16 x N) in shared memory.
#define SHEDDER_WGMMA_RS(TYPE, N, SUMS, A, FLAG, B, TRANSPOSED, ...)                                               \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " FLAG ", 0;\n"                                                \
                 "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE                                    \
                 " {" SUMS "}, {" A "}, " B ", p, 1, 1, " TRANSPOSED ";\n}"                                        \
                 : __VA_ARGS__                                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(static_cast<int>(accumulate)), "l"(b),          \
                   "n"(kTransposed))

template <typename T, int kN, int kTransposed>
__device__ __forceinline__ void wgmma_rs(float *d, const uint32_t *a, uint64_t b, bool accumulate) {
    static_assert(kN == 16 || kN == 32 || kN == 48 || kN == 64, "columns of one wgmma");
#define SHEDDER_BY_WIDTH(TYPE)                                                                                     \
    if constexpr (kN == 64)                                                                                        \
        SHEDDER_WGMMA_RS(TYPE, "64", SHEDDER_R0 "," SHEDDER_R1 "," SHEDDER_R2 "," SHEDDER_R3, "%32,%33,%34,%35",   \
                         "%36", "%37", "%38", SHEDDER_OUT8(d, 0), SHEDDER_OUT8(d, 8), SHEDDER_OUT8(d, 16),         \
                         SHEDDER_OUT8(d, 24));                                                                     \
    else if constexpr (kN == 48)                                                                                   \
        SHEDDER_WGMMA_RS(TYPE, "48", SHEDDER_R0 "," SHEDDER_R1 "," SHEDDER_R2, "%24,%25,%26,%27", "%28", "%29",    \
                         "%30", SHEDDER_OUT8(d, 0), SHEDDER_OUT8(d, 8), SHEDDER_OUT8(d, 16));                      \
    else if constexpr (kN == 32)                                                                                   \
        SHEDDER_WGMMA_RS(TYPE, "32", SHEDDER_R0 "," SHEDDER_R1, "%16,%17,%18,%19", "%20", "%21", "%22",            \
                         SHEDDER_OUT8(d, 0), SHEDDER_OUT8(d, 8));                                                  \
    else                                                                                                           \
        SHEDDER_WGMMA_RS(TYPE, "16", SHEDDER_R0, "%8,%9,%10,%11", "%12", "%13", "%14", SHEDDER_OUT8(d, 0))
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        SHEDDER_BY_WIDTH("bf16");
    } else {
        SHEDDER_BY_WIDTH("f16");
    }
}

// d (64 x 64) = A B^T (+ d), both K-major in shared memory.
#define SHEDDER_WGMMA_SS(TYPE)                                                                                     \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "."  \
                 TYPE " {" SHEDDER_R0 "," SHEDDER_R1 "," SHEDDER_R2 "," SHEDDER_R3 "}, %32, %33, p, 1, 1, 0, 0;\n}" \
                 : SHEDDER_OUT8(d, 0), SHEDDER_OUT8(d, 8), SHEDDER_OUT8(d, 16), SHEDDER_OUT8(d, 24)                \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))

template <typename T>
__device__ __forceinline__ void wgmma_ss(float *d, uint64_t a, uint64_t b, bool accumulate) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        SHEDDER_WGMMA_SS("bf16");
    } else {
        SHEDDER_WGMMA_SS("f16");
    }
}

#undef SHEDDER_WGMMA_SS
#undef SHEDDER_WGMMA_RS
#undef SHEDDER_BY_WIDTH

// A tensor map among the parameters of the kernel, on its way to where the copy engine reads it.
__device__ __forceinline__ void prefetch_map(const CUtensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
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
// alone: compiled with SHEDDER_RACECHECK all arrive.
#ifdef SHEDDER_RACECHECK
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
__device__ __forceinline__ void store_remote(uint32_t address, int rank, int value) {
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "st.shared::cluster.b32 [there], %2;\n}" ::"r"(address), "r"(rank), "r"(value) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    while (!done);
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// What these threads wrote to shared memory is seen by wgmma and copies of boxes after the next barrier.
__device__ __forceinline__ void fence_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A word in memory that stands for what was written before it.
__device__ __forceinline__ void release(int32_t *word, int32_t value) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}
__device__ __forceinline__ int32_t acquire(const int32_t *word) {
    int32_t value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}

__device__ __forceinline__ void warpgroup_barrier(int id) {
    asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
}

// Named barriers of 192 threads: some arrive, others wait for all.
template <int kId>
__device__ __forceinline__ void barrier_arrive_at() { asm volatile("bar.arrive %0, 192;" ::"n"(kId) : "memory"); }
template <int kId>
__device__ __forceinline__ void barrier_sync_at() { asm volatile("bar.sync %0, 192;" ::"n"(kId) : "memory"); }

// Four 8 x 8 blocks; lane l gives the address of row l % 8 of block l / 8.
__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void store_blocks(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ void store_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
        return reinterpret_cast<const uint32_t &>(v);
    } else {
        const __half2 v = __floats2half2_rn(low, high);
        return reinterpret_cast<const uint32_t &>(v);
    }
}
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t v) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
        return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)};
    else
        return __half22float2(reinterpret_cast<const __half2 &>(v));
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace shedder
