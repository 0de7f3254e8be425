"""Checks of arguments. Every message names the argument, what came, and what is accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor

from shedder.ops.tracing import is_traced

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int32, torch.int64)
MAX_STATES = 256

Result = TypeVar("Result")
_KEPT = 4096


class OncePerLook(Generic[Result]):
    """A check of tensors and hashable options that reads of each tensor only shape, dtype and device.

    Calls that look alike are checked once: a step of a model makes dozens of checks, and each
    would cost as much as its kernel.
    """

    def __init__(self, check: Callable[..., Result]) -> None:
        self._check = check
        self._passed: dict[tuple, Result] = {}

    def __call__(self, tensors: tuple[Any, ...], *options: Any) -> Result:
        """What the check returns for these tensors and options."""
        if is_traced():                                 # shapes may be symbols
            return self._check(tensors, *options)
        looks = [(t.shape, t.dtype, t.device) if isinstance(t, Tensor) else t for t in tensors]
        key = (*looks, *options)
        result = self._passed.get(key)
        if result is None:
            result = self._check(tensors, *options)
            if len(self._passed) == _KEPT:
                self._passed.clear()
            self._passed[key] = result
        return result


def check_shape(name: str, tensor: Any, shape: tuple[int | None, ...], letters: str) -> None:
    """Raise unless `tensor` has `shape`, where None accepts any size; `letters` is the shape in words."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; accepted: a tensor of shape {letters}")
    came = tensor.shape
    if came == shape:
        return
    if len(came) != len(shape) or [0 for have, want in zip(came, shape, strict=True) if want not in (None, have)]:
        sizes = ", ".join("any" if size is None else str(size) for size in shape) + "," * (len(shape) == 1)
        raise ValueError(f"{name} has shape {tuple(came)}; accepted: {letters} = ({sizes})")


def check_dtype(name: str, tensor: Tensor, accepted: tuple[torch.dtype, ...], why: str = "") -> None:
    if tensor.dtype not in accepted:
        names = " or ".join(str(dtype) for dtype in accepted)
        raise ValueError(f"{name} is {tensor.dtype}; accepted: {names}{why}")


def check_same_dtype(first: str, reference: Tensor, **others: Tensor | None) -> None:
    """Raise unless `reference` is floating and every other tensor has its dtype."""
    check_dtype(first, reference, FLOATS)
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != reference.dtype:
            raise ValueError(f"{name} is {tensor.dtype} but {first} is {reference.dtype}; "
                             f"accepted: the dtype of {first}")


def check_parameter(first: str, reference: Tensor, **others: Tensor | None) -> None:
    """Raise unless every other tensor is floating, and float64 only where `reference` is."""
    for name, tensor in others.items():
        if tensor is None:
            continue
        check_dtype(name, tensor, FLOATS)
        if tensor.dtype == torch.float64 and reference.dtype != torch.float64:
            raise ValueError(f"{name} is torch.float64 but {first} is {reference.dtype}; "
                             f"accepted: torch.float64 only where {first} is torch.float64 too")


def check_same_device(first: str, reference: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(f"{name} is on {tensor.device} but {first} is on {reference.device}; "
                             "accepted: all tensors on one device")


def check_size(name: str, size: int, low: int, high: int) -> None:
    if not low <= size <= high:
        raise ValueError(f"{name} is {size}; accepted: {low} to {high}")


def check_conv_state(conv_state: Tensor, slots: int | None, channels: int, width: int, is_ring: bool,
                     letters: str) -> None:
    """Raise unless `conv_state` is (slots, channels, K), in `letters`, and keeps inputs enough for `width` taps."""
    check_shape("conv_state", conv_state, (slots, channels, None), letters)
    needed = max(width - 1, 1 if is_ring else 0)
    if conv_state.shape[2] < needed:
        raise ValueError(f"conv_state has shape {tuple(conv_state.shape)}; accepted: {letters} with K >= {needed}")


def check_norm_segments(norm_weight: Tensor | None, segments: tuple[tuple[int, float], ...], channels: int,
                        letter: str) -> None:
    """Raise unless there is neither norm_weight nor a segment, or segments of all `channels`, named `letter`."""
    if (norm_weight is None) != (not segments):
        raise ValueError(f"norm_weight is {'None' if norm_weight is None else 'a tensor'} and norm_segments is "
                         f"{list(segments)}; accepted: both, or neither")
    if norm_weight is None:
        return
    check_shape("norm_weight", norm_weight, (channels,), f"({letter},)")
    if sum(size for size, _ in segments) != channels or min(size for size, _ in segments) < 1:
        raise ValueError(f"norm_segments is {list(segments)}; accepted: (channels, eps) with positive channels "
                         f"that add up to {letter} = {channels}")


def check_activation(activation: str | None) -> bool:
    """Whether to apply SiLU."""
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation is {activation!r}; accepted: None, 'silu' or 'swish'")
    return activation is not None


def integers(name: str, tensor: Tensor, shape: tuple[int | None, ...], letters: str) -> Tensor:
    """`tensor` as int32, after a check of its shape and that it holds integers."""
    check_shape(name, tensor, shape, letters)
    check_dtype(name, tensor, INTEGERS)
    return tensor if tensor.dtype == torch.int32 else tensor.to(torch.int32)


@overload
def parameter(tensor: Tensor, like: Tensor) -> Tensor: ...
@overload
def parameter(tensor: None, like: Tensor) -> None: ...
def parameter(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """A per-channel or per-head parameter as backends take it: float32, or float64 in a float64 call.

    An expanded last dimension stays expanded, so that backends still see that it is tied.
    """
    if tensor is None:
        return None
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if tensor.dtype == dtype:
        return tensor
    if tensor.dim() > 1 and tensor.stride(-1) == 0:
        return tensor[..., :1].to(dtype).expand(tensor.shape)
    return tensor.to(dtype)
