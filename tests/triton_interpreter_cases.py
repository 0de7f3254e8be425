"""The Triton kernels in Triton's interpreter, on the CPU; started by test_triton_interpreter.py."""

import pytest
import torch
import triton
import triton.language as tl
import triton_cases as cases

from shedder.ops import triton as backend

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@triton.jit
def _product(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    c = tl.dot(tl.load(a_ptr + at), tl.trans(tl.load(b_ptr + at)), tl.load(c_ptr + at), input_precision="tf32x3")
    tl.store(c_ptr + at, c)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_the_interpreter_multiplies_matrices(dtype):
    """Its tl.dot was seen to be silently wrong with some versions of numpy; then nothing below means anything."""
    a, b, c = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0)).unbind()
    a, b = a.to(dtype), b.to(dtype)
    expected = c + a.float() @ b.float().T
    _product[(1,)](a, b, c, SIZE=32)
    torch.testing.assert_close(c, expected, rtol=1e-5, atol=1e-5)


def test_bf16_products_are_refused_here():
    """The interpreter multiplies the bits of bf16 numbers as if they were integers."""
    a = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    c = torch.zeros(32, 32)
    _product[(1,)](a.bfloat16(), a.bfloat16(), c, SIZE=32)
    assert (c - a @ a.T).abs().max() > 1e3, "Triton has mended it: let supports() allow it and test ssd in bf16 here"
    assert "bfloat16" in backend.supports("ssd", device="cpu", dtype=BF16)
    assert backend.supports("ssd", device="cpu", dtype=F32) is None


@pytest.mark.parametrize(("dtype", "case"), [
    (F32, {"length": 70, "groups": [2, 0, 1], "headdim": 13, "dstate": 5, "extras": True}),
    (F32, {"length": 33, "groups": [1], "headdim": 60, "dstate": 101, "extras": False}),
    (F32, {"length": 100, "groups": [2], "headdim": 48, "dstate": 12, "extras": True, "packed": True,
           "channel_D": True}),
    (F32, {"length": 1, "groups": [1, 1], "headdim": 1, "dstate": 1, "extras": True, "packed": True}),
    (F16, {"length": 130, "groups": [0, 1], "headdim": 61, "dstate": 100, "extras": True, "packed": True}),
    (F16, {"length": 65, "groups": [3], "headdim": 17, "dstate": 96, "extras": False}),     # bf16: no tl.dot here
])
def test_ssd(dtype, case):
    cases.check_ssd("cpu", dtype, **case)


@pytest.mark.parametrize(("dtype", "case"), [
    (F32, {"length": 21, "channels": 37, "dstate": 5, "extras": True, "packed": True}),
    (F32, {"length": 9, "channels": 5, "dstate": 16, "groups": 3, "extras": True, "channel_last": True}),
    (F32, {"length": 12, "channels": 7, "dstate": 12, "extras": False, "constant": "BC"}),
    (F32, {"length": 11, "channels": 6, "dstate": 3, "groups": 2, "extras": True, "constant": "B"}),
    (BF16, {"length": 17, "channels": 3, "dstate": 100, "extras": True}),
    (F16, {"length": 1, "channels": 1, "dstate": 1, "extras": False, "constant": "C"}),
])
def test_selective_scan(dtype, case):
    cases.check_selective_scan("cpu", dtype, **case)


@pytest.mark.parametrize(("dtype", "state_dtype", "case"), [
    (F32, F32, {"groups": [2, 0, 1], "headdim": 13, "dstate": 101, "tied": True, "extras": True, "indexed": True}),
    (BF16, BF16, {"groups": [2], "headdim": 60, "dstate": 12, "tied": True, "extras": False}),
    (F32, F32, {"groups": [1], "headdim": 37, "dstate": 5, "tied": False, "extras": True, "channel_groups": 3}),
    (F16, F16, {"groups": [1], "headdim": 9, "dstate": 16, "tied": False, "extras": True, "indexed": True}),
    (BF16, F32, {"groups": [1, 1], "headdim": 3, "dstate": 1, "tied": False, "extras": True}),
])
def test_state_update(dtype, state_dtype, case):
    cases.check_state_update("cpu", dtype, state_dtype=state_dtype, **case)


@pytest.mark.parametrize(("dtype", "case"), [
    (F32, {"channels": 13, "length": 50, "width": 4, "channel_last": False, "extras": True}),
    (F32, {"channels": 70, "length": 35, "width": 3, "channel_last": True, "extras": True, "packed": True}),
    (BF16, {"channels": 5, "length": 2, "width": 4, "channel_last": True, "extras": True}),
    (F16, {"channels": 9, "length": 300, "width": 2, "channel_last": False, "extras": False, "packed": True}),
    (F32, {"channels": 3, "length": 7, "width": 1, "channel_last": False, "extras": True}),
])
def test_causal_conv1d(dtype, case):
    cases.check_causal_conv1d("cpu", dtype, **case)


@pytest.mark.parametrize(("dtype", "case"), [
    (F32, {"channels": 13, "tokens": 1, "width": 4, "kept": 4, "ring": False, "indexed": False}),
    (BF16, {"channels": 150, "tokens": 3, "width": 4, "kept": 3, "ring": False, "indexed": True, "channel_last": True}),
    (F32, {"channels": 6, "tokens": 7, "width": 3, "kept": 5, "ring": True, "indexed": True}),
    (F32, {"channels": 6, "tokens": 2, "width": 4, "kept": 6, "ring": True, "indexed": False}),
    (F16, {"channels": 6, "tokens": 5, "width": 2, "kept": 3, "ring": False, "indexed": False}),
])
def test_causal_conv1d_update(dtype, case):
    cases.check_causal_conv1d_update("cpu", dtype, **case)


@pytest.mark.parametrize(("dtype", "case"), [
    (F32, {"rows": (2, 3), "segments": [61, 7, 200], "gated": True, "norm_before_gate": False, "bias": False}),
    (BF16, {"rows": (5,), "segments": [130], "gated": True, "norm_before_gate": True, "bias": True}),
    (F32, {"rows": (2,), "segments": [5000, 1], "gated": True, "norm_before_gate": False, "bias": True}),
    (F16, {"rows": (1, 1, 2), "segments": [33, 33], "gated": False, "norm_before_gate": True, "bias": False}),
])
def test_gated_rmsnorm(dtype, case):
    cases.check_gated_rmsnorm("cpu", dtype, **case)
