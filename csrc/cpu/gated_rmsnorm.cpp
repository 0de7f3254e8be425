// RMSNorm over each segment of a row, gated by silu(z) before or after the norm.
//
//   norm(v)_c = v_c / sqrt(mean of v^2 over the segment of c + eps of the segment) weight_c + bias_c
//   y = norm(x silu(z))        or, norm before gate,        y = norm(x) silu(z)
//
// Lanes are channels; a row stays in `scratch` between the sum of squares and the scaling. Bound: one exp per element.

#include "simd.h"

namespace shedder::cpu::SHEDDER_ISA {
namespace {

constexpr int kRun = 256;

void norm_segment(const GatedRmsNorm &p, int64_t row, int64_t first, int64_t channels, double eps, float *v) {
    float other[kRun] = {};
    Vec squares = splat(0);
    for (int64_t at = 0; at < channels; at += kRun) {
        const int64_t n = channels - at < kRun ? channels - at : kRun, c = first + at;
        std::memset(v + at + n, 0, sizeof(float) * kLanes);       // lanes beyond the segment add nothing
        read_row(p.x, row * p.x.stride[0] + c * p.x.stride[1], p.x.stride[1], n, v + at);
        if (p.z && !p.norm_before_gate) {
            if (n < kRun) std::memset(other, 0, sizeof other);
            read_row(p.z, row * p.z.stride[0] + c * p.z.stride[1], p.z.stride[1], n, other);
            for (int64_t i = 0; i < n; i += kLanes) store(v + at + i, load(v + at + i) * silu(load(other + i)));
        }
        for (int64_t i = 0; i < n; i += kLanes) {
            const Vec value = load(v + at + i);
            squares += value * value;
        }
    }
    const double mean = static_cast<double>(sum(squares)) / static_cast<double>(channels);
    const Vec scale = splat(static_cast<float>(1.0 / __builtin_sqrt(mean + eps)));
    for (int64_t at = 0; at < channels; at += kRun) {
        const int64_t n = channels - at < kRun ? channels - at : kRun, c = first + at;
        float y[kRun] = {};
        read_row(p.weight, c * p.weight.stride[0], p.weight.stride[0], n, other);
        for (int64_t i = 0; i < n; i += kLanes) store(y + i, load(v + at + i) * scale * load(other + i));
        if (p.bias) {
            read_row(p.bias, c * p.bias.stride[0], p.bias.stride[0], n, other);
            for (int64_t i = 0; i < n; i += kLanes) store(y + i, load(y + i) + load(other + i));
        }
        if (p.z && p.norm_before_gate) {
            read_row(p.z, row * p.z.stride[0] + c * p.z.stride[1], p.z.stride[1], n, other);
            for (int64_t i = 0; i < n; i += kLanes) store(y + i, load(y + i) * silu(load(other + i)));
        }
        write_row(p.y, row * p.y.stride[0] + c * p.y.stride[1], p.y.stride[1], n, y);
    }
}

}  // namespace

void gated_rmsnorm(const GatedRmsNorm &p, float *scratch, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
        for (int64_t s = 0, first = 0; s < p.segment_count; first += p.segments[s++])
            norm_segment(p, row, first, p.segments[s], p.eps[s], scratch);
}

}  // namespace shedder::cpu::SHEDDER_ISA
