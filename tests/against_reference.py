"""How a backend's result is held against the float64 reference: which backends, what tolerance, which layouts."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from shedder.ops.backend import module_of

# RMS error over RMS of the reference. fp32: sums of some hundred terms in fp32; TF32 products where a GPU takes
# them in three. bf16, fp16: output rounded to 8 and 11 bits, and operands of products likewise. fp64: rounding alone.
# A gradient may be a sum over all tokens whose terms cancel (that of A does): 5 % in bf16, where a term has 8 bits.
FORWARD = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GRADIENT = {torch.float64: 1e-11, torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 5e-2}


def backends(op: str) -> list[Any]:
    """(backend, device) of every backend that has `op`; those on a GPU are marked gpu, absent ones skipped."""
    found = [pytest.param("reference", "cpu", id="reference-cpu"),
             pytest.param("reference", "cuda", id="reference-cuda", marks=pytest.mark.gpu)]
    for name, device in (("cpu", "cpu"), ("triton", "cuda"), ("cuda", "cuda")):
        module = module_of(name)
        if not hasattr(module, op):
            continue
        if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            device = "cpu"
        marks: list[Any] = [pytest.mark.gpu] if device == "cuda" else []
        reason = module.available()
        if reason is not None:
            marks.append(pytest.mark.skip(reason=reason))
        found.append(pytest.param(name, device, id=f"{name}-{device}", marks=marks))
    return found


def assert_close(name: str, got: Tensor, expected: Tensor, limit: float) -> None:
    """The RMS error over the RMS of `expected` is at most `limit`, and nothing is NaN.

    What cancels to (nearly) nothing is held to a hundredth of the size of the inputs, which is about 1.
    """
    assert got.shape == expected.shape, f"{name} has shape {tuple(got.shape)}, not {tuple(expected.shape)}"
    if not expected.numel():
        return
    wide = torch.complex128 if expected.is_complex() else torch.float64
    got, expected = got.detach().to(wide).cpu(), expected.detach().to(wide).cpu()
    scale = expected.abs().square().mean().sqrt().item()
    error = (got - expected).abs().square().mean().sqrt().item()
    assert error <= limit * max(scale, 1e-2), f"{name}: error {error / (scale or 1):.2e} of its RMS, limit {limit:.0e}"


def spread(t: Tensor) -> Tensor:
    """The same values as a view into a wider buffer of NaN, so that a wrong stride shows."""
    buffer = torch.full([size + 2 for size in t.shape], torch.nan, dtype=t.dtype, device=t.device)
    view = buffer[tuple(slice(1, 1 + size) for size in t.shape)]
    view.copy_(t)
    return view


def channel_last(t: Tensor) -> Tensor:
    """(B, D, L) with its channels adjacent in memory, rows further apart than needed."""
    return spread(t.transpose(1, 2).contiguous()).transpose(1, 2)
