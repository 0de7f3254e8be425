"""The training of the shipped models: the paths, the schedule, the files, and going on after a kill."""

from __future__ import annotations

import csv
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))

import paths as demo_paths
import train as demo_train

import shedder
from shedder.nn import LanguageModel

FAMILIES = sorted(demo_paths.PATHS)


def small_model(family: str) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(demo_train.model_config(family, d_model=32, layers=3))
    with torch.no_grad():
        for parameter in model.parameters():            # so that no norm, bias or gain is trivial
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture
def command(tmp_path):
    """Arguments of a small run on the CPU; more may be appended."""
    text = np.frombuffer(b"the cat sat on the mat. " * 400, dtype=np.uint8)
    for name in ("train.bin", "heldout.bin"):
        text.tofile(tmp_path / name)
    options = ["--data", tmp_path, "--out", tmp_path / "out", "--device", "cpu", "--steps", 12, "--batch", 2,
               "--length", 64, "--d-model", 32, "--layers", 3, "--eval-bytes", 1024, "--sample", 4, "--log-every", 4]
    return [str(option) for option in options]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [64, 192])
def test_training_path_gives_the_logits_of_the_model(family, length):
    model = small_model(family)
    tokens = torch.randint(256, (2, length))
    expected = model(tokens)
    actual = demo_paths.PATHS[family](model, torch.float32).logits(tokens)
    scale = expected.abs().max().item()
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-4 * scale)      # fp32, sums in another order


@pytest.mark.parametrize("chunk", [8, 16])
def test_the_chunk_changes_nothing(chunk):
    model = small_model("mamba2")
    tokens = torch.randint(256, (2, 48))
    expected = model(tokens)
    actual = demo_paths.SSDPath(model, torch.float32, chunk).logits(tokens)
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_the_scan_is_called_as_the_peers_kernel_takes_it():
    path = demo_paths.ScanPath(small_model("mamba1"), torch.bfloat16)
    scan, calls = path.scan, []

    def checked(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        assert all(part.dtype == torch.bfloat16 and part.stride(-1) == 1 for part in (u, delta, B, C, z))
        assert all(part.dtype == torch.float32 and part.is_contiguous() for part in (A, D, delta_bias))
        calls.append(u.shape)
        return scan(u, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus)

    path.scan = checked
    path.loss(torch.randint(256, (2, 40)), torch.randint(256, (2, 40))).backward()
    assert calls == [(2, 64, 40)] * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_a_path_does_not_know_are_refused(family):
    other = next(name for name in FAMILIES if name != family)
    with pytest.raises(ValueError, match="does not know"):
        demo_paths.PATHS[family](small_model(other), torch.float32)


def test_the_learning_rate_warms_up_and_ends_at_zero():
    rates = [demo_train.learning_rate(step, 1000, 3e-3) for step in range(1000)]
    assert rates[0] > 0
    assert max(rates) == pytest.approx(3e-3)
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))
    assert demo_train.learning_rate(0, 3, 1e-3) >= 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shipped_models_fit_into_eight_megabytes(family):
    model = LanguageModel(demo_train.model_config(family), device="meta", initialise=False)
    assert 7.0e6 < demo_train.checkpoint_bytes(model) < 8e6 - 16_384


@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_steps_write_a_model_that_loads(family, command, tmp_path):
    assert demo_train.main([*command, "--family", family]) == 0
    curve = json.loads((tmp_path / "out/curve.json").read_text())
    assert curve["train"][-1]["lr"] == pytest.approx(0, abs=1e-12)
    assert curve["heldout"][-1]["loss"] < math.log(256)
    assert len(curve["perplexity_rise_without_block"]) == 3
    rows = list(csv.DictReader((tmp_path / "out/curve.csv").open()))
    assert float(rows[-1]["heldout_bits_per_byte"]) == pytest.approx(curve["heldout_bits_per_byte"], abs=1e-4)
    assert not (tmp_path / "out/snapshot.safetensors").exists()
    model = shedder.load(tmp_path / "out/model")
    assert model.config.family == family
    assert model.dtype == torch.bfloat16
    assert model.layers[0].mixer.A_log.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_a_killed_run_goes_on_to_the_same_weights(family, command, tmp_path, monkeypatch):
    whole = demo_train.main([*command, "--family", family, "--out", str(tmp_path / "whole")])
    assert whole == 0
    save_snapshot = demo_train.save_snapshot

    def save_and_die(*arguments):
        save_snapshot(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_train, "save_snapshot", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        demo_train.main([*command, "--family", family, "--save-every", "0"])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="of a run with"):
        demo_train.main([*command, "--family", family, "--lr", "1e-3"])
    assert demo_train.main([*command, "--family", family]) == 0
    expected, actual = (shedder.load(tmp_path / name / "model").state_dict() for name in ("whole", "out"))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
