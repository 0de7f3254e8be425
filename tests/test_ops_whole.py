"""Calls on a GPU that one native op takes whole: the same bits as the long way, and the same errors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import test_ops_errors
import torch
from torch import Tensor

from shedder import ops
from shedder.ops import cuda, whole

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.available() is not None, reason=f"no CUDA backend: {cuda.available()}"),
]
HALF = torch.bfloat16


def rand(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def wide(*shape: int) -> Tensor:
    return rand(*shape, dtype=torch.float32)


def scan(length: int = 63, **changes: Any) -> Any:
    return ops.selective_scan_fn(**{
        "u": rand(2, 70, length), "delta": rand(2, 70, length), "A": -wide(70, 5).abs(), "B": rand(2, 5, length),
        "C": rand(2, 5, length), "D": wide(70), "z": rand(2, 70, length), "delta_bias": wide(70),
        "delta_softplus": True} | changes)


def ssd(length: int = 130, **changes: Any) -> Any:
    return ops.mamba_chunk_scan_combined(**{
        "x": rand(2, length, 5, 24), "dt": rand(2, length, 5), "A": -wide(5).abs(), "B": rand(2, length, 2, 20),
        "C": rand(2, length, 2, 20), "chunk_size": 64, "D": wide(5), "dt_bias": wide(5), "dt_softplus": True,
        "head_to_group": (0, 0, 0, 1, 1)} | changes)


def mixer(**changes: Any) -> Any:
    inner, conv = 5 * 24, 5 * 24 + 2 * 2 * 20
    return ops.mamba_split_conv1d_scan_combined(**{
        "zxbcdt": rand(2, 70, inner + conv + 5 + 3), "conv1d_weight": rand(conv, 4), "conv1d_bias": rand(conv),
        "dt_bias": wide(5), "A": -wide(5).abs(), "D": wide(5), "chunk_size": 64, "rmsnorm_weight": rand(inner),
        "headdim": 24, "ngroups": 2, "norm_before_gate": False, "head_to_group": (0, 0, 0, 1, 1),
        "norm_segments": [(72, 1e-5), (48, 1e-3)], "row_padding": 3} | changes)


def conv(**changes: Any) -> Any:
    return ops.causal_conv1d_fn(**{"x": rand(2, 70, 33), "weight": rand(70, 4), "bias": rand(70),
                                   "activation": "silu"} | changes)


def step(slots: int = 3, **changes: Any) -> Any:
    state = rand(slots, 70, 16)
    return ops.selective_state_update(**{
        "state": state, "x": rand(3, 70), "dt": rand(3, 70), "A": -wide(70, 16).abs(), "B": rand(3, 16),
        "C": rand(3, 16), "D": wide(70), "z": rand(3, 70), "dt_bias": wide(70), "dt_softplus": True} | changes), state


def head_step(**changes: Any) -> Any:
    state = wide(2, 5, 24, 20)
    return ops.selective_state_update(**{
        "state": state, "x": rand(2, 5, 24), "dt": rand(2, 5, 1).expand(2, 5, 24),
        "A": -wide(5, 1, 1).abs().expand(5, 24, 20), "B": rand(2, 2, 20), "C": rand(2, 2, 20), "D": wide(5, 24),
        "dt_bias": rand(5, 1).expand(5, 24), "head_to_group": (0, 0, 0, 1, 1)} | changes), state


def conv_step(**changes: Any) -> Any:
    state = rand(3, 70, 4)
    return ops.causal_conv1d_update(**{"x": rand(3, 70), "conv_state": state, "weight": rand(70, 4),
                                       "bias": rand(70)} | changes), state


def mixer_step(slots: int = 2, **changes: Any) -> Any:
    inner, channels = 5 * 24, 5 * 24 + 2 * 2 * 20
    conv_state, ssm_state = rand(slots, channels, 3), wide(slots, 5, 24, 20)
    return ops.step_mixer(**{
        "zxbcdt": rand(2, inner + channels + 5 + 3), "conv_state": conv_state, "ssm_state": ssm_state,
        "conv_weight": rand(channels, 4), "conv_bias": rand(channels), "dt_bias": wide(5), "A": -wide(5).abs(),
        "D": wide(5), "norm_weight": rand(inner), "headdim": 24, "ngroups": 2, "dstate": 20,
        "head_to_group": (0, 0, 0, 1, 1), "norm_segments": ((72, 1e-5), (48, 1e-3)), "norm_before_gate": False,
        "row_padding": 3} | changes), conv_state, ssm_state


def removed_step(**changes: Any) -> Any:
    conv_state = rand(2, 70, 3)
    return ops.step_mixer(**{
        "zxbcdt": rand(2, 140), "conv_state": conv_state, "ssm_state": None, "conv_weight": rand(70, 4),
        "conv_bias": None, "dt_bias": None, "A": None, "D": wide(5, 14), "headdim": 14,
        "dstate": 0} | changes), conv_state


def inner_step(slots: int = 2, **changes: Any) -> Any:
    conv_state, ssm_state = rand(slots, 70, 3), rand(slots, 70, 16)
    return ops.mamba_inner_step(**{
        "xz": rand(2, 140), "conv_state": conv_state, "ssm_state": ssm_state, "conv_weight": rand(70, 4),
        "conv_bias": rand(70), "x_proj_weight": rand(37, 70), "dt_proj_weight": rand(70, 5), "dt_bias": wide(70),
        "A": -wide(70, 16).abs(), "D": wide(70)} | changes), conv_state, ssm_state


def norm(**changes: Any) -> Any:
    return ops.rmsnorm_fn(**{"x": rand(2, 3, 70), "weight": rand(70), "bias": None, "z": rand(2, 3, 70)} | changes)


TAKEN: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (scan, {}), (scan, {"length": 64, "return_last_state": True, "z": None, "D": None}),
    (scan, {"u": rand(63, 2, 70).permute(1, 2, 0), "initial_state": wide(2, 70, 5), "delta_bias": rand(70)}),
    (scan, {"B": rand(2, 1, 5, 63), "C": rand(2, 1, 5, 63), "A": -wide(70, 5).abs()}),
    (ssd, {}), (ssd, {"return_final_states": True, "z": rand(2, 130, 5, 24), "D": wide(5, 24)}),
    (ssd, {"B": rand(2, 130, 1, 20), "C": rand(2, 130, 1, 20), "head_to_group": None, "dt": wide(2, 130, 5),
           "initial_states": wide(2, 5, 24, 20), "dt_limit": (0.01, 1.0), "A": -rand(5).abs(), "D": rand(5)}),
    (mixer, {}), (mixer, {"rmsnorm_weight": None, "norm_segments": None, "return_final_states": True}),
    (mixer, {"head_to_group": None, "ngroups": 1, "norm_segments": None, "D": wide(5, 24), "headdim": None,
             "outproj_weight": rand(16, 120), "activation": None, "dstate": 40}),
    (mixer, {"zxbcdt": rand(2, 80, 328)[:, 3:73], "norm_before_gate": True, "rmsnorm_weight": None,
             "norm_segments": None}),
    (mixer, {"zxbcdt": rand(2, 70, 288), "conv1d_weight": rand(162, 4), "conv1d_bias": rand(162), "ngroups": 1,
             "head_to_group": None, "row_padding": 1}),
    (mixer, {"zxbcdt": rand(2, 70, 152), "conv1d_weight": rand(84, 4), "conv1d_bias": rand(84), "headdim": 12,
             "rmsnorm_weight": rand(60), "norm_segments": [(60, 1e-5)]}),
    (conv, {}), (conv, {"x": rand(2, 33, 75)[..., 5:].transpose(1, 2), "return_final_states": True}),
    (conv, {"x": rand(2, 33, 141).transpose(1, 2), "weight": rand(141, 4), "bias": rand(141)}),
    (conv, {"seq_idx": torch.arange(33, device="cuda", dtype=torch.int32).div(9, rounding_mode="floor").repeat(2, 1),
            "initial_states": rand(2, 70, 3), "bias": None}),
    (step, {}), (step, {"slots": 9, "state_batch_indices": torch.tensor([7, -1, 2], device="cuda", dtype=torch.int32)}),
    (step, {"B": rand(3, 2, 16), "C": rand(3, 2, 16), "head_to_group": (0,) * 50 + (1,) * 20, "D": rand(70)}),
    (head_step, {}), (head_step, {"B": rand(2, 1, 20), "C": rand(2, 1, 20), "head_to_group": None, "D": None}),
    (conv_step, {}), (conv_step, {"x": rand(3, 70, 5), "activation": "silu"}),
    (conv_step, {"x": rand(2, 70), "cache_seqlens": torch.tensor([3, 9], device="cuda", dtype=torch.int32),
                 "conv_state_indices": torch.tensor([2, -1], device="cuda", dtype=torch.int32)}),
    (mixer_step, {}),
    (mixer_step, {"norm_weight": None, "norm_segments": None, "D": wide(5, 24), "dt_limit": (0.1, 0.5)}),
    (mixer_step, {"slots": 9, "state_batch_indices": torch.tensor([7, -1], device="cuda", dtype=torch.int32),
                  "cache_seqlens": torch.tensor([4, 0], device="cuda", dtype=torch.int32)}),
    (removed_step, {}), (removed_step, {"norm_weight": rand(70), "norm_segments": ((70, 1e-5),)}),
    (inner_step, {}), (inner_step, {"A": -rand(70, 16).abs(), "conv_bias": None}),
    (inner_step, {"x_proj_weight": rand(5 + 2 * 2 * 16, 70), "channel_to_group": (0,) * 50 + (1,) * 20, "slots": 9,
                  "state_batch_indices": torch.tensor([-1, 3], device="cuda", dtype=torch.int32)}),
    (norm, {}), (norm, {"z": rand(2, 3, 100)[..., 7:77], "segments": [30, 40], "segment_eps": [1e-5, 1e-2]}),
    (norm, {"x": rand(70), "z": None, "bias": rand(70), "group_size": 10, "norm_before_gate": False}),
] if torch.cuda.is_available() else []


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each native op that was asked took its call."""
    seen: list[bool] = []
    original = whole.take_whole

    def spy(*args: Any) -> tuple | None:
        outputs = original(*args)
        seen.append(outputs is not None)
        return outputs

    for module in ("selective_scan", "ssd", "conv1d", "gated_norm", "state_update", "step_mixer", "inner_step"):
        # A module may have the name of its function, under which a dotted path would find the function.
        monkeypatch.setattr(importlib.import_module(f"shedder.ops.{module}"), "take_whole", spy)
    return seen


def poison() -> None:
    """Leave NaN in the memory that the next allocations get."""
    blocks = [torch.full((n,), torch.nan, device="cuda") for n in (1 << 8, 1 << 12, 1 << 16, 1 << 18, 1 << 20) * 4]
    del blocks


@torch.no_grad()
@pytest.mark.parametrize("index", range(len(TAKEN)))
def test_taken_whole_is_the_long_way(index: int, outcomes: list[bool]) -> None:
    call, changes = TAKEN[index]
    torch.manual_seed(index)
    poison()
    got = call(**changes)
    assert outcomes == [True]
    torch.manual_seed(index)
    want = call(**changes, backend="cuda")
    got, want = (value if isinstance(value, tuple) else (value,) for value in (got, want))
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("headdim", "dstate", "groups"), [
    (61, 101, 1), (63, 20, 2), (57, 16, 1), (64, 104, 3), (56, 7, 2), (45, 33, 1), (48, 128, 1), (31, 64, 2),
    (13, 5, 1)])
def test_mixer_of_any_heads(headdim: int, dstate: int, groups: int, dtype: torch.dtype, outcomes: list[bool]) -> None:
    """x, and B and C of each group, begin with lines of their own in the convolution's result."""
    heads, length = 5, 70
    inner, channels = heads * headdim, heads * headdim + 2 * groups * dstate
    sample = {
        "zxbcdt": rand(2, length, inner + channels + heads + 3, dtype=dtype), "row_padding": 3, "ngroups": groups,
        "conv1d_weight": rand(channels, 4, dtype=dtype), "conv1d_bias": rand(channels, dtype=dtype), "dt_bias": wide(5),
        "A": -wide(5).abs(), "D": wide(5), "chunk_size": 64, "rmsnorm_weight": rand(inner, dtype=dtype),
        "headdim": headdim, "norm_before_gate": False, "head_to_group": (0, 0, 0, groups - 1, groups - 1),
        "norm_segments": [(inner, 1e-5)], "return_final_states": True}
    poison()
    got = ops.mamba_split_conv1d_scan_combined(**sample)
    assert outcomes == [True]
    for one, other in zip(got, ops.mamba_split_conv1d_scan_combined(**sample, backend="cuda"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("changes", [
    {"u": rand(2, 70, 63, dtype=torch.float64), "delta": rand(2, 70, 63, dtype=torch.float64),
     "z": None, "B": rand(2, 5, 63, dtype=torch.float64), "C": rand(2, 5, 63, dtype=torch.float64)},
    {"A": torch.complex(-wide(70, 5).abs(), wide(70, 5)), "B": rand(2, 5, 126), "C": rand(2, 5, 126)},
    {"u": rand(2, 70, 0), "delta": rand(2, 70, 0), "z": rand(2, 70, 0), "B": rand(2, 5, 0), "C": rand(2, 5, 0)},
] if torch.cuda.is_available() else [])
@torch.no_grad()
def test_what_is_not_taken_goes_the_long_way(changes: dict[str, Any], outcomes: list[bool]) -> None:
    assert torch.isfinite(scan(**changes)).all()
    assert outcomes == [False]


@torch.no_grad()
def test_mamba_inner_takes_its_parts_whole(outcomes: list[bool]) -> None:
    channels, rank, dstate = 70, 5, 16
    arguments = (rand(2, 2 * channels, 40), rand(channels, 1, 4), rand(channels), rand(rank + 2 * dstate, channels),
                 torch.nn.Parameter(rand(channels, rank)), rand(30, channels), None, -wide(channels, dstate).abs())
    whole_result = ops.mamba_inner_fn(*arguments, D=wide(channels), delta_bias=wide(channels))
    assert outcomes == [True, True]
    assert whole_result.shape == (2, 40, 30)


def test_nothing_that_learns_is_taken_whole_in_grad_mode(outcomes: list[bool]) -> None:
    scan()
    A = (-wide(70, 5).abs()).requires_grad_()
    scan(A=A).sum().backward()
    assert A.grad is not None
    assert outcomes == [True, False]


def test_tracers_go_the_long_way(outcomes: list[bool]) -> None:
    with torch.no_grad():
        x, weight, bias = rand(2, 2, 70, 33), rand(70, 4), rand(70)
        mapped = torch.func.vmap(lambda one: ops.causal_conv1d_fn(one, weight, bias))(x)
        assert not any(outcomes)
        assert torch.equal(mapped, torch.stack([ops.causal_conv1d_fn(one, weight, bias) for one in x]))
        outcomes.clear()
        assert ops.explain("causal_conv1d_fn", rand(2, 70, 33), rand(70, 4))[0].backend == "cuda"
    assert outcomes
    assert not any(outcomes)


def is_readable_on_a_gpu(change: dict[str, Any]) -> bool:
    """Not of meta tensors, and not of values in integer tensors, which are trusted on a GPU."""
    return all(value.is_cpu and (value.is_floating_point() or value.dim() != 1)
               for value in change.values() if isinstance(value, Tensor)) and "backend" not in change


BAD = [(call, change) for call, change, _ in test_ops_errors.BAD if is_readable_on_a_gpu(change)]


@torch.no_grad()
@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("call", "change"), BAD, ids=[
    f"{call.__name__}-{'-'.join(change)}-{i}" for i, (call, change) in enumerate(BAD)])
def test_bad_argument_on_a_gpu(call: Callable[..., Any], change: dict[str, Any], low: bool,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Low: activations and weights in bf16, which more native ops take."""
    def moved(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        lowered = low and value.dtype == torch.float32 and name not in ("A", "D", "dt_bias", "delta_bias", "bias")
        return value.cuda().to(HALF if lowered else value.dtype)

    class OnGpu:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            return lambda **arguments: getattr(ops, name)(**{key: moved(key, v) for key, v in arguments.items()})

    if low and any(isinstance(value, Tensor) and value.dtype == HALF for value in change.values()):
        pytest.skip("bad only beside fp32")
    monkeypatch.setattr(test_ops_errors, "ops", OnGpu())
    with pytest.raises(ValueError, match="accepted"):
        call(**change)
