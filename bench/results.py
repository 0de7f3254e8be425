"""Results: from a benchmark run to bench/results/<gpu>/<suite>.json, the only place where figures live.

    pytest bench/ --rows rows.jsonl --benchmark-json run.json
    python -m bench.results rows.jsonl            # or run.json: both hold the same rows

A file keeps every run that a row of it still comes from. A new row replaces the older row of
the same op, pass, shape, layout, dtype, clock and dispatch; nothing else is touched.

    python -m bench.results --passes first.jsonl second.jsonl third.jsonl

takes several passes over the same workloads, on one machine, for one run: the median of each
figure, so that a minute in which the machine is slower does not decide a row.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.workloads import SUITES
from shedder import limits

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
HASHED = ("csrc", "triton_kernels", "shedder/ops")
HASHED_SUFFIXES = (".py", ".cu", ".cuh", ".cpp", ".h", ".hpp")

Row = dict[str, Any]
Run = dict[str, Any]

_NUMBER = (int, float)
_TEXT_OR_NONE = (str, type(None))
_NUMBER_OR_NONE = (int, float, type(None))
ROW_FIELDS: dict[str, tuple[type, ...]] = {
    "run": (str,), "op": (str,), "pass": (str,), "shape": (dict,), "layout": (str,), "dtype": (str,),
    "state_dtype": _TEXT_OR_NONE, "model": _TEXT_OR_NONE, "plan": _TEXT_OR_NONE, "clock": (str,), "backend": (str,),
    "algorithm": (str,), "dispatch": (str,), "ours_us": _NUMBER_OR_NONE, "dense_us": _NUMBER_OR_NONE,
    "peer": _TEXT_OR_NONE, "peer_us": _NUMBER_OR_NONE, "bytes": _NUMBER, "floor_us": _NUMBER_OR_NONE,
    "error": _NUMBER_OR_NONE, "peer_error": _NUMBER_OR_NONE, "note": (str,)}
RUN_FIELDS: dict[str, tuple[type, ...]] = {
    "gpu": (str,), "clock_mhz": _NUMBER, "copy_tb_s": _NUMBER, "commit": (str,), "source_hash": (str,), "date": (str,),
    "versions": (dict,)}
RUN_OPTIONAL: dict[str, tuple[type, ...]] = {"passes": (int,)}         # of which figures are the medians
FIGURES = ("ours_us", "dense_us", "peer_us", "floor_us", "error", "peer_error")
CHOICES = {"op": set(SUITES), "pass": {"fwd", "bwd", "step"}, "clock": {"gpu", "wall", "step"},
           "dtype": {"fp32", "fp16", "bf16", "fp64"}}
SHAPE_KEYS = {"B", "D", "L", "H", "P", "N", "G", "R", "d_model", "groups", "channels", "width", "rows", "segments"}
IDENTITY = ("op", "pass", "shape", "layout", "dtype", "state_dtype", "model", "plan", "clock", "dispatch", "peer")


class ResultsError(ValueError):
    """A results file or a row that does not follow the schema; the message names file, row, field and value."""


def source_hash(root: Path = ROOT) -> str:
    """What the kernels were: a hash over csrc/, triton_kernels/ and shedder/ops."""
    digest = hashlib.sha256()
    for folder in HASHED:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in HASHED_SUFFIXES and path.is_file():
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def folder_of(gpu: str) -> str:
    """The folder of a GPU: its model without maker and memory, in lower case."""
    name = gpu.replace("NVIDIA", "").split()
    return re.sub(r"[^a-z0-9]+", "-", (name[0] if name else "unknown").lower()).strip("-")


# ---- the schema


def _require_fields(where: str, values: dict[str, Any], fields: dict[str, tuple[type, ...]],
                    optional: dict[str, tuple[type, ...]] | None = None) -> None:
    if not isinstance(values, dict):
        raise ResultsError(f"{where} is {values!r}; accepted: an object")
    all_fields = fields | (optional or {})
    missing, unknown = sorted(set(fields) - set(values)), sorted(set(values) - set(all_fields))
    if missing or unknown:
        raise ResultsError(f"{where}: missing fields {missing}, unknown fields {unknown}")
    for name, types in all_fields.items():
        if name not in values:
            continue
        if not isinstance(values[name], types) or isinstance(values[name], bool):
            accepted = " or ".join(t.__name__ for t in types)
            raise ResultsError(f"{where}.{name} is {values[name]!r}; accepted: {accepted}")


def check_row(row: Row, where: str = "row") -> None:
    _require_fields(where, row, ROW_FIELDS)
    for name, accepted in CHOICES.items():
        if row[name] not in accepted:
            raise ResultsError(f"{where}.{name} is {row[name]!r}; accepted: one of {sorted(accepted)}")
    if unknown := set(row["shape"]) - SHAPE_KEYS:
        raise ResultsError(f"{where}.shape has keys {sorted(unknown)}; accepted: {sorted(SHAPE_KEYS)}")
    for name in FIGURES:
        if row[name] is not None and not 0 <= row[name] < float("inf"):
            raise ResultsError(f"{where}.{name} is {row[name]!r}; accepted: null or a finite number >= 0")
    if row["dispatch"] != "auto" and not row["dispatch"].startswith("forced:"):
        raise ResultsError(f"{where}.dispatch is {row['dispatch']!r}; accepted: 'auto' or 'forced:<backend>'")
    if row["peer"] is not None and row["peer_us"] is None and not row["note"]:
        raise ResultsError(f"{where}: peer_us is null, so note must say why")


def check_results(data: dict[str, Any], where: str = "results") -> None:
    """Raise ResultsError unless `data` is a whole results file."""
    _require_fields(where, data, {"runs": (dict,), "rows": (list,)})
    for name, run in data["runs"].items():
        _require_fields(f"{where}: runs.{name}", run, RUN_FIELDS, RUN_OPTIONAL)
    seen: set[str] = set()
    for index, row in enumerate(data["rows"]):
        check_row(row, f"{where}: rows[{index}]")
        if row["run"] not in data["runs"]:
            raise ResultsError(f"{where}: rows[{index}].run is {row['run']!r}; accepted: one of {sorted(data['runs'])}")
        if identity(row) in seen:
            raise ResultsError(f"{where}: rows[{index}] measures the same thing as an earlier row")
        seen.add(identity(row))


def identity(row: Row) -> str:
    """What a row measures, whatever came out."""
    return json.dumps([row[name] for name in IDENTITY], sort_keys=True)


# ---- reading and writing


def load(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ResultsError(f"{path}: not JSON: {error}") from error
    check_results(data, str(path))
    return data


def files(root: Path = RESULTS) -> list[Path]:
    """Of kernels and models; bench/quality.py and bench/claims.py have schemas of their own."""
    return sorted(path for path in root.glob("*/*.json") if path.stem not in ("quality", "claims"))


def write_atomically(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _write(path: Path, data: dict[str, Any]) -> None:
    """One row a line, so that a diff shows which figures changed."""
    runs = ",\n".join(f"  {json.dumps(name)}: {json.dumps(run, ensure_ascii=False)}"
                      for name, run in data["runs"].items())
    rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in data["rows"])
    write_atomically(path, f'{{"runs": {{\n{runs}\n}},\n"rows": [\n{rows}\n]}}\n')


def read_benchmark(path: Path) -> tuple[Run, list[Row]]:
    """The run and its rows from either form of output: --rows (JSON lines) or --benchmark-json."""
    text = path.read_text()
    try:
        report = json.loads(text)
    except json.JSONDecodeError:
        report = None
    if isinstance(report, dict) and "benchmarks" in report:
        run = report["machine_info"].get("run")
        if run is None:
            raise ResultsError(f"{path}: every benchmark was skipped, nothing was measured")
        rows = [entry["extra_info"]["row"] for entry in report["benchmarks"] if "row" in entry.get("extra_info", {})]
        return run, rows
    lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not lines or "gpu" not in lines[0]:
        raise ResultsError(f"{path}: accepted: a file of --rows or --benchmark-json; its first line describes no run")
    return lines[0], lines[1:]


def median_of_passes(passes: Sequence[tuple[Run, list[Row]]]) -> tuple[Run, list[Row]]:
    """One run of several over the same workloads: the median of each figure that any pass has."""
    first, count = passes[0][0], len(passes)
    for run, _ in passes:
        for name in ("gpu", "clock_mhz", "commit", "source_hash", "versions"):
            if run[name] != first[name]:
                raise ResultsError(f"passes differ in {name}: {first[name]!r} and {run[name]!r}")
    by_identity: dict[str, list[Row]] = {}
    for _, rows in passes:
        for row in rows:
            by_identity.setdefault(identity(row), []).append(row)
    together = []
    for same in by_identity.values():
        found = {name: [row[name] for row in same if row[name] is not None] for name in FIGURES}
        by_time = sorted(same, key=lambda row: row["ours_us"] or 0.0)
        middle = by_time[len(by_time) // 2]                  # whose note stays: it may hold the copy of that pass
        together.append(middle | {name: statistics.median(all_) if all_ else None for name, all_ in found.items()})
    copy = round(statistics.median(run["copy_tb_s"] for run, _ in passes), 3)
    return {**first, "copy_tb_s": copy, "passes": count}, together


def merge(run: Run, rows: Iterable[Row], results: Path = RESULTS) -> list[Path]:
    """Put a run's rows into the files of its suites; returns the files written."""
    _require_fields("run", run, RUN_FIELDS, RUN_OPTIONAL)
    by_suite: dict[str, list[Row]] = {}
    for row in rows:
        check_row({"run": "", **row})
        by_suite.setdefault(SUITES[row["op"]], []).append(row)
    written = []
    for suite, new in by_suite.items():
        path = results / folder_of(run["gpu"]) / f"{suite}.json"
        data = load(path) if path.exists() else {"runs": {}, "rows": []}
        name = next((known for known, other in data["runs"].items() if other == run), None)
        if name is None:
            name = f"r{1 + max((int(known[1:]) for known in data['runs']), default=0)}"
        kept = {identity(row): row for row in data["rows"]}
        kept |= {identity(row): {"run": name, **row} for row in new}
        used = {row["run"] for row in kept.values()}
        runs = {known: value for known, value in (data["runs"] | {name: run}).items() if known in used}
        merged = {"runs": runs, "rows": list(kept.values())}
        check_results(merged, str(path))
        _write(path, merged)
        written.append(path)
    return written


# ---- what results say about the code


def stale(data: dict[str, Any], current: str) -> list[str]:
    """The runs of a results file that measured other kernels than the code has now."""
    return [name for name, run in data["runs"].items() if run["source_hash"] != current]


def _group(row: Row) -> str:
    names = ("run", "op", "pass", "layout", "dtype", "state_dtype", "model", "clock", "dispatch", "peer")
    return json.dumps([row[name] for name in names])


def _sizes(shape: dict[str, Any]) -> dict[str, float]:
    """The axes that a cut makes smaller: a list counts by its sum."""
    return {key: sum(value) if isinstance(value, list) else value for key, value in shape.items()
            if key not in ("groups", "segments")}


def _is_smaller(small: dict[str, Any], large: dict[str, Any]) -> bool:
    a, b = _sizes(small), _sizes(large)
    return a.keys() == b.keys() and a != b and all(a[key] <= b[key] for key in a)


def _same_batch(a: Row, b: Row) -> bool:
    """Only parts of a model count as removed, never sequences of the batch."""
    return all(a["shape"].get(key) == b["shape"].get(key) for key in ("B", "rows", "G"))


MARGIN, NEVER_ABOVE, SWEEP_NOISE, FLOOR_SHARE = 0.10, 1.03, 1.03, 0.7
_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}


def removal_pays(rows: Iterable[Row], runs: dict[str, Run]) -> list[str]:
    """Where removing something did not pay, one sentence each; empty when the contract holds.

    Within one run, dtype and automatic dispatch, on the gpu clock:
      - a compacted call takes at most (work left + 0.10) of the dense call, unless it is within
        floor / 0.7 of the speed of light, and never more than 1.03 of it;
      - of two shapes where one is smaller in some axes and larger in none, the smaller one is at
        most 3 % slower;
      - nothing is slower than the peer, and nothing raises where the dense shape works.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["clock"] == "gpu" and row["dispatch"] == "auto":
            groups.setdefault(_group(row), []).append(row)
    failures: list[str] = []
    for group in groups.values():
        machine = machine_of(runs[group[0]["run"]])
        timed = [row for row in group if row["ours_us"] is not None]
        for row in group:
            if row["ours_us"] is None:
                if any(_is_smaller(row["shape"], other["shape"]) for other in timed):
                    failures.append(f"{_label(row)} has no time though a larger shape has: {row['note']}")
                continue
            if row["peer_us"] is not None and row["ours_us"] > row["peer_us"]:
                failures.append(f"{_label(row)} takes {row['ours_us']:g} us, {row['peer']} {row['peer_us']:g}")
            if row["dense_us"] is not None:
                failures += _against_dense(row, timed, machine)
        for small in timed:
            larger = [large for large in timed
                      if _same_batch(small, large) and _is_smaller(small["shape"], large["shape"])]
            fastest = min(larger, key=lambda large: large["ours_us"], default=None)
            if fastest is not None and small["ours_us"] > SWEEP_NOISE * fastest["ours_us"]:
                failures.append(f"{_label(small)} takes {small['ours_us']:g} us, "
                                f"the larger {_label(fastest)} {fastest['ours_us']:g}")
    return failures


def _against_dense(row: Row, timed: list[Row], machine: limits.Machine | None) -> Iterator[str]:
    ratio = row["ours_us"] / row["dense_us"]
    if ratio > NEVER_ABOVE:
        yield f"{_label(row)} takes {ratio:.3f} of dense; at most {NEVER_ABOVE} is accepted"
        return
    dense = min((other for other in timed if _is_smaller(row["shape"], other["shape"])),
                key=lambda other: abs(other["ours_us"] - row["dense_us"]), default=None)
    if dense is not None and abs(dense["ours_us"] - row["dense_us"]) > 0.05 * row["dense_us"]:
        dense = None
    if dense is None or machine is None:
        yield (f"{_label(row)} names dense_us {row['dense_us']:g}, but its run has no such dense row, "
               "or its GPU no limits")
        return
    element, state = _BYTES[row["dtype"]], _BYTES[row["state_dtype"] or row["dtype"]]
    left = limits.work_left(row["op"], row["shape"], dense["shape"], machine, element, state)
    if ratio > left + MARGIN and row["ours_us"] > row["floor_us"] / FLOOR_SHARE:
        yield f"{_label(row)} takes {ratio:.3f} of dense with {left:.3f} of the work left"


def machine_of(run: Run) -> limits.Machine | None:
    """The rates that bound a run, or None for a GPU without known ones."""
    try:
        return limits.machine(run["gpu"], run["copy_tb_s"], run["clock_mhz"])
    except ValueError:
        return None


def _label(row: Row) -> str:
    shape = " ".join(f"{key}{value}" for key, value in row["shape"].items())
    return f"{row['op']} {shape} {row['dtype']}"


def commit() -> str:
    try:
        return subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.results", description="Merge benchmark runs into "
                                     "bench/results, or check what is there.")
    parser.add_argument("runs", nargs="*", type=Path, help="files written by --rows or --benchmark-json")
    parser.add_argument("--passes", action="store_true", help="the files are passes of one run: take the medians")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the results live")
    parser.add_argument("--commit", default=None, help="the commit to note where the run does not know it")
    parser.add_argument("--check", action="store_true", help="say where removal does not pay; exit 1 if anywhere")
    options = parser.parse_args(arguments)
    try:
        read = [read_benchmark(path) for path in options.runs]
        if options.passes and read:
            read = [median_of_passes(read)]
        for run, rows in read:
            if run["commit"] == "unknown" and (options.commit or run["source_hash"] == source_hash()):
                run = {**run, "commit": options.commit or commit()}
            for written in merge(run, rows, options.results):
                print(f"{len(rows)} rows, wrote {written}")
        failures = []
        for path in files(options.results):
            data = load(path)
            if old := stale(data, source_hash()):
                print(f"{path}: {', '.join(old)} measured other kernels than the code has now")
            if options.check:
                failures += [f"{path}: {failure}" for failure in removal_pays(data["rows"], data["runs"])]
    except (ResultsError, OSError) as error:
        print(f"bench.results: {error}", file=sys.stderr)
        return 2
    print(*failures, sep="\n", end="\n" if failures else "")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
