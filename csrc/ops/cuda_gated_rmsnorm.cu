// Launcher of the gated RMSNorm: checks, the number of threads for a row, as many CTAs as run at once.

#include <algorithm>
#include <vector>

#include "kernels/gated_rmsnorm.cuh"
#include "ops/cuda_arguments.h"
#include "ops/cuda_launchers.h"

namespace shedder {
namespace {

constexpr const char *kNormOp = "gated_rmsnorm";

template <typename T, bool kNormBeforeGate, bool kGeneral, int kVectors, bool kAligned>
void launch_norm(const GatedRMSNormParams &p, int32_t device, cudaStream_t stream) {
    constexpr int kWarpColumns = 32 * (16 / static_cast<int>(sizeof(T))) * kVectors;
    const auto kernel = gated_rmsnorm_fwd<T, kNormBeforeGate, kGeneral, kVectors, kAligned>;
    const int threads = (p.width + kWarpColumns - 1) / kWarpColumns * 32;
    // CTAs that one SM holds, for each number of warps; asked once, since asking takes longer than a launch.
    static int resident[kMaxNormThreads / 32 + 1] = {};
    static int multiprocessors = 0;
    int &per_sm = resident[threads / 32];
    if (per_sm == 0) {
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads, 0);
        per_sm = std::max(per_sm, 1);
    }
    const int64_t blocks = std::min<int64_t>(p.rows, int64_t{per_sm} * multiprocessors);
    kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(p);
}

template <typename T, int kVectors>
void launch_norm(const GatedRMSNormParams &p, bool norm_before_gate, bool aligned, int32_t device,
                 cudaStream_t stream) {
    const bool general = p.segments > 1 || p.bias.kind != FloatKind::kNone;
    const auto with_order = [&](auto before, auto many) {
        constexpr bool kBefore = decltype(before)::value, kMany = decltype(many)::value;
        if (aligned) return launch_norm<T, kBefore, kMany, kVectors, true>(p, device, stream);
        return launch_norm<T, kBefore, kMany, kVectors, false>(p, device, stream);
    };
    using Yes = std::true_type;
    using No = std::false_type;
    if (norm_before_gate) return general ? with_order(Yes{}, Yes{}) : with_order(Yes{}, No{});
    return general ? with_order(No{}, Yes{}) : with_order(No{}, No{});
}

}  // namespace

void gated_rmsnorm(const Tensor &x, const Tensor &weight, const MaybeTensor &bias, const MaybeTensor &z,
                   std::vector<int64_t> segments, std::vector<double> eps, bool norm_before_gate, Tensor y) {
    const Arguments arguments{kNormOp, x.get_device_index()};
    STD_TORCH_CHECK(x.dim() == 2, "shedder_cuda::gated_rmsnorm takes x (rows, D)");
    const int64_t rows = x.size(0), width = x.size(1);
    const int64_t size = element_size(x.scalar_type());
    STD_TORCH_CHECK(1 <= width && width <= kMaxNormThreads * (16 / size), "shedder_cuda::gated_rmsnorm: D is ", width,
                    "; accepted: up to ", kMaxNormThreads * (16 / size));
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
    const auto end_of = [&](const void *data, int64_t stride) {
        return static_cast<const char *>(data) + (std::max<int64_t>(rows - 1, 0) * stride + width) * size;
    };
    p.x_end = end_of(p.x, p.x_row_stride);
    if (p.z != nullptr) p.z_end = end_of(p.z, p.z_row_stride);
    p.weight = arguments.parameter(weight, "weight", {width});
    p.weight_stride = weight.stride(0);
    p.bias = arguments.parameter(bias, "bias", {width});
    p.bias_stride = bias ? bias->stride(0) : 0;
    arguments.check(y, "y", x.scalar_type(), {rows, width});
    STD_TORCH_CHECK(y.is_contiguous(), "shedder_cuda::gated_rmsnorm: y is not contiguous");
    p.y = y.mutable_data_ptr();
    if (rows == 0) return;
    const bool aligned = width * size % 16 == 0 && on_grid(p.x, size, {p.x_row_stride}) && on_grid(p.y, size, {width})
        && (p.z == nullptr || on_grid(p.z, size, {p.z_row_stride}));
    const torch::stable::accelerator::DeviceGuard guard(arguments.device);
    const cudaStream_t stream = current_stream(arguments.device);
    with_type(kNormOp, x.scalar_type(), [&](auto *type) {
        using T = std::remove_pointer_t<decltype(type)>;
        launch_norm<T, 2>(p, norm_before_gate, aligned, arguments.device, stream);
    });
    check_launch(kNormOp);
}

}  // namespace shedder

STABLE_TORCH_LIBRARY_FRAGMENT(shedder_cuda, m) {
    m.def("gated_rmsnorm(Tensor x, Tensor weight, Tensor? bias, Tensor? z, int[] segments, float[] eps, "
          "bool norm_before_gate, Tensor(a!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shedder_cuda, CUDA, m) {
    m.impl("gated_rmsnorm", TORCH_BOX(&shedder::gated_rmsnorm));
}
