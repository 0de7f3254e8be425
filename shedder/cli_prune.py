"""The commands of the pruner: prune, score, plan; and what all commands share to read and print."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import shedder
from shedder import latency, report, report_html
from shedder.checkpoint import check_target
from shedder.evaluate import perplexity
from shedder.nn import LanguageModel
from shedder.prune import Plan, Scores, score, search, solve
from shedder.prune.greedy import RULES
from shedder.prune.mamba_shedder import from_mamba_shedder, is_mamba_shedder
from shedder.prune.parallel import Workers, torchrun
from shedder.prune.plan import NORM_REPAIRS, REPAIRS
from shedder.prune.scores import METHODS
from shedder.prune.search import SEARCHES
from shedder.prune.size import parameter_count, state_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

EXAMPLES = {"--budget": "params=0.7 or state=0.5, a share of the dense model", "--round-to": "heads=8 states=16",
            "--score": "head=activation state=ghost"}

Command = Callable[..., argparse.ArgumentParser]


# ---- prune


def _prune(arguments: argparse.Namespace) -> None:
    out = Path(arguments.out)
    if out.resolve() == Path(arguments.model).resolve():
        raise ValueError(f"--out is the folder of the model itself, {out}; give another folder")
    if arguments.report is not None and arguments.report.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--report is {str(arguments.report)!r}; accepted: a file name that ends in .html")
    check_target(out)                                   # before a search of hours, not after it
    with torchrun() as workers:
        model = shedder.load(arguments.model, device=device_of(arguments))
        stored = model.dtype                            # searched in --dtype, saved as it came
        model.to(dtype=DTYPES[arguments.dtype])
        text = None if arguments.text is None else read_text(arguments.text)
        heldout = None if arguments.heldout is None else read_text(arguments.heldout)
        plan = _plan_of(arguments, model, text)
        if workers.is_first:
            _apply(arguments, model, plan, text, heldout, stored)


def _plan_of(arguments: argparse.Namespace, model: LanguageModel, text: str | None) -> Plan:
    """The given plan, or the one that a search finds."""
    round_to = _numbers("--round-to", arguments.round_to, int)
    if arguments.plan is not None:
        return read_plan(arguments.plan, model.config.family).round_to(model.config, round_to)
    budget = _numbers("--budget", arguments.budget, float)
    scores = _score(arguments.score)
    options: dict[str, Any] = {"bundle": _bundle(arguments.bundle), "group_aware": arguments.group_aware,
                               "evenly": arguments.evenly, "round_to": round_to, "norm_repair": arguments.norm_repair,
                               "repairs": arguments.repair}
    if arguments.solve_only and isinstance(scores, Path):
        return solve(model, scores, budget, arguments.axes, **options)
    if text is None:
        raise ValueError("--text is missing; a search needs calibration text (or give a finished --plan)")
    return search(model, text, budget, arguments.axes, method=arguments.method, rule=arguments.rule, score=scores,
                  rescore=arguments.rescore, log=arguments.log, solve_only=arguments.solve_only,
                  progress=not arguments.json, **_sampling(arguments), **options)


def _apply(arguments: argparse.Namespace, model: LanguageModel, plan: Plan, text: str | None,
           heldout: str | None, stored: torch.dtype) -> None:
    """Compacts, saves, and reports on what was saved."""
    if plan.needs_statistics and text is None:
        raise ValueError(f"--text is missing; the plan's norm repair is {plan.norm_repair!r} with repairs "
                         f"{list(plan.repairs)}, fitted on calibration text")
    shedder.compact(model, plan, text).to(dtype=stored).save_pretrained(arguments.out)
    small = load_model(arguments, arguments.out)
    if arguments.save_plan is not None:
        plan.to_json(arguments.save_plan)
    quality, along = None, None
    if heldout is not None:
        tokens = torch.tensor(model.tokenizer.encode(heldout))
        quality = perplexity(model, tokens), perplexity(small, tokens)
        if arguments.points:
            along = report.perplexity_along(model, plan, text, tokens, arguments.points)
    times = list(latency.compare({"dense": model, "compacted": small}).values()) if arguments.measure else []
    done = report.collect(f"{arguments.model} pruned to {arguments.out}", model.config, plan, perplexity=quality,
                          along=along, latency=times)
    written = [] if arguments.report is None else report_html.write(done, arguments.report)
    if arguments.json:
        print_json({"out": str(arguments.out), "plan": json.loads(plan.to_json()),
                    "parameters": [parameter_count(model.config), parameter_count(small.config)],
                    "state_bytes_per_sequence": [state_bytes(model.config), state_bytes(small.config)],
                    "figures": {one.name: [one.before, one.after] for one in done.figures},
                    "report": [str(path) for path in written]})
        return
    print(plan.explain(model.config))
    print(report.table(done))
    print(f"saved to {arguments.out}" + "".join(f", {path}" for path in written))


# ---- score, plan


def _run_score(arguments: argparse.Namespace) -> None:
    with torchrun() as workers:
        model = load_model(arguments)
        found = score(model, read_text(arguments.text), arguments.method, arguments.axes, levels=arguments.levels,
                      norm_repair=arguments.norm_repair, repairs=arguments.repair, log=arguments.log,
                      progress=not arguments.json, **_sampling(arguments))
        if workers.is_first:
            found.save(arguments.out)
            _print_scores(arguments, found, workers)


def _print_scores(arguments: argparse.Namespace, found: Scores, workers: Workers) -> None:
    parts = (*found.layers, found.shared)
    counts = {axis: sum(part[axis].numel() for part in parts if axis in part)
              for axis in dict.fromkeys(axis for part in parts for axis in part)}
    if arguments.json:
        print_json({"out": str(arguments.out), "method": arguments.method, "units": counts,
                    "comparable": found.comparable, "processes": workers.count})
        return
    units = ", ".join(f"{axis} {count:,}" for axis, count in counts.items())
    print(f"{arguments.method}: scores of units by axis: {units}; saved to {arguments.out}")


def _run_plan(arguments: argparse.Namespace) -> None:
    config = shedder.load(arguments.model).config
    plan = read_plan(arguments.plan, config.family)
    if arguments.round_to:
        plan = plan.round_to(config, _numbers("--round-to", arguments.round_to, int))
    problems = plan.problems(config)
    if problems:
        raise ValueError(f"{arguments.plan} does not fit {arguments.model}:\n" + "\n".join(problems))
    if arguments.out is not None:
        plan.to_json(arguments.out)
    if arguments.json:
        print_json(json.loads(plan.to_json()))
        return
    if arguments.diff is not None:
        print(plan.diff(read_plan(arguments.diff, config.family)) or "no difference")
        return
    print(plan.explain(config))


# ---- reading arguments


def load_model(arguments: argparse.Namespace, folder: Path | None = None) -> LanguageModel:
    """The model of the command line, or of another folder, with the dtype and on the device of the command line."""
    return shedder.load(folder or arguments.model, device=device_of(arguments), dtype=DTYPES[arguments.dtype])


def device_of(arguments: argparse.Namespace) -> str:
    device = str(arguments.device)
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise ValueError(f"--device is {device!r}; accepted: cpu, cuda or cuda:N")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device is {device!r}; PyTorch sees {torch.cuda.device_count()} CUDA GPUs here")
    return device


def read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error


def read_plan(path: Path, family: str) -> Plan:
    """A plan of shedder, or Mamba-Shedder's pruning_config.json."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    return from_mamba_shedder(path, family) if is_mamba_shedder(data) else Plan.from_json(path)


def _pairs(option: str, items: Iterable[str]) -> dict[str, str]:
    """NAME=VALUE items as a dict."""
    found: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{option} is {item!r}; accepted: NAME=VALUE, as {EXAMPLES[option]}")
        if name in found:
            raise ValueError(f"{option} gives {name} more than once")
        found[name] = value
    return found


def _numbers(option: str, items: Iterable[str], kind: type[int] | type[float]) -> dict[str, Any]:
    numbers = {}
    for name, value in _pairs(option, items).items():
        try:
            numbers[name] = kind(value)
        except ValueError as error:
            raise ValueError(f"{option} is {name}={value}; accepted: {EXAMPLES[option]}") from error
    return numbers


def _score(items: Sequence[str]) -> str | Path | dict[str, str] | None:
    """A method, a file of scores, or a method for each axis."""
    if not items:
        return None
    if len(items) == 1 and "=" not in items[0]:
        return Path(items[0]) if items[0].endswith(".safetensors") else items[0]
    return _pairs("--score", items)


def _bundle(text: str) -> float | int | None:
    if text == "none":
        return None
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError as error:
        raise ValueError(f"--bundle is {text!r}; accepted: a share such as 0.125, a number of units, or none"
                         ) from error


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("sequences", "length", "batch", "seed")}


def add_prune_commands(command: Command) -> None:
    """Adds the pruner's commands; `command` makes a subparser with the arguments that all have."""
    prune = command("prune", _prune, "Search a plan (or take a finished one), compact the model and save it.",
                    "shedder prune demo/models/mamba2 --text demo/text/calibration.txt --budget params=0.7 --out small "
                    "--report small.html")
    prune.add_argument("--out", type=Path, required=True, help="folder for the compacted checkpoint")
    prune.add_argument("--plan", type=Path, help="apply this plan (JSON; Mamba-Shedder's pruning_config.json too) "
                                                 "instead of searching one")
    prune.add_argument("--save-plan", type=Path, metavar="FILE", help="also write the plan as JSON")
    prune.add_argument("--report", type=Path, metavar="FILE.html",
                       help="write an HTML report, and beside it the search as CSV and PNG")
    prune.add_argument("--heldout", type=Path, metavar="TEXT", help="text for the perplexity before and after")
    prune.add_argument("--points", type=int, default=0, metavar="N",
                       help="with --heldout: the perplexity of N models along the search, for the report")
    prune.add_argument("--measure", action="store_true", help="measure prefill and decode time before and after")
    group = prune.add_argument_group("the search")
    group.add_argument("--budget", nargs="+", default=["params=0.7"], metavar="NAME=SHARE",
                       help="what may stay of params, state (bytes) and flops, as shares of the dense model; with "
                            "several all must hold (default params=0.7)")
    group.add_argument("--method", choices=SEARCHES, default="greedy", help="default greedy")
    group.add_argument("--score", nargs="+", default=[], metavar="SCORE",
                       help=f"what ranks units: {', '.join(METHODS)}; AXIS=METHOD ...; or a file of `shedder score`")
    group.add_argument("--rule", choices=RULES, default="rise_per_size", help="of greedy (default rise_per_size)")
    group.add_argument("--rescore", type=int, metavar="N", help="of greedy: score only the N best of before again")
    group.add_argument("--bundle", default="0.125", metavar="B",
                       help="units that go together: a share of the layer's, a number, or none (default 0.125)")
    group.add_argument("--group-aware", action="store_true", help="every B/C group loses as many heads")
    group.add_argument("--evenly", action=argparse.BooleanOptionalAction, help="of one-shot: the same from every layer")
    group.add_argument("--log", type=Path, help="JSONL log of the search; a killed search continues from it")
    group.add_argument("--solve-only", action="store_true",
                       help="do not run the model: from a --log that reached the budget, or a file of --score")
    group.add_argument("--round-to", nargs="+", default=[], metavar="NAME=N",
                       help="keep multiples, e.g. heads=8 states=16 d_model=64: bundles take more, a --plan less")
    _add_shared(group, is_text_required=False)

    scores = command("score", _run_score, "Score units, so that `prune --score FILE` solves any budget in seconds.",
                     "shedder score demo/models/mamba2 --text demo/text/calibration.txt --method taylor2 "
                     "--out scores.safetensors")
    scores.add_argument("--out", type=Path, required=True, help="file for the scores (.safetensors)")
    scores.add_argument("--method", choices=METHODS, required=True)
    scores.add_argument("--levels", type=int, default=8, help="of perplexity: how finely (default 8)")
    scores.add_argument("--log", type=Path, help="of perplexity: JSONL log; a killed run continues from it")
    _add_shared(scores, is_text_required=True)

    plans = command("plan", _run_plan, "Explain a plan for a model, say why it is illegal, or compare two.",
                    "shedder plan demo/models/mamba2 plan.json --diff other.json", runs_model=False)
    plans.add_argument("plan", type=Path, help="JSON file; Mamba-Shedder's pruning_config.json too")
    plans.add_argument("--diff", type=Path, metavar="OTHER", help="what OTHER removes more (+) and less (-)")
    plans.add_argument("--round-to", nargs="+", default=[], metavar="NAME=N",
                       help="give units back until what stays is a multiple, e.g. heads=8 states=16")
    plans.add_argument("--out", type=Path, help="write the plan as JSON, e.g. after --round-to")


def _add_shared(parser: argparse._ActionsContainer, is_text_required: bool) -> None:
    """What prune and score both take: the calibration text, and how candidates are repaired."""
    parser.add_argument("--text", type=Path, required=is_text_required, help="calibration text (UTF-8)")
    parser.add_argument("--axes", nargs="+", metavar="AXIS",
                        help="what may be removed: block ssm state tap group merge d_model; head head_channel mlp "
                             "(Mamba-2); channel rank (Mamba-1). Default: block ssm state and head or channel")
    parser.add_argument("--norm-repair", choices=NORM_REPAIRS, default="stats",
                        help="of gated norms that lose channels (default stats)")
    parser.add_argument("--repair", nargs="+", choices=REPAIRS, default=[], help="further repairs, fitted on the text")
    for name, default, what in (("sequences", 16, "windows of calibration text"), ("length", 512, "tokens in each"),
                                ("batch", 8, "windows at once"), ("seed", 0, "of the draw")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default {default})")


# ---- printing


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
