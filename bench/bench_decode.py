"""Decode steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.workloads import Workload

OPS = ("state_update", "step_mixer")


@pytest.mark.gpu
def test_decode(workload: Workload, measure: Callable[[Workload], None]) -> None:
    measure(workload)
