"""The main job in one run: load a trained model, shed part of it, check it, and see it run faster."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import matplotlib
import torch
from tqdm import tqdm

import shedder
from shedder import latency, report, report_html
from shedder.evaluate import perplexity
from shedder.nn import LanguageModel
from shedder.prune import masked, parameter_count, prefix, state_bytes
from shedder.prune.calibration import calibration_of
from shedder.prune.statistics import DenseStatistics, dense_statistics

matplotlib.use("Agg")                                   # a file, no window
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
PROMPT = "The kernel "
POINTS = 12                                             # of the plot


def main() -> None:
    arguments = _arguments()
    started = time.perf_counter()
    device = torch.device(arguments.device)
    calibration = (HERE / "text" / "calibration.txt").read_text(encoding="utf-8")
    folder = arguments.model or HERE / "models" / arguments.family
    dense = shedder.load(folder, device=device, dtype=torch.float32)
    heldout = torch.tensor(dense.tokenizer.encode((HERE / "text" / "heldout.txt").read_text(encoding="utf-8")))
    print(f"1. loaded {folder}, {dense.config.family}: {parameter_count(dense.config):,} parameters, "
          f"{len(dense.layers)} layers, on {_name(device)}")

    print(f"2. searching what to remove until {arguments.params:.0%} of the parameters are left")
    plan = shedder.search(dense, calibration, budget={"params": arguments.params},
                          bundle=0.15, rescore=3, sequences=4, length=256)
    statistics = dense_statistics(dense, calibration_of(dense, calibration, plan.provenance))
    small = shedder.compact(dense, plan, statistics)
    arguments.out.mkdir(parents=True, exist_ok=True)
    plan.to_json(arguments.out / "plan.json")
    print(plan.explain(dense.config))

    error = compacted_against_masked(folder, plan, heldout[:200])
    print(f"3. compacted equals the dense model with masks: largest difference of logits {error:.1e} in float64")
    if error > 1e-10:
        raise SystemExit("the compacted model is not the masked one; this is a defect of shedder, please report it")

    print("4. measuring on this machine")
    points = trajectory(dense, plan, statistics, heldout)
    models = {"dense": dense, "compacted": small}
    times = latency.compare(models, prompt=512, tokens=64, rounds=9)
    quality = {name: perplexity(model, heldout, length=512) for name, model in models.items()}
    _print_table(models, times, quality)
    done = report.collect(f"{folder.name} pruned to {arguments.params:.0%} of its parameters", dense.config, plan,
                          perplexity=(quality["dense"], quality["compacted"]), latency=list(times.values()))
    report_html.write(done, arguments.out / "report.html")
    plot(points, arguments.out / "search.png", _name(device))
    (arguments.out / "report.json").write_text(json.dumps(
        {"device": _name(device), "points": points, "perplexity": quality,
         "latency": {name: one.to_json() for name, one in times.items()}}, indent=1), encoding="utf-8")

    small.save_pretrained(arguments.out / "compacted")
    print(f"5. saved: checkpoint {arguments.out / 'compacted'}, plan {arguments.out / 'plan.json'}, "
          f"plot {arguments.out / 'search.png'}, report {arguments.out / 'report.html'}")

    print("6. what they write")
    reloaded = shedder.load(arguments.out / "compacted", device=device)
    for name, model in {"dense": dense, "compacted, loaded again": reloaded}.items():
        ids = torch.tensor([dense.tokenizer.encode(PROMPT)], device=device)
        out = model.generate(ids, 200, temperature=0.7, seed=1)
        print(f"--- {name}\n{dense.tokenizer.decode(out[0].tolist())}")
    print(f"done in {time.perf_counter() - started:.0f} s")


def compacted_against_masked(folder: Path, plan: shedder.Plan, tokens: torch.Tensor) -> float:
    """Largest difference of logits between the model compacted with exact norms and the dense one with masks."""
    plan = replace(plan, norm_repair="exact", repairs=())
    dense = shedder.load(folder, dtype=torch.float64)
    small = shedder.compact(dense, plan)
    with torch.no_grad(), masked(dense, plan):
        expected = dense(tokens[None])
    with torch.no_grad():
        return (small(tokens[None]) - expected).abs().max().item()


def trajectory(dense: LanguageModel, plan: shedder.Plan, statistics: DenseStatistics, heldout: torch.Tensor
               ) -> list[dict[str, float]]:
    """Latency and held-out perplexity at about a dozen points of the search, the first and the last among them."""
    points = []
    last = len(plan.provenance["trajectory"]) - 1
    steps = sorted({round(last * share / POINTS) for share in range(POINTS + 1)})
    for step in tqdm(steps, desc="points of the search"):
        model = shedder.compact(dense, prefix(plan, step), statistics)
        one = latency.measure(model, prompt=512, tokens=24, repeats=5)
        points.append({"step": step, "params": parameter_count(model.config), "prefill_ms": one.prefill_ms,
                       "decode_ms": one.decode_ms, "perplexity": perplexity(model, heldout[:8193], length=512)})
    return points


def plot(points: list[dict[str, float]], path: Path, device: str) -> None:
    """Latency against perplexity along the search, prefill and decode side by side."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axis, key, title in zip(axes, ("prefill_ms", "decode_ms"), ("prefill of 512 bytes", "decode, one byte"),
                                strict=True):
        axis.plot([point[key] for point in points], [point["perplexity"] for point in points], "o-", markersize=4)
        axis.annotate("dense", (points[0][key], points[0]["perplexity"]), textcoords="offset points", xytext=(4, 6))
        axis.annotate("compacted", (points[-1][key], points[-1]["perplexity"]), textcoords="offset points",
                      xytext=(4, 6))
        axis.set(title=title, xlabel=f"ms on {device}", ylabel="held-out perplexity per byte")
        axis.grid(alpha=0.3)
    figure.suptitle("Latency against perplexity along the search: every point is a compacted model")
    figure.savefig(path, dpi=120)


def _print_table(models: dict[str, LanguageModel], times: dict[str, latency.Latency],
                 quality: dict[str, float]) -> None:
    dense = times["dense"]
    print(f"{'':10} {'parameters':>11} {'state bytes':>12} {'perplexity':>11} {'prefill ms':>11} {'decode ms':>10} "
          f"{'prefill x':>10} {'decode x':>9}")
    for name, model in models.items():
        one = times[name]
        print(f"{name:10} {parameter_count(model.config):>11,} {state_bytes(model.config):>12,} {quality[name]:>11.3f} "
              f"{one.prefill_ms:>11.2f} {one.decode_ms:>10.3f} {dense.prefill_ms / one.prefill_ms:>10.2f} "
              f"{dense.decode_ms / one.decode_ms:>9.2f}")
    print("state bytes per sequence; perplexity per byte of held-out text; prefill of 512 bytes; decode per byte")


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--family", choices=("mamba1", "mamba2"), default="mamba2",
                        help="which of the shipped models (default mamba2)")
    parser.add_argument("--model", type=Path, help="another checkpoint folder")
    parser.add_argument("--params", type=float,
                        help="share of the parameters to keep (default 0.65; mamba1, which bears less, 0.8)")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder for what it makes (default demo/out)")
    arguments = parser.parse_args()
    if arguments.params is None:
        arguments.params = 0.8 if arguments.family == "mamba1" else 0.65
    return arguments


if __name__ == "__main__":
    main()
