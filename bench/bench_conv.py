"""Causal conv1d, forward and update."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.workloads import Workload

OPS = ("conv1d", "conv1d_update")


@pytest.mark.gpu
def test_conv(workload: Workload, measure: Callable[[Workload], None]) -> None:
    measure(workload)
