"""A mixer without its SSM is the composition of its specifications, in one kernel or in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shedder import ops, reference
from shedder.ops import cuda

# Outputs are rounded once in one kernel; in parts the convolution and its gain are rounded too.
LIMIT = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}

no_cuda = cuda.available()
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(no_cuda is not None, reason=f"no CUDA backend: {no_cuda}")]
DEVICES = [("cpu", None), ("cpu", "reference"), pytest.param("cuda", None, marks=on_gpu),
           pytest.param("cuda", "cuda", marks=on_gpu)]


def make(heads: int = 5, headdim: int = 16, *, batch: int = 2, length: int = 37, width: int = 4,
         dtype: torch.dtype = torch.float32, device: str = "cpu", gain: str = "head",
         segments: tuple[tuple[int, float], ...] | None = ((80, 1e-5),), has_bias: bool = True, history: bool = False,
         padding: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and options of a call; x and z are slices of one projection."""
    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    inner = heads * headdim
    z, x, _ = rand(batch, length, 2 * inner + padding).to(dtype).split([inner, inner, padding], dim=-1)
    tensors = {"x": x, "z": z, "conv_weight": (rand(inner, width) / 2).to(dtype),
               "conv_bias": rand(inner).to(dtype) if has_bias else None,
               "D": {"head": rand(heads), "channel": rand(heads, headdim), "none": None}[gain],
               "norm_weight": rand(inner).to(dtype) if segments else None,
               "initial_states": rand(batch, inner, width - 1).to(dtype) if history else None}
    return tensors, {"norm_segments": segments}


def expected(tensors: dict[str, Any], norm_segments: Any, norm_before_gate: bool = False) -> Tensor:
    """Written out from the parts, in float64."""
    t = {name: None if value is None else value.double() for name, value in tensors.items()}
    u = reference.causal_conv1d(t["x"].transpose(1, 2), t["conv_weight"], t["conv_bias"], "silu",
                                initial_states=t["initial_states"])[0].transpose(1, 2)
    if t["D"] is not None:
        heads = t["D"].shape[0]
        u = (u.unflatten(-1, (heads, -1)) * t["D"].view(heads, -1)).flatten(2)
    if norm_segments is None:
        return u * F.silu(t["z"])
    return reference.gated_rmsnorm(u, t["norm_weight"], None, t["z"], segments=[size for size, _ in norm_segments],
                                   eps=[eps for _, eps in norm_segments], norm_before_gate=norm_before_gate)


CASES = {
    "dense": {},
    "channel gains": {"gain": "channel", "history": True},
    "no gain, no bias": {"gain": "none", "has_bias": False},
    "no norm": {"segments": None},
    "segments": {"segments": ((16, 1e-5), (40, 3e-3), (24, 1e-5)), "width": 3},
    "wide": {"heads": 80, "headdim": 64, "segments": ((5120, 1e-5),), "length": 45, "history": True},
    "half as wide": {"heads": 40, "headdim": 64, "segments": ((2560, 1e-5),), "length": 301, "batch": 3},
    "width 1": {"width": 1},
    "padded rows": {"padding": 24, "length": 300, "width": 2, "history": True},
    "one token": {"length": 1, "batch": 3, "history": True},
}


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("device", "backend"), DEVICES)
def test_matches_its_parts(device, backend, case, norm_before_gate, dtype):
    if backend == "cuda" and case == "wide" and dtype is torch.float32:
        pytest.skip("5120 channels in fp32 are more vectors than a CTA of this kernel has threads")
    tensors, options = make(**CASES[case], device=device, dtype=dtype)
    y = ops.removed_ssm(**tensors, **options, norm_before_gate=norm_before_gate, backend=backend)
    want = expected(tensors, options["norm_segments"], norm_before_gate)
    assert y.dtype == dtype and y.is_contiguous()
    assert (y.double() - want).square().mean().sqrt() <= LIMIT[dtype] * want.square().mean().sqrt()


@pytest.mark.parametrize(("device", "backend"), DEVICES[:3])
@pytest.mark.parametrize("case", [{"heads": 7, "headdim": 13, "segments": ((91, 1e-5),)},
                                  {"segments": ((41, 1e-5), (39, 1e-2))}], ids=str)
def test_odd_layouts_run_in_parts(device, backend, case):
    tensors, options = make(**case, device=device)
    y = ops.removed_ssm(**tensors, **options, backend=backend)
    torch.testing.assert_close(y.double(), expected(tensors, options["norm_segments"]), rtol=1e-4, atol=1e-5)
    if backend is None:
        assert ops.explain(ops.removed_ssm, **tensors, **options)[0].backend == "composed"


@pytest.mark.parametrize(("device", "backend"), DEVICES)
def test_prefill_in_pieces_is_prefill(device, backend):
    tensors, options = make(length=40, device=device, history=True)
    whole = ops.removed_ssm(**tensors, **options, backend=backend)
    x, z = tensors["x"], tensors["z"]
    history, pieces = tensors["initial_states"], []
    for start in (0, 1, 3, 24):
        end = {0: 1, 1: 3, 3: 24, 24: 40}[start]
        piece = {**tensors, "x": x[:, start:end], "z": z[:, start:end], "initial_states": history}
        pieces.append(ops.removed_ssm(**piece, **options, backend=backend))
        history = torch.cat([history, x[:, start:end].transpose(1, 2)], dim=-1)[..., -3:]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_gradients_are_those_of_the_parts(backend):
    tensors, options = make(history=True)
    gradients = []
    for call in (lambda t: ops.removed_ssm(**t, **options, backend=backend),
                 lambda t: expected(t, options["norm_segments"])):
        leaves = {name: value.detach().clone().requires_grad_() for name, value in tensors.items()}
        call(leaves).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves.values()])
    for ours, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4)


def test_nothing_to_compute():
    tensors, options = make(length=0)
    assert ops.removed_ssm(**tensors, **options).shape == (2, 0, 80)


@pytest.mark.parametrize(("change", "message"), [
    ({"z": torch.zeros(2, 37, 79)}, "z has shape"),
    ({"z": torch.zeros(2, 37, 80, dtype=torch.bfloat16)}, "z is torch.bfloat16"),
    ({"conv_weight": torch.zeros(80, 5)}, "W .* is 5"),
    ({"conv_bias": torch.zeros(7)}, "conv_bias has shape"),
    ({"D": torch.zeros(3)}, "D has shape"),
    ({"norm_weight": None}, "norm_weight is None"),
    ({"norm_segments": ((60, 1e-5),)}, "norm_segments is"),
    ({"initial_states": torch.zeros(2, 80, 2)}, "initial_states has shape"),
])
def test_bad_input_is_named(change, message):
    tensors, options = make()
    with pytest.raises(ValueError, match=message):
        ops.removed_ssm(**{**tensors, **options, **change})


def test_cuda_says_what_it_does_not_take():
    facts = {"dtype": torch.bfloat16, "channels": 5120, "width": 4, "segments": (5120,)}
    assert cuda.supports("removed_ssm", **facts) is None
    assert "grid" in cuda.supports("removed_ssm", **facts, whole_vectors=False)
    assert "grid" in cuda.supports("removed_ssm", **{**facts, "segments": (60, 5060)})
    assert "vectors" in cuda.supports("removed_ssm", **{**facts, "channels": 8192, "segments": (8192,)})


@pytest.mark.gpu
@pytest.mark.skipif(no_cuda is not None, reason=f"no CUDA backend: {no_cuda}")
def test_rows_more_than_2_31_elements_apart():
    """What a row of the batch gives does not depend on where it lies."""
    tensors, options = make(heads=10, headdim=64, segments=((640, 1e-5),), dtype=torch.bfloat16, device="cuda")
    near = ops.removed_ssm(**tensors, **options, backend="cuda")
    distance = 2 ** 31 + 8
    room = torch.empty(distance + 2 * 37 * 1280, device="cuda", dtype=torch.bfloat16)
    for name, first in (("x", 0), ("z", 640)):
        far = room.as_strided((2, 37, 640), (distance, 1280, 1), first)
        tensors[name] = far.copy_(tensors[name])
    assert torch.equal(ops.removed_ssm(**tensors, **options, backend="cuda"), near)
