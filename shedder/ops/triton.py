"""The Triton backend: the kernels of triton_kernels/, called with arguments that shedder.ops has checked.

It runs on CUDA devices; in a process started with TRITON_INTERPRET=1 it runs on the CPU instead,
slowly, for tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton

    from shedder.triton_kernels import causal_conv1d as conv_kernels
    from shedder.triton_kernels import gated_rmsnorm as norm_kernels
    from shedder.triton_kernels import selective_scan as scan_kernels
    from shedder.triton_kernels import ssd as ssd_kernels
    from shedder.triton_kernels import state_update as step_kernels
    _MISSING = None
except ImportError as error:
    _MISSING = f"{error.name or 'triton'} cannot be imported: {error}"

_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"       # Triton reads it when a kernel is defined
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def available() -> str | None:
    """None, or why this backend cannot run here."""
    if _MISSING is not None:
        return _MISSING
    if _INTERPRETING:
        return None
    if not torch.cuda.is_available():
        return "torch sees no GPU (TRITON_INTERPRET=1 would run the kernels on the CPU, for tests only)"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"the GPU has compute capability {major}.{minor}; accepted: 8.0 and newer"
    return None


def supports(op: str, **facts: Any) -> str | None:
    """None, or why this backend does not do this case. Facts it does not know are ignored."""
    device = "cpu" if _INTERPRETING else "cuda"
    if facts.get("device", device) != device:
        return f"tensors on {facts['device']}; accepted: {device}" + (" (TRITON_INTERPRET=1)" if _INTERPRETING else "")
    for name in ("dtype", "dt_dtype", "weight_dtype", "state_dtype"):
        if facts.get(name) is not None and facts[name] not in _DTYPES:
            return f"{name} {facts[name]}; accepted: float32, float16, bfloat16"
    if facts.get("complex"):
        return "complex A"
    if _INTERPRETING and op == "ssd" and facts.get("dtype") == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 matrices wrongly"
    for name in ("dstate", "headdim") if op == "ssd" else ("dstate",):
        if facts.get(name) is not None and not 1 <= facts[name] <= 256:
            return f"{name} {facts[name]}; accepted: 1..256"
    if op.startswith("causal_conv1d") and not 1 <= facts.get("width", 4) <= 4:
        return f"width {facts['width']}; accepted: 1..4"
    return None


def kernel(op: str, **facts: Any) -> str:
    """The name of the kernel that a call takes, with the version that compiles it."""
    return f"triton_kernels.{op} (triton {triton.__version__}{', interpreted' if _INTERPRETING else ''})"


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def _on_device(launch: Callable[..., Any], tensor: Tensor, *arguments: Any) -> Any:
    with _device_of(tensor):
        return launch(tensor, *arguments)


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
                   delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None,
                   channel_to_group: Tensor | None, seq_idx: Tensor | None, return_state: bool = True,
                   ) -> tuple[Tensor, Tensor | None]:
    """(y, final_state); see shedder.reference.selective_scan."""
    return _on_device(scan_kernels.selective_scan, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state,
                      channel_to_group, seq_idx, return_state)


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float, head_to_group: Tensor,
        initial_states: Tensor | None, seq_idx: Tensor | None, return_state: bool = True,
        ) -> tuple[Tensor, Tensor | None]:
    """(y, final_states); see shedder.reference.ssd."""
    return _on_device(ssd_kernels.ssd, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, head_to_group,
                      initial_states, seq_idx, return_state)


def state_update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
                 z: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, head_to_group: Tensor,
                 state_batch_indices: Tensor | None) -> Tensor:
    """y; updates state in place; see shedder.reference.state_update."""
    return _on_device(step_kernels.state_update, state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, head_to_group,
                      state_batch_indices)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_states: Tensor | None,
                  seq_idx: Tensor | None, return_state: bool = True) -> tuple[Tensor, Tensor | None]:
    """(y, final_states); see shedder.reference.causal_conv1d."""
    return _on_device(conv_kernels.causal_conv1d, x, weight, bias, silu, initial_states, seq_idx,
                      return_state)


def causal_conv1d_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool,
                         cache_seqlens: Tensor | None, conv_state_indices: Tensor | None) -> Tensor:
    """y; updates conv_state in place; see shedder.reference.causal_conv1d_update."""
    return _on_device(conv_kernels.causal_conv1d_update, x, conv_state, weight, bias, silu, cache_seqlens,
                      conv_state_indices)


def gated_rmsnorm(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, segments: list[int],
                  eps: list[float], norm_before_gate: bool) -> Tensor:
    """y; see shedder.reference.gated_rmsnorm."""
    return _on_device(norm_kernels.gated_rmsnorm, x, weight, bias, z, segments, eps, norm_before_gate)
