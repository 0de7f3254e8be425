// y = x weight^T + bias for a few rows of x: the matrix-vector products of a decode step.
//
// One row of the weight at a time, so that memory sees a single stream (several rows side by side halve the rate),
// for all rows of x while it lies in the first cache. x lies in floats, or in bf16 where this machine multiplies bf16
// pairs and both sides are bf16. The weight is asked for kAhead bytes before its turn: the hardware's prefetcher stops
// at each 4 KiB page. Bound: bytes of the weight.

#include "simd.h"

namespace shedder::cpu::SHEDDER_ISA {
namespace {

constexpr int kSums = 4;          // independent sums, to hide the latency of multiply-add
constexpr int kAhead = 32768;     // 13 to 16 GB/s on a Zen 4 core; 1 to 8 KiB ahead lose instead

SHEDDER_INLINE void ask_ahead(const void *p) { __builtin_prefetch(static_cast<const char *>(p) + kAhead, 0, 2); }

template <typename T>
float dot(const float *x, const typename T::type *weight, int64_t inputs) {
    Vec sums[kSums] = {};
    int64_t i = 0;
    for (; i + kSums * kLanes <= inputs; i += kSums * kLanes)
#pragma GCC unroll 4
        for (int s = 0; s < kSums; ++s) {
            ask_ahead(weight + i + s * kLanes);
            sums[s] += load(x + i + s * kLanes) * T::load(weight + i + s * kLanes);
        }
    for (; i + kLanes <= inputs; i += kLanes) sums[0] += load(x + i) * T::load(weight + i);
    if (i < inputs) sums[1] += load_some<Float>(x + i, inputs - i) * load_some<T>(weight + i, inputs - i);
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

#if defined(__AVX512BF16__)
// Both in bf16: pairs are multiplied and added in one instruction.
float dot_bf16(const uint16_t *x, const uint16_t *weight, int64_t inputs) {
    constexpr int kPairs = 32;
    auto add = [](Vec to, __m512i a, __m512i b) { return (Vec)_mm512_dpbf16_ps((__m512)to, (__m512bh)a, (__m512bh)b); };
    Vec sums[kSums] = {};
    int64_t i = 0;
    for (; i + kSums * kPairs <= inputs; i += kSums * kPairs)
#pragma GCC unroll 4
        for (int s = 0; s < kSums; ++s) {
            ask_ahead(weight + i + s * kPairs);
            sums[s] = add(sums[s], _mm512_loadu_si512(x + i + s * kPairs), _mm512_loadu_si512(weight + i + s * kPairs));
        }
    for (; i + kPairs <= inputs; i += kPairs)
        sums[0] = add(sums[0], _mm512_loadu_si512(x + i), _mm512_loadu_si512(weight + i));
    if (i < inputs) {
        const __mmask32 some = (__mmask32)((1ull << (inputs - i)) - 1);
        sums[1] = add(sums[1], _mm512_maskz_loadu_epi16(some, x + i), _mm512_maskz_loadu_epi16(some, weight + i));
    }
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}
#endif

// One output of one row of x.
float product(const Linear &p, int64_t row, int64_t output) {
    const int64_t x_at = row * p.x.stride[0], weight_at = output * p.weight.stride[0];
    const float *x = static_cast<const float *>(p.x.data) + x_at;
    const uint16_t *half = static_cast<const uint16_t *>(p.weight.data) + weight_at;
#if defined(__AVX512BF16__)
    if (p.x.dtype == Dtype::bf16) return dot_bf16(static_cast<const uint16_t *>(p.x.data) + x_at, half, p.inputs);
#endif
    switch (p.weight.dtype) {
        case Dtype::f32: return dot<Float>(x, static_cast<const float *>(p.weight.data) + weight_at, p.inputs);
        case Dtype::bf16: return dot<BFloat16>(x, half, p.inputs);
        case Dtype::f16: return dot<Float16>(x, half, p.inputs);
    }
    return 0;
}

}  // namespace

void linear(const Linear &p, int64_t begin, int64_t end) {
    constexpr int kRun = 32;                             // outputs converted and written together
    float y[kMaxLinearRows][kRun];
    for (; begin < end; begin += kRun) {
        const int64_t n = end - begin < kRun ? end - begin : kRun;
        for (int64_t i = 0; i < n; ++i) {
            const float bias = p.bias ? read_one(p.bias, (begin + i) * p.bias.stride[0]) : 0.0f;
            for (int64_t m = 0; m < p.rows; ++m) y[m][i] = product(p, m, begin + i) + bias;
        }
        for (int64_t m = 0; m < p.rows; ++m)
            write_row(p.y, m * p.y.stride[0] + begin * p.y.stride[1], p.y.stride[1], n, y[m]);
    }
}

}  // namespace shedder::cpu::SHEDDER_ISA
