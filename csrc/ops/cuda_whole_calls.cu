// Calls of public functions taken whole: the outputs are allocated, the views made and the kernels launched without
// Python in between, which at batch 1 takes longer than the kernels.
//
// Each op of torch.ops.shedder_calls takes the arguments of the public function of its name as they came. What a
// launcher refuses is declined, by returning nothing, with no input changed; shedder/ops/whole.py then goes the long
// way, whose checks know every case and name what is wrong.

#include <algorithm>
#include <array>
#include <exception>
#include <tuple>

#include <torch/csrc/stable/ops.h>

#include "ops/cuda_launchers.h"

namespace shedder::calls {
namespace {

using MaybeTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using Outputs = std::tuple<MaybeTensor, MaybeTensor>;       // the result and the final state, if it was asked for

template <typename Call>
Outputs unless_refused(Call call) {
    try {
        return call();
    } catch (const std::exception &) {
        return {};
    }
}

void require(bool holds) { STD_TORCH_CHECK(holds, "shedder_calls: not taken"); }

// The dtypes that the public convolution accepts together; the launcher would take others too.
void require_one_dtype(const Tensor &weight, const MaybeTensor &bias) {
    require(!bias || bias->scalar_type() == weight.scalar_type());
}

void require_chunk_size(int64_t size) { require(1 <= size && size <= 1 << 20); }        // of no other use here

Tensor empty(const Tensor &like, ScalarType dtype, Sizes sizes, Sizes strides) {
    using torch::stable::detail::from;
    using torch::stable::detail::to;
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(),
                                                           to<int32_t>(from(dtype)), aoti_torch_device_type_cuda(),
                                                           like.get_device_index(), &handle));
    return Tensor(handle);
}

Tensor empty(const Tensor &like, ScalarType dtype, Sizes sizes) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size() - 1; i-- > 0;) strides[i] = strides[i + 1] * sizes[i + 1];
    return empty(like, dtype, sizes, strides);
}

// Without gaps, its dimensions in the order in memory of those of t.
Tensor empty_in_order_of(const Tensor &t) {
    std::array<int64_t, 3> order{2, 1, 0}, strides;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return t.stride(a) < t.stride(b); });
    int64_t stride = 1;
    for (int64_t i : order) strides[i] = stride, stride *= t.size(i);
    return empty(t, t.scalar_type(), t.sizes(), strides);
}

// So many elements, and those up to the next line of the caches.
int64_t in_lines(ScalarType dtype, int64_t elements) {
    const int64_t line = 128 / element_size(dtype);
    return (elements + line - 1) / line * line;
}

// With the shape of t, channels (dimension 1) adjacent and those of each token from a line on.
Tensor empty_in_rows(const Tensor &t) {
    const int64_t pitch = in_lines(t.scalar_type(), t.size(1));
    return empty(t, t.scalar_type(), t.sizes(), std::array<int64_t, 3>{t.size(2) * pitch, 1, pitch});
}

// The elements of t from `offset` on, seen with other sizes and strides.
Tensor view(const Tensor &t, int64_t offset, Sizes sizes, Sizes strides) {
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), sizes.size(), sizes.data(), strides.data(),
                                                                 offset, &handle));
    return Tensor(handle);
}

// Parameters as the kernels read them. Other dtypes are left for the launchers to refuse.
Tensor as_float(const Tensor &t) {
    const ScalarType dtype = t.scalar_type();
    return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ? torch::stable::to(t, ScalarType::Float) : t;
}

MaybeTensor as_float(const MaybeTensor &t) { return t ? MaybeTensor(as_float(*t)) : std::nullopt; }

// B or C as (B, G, N, L), or unchanged.
Tensor with_groups(const Tensor &t) {
    if (t.dim() != 3) return t;
    return view(t, 0, {t.size(0), 1, t.size(1), t.size(2)}, {t.stride(0), 0, t.stride(1), t.stride(2)});
}

// (..., D) as (rows, D), where rows lie at one distance.
Tensor as_rows(const Tensor &t) {
    const int64_t last = t.dim() - 1;
    int64_t rows = 1, distance = 0;
    for (int64_t i = last; i-- > 0;) {
        if (t.size(i) == 1) continue;
        if (rows == 1) distance = t.stride(i);
        require(t.stride(i) == distance * rows);
        rows *= t.size(i);
    }
    return view(t, 0, {rows, t.size(last)}, {rows == 1 ? t.size(last) : distance, t.stride(last)});
}

using Segments = std::optional<std::vector<int64_t>>;
using SegmentEps = std::optional<std::vector<double>>;

// Segments of the norm: those given, or one for each of `groups` equal runs; and the eps of each.
void complete_segments(int64_t width, int64_t groups, double eps, Segments &segments, SegmentEps &segment_eps) {
    if (!segments) {
        require(groups >= 1 && width % groups == 0);
        segments.emplace(groups, width / groups);
    }
    if (!segment_eps) segment_eps.emplace(segments->size(), eps);
}

Outputs selective_scan_fn(const Tensor &u, const Tensor &delta, const Tensor &A, const Tensor &B, const Tensor &C,
                          const MaybeTensor &D, const MaybeTensor &z, const MaybeTensor &delta_bias,
                          bool delta_softplus, bool return_last_state, const MaybeTensor &initial_state,
                          const MaybeTensor &channel_to_group, const MaybeTensor &seq_idx) {
    return unless_refused([&]() -> Outputs {
        require(u.dim() == 3 && A.dim() == 2 && u.numel() > 0);
        const Tensor y = empty_in_order_of(u);
        MaybeTensor state;
        if (return_last_state) state = empty(u, ScalarType::Float, {u.size(0), u.size(1), A.size(1)});
        selective_scan(u, delta, A, with_groups(B), with_groups(C), as_float(D), z, as_float(delta_bias),
                       delta_softplus, initial_state, channel_to_group, seq_idx, y, state);
        return {y, state};
    });
}

Outputs mamba_chunk_scan_combined(const Tensor &x, const Tensor &dt, const Tensor &A, const Tensor &B, const Tensor &C,
                                  int64_t chunk_size, const MaybeTensor &D, const MaybeTensor &z,
                                  const MaybeTensor &dt_bias, const MaybeTensor &initial_states, bool dt_softplus,
                                  double dt_min, double dt_max, bool return_final_states,
                                  const Tensor &head_to_group) {
    return unless_refused([&]() -> Outputs {
        require(x.dim() == 4 && B.dim() == 4 && x.numel() > 0 && x.size(3) <= 256 && dt_min <= dt_max);
        require_chunk_size(chunk_size);
        const Tensor y = empty(x, x.scalar_type(), x.sizes());
        MaybeTensor states;
        if (return_final_states) states = empty(x, ScalarType::Float, {x.size(0), x.size(2), x.size(3), B.size(3)});
        ssd(x, dt, as_float(A), B, C, as_float(D), z, as_float(dt_bias), dt_softplus, dt_min, dt_max, head_to_group,
            initial_states, std::nullopt, y, states, 0);
        return {y, states};
    });
}

// zxbcdt: (B, L, columns), [z | x | B | C | dt | padding].
Outputs mamba_split_conv1d_scan_combined(const Tensor &zxbcdt, const Tensor &conv_weight, const MaybeTensor &conv_bias,
                                         const MaybeTensor &dt_bias, const Tensor &A, const Tensor &D,
                                         int64_t chunk_size, const MaybeTensor &initial_states, double dt_min,
                                         double dt_max, bool return_final_states, bool silu, const MaybeTensor &norm_weight,
                                         double norm_eps, std::optional<int64_t> headdim_of_D, int64_t groups,
                                         bool norm_before_gate, const Tensor &head_to_group,
                                         std::optional<int64_t> expected_dstate, Segments segments,
                                         SegmentEps segment_eps, int64_t row_padding) {
    return unless_refused([&]() -> Outputs {
        require(zxbcdt.dim() == 3 && conv_weight.dim() == 2 && A.dim() == 1 && zxbcdt.stride(2) == 1);
        require(D.dim() == 2 ? !headdim_of_D || *headdim_of_D == D.size(1) : headdim_of_D.has_value());
        const int64_t headdim = D.dim() == 2 ? D.size(1) : *headdim_of_D;
        require(zxbcdt.numel() > 0 && 1 <= headdim && headdim <= 256 && groups >= 1 && dt_min <= dt_max);
        require_chunk_size(chunk_size);
        require_one_dtype(conv_weight, conv_bias);
        const ScalarType dtype = zxbcdt.scalar_type();
        const int64_t batch = zxbcdt.size(0), length = zxbcdt.size(1), heads = A.size(0);
        const int64_t row = zxbcdt.stride(1), entry = zxbcdt.stride(0);
        const int64_t inner = heads * headdim, channels = conv_weight.size(0);
        const int64_t dstate = (channels - inner) / (2 * groups);
        require(heads > 0 && dstate > 0 && channels == inner + 2 * groups * dstate && row_padding >= 0
                && zxbcdt.size(2) == inner + channels + heads + row_padding);
        require(!expected_dstate || *expected_dstate == dstate);
        require(norm_weight || !segments);

        // x, and B and C of each group, from a line on: so ssd reads them as they are.
        const int64_t states_at = in_lines(dtype, inner), of_group = in_lines(dtype, dstate);
        const int64_t pitch = states_at + 2 * groups * of_group;
        const Tensor xBC = empty(zxbcdt, dtype, {batch, length, pitch});
        causal_conv1d_to_parts(view(zxbcdt, inner, {batch, channels, length}, {entry, 1, row}), conv_weight, conv_bias,
                               silu, std::nullopt, std::nullopt,
                               view(xBC, 0, {batch, channels, length}, {length * pitch, 1, pitch}), std::nullopt,
                               {static_cast<int>(inner), static_cast<int>(dstate), static_cast<int>(states_at),
                                static_cast<int>(of_group)});

        const auto of_groups = [&](int64_t first) {
            return view(xBC, first, {batch, length, groups, dstate}, {length * pitch, pitch, of_group, 1});
        };
        const std::array<int64_t, 4> by_head{batch, length, heads, headdim};
        MaybeTensor z;
        if (!norm_weight) z = view(zxbcdt, 0, by_head, {entry, row, headdim, 1});
        const Tensor y = empty(zxbcdt, dtype, by_head);
        MaybeTensor final_states;
        if (return_final_states) final_states = empty(zxbcdt, ScalarType::Float, {batch, heads, headdim, dstate});
        ssd(view(xBC, 0, by_head, {length * pitch, pitch, headdim, 1}),
            view(zxbcdt, inner + channels, {batch, length, heads}, {entry, row, 1}), as_float(A),
            of_groups(states_at), of_groups(states_at + groups * of_group), MaybeTensor(as_float(D)), z,
            as_float(dt_bias), true, dt_min, dt_max, head_to_group, initial_states, std::nullopt, y, final_states, 0);

        Tensor out = view(y, 0, {batch, length, inner}, {length * inner, inner, 1});
        if (norm_weight) {
            complete_segments(inner, groups, norm_eps, segments, segment_eps);
            const Tensor normed = empty(zxbcdt, dtype, {batch, length, inner});
            gated_rmsnorm(as_rows(out), *norm_weight, std::nullopt,
                          as_rows(view(zxbcdt, 0, {batch, length, inner}, {entry, row, 1})), std::move(*segments),
                          std::move(*segment_eps), norm_before_gate, as_rows(normed));
            out = normed;
        }
        return {out, final_states};
    });
}

Outputs selective_state_update(Tensor state, const Tensor &x, const Tensor &dt, const Tensor &A, const Tensor &B,
                               const Tensor &C, const MaybeTensor &D, const MaybeTensor &z, const MaybeTensor &dt_bias,
                               bool dt_softplus, const MaybeTensor &head_to_group,
                               const MaybeTensor &state_batch_indices) {
    return unless_refused([&]() -> Outputs {
        require((state.dim() == 3 || state.dim() == 4) && x.dim() >= 2 && x.numel() > 0 && B.dim() >= 2);
        require(state_batch_indices || state.size(0) == x.size(0));
        require(state.dim() == 3 || state.size(1) > 1 || B.dim() == 2 || B.size(1) == 1);   // a map of the one head
        const Tensor y = empty(x, x.scalar_type(), x.sizes());
        state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, head_to_group, state_batch_indices, y);
        return {y, std::nullopt};
    });
}

Outputs causal_conv1d_fn(const Tensor &x, const Tensor &weight, const MaybeTensor &bias, const MaybeTensor &seq_idx,
                         const MaybeTensor &initial_states, bool return_final_states, bool silu) {
    return unless_refused([&]() -> Outputs {
        require(x.dim() == 3 && weight.dim() == 2 && x.numel() > 0);
        require_one_dtype(weight, bias);
        const Tensor y = x.stride(1) == 1 && x.stride(2) != 1 ? empty_in_rows(x) : empty_in_order_of(x);
        MaybeTensor states;
        if (return_final_states) states = empty(x, x.scalar_type(), {x.size(0), x.size(1), weight.size(1) - 1});
        causal_conv1d(x, weight, bias, silu, initial_states, seq_idx, y, states);
        return {y, states};
    });
}

Outputs causal_conv1d_update(const Tensor &x, Tensor conv_state, const Tensor &weight, const MaybeTensor &bias,
                             bool silu, const MaybeTensor &cache_seqlens, const MaybeTensor &conv_state_indices) {
    return unless_refused([&]() -> Outputs {
        require((x.dim() == 2 || x.dim() == 3) && x.numel() > 0 && conv_state.dim() == 3);
        require(conv_state_indices || conv_state.size(0) == x.size(0));
        require_one_dtype(weight, bias);
        const auto with_time = [](const Tensor &t) {
            return t.dim() == 3 ? t : view(t, 0, {t.size(0), t.size(1), 1}, {t.stride(0), t.stride(1), 1});
        };
        const Tensor y = empty(x, x.scalar_type(), x.sizes());
        shedder::causal_conv1d_update(with_time(x), conv_state, weight, bias, silu, cache_seqlens, conv_state_indices,
                                      with_time(y));
        return {y, std::nullopt};
    });
}

Outputs rmsnorm_fn(const Tensor &x, const Tensor &weight, const MaybeTensor &bias, const MaybeTensor &z, double eps,
                   std::optional<int64_t> group_size, bool norm_before_gate, Segments segments,
                   SegmentEps segment_eps) {
    return unless_refused([&]() -> Outputs {
        require(x.dim() >= 1 && x.numel() > 0 && !(group_size && segments));
        const int64_t width = x.size(x.dim() - 1), size = group_size.value_or(width);
        require(1 <= size && width % size == 0);
        complete_segments(width, width / size, eps, segments, segment_eps);
        require(!z || std::equal(x.sizes().begin(), x.sizes().end(), z->sizes().begin(), z->sizes().end()));
        const Tensor y = empty(x, x.scalar_type(), x.sizes());
        gated_rmsnorm(as_rows(x), weight, bias, z ? MaybeTensor(as_rows(*z)) : std::nullopt, std::move(*segments),
                      std::move(*segment_eps), norm_before_gate, as_rows(y));
        return {y, std::nullopt};
    });
}

// zxbcdt: (B, columns), [z | x | B | C | dt | padding].
Outputs step_mixer(const Tensor &zxbcdt, Tensor conv_state, MaybeTensor ssm_state, const Tensor &conv_weight,
                   const MaybeTensor &conv_bias, const MaybeTensor &dt_bias, const MaybeTensor &A, const Tensor &D,
                   const MaybeTensor &norm_weight, int64_t headdim, int64_t groups, int64_t dstate,
                   const MaybeTensor &head_to_group, const std::vector<int64_t> &segments,
                   const std::vector<double> &eps, bool norm_before_gate, double dt_min, double dt_max,
                   int64_t row_padding, const MaybeTensor &cache_seqlens, const MaybeTensor &state_batch_indices) {
    return unless_refused([&]() -> Outputs {
        require(zxbcdt.dim() == 2 && zxbcdt.size(0) > 0 && D.dim() >= 1 && 1 <= headdim && headdim <= 256);
        require(groups >= 1 && dstate >= 0 && row_padding >= 0 && 0 <= dt_min && dt_min <= dt_max);
        require(dstate > 0 ? ssm_state && ssm_state->dim() == 4 && ssm_state->size(3) == dstate : !ssm_state);
        const int64_t batch = zxbcdt.size(0), heads = D.size(0), inner = heads * headdim;
        const int64_t channels = inner + 2 * groups * dstate;
        require(zxbcdt.size(1) == inner + channels + (dstate > 0 ? heads : 0) + row_padding);
        require(conv_weight.size(0) == channels && norm_weight.has_value() == !segments.empty());
        require(state_batch_indices || conv_state.size(0) == batch);
        require_one_dtype(conv_weight, conv_bias);
        const Tensor y = empty(zxbcdt, zxbcdt.scalar_type(), {batch, inner});
        shedder::step_mixer(zxbcdt, conv_state, ssm_state, conv_weight, conv_bias, as_float(dt_bias), as_float(A),
                            as_float(D), norm_weight, groups, head_to_group, segments, eps, norm_before_gate, dt_min,
                            dt_max, cache_seqlens, state_batch_indices, y);
        return {y, std::nullopt};
    });
}

// xz: (B, 2D), [x | z].
Outputs mamba_inner_step(const Tensor &xz, Tensor conv_state, MaybeTensor ssm_state, const Tensor &conv_weight,
                         const MaybeTensor &conv_bias, const MaybeTensor &x_proj_weight,
                         const MaybeTensor &dt_proj_weight, const MaybeTensor &dt_bias, const MaybeTensor &A,
                         const Tensor &D, const MaybeTensor &channel_to_group, const MaybeTensor &cache_seqlens,
                         const MaybeTensor &state_batch_indices) {
    return unless_refused([&]() -> Outputs {
        require(xz.dim() == 2 && xz.size(0) > 0 && conv_state.dim() == 3);
        require(state_batch_indices || conv_state.size(0) == xz.size(0));
        require_one_dtype(conv_weight, conv_bias);
        const Tensor y = empty(xz, xz.scalar_type(), {xz.size(0), xz.size(1) / 2});
        shedder::mamba_inner_step(xz, conv_state, ssm_state, conv_weight, conv_bias, x_proj_weight, dt_proj_weight,
                                  as_float(dt_bias), as_float(A), as_float(D), channel_to_group, cache_seqlens,
                                  state_batch_indices, y);
        return {y, std::nullopt};
    });
}

}  // namespace
}  // namespace shedder::calls

STABLE_TORCH_LIBRARY_FRAGMENT(shedder_calls, m) {
    m.def("selective_scan_fn(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
          "Tensor? delta_bias, bool delta_softplus, bool return_last_state, Tensor? initial_state, "
          "Tensor? channel_to_group, Tensor? seq_idx) -> (Tensor?, Tensor?)");
    m.def("mamba_chunk_scan_combined(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, int chunk_size, "
          "Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_states, bool dt_softplus, float dt_min, "
          "float dt_max, bool return_final_states, Tensor head_to_group) -> (Tensor?, Tensor?)");
    m.def("mamba_split_conv1d_scan_combined(Tensor zxbcdt, Tensor conv_weight, Tensor? conv_bias, Tensor? dt_bias, "
          "Tensor A, Tensor D, int chunk_size, Tensor? initial_states, float dt_min, float dt_max, "
          "bool return_final_states, bool silu, Tensor? norm_weight, float norm_eps, int? headdim, int groups, "
          "bool norm_before_gate, Tensor head_to_group, int? dstate, int[]? segments, float[]? segment_eps, "
          "int row_padding) -> (Tensor?, Tensor?)");
    m.def("selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
          "Tensor? z, Tensor? dt_bias, bool dt_softplus, Tensor? head_to_group, Tensor? state_batch_indices) "
          "-> (Tensor?, Tensor?)");
    m.def("causal_conv1d_fn(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_states, "
          "bool return_final_states, bool silu) -> (Tensor?, Tensor?)");
    m.def("causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu, "
          "Tensor? cache_seqlens, Tensor? conv_state_indices) -> (Tensor?, Tensor?)");
    m.def("rmsnorm_fn(Tensor x, Tensor weight, Tensor? bias, Tensor? z, float eps, int? group_size, "
          "bool norm_before_gate, int[]? segments, float[]? segment_eps) -> (Tensor?, Tensor?)");
    m.def("step_mixer(Tensor zxbcdt, Tensor(a!) conv_state, Tensor(b!)? ssm_state, Tensor conv_weight, "
          "Tensor? conv_bias, Tensor? dt_bias, Tensor? A, Tensor D, Tensor? norm_weight, int headdim, int groups, "
          "int dstate, Tensor? head_to_group, int[] segments, float[] eps, bool norm_before_gate, float dt_min, "
          "float dt_max, int row_padding, Tensor? cache_seqlens, Tensor? state_batch_indices) "
          "-> (Tensor?, Tensor?)");
    m.def("mamba_inner_step(Tensor xz, Tensor(a!) conv_state, Tensor(b!)? ssm_state, Tensor conv_weight, "
          "Tensor? conv_bias, Tensor? x_proj_weight, Tensor? dt_proj_weight, Tensor? dt_bias, Tensor? A, Tensor D, "
          "Tensor? channel_to_group, Tensor? cache_seqlens, Tensor? state_batch_indices) -> (Tensor?, Tensor?)");
}

STABLE_TORCH_LIBRARY_IMPL(shedder_calls, CUDA, m) {
    m.impl("selective_scan_fn", TORCH_BOX(&shedder::calls::selective_scan_fn));
    m.impl("mamba_chunk_scan_combined", TORCH_BOX(&shedder::calls::mamba_chunk_scan_combined));
    m.impl("mamba_split_conv1d_scan_combined", TORCH_BOX(&shedder::calls::mamba_split_conv1d_scan_combined));
    m.impl("selective_state_update", TORCH_BOX(&shedder::calls::selective_state_update));
    m.impl("causal_conv1d_fn", TORCH_BOX(&shedder::calls::causal_conv1d_fn));
    m.impl("causal_conv1d_update", TORCH_BOX(&shedder::calls::causal_conv1d_update));
    m.impl("rmsnorm_fn", TORCH_BOX(&shedder::calls::rmsnorm_fn));
    m.impl("step_mixer", TORCH_BOX(&shedder::calls::step_mixer));
    m.impl("mamba_inner_step", TORCH_BOX(&shedder::calls::mamba_inner_step));
}
