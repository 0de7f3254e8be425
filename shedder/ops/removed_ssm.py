"""A mixer whose SSM is removed, between its projections: convolution, gain, gate and norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shedder import reference
from shedder.ops.backend import Facts, decide_or_compose
from shedder.ops.checks import (
    FLOATS,
    OncePerLook,
    check_dtype,
    check_norm_segments,
    check_parameter,
    check_same_device,
    check_shape,
    check_size,
    parameter,
)
from shedder.ops.conv1d import causal_conv1d_fn
from shedder.ops.gated_norm import rmsnorm_fn
from shedder.ops.register import record, register

PARTS = "causal_conv1d, gated_rmsnorm"


def _facts(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, D: Tensor | None, norm_weight: Tensor | None,
           segments: Sequence[int], eps: Sequence[float], norm_before_gate: bool,
           initial_states: Tensor | None) -> Facts:
    vector = 16 // x.element_size() if x.element_size() < 8 else 1
    whole = all(t.stride(2) == 1 and not any(places % vector for places in (t.storage_offset(), *t.stride()[:2]))
                for t in (x, z))
    return (("device", x.device.type), ("dtype", x.dtype), ("batch", x.shape[0]), ("length", x.shape[1]),
            ("channels", x.shape[2]), ("width", weight.shape[1]), ("weight_dtype", weight.dtype),
            ("segments", tuple(segments)), ("whole_vectors", whole))


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _recompute(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, D: Tensor | None,
               norm_weight: Tensor | None, segments: Sequence[int], eps: Sequence[float], norm_before_gate: bool,
               initial_states: Tensor | None) -> Tensor:
    return reference.removed_ssm(x, z, weight, bias, D, norm_weight, segments=segments, eps=eps,
                                 norm_before_gate=norm_before_gate, initial_states=initial_states)


_removed_ssm = register(
    "removed_ssm",
    "Tensor x, Tensor z, Tensor weight, Tensor? bias, Tensor? D, Tensor? norm_weight, int[] segments, float[] eps, "
    "bool norm_before_gate, Tensor? initial_states", "Tensor",
    facts=_facts, fake=_fake, recompute=_recompute)


def removed_ssm(x: Tensor, z: Tensor, conv_weight: Tensor, conv_bias: Tensor | None = None, D: Tensor | None = None,
                norm_weight: Tensor | None = None, *, norm_segments: Sequence[tuple[int, float]] | None = None,
                norm_before_gate: bool = False, initial_states: Tensor | None = None,
                backend: str | None = None) -> Tensor:
    """What is left of a Mamba layer without its state-space part.

        u = D silu(conv(x))     norm(u silu(z)), or norm(u) silu(z) with norm_before_gate, or u silu(z) without a norm

    One call where a backend has it in one kernel. Elsewhere (explain tells where, and why) causal_conv1d_fn and
    rmsnorm_fn run one after the other, each on the backend that it would take by itself.

    Args:
        x, z: (B, L, C) of one dtype, rows at any distance.
        conv_weight: (C, W) with W from 1 to 4. conv_bias: (C,) as conv_weight.
        D: (H,) or (H, P) with HP = C; None is a gain of one.
        norm_weight: (C,). norm_segments: (channels, eps) of each segment, in order, of any sizes that add up to C.
            Both or neither.
        initial_states: (B, C, W-1), the inputs before the first token, as x.
    Returns:
        (B, L, C) as x, contiguous.
    Raises:
        ValueError: naming the argument, what came, and what is accepted.
    """
    segments = () if norm_segments is None else tuple([(size, eps) for size, eps in norm_segments])
    sizes, eps = [size for size, _ in segments], [eps for _, eps in segments]
    tensors = (x, z, conv_weight, conv_bias, D, norm_weight, initial_states)
    heads = _check(tensors, segments)
    if D is not None:
        D = parameter(D.view(heads, -1).expand(heads, x.shape[2] // heads), x)
    facts = _facts(x, z, conv_weight, conv_bias, D, norm_weight, sizes, eps, norm_before_gate, initial_states)
    decision = decide_or_compose("removed_ssm", PARTS, backend or "auto", facts)
    if decision.backend == "composed":
        record(decision)
        return _composed(x, z, conv_weight, conv_bias, D, norm_weight, sizes, eps, norm_before_gate, initial_states,
                         backend)
    return _removed_ssm(x, z, conv_weight, conv_bias, D, norm_weight, sizes, eps, norm_before_gate, initial_states,
                        backend or "auto")


@OncePerLook
def _check(tensors: tuple[Any, ...], segments: tuple[tuple[int, float], ...]) -> int:
    """H."""
    x, z, conv_weight, conv_bias, D, norm_weight, initial_states = tensors
    check_shape("x", x, (None, None, None), "(B, L, C)")
    check_dtype("x", x, FLOATS)
    batch, _, channels = x.shape
    check_shape("z", z, tuple(x.shape), "the shape of x")
    check_dtype("z", z, (x.dtype,), ", the dtype of x")
    check_shape("conv_weight", conv_weight, (channels, None), "(C, W)")
    width = conv_weight.shape[1]
    check_size("W (conv_weight.shape[1])", width, 1, 4)
    if conv_bias is not None:
        check_shape("conv_bias", conv_bias, (channels,), "(C,)")
        check_dtype("conv_bias", conv_bias, (conv_weight.dtype,), ", the dtype of conv_weight")
    heads = 1
    if D is not None:
        heads = D.shape[0] if isinstance(D, Tensor) and D.dim() in (1, 2) else 0
        if heads == 0 or channels % heads or tuple(D.shape[1:]) not in ((), (channels // heads,)):
            raise ValueError(f"D has shape {tuple(getattr(D, 'shape', ()))}; accepted: (H,) or (H, P) with "
                             f"HP = C = {channels}")
    check_norm_segments(norm_weight, segments, channels, "C")
    if initial_states is not None:
        check_shape("initial_states", initial_states, (batch, channels, width - 1), "(B, C, W-1)")
        check_dtype("initial_states", initial_states, (x.dtype,), ", the dtype of x")
    check_parameter("x", x, conv_weight=conv_weight, D=D, norm_weight=norm_weight)
    check_same_device("x", x, z=z, conv_weight=conv_weight, conv_bias=conv_bias, D=D, norm_weight=norm_weight,
                      initial_states=initial_states)
    return heads


def _composed(x: Tensor, z: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, D: Tensor | None,
              norm_weight: Tensor | None, sizes: list[int], eps: list[float], norm_before_gate: bool,
              initial_states: Tensor | None, backend: str | None) -> Tensor:
    y = causal_conv1d_fn(x.transpose(1, 2), conv_weight, conv_bias, initial_states=initial_states, activation="silu",
                         backend=backend).transpose(1, 2)
    if D is not None:
        y = (y.unflatten(-1, D.shape) * D).to(x.dtype).flatten(-2)
    if norm_weight is None:
        return (y * F.silu(z)).contiguous()
    return rmsnorm_fn(y, norm_weight, None, z=z, segments=sizes, segment_eps=eps, norm_before_gate=norm_before_gate,
                      backend=backend)
