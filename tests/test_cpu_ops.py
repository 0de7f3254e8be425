"""The C++ kernels against the float64 recurrences, on odd sizes, every stride and option, with poisoned outputs."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shedder import native, reference
from shedder.ops import cpu
from shedder.triton_kernels.rows import empty_in_rows

pytestmark = [pytest.mark.skipif(cpu.available() is not None, reason=f"the CPU library: {cpu.available()}"),
              pytest.mark.usefixtures("poisoned_allocator")]

# Inputs are read exactly, sums are in fp32, and an output is rounded once to its dtype.
FP32_SUMS = 2e-5              # of the RMS of the exact output: sums of a few hundred products
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = math.inf


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def assert_close(got: Tensor, exact: Tensor, sums: float = FP32_SUMS) -> None:
    assert got.shape == exact.shape
    assert got.isfinite().all()
    limit = sums * exact.square().mean().sqrt() + 0.51 * torch.finfo(got.dtype).eps * exact.abs() + 1e-7
    excess = ((got.double() - exact).abs() / limit).max().item() if exact.numel() else 0.0
    assert excess <= 1, f"the largest error is {excess:.3g} times its limit"


def double(t: Tensor | None) -> Any:
    return t if t is None or not t.is_floating_point() else t.double()


def doubled(*tensors: Tensor | None) -> list[Any]:
    return [double(t) for t in tensors]


def rand(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def channel_last(t: Tensor) -> Tensor:
    """The same values with dimension 1 contiguous."""
    return t.transpose(1, -1).contiguous().transpose(1, -1)


def strided(t: Tensor) -> Tensor:
    """The same values with gaps between all elements; the gaps hold NaN."""
    wide = torch.full([2 * n for n in t.shape], math.nan, dtype=t.dtype)
    view = wide[tuple(slice(1, None, 2) for _ in t.shape)]
    return view.copy_(t)


MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "channel_first": torch.Tensor.contiguous, "channel_last": channel_last, "strided": strided}


def packed(batch: int, length: int) -> Tensor:
    """Names of three sequences per row, with padding at the front, inside and at the end."""
    names = torch.zeros(batch, length, dtype=torch.int32)
    names[:, length // 3:] = 5
    names[:, length // 2: length // 2 + 3] = -1
    names[:, 2 * length // 3:] = 2
    names[-1, -2:] = -1
    names[0, :1] = -1
    return names


def ragged_map(rows: int, groups: int) -> Tensor:
    """Any map, out of order, whose last group but one nobody reads when there are three or more."""
    chosen = torch.randint(0, groups, (rows,), dtype=torch.int32)
    if groups > 2:
        chosen[chosen == groups - 2] = 0
    return chosen


# --- selective scan

def scan_inputs(batch: int, channels: int, length: int, states: int, groups: int,
                dtype: torch.dtype) -> dict[str, Any]:
    return {"u": rand(batch, channels, length, dtype=dtype), "delta": rand(batch, channels, length, dtype=dtype),
            "A": -torch.rand(channels, states) * 4 - 0.01, "B": rand(batch, groups, states, length, dtype=dtype),
            "C": rand(batch, groups, states, length, dtype=dtype), "D": rand(channels),
            "z": rand(batch, channels, length, dtype=dtype), "delta_bias": rand(channels) - 2,
            "initial_state": rand(batch, channels, states)}


def check_scan(inputs: dict[str, Any], softplus: bool = True, group_map: Tensor | None = None,
               seq_idx: Tensor | None = None, sums: float = FP32_SUMS) -> None:
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    args = [inputs[name] for name in names]
    initial = inputs["initial_state"]
    y, state = cpu.selective_scan(*args, softplus, initial, group_map, seq_idx)
    want_y, want_state = reference.selective_scan(*doubled(*args), softplus, initial_state=double(initial),
                                                  channel_to_group=group_map, seq_idx=seq_idx)
    assert y.dtype == inputs["u"].dtype and state.dtype == torch.float32
    assert_close(y, want_y, sums)
    assert_close(state, want_state, sums)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "channels", "length", "states", "groups"), [
    (1, 1, 1, 1, 1), (2, 33, 63, 5, 1), (1, 61, 1000, 16, 1), (2, 100, 65, 12, 3), (1, 40, 64, 101, 2),
    (1, 17, 7, 256, 1)])
def test_selective_scan(batch: int, channels: int, length: int, states: int, groups: int, dtype: torch.dtype,
                        threads: int) -> None:
    group_map = ragged_map(channels, groups) if groups > 1 else None
    check_scan(scan_inputs(batch, channels, length, states, groups, dtype), group_map=group_map)


@pytest.mark.parametrize("without", [("D",), ("z",), ("delta_bias",), ("initial_state",),
                                     ("D", "z", "delta_bias", "initial_state")])
def test_selective_scan_without_options(without: tuple[str, ...]) -> None:
    inputs: dict[str, Any] = dict(scan_inputs(2, 37, 70, 9, 1, torch.float32))
    inputs |= dict.fromkeys(without)
    inputs["delta"] = inputs["delta"].abs() * 0.1          # without softplus nothing else makes it positive
    inputs["delta_bias"] = None if inputs["delta_bias"] is None else inputs["delta_bias"].abs()
    check_scan(inputs, softplus=False)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_scan_of_any_strides(memory: str, dtype: torch.dtype) -> None:
    inputs = scan_inputs(2, 67, 130, 7, 2, dtype)
    inputs |= {name: MEMORY[memory](inputs[name]) for name in ("u", "delta", "z", "A")}
    inputs |= {name: strided(inputs[name]) for name in ("B", "D", "delta_bias", "initial_state")}
    inputs["C"] = inputs["C"][:1].expand(2, -1, -1, -1)
    check_scan(inputs, group_map=ragged_map(67, 2))


@pytest.mark.parametrize("constant", [("B",), ("C",), ("B", "C")])
def test_selective_scan_with_constant_matrices(constant: tuple[str, ...]) -> None:
    inputs = scan_inputs(2, 45, 80, 21, 1, torch.float32)
    check_scan(inputs | {name: rand(45, 21) for name in constant})


@pytest.mark.parametrize("length", [9, 200])
def test_selective_scan_of_packed_sequences(length: int) -> None:
    check_scan(scan_inputs(2, 40, length, 12, 1, torch.float32), seq_idx=packed(2, length))


def test_selective_scan_keeps_slow_and_forgets_fast_states() -> None:
    inputs = scan_inputs(1, 32, 2000, 4, 1, torch.float32)
    inputs["A"] = torch.tensor([-1e-4, -1e-2, -100.0, -1e4]).expand(32, 4)
    inputs["delta"] = torch.rand(1, 32, 2000)
    inputs["delta_bias"] = torch.zeros(32)
    check_scan(inputs, softplus=False, sums=1e-4)          # one state remembers all 2000 tokens


# --- SSD

def ssd_inputs(batch: int, length: int, heads: int, headdim: int, groups: int, states: int,
               dtype: torch.dtype) -> dict[str, Any]:
    return {"x": rand(batch, length, heads, headdim, dtype=dtype), "dt": rand(batch, length, heads, dtype=dtype),
            "A": -torch.rand(heads) * 4 - 0.01, "B": rand(batch, length, groups, states, dtype=dtype),
            "C": rand(batch, length, groups, states, dtype=dtype), "D": rand(heads),
            "z": rand(batch, length, heads, headdim, dtype=dtype), "dt_bias": rand(heads) - 2,
            "initial_states": rand(batch, heads, headdim, states)}


def check_ssd(inputs: dict[str, Any], head_to_group: Tensor, softplus: bool = True,
              limit: tuple[float, float] = (0.0, INF), seq_idx: Tensor | None = None) -> None:
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    args = [inputs[name] for name in names]
    initial = inputs["initial_states"]
    y, state = cpu.ssd(*args, softplus, *limit, head_to_group, initial, seq_idx)
    want_y, want_state = reference.ssd(*doubled(*args), softplus, limit, head_to_group=head_to_group,
                                       initial_states=double(initial), seq_idx=seq_idx)
    assert y.dtype == inputs["x"].dtype and y.is_contiguous() and state.dtype == torch.float32
    assert_close(y, want_y)
    assert_close(state, want_state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "length", "heads", "headdim", "groups", "states"), [
    (1, 1, 1, 13, 1, 5), (2, 63, 41, 13, 1, 12), (1, 1000, 3, 48, 1, 96), (2, 65, 8, 61, 3, 101),
    (1, 70, 5, 64, 4, 128), (1, 5, 1, 1, 1, 1)])
def test_ssd(batch: int, length: int, heads: int, headdim: int, groups: int, states: int, dtype: torch.dtype,
             threads: int) -> None:
    check_ssd(ssd_inputs(batch, length, heads, headdim, groups, states, dtype), ragged_map(heads, groups))


@pytest.mark.parametrize("without", [("D",), ("z",), ("dt_bias",), ("initial_states",),
                                     ("D", "z", "dt_bias", "initial_states")])
def test_ssd_without_options(without: tuple[str, ...]) -> None:
    inputs: dict[str, Any] = dict(ssd_inputs(2, 70, 4, 13, 2, 9, torch.float32))
    inputs |= dict.fromkeys(without)
    inputs["dt"] = inputs["dt"].abs() * 0.1
    inputs["dt_bias"] = None if inputs["dt_bias"] is None else inputs["dt_bias"].abs()
    check_ssd(inputs, ragged_map(4, 2), softplus=False)


def test_ssd_with_dt_limit_and_D_per_channel() -> None:
    check_ssd(ssd_inputs(2, 90, 5, 30, 1, 20, torch.float32) | {"D": rand(5, 30)}, torch.zeros(5, dtype=torch.int32),
              limit=(0.05, 0.3))


def test_ssd_clamps_dt_only_to_a_given_limit() -> None:
    inputs: dict[str, Any] = ssd_inputs(1, 20, 3, 16, 1, 8, torch.float32) | {"dt_bias": None}
    check_ssd(inputs, torch.zeros(3, dtype=torch.int32), softplus=False)                 # some dt are negative
    check_ssd(inputs, torch.zeros(3, dtype=torch.int32), softplus=False, limit=(0.0, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ssd_of_any_strides(dtype: torch.dtype) -> None:
    inputs = ssd_inputs(2, 66, 7, 21, 3, 17, dtype)
    inputs |= {name: strided(inputs[name]) for name in ("x", "A", "B", "dt_bias", "initial_states")}
    inputs["z"] = inputs["z"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    inputs["dt"] = inputs["dt"][..., :1].expand(-1, -1, 7)
    inputs["C"] = inputs["C"][:, :, :1].expand(-1, -1, 3, -1)
    check_ssd(inputs, ragged_map(7, 3))


def test_ssd_reads_float_dt_beside_bf16_x() -> None:
    inputs = ssd_inputs(1, 40, 3, 16, 1, 32, torch.bfloat16)
    check_ssd(inputs | {"dt": inputs["dt"].float()}, torch.zeros(3, dtype=torch.int32))


@pytest.mark.parametrize("length", [9, 200])
def test_ssd_of_packed_sequences(length: int) -> None:
    check_ssd(ssd_inputs(2, length, 5, 13, 2, 12, torch.float32), ragged_map(5, 2), seq_idx=packed(2, length))


# --- decode step

def step_inputs(batch: int, heads: int, headdim: int, groups: int, states: int, dtype: torch.dtype,
                scalar_A: bool) -> dict[str, Any]:
    per_head = (heads, 1) if heads > 1 else (1, headdim)
    return {"x": rand(batch, heads, headdim, dtype=dtype),
            "dt": rand(batch, *per_head, dtype=dtype).expand(-1, heads, headdim),
            "A": ((-torch.rand(*per_head, 1) * 4) if scalar_A else -torch.rand(heads, headdim, states) * 4).expand(
                heads, headdim, states),
            "B": rand(batch, groups, states, dtype=dtype), "C": rand(batch, groups, states, dtype=dtype),
            "D": rand(*per_head).expand(heads, headdim), "z": rand(batch, heads, headdim, dtype=dtype),
            "dt_bias": (rand(*per_head) - 2).expand(heads, headdim)}


def check_step(state: Tensor, inputs: dict[str, Any], group_map: Tensor | None, softplus: bool = True) -> None:
    args = [inputs[name] for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    want_y, want_state = reference.state_update(*doubled(state, *args), softplus, head_to_group=group_map)
    y = cpu.state_update(state, *args, softplus, group_map, None)
    assert y.dtype == inputs["x"].dtype
    assert_close(y, want_y)
    assert_close(state, want_state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize(("batch", "heads", "headdim", "groups", "states", "scalar_A"), [
    (3, 41, 13, 3, 12, True), (1, 24, 64, 1, 128, True), (2, 5, 61, 1, 101, False), (1, 1, 100, 2, 16, False),
    (2, 1, 77, 1, 5, False), (1, 1, 1, 1, 1, True)])
def test_state_update(batch: int, heads: int, headdim: int, groups: int, states: int, scalar_A: bool,
                      dtype: torch.dtype, state_dtype: torch.dtype, threads: int) -> None:
    group_map = ragged_map(headdim if heads == 1 else heads, groups)
    check_step(rand(batch, heads, headdim, states, dtype=state_dtype),
               step_inputs(batch, heads, headdim, groups, states, dtype, scalar_A), group_map)


@pytest.mark.parametrize("without", [("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias")])
def test_state_update_without_options(without: tuple[str, ...]) -> None:
    inputs: dict[str, Any] = dict(step_inputs(2, 4, 13, 1, 20, torch.float32, True))
    inputs |= dict.fromkeys(without)
    inputs["dt"] = inputs["dt"].abs()
    inputs["dt_bias"] = None if inputs["dt_bias"] is None else inputs["dt_bias"].abs()
    check_step(rand(2, 4, 13, 20), inputs, None, softplus=False)


def test_state_update_of_any_strides() -> None:
    inputs = step_inputs(2, 4, 13, 3, 20, torch.float32, False)
    check_step(strided(rand(2, 4, 13, 20)), {name: strided(t) for name, t in inputs.items()}, ragged_map(4, 3))


def test_state_update_of_chosen_slots_leaves_the_others_alone(threads: int) -> None:
    inputs = step_inputs(3, 6, 20, 1, 24, torch.float32, True)
    state = rand(5, 6, 20, 24)
    before, slots = state.clone(), torch.tensor([4, -1, 2], dtype=torch.int32)
    args = [inputs[name] for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    y = cpu.state_update(state, *args, True, None, slots)
    real = [0, 2]
    chosen = slots[real].long()
    per_batch = ("x", "dt", "B", "C", "z")
    some = [double(inputs[name][real] if name in per_batch else inputs[name])
            for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    want_y, want_state = reference.state_update(before[chosen].double(), *some, True)
    assert_close(y[real], want_y)
    assert_close(state[chosen], want_state)
    assert (y[1] == 0).all()
    untouched = [0, 1, 3]
    assert torch.equal(state[untouched], before[untouched])


# --- convolution

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize(("batch", "channels", "length", "initial", "silu"), [
    (2, 67, 63, True, True), (1, 130, 1000, False, True), (2, 5, 1, True, False), (1, 3, 2, False, True)])
def test_causal_conv1d(batch: int, channels: int, length: int, initial: bool, silu: bool, width: int, memory: str,
                       dtype: torch.dtype) -> None:
    x, weight, bias = MEMORY[memory](rand(batch, channels, length, dtype=dtype)), rand(channels, width), rand(channels)
    before = strided(rand(batch, channels, width - 1, dtype=dtype)) if initial else None
    y, last = cpu.causal_conv1d(x, weight, bias if silu else None, silu, before, None)
    want_y, want_last = reference.causal_conv1d(*doubled(x, weight, bias if silu else None), "silu" if silu else None,
                                                initial_states=double(before))
    assert y.dtype == dtype and y.stride() == empty_in_rows(x).stride()
    assert_close(y, want_y)
    assert torch.equal(last.double(), want_last)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("length", [9, 200])
def test_causal_conv1d_of_packed_sequences(length: int, memory: str, threads: int) -> None:
    x, weight = MEMORY[memory](rand(2, 70, length)), rand(70, 4)
    before, seq_idx = rand(2, 70, 3), packed(2, length)
    y, last = cpu.causal_conv1d(x, weight, None, True, before, seq_idx)
    want_y, want_last = reference.causal_conv1d(*doubled(x, weight), None, "silu", initial_states=before.double(),
                                                seq_idx=seq_idx)
    assert_close(y, want_y)
    assert torch.equal(last.double(), want_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize(("width", "kept", "steps"), [(4, 3, 1), (4, 4, 1), (4, 7, 3), (3, 4, 9), (2, 1, 2), (1, 2, 1)])
def test_causal_conv1d_update(width: int, kept: int, steps: int, ring: bool, memory: str, dtype: torch.dtype) -> None:
    batch, channels = 3, 67
    x, weight, bias = MEMORY[memory](rand(batch, channels, steps, dtype=dtype)), rand(channels, width), rand(channels)
    state = MEMORY[memory](rand(batch, channels, kept, dtype=dtype))
    seen = torch.tensor([0, 5, 2 ** 20 + 1], dtype=torch.int32) if ring else None
    want_y, want_state = reference.causal_conv1d_update(*doubled(x, state, weight, bias), "silu", cache_seqlens=seen)
    y = cpu.causal_conv1d_update(x, state, weight, bias, True, seen, None)
    assert_close(y, want_y)
    assert torch.equal(state.double(), want_state)


def test_causal_conv1d_update_of_chosen_slots_leaves_the_others_alone() -> None:
    x, weight, state = rand(2, 10, 1), rand(10, 4), rand(4, 10, 3)
    before, slots = state.clone(), torch.tensor([3, -1], dtype=torch.int32)
    y = cpu.causal_conv1d_update(x, state, weight, None, False, None, slots)
    want_y, want_state = reference.causal_conv1d_update(*doubled(x[:1], before[3:], weight))
    assert_close(y[:1], want_y)
    assert_close(state[3:], want_state)
    assert (y[1] == 0).all() and torch.equal(state[:3], before[:3])


# --- gated norm

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize(("gated", "biased"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("segments", [[1], [1536], [13, 700, 61], [16, 1, 300]])
def test_gated_rmsnorm(segments: list[int], gated: bool, biased: bool, norm_before_gate: bool, dtype: torch.dtype,
                       threads: int) -> None:
    width, eps = sum(segments), [10.0 ** -(i + 3) for i in range(len(segments))]
    wide = rand(2, 9, 2 * width + 3, dtype=dtype)
    x, z = wide[..., :width], wide[..., width:2 * width] if gated else None
    weight, bias = rand(width), rand(width) if biased else None
    y = cpu.gated_rmsnorm(x, weight, bias, z, segments, eps, norm_before_gate)
    want = reference.gated_rmsnorm(*doubled(x, weight, bias, z), segments=segments, eps=eps,
                                   norm_before_gate=norm_before_gate)
    assert y.dtype == dtype and y.is_contiguous()
    assert_close(y, want)


# --- few-row matrix product

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 768, 1000), (4, 61, 7), (2, 1, 1), (3, 45, 9)])
@pytest.mark.parametrize("biased", [False, True])
def test_linear(rows: int, inputs: int, outputs: int, biased: bool, dtype: torch.dtype, threads: int) -> None:
    x, weight = rand(1, rows, inputs, dtype=dtype), rand(outputs, inputs, dtype=dtype)
    bias = rand(outputs, dtype=dtype) if biased else None
    y = cpu.linear(x, weight, bias)
    assert y.shape == (1, rows, outputs) and y.dtype == dtype
    assert_close(y, F.linear(*doubled(x, weight, bias)))
    pitched = torch.cat([weight, weight], dim=1)[:, :inputs]
    assert_close(cpu.linear(x, pitched, bias), F.linear(*doubled(x, weight, bias)))


@pytest.mark.parametrize("batch", [1, 2])
def test_linear_of_many_rows(batch: int) -> None:
    """Rows of a wider tensor, as the parts of a projection are."""
    wide, weight, bias = rand(batch, 70, 100), rand(33, 48), rand(33)
    for x in (wide[..., 50:98], wide.transpose(1, 2)[:, :48].transpose(1, 2)):
        assert_close(cpu.linear(x, weight, bias), F.linear(*doubled(x, weight, bias)))
        assert_close(cpu.linear(x, weight), F.linear(*doubled(x, weight)))


def test_linear_keeps_gradients() -> None:
    weight = rand(5, 7).requires_grad_()
    cpu.linear(rand(1, 7), weight).sum().backward()
    assert weight.grad is not None


# --- elementary functions and dispatch

def test_exponentials_at_both_ends() -> None:
    """softplus and silu through the ops, from far negative to far positive, NaN included."""
    x = torch.tensor([-1e30, -200, -100, -80, -30, -17, -1, -1e-6, 0, 1e-6, 1, 17, 80, 100, 200, 1e30])
    z = x[None, :, None]
    ones = torch.ones(1, 16, 1)
    one = torch.ones(1, 1, 1, 1)
    y, _ = cpu.selective_scan(ones, z, torch.zeros(16, 1), one, one, None, None, None, True, None, None, None)
    exact = reference.softplus(x.double())
    assert ((y[0, :, 0].double() - exact).abs() <= 4e-7 * exact.abs() + 1e-38).all()
    y, _ = cpu.causal_conv1d(z, torch.ones(16, 1), None, True, None, None)
    exact = F.silu(x.double())
    assert ((y[0, :, 0].double() - exact).abs() <= 4e-7 * exact.abs() + 1e-36).all()
    y, _ = cpu.causal_conv1d(torch.full((1, 16, 1), math.nan), torch.ones(16, 1), None, True, None, None)
    assert y.isnan().all()


def test_decay_is_exact_to_rounding() -> None:
    """exp(dt A) for 1e-6 <= |dt A| <= 200, through a scan of one token from state 1."""
    A = -torch.logspace(-6, math.log10(200), 4096)[:, None]
    ones = torch.ones(1, 4096, 1)
    zero = torch.zeros(1, 1, 1, 1)
    _, state = cpu.selective_scan(ones, ones, A, zero, zero, None, None, None, False, ones, None, None)
    exact = A.double().exp()
    assert ((state[0] - exact).abs() <= (2e-7 + 2e-7 * A.abs()) * exact + 1e-37).all()


def test_refusals_say_why() -> None:
    assert "float64" in (cpu.supports("ssd", dtype=torch.float64) or "")
    assert "complex" in (cpu.supports("selective_scan", dtype=torch.float32, complex=True) or "")
    assert "300" in (cpu.supports("ssd", dtype=torch.float32, dstate=300) or "")
    assert cpu.supports("causal_conv1d", dtype=torch.bfloat16, width=4) is None


def test_wrong_shapes_raise_before_anything_runs() -> None:
    with pytest.raises(RuntimeError, match="state has the wrong shape"):
        cpu.state_update(rand(1, 2, 3, 5), *step_inputs(1, 2, 4, 1, 5, torch.float32, True).values(), True, None, None)


@pytest.mark.parametrize("isa", ["base", "v3", "v4"])
def test_every_instruction_set_agrees(isa: str) -> None:
    if os.environ.get("SHEDDER_CPU_ISA") or native.cpu_isa() == "base":
        pytest.skip("there is one instruction set to test")
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k",
                          "not every_instruction_set and not 1000"],
                         env={**os.environ, "SHEDDER_CPU_ISA": isa}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
