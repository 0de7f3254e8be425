"""The models that ship: they load, fit, and read as well as their curves say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import shedder
from shedder.evaluate import perplexity
from shedder.prune import LayerPlan, Plan, compact, parameter_count

DEMO = Path(__file__).resolve().parent.parent / "demo"
FAMILIES = sorted(folder.name for folder in (DEMO / "models").iterdir())


def curve(family: str) -> dict:
    return json.loads((DEMO / "training" / family / "curve.json").read_text())


def test_both_families_ship():
    assert FAMILIES == ["mamba1", "mamba2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shipped_model_is_what_was_trained(family):
    folder = DEMO / "models" / family
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6
    model = shedder.load(folder)
    assert model.config.family == family
    assert parameter_count(model.config) == curve(family)["parameters"]
    assert model.provenance["heldout_bits_per_byte"] == pytest.approx(curve(family)["heldout_bits_per_byte"], abs=1e-4)
    assert curve(family)["lr_at_end"] == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shipped_model_reads_text_that_it_has_not_seen(family):
    model = shedder.load(DEMO / "models" / family, dtype=torch.float32)
    text = (DEMO / "text/heldout.txt").read_text(encoding="utf-8")[:6000]
    bits = math.log2(perplexity(model, torch.tensor(model.tokenizer.encode(text)), length=512))
    assert bits < curve(family)["heldout_bits_per_byte"] + 0.4      # another text, and little context at each start


@pytest.mark.parametrize("family", FAMILIES)
def test_no_middle_block_of_a_shipped_model_is_idle(family):
    model = shedder.load(DEMO / "models" / family, dtype=torch.float32)
    text = (DEMO / "text/heldout.txt").read_text(encoding="utf-8")[:2048]
    tokens = torch.tensor(model.tokenizer.encode(text))
    dense = perplexity(model, tokens, length=512)
    middle = range(1, len(model.config.layers) - 1)
    without = {index: compact(model, Plan(family, {index: LayerPlan(block=True)})) for index in middle}
    rises = {index: perplexity(smaller, tokens, length=512) / dense - 1 for index, smaller in without.items()}
    assert min(rises.values()) >= 0.05, rises
    recorded = curve(family)["perplexity_rise_without_block"]
    assert min(recorded[str(index)] for index in middle) >= 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_the_readme_gives_the_measured_figures(family):
    readme = (DEMO / "README.md").read_text(encoding="utf-8")
    facts = curve(family)
    assert f"{facts['parameters']:,}" in readme
    assert f"| {family} |" in readme and f"**{facts['heldout_bits_per_byte']:.3f}**" in readme
    row = next(line for line in readme.splitlines() if line.startswith(f"| {family} | +"))
    assert row == f"| {family} | " + " | ".join(
        f"{100 * rise:+.0f} %" for rise in facts["perplexity_rise_without_block"].values()) + " |"
