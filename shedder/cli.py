"""The command line: inspect, prune, eval, generate, bench, doctor.

Exit codes: 0 done, 1 the work failed (one line on standard error says why), 2 the command line is wrong,
130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import shedder
from shedder import latency, native
from shedder.evaluate import perplexity
from shedder.nn import LanguageModel
from shedder.ops.backend import BACKENDS, unavailable
from shedder.prune import Plan, search
from shedder.prune.plan import describe_layout
from shedder.prune.size import layer_parameters, parameter_count, state_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
AXES = {"mamba1": ("block", "ssm", "channel", "state"), "mamba2": ("block", "ssm", "head", "state")}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("shedder: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"shedder: error: {error}", file=sys.stderr)
        return 1
    return 0


# ---- the commands


def _inspect(arguments: argparse.Namespace) -> None:
    model = shedder.load(arguments.model)
    config = model.config
    layers = [{"layer": index, "layout": describe_layout(layout, config.family),
               "parameters": layer_parameters(config, layout), "state_elements": layout.state_elements}
              for index, layout in enumerate(config.layers)]
    totals = {"parameters": parameter_count(config), "state_bytes_per_sequence": state_bytes(config)}
    if arguments.json:
        _print_json({"model": str(arguments.model), "family": config.family, "d_model": config.d_model,
                     "vocab_size": config.vocab_size, "layers": layers, **totals})
        return
    print(f"{arguments.model}: {config.family}, d_model {config.d_model}, {len(layers)} layers, "
          f"vocabulary {config.vocab_size}")
    _print_table(("layer", "layout", "parameters", "state elements"),
                 [(row["layer"], row["layout"], f"{row['parameters']:,}", f"{row['state_elements']:,}")
                  for row in layers])
    print(f"parameters {totals['parameters']:,}; "
          f"decode state {totals['state_bytes_per_sequence']:,} bytes per sequence")


def _prune(arguments: argparse.Namespace) -> None:
    if Path(arguments.out).resolve() == Path(arguments.model).resolve():
        raise ValueError(f"--out is the folder of the model itself, {arguments.out}; give another folder")
    model = _load(arguments)
    text = None if arguments.text is None else _read_text(arguments.text)
    if arguments.plan is not None:
        plan = Plan.from_json(arguments.plan)
    else:
        if text is None:
            raise ValueError("--text is missing; a search needs calibration text (or give a finished --plan)")
        plan = search(model, text, budget=_budget(arguments.budget),
                      axes=arguments.axes or list(AXES[model.config.family]), log=arguments.log)
    small = shedder.compact(model, plan, text)
    small.save_pretrained(arguments.out)
    if arguments.json:
        _print_json({"out": str(arguments.out), "plan": json.loads(plan.to_json()),
                     "parameters": [parameter_count(model.config), parameter_count(small.config)],
                     "state_bytes_per_sequence": [state_bytes(model.config), state_bytes(small.config)]})
        return
    print(plan.explain(model.config))
    print(f"saved to {arguments.out}")


def _eval(arguments: argparse.Namespace) -> None:
    model = _load(arguments)
    tokens = torch.tensor(model.tokenizer.encode(_read_text(arguments.text)))
    value = perplexity(model, tokens, length=arguments.length)
    if arguments.json:
        _print_json({"model": str(arguments.model), "text": str(arguments.text), "tokens": tokens.numel(),
                     "perplexity": value})
        return
    print(f"perplexity {value:.4f} over {tokens.numel():,} tokens in windows of {arguments.length}")


def _generate(arguments: argparse.Namespace) -> None:
    model = _load(arguments)
    prompt = model.tokenizer.encode(arguments.prompt)
    if not prompt:
        raise ValueError("--prompt is empty; give at least one character")
    ids = torch.tensor([prompt], device=arguments.device)
    out = model.generate(ids, arguments.tokens, temperature=arguments.temperature, seed=arguments.seed)
    text = model.tokenizer.decode(out[0].tolist())
    if arguments.json:
        _print_json({"prompt": arguments.prompt, "text": text})
        return
    print(text)


def _bench(arguments: argparse.Namespace) -> None:
    models = {str(folder): shedder.load(folder, device=arguments.device, dtype=DTYPES[arguments.dtype])
              for folder in [arguments.model, *arguments.compare]}
    result = latency.compare(models, batch=arguments.batch, prompt=arguments.prompt, tokens=arguments.tokens)
    if arguments.json:
        _print_json({name: one.to_json() for name, one in result.items()})
        return
    first = result[str(arguments.model)]
    print(f"{first.device}, {first.dtype}, {first.threads} threads, batch {first.batch}, prompt {first.prompt}")
    _print_table(("model", "prefill ms", "decode ms/token", "prefill x", "decode x"),
                 [(name, f"{one.prefill_ms:.2f}", f"{one.decode_ms:.3f}", f"{first.prefill_ms / one.prefill_ms:.2f}",
                   f"{first.decode_ms / one.decode_ms:.2f}") for name, one in result.items()])


def _doctor(arguments: argparse.Namespace) -> None:
    cuda_device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    facts = {"shedder": shedder.__version__, "python": platform.python_version(), "torch": torch.__version__,
             "gpu": cuda_device, "threads": torch.get_num_threads(),
             "cpu library": native.cpu_status(), "cpu instruction set": native.cpu_isa(),
             "cuda library": native.cuda_status(), "build": native.build_info(),
             "backends": {name: unavailable(name) or "available" for name in BACKENDS}}
    if arguments.json:
        _print_json(facts)
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, item in value.items():
                print(f"  {key}: {item}")
        else:
            print(f"{name}: {value if value is not None else 'none'}")


# ---- reading arguments


def _load(arguments: argparse.Namespace) -> LanguageModel:
    return shedder.load(arguments.model, device=arguments.device, dtype=DTYPES[arguments.dtype])


def _read_text(path: str | Path) -> str:
    return Path(path).read_text(encoding="utf-8")


def _budget(items: Sequence[str]) -> dict[str, float]:
    budget = {}
    for item in items:
        name, _, value = item.partition("=")
        try:
            budget[name] = float(value)
        except ValueError as error:
            raise ValueError(f"--budget is {item!r}; accepted: params=0.7 or state=0.5, a share of the dense model"
                             ) from error
    return budget


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shedder", description="Prune Mamba models so that removal pays.")
    parser.add_argument("--version", action="version", version=f"shedder {shedder.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str, example: str,
                model: bool = True, runs_model: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, epilog=f"example:\n  {example}",
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print JSON for a program")
        if model:
            sub.add_argument("model", type=Path, help="checkpoint folder: shedder, mamba_ssm or transformers format")
        if model and runs_model:
            sub.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
            sub.add_argument("--dtype", choices=DTYPES, default="fp32", help="default fp32")
        return sub

    command("inspect", _inspect, "Show the layout and the size of every layer.",
            "shedder inspect demo/models/mamba2", runs_model=False)

    prune = command("prune", _prune, "Search a plan (or take a finished one), compact the model and save it.",
                    "shedder prune demo/models/mamba2 --text demo/text/calibration.txt --budget params=0.7 --out small")
    prune.add_argument("--out", type=Path, required=True, help="folder for the compacted checkpoint")
    prune.add_argument("--plan", type=Path, help="apply this plan (JSON) instead of searching one")
    prune.add_argument("--text", type=Path, help="calibration text (UTF-8)")
    prune.add_argument("--budget", nargs="+", default=["params=0.7"], metavar="NAME=SHARE",
                       help="what may stay, as a share of the dense model (default params=0.7)")
    prune.add_argument("--axes", nargs="+", metavar="AXIS",
                       help="what may be removed: block ssm head state (Mamba-2), block ssm channel state (Mamba-1)")
    prune.add_argument("--log", type=Path, help="JSONL log of the search; a killed search continues from it")

    evaluate = command("eval", _eval, "Perplexity on a text.",
                       "shedder eval demo/models/mamba2 --text demo/text/heldout.txt")
    evaluate.add_argument("--text", type=Path, required=True, help="text (UTF-8)")
    evaluate.add_argument("--length", type=int, default=1024, help="tokens in a window (default 1024)")

    generate = command("generate", _generate, "Continue a prompt.",
                       "shedder generate demo/models/mamba2 --prompt 'The kernel' --tokens 200")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--tokens", type=int, default=100, help="new tokens (default 100)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default)")
    generate.add_argument("--seed", type=int, default=0)

    bench = command("bench", _bench, "Measure prefill and decode on this machine.",
                    "shedder bench demo/models/mamba2 --compare small --prompt 512")
    bench.add_argument("--compare", type=Path, nargs="+", default=[], help="more checkpoints, measured in the same run")
    bench.add_argument("--batch", type=int, default=1)
    bench.add_argument("--prompt", type=int, default=512, help="prompt tokens (default 512)")
    bench.add_argument("--tokens", type=int, default=32, help="decode steps measured (default 32)")

    command("doctor", _doctor, "Say what was built, what runs, and why not.", "python -m shedder doctor", model=False)
    return parser


# ---- printing


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))


def _print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
