"""The public signatures against the record of mamba_ssm and causal_conv1d: names, order, defaults."""

from __future__ import annotations

import inspect
from math import inf

import pytest

from shedder import ops

REQUIRED = inspect.Parameter.empty

RECORD = {                                        # of the peers: (name, default) in order
    "selective_scan_fn": [
        ("u", REQUIRED), ("delta", REQUIRED), ("A", REQUIRED), ("B", REQUIRED), ("C", REQUIRED), ("D", None),
        ("z", None), ("delta_bias", None), ("delta_softplus", False), ("return_last_state", False)],
    "mamba_inner_fn": [
        ("xz", REQUIRED), ("conv1d_weight", REQUIRED), ("conv1d_bias", REQUIRED), ("x_proj_weight", REQUIRED),
        ("delta_proj_weight", REQUIRED), ("out_proj_weight", REQUIRED), ("out_proj_bias", REQUIRED), ("A", REQUIRED),
        ("B", None), ("C", None), ("D", None), ("delta_bias", None), ("B_proj_bias", None), ("C_proj_bias", None),
        ("delta_softplus", True), ("checkpoint_lvl", 1), ("b_rms_weight", None), ("c_rms_weight", None),
        ("dt_rms_weight", None), ("b_c_dt_rms_eps", 1e-6)],
    "selective_state_update": [
        ("state", REQUIRED), ("x", REQUIRED), ("dt", REQUIRED), ("A", REQUIRED), ("B", REQUIRED), ("C", REQUIRED),
        ("D", None), ("z", None), ("dt_bias", None), ("dt_softplus", False), ("state_batch_indices", None)],
    "mamba_chunk_scan_combined": [
        ("x", REQUIRED), ("dt", REQUIRED), ("A", REQUIRED), ("B", REQUIRED), ("C", REQUIRED), ("chunk_size", REQUIRED),
        ("D", None), ("z", None), ("dt_bias", None), ("initial_states", None), ("seq_idx", None), ("cu_seqlens", None),
        ("dt_softplus", False), ("dt_limit", (0.0, inf)), ("return_final_states", False),
        ("return_varlen_states", False), ("state_dtype", None)],
    "mamba_split_conv1d_scan_combined": [
        ("zxbcdt", REQUIRED), ("conv1d_weight", REQUIRED), ("conv1d_bias", REQUIRED), ("dt_bias", REQUIRED),
        ("A", REQUIRED), ("D", REQUIRED), ("chunk_size", REQUIRED), ("initial_states", None), ("seq_idx", None),
        ("dt_limit", (0.0, inf)), ("return_final_states", False), ("activation", "silu"), ("rmsnorm_weight", None),
        ("rmsnorm_eps", 1e-6), ("outproj_weight", None), ("outproj_bias", None), ("headdim", None), ("ngroups", 1),
        ("norm_before_gate", True), ("state_dtype", None)],
    "rmsnorm_fn": [
        ("x", REQUIRED), ("weight", REQUIRED), ("bias", REQUIRED), ("z", None), ("eps", 1e-6), ("group_size", None),
        ("norm_before_gate", True)],
    "causal_conv1d_fn": [
        ("x", REQUIRED), ("weight", REQUIRED), ("bias", None), ("seq_idx", None), ("initial_states", None),
        ("return_final_states", False), ("final_states_out", None), ("activation", None)],
    "causal_conv1d_update": [
        ("x", REQUIRED), ("conv_state", REQUIRED), ("weight", REQUIRED), ("bias", None), ("activation", None),
        ("cache_seqlens", None), ("conv_state_indices", None)],
}

EXTRAS = {                                        # ours, keyword-only; None or 0 gives what the peer does
    "selective_scan_fn": ["initial_state", "channel_to_group", "seq_idx", "backend"],
    "mamba_inner_fn": ["channel_to_group", "backend"],
    "selective_state_update": ["head_to_group", "backend"],
    "mamba_chunk_scan_combined": ["head_to_group", "backend"],
    "mamba_split_conv1d_scan_combined": ["head_to_group", "dstate", "norm_segments", "row_padding", "backend"],
    "rmsnorm_fn": ["segments", "segment_eps", "backend"],
    "causal_conv1d_fn": ["backend"],
    "causal_conv1d_update": ["backend"],
}


@pytest.mark.parametrize("name", RECORD)
def test_signature_is_the_peers_with_keywords_after_it(name):
    parameters = list(inspect.signature(getattr(ops, name)).parameters.values())
    shared = [p for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in shared] == RECORD[name]
    extras = parameters[len(shared):]
    assert [p.name for p in extras] == EXTRAS[name]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY and p.default in (None, 0) for p in extras)


OURS = {"explain", "linear", "mamba_inner_step", "removed_ssm", "step_mixer"}  # public, and not a drop-in for anything


def test_every_public_op_is_recorded():
    assert set(ops.__all__) == {*RECORD, *OURS}
