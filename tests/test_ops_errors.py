"""Every bad argument raises before anything runs, and the message names it, what came and what is accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from shedder import ops


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def scan(**changes: Any) -> Any:
    arguments = {"u": rand(2, 6, 7), "delta": rand(2, 6, 7), "A": -torch.rand(6, 4), "B": rand(2, 2, 4, 7),
                 "C": rand(2, 2, 4, 7)} | changes
    return ops.selective_scan_fn(**arguments)


def ssd(**changes: Any) -> Any:
    arguments = {"x": rand(2, 7, 4, 3), "dt": rand(2, 7, 4), "A": -torch.rand(4), "B": rand(2, 7, 2, 5),
                 "C": rand(2, 7, 2, 5), "chunk_size": 64} | changes
    return ops.mamba_chunk_scan_combined(**arguments)


def one_row(**changes: Any) -> Any:
    return ssd(**{"x": rand(1, 7, 4, 3), "dt": rand(1, 7, 4), "B": rand(1, 7, 2, 5), "C": rand(1, 7, 2, 5)} | changes)


def step(**changes: Any) -> Any:
    arguments = {"state": rand(2, 4, 3, 5), "x": rand(2, 4, 3), "dt": rand(2, 4, 3), "A": -torch.rand(4, 3, 5),
                 "B": rand(2, 2, 5), "C": rand(2, 2, 5)} | changes
    return ops.selective_state_update(**arguments)


def conv(**changes: Any) -> Any:
    return ops.causal_conv1d_fn(**{"x": rand(2, 6, 7), "weight": rand(6, 4)} | changes)


def conv_step(**changes: Any) -> Any:
    return ops.causal_conv1d_update(**{"x": rand(2, 6), "conv_state": rand(2, 6, 4), "weight": rand(6, 4)} | changes)


def norm(**changes: Any) -> Any:
    return ops.rmsnorm_fn(**{"x": rand(3, 12), "weight": rand(12), "bias": None} | changes)


def mixer(**changes: Any) -> Any:
    arguments = {"zxbcdt": rand(2, 7, 2 * 12 + 2 * 10 + 4), "conv1d_weight": rand(32, 4), "conv1d_bias": None,
                 "dt_bias": rand(4), "A": -torch.rand(4), "D": rand(4), "chunk_size": 64, "headdim": 3,
                 "ngroups": 2} | changes
    return ops.mamba_split_conv1d_scan_combined(**arguments)


def inner(**changes: Any) -> Any:
    arguments = {"xz": rand(2, 12, 7), "conv1d_weight": rand(6, 1, 4), "conv1d_bias": None,
                 "x_proj_weight": rand(2 + 8, 6), "delta_proj_weight": rand(6, 2), "out_proj_weight": rand(5, 6),
                 "out_proj_bias": None, "A": -torch.rand(6, 4)} | changes
    return ops.mamba_inner_fn(**arguments)


HALF, DOUBLE = torch.bfloat16, torch.float64
INDICES = torch.tensor([0, 9])

BAD = [  # call, change, what the message says
    (scan, {"u": rand(2, 6)}, r"u has shape \(2, 6\); accepted: \(B, D, L\)"),
    (scan, {"u": [1.0]}, r"u is a list; accepted: a tensor"),
    (scan, {"delta": rand(2, 6, 8)}, r"delta has shape \(2, 6, 8\); accepted: \(B, D, L\) = \(2, 6, 7\)"),
    (scan, {"delta": rand(2, 6, 7, dtype=HALF)}, "delta is torch.bfloat16 but u is torch.float32"),
    (scan, {"u": torch.ones(2, 6, 7, dtype=torch.int32)}, "u is torch.int32; accepted: torch.float32"),
    (scan, {"A": rand(6, 4, dtype=DOUBLE)}, "A is torch.float64; accepted: torch.float32 or torch.complex64"),
    (scan, {"A": rand(6, 4, dtype=HALF)}, "A is torch.bfloat16; accepted"),
    (scan, {"A": rand(5, 4)}, r"A has shape \(5, 4\); accepted: \(D, N\)"),
    (scan, {"A": rand(6, 0)}, r"N \(A.shape\[1\]\) is 0; accepted: 1 to 256"),
    (scan, {"A": rand(6, 257)}, r"N \(A.shape\[1\]\) is 257; accepted: 1 to 256"),
    (scan, {"B": rand(2, 2, 5, 7)}, r"B has shape \(2, 2, 5, 7\); accepted: \(B, G, N, L\)"),
    (scan, {"B": rand(2, 2, 4, 7, dtype=HALF)}, "B is torch.bfloat16; accepted: torch.float32, the dtype of u"),
    (scan, {"B": rand(6, 4, dtype=HALF)}, "B is torch.bfloat16; accepted: torch.float32, the dtype of A"),
    (scan, {"B": rand(4)}, r"B has shape \(4,\); accepted"),
    (scan, {"C": rand(2, 3, 4, 7)}, "B has 2 groups but C has 3"),
    (scan, {"B": rand(2, 4, 4, 7), "C": rand(2, 4, 4, 7)}, "channel_to_group is None, but 6 channels"),
    (scan, {"D": rand(5)}, r"D has shape \(5,\); accepted: \(D,\) = \(6,\)"),
    (scan, {"z": rand(2, 6, 1)}, r"z has shape \(2, 6, 1\)"),
    (scan, {"delta_bias": rand(6, dtype=DOUBLE)}, "delta_bias is torch.float64 but u is torch.float32"),
    (scan, {"initial_state": rand(2, 6, 5)}, r"initial_state has shape \(2, 6, 5\)"),
    (scan, {"seq_idx": torch.zeros(2, 6, dtype=torch.int32)}, r"seq_idx has shape \(2, 6\); accepted: \(B, L\)"),
    (scan, {"seq_idx": torch.zeros(2, 7)}, "seq_idx is torch.float32; accepted: torch.int32 or torch.int64"),
    (scan, {"channel_to_group": (0, 1, 2, 0, 0, 0)}, r"channel_to_group has value 2 but B has 2 groups; .* \[0, 2\)"),
    (scan, {"channel_to_group": (0, 1)}, "channel_to_group has 2 entries; accepted: one for each of the 6 channels"),
    (scan, {"channel_to_group": torch.tensor([0, 1, -1, 0, 0, 0])}, "channel_to_group has value -1"),
    (scan, {"z": meta(2, 6, 7)}, "z is on meta but u is on cpu"),
    (scan, {"backend": "fast"}, "backend is 'fast'; accepted: None, 'auto' or one of"),
    (scan, {"backend": "cuda"}, "backend='cuda' cannot run selective_scan: "),
    (ssd, {"x": rand(2, 7, 12)}, r"x has shape \(2, 7, 12\); accepted: \(B, L, H, P\)"),
    (ssd, {"x": rand(2, 7, 4, 0)}, r"P \(x.shape\[3\]\) is 0; accepted: 1 to 256"),
    (ssd, {"x": rand(2, 7, 4, 257)}, "is 257; accepted: 1 to 256"),
    (ssd, {"dt": rand(2, 7, 3)}, r"dt has shape \(2, 7, 3\); accepted: \(B, L, H\) = \(2, 7, 4\)"),
    (ssd, {"A": rand(4, 1)}, r"A has shape \(4, 1\); accepted: \(H,\)"),
    (ssd, {"B": rand(2, 7, 2, 0)}, r"N \(B.shape\[3\]\) is 0; accepted: 1 to 256"),
    (ssd, {"B": rand(2, 7, 2, 300)}, r"N \(B.shape\[3\]\) is 300"),
    (ssd, {"B": rand(2, 7, 2, 5, dtype=HALF)}, "B is torch.bfloat16 but x is torch.float32; accepted: the dtype of x"),
    (ssd, {"C": rand(2, 7, 1, 5)}, r"C has shape \(2, 7, 1, 5\); accepted: .* the shape of B"),
    (ssd, {"B": rand(2, 7, 3, 5), "C": rand(2, 7, 3, 5)}, "head_to_group is None, but 4 heads cannot be shared"),
    (ssd, {"head_to_group": (0, 0, 8, 1)},
     r"head_to_group has value 8 but B has 2 groups; accepted: values in \[0, 2\)"),
    (ssd, {"head_to_group": (0, 0, True, 1)}, r"head_to_group has entry True; accepted: integers in \[0, 2\)"),
    (ssd, {"head_to_group": torch.tensor([0, 0, 1, 2])}, "head_to_group has value 2"),
    (ssd, {"head_to_group": torch.zeros(4)}, "head_to_group is torch.float32; accepted: torch.int32 or torch.int64"),
    (ssd, {"head_to_group": torch.zeros(3, dtype=torch.int32)}, r"head_to_group has shape \(3,\)"),
    (ssd, {"head_to_group": torch.zeros(4, dtype=torch.int32, device="meta")}, "head_to_group is on meta"),
    (ssd, {"D": rand(3, 4)}, r"D has shape \(3, 4\); accepted: \(H,\) = \(4,\) or \(H, P\) = \(4, 3\)"),
    (ssd, {"z": rand(2, 7, 4, 2)}, "z has shape"),
    (ssd, {"dt_bias": rand(3)}, r"dt_bias has shape \(3,\)"),
    (ssd, {"dt_limit": (1.0, 0.5)}, r"dt_limit is \(1.0, 0.5\); accepted: \(low, high\) with low <= high"),
    (ssd, {"initial_states": rand(1, 4, 3, 5)}, r"initial_states has shape \(1, 4, 3, 5\); accepted: \(B, H, P, N\)"),
    (ssd, {"seq_idx": torch.zeros(7, dtype=torch.int32)}, r"seq_idx has shape \(7,\)"),
    (ssd, {"chunk_size": 0}, "chunk_size is 0"),
    (ssd, {"return_varlen_states": True}, "cu_seqlens is None with return_varlen_states=True"),
    (ssd, {"cu_seqlens": [0, 7]}, "x has batch 2 with cu_seqlens; accepted: 1"),
    (one_row, {"cu_seqlens": [0, 5]}, r"cu_seqlens is \[0, 5\]; accepted: never falling, from 0 to L = 7"),
    (one_row, {"cu_seqlens": [0, 5, 3, 7]}, "cu_seqlens is"),
    (one_row, {"cu_seqlens": torch.tensor([0.0, 7.0])}, "cu_seqlens is torch.float32"),
    (one_row, {"cu_seqlens": [0, 3, 5, 7], "initial_states": rand(2, 4, 3, 5)}, "with n = 3 sequences"),
    (ssd, {"A": meta(4)}, "A is on meta but x is on cpu"),
    (step, {"state": rand(2, 5)}, r"state has shape \(2, 5\)"),
    (step, {"x": rand(3, 4, 3)}, "state has shape|dt has shape"),
    (step, {"x": rand(2, 4, 2)}, r"x has shape \(2, 4, 2\); accepted: \(B, H, P\)"),
    (step, {"dt": rand(2, 4)}, r"dt has shape \(2, 4\)"),
    (step, {"A": rand(4, 3)}, r"A has shape \(4, 3\); accepted: \(H, P, N\)"),
    (step, {"B": rand(2, 2, 4)}, r"B has shape \(2, 2, 4\)"),
    (step, {"B": rand(2, 3, 5), "C": rand(2, 3, 5)}, "head_to_group is None"),
    (step, {"C": rand(2, 5)}, r"C has shape \(2, 5\); accepted: the shape of B"),
    (step, {"B": rand(2, 2, 5, dtype=HALF)}, "B is torch.bfloat16 but x is torch.float32"),
    (step, {"state": torch.zeros(2, 4, 3, 5, dtype=torch.int32)}, "state is torch.int32"),
    (step, {"state": rand(2, 4, 3, 0), "A": rand(4, 3, 0)}, "is 0; accepted: 1 to 256"),
    (step, {"head_to_group": (0, 1, 2, 0)}, "head_to_group has value 2"),
    (step, {"state_batch_indices": INDICES}, "state_batch_indices has value 9 but state has 2 slots"),
    (step, {"state_batch_indices": torch.tensor([0])}, r"state_batch_indices has shape \(1,\); accepted: \(B,\)"),
    (step, {"D": rand(4)}, r"D has shape \(4,\); accepted: \(H, P\)"),
    (step, {"state": meta(2, 4, 3, 5)}, "x is on cpu but state is on meta"),
    (conv, {"x": rand(6, 7)}, r"x has shape \(6, 7\); accepted: \(B, D, L\)"),
    (conv, {"weight": rand(5, 4)}, r"weight has shape \(5, 4\); accepted: \(D, W\)"),
    (conv, {"weight": rand(6, 5)}, r"W \(weight.shape\[1\]\) is 5; accepted: 1 to 4"),
    (conv, {"bias": rand(6, dtype=HALF)}, "bias is torch.bfloat16 but weight is torch.float32"),
    (conv, {"activation": "relu"}, "activation is 'relu'; accepted: None, 'silu' or 'swish'"),
    (conv, {"initial_states": rand(2, 6, 4)}, r"initial_states has shape \(2, 6, 4\); accepted: \(B, D, W-1\)"),
    (conv, {"initial_states": rand(2, 6, 3, dtype=HALF)}, "initial_states is torch.bfloat16"),
    (conv, {"final_states_out": rand(2, 6, 3)}, "final_states_out came with return_final_states=False"),
    (conv, {"seq_idx": torch.zeros(2, 7)}, "seq_idx is torch.float32"),
    (conv, {"weight": meta(6, 4)}, "weight is on meta"),
    (conv_step, {"x": rand(6)}, r"x has shape \(6,\); accepted: \(B, D\) or \(B, D, S\)"),
    (conv_step, {"conv_state": rand(2, 6, 2)}, r"conv_state has shape \(2, 6, 2\); accepted: .* K >= 3"),
    (conv_step, {"conv_state": rand(3, 6, 4)}, r"conv_state has shape \(3, 6, 4\)"),
    (conv_step, {"conv_state": rand(2, 6, 4, dtype=HALF)}, "conv_state is torch.bfloat16"),
    (conv_step, {"conv_state_indices": INDICES}, "conv_state_indices has value 9 but conv_state has 2 slots"),
    (conv_step, {"cache_seqlens": torch.zeros(2)}, "cache_seqlens is torch.float32"),
    (norm, {"weight": rand(11)}, r"weight has shape \(11,\); accepted: \(D,\) = \(12,\)"),
    (norm, {"x": torch.ones(3, 12, dtype=torch.int64)}, "x is torch.int64"),
    (norm, {"z": rand(3, 11)}, r"z has shape \(3, 11\)"),
    (norm, {"z": rand(3, 12, dtype=HALF)}, "z is torch.bfloat16 but x is torch.float32"),
    (norm, {"group_size": 5}, "group_size is 5; accepted: a divisor of D = 12"),
    (norm, {"segments": [5, 6]}, r"segments is \[5, 6\]; accepted: positive sizes that add up to D = 12"),
    (norm, {"segments": [12, 0]}, r"segments is \[12, 0\]"),
    (norm, {"segments": [12], "group_size": 4}, "accepted: one of them"),
    (norm, {"segments": [6, 6], "segment_eps": [1e-5]}, "segment_eps has 1 entries"),
    (mixer, {"zxbcdt": rand(2, 7, 49)}, "zxbcdt has 49 columns"),
    (mixer, {"zxbcdt": rand(2, 7, 40)}, "zxbcdt has 40 columns"),
    (mixer, {"conv1d_weight": rand(31, 4)}, "conv1d_weight has 31 rows"),
    (mixer, {"headdim": None}, "headdim is None and D has shape"),
    (mixer, {"dstate": 6}, "dstate is 6 but conv1d_weight has 32 rows"),
    (mixer, {"norm_segments": [(12, 1e-5)]}, "norm_segments came with rmsnorm_weight=None"),
    (mixer, {"rmsnorm_weight": rand(12), "norm_segments": [(11, 1e-5)]}, r"segments is \[11\]"),
    (mixer, {"activation": "gelu"}, "activation is 'gelu'"),
    (mixer, {"head_to_group": (0, 1, 2, 0)}, "head_to_group has value 2"),
    (inner, {"xz": rand(2, 11, 7)}, r"xz has shape \(2, 11, 7\); accepted: \(B, 2D, L\)"),
    (inner, {"x_proj_weight": rand(9, 6)}, "x_proj_weight has 9 rows"),
    (inner, {"checkpoint_lvl": 2}, "checkpoint_lvl is 2; accepted: 0 or 1"),
]


@pytest.mark.parametrize(("call", "change", "message"), BAD, ids=[
    f"{call.__name__}-{'-'.join(change)}-{i}" for i, (call, change, _) in enumerate(BAD)])
def test_bad_argument(call: Callable[..., Any], change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        call(**change)


@pytest.mark.parametrize("call", [scan, ssd, one_row, step, conv, conv_step, norm, mixer, inner])
def test_the_unchanged_call_is_good(call: Callable[..., Any]):
    assert torch.isfinite(call()).all()


def test_a_bad_step_leaves_the_state_alone():
    state, conv_state = rand(2, 4, 3, 5), rand(2, 6, 4)
    before, conv_before = state.clone(), conv_state.clone()
    with pytest.raises(ValueError, match="head_to_group"):
        step(state=state, head_to_group=torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ValueError, match="conv_state_indices"):
        conv_step(conv_state=conv_state, conv_state_indices=INDICES)
    assert torch.equal(state, before)
    assert torch.equal(conv_state, conv_before)


def test_a_map_is_read_again_after_a_change():
    head_to_group = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    ssd(head_to_group=head_to_group)
    head_to_group[0] = 5
    with pytest.raises(ValueError, match="head_to_group has value 5"):
        ssd(head_to_group=head_to_group)


@pytest.mark.gpu
def test_tensors_on_two_devices():
    with pytest.raises(ValueError, match="B is on cuda:0 but x is on cpu"):
        ssd(B=rand(2, 7, 2, 5).cuda())
    with pytest.raises(ValueError, match=r"cannot run ssd: .*cuda"):
        ssd(**{name: value.cuda() for name, value in {
            "x": rand(2, 7, 4, 3), "dt": rand(2, 7, 4), "A": rand(4), "B": rand(2, 7, 2, 5),
            "C": rand(2, 7, 2, 5)}.items()}, backend="cpu")
