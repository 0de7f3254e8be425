"""Compile the peers' Triton kernels for the workloads ahead of time, in parallel.

The peers autotune: at each new (headdim, d_state) they compile some forty variants one after the
other, which takes longer than measuring everything. Here each such pair goes to a process of its
own that compiles the variants into Triton's cache without timing them; the benchmark then tunes,
as the peer means it to, from a warm cache.

    python -m bench.warm_peers --jobs 14

With TRITON_CACHE_AUTOTUNING=1 Triton keeps what its tuner found (*.autotune.json in its cache). Set for the benchmark,
it spares the next run the tuning; set here too, only what was found is compiled.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import gc
import itertools
import multiprocessing
import os
import sys
import time
from typing import Any

from bench.workloads import RANDOM_SHAPES, TABLES, TUNED_OPS, Workload, workloads


def first_of_each_key(rows: list[Workload]) -> list[Workload]:
    """One workload for each key that the peer tunes for."""
    keys: dict[Any, Workload] = {}
    for row in rows:
        keys.setdefault((row.shape["P"], row.shape["N"], row.dtype), row)
    return list(keys.values())


def first_of_each_compilation(rows: list[Workload]) -> list[Workload]:
    """One workload for each way in which Triton specialises a variant: what is 1, what divides by 16."""
    keys: dict[Any, Workload] = {}
    for row in rows:
        batch, length, heads = (row.shape[key] for key in "BLH")
        keys.setdefault((row.op, row.shape["P"], row.shape["N"], row.shape["G"], row.dtype, batch == 1, batch % 16 == 0,
                         length % 16 == 0, heads % 16 == 0), row)
    return list(keys.values())


def keeps_tuning() -> bool:
    return os.environ.get("TRITON_CACHE_AUTOTUNING") == "1"


def _compile_only(part: int, parts: int) -> None:
    from triton.runtime.autotuner import Autotuner

    turn = itertools.count()

    def once(call: Any, quantiles: Any = None, **_: Any) -> list[float]:
        if next(turn) % parts != part:
            return [float("inf")] * 3
        call()
        return [1.0] * 3

    Autotuner.do_bench = property(lambda self: once)     # type: ignore[assignment, method-assign]
    for tuner in gc.get_objects():
        if isinstance(tuner, Autotuner):                # this process may have had another part of the same key
            tuner.cache.clear()


def compile_variants(workload: Workload, part: int, parts: int) -> str:
    """Run a workload's peer once with a tuner that compiles every `parts`-th variant and times none."""
    import torch

    from bench import cases

    if not keeps_tuning():
        _compile_only(part, parts)
    started = time.perf_counter()
    peer = cases.OPS[workload.op].peer
    assert peer is not None
    with torch.no_grad():
        peer(cases.make_inputs(workload))
    torch.cuda.synchronize()
    return f"{workload.name} {part + 1}/{parts}: {time.perf_counter() - started:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.warm_peers", description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=8, help="processes, each with a CUDA context (default 8)")
    parser.add_argument("--tables", default="must", help=f"as for pytest bench/: {', '.join(TABLES)}, all")
    parser.add_argument("--random", type=int, default=RANDOM_SHAPES, help="as for pytest bench/")
    options = parser.parse_args()
    tables = TABLES if options.tables == "all" else options.tables.split(",")
    rows = [row for row in workloads(*TUNED_OPS, tables=tables, random_shapes=options.random) if row.peer]
    chosen = first_of_each_compilation(rows) if keeps_tuning() else first_of_each_key(rows)
    parts = 1 if keeps_tuning() else -(-3 * options.jobs // max(1, len(chosen)))     # small pieces end together
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        running = {pool.submit(compile_variants, workload, part, parts): workload
                   for workload in chosen for part in range(parts)}
        for done in concurrent.futures.as_completed(running):
            try:
                print(done.result(), flush=True)
            except Exception as error:                   # the benchmark notes why, for its workload
                print(f"{running[done].name}: {error}", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
