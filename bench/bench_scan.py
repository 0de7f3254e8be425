"""Selective scan and the Mamba-1 mixer."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.workloads import Workload

OPS = ("selective_scan", "mamba1_inner")


@pytest.mark.gpu
def test_scan(workload: Workload, measure: Callable[[Workload], None]) -> None:
    measure(workload)
