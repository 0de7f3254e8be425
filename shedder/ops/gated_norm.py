"""Gated RMSNorm over any segments of the channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shedder import reference
from shedder.ops.backend import Facts
from shedder.ops.checks import FLOATS, OncePerLook, check_dtype, check_parameter, check_same_device, check_shape
from shedder.ops.register import register
from shedder.ops.whole import take_whole


def _facts(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, segments: Sequence[int],
           eps: Sequence[float], norm_before_gate: bool) -> Facts:
    rows = x.numel() // x.shape[-1]
    return (("device", x.device.type), ("dtype", x.dtype), ("batch", rows), ("length", 1), ("width", x.shape[-1]),
            ("weight_dtype", weight.dtype), ("segments", tuple(segments)), ("gated", z is not None),
            ("norm_before_gate", norm_before_gate))


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _recompute(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, segments: Sequence[int],
               eps: Sequence[float], norm_before_gate: bool) -> Tensor:
    return reference.gated_rmsnorm(x, weight, bias, z, segments=segments, eps=eps, norm_before_gate=norm_before_gate)


_gated_rmsnorm = register(
    "gated_rmsnorm",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? z, int[] segments, float[] eps, bool norm_before_gate", "Tensor",
    facts=_facts, fake=_fake, recompute=_recompute)


def rmsnorm_fn(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None = None, eps: float = 1e-6,
               group_size: int | None = None, norm_before_gate: bool = True, *,
               segments: Sequence[int] | None = None, segment_eps: Sequence[float] | None = None,
               backend: str | None = None) -> Tensor:
    """RMSNorm over each segment of the last dimension, with an optional gate silu(z).

    Args:
        x, z: (..., D), one dtype; rows may lie at any distance.
        weight, bias: (D,), any float dtype.
        eps, group_size: segments of group_size channels, each with eps; None is one segment.
        norm_before_gate: norm(x) silu(z); else norm(x silu(z)).
        segments: channels of each segment in order, of any sizes that add up to D, instead of group_size.
        segment_eps: an eps for each segment, instead of eps.
    Returns:
        (..., D) as x, contiguous.
    Raises:
        ValueError: naming the argument, what came, and what is accepted.
    """
    taken = take_whole("rmsnorm_fn", x, backend, lambda: (
        x, weight, bias, z, eps, group_size, norm_before_gate, segments, segment_eps))
    if taken is not None:
        return taken[0]
    sizes, each_eps = _check((x, weight, bias, z), eps, group_size, None if segments is None else tuple(segments),
                             None if segment_eps is None else tuple(segment_eps))
    return _gated_rmsnorm(x, weight, bias, z, sizes, each_eps, norm_before_gate, backend or "auto")


@OncePerLook
def _check(tensors: tuple[Any, ...], eps: float, group_size: int | None, segments: tuple[int, ...] | None,
           segment_eps: tuple[float, ...] | None) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The segments and the eps of each."""
    x, weight, bias, z = tensors
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(getattr(x, 'shape', ()))}; accepted: (..., D) with D >= 1")
    check_dtype("x", x, FLOATS)
    width = x.shape[-1]
    check_shape("weight", weight, (width,), "(D,)")
    if bias is not None:
        check_shape("bias", bias, (width,), "(D,)")
    if z is not None:
        check_shape("z", z, tuple(x.shape), "the shape of x")
        if z.dtype != x.dtype:
            raise ValueError(f"z is {z.dtype} but x is {x.dtype}; accepted: the dtype of x")
    check_parameter("x", x, weight=weight, bias=bias)
    check_same_device("x", x, weight=weight, bias=bias, z=z)
    if segments is None:
        size = width if group_size is None else group_size
        if size < 1 or width % size:
            raise ValueError(f"group_size is {group_size}; accepted: a divisor of D = {width}")
        segments = (size,) * (width // size)
    elif group_size is not None:
        raise ValueError(f"group_size is {group_size} and segments is {list(segments)}; accepted: one of them")
    elif sum(segments) != width or min(segments) < 1:
        raise ValueError(f"segments is {list(segments)}; accepted: positive sizes that add up to D = {width}")
    if segment_eps is None:
        segment_eps = (eps,) * len(segments)
    elif len(segment_eps) != len(segments):
        raise ValueError(f"segment_eps has {len(segment_eps)} entries; accepted: one for each of the "
                         f"{len(segments)} segments")
    return segments, segment_eps
