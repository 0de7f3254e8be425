"""Calls on CUDA taken whole: one native op instead of a public function's checks, views and smaller ops.

At batch 1 those take longer than the kernels. An op of torch.ops.shedder_calls (csrc/ops/cuda_whole_calls.cu) takes the
arguments of the public function of its name as they came, checks, allocates and launches. It gives back nothing for
what it does not take; the public function then goes the long way, whose checks know every case and name what is wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from shedder.ops.backend import Facts, refusal
from shedder.ops.tracing import is_traced

_PARTS = {                              # the ops whose kernels a native op launches
    "selective_scan_fn": ("selective_scan",),
    "mamba_chunk_scan_combined": ("ssd",),
    "mamba_split_conv1d_scan_combined": ("causal_conv1d", "ssd", "gated_rmsnorm"),
    "selective_state_update": ("state_update",),
    "causal_conv1d_fn": ("causal_conv1d",),
    "causal_conv1d_update": ("causal_conv1d_update",),
    "rmsnorm_fn": ("gated_rmsnorm",),
    "step_mixer": ("step_mixer",),
    "mamba_inner_step": ("mamba_inner_step",),
}
_WITHOUT_GRADIENT = ("selective_state_update", "causal_conv1d_update", "step_mixer", "mamba_inner_step")


def take_whole(function: str, first: Tensor, backend: str | None, arguments: Callable[[], tuple],
               facts: Callable[[], Facts] = tuple) -> tuple | None:
    """What the native op returns for `arguments()`, of which `first` decides the device; None: go the long way.

    facts: those on which another backend may be preferred to the CUDA one.
    """
    if type(first) is not Tensor or not first.is_cuda or backend not in (None, "auto") or is_traced():
        return None
    try:
        op = _op(function, facts())
        if op is None:
            return None
        given = arguments()
        if torch.is_grad_enabled() and function not in _WITHOUT_GRADIENT and any(
                isinstance(one, Tensor) and one.requires_grad for one in given):
            return None
        outputs = op(*given)
    except Exception:                   # arguments of which no tuple can be made, or not the one of the op's schema
        return None
    return None if outputs[0] is None else outputs


@functools.lru_cache(maxsize=8192)
def _op(function: str, facts: Facts) -> Callable[..., tuple] | None:
    if any(refusal("cuda", part, dict(facts)) for part in _PARTS[function]):
        return None
    op = getattr(torch.ops.shedder_calls, function, None)
    return None if op is None else op.default
