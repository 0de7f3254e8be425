"""The public ops: drop-in signatures of mamba_ssm and causal_conv1d, and keywords for compacted layouts."""

from shedder.ops.conv1d import causal_conv1d_fn, causal_conv1d_update
from shedder.ops.cpu import linear
from shedder.ops.explain import explain
from shedder.ops.gated_norm import rmsnorm_fn
from shedder.ops.inner_step import mamba_inner_step
from shedder.ops.removed_ssm import removed_ssm
from shedder.ops.selective_scan import mamba_inner_fn, selective_scan_fn
from shedder.ops.ssd import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from shedder.ops.state_update import selective_state_update
from shedder.ops.step_mixer import step_mixer

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "explain", "linear", "mamba_chunk_scan_combined",
           "mamba_inner_fn", "mamba_inner_step", "mamba_split_conv1d_scan_combined", "removed_ssm", "rmsnorm_fn",
           "selective_scan_fn", "selective_state_update", "step_mixer"]
