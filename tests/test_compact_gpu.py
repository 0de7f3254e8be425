"""A model that is measured, repaired and compacted on a GPU is the one that the same on a CPU gives."""

from __future__ import annotations

import copy
import dataclasses
import random
from pathlib import Path

import pytest
import torch
from random_plans import CONFIGS, FULL_PLANS, MODELS, random_plan, runs

import shedder
from shedder.nn import LanguageModel
from shedder.prune import LayerPlan, Plan, compact
from shedder.prune.calibration import Calibration
from shedder.prune.plan import REPAIRS

DEMO = Path(__file__).resolve().parent.parent / "demo"
ROWS = torch.randint(0, 11, (6, 9), generator=torch.Generator().manual_seed(4))


def compacted(model: LanguageModel, plan: Plan, rows: torch.Tensor, device: str) -> LanguageModel:
    """Statistics, repairs and slices, all on the device."""
    return compact(copy.deepcopy(model).to(device), plan, Calibration(rows.to(device), batch=4))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_random_plans_with_every_repair_give_the_same_model_on_both(name):
    """In float64. On a CPU, another batch size changes 2e-14 of the largest logit."""
    for seed in range(6):
        rng = random.Random(seed)
        plan = FULL_PLANS[name] if seed == 0 else random_plan(rng, MODELS[name].config)
        plan = dataclasses.replace(plan, norm_repair=rng.choice(("exact", "stats", "none")), repairs=REPAIRS)
        on_cpu, on_gpu = (compacted(MODELS[name], plan, ROWS, device) for device in ("cpu", "cuda"))
        assert on_gpu.config == on_cpu.config
        expected, got = runs(on_cpu), runs(on_gpu)
        for way in expected:
            assert (got[way].cpu() - expected[way]).abs().max() < 1e-10 * expected[way].abs().max(), (seed, way, plan)


PLANS = {
    "mamba2": Plan("mamba2", {1: LayerPlan(heads=(0, 3, 7), states=(tuple(range(0, 64, 3)),)), 3: LayerPlan(ssm=True),
                              5: LayerPlan(block=True), 8: LayerPlan(head_channels=(tuple(range(5)),) * 14, taps=1)},
                   "stats", d_model=tuple(range(0, 224, 7)), repairs=REPAIRS),
    "mamba1": Plan("mamba1", {1: LayerPlan(channels=tuple(range(0, 448, 5)), ranks=6), 3: LayerPlan(ssm=True),
                              5: LayerPlan(block=True), 8: LayerPlan(states=((2, 9, 15),), taps=1)},
                   "stats", d_model=tuple(range(0, 224, 7)), repairs=REPAIRS),
}


@pytest.mark.gpu
@pytest.mark.parametrize("family", PLANS)
@torch.no_grad()
def test_the_shipped_models_are_the_same_compacted_on_both(family):
    """In fp32: logits apart by less than 1e-4 of their RMS. On a CPU, fp32 is 7e-7 from float64."""
    model = shedder.load(DEMO / "models" / family, dtype=torch.float32)
    text = model.tokenizer.encode((DEMO / "text" / "calibration.txt").read_text(encoding="utf-8"))
    rows = torch.tensor(text[:4 * 257]).view(4, 257)
    expected = compacted(model, PLANS[family], rows, "cpu")(rows[:, :-1])
    got = compacted(model, PLANS[family], rows, "cuda")(rows[:, :-1].cuda()).cpu()
    difference = (got - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    print(f"{family}: RMS of the difference {difference:.1e} of that of the logits")
    assert difference < 1e-4
    assert (got.argmax(-1) == expected.argmax(-1)).float().mean() > 0.995
