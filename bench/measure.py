"""One row of results: a workload measured on our side and on the peer's, in the same run, checked first."""

from __future__ import annotations

import datetime
import functools
import gc
import importlib
import math
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import torch

from bench import cases, results
from bench.workloads import Workload
from shedder import latency, limits

TOO_SLOW_S = 1.0        # one call of ours: a slower one is checked and timed once
MAX_SETS = 64           # of rotated inputs
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}

Row = dict[str, Any]


def version(module: str) -> str | None:
    """The version of a package that imports, or None."""
    try:
        found = importlib.import_module(module)
    except Exception:                                   # a broken wheel raises more than ImportError
        return None
    if hasattr(found, "__version__"):
        return str(found.__version__)
    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        return "unknown"


def _clock_mhz() -> float:
    """The highest clock of the SMs: what a kernel runs at lies below, so that a floor by it is one."""
    try:
        answer = subprocess.run(["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "-i",
                                 str(torch.cuda.current_device())], capture_output=True, text=True, timeout=20)
        return float(answer.stdout.strip())
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return 0.0


def run_facts() -> dict[str, Any]:
    """This machine, the code and the versions, as the results store them."""
    modules = ("torch", "triton", "mamba_ssm", "causal_conv1d", "shedder")
    return {"gpu": torch.cuda.get_device_name(), "clock_mhz": _clock_mhz(),
            "copy_tb_s": round(latency.copy_rate() / 1e12, 3), "commit": results.commit(),
            "source_hash": results.source_hash(),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "versions": {name: found for name in modules if (found := version(name)) is not None}}


@dataclass
class Side:
    """What one side of a comparison came to: a time, or why there is none."""

    call: Callable[[cases.Inputs], cases.Outputs] | None
    seconds: float | None = None
    error: float | None = None
    note: str = ""

    def drop(self, note: str) -> None:
        self.call, self.seconds, self.note = None, None, note


def message(error: BaseException) -> str:
    """The kind of an exception and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def tune_for(milliseconds: int) -> None:
    """How long Triton's tuner, which the peers use, times each variant of a kernel."""
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    timer = functools.partial(do_bench, warmup=milliseconds / 4, rep=milliseconds)
    Autotuner.do_bench = property(lambda self: timer)   # type: ignore[assignment, method-assign]


def _first_call(side: Side, inputs: cases.Inputs, device: str) -> float:
    """Seconds of the first call, compilation and tuning included; a side that raises is dropped."""
    if side.call is None:
        return 0.0
    started = time.perf_counter()
    try:
        side.call(inputs)
        latency.synchronize(device)
    except Exception as error:
        side.drop(message(error))
    return time.perf_counter() - started


def _check(workload: Workload, sides: list[Side], device: str) -> None:
    """Each side's error against the float64 recurrence; a side that fails loses its speed."""
    if all(side.call is None for side in sides):
        return
    small = cases.check_workload(workload)
    inputs = cases.make_inputs(small, device, seed=1)
    expected = cases.OPS[workload.op].reference(cases.clone(inputs))
    for side in sides:
        if side.call is None:
            continue
        try:
            side.error = cases.error(side.call(cases.clone(inputs)), expected)
        except Exception as error:
            side.drop(f"check: {message(error)}")
            continue
        if not side.error <= cases.tolerance(workload):
            side.drop(f"refused: error {side.error:.1e} against float64")


def _rotated(workload: Workload, device: str) -> list[cases.Inputs]:
    """Sets of inputs that together exceed the L2 cache three times over."""
    first = cases.make_inputs(workload, device)
    copies = math.ceil(3 * latency.l2_bytes(device) / max(cases.input_bytes(first), 1))
    return [first] + [cases.clone(first) for _ in range(min(copies, MAX_SETS) - 1)]


def _time(workload: Workload, sides: list[Side], sets: list[cases.Inputs], budget_s: float) -> str:
    """Fill in the seconds of the sides that still stand; how the gpu clock was read."""
    standing = [side for side in sides if side.call is not None]
    if not standing:
        return ""
    for side in standing:
        seconds = latency.step_clock(lambda call=side.call: call(sets[0]), "cuda", repeats=1)  # type: ignore[misc]
        if seconds > TOO_SLOW_S:
            side.seconds, side.note = seconds, "one synchronised call: too slow to repeat"
    standing = [side for side in standing if side.seconds is None]
    if not standing:
        return ""
    if workload.clock == "wall":
        rounds: list[list[float]] = [[] for _ in standing]
        for _ in range(3):
            for seen, side in zip(rounds, standing, strict=True):
                seen.append(latency.wall_clock(lambda call=side.call: call(sets[0]), "cuda",  # type: ignore[misc]
                                               budget_s=max(1.0, budget_s)))
        for side, seen in zip(standing, rounds, strict=True):
            side.seconds = statistics.median(seen)
        return "wall"
    calls = [[lambda call=side.call, inputs=inputs: call(inputs) for inputs in sets] for side in standing]
    times, how = latency.gpu_clock(calls, budget_s=budget_s)  # type: ignore[arg-type]
    for side, one in zip(standing, times, strict=True):
        side.seconds = one
    return how


def taken(op: cases.Op, inputs: cases.Inputs, backend: str | None) -> tuple[str, str]:
    """(backends, kernels) that our call takes, found without running it."""
    from shedder.ops import explain
    assert op.ours is not None
    decisions = explain(op.ours, inputs, backend=backend)
    return ("+".join(dict.fromkeys(one.backend for one in decisions)),
            "+".join(dict.fromkeys(one.kernel for one in decisions)))


@torch.no_grad()
def measure_row(workload: Workload, on: limits.Machine | None, *, ours: bool = True, peer: bool = True,
            dense_us: float | None = None, budget_s: float = 0.3, device: str = "cuda") -> Row:
    """The result row of one workload; times in it are None where a side raised, failed its check or was left out."""
    op = cases.OPS[workload.op]
    forced = None if workload.dispatch == "auto" else workload.dispatch
    mine = Side(None if op.ours is None or not ours else lambda t: op.ours(t, forced))  # type: ignore[misc]
    theirs = Side(op.peer if peer else None)
    if op.ours is None:
        mine.note = "no public op of ours"
    if op.peer is None:
        theirs.note = "no peer has it"
    elif not peer:
        theirs.note = "not measured"
    backend = kernel = ""
    sets = _rotated(workload, device)
    if mine.call is not None:
        try:
            backend, kernel = taken(op, sets[0], forced)
            if "reference" in backend:
                mine.drop("no GPU kernel of ours: the reference would run")
        except Exception as error:
            mine.drop(message(error))
    _first_call(theirs, sets[0], device)
    if _first_call(mine, sets[0], device) > 30:
        mine.drop("first call took more than 30 s")
    _check(workload, [mine, theirs], device)
    how = _time(workload, [mine, theirs], sets, budget_s)
    del sets
    gc.collect()

    work = limits.work(workload.op, workload.shape, BYTES[workload.dtype],
                       BYTES[workload.state_dtype or workload.dtype])
    notes = [f"ours: {mine.note}" if mine.note else "", f"peer: {theirs.note}" if theirs.note else ""]
    if how.startswith("profiler"):
        notes.append(f"kernel times by the {how[:120]}")
    if "copy" in workload.target and workload.clock == "gpu":
        notes.append(f"copy of its bytes {latency.copy_seconds(work.bytes) * 1e6:.2f} us")
    return {"op": workload.op, "pass": op.pass_, "shape": workload.shape, "layout": workload.layout,
            "dtype": workload.dtype, "state_dtype": workload.state_dtype, "model": None, "plan": None,
            "clock": workload.clock, "backend": backend, "algorithm": kernel,
            "dispatch": workload.dispatch if forced is None else f"forced:{forced}",
            "ours_us": microseconds(mine.seconds), "dense_us": dense_us,
            "peer": op.peer_name if op.peer else None, "peer_us": microseconds(theirs.seconds),
            "bytes": int(work.bytes), "floor_us": microseconds(work.floor(on)) if on else None,
            "error": mine.error, "peer_error": theirs.error, "note": "; ".join(filter(None, notes))}


@torch.no_grad()
def dense_us(workload: Workload, known: dict[str, float | None], budget_s: float) -> float | None:
    """Our own time for the dense shape of a workload in this run, measured when a row first asks for it."""
    op = cases.OPS[workload.op]
    if workload.dense is None or op.ours is None:
        return None
    dense = replace(workload, shape=workload.dense, dense=None)
    if dense.name not in known:
        row = measure_row(dense, None, peer=False, budget_s=budget_s)
        known[dense.name] = row["ours_us"]
    return known[dense.name]


def microseconds(seconds: float | None) -> float | None:
    """Four significant digits: more would be noise."""
    return None if seconds is None else float(f"{seconds * 1e6:.4g}")
