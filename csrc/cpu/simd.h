// A vector of floats as wide as this instruction set, its elementary functions, and rows and tiles of any dtype.
//
// Accuracy, relative: exp2 and exp 2e-7 for results in [2^-126, 2^127]; smaller ones may become 0, larger ones infinity;
// NaN stays NaN. softplus and silu 4e-7.

#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

#ifndef SHEDDER_ISA
#define SHEDDER_ISA base
#endif

namespace shedder::cpu::SHEDDER_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kBlock = 16;        // states kept in registers; 32 vector registers
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kBlock = 8;
#else
constexpr int kLanes = 4;
constexpr int kBlock = 8;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));

#define SHEDDER_INLINE static inline __attribute__((always_inline))

SHEDDER_INLINE Vec splat(float v) { return v - Vec{}; }              // + would turn -0 into 0, so it would not fold away

SHEDDER_INLINE Vec load(const float *p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

SHEDDER_INLINE void store(float *p, Vec v) { std::memcpy(p, &v, sizeof v); }

SHEDDER_INLINE Vec bits_to_float(IntVec v) {
    Vec f;
    std::memcpy(&f, &v, sizeof f);
    return f;
}

SHEDDER_INLINE IntVec float_to_bits(Vec v) {
    IntVec i;
    std::memcpy(&i, &v, sizeof i);
    return i;
}

// a where a > b, else b: b where either is NaN. GCC makes no max instruction of the ternary.
#if defined(__AVX512F__)
SHEDDER_INLINE Vec maximum(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
SHEDDER_INLINE Vec minimum(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX__)
SHEDDER_INLINE Vec maximum(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
SHEDDER_INLINE Vec minimum(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
#else
SHEDDER_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
SHEDDER_INLINE Vec minimum(Vec a, Vec b) { return a < b ? a : b; }
#endif

SHEDDER_INLINE float sum(Vec v) {
#if defined(__AVX512F__)
    const auto v8 = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    const auto v4 = __builtin_shufflevector(v8, v8, 0, 1, 2, 3) + __builtin_shufflevector(v8, v8, 4, 5, 6, 7);
#elif defined(__AVX__)
    const auto v4 = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
    const auto v4 = v;
#endif
    return (v4[0] + v4[2]) + (v4[1] + v4[3]);
}

// 2^k r for integral k, given as kf = k + 1.5 * 2^23: k goes to the exponent, where -127 makes 0 and 128 infinity.
SHEDDER_INLINE Vec scale_by_power(Vec r, Vec kf) { return r * bits_to_float((float_to_bits(kf) + 127) << 23); }

// 2^r for r in [-1/2, 1/2] (coefficients: Cephes, exp2f).
SHEDDER_INLINE Vec exp2_unit(Vec r) {
    Vec p = splat(1.535336188319500e-4f);
    p = p * r + 1.339887440266574e-3f;
    p = p * r + 9.618437357674640e-3f;
    p = p * r + 5.550332471162809e-2f;
    p = p * r + 2.402264791363012e-1f;
    p = p * r + 6.931472028550421e-1f;
    return p * r + 1.0f;
}

SHEDDER_INLINE Vec exp2(Vec x) {
#if defined(__AVX512F__)
    x = maximum(splat(-200.0f), minimum(splat(200.0f), x));
    const __m512 k = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
    return (Vec)_mm512_scalef_ps((__m512)exp2_unit(x - (Vec)k), k);
#else
    const Vec magic = splat(12582912.0f);                                  // 1.5 * 2^23: adding it rounds to integers
    x = maximum(splat(-127.0f), minimum(splat(128.0f), x));
    const Vec kf = x + magic;
    return scale_by_power(exp2_unit(x - (kf - magic)), kf);
#endif
}

SHEDDER_INLINE Vec exp(Vec x) {
    const Vec magic = splat(12582912.0f);
    x = maximum(splat(-88.1f), minimum(splat(88.8f), x));
    const Vec kf = x * 1.44269504088896341f + magic;
    const Vec k = kf - magic;
    Vec r = x - k * 0.693359375f;
    r = r + k * 2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return scale_by_power(p, kf);
}

// log(1 + e) for e in [0, 1], as 2 atanh(e / (2 + e)).
SHEDDER_INLINE Vec log1p_unit(Vec e) {
    const Vec s = e / (2.0f + e), q = s * s;
    Vec p = splat(2.0f / 15);
    p = p * q + 2.0f / 13;
    p = p * q + 2.0f / 11;
    p = p * q + 2.0f / 9;
    p = p * q + 2.0f / 7;
    p = p * q + 2.0f / 5;
    p = p * q + 2.0f / 3;
    return s * (p * q) + 2.0f * s;
}

SHEDDER_INLINE Vec softplus(Vec x) {
    const Vec magnitude = bits_to_float(float_to_bits(x) & 0x7fffffff);
    return maximum(splat(0.0f), x) + log1p_unit(exp(-magnitude));
}

SHEDDER_INLINE Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

// One element and one vector of each dtype.
struct Float {
    typedef float type;
    SHEDDER_INLINE Vec load(const float *p) { return SHEDDER_ISA::load(p); }
    SHEDDER_INLINE void store(float *p, Vec v) { SHEDDER_ISA::store(p, v); }
};

struct BFloat16 {
    typedef uint16_t type;
    SHEDDER_INLINE Vec load(const uint16_t *p) {
        HalfVec h;
        std::memcpy(&h, p, sizeof h);
        return bits_to_float(__builtin_convertvector(h, IntVec) << 16);
    }
    SHEDDER_INLINE void store(uint16_t *p, Vec v) {
#if defined(__AVX512BF16__)
        const __m256bh h = _mm512_cvtneps_pbh((__m512)v);                  // note: flushes subnormals to 0
        std::memcpy(p, &h, sizeof h);
#else
        IntVec i = float_to_bits(v);
        const IntVec rounded = i + 0x7fff + ((i >> 16) & 1);               // to nearest even
        i = (v == v) ? rounded : (i | 0x400000);                           // a NaN must not round to infinity
        const HalfVec h = __builtin_convertvector((i >> 16) & 0xffff, HalfVec);
        std::memcpy(p, &h, sizeof h);
#endif
    }
};

struct Float16 {
    typedef uint16_t type;
    SHEDDER_INLINE Vec load(const uint16_t *p) {
        HalfVec h;
        std::memcpy(&h, p, sizeof h);
        const IntVec i = __builtin_convertvector(h, IntVec);
        const Vec finite = bits_to_float((i & 0x7fff) << 13) * 5.192296858534828e33f;      // 2^112, subnormals too
        const Vec magnitude = ((i & 0x7c00) == 0x7c00) ? bits_to_float(((i & 0x3ff) << 13) | 0x7f800000) : finite;
        return bits_to_float(float_to_bits(magnitude) | ((i & 0x8000) << 16));
    }
    SHEDDER_INLINE void store(uint16_t *p, Vec v) {
        const IntVec i = float_to_bits(v), magnitude = i & 0x7fffffff;
        const IntVec normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
        const IntVec tiny = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;   // below 2^-14: rounds at 2^-24
        IntVec h = (magnitude < 0x38800000) ? tiny : normal;
        h = (magnitude >= 0x477ff000) ? (IntVec{} + 0x7c00) : h;                           // 65520 and more
        h = (magnitude > 0x7f800000) ? (IntVec{} + 0x7e00) : h;
        const HalfVec out = __builtin_convertvector(h | ((i >> 16) & 0x8000), HalfVec);
        std::memcpy(p, &out, sizeof out);
    }
};

// The first n < kLanes elements; the other lanes are 0.
template <typename T>
SHEDDER_INLINE Vec load_some(const typename T::type *p, int64_t n) {
    typename T::type some[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) some[i] = p[i];
    return T::load(some);
}

template <>
inline __attribute__((always_inline)) Vec load_some<Float>(const float *p, int64_t n) {
#if defined(__AVX512F__)
    return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
    float some[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) some[i] = p[i];
    return load(some);
#endif
}

template <typename T>
SHEDDER_INLINE void store_some(typename T::type *p, Vec v, int64_t n) {
    typename T::type some[kLanes];
    T::store(some, v);
    for (int64_t i = 0; i < n; ++i) p[i] = some[i];
}

template <>
inline __attribute__((always_inline)) void store_some<Float>(float *p, Vec v, int64_t n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
    float some[kLanes];
    store(some, v);
    for (int64_t i = 0; i < n; ++i) p[i] = some[i];
#endif
}

template <typename T>
SHEDDER_INLINE void read_row(const typename T::type *p, int64_t stride, int64_t n, float *out) {
    int64_t i = 0;
    if (stride == 1) {
        for (; i + kLanes <= n; i += kLanes) store(out + i, T::load(p + i));
        if (i < n) store_some<Float>(out + i, load_some<T>(p + i, n - i), n - i);
        return;
    }
    for (; i < n; i += kLanes) {
        typename T::type some[kLanes] = {};
        const int64_t m = n - i < kLanes ? n - i : kLanes;
        for (int64_t j = 0; j < m; ++j) some[j] = p[(i + j) * stride];
        store_some<Float>(out + i, T::load(some), m);
    }
}

template <typename T>
SHEDDER_INLINE void write_row(typename T::type *p, int64_t stride, int64_t n, const float *in) {
    int64_t i = 0;
    if (stride == 1) {
        for (; i + kLanes <= n; i += kLanes) T::store(p + i, load(in + i));
        if (i < n) store_some<T>(p + i, load_some<Float>(in + i, n - i), n - i);
        return;
    }
    for (; i < n; i += kLanes) {
        typename T::type some[kLanes];
        const int64_t m = n - i < kLanes ? n - i : kLanes;
        T::store(some, load_some<Float>(in + i, m));
        for (int64_t j = 0; j < m; ++j) p[(i + j) * stride] = some[j];
    }
}

// n elements from `offset`, `stride` apart, as floats; and back.
static inline void read_row(const Array &a, int64_t offset, int64_t stride, int64_t n, float *out) {
    switch (a.dtype) {
        case Dtype::f32: return read_row<Float>(static_cast<const float *>(a.data) + offset, stride, n, out);
        case Dtype::bf16: return read_row<BFloat16>(static_cast<const uint16_t *>(a.data) + offset, stride, n, out);
        case Dtype::f16: return read_row<Float16>(static_cast<const uint16_t *>(a.data) + offset, stride, n, out);
    }
}

static inline void write_row(const Array &a, int64_t offset, int64_t stride, int64_t n, const float *in) {
    switch (a.dtype) {
        case Dtype::f32: return write_row<Float>(static_cast<float *>(a.data) + offset, stride, n, in);
        case Dtype::bf16: return write_row<BFloat16>(static_cast<uint16_t *>(a.data) + offset, stride, n, in);
        case Dtype::f16: return write_row<Float16>(static_cast<uint16_t *>(a.data) + offset, stride, n, in);
    }
}

static inline float read_one(const Array &a, int64_t offset) {
    if (a.dtype == Dtype::f32) return static_cast<const float *>(a.data)[offset];
    float v = 0;
    read_row(a, offset, 1, 1, &v);
    return v;
}

static inline bool consecutive(const int64_t *offsets, int64_t n) {
    for (int64_t c = 1; c < n; ++c)
        if (offsets[c] != offsets[0] + c) return false;
    return true;
}

// tile[t][c] = a[base + t * stride + offsets[c]] for t < length, c < count; lanes from count to kWidth become 0.
template <int kWidth>
static void read_tile(const Array &a, int64_t base, const int64_t *offsets, int64_t count, int64_t stride,
                      int64_t length, float *tile) {
    if (count < kWidth)
        for (int64_t t = 0; t < length; ++t)
            for (int64_t c = count; c < kWidth; ++c) tile[t * kWidth + c] = 0;
    if (consecutive(offsets, count)) {
        for (int64_t t = 0; t < length; ++t)
            read_row(a, base + t * stride + offsets[0], 1, count, tile + t * kWidth);
        return;
    }
    constexpr int kRun = 64;
    float row[kRun];
    for (int64_t c = 0; c < count; ++c)
        for (int64_t first = 0; first < length; first += kRun) {
            const int64_t n = length - first < kRun ? length - first : kRun;
            read_row(a, base + first * stride + offsets[c], stride, n, row);
            for (int64_t t = 0; t < n; ++t) tile[(first + t) * kWidth + c] = row[t];
        }
}

template <int kWidth>
static void write_tile(const Array &a, int64_t base, const int64_t *offsets, int64_t count, int64_t stride,
                       int64_t length, const float *tile) {
    if (consecutive(offsets, count)) {
        for (int64_t t = 0; t < length; ++t)
            write_row(a, base + t * stride + offsets[0], 1, count, tile + t * kWidth);
        return;
    }
    constexpr int kRun = 64;
    float row[kRun];
    for (int64_t c = 0; c < count; ++c)
        for (int64_t first = 0; first < length; first += kRun) {
            const int64_t n = length - first < kRun ? length - first : kRun;
            for (int64_t t = 0; t < n; ++t) row[t] = tile[(first + t) * kWidth + c];
            write_row(a, base + first * stride + offsets[c], stride, n, row);
        }
}

}  // namespace shedder::cpu::SHEDDER_ISA
