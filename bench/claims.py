"""What is claimed beside speed, measured: accuracy, prefill in pieces, the first output, workspace.

    python -m bench.claims --write claims.json          # on a GPU
    python -m bench.claims claims.json                  # into bench/results/<gpu>/claims.json
    python -m bench.claims                              # where a committed claim does not hold

accuracy        RMS(out - exact) and max|out - exact| over RMS(exact), exact in float64: at most 1.05 times the peer's
pieces          a prefill in four calls that hand the state on: at most 1.05 times one call
first_output    64 layers of 64 shapes, nothing compiled before: 0.5 s on CUDA, 5 s on Triton
workspace       bytes a call allocates at its peak beside its result: at most the peer's

The peers run in their deterministic mode, which takes one variant of each kernel untuned: neither rounding nor
allocations depend on it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import cases, measure, results
from bench.workloads import Workload
from shedder import latency, reference

Row = dict[str, Any]
Inputs = cases.Inputs

SLACK = 1.05
FIRST_OUTPUT_S = {"cuda": 0.5, "triton": 5.0}
LAYERS, PIECES = 64, 4
FIELDS = {
    "accuracy": {"op", "inputs", "shape", "dtype", "backend", "rms", "max", "peer_rms", "peer_max", "note"},
    "pieces": {"op", "shape", "dtype", "backend", "whole_us", "pieces_us", "apart"},
    "first_output": {"family", "backend", "layers", "seconds"},
    "workspace": {"op", "shape", "dtype", "bytes", "peer_bytes", "note"},
}


# ---- accuracy


def scan_workload(dtype: str, B: int = 2, D: int = 256, L: int = 2047, N: int = 16) -> Workload:
    return Workload("selective_scan", {"B": B, "D": D, "L": L, "N": N}, "BDL", dtype=dtype)


def ssd_workload(dtype: str, B: int = 2, L: int = 2047, H: int = 8, P: int = 64, N: int = 128) -> Workload:
    return Workload("ssd", {"B": B, "L": L, "H": H, "P": P, "N": N, "G": 1}, "BLHP", dtype=dtype)


def accuracy_cases(dtype: str) -> Iterator[tuple[str, Workload]]:
    """(kind of inputs, workload)."""
    yield "model-like", scan_workload(dtype)
    yield "model-like", scan_workload(dtype, N=11)
    yield "outlier channels", scan_workload(dtype)
    yield "slow decay", scan_workload(dtype, B=1, D=64, L=65536)
    yield "model-like", ssd_workload(dtype)
    if dtype == "bf16":
        yield "model-like", ssd_workload(dtype, P=61, N=101)
    yield "outlier channels", ssd_workload(dtype)
    yield "slow decay", ssd_workload(dtype, B=1, L=65536, H=4)
    yield "slow decay", ssd_workload(dtype, B=1, L=131072, H=4)
    for kind in ("model-like", "outlier channels"):
        yield kind, Workload("conv1d", {"B": 2, "L": 1000, "channels": 520, "width": 4}, "BLD", dtype=dtype)
        yield kind, Workload("gated_rmsnorm", {"rows": 512, "width": 5120, "segments": [5120]}, "rows", dtype=dtype)
        yield kind, Workload("state_update", {"B": 8, "H": 80, "P": 64, "N": 128, "G": 1}, "BHP", dtype=dtype,
                             state_dtype=dtype)


def inverse_softplus(step: float) -> float:
    return float(torch.tensor(step).double().expm1().log())


def change_inputs(kind: str, op: str, t: Inputs) -> Inputs:
    """Model-like inputs made into another kind, in place."""
    if kind == "slow decay":                            # dt |A| between 1e-4 and 1e-2
        steps, bias = ("delta", "delta_bias") if op == "selective_scan" else ("dt", "dt_bias")
        t[steps].mul_(0.1)
        t[bias].fill_(inverse_softplus(0.01))
        t["A"].uniform_(-4.6, 0.0, generator=torch.Generator(t["A"].device).manual_seed(0)).exp_().neg_()
    elif kind == "outlier channels":
        name, channels = {"selective_scan": ("u", 1), "conv1d": ("x", 1)}.get(op, ("x", -1))
        t[name].movedim(channels, -1)[..., ::61].mul_(100)
    elif kind != "model-like":
        raise ValueError(f"kind is {kind!r}; accepted: model-like, slow decay, outlier channels")
    return t


def exact(op: str, t: Inputs, piece: int = 256) -> tuple[Tensor, ...]:
    """The float64 reference. A recurrence runs over all pieces of the sequence side by side, twice: from states of
    zero, for what each piece adds to the state, and from the states that follow from that.
    """
    if op == "selective_scan":
        u, delta, A, B, C, D, z, bias = (t[name].double() for name in ("u", "delta", "A", "B", "C", "D", "z",
                                                                       "delta_bias"))
        parts, step = _in_pieces([u, delta, B, C, z], 2, piece)

        def scan(state: Tensor | None) -> tuple[Tensor, Tensor]:
            u, delta, B, C, z = parts
            return reference.selective_scan(u, delta, A, B, C, D, z, bias, True, initial_state=state)

        total = reference.softplus(parts[1] + bias[:, None]).sum(-1)[..., None] * A
        y = scan(_states_between(scan(None)[1], total, u.shape[0]))[0]
        return (_joined(y, u.shape[0], 2)[..., :step],)
    if op == "ssd":
        x, dt, A, B, C, D, bias = (t[name].double() for name in ("x", "dt", "A", "B", "C", "D", "dt_bias"))
        parts, step = _in_pieces([x, dt, B, C], 1, piece)

        def ssd(state: Tensor | None) -> tuple[Tensor, Tensor]:
            x, dt, B, C = parts
            return reference.ssd(x, dt, A, B, C, D, dt_bias=bias, dt_softplus=True, initial_states=state)

        total = (reference.softplus(parts[1] + bias).sum(1) * A)[..., None, None]
        y = ssd(_states_between(ssd(None)[1], total, x.shape[0]))[0]
        return (_joined(y, x.shape[0], 1)[:, :step],)
    return cases.OPS[op].reference(cases.clone(t))


def _in_pieces(tensors: list[Tensor], dim: int, piece: int) -> tuple[list[Tensor], int]:
    """Pieces of the sequence as rows of the batch, the last filled up with zeros; and the length."""
    length = tensors[0].shape[dim]
    missing = -length % piece

    def split(t: Tensor) -> Tensor:
        filled = torch.cat([t, t.new_zeros((*t.shape[:dim], missing, *t.shape[dim + 1:]))], dim)
        return filled.unflatten(dim, (-1, piece)).movedim(dim, 1).flatten(0, 1)

    return [split(t) for t in tensors], length


def _joined(t: Tensor, batch: int, dim: int) -> Tensor:
    return t.unflatten(0, (batch, -1)).movedim(1, dim).flatten(dim, dim + 1)


def _states_between(added: Tensor, log_decay: Tensor, batch: int) -> Tensor:
    """The state before each piece, from what each adds to it and how far it lets the state before it decay."""
    added, decay = added.unflatten(0, (batch, -1)), log_decay.exp().unflatten(0, (batch, -1))
    states = [torch.zeros_like(added[:, 0])]
    for index in range(added.shape[1] - 1):
        states.append(decay[:, index] * states[-1] + added[:, index])
    return torch.stack(states, dim=1).flatten(0, 1)


def errors(outputs: Iterable[Tensor], expected: Iterable[Tensor]) -> tuple[float, float]:
    """The largest RMS error and the largest error of any output, over its RMS."""
    worst = [0.0, 0.0]
    for out, want in zip(outputs, expected, strict=True):
        apart, scale = (out.double() - want).abs(), float(want.square().mean().sqrt())
        worst = [max(worst[0], float(apart.square().mean().sqrt()) / scale), max(worst[1], float(apart.max()) / scale)]
    return worst[0], worst[1]


def accuracy_row(kind: str, workload: Workload, device: str = "cuda") -> Row:
    op = cases.OPS[workload.op]
    inputs = change_inputs(kind, workload.op, cases.make_inputs(workload, device, seed=3))
    expected = exact(workload.op, inputs)
    row: Row = {"op": workload.op, "inputs": kind, "shape": workload.shape, "dtype": workload.dtype,
                "backend": measure.taken(op, inputs, None)[0], "peer_rms": None, "peer_max": None, "note": ""}
    assert op.ours is not None and op.peer is not None
    row["rms"], row["max"] = errors(op.ours(cases.clone(inputs), None), expected)
    try:
        row["peer_rms"], row["peer_max"] = errors(op.peer(cases.clone(inputs)), expected)
    except Exception as error:
        row["note"] = f"peer: {measure.message(error)}"
    return row


def accuracy_of(op: str, dtype: str) -> list[Row]:
    with torch.no_grad():
        return [accuracy_row(kind, workload) for kind, workload in accuracy_cases(dtype) if workload.op == op]


def accuracy(jobs: int) -> list[Row]:
    """Processes side by side: what takes time is the peers' compiler."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        parts = [pool.submit(accuracy_of, op, dtype) for dtype in cases.DTYPES
                 for op in dict.fromkeys(workload.op for _, workload in accuracy_cases(dtype))]
        return [row for part in parts for row in part.result()]


# ---- prefill in pieces


def _scan_piece(t: Inputs, first: int, last: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
    from shedder.ops import selective_scan_fn
    u, delta, B, C, z = (t[name][..., first:last] for name in ("u", "delta", "B", "C", "z"))
    return selective_scan_fn(u, delta, t["A"], B, C, t["D"], z, t["delta_bias"], True, True, initial_state=state)


def _ssd_piece(t: Inputs, first: int, last: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
    from shedder.ops import mamba_chunk_scan_combined
    x, dt, B, C = (t[name][:, first:last] for name in ("x", "dt", "B", "C"))
    return mamba_chunk_scan_combined(x, dt, t["A"], B, C, cases.PEER_CHUNK, D=t["D"], dt_bias=t["dt_bias"],
                                     dt_softplus=True, initial_states=state, return_final_states=True)


def prefill(op: str, t: Inputs, length: int, pieces: int) -> list[Tensor]:
    """The outputs of `pieces` calls, each from the state that the one before left."""
    call = _scan_piece if op == "selective_scan" else _ssd_piece
    state, outputs = None, []
    for index in range(pieces):
        y, state = call(t, index * length // pieces, (index + 1) * length // pieces, state)
        outputs.append(y)
    return outputs


@torch.no_grad()
def pieces_row(workload: Workload, budget_s: float = 0.2) -> Row:
    op, length = workload.op, workload.shape["L"]
    t = cases.make_inputs(workload)
    whole, parts = prefill(op, t, length, 1), prefill(op, t, length, PIECES)
    joined = torch.cat(parts, dim=2 if op == "selective_scan" else 1)
    apart = errors([joined], [whole[0].double()])[0]
    del whole, parts, joined
    (one, four), _ = latency.gpu_clock([[lambda: prefill(op, t, length, 1)], [lambda: prefill(op, t, length, PIECES)]],
                                       budget_s=budget_s)
    return {"op": op, "shape": workload.shape, "dtype": workload.dtype,
            "backend": measure.taken(cases.OPS[op], t, None)[0], "whole_us": round(one * 1e6, 1),
            "pieces_us": round(four * 1e6, 1), "apart": apart}


def pieces() -> list[Row]:
    shapes = ({}, {"B": 1, "L": 16384}, {"B": 1, "L": 65536})
    return [pieces_row(workload("bf16", **{"B": 8, "L": 2048, **wide, **shape}))     # type: ignore[operator]
            for workload, wide in ((scan_workload, {"D": 5120}), (ssd_workload, {"H": 80})) for shape in shapes]


# ---- workspace


@torch.no_grad()
def allocated(call: Callable[[], object]) -> int:
    """Bytes that a call allocates at its peak, its result left out."""
    call()                                              # what stays from a first call is no workspace of the next
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del result
    return peak - before - (after - before)


def workspace() -> list[Row]:
    scan, ssd = {"B": 8, "D": 5120, "L": 2048, "N": 16}, {"B": 8, "L": 2048, "H": 80, "P": 64, "N": 128, "G": 1}
    shapes = (("selective_scan", scan, "BDL"), ("selective_scan", {**scan, "B": 1}, "BDL"),
              ("mamba1_inner", scan, "BDL"), ("ssd", ssd, "BLHP"), ("ssd", {**ssd, "B": 1}, "BLHP"),
              ("ssd", {**ssd, "P": 61, "N": 101}, "BLHP"),
              ("mamba2_inner", ssd, "BLD"), ("mamba2_inner", {**ssd, "H": 61}, "BLD"),
              ("conv1d", {"B": 8, "L": 2048, "channels": 5376, "width": 4}, "BLD"),
              ("gated_rmsnorm", {"rows": 16384, "width": 5120, "segments": [5120]}, "rows"),
              ("state_update", {"B": 128, "H": 80, "P": 64, "N": 128, "G": 1}, "BHP"))
    return [workspace_row(Workload(op, shape, layout, state_dtype="bf16" if op == "state_update" else None))
            for op, shape, layout in shapes]


@torch.no_grad()
def workspace_row(workload: Workload) -> Row:
    op, inputs = cases.OPS[workload.op], cases.make_inputs(workload)
    assert op.ours is not None and op.peer is not None
    row: Row = {"op": workload.op, "shape": workload.shape, "dtype": workload.dtype,
                "bytes": allocated(lambda: op.ours(inputs, None)), "peer_bytes": None, "note": ""}  # type: ignore[misc]
    try:
        row["peer_bytes"] = allocated(lambda: op.peer(inputs))         # type: ignore[misc]
    except Exception as error:
        row["note"] = f"peer: {measure.message(error)}"
    torch.cuda.empty_cache()
    return row


# ---- the first output


def layer_workloads(family: str) -> list[Workload]:
    """64 layers that a search could leave, no two alike."""
    draw = random.Random(family)
    if family == "mamba1":
        return [Workload("selective_scan", {"B": 1, "D": draw.randint(640, 5120), "L": 512, "N": draw.randint(2, 16)},
                         "BDL") for _ in range(LAYERS)]
    return [Workload("mamba2_inner", {"B": 1, "L": 512, "H": draw.randint(5, 80), "P": draw.randint(16, 64),
                                      "N": draw.randint(16, 128), "G": 1}, "BLD") for _ in range(LAYERS)]


@torch.no_grad()
def first_output_here(family: str, backend: str) -> Row:
    """Seconds from the first call of 64 layers to the last output, in this process."""
    import shedder.ops  # noqa: F401
    layers = [(cases.OPS[workload.op].ours, cases.make_inputs(workload)) for workload in layer_workloads(family)]
    conv, conv_inputs = cases.OPS["conv1d"].ours, []
    if family == "mamba1":
        conv_inputs = [cases.make_inputs(Workload("conv1d", {"B": 1, "L": 512, "channels": t["u"].shape[1], "width": 4},
                                                  "BDL")) for _, t in layers]
    (torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")).sum().item()
    forced = None if backend == "cuda" else backend
    started = time.perf_counter()
    for t in conv_inputs:
        conv(t, forced)                                 # type: ignore[misc]
    for ours, t in layers:
        ours(t, forced)                                 # type: ignore[misc]
    torch.cuda.synchronize()
    return {"family": family, "backend": backend, "layers": LAYERS, "seconds": round(time.perf_counter() - started, 3)}


def first_output() -> list[Row]:
    rows = []
    for family in ("mamba1", "mamba2"):
        for backend in FIRST_OUTPUT_S:
            with tempfile.TemporaryDirectory() as cache:
                done = subprocess.run([sys.executable, "-m", "bench.claims", "--first-output", family, backend],
                                      capture_output=True, text=True, env={**os.environ, "TRITON_CACHE_DIR": cache})
            if done.returncode:
                raise RuntimeError(f"first output of {family} on {backend}: {done.stderr[-2000:]}")
            rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
    return rows


# ---- what the figures say


def check(data: dict[str, Any], where: str = "claims") -> None:
    if set(data) != {"run", *FIELDS}:
        raise results.ResultsError(f"{where} has {sorted(data)}; accepted: {sorted({'run', *FIELDS})}")
    if set(data["run"]) != set(results.RUN_FIELDS):
        raise results.ResultsError(f"{where}.run has {sorted(data['run'])}; accepted: {sorted(results.RUN_FIELDS)}")
    for table, fields in FIELDS.items():
        for index, row in enumerate(data[table]):
            if set(row) != fields:
                raise results.ResultsError(f"{where}.{table}[{index}] has {sorted(row)}; accepted: {sorted(fields)}")


def _sizes(row: Row) -> str:
    return " ".join(f"{key}{value}" for key, value in row["shape"].items()) + f" {row['dtype']}"


def failures(data: dict[str, Any]) -> list[str]:
    """Where a claim does not hold, one sentence each."""
    found = []
    for row in data["accuracy"]:
        for name in ("rms", "max"):
            ours, peer = row[name], row[f"peer_{name}"]
            if peer is not None and ours > SLACK * peer:
                found.append(f"{row['op']} {_sizes(row)}, {row['inputs']}: {name} error "
                             f"{ours:.2e}, the peer's {peer:.2e}")
    for row in data["pieces"]:
        if row["pieces_us"] > SLACK * row["whole_us"]:
            found.append(f"{row['op']} {_sizes(row)}: {PIECES} pieces take {row['pieces_us']:g} us, "
                         f"one call {row['whole_us']:g}")
    for row in data["first_output"]:
        if row["seconds"] > FIRST_OUTPUT_S[row["backend"]]:
            found.append(f"{row['family']} on {row['backend']}: the first output of {row['layers']} layers takes "
                         f"{row['seconds']:g} s; {FIRST_OUTPUT_S[row['backend']]:g} s are allowed")
    for row in data["workspace"]:
        if row["peer_bytes"] is not None and row["bytes"] > row["peer_bytes"]:
            found.append(f"{row['op']} {_sizes(row)}: {row['bytes']} bytes of workspace, the peer "
                         f"{row['peer_bytes']}")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.claims", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, help="figures written by --write, to be put into the results")
    parser.add_argument("--write", type=Path, help="measure on this GPU and write the figures here")
    parser.add_argument("--tables", default=",".join(FIELDS), help=f"of {', '.join(FIELDS)} (default all)")
    parser.add_argument("--jobs", type=int, default=8, help="processes for accuracy (default 8)")
    parser.add_argument("--first-output", nargs=2, metavar=("FAMILY", "BACKEND"), help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="where the results live")
    parser.add_argument("--commit", default=None, help="the commit to note where the run does not know it")
    options = parser.parse_args(arguments)
    if options.first_output:
        print(json.dumps(first_output_here(*options.first_output)))
        return 0
    if options.write:
        os.environ["MAMBA_DETERMINISTIC"] = "1"
        measures: dict[str, Callable[[], list[Row]]] = {
            "first_output": first_output, "pieces": pieces, "workspace": workspace,
            "accuracy": lambda: accuracy(options.jobs)}
        data: dict[str, Any] = {"run": measure.run_facts(), **{table: [] for table in FIELDS}}
        for table, rows in measures.items():
            if table in options.tables.split(","):
                started = time.perf_counter()
                data[table] = rows()
                print(f"{table}: {len(data[table])} rows, {time.perf_counter() - started:.0f} s", flush=True)
                results.write_atomically(options.write, json.dumps(data))
        print(*failures(data), sep="\n")
        return 0
    try:
        if options.file:
            data = json.loads(options.file.read_text())
            check(data, str(options.file))
            run = data["run"]
            if run["commit"] == "unknown" and (options.commit or run["source_hash"] == results.source_hash()):
                run["commit"] = options.commit or results.commit()
            target = options.results / results.folder_of(run["gpu"]) / "claims.json"
            results.write_atomically(target, json_text(data))
            print(f"wrote {target}")
        found = []
        for path in sorted(options.results.glob("*/claims.json")):
            found += [f"{path}: {failure}" for failure in failures(load(path))]
    except (results.ResultsError, OSError) as error:
        print(f"bench.claims: {error}", file=sys.stderr)
        return 2
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


def json_text(data: dict[str, Any]) -> str:
    """One row a line, so that a diff shows which figures changed."""
    tables = ",\n".join(f"{json.dumps(table)}: [\n" + ",\n".join("  " + json.dumps(row) for row in data[table]) + "\n]"
                        for table in FIELDS)
    return f'{{"run": {json.dumps(data["run"])},\n{tables}\n}}\n'


def load(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise results.ResultsError(f"{path}: not JSON: {error}") from error
    check(data, str(path))
    return data


if __name__ == "__main__":
    sys.exit(main())
