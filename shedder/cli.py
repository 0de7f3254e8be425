"""The command line: inspect, prune, score, plan, eval, generate, bench, doctor. cli_prune has the pruner's.

Exit codes: 0 done, 1 the work failed (standard error says why), 2 the command line is wrong, 130 interrupted,
141 nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import shedder
from shedder import latency, native
from shedder.cli_prune import DTYPES, add_prune_commands, load_model, print_json, print_table, read_text
from shedder.evaluate import perplexity
from shedder.ops.backend import BACKENDS, unavailable
from shedder.prune.plan import describe_layout
from shedder.prune.size import layer_parameters, parameter_count, state_bytes


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("shedder: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:                             # e.g. `| head`; nothing more may go there, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if arguments.traceback:
            traceback.print_exc()
        print(f"shedder: {_reason(error)}", file=sys.stderr)
        return 1
    return 0


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"error: {error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, OSError)):
        return f"error: {error}"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return f"error: out of memory ({str(error).splitlines()[0] if str(error) else 'on this machine'})"
    return (f"error: this should not happen: {type(error).__name__}: {error}; "
            "please report it with what --traceback shows")


# ---- the commands


def _inspect(arguments: argparse.Namespace) -> None:
    model = shedder.load(arguments.model)
    config = model.config
    layers = [{"layer": index, "layout": describe_layout(layout, config.family),
               "parameters": layer_parameters(config, layout), "state_elements": layout.state_elements}
              for index, layout in enumerate(config.layers)]
    totals = {"parameters": parameter_count(config), "state_bytes_per_sequence": state_bytes(config)}
    if arguments.json:
        print_json({"model": str(arguments.model), "family": config.family, "d_model": config.d_model,
                     "vocab_size": config.vocab_size, "layers": layers, **totals})
        return
    print(f"{arguments.model}: {config.family}, d_model {config.d_model}, {len(layers)} layers, "
          f"vocabulary {config.vocab_size}")
    print_table(("layer", "layout", "parameters", "state elements"),
                 [(row["layer"], row["layout"], f"{row['parameters']:,}", f"{row['state_elements']:,}")
                  for row in layers])
    print(f"parameters {totals['parameters']:,}; "
          f"decode state {totals['state_bytes_per_sequence']:,} bytes per sequence")


def _eval(arguments: argparse.Namespace) -> None:
    model = load_model(arguments)
    tokens = torch.tensor(model.tokenizer.encode(read_text(arguments.text)))
    value = perplexity(model, tokens, length=arguments.length)
    if arguments.json:
        print_json({"model": str(arguments.model), "text": str(arguments.text), "tokens": tokens.numel(),
                     "perplexity": value})
        return
    print(f"perplexity {value:.4f} over {tokens.numel():,} tokens in windows of {arguments.length}")


def _generate(arguments: argparse.Namespace) -> None:
    model = load_model(arguments)
    prompt = model.tokenizer.encode(arguments.prompt)
    if not prompt:
        raise ValueError("--prompt is empty; give at least one character")
    ids = torch.tensor([prompt], device=arguments.device)
    out = model.generate(ids, arguments.tokens, temperature=arguments.temperature, seed=arguments.seed)
    text = model.tokenizer.decode(out[0].tolist())
    if arguments.json:
        print_json({"prompt": arguments.prompt, "text": text})
        return
    print(text)


def _bench(arguments: argparse.Namespace) -> None:
    models = {str(folder): load_model(arguments, folder) for folder in [arguments.model, *arguments.compare]}
    result = latency.compare(models, batch=arguments.batch, prompt=arguments.prompt, tokens=arguments.tokens)
    if arguments.json:
        print_json({name: one.to_json() for name, one in result.items()})
        return
    first = result[str(arguments.model)]
    print(f"{first.device}, {first.dtype}, {first.threads} threads, batch {first.batch}, prompt {first.prompt}")
    print_table(("model", "prefill ms", "decode ms/token", "prefill x", "decode x"),
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
        print_json(facts)
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, item in value.items():
                print(f"  {key}: {item}")
        else:
            print(f"{name}: {value if value is not None else 'none'}")


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
        sub.add_argument("--traceback", action="store_true", help="show where an error came from")
        if model:
            sub.add_argument("model", type=Path, help="checkpoint folder: shedder, mamba_ssm or transformers format")
        if model and runs_model:
            sub.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
            sub.add_argument("--dtype", choices=DTYPES, default="fp32", help="default fp32")
        return sub

    command("inspect", _inspect, "Show the layout and the size of every layer.",
            "shedder inspect demo/models/mamba2", runs_model=False)

    add_prune_commands(command)

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
