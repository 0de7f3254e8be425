// The launchers of the ops, for calls that go through several of them: each checks its tensors and throws before it
// launches anything.

#pragma once

#include <optional>
#include <vector>

#include "kernels/conv_parts.cuh"
#include "ops/cuda_common.h"

namespace shedder {

void selective_scan(const Tensor &u, const Tensor &delta, const Tensor &A, const Tensor &B, const Tensor &C,
                    const std::optional<Tensor> &D, const std::optional<Tensor> &z,
                    const std::optional<Tensor> &delta_bias, bool delta_softplus,
                    const std::optional<Tensor> &initial_state, const std::optional<Tensor> &channel_to_group,
                    const std::optional<Tensor> &seq_idx, Tensor y, std::optional<Tensor> final_state);

void ssd(const Tensor &x, const Tensor &dt, const Tensor &A, const Tensor &B, const Tensor &C,
         const std::optional<Tensor> &D, const std::optional<Tensor> &z, const std::optional<Tensor> &dt_bias,
         bool dt_softplus, double dt_min, double dt_max, const Tensor &head_to_group,
         const std::optional<Tensor> &initial_states, const std::optional<Tensor> &runs, Tensor y,
         std::optional<Tensor> final_states, int64_t segments);

// ssd for any GPU and for fp32 too; y and final_states as there.
void ssd_portable(const Tensor &x, const Tensor &dt, const Tensor &A, const Tensor &B, const Tensor &C,
                  const std::optional<Tensor> &D, const std::optional<Tensor> &z, const std::optional<Tensor> &dt_bias,
                  bool dt_softplus, double dt_min, double dt_max, const Tensor &head_to_group,
                  const std::optional<Tensor> &initial_states, const std::optional<Tensor> &runs, Tensor y,
                  std::optional<Tensor> final_states);

void state_update(Tensor state, const Tensor &x, const Tensor &dt, const Tensor &A, const Tensor &B, const Tensor &C,
                  const std::optional<Tensor> &D, const std::optional<Tensor> &z, const std::optional<Tensor> &dt_bias,
                  bool dt_softplus, const std::optional<Tensor> &head_to_group,
                  const std::optional<Tensor> &state_batch_indices, Tensor y);

void causal_conv1d(const Tensor &x, const Tensor &weight, const std::optional<Tensor> &bias, bool silu,
                   const std::optional<Tensor> &initial_states, const std::optional<Tensor> &seq_idx, Tensor y,
                   std::optional<Tensor> final_states);

// y is (batch, channels, length) with channels adjacent but for the gaps between parts.
void causal_conv1d_to_parts(const Tensor &x, const Tensor &weight, const std::optional<Tensor> &bias, bool silu,
                            const std::optional<Tensor> &initial_states, const std::optional<Tensor> &seq_idx, Tensor y,
                            std::optional<Tensor> final_states, const ConvParts &parts);

void causal_conv1d_update(const Tensor &x, Tensor conv_state, const Tensor &weight, const std::optional<Tensor> &bias,
                          bool silu, const std::optional<Tensor> &cache_seqlens,
                          const std::optional<Tensor> &conv_state_indices, Tensor y);

void gated_rmsnorm(const Tensor &x, const Tensor &weight, const std::optional<Tensor> &bias,
                   const std::optional<Tensor> &z, std::vector<int64_t> segments, std::vector<double> eps,
                   bool norm_before_gate, Tensor y);

void step_mixer(const Tensor &zxbcdt, Tensor conv_state, std::optional<Tensor> ssm_state, const Tensor &conv_weight,
                const std::optional<Tensor> &conv_bias, const std::optional<Tensor> &dt_bias,
                const std::optional<Tensor> &A, const Tensor &D, const std::optional<Tensor> &norm_weight,
                int64_t groups, const std::optional<Tensor> &head_to_group, const std::vector<int64_t> &segments,
                const std::vector<double> &eps, bool norm_before_gate, double dt_min, double dt_max,
                const std::optional<Tensor> &cache_seqlens, const std::optional<Tensor> &state_batch_indices, Tensor y);

void mamba_inner_step(const Tensor &xz, Tensor conv_state, std::optional<Tensor> ssm_state, const Tensor &conv_weight,
                      const std::optional<Tensor> &conv_bias, const std::optional<Tensor> &x_proj_weight,
                      const std::optional<Tensor> &dt_proj_weight, const std::optional<Tensor> &dt_bias,
                      const std::optional<Tensor> &A, const Tensor &D, const std::optional<Tensor> &channel_to_group,
                      const std::optional<Tensor> &cache_seqlens, const std::optional<Tensor> &state_batch_indices,
                      Tensor y);

}  // namespace shedder
