"""The CUDA backend: the kernels of csrc/, called with arguments that shedder.ops has checked."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shedder import native
from shedder.triton_kernels.packed import sequence_runs
from shedder.triton_kernels.rows import empty_in_rows

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MEMORY_BOUND = ("state_update", "causal_conv1d", "causal_conv1d_update", "gated_rmsnorm", "removed_ssm", "step_mixer",
                 "mamba_inner_step")
_NORM_THREADS, _NORM_VECTORS, _NORM_SEGMENTS = 512, 2, 128       # of the CTA that holds a row in registers
_REMOVED_THREADS, _REMOVED_SEGMENTS = 640, 64
_MIXER_ROWS, _MIXER_STATES, _MIXER_SEGMENTS = 32768, 8192, 128    # H P (or D), G N and segments of a mixer's step
_MIXER_BATCH = 4              # of step_mixer, measured: from 8 rows on its clusters wait for one another
_INNER_OUTPUTS = 2048         # R + 2 G N of mamba_inner_step
_INNER_BATCH = 4              # of mamba_inner_step, each row of which reads the weights: separate products from here on
_CHANNEL_STATES = 16          # that one thread holds in a decode step of Mamba-1
_SMALL_BATCH = 8              # a decode step's time up to here is the host's, of which this backend takes least


def available() -> str | None:
    """None, or why this backend cannot run here."""
    status = native.cuda_status()
    if status != "loaded":
        return status
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    archs = native.build_info().get("cuda_archs")
    major, minor = torch.cuda.get_device_capability()
    if archs and not any(_runs_on(arch, major, minor) for arch in archs):
        return f"the GPU has compute capability {major}.{minor}, the CUDA library was built for {', '.join(archs)}"
    return None


def _runs_on(arch: str, major: int, minor: int) -> bool:
    number = int(arch.rstrip("a"))
    if arch.endswith("a"):
        return number == 10 * major + minor
    return number // 10 == major and number % 10 <= minor


def supports(op: str, **facts: Any) -> str | None:
    """None, or why this backend does not do this case. Facts it does not know are ignored."""
    if op in _MEMORY_BOUND:
        return _supports_memory_bound(op, facts)
    if op == "ssd":
        return _supports_ssd(**facts)
    if op != "selective_scan":
        return f"the CUDA backend has no {op}"
    if facts.get("device", "cuda") != "cuda":
        return f"tensors on {facts['device']}; accepted: cuda"
    dtype, dstate = facts.get("dtype"), facts.get("dstate")
    if dtype is not None and dtype not in _DTYPES:
        return f"dtype {dtype}; accepted: float32, float16, bfloat16"
    if dstate is not None and not 1 <= dstate <= 256:
        return f"dstate {dstate}; accepted: 1..256"
    return None


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
                   delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None,
                   channel_to_group: Tensor | None, seq_idx: Tensor | None, return_state: bool = True,
                   ) -> tuple[Tensor, Tensor | None]:
    """(y, final_state); see shedder.reference.selective_scan."""
    reason = supports("selective_scan", dtype=u.dtype, dstate=A.shape[1])
    if reason is not None:
        raise ValueError(reason)
    if A.is_complex():
        return _selective_scan_complex(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state,
                                       channel_to_group, seq_idx, return_state)
    y = torch.empty_like(u)
    final_state = torch.empty(u.shape[0], *A.shape, dtype=torch.float32, device=u.device) if return_state else None
    torch.ops.shedder_cuda.selective_scan(
        u, delta.to(u.dtype), A.float(), B.to(u.dtype if B.dim() == 4 else torch.float32),
        C.to(u.dtype if C.dim() == 4 else torch.float32), _float(D), None if z is None else z.to(u.dtype),
        _float(delta_bias), delta_softplus, None if initial_state is None else initial_state.float().contiguous(),
        None if channel_to_group is None else channel_to_group.to(torch.int32).contiguous(),
        None if seq_idx is None else seq_idx.to(torch.int32).contiguous(), y, final_state)
    return y, final_state


def _selective_scan_complex(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
                            z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool,
                            initial_state: Tensor | None, channel_to_group: Tensor | None, seq_idx: Tensor | None,
                            return_state: bool) -> tuple[Tensor, Tensor | None]:
    y = torch.empty_like(u)
    final_state = torch.empty(u.shape[0], *A.shape, 2, dtype=torch.float32, device=u.device) if return_state else None
    torch.ops.shedder_cuda.selective_scan_complex(
        u, delta.to(u.dtype), _pairs(A), _pairs(B) if B.dim() == 2 else B.to(u.dtype),
        _pairs(C) if C.dim() == 2 else C.to(u.dtype), _float(D), None if z is None else z.to(u.dtype),
        _float(delta_bias), delta_softplus, None if initial_state is None else _pairs(initial_state.contiguous()),
        None if channel_to_group is None else channel_to_group.to(torch.int32).contiguous(),
        None if seq_idx is None else sequence_runs(seq_idx), y, final_state)
    return y, None if final_state is None else torch.view_as_complex(final_state)


def _pairs(t: Tensor) -> Tensor:
    """Real and imaginary parts in a last dimension of 2."""
    return torch.view_as_real(t.to(torch.complex64).resolve_conj())


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float, head_to_group: Tensor,
        initial_states: Tensor | None, seq_idx: Tensor | None, return_state: bool = True, *, segments: int = 0,
        portable: bool = False) -> tuple[Tensor, Tensor | None]:
    """(y, final_states); see shedder.reference.ssd.

    segments of a sequence, of the kernel for Hopper: 0 lets the launcher choose. portable: the kernel for any GPU where
    the launcher would take that one.
    """
    reason = _supports_ssd(dtype=x.dtype, dstate=B.shape[-1], headdim=x.shape[-1])
    if reason is not None:
        raise ValueError(reason)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final_states = None
    if return_state:
        final_states = torch.empty(x.shape[0], *x.shape[2:], B.shape[-1], dtype=torch.float32, device=x.device)
    if dt.dtype != x.dtype:
        dt = dt.float()
    arguments = (
        _rows(x, x.dtype), dt, A.float(), _rows(B, x.dtype), _rows(C, x.dtype), _float(D),
        None if z is None else _rows(z, x.dtype), _float(dt_bias), dt_softplus, dt_min, dt_max,
        head_to_group.to(torch.int32).contiguous(),
        None if initial_states is None else initial_states.float().contiguous(),
        None if seq_idx is None else sequence_runs(seq_idx), y, final_states)
    if portable:
        torch.ops.shedder_cuda.ssd_portable(*arguments)
    else:
        torch.ops.shedder_cuda.ssd(*arguments, segments)
    return y, final_states


def _supports_ssd(device: str = "cuda", dtype: torch.dtype | None = None, dstate: int = 1, headdim: int = 1,
                  **_: Any) -> str | None:
    if device != "cuda":
        return f"tensors on {device}; accepted: cuda"
    if dtype is not None and dtype not in _DTYPES:
        return f"dtype {dtype}; accepted: float32, float16, bfloat16"
    if not 1 <= dstate <= 256:
        return f"dstate {dstate}; accepted: 1..256"
    if not 1 <= headdim <= 1024:
        return f"headdim {headdim}; accepted: 1..1024"
    return None


def _rows(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in `dtype`, its last dimension contiguous in memory."""
    t = t.to(dtype)
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float()


def _supports_memory_bound(op: str, facts: dict[str, Any]) -> str | None:
    if facts.get("device", "cuda") != "cuda":
        return f"tensors on {facts['device']}; accepted: cuda"
    for name in ("dtype", "dt_dtype", "weight_dtype", "state_dtype"):
        if facts.get(name) is not None and facts[name] not in _DTYPES:
            return f"{name} {facts[name]}; accepted: float32, float16, bfloat16"
    is_step = op in ("step_mixer", "mamba_inner_step")
    fewest = 0 if is_step else 1                             # states: an SSM may be removed
    if not fewest <= facts.get("dstate", 1) <= 256:
        return f"dstate {facts['dstate']}; accepted: {fewest}..256"
    if op.startswith("causal_conv1d") and not 1 <= facts.get("width", 1) <= 4:
        return f"width {facts['width']}; accepted: 1..4"
    if op == "state_update" and facts.get("batch", 1) > _SMALL_BATCH:
        by_channels = (facts.get("heads", 2) == 1 and facts.get("groups", 1) == 1
                       and facts.get("dstate", 1) <= _CHANNEL_STATES
                       and facts.get("dt_dtype") == facts.get("dtype"))
        if not by_channels:
            return (f"a batch of {facts['batch']}: the Triton kernel takes less time, except for one head and one "
                    f"group with at most {_CHANNEL_STATES} states and dt of the dtype of x")
    if is_step:
        return _supports_step(op, facts)
    if op in ("gated_rmsnorm", "removed_ssm"):
        return _supports_row(op, facts)
    return None


def _supports_step(op: str, facts: dict[str, Any]) -> str | None:
    """A cluster of CTAs holds a row of the batch."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        return "the GPU has no clusters; accepted: compute capability 9.0 and above"
    for name in ("weight_dtype", "norm_dtype"):
        if facts.get(name) not in (None, facts.get("dtype")):
            return f"{name} {facts[name]}; accepted: {facts.get('dtype')}, the dtype of the inputs"
    most = _INNER_BATCH if op == "mamba_inner_step" else _MIXER_BATCH
    if facts.get("dstate", 1) and facts.get("batch", 1) > most:
        return f"a batch of {facts['batch']}: separate ops take less time from {most + 1} on"
    states = facts.get("groups", 1) * facts.get("dstate", 1)
    for letters, size, most in (
            ("H P", facts.get("heads", 1) * facts.get("headdim", 1), _MIXER_ROWS),
            ("D", facts.get("channels", 1), _MIXER_ROWS),
            ("G N", states, _MIXER_STATES),
            ("R + 2 G N", facts.get("dt_rank", -2 * states) + 2 * states, _INNER_OUTPUTS),
            ("the number of norm segments", len(facts.get("segments") or ()), _MIXER_SEGMENTS)):
        if size > most:
            return f"{letters} is {size}; accepted: up to {most}"
    return None


def _supports_row(op: str, facts: dict[str, Any]) -> str | None:
    """A CTA holds a row; each segment of the norm takes whole groups of 8 lanes, of 32 where it is alone."""
    vector = 16 // facts.get("dtype", torch.float32).itemsize
    width = facts.get("channels" if op == "removed_ssm" else "width", 1)
    segments = facts.get("segments") or (width,)
    ends = itertools.accumulate(segments)
    is_whole = all(end % vector == 0 for end in ends)
    if op == "removed_ssm":
        if not (is_whole and facts.get("whole_vectors", True)):
            return "rows or segments off the grid of 16 bytes"
        most, threads = _REMOVED_SEGMENTS, _REMOVED_THREADS
    else:
        most, threads = _NORM_SEGMENTS, _NORM_THREADS * _NORM_VECTORS
    if len(segments) > most:
        return f"{len(segments)} segments; accepted: up to {most}"
    lanes = 32 if len(segments) == 1 else 8
    reach = 0 if is_whole else vector - 1                    # back to the grid point before a segment
    if lanes * sum(-(-(size + reach) // (lanes * vector)) for size in segments) > threads:
        return f"width {width} in {len(segments)} segments takes more than {threads} vectors of {vector} channels"
    return None


@functools.cache
def _op(name: str) -> Callable[..., None]:
    """torch.ops.shedder_cuda's op; looking it up takes as long as a small kernel."""
    return getattr(torch.ops.shedder_cuda, name).default


def state_update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
                 z: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, head_to_group: Tensor | None,
                 state_batch_indices: Tensor | None) -> Tensor:
    """y; updates state in place; see shedder.reference.state_update.

    Mamba-1 may come without the dimension of its one head, one group without its dimension and without a map: views
    cost host time.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _op("state_update")(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, head_to_group, state_batch_indices, y)
    return y


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_states: Tensor | None,
                  seq_idx: Tensor | None, return_state: bool = True) -> tuple[Tensor, Tensor | None]:
    """(y, final_states); see shedder.reference.causal_conv1d."""
    y = empty_in_rows(x)
    final_states = None
    if return_state:
        final_states = torch.empty(*x.shape[:2], weight.shape[1] - 1, dtype=x.dtype, device=x.device)
    _op("causal_conv1d")(x, weight, bias, silu, initial_states, seq_idx, y, final_states)
    return y, final_states


def causal_conv1d_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool,
                         cache_seqlens: Tensor | None, conv_state_indices: Tensor | None) -> Tensor:
    """y; updates conv_state in place; see shedder.reference.causal_conv1d_update."""
    y = torch.empty_like(x)
    _op("causal_conv1d_update")(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices, y)
    return y


def gated_rmsnorm(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, segments: list[int],
                  eps: list[float], norm_before_gate: bool) -> Tensor:
    """y; see shedder.reference.gated_rmsnorm."""
    width = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _op("gated_rmsnorm")(_flat_rows(x), weight, bias, None if z is None else _flat_rows(z), segments, eps,
                         norm_before_gate, y.view(-1, width))
    return y


def removed_ssm(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, D: Tensor | None,
                norm_weight: Tensor | None, segments: list[int], eps: list[float], norm_before_gate: bool,
                initial_states: Tensor | None) -> Tensor:
    """y; see shedder.reference.removed_ssm."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _op("removed_ssm")(x, z, weight, bias, D, norm_weight, segments, eps, norm_before_gate, initial_states, y)
    return y


def step_mixer(zxbcdt: Tensor, conv_state: Tensor, ssm_state: Tensor | None, conv_weight: Tensor,
               conv_bias: Tensor | None, dt_bias: Tensor | None, A: Tensor | None, D: Tensor,
               norm_weight: Tensor | None, ngroups: int, head_to_group: Tensor, segments: list[int], eps: list[float],
               norm_before_gate: bool, dt_min: float, dt_max: float, cache_seqlens: Tensor | None,
               state_batch_indices: Tensor | None) -> Tensor:
    """y; moves both states on in place; see shedder.ops.step_mixer."""
    states = 0 if ssm_state is None else ssm_state.shape[3]
    y = torch.empty(zxbcdt.shape[0], conv_weight.shape[0] - 2 * ngroups * states, dtype=zxbcdt.dtype,
                    device=zxbcdt.device)
    _op("step_mixer")(zxbcdt, conv_state, ssm_state, conv_weight, conv_bias, _float(dt_bias), _float(A), D.float(),
                      norm_weight, ngroups, head_to_group, segments, eps, norm_before_gate, dt_min, dt_max,
                      cache_seqlens, state_batch_indices, y)
    return y


def mamba_inner_step(xz: Tensor, conv_state: Tensor, ssm_state: Tensor | None, conv_weight: Tensor,
                     conv_bias: Tensor | None, x_proj_weight: Tensor | None, dt_proj_weight: Tensor | None,
                     dt_bias: Tensor | None, A: Tensor | None, D: Tensor, channel_to_group: Tensor | None,
                     cache_seqlens: Tensor | None, state_batch_indices: Tensor | None) -> Tensor:
    """y; moves both states on in place; see shedder.ops.mamba_inner_step."""
    y = torch.empty(xz.shape[0], conv_weight.shape[0], dtype=xz.dtype, device=xz.device)
    _op("mamba_inner_step")(xz, conv_state, ssm_state, conv_weight, conv_bias, x_proj_weight, dt_proj_weight,
                            _float(dt_bias), _float(A), D.float(), channel_to_group, cache_seqlens, state_batch_indices,
                            y)
    return y


def _flat_rows(t: Tensor) -> Tensor:
    """(rows, D) with columns adjacent in memory; a copy only where they are not, or rows have no one distance."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
