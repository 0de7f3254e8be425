// Launcher of the selective scan's form for many channels: deals channels to warps, launches.

#include "ops/cuda_scan_channels.h"

#include <algorithm>

#include "kernels/selective_scan_channels.cuh"
#include "ops/cuda_common.h"
#include "ops/cuda_device.h"
#include "ops/cuda_launch.h"

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

// Off the grid there are kernels for every second number of states.
template <typename Input, bool kOnGrid, int kSlots = kOnGrid ? 1 : 2>
void launch_slots(const SelectiveScanParams &p, const ScanDeal &deal, int32_t device, cudaStream_t stream) {
    if constexpr (kSlots < kMostScanSlots)
        if (p.dstate > kSlots) return launch_slots<Input, kOnGrid, kSlots + (kOnGrid ? 1 : 2)>(p, deal, device, stream);
    const auto kernel = selective_scan_channels<Input, kSlots, kOnGrid>;
    using Kinds = ScanKinds<Input, kSlots, kOnGrid>;
    // Where all warps run at once, a CTA for each multiprocessor; else CTAs of one warp for each scheduler.
    const int ctas = (p.batch * (deal.wide + deal.half + deal.quarter) + 3) / 4, there = multiprocessors(device);
    const int most = std::min(shared_bytes_of_cta(device) / Kinds::kRoundBytes, Kinds::kMostRounds);
    const int rounds = ctas <= there * most ? most : 1, shared = rounds * Kinds::kRoundBytes;
    STD_TORCH_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared) == cudaSuccess,
                    "shedder_cuda::selective_scan: no ", shared, " bytes of shared memory");
    const int grid = rounds > 1 ? there : ctas;
    launch_ctas(kernel, {static_cast<unsigned>(grid), 128u * rounds, shared}, stream, p, deal);
}

}  // namespace

template <typename Input>
void launch_scan_channels(const SelectiveScanParams &p, bool on_grid, int32_t device, cudaStream_t stream) {
    // An odd number of states leaves one of the second lane's empty, which is much where they are few.
    constexpr int kFewStates = 8;
    const bool halves = !on_grid || p.dstate % 2 == 0 || p.dstate > kFewStates;
    const ScanDeal deal = deal_channels(p, int64_t{4} * multiprocessors(device), on_grid ? 1 : 16, halves);
    if (on_grid) launch_slots<Input, true>(p, deal, device, stream);
    else launch_slots<Input, false>(p, deal, device, stream);
}

template void launch_scan_channels<__half>(const SelectiveScanParams &, bool, int32_t, cudaStream_t);
template void launch_scan_channels<__nv_bfloat16>(const SelectiveScanParams &, bool, int32_t, cudaStream_t);

}  // namespace shedder
