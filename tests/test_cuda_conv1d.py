"""The CUDA causal convolution against the recurrence: both memory orders, on and off the 16-byte grid."""

from __future__ import annotations

import pytest
import torch
import triton_cases as cases
from cuda_cases import BF16, F16, F32, memory, needs_gpu  # noqa: F401

from shedder import reference
from shedder.ops import cuda

pytestmark = needs_gpu


@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("case", [
    {"channels": 1, "length": 1, "width": 4, "extras": True},
    {"channels": 61, "length": 63, "width": 3, "extras": True, "packed": True},
    {"channels": 5120, "length": 100, "width": 4, "extras": True},
    {"channels": 301, "length": 2047, "width": 4, "extras": True, "packed": True},
    {"channels": 304, "length": 1048, "width": 4, "extras": False, "packed": True},
    {"channels": 520, "length": 2048, "width": 3, "extras": True},
    {"channels": 75, "length": 1000, "width": 2, "extras": False, "packed": True},
    {"channels": 13, "length": 2, "width": 1, "extras": True},
    {"channels": 8, "length": 3, "width": 4, "extras": False},
], ids=str)
def test_matches_the_recurrence(dtype, channel_last, case):
    cases.check_causal_conv1d("cuda", dtype, channel_last=channel_last, **case)


@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("case", [
    {"channels": 5121, "tokens": 1, "width": 4, "kept": 4, "ring": False, "indexed": True},
    {"channels": 61, "tokens": 3, "width": 4, "kept": 3, "ring": False, "indexed": False},
    {"channels": 130, "tokens": 7, "width": 3, "kept": 5, "ring": True, "indexed": True},
    {"channels": 130, "tokens": 2, "width": 4, "kept": 6, "ring": True, "indexed": False},
    {"channels": 5, "tokens": 1, "width": 2, "kept": 1, "ring": True, "indexed": False},
    {"channels": 1, "tokens": 9, "width": 2, "kept": 64, "ring": False, "indexed": False},
], ids=str)
def test_steps_match_the_recurrence(dtype, channel_last, case):
    cases.check_causal_conv1d_update("cuda", dtype, channel_last=channel_last, **case)


@pytest.mark.parametrize("order", ["channels", "time"])
@pytest.mark.parametrize("size", [600, 601])
@pytest.mark.parametrize("pitch", [0, 1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("start", [0, 1, 3])
def test_rows_lie_anywhere(order, size, pitch, start):
    """Every way in which x and y lie against the 16-byte grid; what surrounds y stays."""
    rows = 37
    x = torch.randn(2, rows, size + pitch, device="cuda", dtype=BF16)[..., start * (pitch > start):][..., :size]
    x = x.transpose(1, 2) if order == "channels" else x
    weight, bias = torch.randn(x.shape[1], 4, device="cuda", dtype=BF16), torch.randn(x.shape[1], device="cuda")
    y, final = cuda.causal_conv1d(x, weight, bias, True, None, None)
    expected, expected_final = reference.causal_conv1d(x.double(), weight.double(), bias.double(), "silu")
    cases.assert_close("y", y, expected, BF16)
    assert torch.equal(final.double(), expected_final)


@pytest.mark.parametrize("order", ["time", "channels"])
def test_states_nobody_asks_for_are_left_out(order):
    x = torch.randn(2, 77, 130, device="cuda", dtype=BF16)
    x = x.transpose(1, 2) if order == "channels" else x
    given = x, torch.randn(x.shape[1], 4, device="cuda"), None, True, None, None
    y, final = cuda.causal_conv1d(*given, return_state=False)
    assert final is None and torch.equal(y, cuda.causal_conv1d(*given)[0])


def test_strides_without_an_adjacent_dimension():
    x = torch.randn(2, 30, 40, 2, device="cuda", dtype=BF16)[..., 0]
    expanded = torch.randn(2, 1, 40, device="cuda", dtype=BF16).expand(-1, 30, -1)
    weight = torch.randn(30, 3, device="cuda")
    for given in (x, expanded, x[..., :1].expand(-1, -1, 9)):
        y, _ = cuda.causal_conv1d(given, weight, None, False, None, None)
        cases.assert_close("y", y, reference.causal_conv1d(given.double(), weight.double())[0], BF16)


@pytest.mark.slow
@pytest.mark.parametrize("channel_last", [False, True])
def test_more_than_2_31_elements(channel_last):
    """The last row of a tensor of 4.3 GB is convolved as it is by itself."""
    batch, channels, length = 2, 1027 if channel_last else 1024, 1_050_000
    shape = (batch, length, channels) if channel_last else (batch, channels, length)
    x = torch.empty(shape, device="cuda", dtype=BF16).normal_()
    x = x.transpose(1, 2) if channel_last else x
    assert x.numel() > 2 ** 31
    weight = torch.randn(channels, 4, device="cuda")
    y, final = cuda.causal_conv1d(x, weight, None, True, None, None)
    tail = x[-1:, -3:, -1000:]
    expected, _ = reference.causal_conv1d(tail.double(), weight[-3:].double(), None, "silu")
    cases.assert_close("y", y[-1:, -3:, -900:], expected[..., -900:], BF16)
    assert torch.equal(final[-1:, -3:], tail[..., -3:])


def test_states_more_than_2_31_elements_apart():
    """What a step does to a slot does not depend on where it lies."""
    channels, distance = 640, 2 ** 31 + 8
    near = torch.randn(2, channels, 4, device="cuda", dtype=BF16)
    far = torch.empty(distance + channels * 4, device="cuda", dtype=BF16).as_strided(near.shape, (distance, 4, 1))
    far.copy_(near)
    x, weight = torch.randn(2, channels, 1, device="cuda", dtype=BF16), torch.randn(channels, 4, device="cuda")
    ys = [cuda.causal_conv1d_update(x, state, weight, None, True, None, None) for state in (far, near)]
    assert torch.equal(*ys)
    assert torch.equal(far, near)
