"""Speed of light: the bytes, matrix flops and exponentials each op cannot avoid, from its shape.

An op's floor on a GPU is the largest of three times: compulsory memory traffic at a measured
copy rate, matrix products on the tensor cores, exponentials on the special-function units
(MUFU). *Work left* compares a compacted layer with the dense one by the sum of the three, so
that removing a part that is not the bottleneck still counts.

Shapes are dictionaries with the keys of the benchmark results: B, D, L, H, P, N, G, `groups`
(heads of each group where ragged), `channels` and `width` (conv), `rows`, `width`, `segments` (norm).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shedder.layout import LayerLayout, RemovedBlock, RemovedSSM, ScanLayout, SSDLayout

Shape = Mapping[str, Any]

CHUNK = 128             # Q: tokens of one matrix-form block; larger chunks add flops, smaller ones add states
SOFTPLUS_EXPS = 2       # lg2(1 + ex2(x))
SILU_EXPS = 1           # x/2 (1 + tanh(x/2))
DT_BYTES = 4            # dt is counted as fp32, what a kernel needs after bias and softplus
PARAMETER_BYTES = 4     # A, D and the biases are fp32


@dataclass(frozen=True)
class Machine:
    """The three rates that bound these ops on one GPU."""

    name: str
    bytes_s: float                                      # copy, read and written bytes both counted
    mma_s: float                                        # bf16 matrix flops, measured on a large product
    exp_s: float                                        # MUFU results: SMs x 16 per clock x clock


# Streaming multiprocessors, clock in MHz under load, flops per second of an 8192^3 bf16 product, copied
# bytes per second. H200: all measured. H100: the product measured, the copy rate an estimate.
_GPUS = {
    "H200": (132, 1980, 790e12, 4.3e12),
    "H100": (132, 1980, 778e12, 2.9e12),
}


def machine(gpu: str, copy_tb_s: float | None = None, clock_mhz: float | None = None) -> Machine:
    """The rates of a GPU by its name, with the copy rate and the clock of a run where they are known."""
    for name, (sms, default_clock, mma_s, bytes_s) in _GPUS.items():
        if name in gpu:
            clock = (clock_mhz or default_clock) * 1e6
            return Machine(gpu, copy_tb_s * 1e12 if copy_tb_s else bytes_s, mma_s, sms * 16 * clock)
    raise ValueError(f"gpu is {gpu!r}; accepted: a name that contains one of {sorted(_GPUS)}")


H200 = machine("NVIDIA H200")


@dataclass(frozen=True)
class Work:
    """What one call must do."""

    bytes: float = 0.0
    flops: float = 0.0                                  # of matrix products only
    exps: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops, self.exps + other.exps)

    def t_bytes(self, on: Machine) -> float:
        return self.bytes / on.bytes_s

    def t_mma(self, on: Machine) -> float:
        return self.flops / on.mma_s

    def t_exp(self, on: Machine) -> float:
        return self.exps / on.exp_s

    def floor(self, on: Machine) -> float:
        """Seconds that no kernel can beat: the three units overlap perfectly."""
        return max(self.t_bytes(on), self.t_mma(on), self.t_exp(on))

    def total(self, on: Machine) -> float:
        """Seconds if the three units took turns: the yardstick of work left."""
        return self.t_bytes(on) + self.t_mma(on) + self.t_exp(on)


def _groups(shape: Shape) -> int:
    return len(shape["groups"]) if "groups" in shape else shape.get("G", 1)


def selective_scan(shape: Shape, element: int = 2, state: int = 4) -> Work:
    """u, delta, z in and y out; B and C once; softplus, silu, and one exp for each state of each element."""
    batch, channels, length, states = (shape[key] for key in "BDLN")
    elements = batch * channels * length
    return Work(bytes=4 * elements * element + 2 * batch * _groups(shape) * states * length * element
                + channels * (states + 2) * PARAMETER_BYTES,
                exps=elements * (states + SOFTPLUS_EXPS + SILU_EXPS))


def _ssd_products(shape: Shape) -> Work:
    """C B^T once per group and chunk, its causal half times x, the chunk state, and C times the state."""
    tokens = shape["B"] * shape["L"]
    heads, headdim, states = (shape[key] for key in "HPN")
    chunk = min(CHUNK, shape["L"])
    return Work(flops=tokens * (_groups(shape) * states * chunk + heads * (headdim * chunk + 4 * headdim * states)),
                exps=tokens * heads * (chunk / 2 + SOFTPLUS_EXPS))


def ssd(shape: Shape, element: int = 2, state: int = 4) -> Work:
    """x in and y out, B, C, dt; no chunk states in memory."""
    tokens = shape["B"] * shape["L"]
    heads, headdim, states = (shape[key] for key in "HPN")
    return _ssd_products(shape) + Work(
        bytes=tokens * (2 * heads * headdim * element + 2 * _groups(shape) * states * element + heads * DT_BYTES))


def mamba2_inner(shape: Shape, element: int = 2, state: int = 4) -> Work:
    """One pass over in_proj's output and one over the result: conv, SSD, gate and norm stay on chip."""
    tokens = shape["B"] * shape["L"]
    heads, headdim, states = (shape[key] for key in "HPN")
    inner, conv = heads * headdim, heads * headdim + 2 * _groups(shape) * states
    return _ssd_products(shape) + Work(bytes=tokens * element * (inner + conv + heads + inner),
                                       exps=tokens * SILU_EXPS * (conv + inner))


def removed_ssm(shape: Shape, element: int = 2, state: int = 4) -> Work:
    """x, z in and y out: conv, gain, gate and norm without a state."""
    elements = shape["B"] * shape["L"] * shape["H"] * shape["P"]
    return Work(bytes=3 * elements * element, exps=2 * SILU_EXPS * elements)


def mamba1_inner(shape: Shape, element: int = 2, state: int = 4) -> Work:
    """conv, x_proj, dt_proj, scan and out_proj: xz in, d_model out, weights once; the products count as flops.

    d_model is D/2 and dt_rank R is d_model/16, as trained, unless the shape gives them.
    """
    batch, channels, length, states = (shape[key] for key in "BDLN")
    d_model = shape.get("d_model", channels // 2)
    rank = shape.get("R", math.ceil(d_model / 16))
    tokens = batch * length
    weights = channels * (rank + 2 * states) + rank * channels + channels * d_model
    scan = selective_scan(shape, element)
    return Work(bytes=tokens * element * (2 * channels + d_model) + weights * element,
                flops=2 * tokens * weights, exps=scan.exps + tokens * channels * SILU_EXPS)


def conv1d(shape: Shape, element: int = 2, state: int = 4) -> Work:
    elements = shape["B"] * shape["channels"] * shape["L"]
    return Work(bytes=2 * elements * element, exps=SILU_EXPS * elements)


def conv1d_update(shape: Shape, element: int = 2, state: int = 4) -> Work:
    """x in, y out, the window read and written."""
    elements = shape["B"] * shape["channels"]
    return Work(bytes=elements * (2 * element + 2 * element * (shape.get("width", 4) - 1)), exps=SILU_EXPS * elements)


def gated_rmsnorm(shape: Shape, element: int = 2, state: int = 4) -> Work:
    elements = shape["rows"] * shape["width"]
    return Work(bytes=3 * elements * element, exps=SILU_EXPS * elements)


def _state_shape(shape: Shape) -> tuple[int, int, bool]:
    """(channels, states, whether a head's channels share one decay) of either family."""
    return (shape["D"], shape["N"], False) if "D" in shape else (shape["H"] * shape["P"], shape["N"], True)


def state_update(shape: Shape, element: int = 2, state: int = 4) -> Work:
    """The state read and written; x, dt, B, C in and y out; Mamba-1 also gates here, so it reads z."""
    channels, states, tied = _state_shape(shape)
    batch = shape["B"]
    steps = shape["H"] if tied else channels             # how many dt there are
    parameters = 3 * steps if tied else channels * (states + 2)
    rows = (2 if tied else 3) * channels + steps + 2 * _groups(shape) * states
    return Work(bytes=batch * (2 * channels * states * state + rows * element) + parameters * PARAMETER_BYTES,
                exps=batch * steps * (SOFTPLUS_EXPS + (1 if tied else states + SILU_EXPS)))


def step_mixer(shape: Shape, element: int = 2, state: int = 4) -> Work:
    """Conv step, state step and gate in one launch: the conv's output is never written."""
    channels, states, tied = _state_shape(shape)
    conv_channels = channels + (2 * _groups(shape) * states if tied else 0)
    conv = conv1d_update({"B": shape["B"], "channels": conv_channels, "width": shape.get("width", 4)}, element)
    kept_on_chip = 2 * shape["B"] * conv_channels * element
    return state_update(shape, element, state) + conv + Work(bytes=-kept_on_chip)


OPS: dict[str, Callable[..., Work]] = {
    op.__name__: op for op in (selective_scan, mamba1_inner, ssd, mamba2_inner, removed_ssm, state_update, step_mixer,
                               conv1d, conv1d_update, gated_rmsnorm)}


def work(op: str, shape: Shape, element: int = 2, state: int = 4) -> Work:
    """The work of one call of `op`; element and state are bytes of an activation and of a state value."""
    if op not in OPS:
        raise ValueError(f"op is {op!r}; accepted: one of {sorted(OPS)}")
    return OPS[op](shape, element, state)


def work_left(op: str, small: Shape, dense: Shape, on: Machine, element: int = 2, state: int = 4) -> float:
    """The share of the dense call's work that the smaller call still does."""
    return work(op, small, element, state).total(on) / work(op, dense, element, state).total(on)


def mlp_gate(tokens: int, channels: int, element: int = 2) -> Work:
    """silu(gate) times value, of the channels beside an SSM (d_ssm < d_inner)."""
    return Work(bytes=3 * tokens * channels * element, exps=SILU_EXPS * tokens * channels)


def layer_work(layout: LayerLayout, batch: int, length: int, element: int = 2, state: int = 4) -> Work:
    """The work of one layer's mixer, projections excluded: `length` tokens of prefill, or a decode step when 1."""
    if isinstance(layout, RemovedBlock):
        return Work()
    shape: dict[str, Any] = {"B": batch, "L": length, "width": layout.conv_width}
    if isinstance(layout, RemovedSSM):
        beside = mlp_gate(batch * length, layout.mlp_channels, element)
        return beside + removed_ssm(shape | {"H": layout.nheads, "P": layout.headdim}, element, state)
    if isinstance(layout, ScanLayout):
        shape |= {"D": layout.d_inner, "N": layout.dstate, "G": layout.ngroups, "channels": layout.conv_channels}
        if length == 1:
            return step_mixer(shape, element, state)
        return conv1d(shape, element) + selective_scan(shape, element)
    assert isinstance(layout, SSDLayout)
    shape |= {"H": layout.nheads, "P": layout.headdim, "N": layout.dstate, "G": layout.ngroups}
    inner = step_mixer(shape, element, state) if length == 1 else mamba2_inner(shape, element)
    return inner + mlp_gate(batch * length, layout.mlp_channels, element)
