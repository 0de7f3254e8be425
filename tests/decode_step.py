"""What the tests of the ops that are a mixer's whole decode step share."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from shedder.ops.backend import BACKENDS, module_of, unavailable


def implementations(op: str) -> list[Any]:
    """Parameters (backend, device): every backend with the op, and None, what a call takes by itself."""
    found = []
    for name in (None, *BACKENDS):
        if name is not None and not hasattr(module_of(name), op):
            continue
        device = "cuda" if name in ("cuda", "triton") else "cpu"
        reason = None if name is None else unavailable(name)
        marks = ([pytest.mark.gpu] if device == "cuda" else []) + (
            [] if reason is None else [pytest.mark.skip(reason=f"{name}: {reason}")])
        found.append(pytest.param(name, device, id=str(name), marks=marks))
    return found


def assert_close(name: str, got: Tensor, want: Tensor, limit: float) -> None:
    """got is off by at most `limit` of the largest value of `want`, a float64 tensor on the CPU."""
    error = (got.double().cpu() - want).abs().max() / want.abs().max()
    assert error <= limit, f"{name} is off by {error:.1e} of its largest value; allowed {limit:.1e}"
