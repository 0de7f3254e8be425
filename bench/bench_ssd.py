"""SSD and the Mamba-2 mixer, whole or with its SSM removed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.workloads import Workload

OPS = ("ssd", "mamba2_inner", "removed_ssm")


@pytest.mark.gpu
def test_ssd(workload: Workload, measure: Callable[[Workload], None]) -> None:
    measure(workload)
