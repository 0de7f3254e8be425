"""The driver of `pytest bench/`: options, the run's facts, and the `measure` fixture that makes rows.

Every figure is printed as it comes and, with --rows, appended to a file at once, so that a run
that is cut short keeps what it measured.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.workloads import RANDOM_SHAPES, TABLES, Workload, workloads

BENCH = Path(__file__).resolve().parent


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("shedder")
    group.addoption("--tables", default="must", help=f"comma-separated tables of workloads: {', '.join(TABLES)}, all")
    group.addoption("--random", type=int, default=RANDOM_SHAPES, dest="random_shapes",
                    help=f"how many random shapes of each op, the first ones (default {RANDOM_SHAPES}, all)")
    group.addoption("--sides", default="ours,peer", help="what to measure: ours, peer, or both (default)")
    group.addoption("--budget-s", type=float, default=float("inf"),
                    help="seconds a suite may take; workloads that come later are skipped")
    group.addoption("--row-s", type=float, default=0.3,
                    help="seconds of replays per side and workload (default 0.3); a third of it for sweep and random")
    group.addoption("--tune-ms", type=int, default=100,
                    help="milliseconds that the peers' tuner times each variant (default 100, which is Triton's)")
    group.addoption("--rows", type=Path, default=None, help="write the run and each row here as JSON lines, at once")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # The table of pytest-benchmark would show how long a row took to make; our own lines show the figures.
    config.option.benchmark_quiet = True


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if file_path.parent != BENCH or not file_path.match("bench_*.py"):
        return None
    patterns = parent.config.getini("python_files")
    if parent.session.isinitpath(file_path) or any(file_path.match(pattern) for pattern in patterns):
        return None                                     # pytest collects it without us
    return pytest.Module.from_parent(parent, path=file_path)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "workload" in metafunc.fixturenames:
        ops = metafunc.module.OPS
        tables = metafunc.config.getoption("tables")
        chosen = TABLES if tables == "all" else [table for table in TABLES if table in tables.split(",")]
        if not chosen:
            raise pytest.UsageError(f"--tables is {tables!r}; accepted: {', '.join(TABLES)} or all")
        rows = workloads(*ops, tables=chosen, random_shapes=metafunc.config.getoption("random_shapes"))
        metafunc.parametrize("workload", rows, ids=[row.name for row in rows])


# ---- the run


@pytest.fixture(scope="session")
def run(pytestconfig: pytest.Config) -> dict[str, Any]:
    """The facts of this run, as the results store them."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    from bench.measure import run_facts, tune_for
    tune_for(pytestconfig.getoption("tune_ms"))
    facts = run_facts()
    gc.freeze()                                         # what is imported by now need not be looked through each row
    pytestconfig.stash[_RUN] = facts
    _emit(pytestconfig, json.dumps(facts), {"run": facts})
    return facts


_RUN = pytest.StashKey[dict[str, Any]]()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """The run's facts travel in pytest-benchmark's report too; _RUN is empty when everything was skipped."""
    machine_info["run"] = config.stash.get(_RUN, None)


def _emit(config: pytest.Config, line: str, record: dict[str, Any]) -> None:
    """Print a line whatever is captured, and append the record to --rows."""
    capture = config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture is not None else nullcontext():
        print(f"\n{line}", end="", flush=True)
    path = config.getoption("rows")
    if path is not None:
        with open(path, "a") as file:
            file.write(json.dumps(record.get("run") or record["row"], ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


# ---- one row


def figure(row: dict[str, Any]) -> str:
    """One line about a row, speed-ups derived."""
    def us(value: float | None) -> str:
        return "      -" if value is None else f"{value:7.1f}" if value >= 10 else f"{value:7.2f}"

    shape = " ".join(f"{key}{value}" for key, value in row["shape"].items()).replace(", ", ",")
    parts = [f"{row['op']:14} {shape:42} {row['clock']:4} ours {us(row['ours_us'])} us  peer {us(row['peer_us'])} us"]
    if row["ours_us"] and row["peer_us"]:
        parts.append(f"{row['peer_us'] / row['ours_us']:5.2f}x")
    if row["floor_us"]:
        best = row["ours_us"] or row["peer_us"]
        parts.append(f"floor {us(row['floor_us'])}" + (f" ({row['floor_us'] / best:4.0%})" if best else ""))
    parts += [f"{name} {row[key]:.1e}" for name, key in (("err", "error"), ("peer err", "peer_error"))
              if row[key] is not None]
    return "  ".join(parts + ([row["note"]] if row["note"] else []))


@pytest.fixture(scope="session")
def suite_started() -> dict[str, float]:
    return {}


@pytest.fixture(scope="session")
def dense_times() -> dict[str, float | None]:
    return {}


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any, run: dict[str, Any], suite_started: dict[str, float],
            dense_times: dict[str, float | None]) -> Iterator[Callable[[Workload], None]]:
    """Measures one workload: its row goes to extra_info, to --rows and to the terminal."""
    from bench.measure import dense_us, measure_row
    from bench.results import check_row
    from shedder import limits
    option = request.config.getoption
    sides = option("sides").split(",")
    try:
        machine = limits.machine(run["gpu"], run["copy_tb_s"], run["clock_mhz"] or None)
    except ValueError:
        machine = None                                  # a GPU without known rates: times, but no floor

    def measure_one(workload: Workload) -> None:
        started = suite_started.setdefault(workload.suite, time.perf_counter())
        if time.perf_counter() - started > option("budget_s"):
            pytest.skip(f"the budget of suite {workload.suite} is spent (--budget-s)")
        rows: list[dict[str, Any]] = []
        seconds = option("row_s") / (3 if workload.table in ("sweep", "random") else 1)
        dense = dense_us(workload, dense_times, seconds) if "ours" in sides else None

        def once() -> None:
            rows.append(measure_row(workload, machine, ours="ours" in sides, peer="peer" in sides and workload.peer,
                                    dense_us=dense, budget_s=seconds))

        benchmark.pedantic(once, rounds=1, iterations=1)
        row = rows[0]
        dense_times.setdefault(workload.name, row["ours_us"])
        check_row({"run": "", **row})
        benchmark.extra_info["row"] = row
        _emit(request.config, figure(row), {"row": row})
        if "ours: refused" in row["note"]:
            pytest.fail(row["note"])

    yield measure_one
    torch.cuda.empty_cache()
