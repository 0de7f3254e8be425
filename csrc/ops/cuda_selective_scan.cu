// Launcher of the selective scan: checks, chooses the kernel and its lanes and states per thread, launches.

#include <algorithm>
#include <type_traits>

#include "kernels/selective_scan_fwd.cuh"
#include "kernels/selective_scan_tiled.cuh"
#include "ops/cuda_arguments.h"
#include "ops/cuda_device.h"
#include "ops/cuda_launch.h"
#include "ops/cuda_launchers.h"
#include "ops/cuda_scan_channels.h"

namespace shedder {
namespace {

Strides3 strides3(const Tensor &t) { return {t.stride(0), t.stride(1), t.stride(2)}; }
// Of B or C: (B, G, N, L), or (D, N) where the group stands for the channel.
Strides4 strides4(const Tensor &t) {
    if (t.dim() == 2) return {0, t.stride(0), t.stride(1), 0};
    return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// ---- the general form: any group for any channel

template <typename Input, int kStates, int kLanes>
void launch_general(const SelectiveScanParams &p, cudaStream_t stream) {
    constexpr int kChannels = kScanThreads / kLanes;
    const dim3 grid((p.channels + kChannels - 1) / kChannels, p.batch);
    launch_ctas(selective_scan_fwd<Input, kStates, kLanes>, {grid, kScanThreads}, stream, p);
}

template <typename Input>
void launch_general(const SelectiveScanParams &p, cudaStream_t stream) {
    if (p.dstate <= 8) return launch_general<Input, 8, 1>(p, stream);
    if (p.dstate <= 16) return launch_general<Input, 16, 1>(p, stream);
    if (p.dstate <= 32) return launch_general<Input, 16, 2>(p, stream);
    if (p.dstate <= 64) return launch_general<Input, 16, 4>(p, stream);
    if (p.dstate <= 128) return launch_general<Input, 16, 8>(p, stream);
    return launch_general<Input, 16, 16>(p, stream);
}

// ---- the fast form: one group

template <typename Tile, int kMinBlocks, bool kAligned, bool kSegmented>
void launch_kernel(const SelectiveScanParams &p, const ScanTileAccess &access, int segments, cudaStream_t stream) {
    const auto kernel = selective_scan_tiled<Tile, kMinBlocks, kAligned, kSegmented>;
    if constexpr (Tile::kSharedBytes > 48 * 1024)
        STD_TORCH_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes)
                        == cudaSuccess,
                        "shedder_cuda::selective_scan: no ", Tile::kSharedBytes, " bytes of shared memory");
    constexpr int kCtaChannels = Tile::kChannels * Tile::kTiles;
    const unsigned ctas = (p.channels + kCtaChannels - 1) / kCtaChannels;
    const dim3 grid = kSegmented ? dim3(segments, ctas, p.batch) : dim3(ctas, 1, p.batch);
    const unsigned cluster = kSegmented ? segments : 0;
    launch_ctas(kernel, {grid, Tile::kThreads, Tile::kSharedBytes, cluster}, stream, p, access);
}

bool on_the_grid(const ScanTileAccess &access) {
    return access.rows == Access::kVector && access.BC == Access::kVector;
}

// kMinBlocks: CTAs per SM that the registers must leave room for; pieces of fp32 take more of them.
template <typename Input>
constexpr int room(int min_blocks) { return sizeof(Input) == 4 ? (min_blocks + 1) / 2 : min_blocks; }

template <typename Input, int kStates, int kLanes, int kOwn, int kSplit, int kTiles, int kSteps, int kMinBlocks,
          bool kSegmented = false>
void launch_tiled(const SelectiveScanParams &p, const ScanTileAccess &access, cudaStream_t stream, int segments = 1) {
    using Tile = ScanTile<Input, kStates, kLanes, kOwn, kSplit, kTiles, kSteps>;
    if (on_the_grid(access))
        launch_kernel<Tile, room<Input>(kMinBlocks), true, kSegmented>(p, access, segments, stream);
    else
        launch_kernel<Tile, room<Input>(kMinBlocks), false, kSegmented>(p, access, segments, stream);
}

template <typename Input>
void launch_many_states(const SelectiveScanParams &p, const ScanTileAccess &access, cudaStream_t stream) {
    constexpr int kFewSteps = sizeof(Input) == 4 ? 16 : 32;  // 32 of fp32 spill where 16 warps share the registers
    if (p.dstate <= 24) return launch_tiled<Input, 3, 4, 2, 2, 2, 32, 4>(p, access, stream);
    if (p.dstate <= 32) return launch_tiled<Input, 4, 4, 2, 2, 2, 32, 4>(p, access, stream);
    if (p.dstate <= 48) return launch_tiled<Input, 3, 4, 2, 4, 1, 32, 4>(p, access, stream);
    if (p.dstate <= 64) return launch_tiled<Input, 4, 4, 2, 4, 1, 32, 4>(p, access, stream);
    if (p.dstate <= 96) return launch_tiled<Input, 3, 4, 2, 8, 1, 32, 2>(p, access, stream);
    if (p.dstate <= 128) return launch_tiled<Input, 4, 4, 2, 8, 1, 32, 2>(p, access, stream);
    if (p.dstate <= 192) return launch_tiled<Input, 3, 4, 2, 16, 1, kFewSteps, 1>(p, access, stream);
    return launch_tiled<Input, 4, 4, 2, 16, 1, kFewSteps, 1>(p, access, stream);
}

// Channels, batches counted. Fewer channels take more warps, and more instructions, for each: tiles of 16 channels,
// of 8, of 8 whose states two warps share. Measured on an H200 (docs/measured-facts.md, selective scan).
constexpr int64_t kFewChannels = 8192;

// Whole rounds of CTAs of Wide's channels, and what is left over, if it is one round or less, as CTAs of Thin's, which
// are half as many. False where that is not how it comes out.
template <typename Wide, typename Thin, int kMinBlocks>
bool launch_two_tiles(const SelectiveScanParams &p, const ScanTileAccess &access, int32_t device,
                      cudaStream_t stream) {
    constexpr int kWide = Wide::kChannels * Wide::kTiles, kThin = Thin::kChannels * Thin::kTiles;
    constexpr int kShared = std::max(Wide::kSharedBytes, Thin::kSharedBytes);
    static_assert(kShared <= 48 * 1024);
    const int64_t processors = multiprocessors(device), rounds = int64_t{p.batch} * p.channels / (processors * kWide);
    const int wide = static_cast<int>(rounds * processors / p.batch);
    const int thin = (p.channels - wide * kWide + kThin - 1) / kThin;
    if (rounds < 2 || thin * int64_t{p.batch} > processors) return false;
    const Ctas ctas{static_cast<unsigned>((wide + thin) * p.batch), Wide::kThreads, kShared};
    constexpr int kRoom = room<typename Wide::Input>(kMinBlocks);
    if (on_the_grid(access))
        launch_ctas(selective_scan_two_tiles<Wide, Thin, kRoom, true>, ctas, stream, p, access, wide, thin);
    else
        launch_ctas(selective_scan_two_tiles<Wide, Thin, kRoom, false>, ctas, stream, p, access, wide, thin);
    return true;
}

template <typename Input>
void launch_few_channels(const SelectiveScanParams &p, const ScanTileAccess &access, int32_t device,
                         cudaStream_t stream) {
    if (p.dstate <= 8) return launch_tiled<Input, 1, 4, 1, 2, 1, 64, 8>(p, access, stream);
    using Wide = ScanTile<Input, 2, 4, 1, 2, 2, 64>;
    using Thin = ScanTile<Input, 1, 4, 1, 4, 1, 64>;
    if (launch_two_tiles<Wide, Thin, 4>(p, access, device, stream)) return;
    launch_tiled<Input, 2, 4, 1, 2, 1, 64, 8>(p, access, stream);
}

template <typename Input>
void launch_some_channels(const SelectiveScanParams &p, const ScanTileAccess &access, int32_t device,
                          cudaStream_t stream) {
    if (p.dstate <= 4) return launch_tiled<Input, 1, 4, 1, 1, 4, 64, 5>(p, access, stream);
    if (p.dstate <= 8) return launch_tiled<Input, 2, 4, 1, 1, 4, 64, 5>(p, access, stream);
    if (p.dstate <= 12) return launch_tiled<Input, 3, 4, 1, 1, 4, 32, 5>(p, access, stream);
    using Wide = ScanTile<Input, 2, 4, 2, 2, 2, 32>;
    using Thin = ScanTile<Input, 2, 4, 1, 2, 2, 64>;
    if (launch_two_tiles<Wide, Thin, 4>(p, access, device, stream)) return;
    launch_tiled<Input, 2, 4, 2, 2, 1, 32, 10>(p, access, stream);
}

// ---- the form for many channels

// Whether the rows of u, delta, z and y lie alike against the 16-byte grid.
template <typename Input>
bool all_lie_alike(const SelectiveScanParams &p) {
    const auto as_u = [&](const void *data, const Strides3 &s) {
        return lie_alike(data, p.u, sizeof(Input), {s.channel - p.u_strides.channel,
                                                    p.batch > 1 ? s.batch - p.u_strides.batch : 0});
    };
    return as_u(p.delta, p.delta_strides) && as_u(p.y, p.y_strides) && (p.z == nullptr || as_u(p.z, p.z_strides));
}

// Whether the copy engine reads u, delta and z: no row is counted twice, and off the grid all batch entries are among the
// rows of one.
bool boxes_reach(const SelectiveScanParams &p, bool on_grid) {
    const auto reach = [&](const void *data, const Strides3 &s) {
        if (data == nullptr) return true;
        if ((p.channels > 1 && s.channel == 0) || (p.batch > 1 && s.batch == 0)) return false;
        if (on_grid || p.batch == 1) return true;
        return s.channel > 0 && s.batch % s.channel == 0
            && (p.batch - 1) * (s.batch / s.channel) + p.channels < int64_t{1} << 31;
    };
    return reach(p.u, p.u_strides) && reach(p.delta, p.delta_strides) && reach(p.z, p.z_strides);
}

// Whether there are channels enough. For each scheduler of the GPU 24 of many states, fewer of few; off the grid, where
// the other forms take twice as long, 4, but steps enough for the start of its warps to pay. Measured on an H200
// (docs/measured-facts.md, selective scan).
template <typename Input>
bool launch_many_channels(const SelectiveScanParams &p, const ScanTileAccess &access, const Tensor &u,
                          cudaStream_t stream) {
    if constexpr (sizeof(Input) == 2) {
        constexpr int kShortest = 64;
        const int32_t device = u.get_device_index();
        const bool on_grid = on_the_grid(access);
        if (!on_grid && p.length < kShortest) return false;
        if (std::max(access.rows, access.BC) == Access::kStrided || !(on_grid || all_lie_alike<Input>(p))) return false;
        const bool copy_engine = device_attribute(cudaDevAttrClusterLaunch, device);             // came with clusters
        if (!copy_engine || !boxes_reach(p, on_grid)) return false;
        const int64_t schedulers = int64_t{4} * multiprocessors(device);
        const int least = !on_grid || p.dstate <= 4 ? 4 : p.dstate <= 14 ? 16 : 24;
        const int64_t channels = int64_t{p.batch} * p.channels;
        if (channels < schedulers * least || channels >= int64_t{1} << 31) return false;     // shares are counted by int
        launch_scan_channels<Input>(p, on_grid, u, stream);
        return true;
    }
    return false;
}

// Very few channels: a cluster shares the sequence. False where that is not worth two passes, or there are no clusters.
template <typename Input>
bool launch_segments(const SelectiveScanParams &p, const ScanTileAccess &access, int32_t device,
                     cudaStream_t stream) {
    constexpr int kFewTiles = 80, kFullTiles = 320, kMaxSegments = 8, kShortest = 128;       // tiles of 16 channels
    const int64_t tiles = int64_t{p.batch} * ((p.channels + 15) / 16);
    if (tiles > kFewTiles) return false;
    const int64_t segments = std::min<int64_t>({kMaxSegments, kFullTiles / tiles, p.length / kShortest});
    if (segments < 2 || !device_attribute(cudaDevAttrClusterLaunch, device)) return false;
    launch_tiled<Input, 1, 4, 2, 4, 1, 64, 4, true>(p, access, stream, static_cast<int>(segments));
    return true;
}

// How rows along time may be accessed: data and the strides of everything but time, in elements.
Access access_of(const Tensor &t) {
    const int64_t bytes = t.element_size(), time = t.dim() - 1;
    if (t.stride(time) != 1) return Access::kStrided;
    bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
    for (int64_t i = 0; i < time; ++i) aligned = aligned && (t.size(i) == 1 || t.stride(i) * bytes % 16 == 0);
    return aligned ? Access::kVector : Access::kShifted;
}

template <typename Input>
void launch(const SelectiveScanParams &p, const ScanTileAccess &access, const Tensor &u, cudaStream_t stream) {
    const int32_t device = u.get_device_index();
    const bool general = p.channel_to_group != nullptr || p.seq_idx != nullptr || p.constant_B || p.constant_C;
    if (general) return launch_general<Input>(p, stream);
    if (p.dstate > 16) return launch_many_states<Input>(p, access, stream);
    if (launch_segments<Input>(p, access, device, stream)) return;
    if (launch_many_channels<Input>(p, access, u, stream)) return;
    if (int64_t{p.batch} * p.channels < kFewChannels) return launch_few_channels<Input>(p, access, device, stream);
    launch_some_channels<Input>(p, access, device, stream);
}

}  // namespace

void selective_scan(const Tensor &u, const Tensor &delta, const Tensor &A, const Tensor &B, const Tensor &C,
                    const MaybeTensor &D, const MaybeTensor &z, const MaybeTensor &delta_bias, bool delta_softplus,
                    const MaybeTensor &initial_state, const MaybeTensor &channel_to_group, const MaybeTensor &seq_idx,
                    Tensor y, MaybeTensor final_state) {
    const ScalarType dtype = u.scalar_type();
    STD_TORCH_CHECK(u.dim() == 3 && A.dim() == 2 && (B.dim() == 4 || B.dim() == 2) && (C.dim() == 4 || C.dim() == 2),
                    "shedder_cuda::selective_scan takes u (B, D, L), A (D, N), B and C (B, G, N, L) or (D, N)");
    const int64_t batch = u.size(0), channels = u.size(1), length = u.size(2), dstate = A.size(1);
    const bool constant_B = B.dim() == 2, constant_C = C.dim() == 2;
    const int64_t groups = !constant_B ? B.size(1) : !constant_C ? C.size(1) : 1;
    STD_TORCH_CHECK(1 <= dstate && dstate <= 256, "shedder_cuda::selective_scan: N is ", dstate, "; accepted: 1..256");
    // Batches are the y dimension of the grid.
    STD_TORCH_CHECK(batch <= 65535, "shedder_cuda::selective_scan: batch is ", batch, "; accepted: up to 65535");
    STD_TORCH_CHECK(std::max(channels, length) < (int64_t{1} << 31) - 16,
                    "shedder_cuda::selective_scan: D and L must be below 2^31");
    STD_TORCH_CHECK(groups == 1 || channel_to_group.has_value(),
                    "shedder_cuda::selective_scan: channel_to_group is needed for more than one group");
    const Arguments arguments{"selective_scan", u.get_device_index()};
    arguments.check(delta, "delta", dtype, {batch, channels, length});
    arguments.check(A, "A", ScalarType::Float, {channels, dstate});
    auto check_input = [&](const Tensor &t, const char *name) {
        if (t.dim() == 2) arguments.check(t, name, ScalarType::Float, {channels, dstate});
        else arguments.check(t, name, dtype, {batch, groups, dstate, length});
    };
    check_input(B, "B");
    check_input(C, "C");
    if (z) arguments.check(*z, "z", dtype, {batch, channels, length});
    arguments.check(y, "y", dtype, {batch, channels, length});
    if (final_state) arguments.check(*final_state, "final_state", ScalarType::Float, {batch, channels, dstate});
    arguments.check_contiguous(initial_state, "initial_state");
    arguments.check_contiguous(channel_to_group, "channel_to_group");
    arguments.check_contiguous(seq_idx, "seq_idx");
    arguments.check_contiguous(final_state, "final_state");
    SelectiveScanParams p{};
    p.u = u.const_data_ptr();
    p.delta = delta.const_data_ptr();
    p.A = static_cast<const float *>(A.const_data_ptr());
    p.B = B.const_data_ptr();
    p.C = C.const_data_ptr();
    p.z = z ? z->const_data_ptr() : nullptr;
    p.D = arguments.floats(D, "D", {channels});
    p.delta_bias = arguments.floats(delta_bias, "delta_bias", {channels});
    p.initial_state = arguments.floats(initial_state, "initial_state", {batch, channels, dstate});
    p.y = y.mutable_data_ptr();
    p.final_state = final_state ? static_cast<float *>(final_state->mutable_data_ptr()) : nullptr;
    p.channel_to_group = arguments.integers(channel_to_group, "channel_to_group", {channels});
    if (groups == 1) p.channel_to_group = nullptr;
    p.seq_idx = arguments.integers(seq_idx, "seq_idx", {batch, length});
    if (batch == 0 || channels == 0) return;

    p.constant_B = constant_B;
    p.constant_C = constant_C;
    p.u_strides = strides3(u);
    p.delta_strides = strides3(delta);
    if (z) p.z_strides = strides3(*z);
    p.y_strides = strides3(y);
    p.B_strides = strides4(B);
    p.C_strides = strides4(C);
    p.A_channel_stride = A.stride(0);
    p.A_state_stride = A.stride(1);
    p.D_stride = D ? D->stride(0) : 0;
    p.delta_bias_stride = delta_bias ? delta_bias->stride(0) : 0;
    p.batch = static_cast<int>(batch);
    p.channels = static_cast<int>(channels);
    p.length = static_cast<int>(length);
    p.dstate = static_cast<int>(dstate);
    p.delta_softplus = delta_softplus;

    const ScanTileAccess access{
        std::max({access_of(u), access_of(delta), z ? access_of(*z) : Access::kVector, access_of(y)}),
        std::max(access_of(B), access_of(C))};

    arguments.launch(dtype, [&](auto *type, cudaStream_t stream) {
        launch<std::remove_pointer_t<decltype(type)>>(p, access, u, stream);
    });
}

}  // namespace shedder

STABLE_TORCH_LIBRARY_FRAGMENT(shedder_cuda, m) {
    m.def("selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
          "Tensor? delta_bias, bool delta_softplus, Tensor? initial_state, Tensor? channel_to_group, "
          "Tensor? seq_idx, Tensor(a!) y, Tensor(b!)? final_state) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shedder_cuda, CUDA, m) {
    m.impl("selective_scan", TORCH_BOX(&shedder::selective_scan));
}
