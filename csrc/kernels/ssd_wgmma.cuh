// The tensor core of Hopper, as SSD uses it: wgmma with 16-bit operands and fp32 sums, tiles of 64 rows of 128 bytes
// in the 128-byte swizzle, fragments moved between registers and shared memory.
//
// One tile serves both ways round: rows as the reduced dimension ("transposed", MN-major) or as the other (K-major).

#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/copy_engine.cuh"

namespace shedder {

constexpr int kTileRows = 64;
constexpr int kTileBytes = kTileRows * 128;               // 64 columns of 16 bits; wider operands take several tiles

// Byte of a tile (or of a row of tiles, for byte >= 128) at which byte `byte` of row `row` lies.
__device__ __forceinline__ uint32_t tile_offset(int row, int byte) {
    return (byte >> 7) * kTileBytes + row * 128 + (((byte >> 4 & 7) ^ (row & 7)) << 4) + (byte & 15);
}

// Descriptor of an operand that starts at a shared address: 128-byte swizzle, 1024 bytes from one 8 rows to the next.
// Not wider than one tile along the swizzled dimension, so the leading offset is never used. The lower word: the upper
// one is the same in all, and put beside it where a product is issued, else the compiler carries additions into it.
__device__ __forceinline__ uint32_t descriptor(uint32_t address) { return 1u << 16 | (address & 0x3ffff) >> 4; }
#define SHEDDER_UPPER_WORD "0x40000040"

// The descriptor of an operand `bytes` further on.
__device__ __forceinline__ uint32_t later(uint32_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

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
    asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, " FLAG ", 0;\n"                                  \
                 "mov.b64 b, {" B ", " SHEDDER_UPPER_WORD "};\n"                                                   \
                 "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE                                    \
                 " {" SUMS "}, {" A "}, b, p, 1, 1, " TRANSPOSED ";\n}"                                            \
                 : __VA_ARGS__                                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(static_cast<int>(accumulate)), "r"(b),          \
                   "n"(kTransposed))

template <typename T, int kN, int kTransposed>
__device__ __forceinline__ void wgmma_rs(float *d, const uint32_t *a, uint32_t b, bool accumulate) {
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
    asm volatile("{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %34, 0;\n"                                    \
                 "mov.b64 a, {%32, " SHEDDER_UPPER_WORD "};\nmov.b64 b, {%33, " SHEDDER_UPPER_WORD "};\n"           \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                        \
                 " {" SHEDDER_R0 "," SHEDDER_R1 "," SHEDDER_R2 "," SHEDDER_R3 "}, a, b, p, 1, 1, 0, 0;\n}"         \
                 : SHEDDER_OUT8(d, 0), SHEDDER_OUT8(d, 8), SHEDDER_OUT8(d, 16), SHEDDER_OUT8(d, 24)                \
                 : "r"(a), "r"(b), "r"(static_cast<int>(accumulate)))

template <typename T>
__device__ __forceinline__ void wgmma_ss(float *d, uint32_t a, uint32_t b, bool accumulate) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        SHEDDER_WGMMA_SS("bf16");
    } else {
        SHEDDER_WGMMA_SS("f16");
    }
}

#undef SHEDDER_WGMMA_SS
#undef SHEDDER_WGMMA_RS
#undef SHEDDER_BY_WIDTH

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// A word in memory that stands for what was written before it.
__device__ __forceinline__ void release(uint64_t *word, uint64_t value) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}
__device__ __forceinline__ uint64_t acquire(const uint64_t *word) {
    uint64_t value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
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
