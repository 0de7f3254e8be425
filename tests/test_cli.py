"""The command line: what it prints, writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shedder
from shedder.cli import main
from shedder.evaluate import perplexity
from shedder.layout import NormSegment, SSDLayout
from shedder.nn import LanguageModel, ModelConfig
from shedder.prune import parameter_count

COMMANDS = ("inspect", "prune", "score", "plan", "eval", "generate", "bench", "doctor")


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


def test_a_report_says_what_was_saved(folder, text, tmp_path, capsys):
    code, out, _ = run(capsys, "prune", folder, "--text", text, "--budget", "params=0.9", "state=0.8", "--out",
                       tmp_path / "small", "--report", tmp_path / "report.html", "--heldout", text, "--measure",
                       "--save-plan", tmp_path / "plan.json", "--sequences", 1, "--length", 64, "--round-to",
                       "states=2", "--json")
    facts = json.loads(out)
    assert code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "report.csv", "report.html", "report.png",
                                                                "small"]
    small = shedder.load(tmp_path / "small")
    assert facts["figures"]["parameters"][1] == sum(p.numel() for p in small.parameters())
    assert f"{facts['figures']['parameters'][1]:,}" in (tmp_path / "report.html").read_text()
    assert {"perplexity", "prefill time", "decode time"} <= set(facts["figures"])
    assert all(getattr(layout, "dstate", 2) % 2 == 0 for layout in small.config.layers)
    tokens = torch.tensor(small.tokenizer.encode(Path(text).read_text(encoding="utf-8")))
    assert facts["figures"]["perplexity"][1] == pytest.approx(perplexity(small, tokens), rel=1e-4)
    code, out, _ = run(capsys, "plan", folder, tmp_path / "plan.json", "--diff", tmp_path / "plan.json")
    assert code == 0 and out == "no difference\n"


def test_scores_on_disk_solve_another_budget_without_the_model(folder, text, tmp_path, monkeypatch, capsys):
    scores = tmp_path / "scores.safetensors"
    code, out, _ = run(capsys, "score", folder, "--text", text, "--method", "taylor1", "--sequences", 1, "--length", 32,
                       "--out", scores)
    assert code == 0 and "head 12, " in out
    monkeypatch.setattr(LanguageModel, "forward", None)
    sizes = []
    for share in ("0.95", "0.85"):
        code, out, err = run(capsys, "prune", folder, "--solve-only", "--score", scores, "--budget", f"params={share}",
                             "--norm-repair", "exact", "--out", tmp_path / share, "--json")
        assert code == 0, err
        sizes.append(json.loads(out)["parameters"])
    assert sizes[0][1] <= 0.95 * sizes[0][0] and sizes[1][1] <= 0.85 * sizes[1][0]


def test_the_checkpoint_keeps_the_dtype_that_the_model_came_in(folder, tmp_path, capsys):
    shedder.load(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    plan = tmp_path / "plan.json"
    plan.write_text('{"version": 1, "family": "mamba2", "layers": {"1": {"heads": [0]}}}')
    code, _, err = run(capsys, "prune", tmp_path / "bf16", "--plan", plan, "--out", tmp_path / "small")
    assert code == 0, err
    assert shedder.load(tmp_path / "small").dtype == torch.bfloat16


def test_mamba_shedders_files_are_plans(folder, tmp_path, capsys):
    theirs = tmp_path / "pruning_config.json"
    theirs.write_text('{"pruned_mamba_block_idx": [2], "pruned_ssm_idx": [0]}')
    code, out, _ = run(capsys, "plan", folder, theirs)
    assert code == 0 and "layer   0: remove the SSM" in out and "layer   2: remove the block" in out
    code, _, err = run(capsys, "prune", folder, "--plan", theirs, "--out", tmp_path / "small")
    assert code == 0, err
    assert [layout.kind for layout in shedder.load(tmp_path / "small").config.layers] == ["removed_ssm", "ssd",
                                                                                          "removed_block"]


def test_an_illegal_plan_is_refused_with_every_reason(folder, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    plan.write_text('{"version": 1, "family": "mamba2", "layers": {"1": {"heads": [4]}, "9": {"block": true}}}')
    code, _, err = run(capsys, "plan", folder, plan)
    assert code == 1 and "layers.1.heads lists head 4" in err and "layers.9 does not exist" in err


def test_what_should_not_happen_is_said_in_a_line_too(folder, monkeypatch, capsys):
    def fail(*_):
        raise KeyError("surprise")

    monkeypatch.setattr("shedder.cli.state_bytes", fail)
    code, _, err = run(capsys, "inspect", folder)
    assert code == 1 and err.count("\n") == 1 and "this should not happen: KeyError: 'surprise'" in err
    code, _, err = run(capsys, "inspect", folder, "--traceback")
    assert code == 1 and "Traceback" in err


@pytest.mark.parametrize(("error", "code", "words"), [
    (MemoryError(), 1, "out of memory"), (KeyboardInterrupt(), 130, "interrupted"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "out of memory (CUDA"),
    (RecursionError("too deep"), 1, "this should not happen: RecursionError")])
def test_every_end_has_its_code(error, code, words, folder, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr("shedder.cli.state_bytes", fail)
    found, _, err = run(capsys, "inspect", folder)
    assert found == code and words in err and "Traceback" not in err


def test_a_closed_pipe_is_no_error(folder):
    done = subprocess.run(f"{sys.executable} -m shedder inspect {folder} | true; exit ${{PIPESTATUS[0]}}",
                          shell=True, executable="/bin/bash", capture_output=True, text=True, check=False)
    assert done.returncode in (0, 141) and done.stderr == ""


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
    (["bench", "{folder}", "--compare", "no-such-folder"], "no-such-folder: not a folder"),
    (["prune", "{folder}", "--out", "{folder}/..", "--text", "no-such-text"], "not empty and not a shedder checkpoint"),
    (["prune", "{folder}", "--out", "{text}", "--text", "no-such-text"], "exists and is not a folder"),
    (["prune", "{folder}", "--out", "x", "--text", "{folder}"], "Is a directory"),
    (["prune", "{folder}", "--out", "x", "--text", "{folder}/model.safetensors"], "not UTF-8 text"),
    (["prune", "{folder}", "--out", "x", "--plan", "no-such-plan"], "no-such-plan"),
    (["prune", "{folder}", "--out", "x", "--plan", "{folder}/model.safetensors"], "model.safetensors: not JSON"),
    (["prune", "{folder}", "--out", "x", "--plan", "{folder}/config.json"], "config.json: a plan has the fields"),
    (["prune", "{folder}", "--out", "x", "--text", "{text}", "--report", "x.txt"], "--report is 'x.txt'"),
    (["prune", "{folder}", "--out", "x", "--text", "{text}", "--heldout", "no-such-text"], "no-such-text"),
    (["prune", "{folder}", "--out", "x", "--text", "{text}", "--bundle", "half"], "--bundle is 'half'"),
    (["prune", "{folder}", "--out", "x", "--text", "{text}", "--budget", "params"], "accepted: NAME=VALUE"),
    (["prune", "{folder}", "--out", "x", "--text", "{text}", "--budget", "params=.9", "params=.8"], "more than once"),
    (["prune", "{folder}", "--out", "x", "--text", "{text}", "--score", "vibes"], "vibes"),
    (["prune", "{folder}", "--out", "x", "--solve-only", "--score", "none.safetensors"], "none.safetensors"),
    (["prune", "{folder}", "--out", "x", "--text", "{text}", "--sequences", "0"], "sequences is 0"),
    (["score", "{folder}", "--out", "x/y.safetensors", "--text", "{text}", "--method", "magnitude"], "x"),
    (["eval", "{folder}", "--text", "{text}", "--device", "toaster"], "--device is 'toaster'"),
    (["eval", "{folder}", "--text", "{text}", "--device", "cuda:99"], "CUDA GPUs here"),
    (["plan", "{folder}", "no-such-plan"], "no-such-plan"),
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
