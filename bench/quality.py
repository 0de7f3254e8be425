"""What a cut costs in quality: held-out perplexity at the same budget, by score and by search.

    python -m bench.quality                          # prints tables, writes bench/results/cpu/quality.json
    python -m bench.quality --families mamba2 --tables "heads, 75 % of the parameters" --no-write
    python -m bench.quality --fill docs/search.md    # the written rows, between <!-- quality --> and <!-- /quality -->

The models are those that ship; they are searched on demo/text/calibration.txt and judged on demo/text/heldout.txt. No
training after a cut. A run replaces the rows of its tables; each row has the sizes it was made with, which --sequences,
--length and --heldout-tokens set. `search_evaluations` counts blocks run over all calibration tokens by a greedy
search. All of Mamba-1 takes half an hour of one core.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import shedder
from shedder.evaluate import perplexity
from shedder.nn import LanguageModel
from shedder.prune import Plan, parameter_count, search, state_bytes
from shedder.prune.plan import write_atomically
from shedder.prune.size import flops

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
RESULT = ROOT / "bench" / "results" / "cpu" / "quality.json"


MARKS = re.compile(r"(<!-- quality -->).*?(<!-- /quality -->)", re.DOTALL)
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
    "d_model, 85 % of the parameters": Table({"params": 0.85}, ["d_model"], [
        *one_shot("magnitude", "activation", "contribution", "taylor1", "taylor2", "perplexity", bundle=8),
        Case("greedy", {"bundle": 8}),
        Case("contribution, out_proj refitted", {"method": "one-shot", "score": "contribution", "bundle": 8,
                                                 "repairs": ["out_proj"]})]),
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
    if arguments.fill is not None:
        fill(arguments.fill)
        return
    sizes = {"sequences": arguments.sequences, "length": arguments.length, "batch": 4, "seed": 0}
    facts = {"commit": commit(), "calibration": sizes, "heldout_tokens": arguments.heldout_tokens,
             "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
             "versions": {"torch": torch.__version__, "shedder": shedder.__version__}}
    calibration, heldout_text = ((DEMO / "text" / name).read_text(encoding="utf-8")
                                 for name in ("calibration.txt", "heldout.txt"))
    for family in arguments.families:
        model = shedder.load(DEMO / "models" / family, dtype=torch.float32)
        heldout = torch.tensor(model.tokenizer.encode(heldout_text))[:arguments.heldout_tokens + 1]
        dense = perplexity(model, heldout, length=512)
        print(f"\n{family}: dense perplexity {dense:.3f}")
        for name in arguments.tables:
            table, rows = TABLES[name], list[dict[str, Any]]()
            axes = [CHANNELS.get(axis, axis) if family == "mamba1" else axis for axis in table.axes]
            print(f"\n{name}\n{'':48} {'perplexity':>10} {'params':>7} {'state':>7} {'flops':>7} {'evaluations':>12}")
            for case in table.cases:
                plan = search(model, calibration, table.budget, axes, progress=False, **sizes, **case.options)
                row = {"model": family, "table": name, "case": case.name, "dense_perplexity": dense,
                       **_figures(model, plan, calibration, heldout),
                       "budget": table.budget, "axes": axes, "options": case.options, **facts}
                rows.append(row)
                print(f"{case.name:48} {row['perplexity']:>10.3f} {row['params']:>7.1%} {row['state']:>7.1%} "
                      f"{row['flops']:>7.1%} {row['search_evaluations'] or '':>12}", flush=True)
            if not arguments.no_write:
                write(rows)


def _figures(model: LanguageModel, plan: Plan, calibration: str, heldout: torch.Tensor) -> dict[str, Any]:
    small = shedder.compact(model, plan, calibration)
    shares = {name: measure(small.config) / measure(model.config)
              for name, measure in (("params", parameter_count), ("state", state_bytes), ("flops", flops))}
    return {"perplexity": perplexity(small, heldout, length=512), **shares,
            "search_evaluations": plan.provenance.get("layer_evaluations")}


def write(new: list[dict[str, Any]]) -> None:
    """Whole or not at all; one row a line, so that a diff shows which figures changed."""
    old = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    replaced = {(row["model"], row["table"]) for row in new}
    rows = [row for row in old if (row["model"], row["table"]) not in replaced] + new
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    write_atomically(RESULT, f'{{"rows": [\n{lines}\n]}}\n')
    print(f"wrote {RESULT.relative_to(ROOT)}")


# ---- the table of the documents


def fill(path: Path) -> None:
    """Puts the tables of the written rows between the marks of a document."""
    text = path.read_text(encoding="utf-8")
    filled, count = MARKS.subn(lambda match: f"{match[1]}\n{tables()}\n{match[2]}", text)
    if count != 1:
        raise SystemExit(f"{path} has {count} places between <!-- quality --> and <!-- /quality -->; accepted: one")
    write_atomically(path, filled)


def tables() -> str:
    """Perplexities by case and model, a table for each budget, as markdown."""
    written = json.loads(RESULT.read_text())["rows"]
    rows = {(row["table"], row["case"], row["model"]): row["perplexity"] for row in written}
    rows |= {(row["table"], "dense", row["model"]): row["dense_perplexity"] for row in written}
    parts = []
    for name, table in TABLES.items():
        lines = [f"| {name} | Mamba-2 | Mamba-1 |", "| --- | --- | --- |"]
        for case in [Case("dense"), *table.cases]:
            found = [rows.get((name, case.name, model)) for model in ("mamba2", "mamba1")]
            shown = " | ".join("-" if value is None else f"{value:.2f}" for value in found)
            lines.append(f"| {case.name} | {shown} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


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
    for name, default, what in (("sequences", 4, "windows of calibration text"), ("length", 256, "bytes in each"),
                                ("heldout-tokens", 32768, "bytes judged on")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default {default})")
    parser.add_argument("--no-write", action="store_true", help="only print")
    parser.add_argument("--fill", type=Path, metavar="FILE", help="search nothing, fill the tables of a document")
    return parser.parse_args()


if __name__ == "__main__":
    main()
