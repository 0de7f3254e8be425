// Rows of C and B, of any pitch, copied as SSD's tiles want them: whole chunks of 64 rows of `columns` states, zeros
// beyond what there is, tokens in the order of the tiles.

#pragma once

#include "kernels/ssd_rows.cuh"

namespace shedder {

struct SsdAlignParams {
    const uint16_t *C, *B;
    int64_t C_strides[3], B_strides[3];                      // batch, time, group: in elements
    uint4 *to;                                               // (C or B, batch, group, token, column)
    int64_t pieces;                                          // of 8 columns, of C or of B
    int length, rows, groups, dstate, columns;               // rows: whole chunks
    bool turns;
};

__global__ void __launch_bounds__(256) ssd_align(const __grid_constant__ SsdAlignParams p) {
    const int64_t piece = blockIdx.x * int64_t{256} + threadIdx.x;
    if (piece >= p.pieces) return;
    const bool is_B = blockIdx.y == 1;
    const int64_t *const strides = is_B ? p.B_strides : p.C_strides;
    const int column = static_cast<int>(piece % (p.columns / 8)) * 8;
    const int64_t row = piece / (p.columns / 8), entry = row / p.rows;       // of all batch entries and groups
    const int at = static_cast<int>(row % p.rows), token = p.turns ? at / 64 * 64 + turned(at % 64) : at;
    const uint16_t *const from = (is_B ? p.B : p.C) + entry / p.groups * strides[0] + token * strides[1]
        + entry % p.groups * strides[2] + column;
    uint32_t v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = token < p.length && column + i < p.dstate ? from[i] : 0;
    p.to[(is_B ? p.pieces : 0) + piece] = {v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16};
}

}  // namespace shedder
