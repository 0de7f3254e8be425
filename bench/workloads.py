"""The shapes that matter, once: tests, benchmarks and the tables of the README read them here.

A workload names an op, its shape, and the clock it is judged by. `table` says why it is here:

must     the targets: a speed-up over the peer that a release has to reach (`must`) and hopes for (`aim`)
base     shapes without a target that tables show beside them
sweep    one axis cut step by step, for the contract that removal pays; `dense` names where it starts
random   seeded shapes nobody chose
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

SUITES = {
    "selective_scan": "scan", "mamba1_inner": "scan",
    "ssd": "ssd", "mamba2_inner": "ssd", "removed_ssm": "ssd",
    "conv1d": "conv", "conv1d_update": "conv",
    "gated_rmsnorm": "norm",
    "state_update": "decode", "step_mixer": "decode",
    "prefill": "model", "decode": "model",
}
TABLES = ("must", "base", "sweep", "random")
RANDOM_SHAPES = 60                                      # of each op that has some
TUNED_OPS = ("ssd", "mamba2_inner")                     # whose peer autotunes


@dataclass(frozen=True)
class Workload:
    op: str
    shape: dict[str, Any] = field(hash=False)
    layout: str = ""                                    # order of the axes of the main tensor in memory
    clock: str = "gpu"                                  # gpu or wall
    dtype: str = "bf16"
    state_dtype: str | None = None                      # of a state that is an input
    dispatch: str = "auto"                              # or the backend that is forced
    table: str = "must"
    must: float | None = None                           # speed-up over the peer
    aim: float | None = None
    target: str = ""                                    # where a target is not a speed-up: in words
    dense: dict[str, Any] | None = field(default=None, hash=False)
    peer: bool = True                                   # whether the peer is measured too

    @property
    def suite(self) -> str:
        return SUITES[self.op]

    @property
    def name(self) -> str:
        """What a test id shows: ssd-B8-L2048-H61-P64-N128-G1-gpu."""
        def value(v: Any) -> str:
            return "_".join(map(str, v)) if isinstance(v, (list, tuple)) else str(v)

        parts = [self.op, *(f"{key}{value(v)}" for key, v in self.shape.items())]
        parts += [part for part in (self.layout, self.state_dtype and f"state_{self.state_dtype}") if part]
        if self.dtype != "bf16":
            parts.append(self.dtype)
        if self.dispatch != "auto":
            parts.append(self.dispatch)
        return "-".join([*parts, self.clock])


def _scan(B: int = 8, D: int = 5120, L: int = 2048, N: int = 16) -> dict[str, Any]:
    return {"B": B, "D": D, "L": L, "N": N}


def _ssd(B: int = 8, L: int = 2048, H: int = 80, P: int = 64, N: int = 128, G: int = 1) -> dict[str, Any]:
    return {"B": B, "L": L, "H": H, "P": P, "N": N, "G": G}


def _cut(shape: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any] | None:
    return None if shape == dense else dense


RAGGED_75 = {"B": 8, "L": 2048, "H": 75, "P": 64, "N": 128, "G": 8, "groups": [10, 10, 10, 10, 10, 10, 10, 5]}


def _must_scan() -> Iterable[Workload]:
    def fwd(must: float, aim: float, **keywords: Any) -> Workload:
        shape = _scan(**{key: v for key, v in keywords.items() if key in "BDLN"})
        rest = {key: v for key, v in keywords.items() if key not in "BDLN"}
        is_cut = shape["B"] == 8 and shape != _scan() and "clock" not in rest
        return Workload("selective_scan", shape, "BDL", must=must, aim=aim, dense=_scan() if is_cut else None, **rest)

    yield fwd(2.5, 3.5)
    yield fwd(4, 5.5, L=2000)
    yield fwd(1.6, 2.8, B=1)
    yield fwd(1.4, 2, B=1, L=512)
    yield fwd(4, 6, B=1, L=600)
    yield fwd(2.3, 3.5, B=1, L=16384)
    yield fwd(2.3, 3.5, B=32, L=512)
    yield fwd(2.3, 3.5, N=8)
    yield fwd(2.3, 3.5, N=4)
    yield fwd(2.3, 3.5, D=3571)
    yield fwd(2.3, 3.5, N=11)
    yield fwd(2.3, 3.5, D=2555, N=7)
    yield fwd(1.5, 2.5, B=1, L=512, clock="wall")
    yield fwd(1.2, 2.5, dispatch="triton")
    yield fwd(2, 4, L=2000, dispatch="triton")
    yield Workload("mamba1_inner", _scan(), "BDL", must=1.5, aim=1.8)
    yield Workload("mamba1_inner", _scan(B=1, L=512), "BDL", clock="wall", must=1.3, aim=2)


def _must_ssd() -> Iterable[Workload]:
    def fwd(must: float | None, aim: float | None, target: str = "", clock: str = "gpu", dispatch: str = "auto",
            op: str = "ssd", **axes: Any) -> Workload:
        is_cut = _ssd(**axes) != _ssd() and not {"B", "L", "G"} & set(axes)
        return Workload(op, _ssd(**axes), "BLHP" if op == "ssd" else "BLD", clock=clock, dispatch=dispatch,
                        must=must, aim=aim, target=target, dense=_ssd() if is_cut else None)

    not_slower = "not slower than our dense (3 % for noise)"
    yield fwd(2, 4.5)
    for heads in (61, 41, 40):
        yield fwd(2, 4.5, H=heads)
    for headdim, states in ((60, 100), (61, 101), (56, 104), (64, 100)):
        yield fwd(3, 6, not_slower, P=headdim, N=states)
    for headdim, states in ((48, 96), (48, 128), (32, 128), (64, 64)):
        yield fwd(2, 4.5, P=headdim, N=states)
    yield fwd(2, 4.5, G=8)
    yield Workload("ssd", RAGGED_75, "BLHP", target="within 10 % of our 75 heads of one group", dense=_ssd(G=8))
    yield fwd(None, None, "the one-group partner of 75 ragged heads", H=75)
    for batch, length in ((1, 2048), (1, 512), (1, 16384), (32, 512)):
        yield fwd(1.8, 4, B=batch, L=length)
    yield fwd(7, 15, B=1, clock="wall")
    yield fwd(1.2, 2.5, dispatch="triton")
    yield fwd(2, 4, P=60, N=100, dispatch="triton")
    yield fwd(2, 4.5, op="mamba2_inner")
    yield fwd(2, 4.5, op="mamba2_inner", H=61)
    yield fwd(2, 4.5, op="mamba2_inner", H=40)
    yield fwd(2, 4.5, op="mamba2_inner", P=60, N=100)
    yield fwd(None, None, not_slower, op="mamba2_inner", P=61, N=101)
    yield fwd(8, 15, op="mamba2_inner", B=1, L=512, clock="wall")
    yield fwd(8, 15, op="mamba2_inner", B=1, clock="wall")
    yield Workload("removed_ssm", {"B": 8, "L": 2048, "H": 80, "P": 64}, "BLD", must=None,
                   target="80 % of copy on its bytes, aim 90 %")


def _must_conv() -> Iterable[Workload]:
    for layout in ("BDL", "BLD"):
        yield Workload("conv1d", {"B": 8, "L": 2048, "channels": 5376, "width": 4}, layout, must=1,
                       target="aim: 90 % of copy")
        yield Workload("conv1d", {"B": 8, "L": 2048, "channels": 5373, "width": 4}, layout,
                       target="at most 1.1 times our time at 5376 channels",
                       dense={"B": 8, "L": 2048, "channels": 5376, "width": 4})


def _must_norm() -> Iterable[Workload]:
    for width, segments in ((5120, [5120]), (3905, [1301, 1302, 1302])):
        yield Workload("gated_rmsnorm", {"rows": 16384, "width": width, "segments": segments}, "rows",
                       target="85 % of copy, aim 92 %")


def _must_decode() -> Iterable[Workload]:
    yield Workload("state_update", {"B": 128, "D": 5120, "N": 16}, "BD", state_dtype="bf16", must=1,
                   target="75 % of a same-sized rotated copy, aim 90 %")
    yield Workload("state_update", {"B": 1, "D": 5120, "N": 16}, "BD", state_dtype="bf16", clock="wall", must=3, aim=8)


def _base() -> Iterable[Workload]:
    for channels in (5120, 4160, 2816):
        yield Workload("conv1d", {"B": 1, "L": 2048, "channels": channels, "width": 4}, "BLD", table="base")
    for batch in (1, 128):
        yield Workload("conv1d_update", {"B": batch, "channels": 5376, "width": 4}, "BD", table="base")
    for batch in (1, 16, 64, 128, 512):
        shape = {"B": batch, "H": 80, "P": 64, "N": 128, "G": 1}
        yield Workload("state_update", shape, "BHP", state_dtype="bf16", table="base")
    dense = {"B": 128, "H": 80, "P": 64, "N": 128, "G": 1}
    yield Workload("state_update", dense, "BHP", state_dtype="fp32", table="base")
    for cut in ({"H": 40}, {"P": 48}, {"N": 96}, {"N": 64}, {"P": 60, "N": 100}, {"P": 61, "N": 101}):
        yield Workload("state_update", {**dense, **cut}, "BHP", state_dtype="bf16", table="base", dense=dense)
    for segments in ([5120], [640] * 8):
        yield Workload("gated_rmsnorm", {"rows": 512, "width": 5120, "segments": segments}, "rows", table="base")


# P, N at which sweeps measure the SSD's peer: it compiles and times some forty variants for each new pair.
SWEPT_PEER_SIZES = {(64, 128), (60, 128), (48, 128), (32, 128), (64, 101), (64, 100), (64, 64), (64, 32), (60, 100),
                    (48, 96), (56, 104), (61, 101)}


def _sweeps() -> Iterable[Workload]:
    def scan(**axes: int) -> Workload:
        return Workload("selective_scan", _scan(**axes), "BDL", table="sweep", dense=_cut(_scan(**axes), _scan()))

    def ssd(op: str = "ssd", **axes: int) -> Workload:
        shape = _ssd(**axes)
        return Workload(op, shape, "BLHP" if op == "ssd" else "BLD", table="sweep", dense=_cut(shape, _ssd()),
                        peer=(shape["P"], shape["N"]) in SWEPT_PEER_SIZES)

    for states in (16, 14, 12, 11, 8, 5, 4, 2):
        yield scan(N=states)
    for channels in (4487, 3571, 2555, 1913, 1280, 871, 640):
        yield scan(D=channels)
    for length in (2047, 2000, 1000, 63):
        yield scan(L=length)
    for heads in (80, 75, 61, 60, 41, 40, 20, 10, 5):
        yield ssd(H=heads)
    for headdim in (61, 60, 56, 48, 40, 32, 16):
        yield ssd(P=headdim)
    for states in (120, 104, 101, 100, 96, 64, 48, 32, 16):
        yield ssd(N=states)
    for heads, headdim, states in ((61, 60, 100), (60, 48, 96), (41, 56, 104), (40, 32, 64), (20, 61, 101)):
        yield ssd(H=heads, P=headdim, N=states)
    for cut in ({}, {"H": 61}, {"H": 40}, {"H": 20}, {"N": 64}, {"P": 48, "N": 96}, {"P": 61, "N": 101}):
        yield ssd("mamba2_inner", **cut)


def random_workloads(op: str, count: int = RANDOM_SHAPES, seed: int = 20261122) -> list[Workload]:
    """Seeded shapes for one op, of a size a model could have: no multiples are favoured.

    Those of the SSD share five P, N: two in multiples of 16, what its peer is made for, and three drawn like everything
    else. A third of them are measured with the peer, which is tuned for each P, N and compiled for each way in which
    sizes and strides divide by 16.
    """
    draw = random.Random(f"{seed}-{op}")
    pairs = random.Random(seed)
    sizes = [(16 * pairs.randint(2, 4), 16 * pairs.randint(2, 8)) for _ in range(2)] + [
        (pairs.randint(24, 64), pairs.randint(24, 128)) for _ in range(3)]
    rows = []
    for index in range(count):
        batch, length = draw.choice([(1, 512), (1, 2048), (2, 1024), (4, 2048), (8, 1024), (8, 2048), (16, 512)])
        length -= draw.choice([0, 0, 1, draw.randrange(length // 2)])
        if op == "selective_scan":
            shape, layout = _scan(batch, draw.randint(640, 5120), length, draw.randint(2, 16)), "BDL"
        elif op in ("ssd", "mamba2_inner"):
            shape = _ssd(batch, length, draw.randint(5, 80), *sizes[index % len(sizes)])
            layout = "BLHP" if op == "ssd" else "BLD"
        elif op == "conv1d":
            shape, layout = {"B": batch, "L": length, "channels": draw.randint(640, 5376), "width": 4}, "BLD"
        elif op == "gated_rmsnorm":
            width = draw.randint(640, 5120)
            shape, layout = {"rows": batch * length, "width": width, "segments": [width]}, "rows"
        elif op == "state_update":
            shape = {"B": draw.choice([1, 8, 32, 128]), "H": draw.randint(5, 80), "P": draw.randint(16, 64),
                     "N": draw.randint(16, 128), "G": 1}
            layout = "BHP"
        else:
            raise ValueError(f"op is {op!r}; accepted: an op with a forward or a step of its own")
        rows.append(Workload(op, shape, layout, table="random", peer=op not in TUNED_OPS or index % 3 == 0,
                             state_dtype="bf16" if op == "state_update" else None))
    return rows


RANDOM_OPS = ("selective_scan", "ssd", "mamba2_inner", "conv1d", "gated_rmsnorm", "state_update")
WORKLOADS: tuple[Workload, ...] = (*_must_scan(), *_must_ssd(), *_must_conv(), *_must_norm(), *_must_decode(),
                                   *_base(), *_sweeps(),
                                   *(row for op in RANDOM_OPS for row in random_workloads(op)))


def workloads(*ops: str, tables: Iterable[str] = TABLES, random_shapes: int = RANDOM_SHAPES) -> list[Workload]:
    """The rows of some ops (all when none is named), in the order they are measured: targets first.

    random_shapes: how many of each op's random shapes, the first ones.
    """
    drawn = {id(row): index for op in RANDOM_OPS
             for index, row in enumerate(row for row in WORKLOADS if row.table == "random" and row.op == op)}
    chosen = [row for table in tables for row in WORKLOADS
              if row.table == table and (not ops or row.op in ops) and drawn.get(id(row), 0) < random_shapes]
    unique = {row.name: row for row in reversed(chosen)}          # a sweep may pass through a target's shape
    return [row for row in chosen if unique[row.name] is row]
