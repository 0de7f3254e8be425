// Conversions between the input types and fp32, 16-byte and narrower vectors of them, softplus and SiLU.

#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace shedder {

constexpr float kLog2e = 1.4426950408889634f;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// kCount neighbours in memory, moved by one access.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
    T at[kCount];
};

// exp(x) to 2 ulp: ex2 alone, one multiplication in front.
__device__ inline float fast_exp(float x) { return exp2f(x * kLog2e); }

// log(1 + exp(x)); log1p keeps the small values of very negative x, which log(1 + ...) rounds to zero.
__device__ inline float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }
__device__ inline float silu(float x) { return x / (1.f + expf(-x)); }
// For fewer instructions: ex2 and a reciprocal of 1 ulp. exp(-x) overflows to infinity below -88, where the result is
// -0 as it should be.
__device__ inline float fast_silu(float x) { return __fdividef(x, 1.f + exp2f(-kLog2e * x)); }

}  // namespace shedder
