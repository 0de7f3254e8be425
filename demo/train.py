"""Trains the byte-level language models that ship with shedder, each on one GPU, in a given time.

    python demo/train.py --family mamba1 --data demo/data --out demo/out --minutes 9
    python demo/train.py --family mamba1 --data demo/data --out /tmp/smoke --steps 3 --batch 2 --length 256   # on a CPU

A run that was killed goes on where its last snapshot was when it is started again with the same --out.
paths.py says how logits and loss are computed.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # runs from a checkout too

from paths import CHUNK, PATHS, TrainingPath

from shedder.layout import LayerLayout, NormSegment, ScanLayout, SSDLayout
from shedder.nn import LanguageModel, ModelConfig

MEASURED_STEPS = 60                                     # the first of them compile; the rest give the step time
RESERVE_SECONDS = 30.0                                  # for the last evaluations, the sample and the files
MAX_CHECKPOINT_BYTES = 8_000_000
EVAL_BYTES = 1 << 20
FP32_NAMES = ("A_log", ".D", "dt_bias", "dt_proj.bias")


def model_config(family: str, d_model: int = 224, layers: int = 11) -> ModelConfig:
    """The shipped models: 3.78 M parameters (mamba1) and 3.76 M (mamba2), under 8 MB in bf16."""
    layout: LayerLayout
    if family == "mamba1":
        layout = ScanLayout(d_inner=2 * d_model, dstate=16, dt_rank=math.ceil(d_model / 16))
    else:
        heads = 2 * d_model // 32
        layout = SSDLayout(headdim=32, dstate=64, ngroups=1, head_to_group=(0,) * heads,
                           norm_segments=(NormSegment(32 * heads, 1e-5),))
    return ModelConfig(family=family, d_model=d_model, vocab_size=256, layers=(layout,) * layers)


def checkpoint_bytes(model: LanguageModel) -> int:
    """Bytes of the tensors once saved: bf16, but A_log, D and the bias of dt in fp32."""
    return sum(p.numel() * (4 if name.endswith(FP32_NAMES) else 2)
               for name, p in model.named_parameters())


# Optimisation.

def learning_rate(step: int, total: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine that is zero at the last step, `total - 1`."""
    warmup = min(warmup, total // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - 1 - warmup))))


def make_optimizer(model: LanguageModel, weight_decay: float) -> torch.optim.AdamW:
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.dim() == 2 and not name.endswith("A_log") else others).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=model.device.type == "cuda")


class Windows:
    """Random windows of a text that lies on the device."""

    def __init__(self, path: Path, device: torch.device, seed: int) -> None:
        self.text = torch.from_numpy(np.fromfile(path, dtype=np.uint8)).to(device)
        self.random = torch.Generator(device=device).manual_seed(seed)

    def draw(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        device = self.text.device
        starts = torch.randint(self.text.numel() - length, (batch, 1), generator=self.random, device=device)
        rows = self.text[starts + torch.arange(length + 1, device=device)].long()
        return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def heldout_loss(path: TrainingPath, text: Tensor, batch: int, length: int, removed: Sequence[int] = ()) -> float:
    """Mean loss per byte, in nats, over the consecutive windows of `text`."""
    rows = text[: (text.numel() - 1) // (batch * length) * batch * length + 1].unfold(0, length + 1, length).long()
    losses = [path.loss(part[:, :-1].contiguous(), part[:, 1:].contiguous(), removed) for part in rows.split(batch)]
    return torch.stack(losses).mean().item()


@torch.no_grad()
def sample_text(path: TrainingPath, prompt: str, count: int, temperature: float, seed: int) -> str:
    """`count` bytes after the prompt, by running the training path over all of the text so far."""
    device = path.embedding.device
    random = torch.Generator(device=device).manual_seed(seed)
    tokens = list(prompt.encode())
    for _ in range(count):
        padded = tokens + [0] * (-len(tokens) % path.multiple)
        logits = path.logits(torch.tensor([padded], device=device))[0, len(tokens) - 1]
        tokens.append(int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=random)))
    return bytes(tokens).decode(errors="replace")


# Snapshots: the weights, the moments of AdamW, the generator of windows, and how far the run is.

def save_snapshot(path: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, train: Windows,
                  progress: dict[str, Any]) -> None:
    tensors = {"random": train.random.get_state()}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"progress": json.dumps(progress)})
    os.replace(part, path)


@torch.no_grad()
def load_snapshot(path: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, train: Windows) -> dict[str, Any]:
    """Writes the snapshot into model, optimizer and train; returns its progress."""
    with safe_open(path, framework="pt") as file:
        train.random.set_state(file.get_tensor("random"))
        for name, parameter in model.named_parameters():
            weight = file.get_tensor(f"weight.{name}")
            if weight.shape != parameter.shape:
                raise ValueError(f"{path}: {name} is {tuple(weight.shape)}; this run has {tuple(parameter.shape)}. "
                                 "Give the options that it was started with, or another --out")
            parameter.copy_(weight)
            optimizer.state[parameter] = {key: file.get_tensor(f"{key}.{name}").to(parameter.device)
                                          for key in ("step", "exp_avg", "exp_avg_sq")}
        return json.loads(file.metadata()["progress"])


# Results.

def save(model: LanguageModel, folder: Path, provenance: dict[str, Any]) -> None:
    """The model as it ships: bf16, with A_log, D and the bias of dt in fp32."""
    shipped = LanguageModel(model.config, initialise=False)
    shipped.load_state_dict(model.state_dict())
    shipped = shipped.to(torch.bfloat16)
    shipped.tokenizer_name = "bytes"
    shipped.provenance = provenance
    try:
        shipped.save_pretrained(folder)
    except Exception as error:                          # the weights of a paid run must not be lost to a bug in saving
        print(f"save_pretrained failed ({error!r}); writing plain safetensors", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().contiguous() for name, p in shipped.named_parameters()}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model": model.config.to_json(), "provenance": provenance}))


def write_csv(curve: dict[str, Any], path: Path) -> None:
    """Bits per byte of the training batches and of the held-out text, one row per step that was looked at."""
    rows: dict[int, dict[str, str]] = {}
    for row in curve["train"]:
        rows.setdefault(row["step"], {})["training"] = f"{row['loss'] / math.log(2):.4f}"
    for row in curve["heldout"]:
        rows.setdefault(row["step"], {})["heldout"] = f"{row['bits_per_byte']:.4f}"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "bytes_read", "training_bits_per_byte", "heldout_bits_per_byte"])
        for step in sorted(rows):
            writer.writerow([step, step * curve["batch"] * curve["length"], rows[step].get("training", ""),
                             rows[step].get("heldout", "")])


def plot(curve: dict[str, Any], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    axis.plot([row["bytes"] / 1e6 for row in curve["train"]], [row["loss"] / math.log(2) for row in curve["train"]],
              linewidth=0.8, label="training batches")
    axis.plot([row["bytes"] / 1e6 for row in curve["heldout"]], [row["bits_per_byte"] for row in curve["heldout"]],
              "o-", markersize=3, label="held-out text")
    axis.set(xlabel="bytes of text read (millions)", ylabel="bits per byte", ylim=(1.0, 3.0))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(options: argparse.Namespace) -> dict[str, Any]:
    started = time.monotonic()
    deadline = started + 60 * options.minutes - RESERVE_SECONDS
    device = torch.device(options.device)
    is_cuda = device.type == "cuda"
    torch.manual_seed(options.seed)
    model = LanguageModel(model_config(options.family, options.d_model, options.layers)).to(device)
    size = checkpoint_bytes(model)
    if size + 16_384 > MAX_CHECKPOINT_BYTES:            # and the header of the file
        raise ValueError(f"d_model {options.d_model} and layers {options.layers} give a checkpoint of {size} bytes; "
                         f"accepted: up to {MAX_CHECKPOINT_BYTES}")
    path = PATHS[options.family](model, torch.bfloat16 if is_cuda else torch.float32)
    if is_cuda and options.compile:
        path.compile()
    train = Windows(options.data / "train.bin", device, options.seed)
    heldout_bytes = np.fromfile(options.data / "heldout.bin", dtype=np.uint8, count=options.eval_bytes + 1)
    heldout = torch.from_numpy(heldout_bytes).to(device)
    optimizer = make_optimizer(model, options.weight_decay)
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    gpu = torch.cuda.get_device_name(device) if is_cuda else "CPU"
    print(f"{gpu}, torch {torch.__version__}, {options.family}: {count:,} parameters, checkpoint {size:,} bytes, "
          f"{train.text.numel():,} bytes of text, batches of {options.batch} x {options.length}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    curve: dict[str, Any] = {"family": options.family, "gpu": gpu, "torch": torch.__version__, "parameters": count,
                             "checkpoint_bytes": size, "train_bytes": train.text.numel(), "batch": options.batch,
                             "length": options.length, "peak_lr": options.lr, "seed": options.seed,
                             "train": [], "heldout": []}

    def train_step(lr: float) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = path.loss(*train.draw(options.batch, options.length))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.detach()

    def evaluate(step: int) -> float:
        loss = heldout_loss(path, heldout, options.batch, options.length)
        seconds = time.monotonic() - started
        row = {"step": step, "bytes": step * options.batch * options.length, "loss": loss,
               "bits_per_byte": loss / math.log(2), "seconds": round(seconds, 1)}
        curve["heldout"].append(row)
        print(f"step {step}: held-out {row['bits_per_byte']:.4f} bits per byte, {seconds:.0f} s", flush=True)
        (options.out / "curve.json").write_text(json.dumps(curve, indent=1))
        return loss

    unknown = 10**9                                     # steps, until the time of one is known
    step, total = 0, options.steps or unknown
    snapshot = options.out / "snapshot.safetensors"
    same_run = [options.family, options.d_model, options.layers, options.batch, options.length, options.lr,
                options.weight_decay, options.seed, options.steps, options.minutes]
    if snapshot.exists():
        progress = load_snapshot(snapshot, model, optimizer, train)
        if progress["run"] != same_run:
            raise ValueError(f"{snapshot} is of a run with {progress['run']}; this one has {same_run}. "
                             "Give the options that it was started with, or another --out")
        step, total, curve = progress["step"], progress["total"], progress["curve"]
        started -= progress["seconds"]
        deadline -= progress["seconds"]
        print(f"going on from step {step} of {snapshot}", flush=True)

    first = step                                        # of this process
    loss_sum, since, timed_from, saved_at = torch.zeros((), device=device), 0, 0.0, time.monotonic()
    while step < total:
        lr = learning_rate(step, total, options.lr)
        try:
            loss = train_step(lr)
        except Exception as error:
            if step > first or not path.is_compiled:
                raise
            print(f"torch.compile failed, going on without it: {str(error)[:800]}", flush=True)
            path.eager()
            loss = train_step(lr)
        step += 1
        loss_sum += loss
        since += 1
        # Compiling takes seconds of the first step; the number of steps is fixed once the step time is known.
        if step - first in (1, MEASURED_STEPS // 3):
            if step - first > 1 and not options.steps:
                evaluate(step)                          # compiles the forward without gradients before time is taken
            elif is_cuda:
                torch.cuda.synchronize()
            print(f"step {step}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
            timed_from = time.monotonic()
        if step - first == MEASURED_STEPS and total == unknown:
            loss.item()
            now = time.monotonic()
            step_time = (now - timed_from) / (MEASURED_STEPS - MEASURED_STEPS // 3)
            total = step + max(1, int(0.97 * (deadline - now) / step_time))
            megabytes = options.batch * options.length / 1e6
            print(f"{1e3 * step_time:.1f} ms a step, {megabytes / step_time:.2f} MB/s: {total} steps, "
                  f"{total * megabytes:.0f} MB of text", flush=True)
        if step % options.log_every == 0 or step == total:
            mean = (loss_sum / since).item()
            if not math.isfinite(mean):
                raise RuntimeError(f"the loss is {mean} at step {step}")
            seconds = time.monotonic() - started
            curve["train"].append({"step": step, "bytes": step * options.batch * options.length, "loss": mean,
                                   "lr": lr, "seconds": round(seconds, 1)})
            print(f"step {step}/{total}: loss {mean:.4f} ({mean / math.log(2):.3f} bits), lr {lr:.2e}, "
                  f"{seconds:.0f} s", flush=True)
            loss_sum.zero_()
            since = 0
            if not options.steps and step - first > MEASURED_STEPS:     # a machine that slows down ends in time too
                now = time.monotonic()
                pace = (now - timed_from) / (step - first - MEASURED_STEPS // 3)
                if now + 0.99 * pace * (total - step) > deadline:
                    total = max(step + 1, step + int((deadline - now) / pace))
            if time.monotonic() - saved_at > options.save_every:
                saved_at = time.monotonic()
                save_snapshot(snapshot, model, optimizer, train,
                              {"run": same_run, "step": step, "total": total, "seconds": saved_at - started,
                               "curve": curve})
        if total > 10 and step < total and step % max(1, total // 12) == 0:
            evaluate(step)

    final = evaluate(step)
    curve["lr_at_end"] = learning_rate(step - 1, total, options.lr)
    provenance = {"made_by": "demo/train.py", "gpu": gpu, "steps": step,
                  "bytes_read": step * options.batch * options.length,
                  "heldout_bits_per_byte": round(final / math.log(2), 4), "seed": options.seed}
    save(model, options.out / "model", provenance)
    rises = {index: math.exp(heldout_loss(path, heldout, options.batch, options.length, (index,)) - final) - 1
             for index in range(len(path.blocks))}
    curve["perplexity_rise_without_block"] = {str(index): rise for index, rise in rises.items()}
    for index, rise in rises.items():
        print(f"without block {index}: held-out perplexity {100 * rise:+.1f} %", flush=True)
    weakest = min(list(rises)[1:-1] or list(rises), key=lambda index: rises[index])
    verdict = "at least" if rises[weakest] >= 0.05 else "BELOW"
    print(f"weakest middle block: {weakest}, {100 * rises[weakest]:+.1f} % ({verdict} 5 %)", flush=True)
    curve["seconds"] = round(time.monotonic() - started, 1)
    curve["steps"], curve["bytes"] = step, step * options.batch * options.length
    curve["heldout_bits_per_byte"] = final / math.log(2)
    (options.out / "curve.json").write_text(json.dumps(curve, indent=1))
    write_csv(curve, options.out / "curve.csv")
    plot(curve, options.out / "curve.png")
    snapshot.unlink(missing_ok=True)
    if options.sample:
        path.eager()
        text = sample_text(path, "The kernel is a program that ", options.sample, 0.7, options.seed)
        (options.out / "sample.txt").write_text(text)
        print(f"--- sample\n{text}\n---", flush=True)
    print(f"done in {time.monotonic() - started:.0f} s: {final / math.log(2):.4f} bits per byte", flush=True)
    return curve


def main(arguments: list[str] | None = None) -> int:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(PATHS), default="mamba2")
    parser.add_argument("--data", type=Path, default=here / "data", help="folder of train.bin and heldout.bin")
    parser.add_argument("--out", type=Path, default=here / "out", help="folder of model/, the curve and the sample")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything (default: 9)")
    parser.add_argument("--steps", type=int, help="a fixed number of steps instead of --minutes")
    parser.add_argument("--batch", type=int, default=64, help="windows a step")
    parser.add_argument("--length", type=int, default=1024, help=f"bytes per window, a multiple of {CHUNK}")
    parser.add_argument("--d-model", type=int, default=224)
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--lr", type=float, default=3e-3, help="at the end of the warm-up")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--eval-bytes", type=int, default=EVAL_BYTES)
    parser.add_argument("--save-every", type=float, default=60.0, help="seconds between snapshots")
    parser.add_argument("--sample", type=int, default=300, help="bytes to generate at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile on a GPU")
    options = parser.parse_args(arguments)
    if options.length % CHUNK or options.length < CHUNK:
        parser.error(f"--length is {options.length}; accepted: a multiple of {CHUNK}")
    if options.eval_bytes < options.batch * options.length:
        parser.error(f"--eval-bytes is {options.eval_bytes}; accepted: at least batch x length = "
                     f"{options.batch * options.length}")
    run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
