"""The CUDA gated RMSNorm against its definition: any width, segments that end anywhere, rows at any distance."""

from __future__ import annotations

import pytest
import torch
import triton_cases as cases
from cuda_cases import BF16, F16, F32, memory, needs_gpu  # noqa: F401

from shedder import reference
from shedder.ops import cuda

pytestmark = needs_gpu


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("case", [
    {"rows": (2, 3), "segments": [61, 7, 200], "gated": True, "bias": False},
    {"rows": (700,), "segments": [1301, 1302, 1302], "gated": True, "bias": False},
    {"rows": (63,), "segments": [4096], "gated": True, "bias": False},
    {"rows": (3,), "segments": [4093], "gated": True, "bias": True},
    {"rows": (41,), "segments": [2999, 1], "gated": True, "bias": True},
    {"rows": (5,), "segments": [1], "gated": True, "bias": False},
    {"rows": (9,), "segments": [8] * 100 + [1, 2, 3] * 5, "gated": True, "bias": True},
    {"rows": (3000,), "segments": [768], "gated": False, "bias": False},
    {"rows": (2,), "segments": [37, 3], "gated": False, "bias": True},
], ids=str)
def test_matches_the_definition(dtype, norm_before_gate, case):
    cases.check_gated_rmsnorm("cuda", dtype, norm_before_gate=norm_before_gate, **case)


@pytest.mark.parametrize("segments", [[8192], [8185], [5056, 3136]])
def test_the_widest_rows(segments):
    cases.check_gated_rmsnorm("cuda", BF16, rows=(300,), segments=segments, gated=True, norm_before_gate=False,
                              bias=False)


@pytest.mark.parametrize("pitch", [0, 1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("width", [512, 519])
def test_rows_lie_anywhere(pitch, width):
    """x, z and y in different places against the 16-byte grid."""
    x = torch.randn(50, width + pitch, device="cuda", dtype=BF16)[:, :width]
    z = torch.randn(50, width + 2 * pitch, device="cuda", dtype=BF16)[:, pitch:width + pitch]
    weight = torch.randn(width, device="cuda")
    y = cuda.gated_rmsnorm(x, weight, None, z, [width], [1e-5], False)
    cases.assert_close("y", y, reference.gated_rmsnorm(x.double(), weight.double(), None, z.double(), segments=[width],
                                                       eps=[1e-5], norm_before_gate=False), BF16)


def test_columns_that_are_not_adjacent():
    x = torch.randn(20, 30, device="cuda").t()
    y = cuda.gated_rmsnorm(x, torch.ones(20, device="cuda"), None, None, [20], [1e-5], True)
    cases.assert_close("y", y, reference.gated_rmsnorm(x.double(), torch.ones(20, device="cuda"), segments=[20],
                                                       eps=[1e-5]), F32)


def test_what_does_not_fit_is_refused_by_name():
    assert "width 8200" in cuda.supports("gated_rmsnorm", dtype=BF16, width=8200)
    assert "segments" in cuda.supports("gated_rmsnorm", dtype=BF16, width=400, segments=(1,) * 400)
    assert "width 8186" in cuda.supports("gated_rmsnorm", dtype=BF16, width=8186, segments=(8186,))
    assert "2 segments" in cuda.supports("gated_rmsnorm", dtype=BF16, width=8192, segments=(5000, 3192))
    x = torch.randn(2, 8200, device="cuda", dtype=BF16)
    with pytest.raises(RuntimeError, match="8200"):
        cuda.gated_rmsnorm(x, x[0], None, None, [8200], [1e-5], True)


@pytest.mark.slow
def test_more_than_2_31_elements():
    """The last rows of a tensor of 4.3 GB are normalised as they are by themselves."""
    rows, segments = 550_000, [1301, 1302, 1302]
    x = torch.empty(rows, sum(segments), device="cuda", dtype=BF16).normal_()
    assert x.numel() > 2 ** 31
    weight = torch.randn(sum(segments), device="cuda")
    y = cuda.gated_rmsnorm(x, weight, None, x, segments, [1e-5] * 3, False)
    last = x[-5:].double()
    cases.assert_close("y", y[-5:], reference.gated_rmsnorm(last, weight.double(), None, last, segments=segments,
                                                            eps=[1e-5] * 3, norm_before_gate=False), BF16)
