// y = x weight^T + bias for a few rows of x: the matrix-vector products of a decode step.
//
// kRows rows of the weight are read side by side, once for all rows of x (at most kMaxInputRows). x lies in floats, or
// in bf16 where this machine multiplies bf16 pairs and both sides are bf16. Bound: bytes of the weight.

#include "simd.h"

namespace shedder::cpu::SHEDDER_ISA {
namespace {

constexpr int kRows = 4;

template <typename T, int kOutputs>
void outputs(const Linear &p, int64_t first) {
    const typename T::type *weight = static_cast<const typename T::type *>(p.weight.data) + first * p.weight.stride[0];
    const int64_t pitch = p.weight.stride[0];
    for (int64_t m = 0; m < p.rows; ++m) {
        const float *x = static_cast<const float *>(p.x.data) + m * p.x.stride[0];
        Vec sums[kOutputs] = {};
        int64_t i = 0;
        for (; i + kLanes <= p.inputs; i += kLanes) {
            const Vec v = load(x + i);
#pragma GCC unroll 4
            for (int r = 0; r < kOutputs; ++r) sums[r] += v * T::load(weight + r * pitch + i);
        }
        if (i < p.inputs)
            for (int r = 0; r < kOutputs; ++r)
                sums[r] += load_some<Float>(x + i, p.inputs - i) * load_some<T>(weight + r * pitch + i, p.inputs - i);
        float y[kOutputs];
        for (int r = 0; r < kOutputs; ++r)
            y[r] = sum(sums[r]) + (p.bias ? read_one(p.bias, (first + r) * p.bias.stride[0]) : 0.0f);
        write_row(p.y, m * p.y.stride[0] + first * p.y.stride[1], p.y.stride[1], kOutputs, y);
    }
}

#if defined(__AVX512BF16__)
// Both in bf16: pairs are multiplied and added in one instruction. x: rows padded with zeros to 32 elements.
template <int kOutputs>
void outputs_bf16(const Linear &p, int64_t first) {
    const uint16_t *weight = static_cast<const uint16_t *>(p.weight.data) + first * p.weight.stride[0];
    const int64_t pitch = p.weight.stride[0], whole = p.inputs / 32 * 32;
    const __mmask32 rest = (__mmask32)((1ull << (p.inputs - whole)) - 1);
    for (int64_t m = 0; m < p.rows; ++m) {
        const uint16_t *x = static_cast<const uint16_t *>(p.x.data) + m * p.x.stride[0];
        __m512 sums[kOutputs];
        for (int r = 0; r < kOutputs; ++r) sums[r] = _mm512_setzero_ps();
        for (int64_t i = 0; i < whole; i += 32) {
            const __m512bh v = (__m512bh)_mm512_loadu_si512(x + i);
#pragma GCC unroll 4
            for (int r = 0; r < kOutputs; ++r)
                sums[r] = _mm512_dpbf16_ps(sums[r], v, (__m512bh)_mm512_loadu_si512(weight + r * pitch + i));
        }
        if (rest) {
            const __m512bh v = (__m512bh)_mm512_maskz_loadu_epi16(rest, x + whole);
            for (int r = 0; r < kOutputs; ++r)
                sums[r] = _mm512_dpbf16_ps(sums[r], v,
                                           (__m512bh)_mm512_maskz_loadu_epi16(rest, weight + r * pitch + whole));
        }
        float y[kOutputs];
        for (int r = 0; r < kOutputs; ++r)
            y[r] = sum((Vec)sums[r]) + (p.bias ? read_one(p.bias, (first + r) * p.bias.stride[0]) : 0.0f);
        write_row(p.y, m * p.y.stride[0] + first * p.y.stride[1], p.y.stride[1], kOutputs, y);
    }
}
#endif

template <int kOutputs>
void some_outputs(const Linear &p, int64_t first) {
    switch (p.weight.dtype) {
        case Dtype::f32: return outputs<Float, kOutputs>(p, first);
        case Dtype::f16: return outputs<Float16, kOutputs>(p, first);
        case Dtype::bf16:
#if defined(__AVX512BF16__)
            if (p.x.dtype == Dtype::bf16) return outputs_bf16<kOutputs>(p, first);
#endif
            return outputs<BFloat16, kOutputs>(p, first);
    }
}

}  // namespace

void linear(const Linear &p, int64_t begin, int64_t end) {
    for (; begin + kRows <= end; begin += kRows) some_outputs<kRows>(p, begin);
    for (; begin < end; ++begin) some_outputs<1>(p, begin);
}

}  // namespace shedder::cpu::SHEDDER_ISA
