// Conversions between the input types and fp32, softplus and SiLU.

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

// A tensor of parameters, read seldom enough that its type may be found at run time.
enum class FloatKind : int { kNone, kFloat, kHalf, kBFloat16 };

struct Parameter {
    const void *data;
    FloatKind kind;                                          // kNone: the argument is absent
    __host__ __device__ bool present() const { return kind != FloatKind::kNone; }
    // use(typed pointer), unless absent: one branch, so that all loads within are on their way together.
    template <typename Use>
    __device__ void visit(Use use) const {
        switch (kind) {
            case FloatKind::kFloat: return use(static_cast<const float *>(data));
            case FloatKind::kHalf: return use(static_cast<const __half *>(data));
            case FloatKind::kBFloat16: return use(static_cast<const __nv_bfloat16 *>(data));
            default: return;
        }
    }
    __device__ float operator[](int64_t i) const {
        switch (kind) {
            case FloatKind::kFloat: return static_cast<const float *>(data)[i];
            case FloatKind::kHalf: return to_float(static_cast<const __half *>(data)[i]);
            case FloatKind::kBFloat16: return to_float(static_cast<const __nv_bfloat16 *>(data)[i]);
            default: return 0.f;
        }
    }
};

// 2^x in one instruction; results below 2^-126 are zero.
__device__ inline float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// log(1 + exp(x)); log1p keeps the small values of very negative x, which log(1 + ...) rounds to zero.
__device__ inline float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }
// The same with ex2 and lg2: by the series of log(1 + e) where e = exp(x) is small, good to 3e-6 of the result.
__device__ inline float fast_softplus(float x) {
    const float e = fast_exp2(kLog2e * x);
    const float series = e * fmaf(e, fmaf(e, fmaf(e, fmaf(e, 0.2f, -0.25f), 1.f / 3.f), -0.5f), 1.f);
    float log2;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2) : "f"(1.f + e));
    return x > 20.f ? x : e < 0.0625f ? series : log2 * (1.f / kLog2e);
}
__device__ inline float silu(float x) { return x / (1.f + expf(-x)); }

// The same with ex2 and a reciprocal of 1 ulp. Below -88 the exponential is infinite and the result -0.
__device__ inline float fast_silu(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.f + fast_exp2(-kLog2e * x)));
    return x * r;
}

// SiLU of 2 x whose result is stored as T. For bf16 by tanh: two instructions, off by at most |x| 2^-11.
template <typename T>
__device__ inline float silu_of_half(float x) { return fast_silu(2.f * x); }
template <>
__device__ inline float silu_of_half<__nv_bfloat16>(float x) {
    float tanh;
    asm("tanh.approx.f32 %0, %1;" : "=f"(tanh) : "f"(x));
    return fmaf(x, tanh, x);
}
template <typename T>
__device__ inline float silu_for(float x) { return fast_silu(x); }
template <>
__device__ inline float silu_for<__nv_bfloat16>(float x) { return silu_of_half<__nv_bfloat16>(0.5f * x); }

}  // namespace shedder
