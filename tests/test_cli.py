"""The command line: what it prints, writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import shedder
from shedder.cli import main
from shedder.layout import NormSegment, SSDLayout
from shedder.nn import LanguageModel, ModelConfig
from shedder.prune import parameter_count

COMMANDS = ("inspect", "prune", "eval", "generate", "bench", "doctor")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    layout = SSDLayout(headdim=4, dstate=6, ngroups=1, head_to_group=(0,) * 4, norm_segments=(NormSegment(16, 1e-5),))
    model = LanguageModel(ModelConfig("mamba2", d_model=8, vocab_size=256, layers=(layout,) * 3))
    model.tokenizer_name = "bytes"
    path = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(path)
    (path.parent / "text.txt").write_text("It was a dark and stormy night. " * 40, encoding="utf-8")
    return path


@pytest.fixture
def text(folder):
    return str(folder.parent / "text.txt")


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert "example:\n  " in out and f"shedder {command}" in out


def test_inspect_counts_what_is_there(folder, capsys):
    code, out, _ = run(capsys, "inspect", folder, "--json")
    facts = json.loads(out)
    stored = sum(p.numel() for p in shedder.load(folder).parameters())
    assert code == 0 and facts["parameters"] == stored
    assert [layer["state_elements"] for layer in facts["layers"]] == [4 * 4 * 6] * 3
    code, out, _ = run(capsys, "inspect", folder)
    assert code == 0 and f"{stored:,}" in out


def test_prune_by_search_writes_a_smaller_model_that_loads(folder, text, tmp_path, capsys):
    out_folder, log = tmp_path / "small", tmp_path / "log.jsonl"
    code, out, _ = run(capsys, "prune", folder, "--text", text, "--budget", "params=0.9", "--out", out_folder,
                       "--log", log, "--json")
    facts = json.loads(out)
    small = shedder.load(out_folder)
    before, after = facts["parameters"]
    assert code == 0 and after <= 0.9 * before
    assert after == parameter_count(small.config) == sum(p.numel() for p in small.parameters())
    assert small.plan is not None and log.exists()


def test_prune_by_a_finished_plan(folder, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    shedder.Plan.from_json('{"version": 1, "family": "mamba2", "norm_repair": "exact", "provenance": {},'
                           ' "layers": {"1": {"block": true}}}').to_json(plan)
    code, out, _ = run(capsys, "prune", folder, "--plan", plan, "--out", tmp_path / "small")
    assert code == 0 and "layer   1: remove the block" in out
    assert shedder.load(tmp_path / "small").config.layers[1].kind == "removed_block"


def test_eval_generate_and_bench_agree_with_the_library(folder, text, capsys):
    code, out, _ = run(capsys, "eval", folder, "--text", text, "--length", 64, "--json")
    assert code == 0 and 1 < json.loads(out)["perplexity"] < 400
    code, out, _ = run(capsys, "generate", folder, "--prompt", "It was", "--tokens", 5, "--json")
    model = shedder.load(folder)
    ids = torch.tensor([model.tokenizer.encode("It was")])
    assert code == 0 and json.loads(out)["text"] == model.tokenizer.decode(model.generate(ids, 5)[0].tolist())
    code, out, _ = run(capsys, "bench", folder, "--prompt", 8, "--tokens", 2, "--json")
    figures = json.loads(out)[str(folder)]
    assert code == 0 and figures["prefill_ms"] > 0 and figures["prompt"] == 8


def test_doctor_names_every_backend(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    facts = json.loads(out)
    assert code == 0 and set(facts["backends"]) == {"cuda", "triton", "cpu", "reference"}
    assert facts["backends"]["reference"] == "available"


@pytest.mark.parametrize(("arguments", "words"), [
    (["inspect", "no-such-folder"], "no-such-folder: not a folder"),
    (["prune", "{folder}", "--out", "{folder}"], "--out is the folder of the model itself"),
    (["prune", "{folder}", "--out", "x"], "--text is missing"),
    (["prune", "{folder}", "--out", "x", "--text", "{text}", "--budget", "params=much"], "params=0.7"),
    (["prune", "{folder}", "--out", "x", "--text", "{text}", "--budget", "size=0.5"], "budget"),
    (["prune", "{folder}", "--out", "x", "--text", "{text}", "--axes", "channel"], "axes"),
    (["eval", "{folder}", "--text", "no-such-text"], "no-such-text"),
    (["generate", "{folder}", "--prompt", ""], "--prompt is empty"),
    (["bench", "{folder}", "--batch", "0"], "batch is 0"),
])
def test_failures_say_why_in_one_line_and_write_nothing(arguments, words, folder, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *[a.format(folder=folder, text=text) for a in arguments])
    assert code == 1
    assert err.startswith("shedder: error: ") and words in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_wrong_command_line_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["prune", "model-without-out"])
    assert stop.value.code == 2


def test_python_dash_m(folder):
    done = subprocess.run([sys.executable, "-m", "shedder", "inspect", str(folder)], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0 and "mamba2, d_model 8, 3 layers" in done.stdout
