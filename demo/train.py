"""Trains the byte-level Mamba-2 language model that ships with shedder, on one GPU, in a given time.

    python demo/train.py --data demo/data --out demo/out --minutes 9
    python demo/train.py --data demo/data --out /tmp/smoke --steps 3 --batch 2 --length 256     # on a CPU

The training path is a function of LanguageModel's parameters in plain PyTorch: the SSD in its
chunked form (matrix products that autograd differentiates), the convolution as shifted products,
so that torch.compile fuses everything between the matrix products. tests/test_demo_data.py holds its
logits against LanguageModel's own. Weights are fp32, matrix products bf16, the residual fp32.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # runs from a checkout too

from shedder.layout import NormSegment, SSDLayout
from shedder.nn import LanguageModel, ModelConfig

CHUNK = 64                                              # Q of the chunked SSD
MEASURED_STEPS = 60                                     # the first of them compile; the rest give the step time
RESERVE_SECONDS = 30.0                                  # for the last evaluations, the sample and the files
MAX_CHECKPOINT_BYTES = 8_000_000
EVAL_BYTES = 1 << 20


def model_config(d_model: int = 224, layers: int = 11, headdim: int = 32, dstate: int = 64) -> ModelConfig:
    """The shipped model: 3.76 M parameters, 7.52 MB in bf16."""
    heads = 2 * d_model // headdim
    layout = SSDLayout(headdim=headdim, dstate=dstate, ngroups=1, head_to_group=(0,) * heads,
                       norm_segments=(NormSegment(heads * headdim, 1e-5),))
    return ModelConfig(family="mamba2", d_model=d_model, vocab_size=256, layers=(layout,) * layers)


def checkpoint_bytes(model: LanguageModel) -> int:
    """Bytes of the tensors once saved: bf16, but A_log, D and dt_bias in fp32."""
    return sum(p.numel() * (4 if name.endswith(("A_log", ".D", "dt_bias")) else 2)
               for name, p in model.named_parameters())


# The training path.

def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def chunked_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int) -> Tensor:
    """y (B, L, H, P) of shedder.reference.ssd with one group, dt as it acts, L a multiple of `chunk`.

        s[i]    = sum of dt A up to i, within the chunk
        y[i]    = sum_{j <= i} exp(s[i] - s[j]) (C[i].B[j]) dt[j] x[j]  +  exp(s[i]) C[i].h
        h'      = exp(s[Q]) h + sum_j exp(s[Q] - s[j]) dt[j] x[j] B[j]^T            h of the chunk before
    """
    batch, length, heads, headdim = x.shape
    count, dstate = length // chunk, B.shape[-1]
    x = x.reshape(batch, count, chunk, heads, headdim)
    B, C = (M.reshape(batch, count, chunk, dstate) for M in (B, C))
    dt = dt.reshape(batch, count, chunk, heads).transpose(2, 3)                     # (B, c, H, Q), fp32
    s = torch.cumsum(dt * A[:, None], dim=-1)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    decay = (s[..., :, None] - s[..., None, :]).masked_fill(later, -torch.inf).exp()
    scores = (C @ B.transpose(-1, -2)).float()                                      # (B, c, Q, Q)
    weights = (scores[:, :, None] * decay * dt[..., None, :]).to(x.dtype)           # (B, c, H, Q, Q)
    inside = weights @ x.transpose(2, 3)                                            # (B, c, H, Q, P)

    to_end = ((s[..., -1:] - s).exp() * dt).transpose(2, 3)                         # (B, c, Q, H)
    gathered = (x * to_end[..., None]).to(x.dtype).flatten(3).transpose(2, 3) @ B   # (B, c, H P, N)
    total = torch.cumsum(s[..., -1], dim=1).transpose(1, 2)                         # (B, H, c), to a chunk's end
    before = F.pad(total, (1, 0))[..., :-1]
    not_before = torch.ones(count, count, dtype=torch.bool, device=x.device).triu()
    passing = (before[..., :, None] - total[..., None, :]).masked_fill(not_before, -torch.inf).exp()
    per_head = gathered.reshape(batch, count, heads, headdim * dstate).transpose(1, 2)
    h = (passing.to(x.dtype) @ per_head).transpose(1, 2).reshape(batch, count, heads * headdim, dstate)
    across = (C @ h.transpose(-1, -2)).reshape(batch, count, chunk, heads, headdim)
    y = inside.transpose(2, 3).float() + across.float() * s.exp().transpose(2, 3)[..., None]
    return y.reshape(batch, length, heads, headdim)


def block_forward(residual: Tensor, norm: Tensor, in_proj: Tensor, conv: Tensor, conv_bias: Tensor, dt_bias: Tensor,
                  A_log: Tensor, D: Tensor, gated_norm: Tensor, out_proj: Tensor, headdim: int, dstate: int,
                  eps: float, chunk: int, dtype: torch.dtype) -> Tensor:
    """One Mamba-2 block on the fp32 residual (B, L, d_model); matrix products in `dtype`."""
    heads = dt_bias.shape[0]
    d_inner, rows = heads * headdim, in_proj.shape[0]
    in_proj = F.pad(in_proj, (0, 0, 0, -rows % 8))      # aligned rows of the product
    hidden = F.linear(rms_norm(residual, norm, eps).to(dtype), in_proj.to(dtype))
    conv_channels = d_inner + 2 * dstate
    z, xBC, dt = hidden[..., :rows].split([d_inner, conv_channels, heads], dim=-1)
    width, length = conv.shape[-1], xBC.shape[1]
    past = F.pad(xBC, (0, 0, width - 1, 0)).float()
    xBC = F.silu(sum((past[:, k:k + length] * conv[:, 0, k] for k in range(width)), start=conv_bias)).to(dtype)
    x, B, C = xBC.split([d_inner, dstate, dstate], dim=-1)
    x = x.unflatten(-1, (heads, headdim))
    step = F.softplus(dt.float() + dt_bias)
    y = chunked_ssd(x, step, -A_log.exp(), B, C, chunk) + D[:, None] * x.float()
    y = rms_norm(y.flatten(2) * F.silu(z.float()), gated_norm, eps)
    return residual + F.linear(y.to(dtype), out_proj.to(dtype)).float()


BLOCK_PARAMETERS = ("norm.weight", "mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.conv1d.bias", "mixer.dt_bias",
                    "mixer.A_log", "mixer.D", "mixer.norm.weight", "mixer.out_proj.weight")


class TrainingPath:
    """Logits of a LanguageModel of equal one-group SSD layers, by the functions above."""

    def __init__(self, model: LanguageModel, dtype: torch.dtype, chunk: int = CHUNK) -> None:
        config = model.config
        layouts = [layout for layout in config.layers if isinstance(layout, SSDLayout)]
        if len(layouts) != len(config.layers) or any(
                layout.ngroups != 1 or len(layout.norm_segments) != 1 or layout.norm_segments[0].eps != config.norm_eps
                for layout in layouts) or not config.tie_embeddings:
            raise ValueError("model has layers that the training path does not know; accepted: SSD layers of one group "
                             "with one norm segment of the model's eps, and tied embeddings")
        parameters = dict(model.named_parameters())
        self.blocks = [[parameters[f"backbone.layers.{index}.{name}"] for name in BLOCK_PARAMETERS]
                       for index in range(len(layouts))]
        self.embedding = parameters["backbone.embedding.weight"]
        self.norm = parameters["backbone.norm_f.weight"]
        self.headdim, self.dstate, self.eps = layouts[0].headdim, layouts[0].dstate, config.norm_eps
        self.dtype, self.chunk = dtype, chunk
        self.block: Callable[..., Tensor] = block_forward
        self.loss_of: Callable[..., Tensor] = head_loss

    def compile(self) -> None:
        """One graph for a block and one for the head: all blocks share it, so that compiling takes seconds."""
        self.block = torch.compile(block_forward, dynamic=False)
        self.loss_of = torch.compile(head_loss, dynamic=False)

    def eager(self) -> None:
        self.block, self.loss_of = block_forward, head_loss

    def hidden(self, tokens: Tensor, removed: Sequence[int] = ()) -> Tensor:
        residual = F.embedding(tokens, self.embedding).float()
        for index, parameters in enumerate(self.blocks):
            if index not in removed:
                residual = self.block(residual, *parameters, self.headdim, self.dstate, self.eps, self.chunk,
                                      self.dtype)
        return residual

    def logits(self, tokens: Tensor) -> Tensor:
        return head_logits(self.hidden(tokens), self.norm, self.embedding, self.eps, self.dtype)

    def loss(self, tokens: Tensor, targets: Tensor, removed: Sequence[int] = ()) -> Tensor:
        return self.loss_of(self.hidden(tokens, removed), self.norm, self.embedding, self.eps, self.dtype, targets)


def head_logits(residual: Tensor, norm: Tensor, embedding: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return F.linear(rms_norm(residual, norm, eps).to(dtype), embedding.to(dtype)).float()


def head_loss(residual: Tensor, norm: Tensor, embedding: Tensor, eps: float, dtype: torch.dtype,
              targets: Tensor) -> Tensor:
    return F.cross_entropy(head_logits(residual, norm, embedding, eps, dtype).flatten(0, 1), targets.flatten())


# Optimisation.

def learning_rate(step: int, total: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine that is zero at the last step, `total - 1`."""
    warmup = min(warmup, total // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - 1 - warmup))))


def make_optimizer(model: LanguageModel, weight_decay: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
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
        padded = tokens + [0] * (-len(tokens) % path.chunk)
        logits = path.logits(torch.tensor([padded], device=device))[0, len(tokens) - 1]
        tokens.append(int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=random)))
    return bytes(tokens).decode(errors="replace")


# Results.

def save(model: LanguageModel, folder: Path, provenance: dict[str, Any]) -> None:
    """The model as it ships: bf16, with A_log, D and dt_bias in fp32."""
    shipped = LanguageModel(model.config, initialise=False)
    shipped.load_state_dict(model.state_dict())
    shipped = shipped.to(torch.bfloat16)
    shipped.tokenizer_name = "bytes"
    shipped.provenance = provenance
    try:
        shipped.save_pretrained(folder)
    except Exception as error:                          # the weights of a paid run must not be lost to a bug in saving
        print(f"save_pretrained failed ({error!r}); writing plain safetensors", flush=True)
        from safetensors.torch import save_file
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().contiguous() for name, p in shipped.named_parameters()}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model": model.config.to_json(), "provenance": provenance}))


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
    model = LanguageModel(model_config(options.d_model, options.layers)).to(device)
    size = checkpoint_bytes(model)
    if size + 16_384 > MAX_CHECKPOINT_BYTES:            # and the header of the file
        raise ValueError(f"d_model {options.d_model} and layers {options.layers} give a checkpoint of {size} bytes; "
                         f"accepted: up to {MAX_CHECKPOINT_BYTES}")
    path = TrainingPath(model, torch.bfloat16 if is_cuda else torch.float32)
    if is_cuda and options.compile:
        path.compile()
    train = Windows(options.data / "train.bin", device, options.seed)
    heldout_bytes = np.fromfile(options.data / "heldout.bin", dtype=np.uint8, count=options.eval_bytes + 1)
    heldout = torch.from_numpy(heldout_bytes).to(device)
    optimizer = make_optimizer(model, options.weight_decay)
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    gpu = torch.cuda.get_device_name(device) if is_cuda else "CPU"
    print(f"{gpu}, torch {torch.__version__}: {count:,} parameters, checkpoint {size:,} bytes, "
          f"{train.text.numel():,} bytes of text, batches of {options.batch} x {options.length}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    curve: dict[str, Any] = {"gpu": gpu, "torch": torch.__version__, "parameters": count, "checkpoint_bytes": size,
                             "train_bytes": train.text.numel(), "batch": options.batch, "length": options.length,
                             "peak_lr": options.lr, "seed": options.seed, "train": [], "heldout": []}

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

    # Compiling takes seconds of the first step; the number of steps is fixed once the step time is known.
    total = options.steps or 10**9
    step, loss_sum, since, measured_from = 0, torch.zeros((), device=device), 0, 0.0
    while step < total:
        lr = learning_rate(step, total, options.lr)
        try:
            loss = train_step(lr)
        except Exception as error:
            if step > 0 or path.block is block_forward:
                raise
            print(f"torch.compile failed, going on without it: {str(error)[:800]}", flush=True)
            path.eager()
            loss = train_step(lr)
        step += 1
        loss_sum += loss
        since += 1
        if step in (1, MEASURED_STEPS // 3):
            if step > 1 and not options.steps:
                evaluate(step)                          # compiles the forward without gradients before time is taken
            elif is_cuda:
                torch.cuda.synchronize()
            print(f"step {step}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
            measured_from = time.monotonic()
        if step == MEASURED_STEPS and not options.steps:
            loss.item()
            now = time.monotonic()
            step_time = (now - measured_from) / (MEASURED_STEPS - MEASURED_STEPS // 3)
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
            if not options.steps and step > MEASURED_STEPS:     # a machine that slows down ends in time too
                now = time.monotonic()
                pace = (now - measured_from) / (step - MEASURED_STEPS // 3)
                if now + 0.99 * pace * (total - step) > deadline:
                    total = max(step + 1, step + int((deadline - now) / pace))
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
    plot(curve, options.out / "curve.png")
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
    parser.add_argument("--data", type=Path, default=here / "data", help="folder of train.bin and heldout.bin")
    parser.add_argument("--out", type=Path, default=here / "out", help="folder of model/, the curve and the sample")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything (default: 9)")
    parser.add_argument("--steps", type=int, help="a fixed number of steps instead of --minutes")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024, help=f"bytes per window, a multiple of {CHUNK}")
    parser.add_argument("--d-model", type=int, default=224)
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--lr", type=float, default=3e-3, help="at the end of the warm-up")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--eval-bytes", type=int, default=EVAL_BYTES)
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
