// Launcher of the selective scan's form for many channels: deals channels to warps, launches.

#include "ops/cuda_scan_channels.h"

#include <algorithm>

#include "kernels/selective_scan_channels.cuh"
#include "ops/cuda_common.h"
#include "ops/cuda_launch.h"

namespace shedder {
namespace {

// As many whole rounds of warps of 32 channels as the schedulers of the GPU take, and what is left over in warps of 8,
// of 16, or, if it is more, in one more round, which is not to be the only one. Measured on an H200
// (docs/measured-facts.md, selective scan).
ScanDeal deal_channels(const SelectiveScanParams &p, int64_t schedulers) {
    const int64_t eights = (p.channels + 7) / 8, all = p.batch * eights, rounds = all / (4 * schedulers);
    const int64_t left = all - rounds * 4 * schedulers;
    const bool all_wide = left > 2 * schedulers && rounds > 0;
    ScanDeal deal{};
    deal.wide = static_cast<int>(all_wide ? (eights + 3) / 4 : std::min(rounds * schedulers / p.batch, eights / 4));
    const int rest = std::max<int>(static_cast<int>(eights) - 4 * deal.wide, 0);
    if (left <= schedulers) deal.quarter = rest;
    else deal.half = (rest + 1) / 2;
    auto ctas = [&](int64_t warps) { return static_cast<int>((warps * p.batch + kScanWarps - 1) / kScanWarps); };
    deal.first_half = ctas(deal.wide);
    deal.first_quarter = deal.first_half + ctas(deal.half);
    deal.ctas = deal.first_quarter + ctas(deal.quarter);
    return deal;
}

// Off the grid there are kernels for every second number of states.
template <typename Input, bool kOnGrid, int kSlots = kOnGrid ? 1 : 2>
void launch_slots(const SelectiveScanParams &p, const ScanDeal &deal, cudaStream_t stream) {
    if constexpr (kSlots < kMostScanSlots)
        if (p.dstate > kSlots) return launch_slots<Input, kOnGrid, kSlots + (kOnGrid ? 1 : 2)>(p, deal, stream);
    const auto kernel = selective_scan_channels<Input, kSlots, kOnGrid>;
    constexpr int kShared = kScanWarps * ScanKinds<Input, kSlots, kOnGrid>::kWarpBytes;
    STD_TORCH_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared) == cudaSuccess,
                    "shedder_cuda::selective_scan: no ", kShared, " bytes of shared memory");
    launch_ctas(kernel, {static_cast<unsigned>(deal.ctas), 32 * kScanWarps, kShared}, stream, p, deal);
}

}  // namespace

template <typename Input>
void launch_scan_channels(const SelectiveScanParams &p, bool on_grid, int64_t schedulers, cudaStream_t stream) {
    const ScanDeal deal = deal_channels(p, schedulers);
    if (on_grid) launch_slots<Input, true>(p, deal, stream);
    else launch_slots<Input, false>(p, deal, stream);
}

template void launch_scan_channels<__half>(const SelectiveScanParams &, bool, int64_t, cudaStream_t);
template void launch_scan_channels<__nv_bfloat16>(const SelectiveScanParams &, bool, int64_t, cudaStream_t);

}  // namespace shedder
