// Rows that no tensor map reads well, copied as it wants them: whole chunks of 64 rows that start with lines of L2,
// zeros beyond the elements there are. Rows are the states of C and B of a group, or the channels of x and z of a head.

#pragma once

#include "kernels/dependents.cuh"
#include "kernels/ssd_rows.cuh"

namespace shedder {

struct SsdAlignOperand {
    const uint16_t *from, *end;                              // end: behind the last element in memory
    int64_t batch, time, group;                              // strides in elements
    uint4 *to;                                               // pieces of 8 elements
};

struct SsdAlignParams {
    SsdAlignOperand operands[2];                             // C, B; or x, z
    int length, rows, groups, width;                         // rows: whole chunks; width: elements of a row
    int pieces;                                              // written of each row
    int64_t to_batch, to_time, to_group;                     // in pieces
    int blocks;                                              // of a batch entry and group
};

constexpr int kAlignThreads = 256, kAlignRows = 4;           // of a thread

// kLanes neighbouring threads have one row.
template <int kLanes>
__global__ void __launch_bounds__(kAlignThreads) ssd_align(const __grid_constant__ SsdAlignParams p) {
    wait_for_kernel_before();
    start_dependents();                                      // ssd_fwd waits for the end of this kernel all the same
    constexpr int kStep = kAlignThreads / kLanes;
    const SsdAlignOperand &o = p.operands[blockIdx.y];
    const int entry = blockIdx.x / p.blocks, batch = entry / p.groups, group = entry % p.groups;
    const int piece = threadIdx.x % kLanes;
    const int row0 = blockIdx.x % p.blocks * (kStep * kAlignRows) + threadIdx.x / kLanes;
    if (piece >= p.pieces) return;
    const int in_row = max(min(p.width - piece * 8, 8), 0);
    const uint16_t *const from = o.from + batch * o.batch + group * o.group + piece * 8;
    uint4 *const to = o.to + batch * p.to_batch + group * p.to_group + piece;
    uint4 low[kAlignRows] = {}, high[kAlignRows] = {};
    int skew[kAlignRows], count[kAlignRows];
#pragma unroll
    for (int i = 0; i < kAlignRows; ++i) {
        const int row = row0 + i * kStep;
        count[i] = row < p.length ? in_row : 0;
        const uint16_t *const first = from + row * o.time;
        skew[i] = static_cast<int>(reinterpret_cast<uintptr_t>(first) / 2 & 7);
        const uint4 *const words = reinterpret_cast<const uint4 *>(first - skew[i]);
        if (count[i] > 0 && reinterpret_cast<const uint16_t *>(words + 2) <= o.end) {    // with what lies beside them
            low[i] = words[0];
            if (skew[i] + count[i] > 8) high[i] = words[1];
        } else if (count[i] > 0) {
            uint32_t v[4] = {};
#pragma unroll
            for (int k = 0; k < 8; ++k) v[k / 2] |= (k < count[i] ? uint32_t{first[k]} : 0u) << k % 2 * 16;
            low[i] = {v[0], v[1], v[2], v[3]};
            skew[i] = 0;
        }
    }
#pragma unroll
    for (int i = 0; i < kAlignRows; ++i) {
        const int row = row0 + i * kStep;
        if (row >= p.rows) return;
        uint4 v = joined(low[i], high[i], skew[i]);
        auto keep = [&](uint32_t &word, int first) {
            word &= count[i] >= first + 2 ? 0xffffffffu : count[i] > first ? 0xffffu : 0u;
        };
        keep(v.x, 0), keep(v.y, 2), keep(v.z, 4), keep(v.w, 6);
        to[row * p.to_time] = v;
    }
}

}  // namespace shedder
