// Launcher of the selective scan's form for many channels: deals channels to warps, launches.

#include "ops/cuda_scan_channels.h"

#include <algorithm>

#include "kernels/selective_scan_channels.cuh"
#include "ops/cuda_common.h"
#include "ops/cuda_device.h"
#include "ops/cuda_launch.h"

namespace shedder {
namespace {

// As many whole rounds of shares of 32 channels as the schedulers of the GPU take. What is left over makes the round
// that is least to do: of shares of 8, of 16, of both in two; or of 32, which is not to be the only one. Measured on an
// H200 (docs/measured-facts.md, selective scan).
ScanDeal deal_channels(const SelectiveScanParams &p, int64_t schedulers, int together) {
    const int eights = (p.channels + 8 * together - 1) / (8 * together);     // in what follows shares come `together`
    const int64_t all = int64_t{p.batch} * together, rounds = all * eights / (4 * schedulers);
    const int wide = static_cast<int>(std::min<int64_t>(rounds * schedulers / all, eights / 4));
    const int left = eights - 4 * wide, halves = (left + 1) / 2;
    const int half = static_cast<int>(std::min<int64_t>(schedulers / all, left / 2)), quarter = left - 2 * half;
    auto fit = [&](int64_t shares) { return shares * all <= schedulers; };
    auto deal = [&](int wide, int half, int quarter) {
        return ScanDeal{wide * together, half * together, quarter * together};
    };
    if (fit(left)) return deal(wide, 0, left);
    if (fit(halves)) return deal(wide, halves, 0);
    if (rounds < 2 && fit(quarter)) return deal(wide, half, quarter);
    if (rounds > 0) return deal((eights + 3) / 4, 0, 0);
    return deal(wide, halves, 0);
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
    const ScanDeal deal = deal_channels(p, int64_t{4} * multiprocessors(device), on_grid ? 1 : 8);
    if (on_grid) launch_slots<Input, true>(p, deal, device, stream);
    else launch_slots<Input, false>(p, deal, device, stream);
}

template void launch_scan_channels<__half>(const SelectiveScanParams &, bool, int32_t, cudaStream_t);
template void launch_scan_channels<__nv_bfloat16>(const SelectiveScanParams &, bool, int32_t, cudaStream_t);

}  // namespace shedder
