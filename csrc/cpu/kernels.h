// What the CPU kernels take: plain arrays with strides, one struct per op. No framework, standard C++ only.
//
// Every kernel is serial over a range [begin, end) of independent items; csrc/ops splits the range over
// threads. csrc/cpu is compiled once per instruction set, each copy in a namespace of its own.

#pragma once

#include <cstdint>

namespace shedder::cpu {

enum class Dtype : int { f32, bf16, f16 };

// A view of a tensor: null data means "not given". Strides count elements.
struct Array {
    void *data = nullptr;
    Dtype dtype = Dtype::f32;
    int64_t stride[4] = {0, 0, 0, 0};
    explicit operator bool() const { return data != nullptr; }
};

constexpr int kTile = 32;         // channels that a scan walks together
constexpr int kConvTile = 64;     // channels that a convolution walks together
constexpr int kMaxStates = 256;   // N
constexpr int kMaxWidth = 4;      // W
constexpr int kMaxLinearRows = 8;
constexpr int kMaxLanes = 16;     // floats in a vector register, of any instruction set

// A run of channels that read the same group of B and C: order[first], ..., order[first + count - 1].
struct Tile {
    int32_t first, count, group;
};

struct SelectiveScan {
    Array u, delta, A, B, C, D, z, delta_bias, initial_state, y, final_state;   // B, C: (B,G,N,L), or (D,N)
    bool constant_B = false, constant_C = false, delta_softplus = false;
    const int32_t *order = nullptr, *seq_idx = nullptr;                         // seq_idx: (B, L) contiguous
    const Tile *tiles = nullptr;
    int64_t tile_count = 0, length = 0, states = 0;
};                                                                              // items: batch x tiles

struct Ssd {
    Array x, dt, A, B, C, D, z, dt_bias, initial_states, y, final_states;       // D: (H, P), its stride over P may be 0
    bool dt_softplus = false;
    float dt_min = 0, dt_max = 0;
    const int32_t *order = nullptr, *seq_idx = nullptr;                         // order numbers channels h P + p
    const Tile *tiles = nullptr;
    int64_t tile_count = 0, length = 0, headdim = 0, states = 0;
};                                                                              // items: batch x tiles

struct StateUpdate {
    Array state, x, dt, A, B, C, D, z, dt_bias, y;
    bool dt_softplus = false;
    float dt_min = -__builtin_inff(), dt_max = __builtin_inff();
    const int32_t *head_to_group = nullptr, *state_batch_indices = nullptr;     // head_to_group null: all read group 0
    int64_t heads = 0, headdim = 0, states = 0;
};                                                                              // items: rows of B x H x P

struct Conv1d {
    Array x, weight, bias, initial_states, y, final_states;
    bool silu = false;
    const int32_t *seq_idx = nullptr;
    int64_t channels = 0, length = 0, width = 0;
};                                                                              // items: batch x tiles of channels

struct Conv1dUpdate {
    Array x, conv_state, weight, bias, y;
    bool silu = false;
    const int32_t *cache_seqlens = nullptr, *conv_state_indices = nullptr;
    int64_t channels = 0, length = 0, width = 0, kept = 0;
};                                                                              // items: batch x tiles of channels

struct GatedRmsNorm {
    Array x, weight, bias, z, y;                                                // x, z, y: (rows, D)
    const int64_t *segments = nullptr;
    const double *eps = nullptr;
    int64_t segment_count = 0;
    bool norm_before_gate = false;
};                                                                              // items: rows; scratch: D + kMaxLanes floats

struct Linear {
    Array x, weight, bias, y;                                                   // (M, I), (O, I), (O,), (M, O)
    int64_t rows = 0, inputs = 0;      // rows: at most kMaxLinearRows
};                                                                              // items: outputs O

struct Kernels {
    const char *isa;
    void (*selective_scan)(const SelectiveScan &, int64_t begin, int64_t end);
    void (*ssd)(const Ssd &, int64_t begin, int64_t end);
    void (*state_update)(const StateUpdate &, int64_t begin, int64_t end);
    void (*conv1d)(const Conv1d &, int64_t begin, int64_t end);
    void (*conv1d_update)(const Conv1dUpdate &, int64_t begin, int64_t end);
    void (*gated_rmsnorm)(const GatedRmsNorm &, float *scratch, int64_t begin, int64_t end);
    void (*linear)(const Linear &, int64_t begin, int64_t end);
};

}  // namespace shedder::cpu
