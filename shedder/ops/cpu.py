"""The CPU backend: C++ kernels (csrc/cpu) of every op, forward and step, for fp32, bf16 and fp16; sums are in fp32.

Float64 and complex A go to the reference. Outputs keep the memory order of their input; channel-last views
(channel stride 1) are the fast way through convolution and scan, and no input is ever copied to be made contiguous.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shedder import native
from shedder.triton_kernels.rows import empty_in_rows

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_STATES = 256
_MAX_WIDTH = 4
_LINEAR_DTYPES = (torch.float32, torch.bfloat16)
_MAX_LINEAR_ROWS = 4          # from here on the matrix products of torch win
_MIN_ONEDNN_ROWS = 16


def available() -> str | None:
    """Why the kernels cannot run, or None."""
    status = native.cpu_status()
    return None if status == "loaded" else status


def supports(op: str, **facts: Any) -> str | None:
    """Why this call is not for these kernels, or None; the facts are listed in shedder.ops.backend."""
    if facts.get("device", "cpu") != "cpu":
        return f"tensors are on {facts['device']}"
    for name in ("dtype", "dt_dtype", "state_dtype", "weight_dtype"):
        if facts.get(name) is not None and facts[name] not in _DTYPES:
            return f"{name} is {facts[name]}; accepted: float32, bfloat16, float16"
    if facts.get("complex"):
        return "A is complex"
    if facts.get("dstate", 1) > _MAX_STATES:
        return f"dstate is {facts['dstate']}; accepted: up to {_MAX_STATES}"
    if op.startswith("causal_conv1d") and facts.get("width", 1) > _MAX_WIDTH:
        return f"width is {facts['width']}; accepted: up to {_MAX_WIDTH}"
    return None


def kernel(op: str, **facts: Any) -> str:
    return f"csrc/cpu {op} ({native.cpu_isa()})"


def _real(t: Tensor | None) -> Tensor | None:
    """A parameter in a dtype that the kernels read."""
    return t if t is None or t.dtype in _DTYPES else t.float()


def _numbers(t: Tensor | None) -> Tensor | None:
    """Indices as contiguous int32."""
    return None if t is None else t.to(torch.int32).contiguous()


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
                   delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None,
                   channel_to_group: Tensor | None, seq_idx: Tensor | None, return_state: bool = True,
                   ) -> tuple[Tensor, Tensor | None]:
    y = torch.empty_like(u)
    final_state = torch.empty(u.shape[0], *A.shape, dtype=torch.float32)
    torch.ops.shedder_cpu.selective_scan.default(
        u, delta, _real(A), B, C, _real(D), z, _real(delta_bias), delta_softplus, _real(initial_state),
        _numbers(channel_to_group), _numbers(seq_idx), y, final_state)
    return y, final_state if return_state else None


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float, head_to_group: Tensor,
        initial_states: Tensor | None, seq_idx: Tensor | None, return_state: bool = True,
        ) -> tuple[Tensor, Tensor | None]:
    batch, _, heads, headdim = x.shape
    if D is not None and D.dim() == 1:
        D = D[:, None].expand(heads, headdim)
    y = torch.empty(x.shape, dtype=x.dtype)
    final_states = torch.empty(batch, heads, headdim, B.shape[-1], dtype=torch.float32)
    torch.ops.shedder_cpu.ssd.default(
        x, dt, _real(A), B, C, _real(D), z, _real(dt_bias), dt_softplus, dt_min, dt_max, _numbers(head_to_group),
        _real(initial_states), _numbers(seq_idx), y, final_states)
    return y, final_states if return_state else None


def state_update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
                 z: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, head_to_group: Tensor | None,
                 state_batch_indices: Tensor | None) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    torch.ops.shedder_cpu.state_update.default(state, x, dt, _real(A), B, C, _real(D), z, _real(dt_bias), dt_softplus,
                                               _numbers(head_to_group), _numbers(state_batch_indices), y)
    return y


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_states: Tensor | None,
                  seq_idx: Tensor | None, return_state: bool = True) -> tuple[Tensor, Tensor | None]:
    y = empty_in_rows(x)
    final_states = torch.empty(*x.shape[:2], weight.shape[1] - 1, dtype=x.dtype)
    torch.ops.shedder_cpu.causal_conv1d.default(x, weight, bias, silu, initial_states, _numbers(seq_idx), y,
                                                final_states)
    return y, final_states if return_state else None


def causal_conv1d_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool,
                         cache_seqlens: Tensor | None, conv_state_indices: Tensor | None) -> Tensor:
    y = torch.empty_like(x)
    torch.ops.shedder_cpu.causal_conv1d_update.default(x, conv_state, weight, bias, silu, _numbers(cache_seqlens),
                                                       _numbers(conv_state_indices), y)
    return y


def step_mixer(zxbcdt: Tensor, conv_state: Tensor, ssm_state: Tensor | None, conv_weight: Tensor,
               conv_bias: Tensor | None, dt_bias: Tensor | None, A: Tensor | None, D: Tensor,
               norm_weight: Tensor | None, ngroups: int, head_to_group: Tensor, segments: list[int], eps: list[float],
               norm_before_gate: bool, dt_min: float, dt_max: float, cache_seqlens: Tensor | None,
               state_batch_indices: Tensor | None) -> Tensor:
    states = 0 if ssm_state is None else ssm_state.shape[3]
    y = zxbcdt.new_empty(zxbcdt.shape[0], conv_weight.shape[0] - 2 * ngroups * states)
    torch.ops.shedder_cpu.step_mixer.default(
        zxbcdt, conv_state, ssm_state, conv_weight, conv_bias, dt_bias, A, D, norm_weight, ngroups,
        _numbers(head_to_group), segments, eps, norm_before_gate, dt_min, dt_max, _numbers(cache_seqlens),
        _numbers(state_batch_indices), y)
    return y


def mamba_inner_step(xz: Tensor, conv_state: Tensor, ssm_state: Tensor | None, conv_weight: Tensor,
                     conv_bias: Tensor | None, x_proj_weight: Tensor | None, dt_proj_weight: Tensor | None,
                     dt_bias: Tensor | None, A: Tensor | None, D: Tensor, channel_to_group: Tensor | None,
                     cache_seqlens: Tensor | None, state_batch_indices: Tensor | None) -> Tensor:
    y = xz.new_empty(xz.shape[0], conv_weight.shape[0])
    torch.ops.shedder_cpu.mamba_inner_step.default(
        xz, conv_state, ssm_state, conv_weight, conv_bias, _adjacent(x_proj_weight), _adjacent(dt_proj_weight), dt_bias,
        A, D, _numbers(channel_to_group), _numbers(cache_seqlens), _numbers(state_batch_indices), y)
    return y


def _adjacent(weight: Tensor | None) -> Tensor | None:
    """A weight whose rows have no gaps inside."""
    return weight if weight is None or weight.stride(-1) == 1 else weight.contiguous()


def gated_rmsnorm(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, segments: list[int],
                  eps: list[float], norm_before_gate: bool) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    width = x.shape[-1]
    torch.ops.shedder_cpu.gated_rmsnorm.default(x.reshape(-1, width), weight, bias,
                                                None if z is None else z.reshape(-1, width), segments, eps,
                                                norm_before_gate, y.view(-1, width))
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, faster for inference on a CPU.

    The few rows of a decode step go to a C++ product that reads the weight at memory speed. Many rows in fp32 go to
    oneDNN, which on a Zen 4 multiplies a quarter to a third faster than the MKL behind F.linear. Anything else
    (gradients, other dtypes and devices, torch.compile, no library) is F.linear.
    """
    if (x.device.type != "cpu" or x.dtype not in _LINEAR_DTYPES or x.dtype is not weight.dtype
            or torch.compiler.is_compiling()
            or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))):
        return F.linear(x, weight, bias)
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    if 0 < rows <= _MAX_LINEAR_ROWS and x.stride(-1) == 1 and weight.stride(-1) == 1 and available() is None:
        y = x.new_empty(rows, weight.shape[0])
        is_flat = x.dim() == 2
        torch.ops.shedder_cpu.linear.default(x if is_flat else x.reshape(rows, width), weight, bias, y)
        return y if is_flat else y.view(*x.shape[:-1], -1)
    if rows >= _MIN_ONEDNN_ROWS and x.dtype is torch.float32 and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


@functools.cache
def _has_onednn() -> bool:
    """Whether this torch has the oneDNN linear that torch.compile uses, with the arguments given above."""
    try:
        ones = torch.ones(2, 2)
        return bool((torch.ops.mkldnn._linear_pointwise(ones, ones, None, "none", [], "") == 2).all())
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
