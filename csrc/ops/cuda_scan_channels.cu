// Launcher of the selective scan's form for many channels: deals channels to warps, launches.

#include "ops/cuda_scan_channels.h"

#include <algorithm>
#include <optional>

#include <torch/csrc/stable/ops.h>

#include "kernels/selective_scan_channels.cuh"
#include "ops/cuda_common.h"
#include "ops/cuda_device.h"
#include "ops/cuda_launch.h"
#include "ops/cuda_tensor_map.h"

namespace shedder {
namespace {

// How many warps of 32, 16 and 8 channels a scheduler of the GPU gets, by the channels that there are for each: those
// that take the least time. Three warps run at once. Measured on an H200 (docs/measured-facts.md, selective scan).
constexpr ScanDeal kDeals[] = {{0, 0, 1}, {0, 1, 0}, {0, 1, 1}, {0, 2, 0}, {1, 0, 0}, {0, 2, 1}, {1, 0, 1}, {0, 3, 0},
                               {1, 1, 0}, {1, 1, 1}, {2, 0, 0}, {2, 0, 1}, {2, 1, 0}, {3, 0, 0}};

// Shares come `together`: in multiples of as many. Of more channels than three warps take, whole rounds of 32 come
// first. halves: two warps of 16 take less time than one of 32.
ScanDeal deal_channels(const SelectiveScanParams &p, int64_t schedulers, int together, bool halves) {
    const int eights = (p.channels + 8 * together - 1) / (8 * together);
    const int64_t all = int64_t{p.batch} * together, rounds = (all * eights + 4 * schedulers - 1) / (4 * schedulers);
    const int before = static_cast<int>(std::max<int64_t>(rounds - 3, 0) * schedulers / all);
    for (const ScanDeal &each : kDeals) {
        if (each.half > 1 && !halves) continue;
        int left = eights - 4 * before;
        const auto take = [&](int rounds, int eights_of_share, bool others_follow) {
            const int most = static_cast<int>(rounds * schedulers / all);
            const int shares = std::min(most, (left + (others_follow ? 0 : eights_of_share - 1)) / eights_of_share);
            left = std::max(left - shares * eights_of_share, 0);
            return shares * together;
        };
        const int wide = take(each.wide, 4, each.half + each.quarter > 0);
        const int half = take(each.half, 2, each.quarter > 0);
        const int quarter = take(each.quarter, 1, false);
        if (left == 0) return {before * together + wide, half, quarter};
    }
    return {eights / 4 * together, eights % 4 / 2 * together, eights % 2 * together};
}

// The map of one kind of warps, whose rows of a tile are a box: of a tensor's `rows` every Rows::kApart-th from the first
// on; on the grid of each batch entry, off it of all counted through.
template <typename Rows>
CUtensorMap rows_map(const char *name, const void *data, const Strides3 &s, const SelectiveScanParams &p, int64_t rows,
                     int first) {
    uint64_t address = reinterpret_cast<uint64_t>(data) + first * s.channel * 2;
    const uint64_t within = Rows::kOnGrid ? 0 : address % 16 / 2;            // elements of the piece before the row
    address -= within * 2;
    const uint64_t of_map = (rows - first + Rows::kApart - 1) / Rows::kApart, batch = Rows::kOnGrid ? p.batch : 1;
    const uint64_t sizes[3] = {p.length + within, of_map, batch};
    const uint64_t strides[2] = {map_stride(of_map, s.channel * Rows::kApart), map_stride(batch, s.batch)};
    const uint32_t box[3] = {Rows::kSteps, Rows::kChannels, 1};
    return tensor_map("selective_scan", name, address, 3, sizes, strides, box,
                      Rows::kRow == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B);
}

// The maps that warps of a deal need.
template <typename Kinds>
ScanMaps<Kinds::kOnGrid> make_maps(const SelectiveScanParams &p, const ScanDeal &deal) {
    ScanMaps<Kinds::kOnGrid> maps{};
    const auto of_tensor = [&](int tensor, const char *name, const void *data, const Strides3 &s) {
        if (data == nullptr) return;
        const int64_t of_batch = !Kinds::kOnGrid && p.batch > 1 ? s.batch / s.channel : 0;
        const int64_t rows = (p.batch - 1) * of_batch + p.channels;
        maps.rows_of_batch[tensor] = static_cast<int>(of_batch);
        const auto of_kind = [&](auto kind, int shares) {
            using Rows = decltype(kind);
            for (int first = 0; shares > 0 && first < std::min<int64_t>(Rows::kApart, rows); ++first)
                maps.of[Rows::kLanes / 2][tensor][first] = rows_map<Rows>(name, data, s, p, rows, first);
        };
        of_kind(typename Kinds::Wide{}, deal.wide);
        of_kind(typename Kinds::Half{}, deal.half);
        of_kind(typename Kinds::Quarter{}, deal.quarter);
    };
    of_tensor(kU, "u", p.u, p.u_strides);
    of_tensor(kDelta, "delta", p.delta, p.delta_strides);
    of_tensor(kZ, "z", p.z, p.z_strides);
    return maps;
}

// B and C as selective_scan_state_words lays them out, before the kernel that reads them.
template <typename Input>
Tensor make_state_words(const SelectiveScanParams &p, int slots, const Tensor &u, cudaStream_t stream) {
    const int pitch = scan_word_pitch(slots), rows = kScanWordsBefore + p.length + kScanWordsBehind;
    Tensor words = torch::stable::new_empty(u, {int64_t{p.batch} * rows * pitch}, ScalarType::Int);
    const dim3 grid((rows + kScanWordThreads - 1) / kScanWordThreads, pitch / 4, p.batch);
    launch_ctas(selective_scan_state_words<Input>, {grid, kScanWordThreads}, stream, p, pitch,
                static_cast<uint4 *>(words.mutable_data_ptr()));
    return words;
}

template <typename Input, int kSlots, bool kOnGrid, bool kWide>
void launch_deal(const SelectiveScanParams &p, const ScanDeal &deal, const Tensor &u, cudaStream_t stream) {
    const int32_t device = u.get_device_index();
    const auto kernel = selective_scan_channels<Input, kSlots, kOnGrid, kWide>;
    using Kinds = ScanKinds<Input, kSlots, kOnGrid, kWide>;
    // Where all warps run at once, a CTA for each multiprocessor; else CTAs of one warp for each scheduler.
    const int ctas = (p.batch * (deal.wide + deal.half + deal.quarter) + 3) / 4, there = multiprocessors(device);
    const int most = std::min(shared_bytes_of_cta(device) / Kinds::kRoundBytes, Kinds::kMostRounds);
    const int rounds = ctas <= there * most ? most : 1, shared = rounds * Kinds::kRoundBytes;
    STD_TORCH_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared) == cudaSuccess,
                    "shedder_cuda::selective_scan: no ", shared, " bytes of shared memory");
    const int grid = rounds > 1 ? there : ctas;
    std::optional<Tensor> words;
    if (!kOnGrid) words = make_state_words<Input>(p, kSlots, u, stream);
    launch_ctas(kernel, {static_cast<unsigned>(grid), 128u * rounds, shared}, stream, p, deal,
                make_maps<Kinds>(p, deal), words ? static_cast<const uint32_t *>(words->const_data_ptr()) : nullptr);
}

// Off the grid there are kernels for every second number of states.
template <typename Input, bool kOnGrid, int kSlots = kOnGrid ? 1 : 2>
void launch_slots(const SelectiveScanParams &p, const ScanDeal &deal, const Tensor &u, cudaStream_t stream) {
    if constexpr (kSlots < kMostScanSlots)
        if (p.dstate > kSlots) return launch_slots<Input, kOnGrid, kSlots + (kOnGrid ? 1 : 2)>(p, deal, u, stream);
    // Tiles of 64 steps for halves of many states, where each scheduler has two warps at most.
    if constexpr (kOnGrid && ScanKinds<Input, kSlots, kOnGrid, true>::kHalfSteps < 64)
        if (deal.wide == 0 && p.batch * (deal.half + deal.quarter) <= 8 * multiprocessors(u.get_device_index()))
            return launch_deal<Input, kSlots, kOnGrid, false>(p, deal, u, stream);
    launch_deal<Input, kSlots, kOnGrid, true>(p, deal, u, stream);
}

}  // namespace

template <typename Input>
void launch_scan_channels(const SelectiveScanParams &p, bool on_grid, const Tensor &u, cudaStream_t stream) {
    // An odd number of states leaves one of the second lane's empty, which is much where they are few.
    constexpr int kFewStates = 8;
    const bool halves = !on_grid || p.dstate % 2 == 0 || p.dstate > kFewStates;
    const int64_t schedulers = int64_t{4} * multiprocessors(u.get_device_index());
    const ScanDeal deal = deal_channels(p, schedulers, on_grid ? 1 : 16, halves);
    if (on_grid) launch_slots<Input, true>(p, deal, u, stream);
    else launch_slots<Input, false>(p, deal, u, stream);
}

template void launch_scan_channels<__half>(const SelectiveScanParams &, bool, const Tensor &, cudaStream_t);
template void launch_scan_channels<__nv_bfloat16>(const SelectiveScanParams &, bool, const Tensor &, cudaStream_t);

}  // namespace shedder
