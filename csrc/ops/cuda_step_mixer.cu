// Launcher of a Mamba-2 mixer's decode step: checks, CTAs for a row of the batch, the width of accesses, launch.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels/step_mixer.cuh"
#include "ops/cuda_cluster.h"
#include "ops/cuda_conv_step.h"
#include "ops/cuda_launchers.h"

namespace shedder {
namespace {

constexpr const char *kMixerOp = "step_mixer";
constexpr int64_t kMostStates = 8192;                        // G N: B and C of all groups lie in shared memory

// CTAs of a cluster: as many as the GPU runs in two turns, but each with work for its threads; two at the least, since
// one has nobody to send to.
int ranks_for(int64_t batch, int64_t rows, int64_t lanes, int32_t device) {
    const int64_t places = 2 * multiprocessors(device);
    const int64_t tasks = std::max<int64_t>(rows * lanes / (kMixerThreads / 2), 1);
    int ranks = largest_cluster(device);
    while (ranks > 2 && (batch * ranks > places || ranks > tasks) && rows <= ranks / 2 * kMixerShare) ranks /= 2;
    return ranks;
}

template <typename Input, typename State, int kWidth>
void launch_mixer(StepMixerParams &p, int32_t device, cudaStream_t stream) {
    p.lanes = 1;
    while (p.lanes * kStepStates < p.dstate) p.lanes *= 2;
    const int64_t rows = int64_t{p.heads} * p.headdim;
    const int ranks = ranks_for(p.conv.conv.batch, rows, p.lanes, device);
    p.share = static_cast<int>(((rows + ranks - 1) / ranks + 7) / 8 * 8);
    STD_TORCH_CHECK(p.share <= kMixerShare, "shedder_cuda::step_mixer: H P is ", rows, "; accepted: up to ",
                    ranks * kMixerShare);
    launch_clusters(kMixerOp, step_mixer_rows<Input, State, kWidth>, p.conv.conv.batch, ranks, kMixerThreads,
                    step_mixer_shared_floats(p, ranks) * 4, device, stream, p);
}

}  // namespace

// D: (H,) or (H, P).
void step_mixer(const Tensor &zxbcdt, Tensor conv_state, MaybeTensor ssm_state, const Tensor &conv_weight,
                const MaybeTensor &conv_bias, const MaybeTensor &dt_bias, const MaybeTensor &A, const Tensor &D,
                const MaybeTensor &norm_weight, int64_t groups, const MaybeTensor &head_to_group,
                const std::vector<int64_t> &segments, const std::vector<double> &eps, bool norm_before_gate,
                double dt_min, double dt_max, const MaybeTensor &cache_seqlens,
                const MaybeTensor &state_batch_indices, Tensor y) {
    const Arguments arguments{kMixerOp, zxbcdt.get_device_index()};
    STD_TORCH_CHECK(zxbcdt.dim() == 2 && conv_state.dim() == 3 && conv_weight.dim() == 2
                        && (!ssm_state || ssm_state->dim() == 4) && 1 <= D.dim() && D.dim() <= 2,
                    "shedder_cuda::step_mixer takes zxbcdt (B, columns), conv_state (slots, channels, K), "
                    "conv_weight (channels, W), ssm_state (slots, H, P, N), D (H,) or (H, P)");
    const bool has_ssm = ssm_state.has_value();
    const ScalarType dtype = zxbcdt.scalar_type();
    const int64_t size = element_size(dtype), batch = zxbcdt.size(0), channels = conv_weight.size(0);
    const int64_t slots = conv_state.size(0), heads = D.size(0);
    const int64_t dstate = has_ssm ? ssm_state->size(3) : 0, inner = channels - 2 * groups * dstate;
    const int64_t headdim = heads > 0 ? inner / heads : 0;
    STD_TORCH_CHECK(heads > 0 && inner > 0 && inner % heads == 0,
                    "shedder_cuda::step_mixer: conv_weight must have HP + 2GN rows");
    STD_TORCH_CHECK(has_ssm == dt_bias.has_value() && has_ssm == A.has_value() && has_ssm == (dstate > 0),
                    "shedder_cuda::step_mixer takes ssm_state, dt_bias and A together, or none of them");
    STD_TORCH_CHECK(dstate <= 256 && groups * dstate <= kMostStates, "shedder_cuda::step_mixer: N is ", dstate,
                    ", G is ", groups, "; accepted: N up to 256, G N up to ", kMostStates);
    STD_TORCH_CHECK(zxbcdt.size(1) >= inner + channels + (has_ssm ? heads : 0),
                    "shedder_cuda::step_mixer: zxbcdt has ", zxbcdt.size(1), " columns, too few");
    STD_TORCH_CHECK(batch < (int64_t{1} << 26), "shedder_cuda::step_mixer: B is ", batch, "; accepted: below 2^26");
    StepMixerParams p{};
    const int64_t row = zxbcdt.stride(0), column = zxbcdt.stride(1);
    const auto column_at = [&](int64_t c) {
        return static_cast<const char *>(zxbcdt.const_data_ptr()) + c * column * size;
    };
    with_type(kMixerOp, dtype, [](auto *) {});
    p.conv = mixer_conv(arguments, dtype, batch, column_at(inner), row, column, conv_weight, conv_bias, conv_state,
                        cache_seqlens, state_batch_indices);

    p.z = column_at(0);
    p.column_stride = column;
    p.heads = static_cast<int>(heads);
    p.headdim = static_cast<int>(headdim);
    p.groups = static_cast<int>(groups);
    p.dstate = static_cast<int>(dstate);
    p.dt_min = static_cast<float>(dt_min);
    p.dt_max = static_cast<float>(dt_max);
    if (has_ssm) {
        p.dt = column_at(inner + channels);
        arguments.check(*ssm_state, "ssm_state", {slots, heads, headdim, dstate});
        p.state = ssm_state->mutable_data_ptr();
        p.state_strides = {ssm_state->stride(0), ssm_state->stride(1), ssm_state->stride(2)};
        p.state_n_stride = ssm_state->stride(3);
        p.dt_bias = arguments.floats(dt_bias, "dt_bias", {heads});
        p.bias_stride = dt_bias->stride(0);
        p.A = arguments.floats(A, "A", {heads});
        p.A_stride = A->stride(0);
    }
    const bool even = heads == 1 || headdim == 1 || p.state_strides.head == headdim * p.state_strides.place;
    p.row_stride = !even ? -1 : headdim == 1 ? p.state_strides.head : p.state_strides.place;
    if (D.dim() == 2) {
        p.D = arguments.floats(D, "D", {heads, headdim});
        p.D_place_stride = D.stride(1);
    } else {
        p.D = arguments.floats(D, "D", {heads});
    }
    p.D_head_stride = D.stride(0);
    STD_TORCH_CHECK(groups == 1 || head_to_group,
                    "shedder_cuda::step_mixer: head_to_group is needed for more than one group");
    p.head_to_group = arguments.integers(head_to_group, "head_to_group", {heads});
    p.map_stride = head_to_group ? head_to_group->stride(0) : 0;
    if (norm_weight) {
        arguments.check(*norm_weight, "norm_weight", dtype, {inner});
        p.norm_weight = norm_weight->const_data_ptr();
        STD_TORCH_CHECK(!segments.empty() && segments.size() <= kMixerSegments && eps.size() == segments.size(),
                        "shedder_cuda::step_mixer takes 1 to ", kMixerSegments, " segments, with an eps for each");
        p.norm_weight_stride = norm_weight->stride(0);
        p.norm_before_gate = norm_before_gate;
        p.segments = static_cast<int>(segments.size());
        int64_t covered = 0;
        for (size_t s = 0; s < segments.size(); ++s) {
            covered += segments[s];
            STD_TORCH_CHECK(segments[s] >= 1 && covered <= inner, "shedder_cuda::step_mixer: segment ", s, " has ",
                            segments[s], " channels");
            p.bounds[s + 1] = static_cast<int>(covered);
            p.inverse[s] = 1.f / static_cast<float>(segments[s]);
            p.eps[s] = static_cast<float>(eps[s]);
        }
        STD_TORCH_CHECK(covered == inner, "shedder_cuda::step_mixer: segments add up to ", covered, ", not to HP = ",
                        inner);
    }
    arguments.check(y, "y", dtype, {batch, inner});
    STD_TORCH_CHECK(y.is_contiguous(), "shedder_cuda::step_mixer: y is not contiguous");
    p.y = y.mutable_data_ptr();
    if (batch == 0) return;

    arguments.launch(dtype, [&](auto *input, cudaStream_t stream) {
        using Input = std::remove_pointer_t<decltype(input)>;
        if (!has_ssm) return launch_mixer<Input, float, 1>(p, arguments.device, stream);
        with_type(kMixerOp, ssm_state->scalar_type(), [&](auto *kept) {
            using State = std::remove_pointer_t<decltype(kept)>;
            constexpr int kWidest = 16 / sizeof(State);
            const bool wide = dstate % kWidest == 0 && p.state_n_stride == 1 && p.row_stride >= 0
                && on_grid(p.state, sizeof(State),
                           {p.state_strides.batch, p.state_strides.head, p.state_strides.place});
            if (wide) return launch_mixer<Input, State, kWidest>(p, arguments.device, stream);
            launch_mixer<Input, State, 1>(p, arguments.device, stream);
        });
    });
}

}  // namespace shedder

STABLE_TORCH_LIBRARY_FRAGMENT(shedder_cuda, m) {
    m.def("step_mixer(Tensor zxbcdt, Tensor(a!) conv_state, Tensor(b!)? ssm_state, Tensor conv_weight, "
          "Tensor? conv_bias, Tensor? dt_bias, Tensor? A, Tensor D, Tensor? norm_weight, int groups, "
          "Tensor? head_to_group, int[] segments, float[] eps, bool norm_before_gate, float dt_min, float dt_max, "
          "Tensor? cache_seqlens, Tensor? state_batch_indices, Tensor(c!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shedder_cuda, CUDA, m) { m.impl("step_mixer", TORCH_BOX(&shedder::step_mixer)); }
