// RMSNorm over segments of a row, gated before or after.
//
//   norm(v)_c = v_c / sqrt(mean of v^2 over the segment of c + eps of the segment) * weight_c + bias_c
//   y = norm(x silu(z))   or   norm(x) silu(z)
//
// A CTA owns whole rows, one after another; a lane owns the same kVectors times 16 bytes of columns in each of them, so
// weights stay in registers, and the next row is on its way while this one is reduced. Between the sum and the scaling
// a row lives in registers. The part of a segment that falls to one vector of one warp is one partial sum; along the row
// either the vector or the segment moves on from one partial sum to the next, so vector + segment numbers them.
// Bound: bytes of x, z and y.

#pragma once

#include "kernels/pointwise.cuh"
#include "kernels/row_vectors.cuh"

namespace shedder {

constexpr int kMaxSegments = 128;
constexpr int kMaxNormThreads = 1024;

struct GatedRMSNormParams {
    const void *x, *z;                                       // (rows, width), columns adjacent; z may be null
    void *y;                                                 // (rows, width), contiguous
    Parameter weight, bias;
    int64_t weight_stride, bias_stride, x_row_stride, z_row_stride;
    const void *x_end, *z_end;                               // beyond their last element
    int64_t rows;
    int width, segments;
    int bounds[kMaxSegments + 1];                            // columns bounds[s] .. bounds[s+1]-1 are segment s
    float eps[kMaxSegments];
};

// kGeneral: several segments, or a bias.
template <typename T, bool kNormBeforeGate, bool kGeneral, int kVectors, bool kAligned>
__global__ void __launch_bounds__(kMaxNormThreads / kVectors) gated_rmsnorm_fwd(const __grid_constant__ GatedRMSNormParams p) {
    constexpr int kCount = 16 / sizeof(T);
    constexpr int kSpan = 32 * kCount;                       // columns of one vector of one warp
    constexpr unsigned kAll = 0xffffffffu;
    __shared__ float partial[2][kMaxNormThreads / 32 + kMaxSegments];      // of even and odd rows: one barrier for each
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;

    // Vector v of this warp covers columns first[v] .. first[v] + kSpan-1 and touches segments low[v] .. high[v].
    int column[kVectors], low[kVectors], high[kVectors];
    float weight[kVectors][kCount];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        const int first = (v * warps + warp) * kSpan;
        column[v] = first + lane * kCount;
        low[v] = 0;
        while (kGeneral && low[v] + 1 < p.segments && p.bounds[low[v] + 1] <= first) ++low[v];
        high[v] = low[v];
        while (kGeneral && high[v] + 1 < p.segments && p.bounds[high[v] + 1] < min(first + kSpan, p.width)) ++high[v];
    }
    p.weight.visit([&](auto *from) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
#pragma unroll
            for (int i = 0; i < kCount; ++i)
                weight[v][i] = column[v] + i < p.width ? to_float(from[(column[v] + i) * p.weight_stride]) : 0.f;
        }
    });

    const auto x_row = [&](int64_t row) { return static_cast<const T *>(p.x) + row * p.x_row_stride; };
    const auto z_row = [&](int64_t row) { return static_cast<const T *>(p.z) + row * p.z_row_stride; };
    RowVector<T, kCount, kAligned> next_x[kVectors], next_z[kVectors];
    const auto load = [&](int64_t row) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            next_x[v].fetch(x_row(row), column[v], p.width, static_cast<const T *>(p.x_end));
            if (p.z != nullptr) next_z[v].fetch(z_row(row), column[v], p.width, static_cast<const T *>(p.z_end));
        }
    };
    if (blockIdx.x < p.rows) load(blockIdx.x);

    // Opaque to the compiler, which would otherwise keep the comparisons of every column in registers across rows.
    const auto column_now = [&](int v) {
        int c = column[v];
        asm volatile("" : "+r"(c));
        return c;
    };
    int phase = 0;
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x, phase ^= 1) {
        float value[kVectors][kCount];
        Packed<T, kCount> gate[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const Packed<T, kCount> x = next_x[v].get(x_row(row), column[v], p.width);
            if (p.z != nullptr) gate[v] = next_z[v].get(z_row(row), column[v], p.width);
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                value[v][i] = to_float(x.at[i]);
                if (!kNormBeforeGate && p.z != nullptr) value[v][i] *= fast_silu(to_float(gate[v].at[i]));
            }
        }
        if (row + gridDim.x < p.rows) load(row + gridDim.x);

#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            for (int s = low[v]; s <= (kGeneral ? high[v] : 0); ++s) {
                float sum = 0.f;
                const int within = kGeneral ? column_now(v) : 0;
#pragma unroll
                for (int i = 0; i < kCount; ++i)                           // columns beyond the width hold zeros
                    if (!kGeneral || (p.bounds[s] <= within + i && within + i < p.bounds[s + 1]))
                        sum += value[v][i] * value[v][i];
#pragma unroll
                for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
                if (lane == 0) partial[phase][v * warps + warp + s] = sum;
            }
        }
        __syncthreads();

        int known = -1;                                      // the segment that `scale` is of
        float scale = 0.f;
        const auto scale_of = [&](int s) {                   // called by whole warps
            if (s == known) return;
            known = s;
            const int from = p.bounds[s] / kSpan, to = (p.bounds[s + 1] - 1) / kSpan;
            float sum = 0.f;
            for (int i = from + lane; i <= to; i += 32) sum += partial[phase][i + s];
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
            scale = rsqrtf(sum / static_cast<float>(p.bounds[s + 1] - p.bounds[s]) + p.eps[s]);
        };
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            for (int s = low[v]; s <= (kGeneral ? high[v] : 0); ++s) {
                scale_of(s);
                const int within = kGeneral ? column_now(v) : 0;
#pragma unroll
                for (int i = 0; i < kCount; ++i)
                    if (!kGeneral || (p.bounds[s] <= within + i && within + i < p.bounds[s + 1])) value[v][i] *= scale;
            }
            if (kGeneral && p.bias.present()) {
                const int within = column_now(v);
#pragma unroll
                for (int i = 0; i < kCount; ++i)
                    value[v][i] = value[v][i] * weight[v][i]
                        + (within + i < p.width ? p.bias[(within + i) * p.bias_stride] : 0.f);
            } else {
#pragma unroll
                for (int i = 0; i < kCount; ++i) value[v][i] *= weight[v][i];
            }
            Packed<T, kCount> out;
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                if (kNormBeforeGate && p.z != nullptr) value[v][i] *= fast_silu(to_float(gate[v].at[i]));
                out.at[i] = from_float<T>(value[v][i]);
            }
            if ((v * warps + warp) * kSpan < p.width)
                store_row_vector<kAligned>(static_cast<T *>(p.y) + row * p.width, column[v], p.width, out);
        }
    }
}

}  // namespace shedder
