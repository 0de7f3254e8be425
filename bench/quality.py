"""What a cut costs in quality: held-out perplexity at the same budget, by score and by search.

    python -m bench.quality                          # prints tables, writes bench/results/cpu/quality.json
    python -m bench.quality --families mamba2 --tables "heads, 75 % of the parameters" --no-write

The models are those that ship; they are searched on demo/text/calibration.txt and judged on demo/text/heldout.txt. No
training after a cut. A run replaces the rows of its tables. `search_evaluations` counts blocks run over all
calibration tokens by a greedy search.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import shedder
from shedder.evaluate import perplexity
from shedder.nn import LanguageModel
from shedder.prune import Plan, parameter_count, search, state_bytes
from shedder.prune.size import flops

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
RESULT = ROOT / "bench" / "results" / "cpu" / "quality.json"
CALIBRATION = {"sequences": 4, "length": 256, "batch": 4, "seed": 0}
HELDOUT_TOKENS = 32768


CHANNELS = {"head": "channel"}                          # what Mamba-1 has in place of heads


@dataclass(frozen=True)
class Case:
    """One row: a name and what search() is given beside the table's budget and axes."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


def one_shot(*scores: str, **options: Any) -> list[Case]:
    return [Case(score, {"method": "one-shot", "score": score, **options}) for score in scores]


@dataclass(frozen=True)
class Table:
    """Cases at one budget and over the same axes. Scores that compare only within a layer take evenly from all."""

    budget: dict[str, float]
    axes: list[str]
    cases: list[Case]


TABLES = {
    "heads, 75 % of the parameters": Table({"params": 0.75}, ["head"], [
        *one_shot("magnitude", "activation", "contribution", "taylor1", "taylor2", "perplexity", bundle=1),
        Case("taylor2, evenly", {"method": "one-shot", "score": "taylor2", "evenly": True, "bundle": 1}),
        Case("greedy", {"bundle": 0.08, "rescore": 4})]),
    "states, half of the decode state": Table({"state": 0.5}, ["state"], [
        *one_shot("magnitude", "contribution", "taylor1", "taylor2", "ghost", "delta", "hinf", "perplexity", bundle=1),
        Case("greedy", {"rescore": 4})]),
    "all axes, 65 % of the parameters": Table({"params": 0.65}, ["block", "ssm", "head", "state"], [
        *one_shot("taylor1", "taylor2", "perplexity"),
        Case("greedy", {"rescore": 4}),
        Case("greedy, units ranked by taylor2", {"rescore": 4, "score": "taylor2"}),
        Case("greedy, exact norm repair", {"rescore": 4, "norm_repair": "exact"})]),
    "blocks and SSMs, 80 % of the parameters": Table({"params": 0.8}, ["block", "ssm"], [
        *one_shot("taylor2", "perplexity"), Case("greedy"),
        Case("greedy, lowest perplexity first (Mamba-Shedder)", {"rule": "perplexity"})]),
}


def main() -> None:
    arguments = _arguments()
    calibration, heldout_text = ((DEMO / "text" / name).read_text(encoding="utf-8")
                                 for name in ("calibration.txt", "heldout.txt"))
    for family in arguments.families:
        model = shedder.load(DEMO / "models" / family, dtype=torch.float32)
        heldout = torch.tensor(model.tokenizer.encode(heldout_text))[:HELDOUT_TOKENS + 1]
        dense = perplexity(model, heldout, length=512)
        print(f"\n{family}: dense perplexity {dense:.3f}")
        for name in arguments.tables:
            table, rows = TABLES[name], list[dict[str, Any]]()
            axes = [CHANNELS.get(axis, axis) if family == "mamba1" else axis for axis in table.axes]
            print(f"\n{name}\n{'':48} {'perplexity':>10} {'params':>7} {'state':>7} {'flops':>7} {'evaluations':>12}")
            for case in table.cases:
                plan = search(model, calibration, table.budget, axes, progress=False, **{**CALIBRATION, **case.options})
                row = {"model": family, "table": name, "case": case.name, "dense_perplexity": dense,
                       **_figures(model, plan, calibration, heldout),
                       "budget": table.budget, "axes": axes, "options": case.options}
                rows.append(row)
                print(f"{case.name:48} {row['perplexity']:>10.3f} {row['params']:>7.1%} {row['state']:>7.1%} "
                      f"{row['flops']:>7.1%} {row['search_evaluations'] or '':>12}", flush=True)
            if not arguments.no_write:
                write({"calibration": CALIBRATION, "heldout_tokens": HELDOUT_TOKENS, "commit": commit(),
                       "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                       "versions": {"torch": torch.__version__, "shedder": shedder.__version__}}, rows)


def _figures(model: LanguageModel, plan: Plan, calibration: str, heldout: torch.Tensor) -> dict[str, Any]:
    small = shedder.compact(model, plan, calibration)
    shares = {name: measure(small.config) / measure(model.config)
              for name, measure in (("params", parameter_count), ("state", state_bytes), ("flops", flops))}
    return {"perplexity": perplexity(small, heldout, length=512), **shares,
            "search_evaluations": plan.provenance.get("layer_evaluations")}


def write(facts: dict[str, Any], new: list[dict[str, Any]]) -> None:
    """Whole or not at all; one row a line, so that a diff shows which figures changed."""
    old = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    replaced = {(row["model"], row["table"]) for row in new}
    rows = [row for row in old if (row["model"], row["table"]) not in replaced] + new
    text = json.dumps(facts, indent=1)[:-2] + ',\n "rows": [\n' + ",\n".join("  " + json.dumps(row) for row in rows)
    handle, name = tempfile.mkstemp(dir=RESULT.parent, suffix=".part")
    with os.fdopen(handle, "w") as file:
        file.write(text + "\n]}\n")
    os.chmod(name, 0o644)
    os.replace(name, RESULT)
    print(f"wrote {RESULT.relative_to(ROOT)}")


def commit() -> str:
    try:
        return subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=("mamba1", "mamba2"), default=["mamba1", "mamba2"])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), metavar="TABLE",
                        help=f"some of {list(TABLES)}")
    parser.add_argument("--no-write", action="store_true", help="only print")
    return parser.parse_args()


if __name__ == "__main__":
    main()
