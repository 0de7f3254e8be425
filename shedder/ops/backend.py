"""The choice of a backend: which one runs a call, and why each of the others does not.

A backend is a module of this package with
    available() -> str | None             why it cannot run here at all, or None
    supports(op, **facts) -> str | None   why it cannot run this call, or None
    kernel(op, **facts) -> str            optional: the name of the kernel that a call takes
and one function for each op that it implements. The facts of a call are

    every op        device ("cpu", "cuda"), dtype (of x or u), batch, length
    selective_scan  channels, dstate, groups, complex, constant_B, constant_C, initial_state, seq_idx
    ssd             heads, headdim, dstate, groups, dt_dtype, initial_states, seq_idx
    state_update    heads, headdim, dstate, groups, slots, state_dtype, dt_dtype, indexed
    causal_conv1d   channels, width, weight_dtype, channel_last, initial_states, seq_idx
    causal_conv1d_update    channels, width, weight_dtype, ring, indexed
    step_mixer      heads, headdim, dstate, groups, width, weight_dtype, state_dtype, norm_dtype, segments (a tuple)
    mamba_inner_step    channels, dstate, groups, dt_rank, width, weight_dtype, state_dtype
    gated_rmsnorm   width, weight_dtype, segments (a tuple), gated, norm_before_gate
    removed_ssm     channels, width, weight_dtype, segments (a tuple), whole_vectors (rows on the grid of 16 bytes)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch

ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}    # of backend="auto", by device
BACKENDS = ("cuda", "triton", "cpu", "reference")
OPS = ("selective_scan", "ssd", "state_update", "causal_conv1d", "causal_conv1d_update", "gated_rmsnorm",
       "step_mixer", "mamba_inner_step", "removed_ssm")
_MODULES = {"cuda": "shedder.ops.cuda", "triton": "shedder.ops.triton", "cpu": "shedder.ops.cpu",
            "reference": "shedder.ops.reference_backend"}

Facts = tuple[tuple[str, Any], ...]              # hashable, so that a decision is made once


@dataclass(frozen=True)
class Explanation:
    """The backend and kernel that one op takes, and why each other backend is not taken."""

    op: str
    backend: str
    kernel: str
    facts: dict[str, Any] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend} ({self.kernel})"]
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected.items()]
        return "\n".join(lines)


@cache
def module_of(backend: str) -> ModuleType:
    """The backend's module, imported when it is first asked for."""
    return importlib.import_module(_MODULES[backend])


def unavailable(backend: str) -> str | None:
    """Why `backend` cannot run anything here, or None."""
    return module_of(backend).available()


def refusal(backend: str, op: str, facts: dict[str, Any]) -> str | None:
    """Why `backend` cannot run this call, or None."""
    reason = unavailable(backend)
    if reason is not None:
        return reason
    module = module_of(backend)
    if not hasattr(module, op):
        return f"the {backend} backend has no {op}"
    return module.supports(op, **facts)


@lru_cache(maxsize=8192)
def decide(op: str, backend: str, facts: Facts) -> Explanation:
    """The decision for one op. Raises ValueError where a forced backend cannot run the call."""
    known = dict(facts)
    if backend not in (*BACKENDS, "auto"):
        raise ValueError(f"backend is {backend!r}; accepted: None, 'auto' or one of {BACKENDS}")
    device = known["device"]
    candidates: tuple[str, ...] = ORDER.get(device, ("reference",)) if backend == "auto" else (backend,)
    rejected: dict[str, str] = {}
    if 0 in (known["batch"], known["length"]):
        rejected = {name: "there is nothing to compute" for name in candidates if name != "reference"}
        candidates = ("reference",)
    for name in candidates:
        reason = refusal(name, op, known)
        if reason is None:
            for other in BACKENDS:
                if other != name and other not in rejected:
                    rejected[other] = refusal(other, op, known) or (
                        f"comes after {name}" if backend == "auto" else f"backend={backend!r} was asked for")
            module = module_of(name)
            kernel = getattr(module, "kernel", None)
            return Explanation(op, name, kernel(op, **known) if kernel else f"shedder.ops.{name}.{op}",
                               known, rejected)
        rejected[name] = reason
    raise ValueError(f"backend={backend!r} cannot run {op}: {rejected[backend]}")


@torch.compiler.assume_constant_result
def decide_or_compose(op: str, parts: str, backend: str, facts: Facts) -> Explanation:
    """The decision for an op that other ops compose: backend "composed" where none has it in one kernel."""
    if backend in BACKENDS and not hasattr(module_of(backend), op):
        return Explanation(op, "composed", parts, dict(facts), {backend: f"the {backend} backend has no {op}"})
    decision = decide(op, backend, facts)
    if backend != "auto" or decision.backend != "reference":
        return decision
    return Explanation(op, "composed", parts, decision.facts,
                       {**decision.rejected, "reference": "its parts may have faster backends"})


@lru_cache(maxsize=8192)
def choose(op: str, backend: str, facts: Facts) -> Callable[..., Any]:
    """The function that runs this call."""
    return getattr(module_of(decide(op, backend, facts).backend), op)
