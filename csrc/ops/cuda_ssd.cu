// Launcher of SSD: checks, deals heads or segments of them to CTAs, launches.

#include <algorithm>
#include <atomic>
#include <type_traits>

#include <torch/csrc/stable/ops.h>

#include "kernels/ssd_fwd.cuh"
#include "ops/cuda_device.h"
#include "ops/cuda_launchers.h"
#include "ops/cuda_ssd_arguments.h"
#include "ops/cuda_ssd_maps.h"

namespace shedder {
namespace {

// Whether this device runs ssd_fwd: its instructions are those of compute capability 9.0 alone.
bool is_hopper(int32_t device) {
    return device_attribute(cudaDevAttrComputeCapabilityMajor, device) == 9
        && device_attribute(cudaDevAttrComputeCapabilityMinor, device) == 0;
}

// Concurrent segments of all units but the first ones, which are taken whole; one: of none.
struct Segments {
    int whole, count;
};

// Segments of each unit, where there is room on the GPU for several of them at once; or, where there are a few units more
// than multiprocessors, of those only, beside the others: as many as take the least time, if that saves a twentieth, or
// beside others three. By times of an H200, in chunks of a whole sequence: a chunk that is passed twice takes 1.85, 1.3
// times as long where two CTAs share a multiprocessor, 1.7 where three do, a state taken from another 0.8, the rest 1; two
// chunks side by side take 1.6.
Segments best_segments(int units, int slots, int processors, int chunks, bool may_be_beside) {
    const auto passed_twice = [&](int count, double crowd) {
        return 1.85 * crowd * ((chunks + count - 1) / count) + 0.8 * count + 1;
    };
    constexpr double kTwo = 1.6;
    const double whole = chunks * (units > processors ? kTwo : 1.0);
    Segments best{0, 1};
    double least = 0.95 * whole;
    for (int count = 2; count <= std::min(slots / units, chunks); ++count) {
        const double crowd = count * units > 2 * processors ? 1.7 : count * units > processors ? 1.3 : 1.0;
        const double time = passed_twice(count, crowd);
        if (time < least) best = {0, count}, least = time;
    }
    const int beyond = may_be_beside && slots >= 2 * processors ? units - processors : 0;
    least = std::min(least, 0.85 * whole);
    for (int count = 2; beyond > 0 && count <= std::min(processors / beyond, chunks); ++count) {
        const double beside = passed_twice(count, 1.3), time = std::max(beside, chunks + (1 - 1 / kTwo) * beside);
        if (time < least) best = {processors, count}, least = time;
    }
    return best;
}

// CTAs that share what they read of B and C, and take neighbouring heads in step. The copies of boxes are counted line
// by line: heads that start anywhere lie in twice as many lines, and then the shares pay; else they cost more than they
// save. Where heads of y share sectors of L2, they had better be written in step. Measured on an H200
// (docs/measured-facts.md, SSD).
int best_cluster(const SsdParams &p, bool copied, const Tensor &x, const MaybeTensor &z, const Tensor &y) {
    const bool reads_anywhere = !copied && (!is_aligned(x, 16) || (z && !is_aligned(*z, 16)));
    const bool anywhere = reads_anywhere || !is_aligned(y, 32);
    return anywhere && p.states >= 2 * multiprocessors(x.get_device_index()) ? 2 : 1;
}

constexpr int kMostStatesMixed = 128;

// Takes the channels of all heads for those of one, in tiles that hold channels of two heads, where there are more heads
// than multiprocessors, and these tiles are so much fewer that a chunk of theirs may take 1.25 times as long (measured
// on an H200). The 16 rows of a warp are of one head.
void mix_heads(SsdParams &p, int64_t batch, int64_t groups, int processors) {
    const bool can = groups == 1 && p.heads > 1 && !p.has_z && p.runs == nullptr && p.dstate <= kMostStatesMixed
        && p.headdim % 16 == 0 && p.x.head == p.headdim && p.x_words == nullptr && heads_start_with_boxes(p);
    const int channels = p.heads * p.headdim, tile = std::min(2 * p.headdim, 64), tiles = (channels + tile - 1) / tile;
    if (!can || p.states <= processors || tiles > 0.75 * p.heads * p.tiles) return;
    p.mixed_headdim = p.headdim;
    p.headdim = channels;
    p.heads = 1;
    p.tile = tile;
    p.tiles = tiles;
    p.states = static_cast<int>(batch * tiles);
}

// In how many parts a unit is taken that is left over after the last full round: as many as there are clusters for,
// where the parts are long enough.
int best_parts(int left, int slots, int chunks) {
    constexpr int kMostParts = 4, kShortestPart = 2;
    const int parts = left == 0 ? 0 : std::min({slots / left, kMostParts, chunks / kShortestPart});
    return parts < 2 ? 0 : parts;
}

// How many units left over make up a chain, where there are no clusters for two parts of each: the fewest by which there
// are clusters enough. 0: the last round would be shorter by less than it costs to hand states on.
int best_chain(int left, int slots, int chunks) {
    constexpr int kLeastSaved = 4;
    int chain = 2;
    while (left + (left + chain - 1) / chain > slots) ++chain;
    return chunks / (chain + 1) < kLeastSaved ? 0 : chain;
}

// A word that no memory holds by chance, another one for each call (the mixing steps of SplitMix64, Steele et al. 2014).
uint64_t name_of_call() {
    static std::atomic<uint64_t> calls{0};
    uint64_t name = (calls += 0x9e3779b97f4a7c15);
    name = (name ^ name >> 30) * 0xbf58476d1ce4e5b9;
    name = (name ^ name >> 27) * 0x94d049bb133111eb;
    return name ^ name >> 31;
}

template <typename Input, int kStates16, SsdForm kForm>
void launch_with(SsdParams &p, const Tensor &B, const Tensor &C, int64_t segments, cudaStream_t stream) {
    constexpr int kShared = SsdShared<kStates16, kForm>::kBytes;
    static_assert(kSsdCtas<kStates16, kForm> * (kShared + 1024) <= 228 * 1024);          // the driver takes 1024 for each
    const auto kernel = ssd_fwd<Input, kStates16, kForm>;
    const cudaError_t allowed =                              // of this device; each time, since it costs little
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
    STD_TORCH_CHECK(allowed == cudaSuccess, "shedder_cuda::ssd: ", cudaGetErrorString(allowed));

    const int chunks = (p.length + kChunk - 1) / kChunk;
    const int processors = multiprocessors(B.get_device_index());
    const int slots = processors * kSsdCtas<kStates16, kForm> / p.cluster;     // of clusters
    p.units = (p.states + p.cluster - 1) / p.cluster;
    Segments dealt{0, static_cast<int>(segments)};
    if (segments == 0)
        dealt = best_segments(p.units, slots, processors / p.cluster, chunks, kForm != SsdForm::kWords);
    p.clusters = p.units;
    p.rounds = 1;
    int64_t places = 0, takers = 1;                          // of states that clusters leave; that take one of them
    if (dealt.count > 1) {
        p.whole = dealt.whole;
        p.segment_chunks = (chunks + dealt.count - 1) / dealt.count;
        takers = (chunks + p.segment_chunks - 1) / p.segment_chunks - 1;
        places = (p.units - p.whole) * takers;
        p.clusters += static_cast<int>(places);
    } else if (p.units > slots) {
        const int left = p.units % slots, parts = best_parts(left, slots, chunks);
        const int chain = left > 0 && parts == 0 ? best_chain(left, slots, chunks) : 0;
        if (parts > 0 || chain > 0) {
            p.clusters = slots;
            p.rounds = p.units / slots;
            p.left = left;
            p.parts = parts;
            p.chain = chain;
            p.apart = chain > 0 ? (left + chain - 1) / chain : left;
            places = chain > 0 ? left : (2 * parts - 3) * left;              // behind a part, and of heads interrupted
        }
    }
    places *= p.cluster;
    MaybeTensor carry, is_left;                    // freed by torch in the order of the stream
    if (places > 0) {
        carry = torch::stable::new_empty(B, {places * kCarryFloats<kStates16>}, ScalarType::Float);
        is_left = torch::stable::new_empty(B, {places * takers}, ScalarType::Long);
        p.carry = static_cast<float *>(carry->mutable_data_ptr());
        p.is_left = static_cast<uint64_t *>(is_left->mutable_data_ptr());
        p.takers = static_cast<int>(takers);
        p.call = name_of_call();
#ifdef SHEDDER_SANITIZER                                     // initcheck takes words that are waited for as read too early
        cudaMemsetAsync(p.is_left, 0, is_left->numel() * sizeof(uint64_t), stream);
#endif
    }
    const auto aligned = make_states_maps(p, B, C, kStates16 * 16, stream);
    const unsigned cluster = p.cluster > 1 ? p.cluster : 0;
    launch_ctas(kernel, {static_cast<unsigned>(p.clusters * p.cluster), 256, kShared, cluster}, stream, p);
}

template <typename Input, int kStates16>
void launch(SsdParams &p, const Tensor &B, const Tensor &C, int64_t segments, cudaStream_t stream) {
    if (p.has_z || p.runs != nullptr) return launch_with<Input, kStates16, SsdForm::kExtras>(p, B, C, segments, stream);
    if constexpr (kStates16 * 16 <= kMostStatesWithWords)
        if (p.x_words != nullptr) return launch_with<Input, kStates16, SsdForm::kWords>(p, B, C, segments, stream);
    if constexpr (kStates16 * 16 <= kMostStatesMixed)
        if (p.mixed_headdim > 0) return launch_with<Input, kStates16, SsdForm::kMixed>(p, B, C, segments, stream);
    if (heads_start_with_boxes(p)) return launch_with<Input, kStates16, SsdForm::kPlain>(p, B, C, segments, stream);
    launch_with<Input, kStates16, SsdForm::kAnywhere>(p, B, C, segments, stream);
}

template <typename Input>
void launch_for_states(SsdParams &p, const Tensor &B, const Tensor &C, int64_t segments, cudaStream_t stream) {
    const int needed = (p.dstate + 15) / 16;
    if (needed <= 2) return launch<Input, 2>(p, B, C, segments, stream);
    if (needed <= 3) return launch<Input, 3>(p, B, C, segments, stream);
    if (needed <= 4) return launch<Input, 4>(p, B, C, segments, stream);
    if (needed <= 5) return launch<Input, 5>(p, B, C, segments, stream);
    if (needed <= 6) return launch<Input, 6>(p, B, C, segments, stream);
    if (needed <= 7) return launch<Input, 7>(p, B, C, segments, stream);
    if (needed <= 8) return launch<Input, 8>(p, B, C, segments, stream);
    if (needed <= 12) return launch<Input, 12>(p, B, C, segments, stream);
    return launch<Input, 16>(p, B, C, segments, stream);
}

}  // namespace

void ssd(const Tensor &x, const Tensor &dt, const Tensor &A, const Tensor &B, const Tensor &C, const MaybeTensor &D,
         const MaybeTensor &z, const MaybeTensor &dt_bias, bool dt_softplus, double dt_min, double dt_max,
         const Tensor &head_to_group, const MaybeTensor &initial_states, const MaybeTensor &runs, Tensor y,
         MaybeTensor final_states, int64_t segments) {
    const ScalarType dtype = x.scalar_type();
    const bool negative_dt = dt_max < 0 || (!dt_softplus && dt_min < 0);     // possible: ssd_fwd takes its logarithm
    if (dtype == ScalarType::Float || negative_dt || !is_hopper(x.get_device_index()))
        return ssd_portable(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, head_to_group, initial_states,
                            runs, y, final_states);
    STD_TORCH_CHECK(0 <= segments && segments <= 1024,
                    "shedder_cuda::ssd: segments is ", segments, "; accepted: 0..1024");
    const Arguments arguments{"ssd", x.get_device_index()};
    SsdParams p{};
    const SsdSizes sizes = take_ssd_arguments(arguments, p, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max,
                                              head_to_group, initial_states, runs, y, final_states);
    if (sizes.states() == 0 || sizes.length == 0) return;

    p.has_z = z.has_value();
    p.tile = 64;
    p.states = static_cast<int>(sizes.states());
    arguments.launch(dtype, [&](auto *type, cudaStream_t stream) {
        using Input = std::remove_pointer_t<decltype(type)>;
        const auto copies = make_channels_maps(p, x, z, stream);         // freed by torch in the order of the stream
        mix_heads(p, sizes.batch, sizes.groups, multiprocessors(x.get_device_index()));
        p.cluster = p.mixed_headdim > 0 ? 1 : best_cluster(p, copies.has_value(), x, z, y);
        make_y_maps(p, y);
        if constexpr (sizeof(Input) == 2) launch_for_states<Input>(p, B, C, segments, stream);     // as checked above
    });
}

}  // namespace shedder

STABLE_TORCH_LIBRARY_FRAGMENT(shedder_cuda, m) {
    m.def("ssd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
          "bool dt_softplus, float dt_min, float dt_max, Tensor head_to_group, Tensor? initial_states, Tensor? runs, "
          "Tensor(a!) y, Tensor(b!)? final_states, int segments) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shedder_cuda, CUDA, m) {
    m.impl("ssd", TORCH_BOX(&shedder::ssd));
}
