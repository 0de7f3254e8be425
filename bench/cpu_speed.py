"""Whole models on the CPU against transformers' CPU path: prefill and decode of a 130M Mamba-1 and Mamba-2.

    python -m bench.cpu_speed                        # prints a table, writes bench/results/cpu/model.json
    python -m bench.cpu_speed --models mamba2 --dtypes bf16 --repeats 3 --no-write

Both sides hold the same random weights (one checkpoint, read by both), tie the embedding, keep the logits of the
last token only, and are timed in turns in one process; a time is the median of its side. Speed is printed only
after the logits of prefill and of decode steps have been found right.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

import shedder
from bench import results
from shedder import native

MODELS: dict[str, tuple[Any, Any]] = {
    # Weights of std 0.1, the default, amplify rounding until bf16 logits are noise on both sides; 0.02 lets them be
    # compared.
    "mamba1": (MambaForCausalLM, MambaConfig(hidden_size=768, num_hidden_layers=24, state_size=16, vocab_size=50280,
                                             initializer_range=0.02, tie_word_embeddings=True)),
    "mamba2": (Mamba2ForCausalLM, Mamba2Config(hidden_size=768, num_hidden_layers=24, head_dim=64, num_heads=24,
                                               state_size=128, n_groups=1, vocab_size=50288, initializer_range=0.02,
                                               tie_word_embeddings=True))}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REQUIRED = {("prefill", "fp32"): 2.0, ("prefill", "bf16"): 3.0, ("decode", "fp32"): 1.5, ("decode", "bf16"): 1.5}
PROMPT = 512
CHECKED_STEPS = 4
FP32_TOLERANCE = 1e-4                                  # RMS difference of logits over their RMS
BF16_TOLERANCE = 1.1                                   # our error over the peer's, both against the peer in fp32


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def in_turns(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of each, after one call to warm up."""
    ours(), theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.flatten().double(), b.flatten().double()
    return ((a - b).square().mean().sqrt() / b.square().mean().sqrt()).item()


def randomise(model: torch.nn.Module) -> None:
    """Decay and step size as trained models have them: transformers leaves dt alike for all heads."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.copy_(torch.log(torch.rand_like(parameter) * 15 + 1))
            elif name.endswith(("dt_bias", "dt_proj.bias")):
                dt = torch.exp(torch.rand_like(parameter) * 4.6 - 6.9)
                parameter.copy_(dt + torch.log(-torch.expm1(-dt)))


Logits = list[torch.Tensor]


@torch.no_grad()
def their_logits(model: Any, ids: torch.Tensor) -> tuple[Logits, Any]:
    """Logits after the prompt and after each of the steps that follow it; and the cache."""
    out = model(ids[:, :PROMPT], use_cache=True, logits_to_keep=1)
    steps = [model(ids[:, t:t + 1], cache_params=out.cache_params, use_cache=True).logits
             for t in range(PROMPT, ids.shape[1])]
    return [out.logits, *steps], out.cache_params


@torch.no_grad()
def our_logits(model: Any, ids: torch.Tensor) -> tuple[Logits, Any]:
    state = model.allocate_state(ids.shape[0])
    first = model(ids[:, :PROMPT], state, last_only=True)
    return [first, *(model(ids[:, t:t + 1], state) for t in range(PROMPT, ids.shape[1]))], state


def errors(logits: Logits, exact: Logits) -> dict[str, float]:
    each = [difference(got, want) for got, want in zip(logits, exact, strict=True)]
    return {"prefill": each[0], "decode": max(each[1:])}


@torch.no_grad()
def measure(name: str, dtype: str, folder: Path, exact: Logits, ids: torch.Tensor, repeats: int,
            steps: int) -> list[results.Row]:
    ours = shedder.load(folder, dtype=DTYPES[dtype])
    theirs = MODELS[name][0].from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    prompt, token = ids[:, :PROMPT], ids[:, :1]
    mine, state = our_logits(ours, ids)
    peers, cache = their_logits(theirs, ids)
    error, peer_error = errors(mine, exact), errors(peers, exact)

    def our_prefill() -> torch.Tensor:
        return ours(prompt, ours.allocate_state(1), last_only=True)

    def their_prefill() -> torch.Tensor:
        return theirs(prompt, use_cache=True, logits_to_keep=1).logits

    def our_step() -> torch.Tensor:
        return ours(token, state)

    def their_step() -> torch.Tensor:
        return theirs(token, cache_params=cache, use_cache=True, logits_to_keep=1).logits

    rows = []
    parameter_bytes = sum(p.numel() * p.element_size() for p in ours.parameters())
    for op, pair, count in (("prefill", (our_prefill, their_prefill), repeats),
                            ("decode", (our_step, their_step), steps)):
        limit = FP32_TOLERANCE if dtype == "fp32" else BF16_TOLERANCE * peer_error[op]
        if not error[op] <= limit:
            raise SystemExit(f"{name} {dtype} {op}: logits are off by {error[op]:.2g} of their RMS; accepted: up to "
                             f"{limit:.2g}; no speed is shown")
        our_s, peer_s = in_turns(*pair, count)
        required = REQUIRED[op, dtype]
        print(f"{name:8} {dtype:5} {op:8} ours {1e3 * our_s:9.2f} ms   transformers {1e3 * peer_s:9.2f} ms   "
              f"{peer_s / our_s:6.2f}x (at least {required}x: {'yes' if peer_s >= required * our_s else 'NO'})   "
              f"error {error[op]:.1e}, theirs {peer_error[op]:.1e}", flush=True)
        rows.append({"op": op, "pass": "fwd" if op == "prefill" else "step",
                     "shape": {"B": 1, "L": PROMPT}, "layout": "BLD", "dtype": dtype, "state_dtype": "fp32",
                     "model": f"{name}-130m", "plan": "dense", "clock": "step", "backend": "cpu",
                     "algorithm": f"eager, {native.cpu_isa()}, {torch.get_num_threads()} threads", "dispatch": "auto",
                     "ours_us": 1e6 * our_s, "dense_us": None, "peer": "transformers", "peer_us": 1e6 * peer_s,
                     "bytes": parameter_bytes, "floor_us": None, "error": error[op],
                     "peer_error": peer_error[op], "note": "errors are those of the logits against the peer in fp32"})
    return rows


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def clock_mhz() -> float:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []:
        if line.startswith("cpu MHz"):
            return float(line.split(":", 1)[1])
    return 0.0


def copy_rate() -> float:
    """TB/s read and written by a copy that no cache holds."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / min(seconds(lambda: target.copy_(source)) for _ in range(5)) / 1e12


def write(rows: list[results.Row]) -> Path:
    """bench/results/cpu/model.json: this run's rows, and older rows of what it did not measure."""
    path = results.RESULTS / "cpu" / "model.json"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                            cwd=results.ROOT).stdout.strip()
    now = datetime.datetime.now(datetime.timezone.utc)
    name = now.strftime("r%Y%m%d%H%M%S")
    run = {"gpu": f"cpu: {processor()}", "clock_mhz": clock_mhz(), "copy_tb_s": copy_rate(), "commit": commit,
           "source_hash": results.source_hash(), "date": now.isoformat(timespec="seconds"),
           "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
    rows = [{"run": name, **row} for row in rows]
    old = results.load(path) if path.exists() else {"runs": {}, "rows": []}
    new = {results.identity(row) for row in rows}
    rows = [row for row in old["rows"] if results.identity(row) not in new] + rows
    runs = {key: value for key, value in {**old["runs"], name: run}.items() if any(row["run"] == key for row in rows)}
    results.check_results({"runs": runs, "rows": rows}, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(f'{{"runs": {json.dumps(runs, indent=1)},\n"rows": [\n{lines}\n]}}\n')
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="prefills of each side (default 5)")
    parser.add_argument("--steps", type=int, default=30, help="decode steps of each side (default 30)")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    rows: list[results.Row] = []
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            cls, config = MODELS[name]
            model = cls(config)
            randomise(model)
            model.save_pretrained(folder)
            ids = torch.randint(0, config.vocab_size, (1, PROMPT + CHECKED_STEPS))
            exact, _ = their_logits(model.eval(), ids)
            del model
            for dtype in options.dtypes:
                rows += measure(name, dtype, Path(folder), exact, ids, options.repeats, options.steps)
    if not options.no_write:
        print(f"wrote {write(rows)}")


if __name__ == "__main__":
    main()
