"""Gated RMSNorm."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.workloads import Workload

OPS = ("gated_rmsnorm",)


@pytest.mark.gpu
def test_norm(workload: Workload, measure: Callable[[Workload], None]) -> None:
    measure(workload)
