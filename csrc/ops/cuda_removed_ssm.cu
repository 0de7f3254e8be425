// Launcher of a layer without its SSM: checks, lanes for a segment, tokens for a CTA, launch.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels/removed_ssm.cuh"
#include "ops/cuda_arguments.h"
#include "ops/cuda_device.h"
#include "ops/cuda_launch.h"

namespace shedder {
namespace {

constexpr const char *kRemovedOp = "removed_ssm";

ConvStrides token_strides(const Tensor &t) { return {t.stride(0), t.stride(2), t.stride(1)}; }

// Tokens of a CTA: so many that the CTAs fill `slots` a whole number of times, with little at the end.
int tokens_for(int64_t length, int64_t batch, int64_t slots) {
    constexpr int64_t kSetup = 12;                           // a CTA's start, in tokens
    int64_t best = length, least = INT64_MAX;
    for (int64_t runs = 1; runs <= std::min<int64_t>(length, 512); ++runs) {
        const int64_t tokens = (length + runs - 1) / runs;
        const int64_t waves = (batch * ((length + tokens - 1) / tokens) + slots - 1) / slots;
        if (waves * (tokens + kSetup) < least) {
            least = waves * (tokens + kSetup);
            best = tokens;
        }
    }
    return static_cast<int>(best);
}

template <typename T>
constexpr FloatKind kind_of() {
    return std::is_same_v<T, float> ? FloatKind::kFloat
        : std::is_same_v<T, __half> ? FloatKind::kHalf : FloatKind::kBFloat16;
}

template <typename T, int kThreads, bool kNormBeforeGate, int kLanes, bool kPlain>
void launch_removed(RemovedSSMParams &q, int threads, int32_t device, cudaStream_t stream) {
    const auto kernel = removed_ssm_fwd<T, kThreads, kNormBeforeGate, kLanes, kPlain>;
    constexpr int bytes = static_cast<int>(removed_ssm_shared_bytes<T>(kThreads));
    // CTAs that run at once, for each number of warps; asked once, since asking takes longer than a launch.
    static int64_t slots[kThreads / 32 + 1] = {};
    if (slots[threads / 32] == 0) {
        int resident = 0;
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, bytes);
        slots[threads / 32] = int64_t{std::max(resident, 1)} * multiprocessors(device);
    }
    q.conv.steps = tokens_for(q.conv.length, q.conv.batch, slots[threads / 32]);
    const dim3 blocks((q.conv.length + q.conv.steps - 1) / q.conv.steps, static_cast<unsigned>(q.conv.batch));
    launch_ctas(kernel, {blocks, static_cast<unsigned>(threads), bytes}, stream, q);
}

template <typename T, bool kNormBeforeGate, int kLanes>
void launch_removed(RemovedSSMParams &q, int32_t device, cudaStream_t stream) {
    constexpr int kColumns = kLanes * (16 / static_cast<int>(sizeof(T)));
    for (int s = 0; s < q.segments; ++s)
        q.groups[s + 1] = q.groups[s] + (q.bounds[s + 1] - q.bounds[s] + kColumns - 1) / kColumns;
    const int threads = (q.groups[q.segments] * kLanes + 31) / 32 * 32;
    STD_TORCH_CHECK(threads <= kRemovedThreads, "shedder_cuda::removed_ssm: ", q.segments, " segments of ",
                    q.conv.channels, " channels take more threads than a token has");
    const auto is_plain = [](const Parameter &one) { return !one.present() || one.kind == kind_of<T>(); };
    const bool plain = q.conv.width == kMaxWidth && q.conv.weight_tap_stride == 1
        && q.conv.weight_channel_stride == kMaxWidth
        && on_grid(q.conv.weight.data, sizeof(T), {}, kMaxWidth * sizeof(T)) && is_plain(q.conv.weight)
        && is_plain(q.conv.bias) && is_plain(q.norm_weight);
    const auto with_threads = [&](auto most) {
        constexpr int kThreads = decltype(most)::value;
        if (plain) return launch_removed<T, kThreads, kNormBeforeGate, kLanes, true>(q, threads, device, stream);
        launch_removed<T, kThreads, kNormBeforeGate, kLanes, false>(q, threads, device, stream);
    };
    if (threads <= kHalfRemovedThreads) return with_threads(std::integral_constant<int, kHalfRemovedThreads>{});
    with_threads(std::integral_constant<int, kRemovedThreads>{});
}

template <typename T, bool kNormBeforeGate>
void launch_removed(RemovedSSMParams &q, int32_t device, cudaStream_t stream) {
    if (q.segments == 1) return launch_removed<T, kNormBeforeGate, 32>(q, device, stream);
    launch_removed<T, kNormBeforeGate, 8>(q, device, stream);
}

void removed_ssm(const Tensor &x, const Tensor &z, const Tensor &weight, const MaybeTensor &bias, const MaybeTensor &D,
                 const MaybeTensor &norm_weight, std::vector<int64_t> segments, std::vector<double> eps,
                 bool norm_before_gate, const MaybeTensor &initial_states, Tensor y) {
    const Arguments arguments{kRemovedOp, x.get_device_index()};
    STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2, "shedder_cuda::removed_ssm takes x (B, L, D) and weight (D, W)");
    RemovedSSMParams q{};
    CausalConv1dParams &p = q.conv;
    p.batch = x.size(0);
    STD_TORCH_CHECK(p.batch < 65536 && x.size(1) < (int64_t{1} << 30), "shedder_cuda::removed_ssm: B is ", p.batch,
                    " and L is ", x.size(1), "; accepted: below 65536 and 2^30");
    p.length = static_cast<int>(x.size(1));
    p.channels = static_cast<int>(x.size(2));
    p.width = static_cast<int>(weight.size(1));
    STD_TORCH_CHECK(1 <= p.width && p.width <= kMaxWidth, "shedder_cuda::removed_ssm: W is ", p.width,
                    "; accepted: 1..4");
    arguments.check(z, "z", x.scalar_type(), {p.batch, p.length, p.channels});
    arguments.check(y, "y", x.scalar_type(), {p.batch, p.length, p.channels});
    p.weight = arguments.parameter(weight, "weight", {p.channels, p.width});
    p.bias = arguments.parameter(bias, "bias", {p.channels});
    q.norm_weight = arguments.parameter(norm_weight, "norm_weight", {p.channels});
    p.weight_channel_stride = weight.stride(0);
    p.weight_tap_stride = weight.stride(1);
    p.bias_stride = bias ? bias->stride(0) : 0;
    q.norm_weight_stride = norm_weight ? norm_weight->stride(0) : 0;
    q.headdim = 1;
    if (D) {
        STD_TORCH_CHECK(D->dim() == 2 && D->size(0) * D->size(1) == p.channels,
                        "shedder_cuda::removed_ssm: D has the wrong shape");
        q.D = arguments.floats(D, "D", {D->size(0), D->size(1)});
        q.headdim = static_cast<int>(D->size(1));
        q.D_head_stride = D->stride(0);
        q.D_place_stride = D->stride(1);
    }
    if (initial_states) {
        arguments.check(*initial_states, "initial_states", x.scalar_type(), {p.batch, p.channels, p.width - 1});
        p.initial_states = p.width > 1 ? initial_states->const_data_ptr() : nullptr;
        p.initial_strides = {initial_states->stride(0), initial_states->stride(1), initial_states->stride(2)};
    }
    if (!norm_weight) segments = {p.channels}, eps = {0.0};
    STD_TORCH_CHECK(!segments.empty() && segments.size() <= kRemovedSegments && eps.size() == segments.size(),
                    "shedder_cuda::removed_ssm takes 1 to ", kRemovedSegments, " segments, with an eps for each");
    q.segments = static_cast<int>(segments.size());
    const int64_t size = element_size(x.scalar_type());
    bool fits = true;
    for (size_t s = 0; s < segments.size(); ++s) {
        fits = fits && segments[s] >= 1 && segments[s] * size % 16 == 0;
        q.bounds[s + 1] = q.bounds[s] + static_cast<int>(segments[s]);
        q.inverse[s] = 1.f / static_cast<float>(segments[s]);
        q.eps[s] = static_cast<float>(eps[s]);
    }
    STD_TORCH_CHECK(q.bounds[q.segments] == p.channels, "shedder_cuda::removed_ssm: segments add up to ",
                    q.bounds[q.segments], ", not to D = ", p.channels);
    p.x = x.const_data_ptr();
    q.z = z.const_data_ptr();
    p.y = y.mutable_data_ptr();
    p.x_strides = token_strides(x);
    q.z_strides = token_strides(z);
    p.y_strides = token_strides(y);
    const auto aligned = [&](const void *data, const ConvStrides &t) {
        return t.channel == 1 && on_grid(data, size, {p.batch > 1 ? t.batch : 0, p.length > 1 ? t.time : 0});
    };
    STD_TORCH_CHECK(fits && aligned(p.x, p.x_strides) && aligned(q.z, q.z_strides) && aligned(p.y, p.y_strides),
                    "shedder_cuda::removed_ssm: rows and segments must lie on the grid of 16 bytes");
    if (p.batch == 0 || p.length == 0) return;
    arguments.launch(x.scalar_type(), [&](auto *type, cudaStream_t stream) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (norm_before_gate) return launch_removed<T, true>(q, arguments.device, stream);
        launch_removed<T, false>(q, arguments.device, stream);
    });
}

}  // namespace
}  // namespace shedder

STABLE_TORCH_LIBRARY_FRAGMENT(shedder_cuda, m) {
    m.def("removed_ssm(Tensor x, Tensor z, Tensor weight, Tensor? bias, Tensor? D, Tensor? norm_weight, int[] segments, "
          "float[] eps, bool norm_before_gate, Tensor? initial_states, Tensor(a!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shedder_cuda, CUDA, m) {
    m.impl("removed_ssm", TORCH_BOX(&shedder::removed_ssm));
}
