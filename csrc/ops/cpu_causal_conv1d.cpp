// Launchers of the causal convolution on the CPU: checks, splits batch x tiles of channels over threads.

#include "ops/cpu_common.h"

namespace shedder::cpu {
namespace {

void check_width(const char *op, int64_t width) {
    STD_TORCH_CHECK(1 <= width && width <= kMaxWidth, "shedder_cpu::", op, ": W is ", width, "; accepted: 1..", kMaxWidth);
}

void causal_conv1d(const Tensor &x, const Tensor &weight, const MaybeTensor &bias, bool silu,
                   const MaybeTensor &initial_states, const MaybeTensor &seq_idx, Tensor y, Tensor final_states) {
    constexpr const char *kOp = "causal_conv1d";
    STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2, "shedder_cpu::causal_conv1d takes x (B, D, L), weight (D, W)");
    const int64_t batch = x.size(0), channels = x.size(1), length = x.size(2), width = weight.size(1);
    check_width(kOp, width);
    Conv1d p;
    p.x = array(kOp, "x", x, {batch, channels, length});
    p.weight = array(kOp, "weight", weight, {channels, width});
    p.bias = array(kOp, "bias", bias, {channels});
    p.initial_states = array(kOp, "initial_states", initial_states, {batch, channels, width - 1});
    p.y = array(kOp, "y", y, {batch, channels, length});
    p.final_states = array(kOp, "final_states", final_states, {batch, channels, width - 1});
    p.seq_idx = integers(kOp, "seq_idx", seq_idx, batch * length);
    p.silu = silu;
    p.channels = channels;
    p.length = length;
    p.width = width;
    split(batch * tiles(channels), kConvTile * (length + 1) * 4,
          [&p](int64_t begin, int64_t end) { kernels().conv1d(p, begin, end); });
}

void causal_conv1d_update(const Tensor &x, Tensor conv_state, const Tensor &weight, const MaybeTensor &bias, bool silu,
                          const MaybeTensor &cache_seqlens, const MaybeTensor &conv_state_indices, Tensor y) {
    constexpr const char *kOp = "causal_conv1d_update";
    STD_TORCH_CHECK(x.dim() == 3 && conv_state.dim() == 3 && weight.dim() == 2,
                    "shedder_cpu::causal_conv1d_update takes x (B, D, S), conv_state (slots, D, K), weight (D, W)");
    const int64_t batch = x.size(0), channels = x.size(1), length = x.size(2), width = weight.size(1);
    const int64_t slots = conv_state.size(0), kept = conv_state.size(2);
    check_width(kOp, width);
    STD_TORCH_CHECK(kept >= width - 1, "shedder_cpu::causal_conv1d_update: conv_state keeps ", kept, " inputs; accepted: at least ",
                    width - 1);
    Conv1dUpdate p;
    p.x = array(kOp, "x", x, {batch, channels, length});
    p.conv_state = array(kOp, "conv_state", conv_state, {slots, channels, kept});
    p.weight = array(kOp, "weight", weight, {channels, width});
    p.bias = array(kOp, "bias", bias, {channels});
    p.y = array(kOp, "y", y, {batch, channels, length});
    p.cache_seqlens = integers(kOp, "cache_seqlens", cache_seqlens, batch);
    p.conv_state_indices = slot_numbers(kOp, conv_state_indices, batch, slots);
    p.silu = silu;
    p.channels = channels;
    p.length = length;
    p.width = width;
    p.kept = kept;
    split_conv1d_update(batch, p);
}

}  // namespace
}  // namespace shedder::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(shedder_cpu, m) {
    m.def("causal_conv1d(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_states, Tensor? seq_idx, "
          "Tensor(a!) y, Tensor(b!) final_states) -> ()");
    m.def("causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu, "
          "Tensor? cache_seqlens, Tensor? conv_state_indices, Tensor(b!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shedder_cpu, CPU, m) {
    m.impl("causal_conv1d", TORCH_BOX(&shedder::cpu::causal_conv1d));
    m.impl("causal_conv1d_update", TORCH_BOX(&shedder::cpu::causal_conv1d_update));
}
