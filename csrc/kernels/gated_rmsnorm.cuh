// RMSNorm over segments of a row, gated before or after.
//
//   norm(v)_c = v_c / sqrt(mean of v^2 over the segment of c + eps of the segment) * weight_c + bias_c
//   y = norm(x silu(z))   or   norm(x) silu(z)
//
// A CTA owns whole rows, one after another. kLanes neighbouring lanes form a group that owns the same columns of one
// segment in each row, kVectors times 16 bytes for a lane, so that weights stay in registers; the next row is on its
// way while this one is reduced, and between the sum and the scaling a row lives in registers. Each group has one
// partial sum.
// Rows and segments off the 16-byte grid: the groups of a segment start at the line of memory that its first channel lies
// in, or at the sector of L2 where more threads were needed for lines: what two warps share of a sector would be read,
// and written in part, by both. The launcher makes the distance between a CTA's rows a multiple of that, so that all lie
// alike.
// Bound: bytes of x, z and y.

#pragma once

#include "kernels/dependents.cuh"
#include "kernels/pointwise.cuh"
#include "kernels/row_vectors.cuh"

namespace shedder {

constexpr int kMaxSegments = 128;
constexpr int kMaxNormThreads = 512;
constexpr int kMostNormVectors = 2;                          // of one thread
constexpr int kSegmentLanes = 8;                             // of a group where a row has several segments

struct GatedRMSNormParams {
    const void *x, *z;                                       // (rows, width), columns adjacent; z may be null
    void *y;                                                 // (rows, width), contiguous
    Parameter weight, bias;
    int64_t weight_stride, bias_stride, x_row_stride, z_row_stride;
    int64_t rows, inner_rows;                                // inner: whose words of the grid lie within x and z
    int width, segments, step;                               // step: columns of memory that a segment's groups start at
    int bounds[kMaxSegments + 1];                            // columns bounds[s] .. bounds[s+1]-1 are segment s
    int groups[kMaxSegments + 1];                            // and groups[s] .. groups[s+1]-1 own them
    float inverse[kMaxSegments], eps[kMaxSegments];          // 1 / channels, and eps, of each segment
};

// kGrid: of x and z as seen from y. kBias: with a bias, which the launcher gives to the most general variant alone.
template <typename T, bool kNormBeforeGate, int kLanes, Grid kGrid, bool kBias, int kVectors>
__global__ void __launch_bounds__(kMaxNormThreads) gated_rmsnorm_fwd(const __grid_constant__ GatedRMSNormParams p) {
    constexpr int kCount = 16 / sizeof(T);
    constexpr int kWarpGroups = 32 / kLanes;
    constexpr unsigned kAll = 0xffffffffu;
    __shared__ float partial[2][kMaxNormThreads / kLanes * kVectors];      // of even and odd rows: one barrier for each
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const T *x = static_cast<const T *>(p.x), *z = static_cast<const T *>(p.z);
    T *y = static_cast<T *>(p.y);

    // Vector v of this lane: the kCount columns from column[v] on; its segment has those whose bit is set in own[v].
    int segment[kVectors], column[kVectors];
    unsigned own[kVectors];
    float weight[kVectors][kCount];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        const int group = (v * warps + warp) * kWarpGroups + lane / kLanes;
        int s = 0;
        while (s + 1 < p.segments && p.groups[s + 1] <= group) ++s;
        segment[v] = s;
        const int begin = p.bounds[s], end = p.bounds[s + 1];
        column[v] = begin + ((group - p.groups[s]) * kLanes + lane % kLanes) * kCount;
        if (kGrid != Grid::kWhole) {
            const uintptr_t first = reinterpret_cast<uintptr_t>(y + blockIdx.x * int64_t{p.width} + begin);
            column[v] -= static_cast<int>(first / sizeof(T)) & (p.step - 1);
        }
        own[v] = 0;
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            if (begin <= column[v] + i && column[v] + i < end) own[v] |= 1u << i;
        asm volatile("" : "+r"(column[v]), "+r"(own[v]));    // kept, not computed again for every row
    }
    constexpr unsigned kOwnsAll = (1u << kCount) - 1;
    const auto apply = [](const Packed<T, kCount> &gate, float (&values)[kCount]) {
        float gates[kCount];
        gate.get(gates);
#pragma unroll
        for (int i = 0; i < kCount; ++i) values[i] *= silu_for<T>(gates[i]);
    };
    const auto owns = [&](int v, int i) { return (own[v] >> i & 1) != 0; };
    const auto stays_inside = [&](int v) {                   // its words hold nothing beyond a row
        return kGrid == Grid::kWhole || (kGrid == Grid::kSame && own[v] == kOwnsAll);
    };
    RowVector<T, kCount, kGrid> next_x[kVectors], next_z[kVectors];
    const auto load = [&](int64_t row, int v) {
        // No branch here: what follows one waits for its loads.
        const bool exists = own[v] != 0 && row < p.rows && (row < p.inner_rows || stays_inside(v));
        next_x[v].fetch(x + row * p.x_row_stride + column[v], exists);
        next_z[v].fetch(z + row * p.z_row_stride + column[v], exists && z != nullptr);
    };
    wait_for_kernel_before();
#pragma unroll
    for (int v = 0; v < kVectors; ++v) load(blockIdx.x, v);  // before the weights, which are waited for
    p.weight.visit([&](auto *from) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
#pragma unroll
            for (int i = 0; i < kCount; ++i)
                weight[v][i] = owns(v, i) ? to_float(from[(column[v] + i) * p.weight_stride]) : 0.f;
        }
    });

    int phase = 0;
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x, phase ^= 1) {
        float value[kVectors][kCount];
        Packed<T, kCount> gate[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const T *from = x + row * p.x_row_stride + column[v], *gate_from = z + row * p.z_row_stride + column[v];
            Packed<T, kCount> here = next_x[v].get(from);
            gate[v] = next_z[v].get(gate_from);
            if (kGrid != Grid::kWhole && row >= p.inner_rows && !stays_inside(v)) {
#pragma unroll
                for (int i = 0; i < kCount; ++i) {
                    if (owns(v, i)) {
                        here.at[i] = from[i];
                        if (z != nullptr) gate[v].at[i] = gate_from[i];
                    }
                }
            }
            here.get(value[v]);
            if (!kNormBeforeGate && z != nullptr) apply(gate[v], value[v]);
            if (kGrid != Grid::kWhole && own[v] != kOwnsAll) {
#pragma unroll
                for (int i = 0; i < kCount; ++i)
                    if (!owns(v, i)) value[v][i] = 0.f;
            }
            load(row + gridDim.x, v);
        }

#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            float sum = 0.f;
#pragma unroll
            for (int i = 0; i < kCount; ++i) sum += value[v][i] * value[v][i];
#pragma unroll
            for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
            if (lane % kLanes == 0) partial[phase][(v * warps + warp) * kWarpGroups + lane / kLanes] = sum;
        }
        __syncthreads();

#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            float sum = 0.f;
            const int end = p.groups[segment[v] + 1];
#pragma unroll 1
            for (int i = p.groups[segment[v]] + lane % kLanes; i < end; i += kLanes) sum += partial[phase][i];
#pragma unroll
            for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
            const float scale = rsqrtf(fmaf(sum, p.inverse[segment[v]], p.eps[segment[v]]));
#pragma unroll
            for (int i = 0; i < kCount; ++i) value[v][i] *= scale * weight[v][i];
            if constexpr (kBias) {
                int c = column[v];
                asm volatile("" : "+r"(c));                  // no addresses kept in registers over the loop
                p.bias.visit([&](auto *from) {
#pragma unroll
                    for (int i = 0; i < kCount; ++i)
                        if (owns(v, i)) value[v][i] += to_float(from[(c + i) * p.bias_stride]);
                });
            }
            if (kNormBeforeGate && z != nullptr) apply(gate[v], value[v]);
            Packed<T, kCount> out;
            out.set(value[v]);
            T *to = y + row * p.width + column[v];
            if (own[v] == kOwnsAll) {
                *reinterpret_cast<typename Packed<T, kCount>::Word *>(to) = out.word;
            } else if (kGrid != Grid::kWhole) {
#pragma unroll
                for (int i = 0; i < kCount; ++i)
                    if (owns(v, i)) to[i] = out.at[i];
            }
        }
    }
}

}  // namespace shedder
