// What each CTA of ssd_fwd takes of the heads, and how these lie in memory.
//
// A cluster takes its heads in rounds, neighbours side by side, so that what they read lies together in L2. What is
// left over after the last full round is taken in parts by several clusters, one after another along the sequence: the
// first before all else, the last after all else, those between in the middle of another head, so that nobody waits.
// Where more is left than could be halved, a chain of m units is cut among m + 1 clusters, each of which takes the end
// of one unit and the start of the next: starts get shorter along the chain.
// Where there are few heads, a cluster takes a segment of its heads instead: it leaves the states that the segment ends
// with if zeros come before it, adds up what those of all segments before it decay to, and only then walks along its
// chunks for y. Where there are a few heads more than multiprocessors, the first ones are taken whole, and the others in
// segments beside them. States wait in `carry`. A cluster waits only for those of lower numbers, which begin before it.

#pragma once

#include <cstdint>

#include <cuda.h>

namespace shedder {

struct SsdStrides {                                          // in elements
    int64_t batch, time, head;                               // or group
};

// Tensor maps of x or z: (batch, token, column).
struct SsdOperand {
    CUtensorMap map, rest;                                   // boxes of 64 columns; of the 8 columns behind them
    int first, head;                                         // columns: of the first head, from head to head
    int piece;                                               // columns at whose multiples boxes, or words, begin
    int batch, batches;                                      // columns between batch entries and 0, or 0 and 1
};

// What the copy engine stores y in, where it does.
enum class SsdBoxesOfY : int {
    kNone,
    kHeads,                                                  // boxes of the first map, each of one head
    kPairs,                                                  // of two neighbours, the CTAs of a cluster: SsdPairRows
};

struct SsdParams {
    CUtensorMap C, B;                                        // (batch, group, row, state): Input; a share of 64 rows
    SsdOperand x, z;                                         // Input; z where has_z
    CUtensorMap y_maps[3];                                   // kHeads: the first, (batch, token, y_columns each, column).
                                                             // kPairs: (batch, token, 0, column), in boxes of one
                                                             // piece fewer than headdim / 8, of as many, of one more
    bool has_z;
    const char *x_words;                                     // x, where words of `piece` columns come instead of boxes;
    SsdStrides x_strides;                                    // else null
    const void *dt;                                          // Input, or float where dt_float
    const float *A, *D, *dt_bias, *initial;                  // all but A may be null; initial as final_states
    const int32_t *runs;                                     // (batch, time), ~run for padding; may be null
    const int32_t *head_to_group;
    void *y;                                                 // (batch, time, head, channel)
    SsdBoxesOfY y_boxes;
    int y_columns;                                           // kHeads: that boxes end with, a head or a tile
    float *final_states;                                     // (batch, head, channel, state); may be null
    float *carry;                                            // states that CTAs leave to others, or to themselves
    uint64_t *is_left;                                       // of each state, for each CTA that takes it: `call`, once
    uint64_t call;                                           // the state is left; whatever else is in memory before
    int takers;                                              // that there are words for
    SsdStrides dt_strides;
    int64_t A_stride, D_head_stride, D_channel_stride, dt_bias_stride;
    float dt_min, dt_max;
    int length, heads, headdim, dstate;
    int mixed_headdim;                                       // where the channels of all heads are taken for those of
                                                             // one, channels of each; else 0
    int tile, tiles;                                         // channels in a tile, 64 at most; tiles of a head
    int states;                                              // batch * heads * tiles
    int cluster;                                             // CTAs that take neighbouring states, a unit of them
    int units;                                               // of states; the last may repeat its last state
    int clusters, rounds;                                    // rounds of whole units
    int left, parts;                                         // units left over, and the parts that each is taken in
    int chain;                                               // units of a chain; 0: there are none
    int apart;                                               // from the cluster of a part to that of the next
    int segment_chunks;                                      // where clusters take segments of units; else 0
    int whole;                                               // units before those, each taken by one cluster
    bool dt_softplus, dt_float;
};

constexpr int kChunk = 64;

// Where a CTA stands in the grid, and what its cluster takes of units left over. Lies in shared memory: registers are
// short.
struct SsdPlace {
    int number, rank;                                        // of the cluster, and in it
    int start;                                               // chunks that it takes of one before all else; 0: none
    int end;                                                 // the chunk from which on it takes one after all else; 0: none
    int between, resumes;                                    // the part that it takes in the middle of another head, and
                                                             // the first chunk of that head behind it; 0: none
};

__device__ __forceinline__ SsdPlace place_of(const SsdParams &p, int cta) {
    const int chunks = (p.length + kChunk - 1) / kChunk;
    SsdPlace place{cta / p.cluster, cta % p.cluster, 0, 0, 0, 0};
    if (p.left == 0) return place;
    const int at = place.number / p.apart;                   // in a chain, or among the parts of a unit
    if (p.chain > 0) {
        const auto cut = [&](int at) { return (p.chain - at) * chunks / (p.chain + 1); };
        if (at < p.chain && place.number < p.left) place.start = cut(at);
        if (at > 0 && place.number - p.apart < p.left) place.end = cut(at - 1);
    } else if (at == 0) {
        place.start = chunks / p.parts;
    } else if (at == p.parts - 1) {
        place.end = at * chunks / p.parts;
    } else if (at < p.parts) {
        place.between = at;
        place.resumes = at * chunks / (p.parts - 1);
    }
    return place;
}

struct SsdPiece {                                            // chunks of one head (of one of its tiles)
    int unit, state, first, last;
    int takes, leaves;                                       // places of the states before and behind; -1: none
    int taken, apart;                                        // segments before: their number, from place to place
};

__device__ __forceinline__ int pieces_of(const SsdParams &p, const SsdPlace &place) {
    return p.rounds + (place.start > 0) + (place.end > 0) + (place.between > 0 ? 2 : 0);     // that, and a head in two
}

__device__ __forceinline__ SsdPiece piece_of(const SsdParams &p, const SsdPlace &place, int piece) {
    const int chunks = (p.length + kChunk - 1) / kChunk, number = place.number;
    SsdPiece of{number, 0, 0, chunks, -1, -1, 1, 0};
    int takes = -1, leaves = -1;                             // of clusters
    if (p.segment_chunks > 0) {
        const int cut = p.units - p.whole, at = number - p.whole;
        if (at >= 0) {
            of.unit = p.whole + at % cut;
            of.taken = at / cut;
            of.apart = cut * p.cluster;
            of.first = at / cut * p.segment_chunks;
            of.last = min(of.first + p.segment_chunks, chunks);
            takes = at - cut;
            leaves = of.last < chunks ? at : -1;
        }
    } else {
        const int left = p.rounds * p.clusters;              // the first unit left over
        const bool interrupted = place.between > 0;
        const int own = piece - (place.start > 0);
        if (own < 0) {
            of.unit = left + number;
            of.last = place.start;
            leaves = number;
        } else if (interrupted && own == 1) {
            of.unit = left + number - place.between * p.apart;
            of.first = place.between * chunks / p.parts;
            of.last = (place.between + 1) * chunks / p.parts;
            takes = number - p.apart;
            leaves = number;
        } else if (own == p.rounds + 2 * interrupted) {
            of.unit = left + number - (p.chain > 0 ? 1 : p.parts - 1) * p.apart;
            of.first = place.end;
            takes = number - p.apart;
        } else {
            const int resumed = (p.parts - 2) * p.apart + number;            // behind the places of parts
            of.unit = max(own - 2 * interrupted, 0) * p.clusters + number;
            if (interrupted && own == 0) of.last = place.resumes, leaves = resumed;
            if (interrupted && own == 2) of.first = place.resumes, takes = resumed;
        }
    }
    of.state = min(of.unit * p.cluster + place.rank, p.states - 1);
    of.takes = takes < 0 ? -1 : takes * p.cluster + place.rank;
    of.leaves = leaves < 0 ? -1 : leaves * p.cluster + place.rank;
    return of;
}

// Whether all states of a unit read the same B and C.
__device__ __forceinline__ bool is_shared(const SsdParams &p, int unit) {
    const int in_batch = p.heads * p.tiles, first = unit * p.cluster;
    bool same = true;
    for (int rank = 1; rank < p.cluster; ++rank) {
        const int state = min(first + rank, p.states - 1);
        same = same && state / in_batch == first / in_batch
            && p.head_to_group[state % in_batch / p.tiles] == p.head_to_group[first % in_batch / p.tiles];
    }
    return same;
}

// The channels of a state, and how they lie in the boxes of x and z and in the rows of h and y: channel c is row
// first + c, modulo 64.
struct SsdRows {
    int head, first_channel, channels;
    int x, z;                                                // columns of the first channel, which lie alike
    int first;
    bool rest;                                               // channels lie behind the boxes of 64 columns
};

template <bool kExtras>
__device__ __forceinline__ SsdRows rows_of(const SsdParams &p, int state) {
    const bool has_z = kExtras && p.has_z;
    const int in_batch = p.heads * p.tiles, batch = state / in_batch, tile = state % in_batch;
    SsdRows rows;
    rows.head = tile / p.tiles;
    rows.first_channel = tile % p.tiles * p.tile;
    rows.channels = min(p.headdim - rows.first_channel, p.tile);
    auto column_of = [&](const SsdOperand &from) {
        return from.first + batch * from.batch + rows.head * from.head + rows.first_channel;
    };
    rows.x = column_of(p.x);
    rows.z = has_z ? column_of(p.z) : rows.x;
    rows.first = rows.x & p.x.piece - 1;
    rows.rest = rows.first + rows.channels > 64;
    return rows;
}

// The heads that have channels among those of a state.
struct SsdHeads {
    int first, count;
};

template <bool kMixed>
__device__ __forceinline__ SsdHeads heads_of(const SsdParams &p, const SsdRows &rows) {
    if (!kMixed) return {rows.head, 1};
    const int first = rows.first_channel / p.mixed_headdim;
    return {first, (rows.first_channel + rows.channels - 1) / p.mixed_headdim - first + 1};
}

// The whole pieces of 16 bytes in memory that a CTA of a pair stores of each row of y. The first one gives the end of
// its row, less than a piece, to the second, which finds it before its own first channel. What shares a piece with
// another pair, at the start of the first's row and at the end of the second's, is stored apart: an even number of
// elements.
struct SsdPairRows {
    int turn;                                                // pieces that are stored apart at the start: 0 or 1
    int pieces, column;                                      // whole ones; of y, the first one's
    int ahead, behind;                                       // elements of other heads before the row, of it after them
};

__device__ __forceinline__ SsdPairRows pair_rows_of(const SsdParams &p, const SsdRows &rows, int rank) {
    SsdPairRows pair;
    pair.ahead = rows.first;
    pair.turn = rank == 0 && pair.ahead > 0;
    pair.pieces = (pair.ahead + rows.channels) / 8 - pair.turn;
    pair.column = rows.head * p.headdim - pair.ahead + pair.turn * 8;
    pair.behind = pair.ahead + rows.channels & 7;
    return pair;
}

}  // namespace shedder
