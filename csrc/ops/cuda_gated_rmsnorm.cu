// Launcher of the gated RMSNorm: checks, the number of threads for a row, as many CTAs as run at once.

#include <algorithm>
#include <numeric>
#include <vector>

#include "kernels/gated_rmsnorm.cuh"
#include "ops/cuda_arguments.h"
#include "ops/cuda_device.h"
#include "ops/cuda_launch.h"
#include "ops/cuda_launchers.h"

namespace shedder {
namespace {

constexpr const char *kNormOp = "gated_rmsnorm";

// How x and z lie against the 16-byte grid, as seen from y.
Grid grid_of(const GatedRMSNormParams &p, int64_t size) {
    const auto as_y = [&](const void *data, int64_t stride) {
        return lie_alike(data, p.y, size, {stride - p.width});
    };
    if (!as_y(p.x, p.x_row_stride) || (p.z != nullptr && !as_y(p.z, p.z_row_stride))) return Grid::kOther;
    bool whole = on_grid(p.y, size, {});
    for (int s = 0; s < p.segments; ++s) whole = whole && p.bounds[s + 1] * size % 16 == 0;
    return whole ? Grid::kWhole : Grid::kSame;
}

// False if a row takes more threads than `most`.
template <typename T, bool kNormBeforeGate, int kLanes, Grid kGrid, bool kBias, int kVectors>
bool launch_with(GatedRMSNormParams &p, int most, int32_t device, cudaStream_t stream) {
    constexpr int kCount = 16 / static_cast<int>(sizeof(T)), kSector = 2 * kCount, kLine = 4 * kSector;
    const auto kernel = gated_rmsnorm_fwd<T, kNormBeforeGate, kLanes, kGrid, kBias, kVectors>;
    // Groups of a segment start at a multiple of `step` columns of memory, at or before it. Returns the threads of a row.
    const auto deal_groups = [&](int step) {
        p.step = step;
        const bool rows_aligned = p.width % step == 0 && reinterpret_cast<uintptr_t>(p.y) % (step * sizeof(T)) == 0;
        for (int s = 0; s < p.segments; ++s) {
            const bool aligned = kGrid == Grid::kWhole || (rows_aligned && p.bounds[s] % step == 0);
            const int columns = p.bounds[s + 1] - p.bounds[s] + (aligned ? 0 : step - 1);
            p.groups[s + 1] = p.groups[s] + (columns + kLanes * kCount - 1) / (kLanes * kCount);
        }
        return (p.groups[p.segments] * kLanes + 32 * kVectors - 1) / (32 * kVectors) * 32;
    };
    int threads = deal_groups(kSector);
    if (threads > most) threads = deal_groups(kCount);
    else if (deal_groups(kLine) > threads) deal_groups(kSector);
    if (threads > most) return false;
    // CTAs that one SM holds, for each number of warps; asked once, since asking takes longer than a launch.
    static int of_threads[kMaxNormThreads / 32 + 1] = {};
    int &per_sm = of_threads[threads / 32];
    if (per_sm == 0) {
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads, 0);
        per_sm = std::max(per_sm, 1);
    }
    // As many as have work to the last round. Rows of one CTA lie alike: as many rows apart as make up whole steps.
    const int64_t apart = kGrid == Grid::kWhole ? 1 : p.step / std::gcd(p.width, p.step);
    const int64_t resident = std::max(int64_t{per_sm} * multiprocessors(device) / apart, int64_t{1}) * apart;
    const int64_t rounds = (p.rows + resident - 1) / resident, even = (p.rows + rounds - 1) / rounds;
    const int64_t blocks = std::min(p.rows, (even + apart - 1) / apart * apart);
    launch_ctas(kernel, {static_cast<unsigned>(blocks), static_cast<unsigned>(threads)}, stream, p);
    return true;
}

template <typename T, bool kNormBeforeGate, int kLanes, Grid kGrid, bool kBias = false>
void launch_norm(GatedRMSNormParams &p, int32_t device, cudaStream_t stream) {
    // One vector for each thread where the threads of a row, or the rows of a multiprocessor, are few. Measured on an H200.
    constexpr int kFewThreads = 256, kFewRows = 16;
    const int most = p.rows <= kFewRows * multiprocessors(device) ? kMaxNormThreads : kFewThreads;
    if constexpr (!kBias)
        if (launch_with<T, kNormBeforeGate, kLanes, kGrid, false, 1>(p, most, device, stream)) return;
    const bool launched =
        launch_with<T, kNormBeforeGate, kLanes, kGrid, kBias, kMostNormVectors>(p, kMaxNormThreads, device, stream);
    STD_TORCH_CHECK(launched, "shedder_cuda::gated_rmsnorm: ", p.segments, " segments of ", p.width,
                    " channels take more threads than a row has");
}

template <typename T>
void launch_norm(GatedRMSNormParams &p, bool norm_before_gate, int32_t device, cudaStream_t stream) {
    const Grid grid = grid_of(p, sizeof(T));
    const auto with_order = [&](auto before, auto lanes) {
        constexpr bool kBefore = decltype(before)::value;
        constexpr int kLanes = decltype(lanes)::value;
        if (p.bias.present()) return launch_norm<T, kBefore, kSegmentLanes, Grid::kOther, true>(p, device, stream);
        switch (grid) {
            case Grid::kWhole: return launch_norm<T, kBefore, kLanes, Grid::kWhole>(p, device, stream);
            case Grid::kSame: return launch_norm<T, kBefore, kLanes, Grid::kSame>(p, device, stream);
            case Grid::kOther: return launch_norm<T, kBefore, kLanes, Grid::kOther>(p, device, stream);
        }
    };
    const auto with_lanes = [&](auto lanes) {
        return norm_before_gate ? with_order(std::true_type{}, lanes) : with_order(std::false_type{}, lanes);
    };
    if (p.segments == 1) return with_lanes(std::integral_constant<int, 32>{});
    with_lanes(std::integral_constant<int, kSegmentLanes>{});
}

}  // namespace

void gated_rmsnorm(const Tensor &x, const Tensor &weight, const MaybeTensor &bias, const MaybeTensor &z,
                   std::vector<int64_t> segments, std::vector<double> eps, bool norm_before_gate, Tensor y) {
    const Arguments arguments{kNormOp, x.get_device_index()};
    STD_TORCH_CHECK(x.dim() == 2, "shedder_cuda::gated_rmsnorm takes x (rows, D)");
    const int64_t rows = x.size(0), width = x.size(1);
    const int64_t size = element_size(x.scalar_type());
    const int64_t vector = 16 / size;
    const int64_t widest = kMaxNormThreads * kMostNormVectors * vector - (width % vector ? vector - 1 : 0);
    STD_TORCH_CHECK(1 <= width && width <= widest, "shedder_cuda::gated_rmsnorm: D is ", width, "; accepted: up to ",
                    widest);
    STD_TORCH_CHECK(!segments.empty() && segments.size() <= kMaxSegments && eps.size() == segments.size(),
                    "shedder_cuda::gated_rmsnorm takes 1 to ", kMaxSegments, " segments, with an eps for each");
    GatedRMSNormParams p{};
    p.rows = rows;
    p.width = static_cast<int>(width);
    p.segments = static_cast<int>(segments.size());
    for (size_t s = 0; s < segments.size(); ++s) {
        STD_TORCH_CHECK(segments[s] >= 1 && segments[s] <= width, "shedder_cuda::gated_rmsnorm: segment ", s, " has ",
                        segments[s], " channels");
        p.bounds[s + 1] = p.bounds[s] + static_cast<int>(segments[s]);
        p.inverse[s] = 1.f / static_cast<float>(segments[s]);
        p.eps[s] = static_cast<float>(eps[s]);
    }
    STD_TORCH_CHECK(p.bounds[p.segments] == width, "shedder_cuda::gated_rmsnorm: segments add up to ",
                    p.bounds[p.segments], ", not to D = ", width);
    arguments.check(x, "x", {rows, width});
    p.x = x.const_data_ptr();
    p.x_row_stride = x.stride(0);
    STD_TORCH_CHECK(width == 1 || x.stride(1) == 1, "shedder_cuda::gated_rmsnorm: the columns of x are not adjacent");
    if (z) {
        arguments.check(*z, "z", x.scalar_type(), {rows, width});
        STD_TORCH_CHECK(width == 1 || z->stride(1) == 1,
                        "shedder_cuda::gated_rmsnorm: the columns of z are not adjacent");
        p.z = z->const_data_ptr();
        p.z_row_stride = z->stride(0);
    }
    // A vector reaches at most one element less than itself beyond its row.
    const auto inner_rows = [&](int64_t stride) {
        return stride <= 0 ? 0 : std::max<int64_t>(rows - (vector - 1 + stride - 1) / stride, 0);
    };
    p.inner_rows = std::min(inner_rows(p.x_row_stride), p.z == nullptr ? rows : inner_rows(p.z_row_stride));
    p.weight = arguments.parameter(weight, "weight", {width});
    p.weight_stride = weight.stride(0);
    p.bias = arguments.parameter(bias, "bias", {width});
    p.bias_stride = bias ? bias->stride(0) : 0;
    arguments.check(y, "y", x.scalar_type(), {rows, width});
    STD_TORCH_CHECK(y.is_contiguous(), "shedder_cuda::gated_rmsnorm: y is not contiguous");
    p.y = y.mutable_data_ptr();
    if (rows == 0) return;
    arguments.launch(x.scalar_type(), [&](auto *type, cudaStream_t stream) {
        using T = std::remove_pointer_t<decltype(type)>;
        launch_norm<T>(p, norm_before_gate, arguments.device, stream);
    });
}

}  // namespace shedder

STABLE_TORCH_LIBRARY_FRAGMENT(shedder_cuda, m) {
    m.def("gated_rmsnorm(Tensor x, Tensor weight, Tensor? bias, Tensor? z, int[] segments, float[] eps, "
          "bool norm_before_gate, Tensor(a!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shedder_cuda, CUDA, m) {
    m.impl("gated_rmsnorm", TORCH_BOX(&shedder::gated_rmsnorm));
}
