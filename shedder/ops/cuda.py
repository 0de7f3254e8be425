"""The CUDA backend: the kernels of csrc/, called with arguments that shedder.ops has checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shedder import native

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    if op != "selective_scan":
        return f"the CUDA backend has no {op}"
    if facts.get("device", "cuda") != "cuda":
        return f"tensors on {facts['device']}; accepted: cuda"
    dtype, dstate = facts.get("dtype"), facts.get("dstate")
    if dtype is not None and dtype not in _DTYPES:
        return f"dtype {dtype}; accepted: float32, float16, bfloat16"
    if dstate is not None and not 1 <= dstate <= 256:
        return f"dstate {dstate}; accepted: 1..256"
    for fact, name in (("complex", "complex A"), ("seq_idx", "seq_idx"), ("constant_B", "B constant in time"),
                       ("constant_C", "C constant in time")):
        if facts.get(fact):
            return f"the CUDA selective_scan does not do {name}"
    return None


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
                   delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None,
                   channel_to_group: Tensor | None, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y, final_state); see shedder.reference.selective_scan."""
    reason = supports("selective_scan", dtype=u.dtype, dstate=A.shape[1], complex=A.is_complex(),
                      seq_idx=seq_idx is not None, constant_B=B.dim() == 2, constant_C=C.dim() == 2)
    if reason is not None:
        raise ValueError(reason)
    y = torch.empty_like(u)
    final_state = torch.empty(u.shape[0], u.shape[1], A.shape[1], dtype=torch.float32, device=u.device)
    torch.ops.shedder_cuda.selective_scan(
        u, delta.to(u.dtype), A.float(), B.to(u.dtype), C.to(u.dtype), _float(D), None if z is None else z.to(u.dtype),
        _float(delta_bias), delta_softplus, None if initial_state is None else initial_state.float().contiguous(),
        None if channel_to_group is None else channel_to_group.to(torch.int32).contiguous(), y, final_state)
    return y, final_state


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float()
