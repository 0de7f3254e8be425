"""Search: it meets the budget, is the same with and without its shortcuts, and survives being killed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shedder
from shedder import report
from shedder.evaluate import negative_log_likelihood
from shedder.layout import NormSegment, RemovedBlock, RemovedSSM, ScanLayout, SSDLayout
from shedder.nn import LanguageModel, ModelConfig
from shedder.nn.block import Block
from shedder.prune import LayerPlan, Plan, PlanError, compact, parameter_count, prefix, score, search, solve
from shedder.prune.calibration import Calibration, calibration_of
from shedder.prune.removal import Removal, together
from shedder.prune.size import flops, state_bytes
from shedder.prune.trials import Trials
from shedder.prune.units import AXES
from shedder.report_html import render

SSD = SSDLayout(headdim=4, dstate=8, ngroups=2, head_to_group=(0, 0, 0, 0, 1, 1, 1, 1),
                norm_segments=(NormSegment(16, 1e-5), NormSegment(16, 1e-5)))
SCAN = ScanLayout(d_inner=32, dstate=8, dt_rank=2)
CONFIGS = {
    "mamba2": ModelConfig("mamba2", d_model=16, vocab_size=32, layers=(SSD,) * 3),
    "mamba1": ModelConfig("mamba1", d_model=16, vocab_size=32, layers=(SCAN,) * 3),
    "one layer": ModelConfig("mamba2", d_model=16, vocab_size=32, layers=(SSD,)),
    "pruned": ModelConfig("mamba2", d_model=16, vocab_size=32, layers=(
        RemovedBlock(), SSD, RemovedSSM(4, 8, (NormSegment(32, 1e-5),)))),
}
SMALL = {"sequences": 3, "length": 12, "batch": 2, "bundle": 0.25, "progress": False}


def model_of(name: str) -> LanguageModel:
    torch.manual_seed(2)
    model = LanguageModel(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:                    # sharper than the initial values, so that layers matter
                parameter.mul_(3)
    return model


TOKENS = torch.randint(0, 32, (100,), generator=torch.Generator().manual_seed(1))


def loss_on(model: LanguageModel, rows: torch.Tensor) -> float:
    with torch.no_grad():
        return negative_log_likelihood(model(rows[:, :-1]), rows[:, 1:]).item()


def sizes(plan: Plan, name: str) -> tuple[float, float]:
    config = CONFIGS[name]
    after = plan.compacted_config(config)
    return parameter_count(after) / parameter_count(config), state_bytes(after) / state_bytes(config)


@pytest.mark.parametrize("name", ["mamba2", "mamba1", "pruned"])
def test_the_budget_is_met_and_the_step_before_did_not_meet_it(name):
    plan = search(model_of(name), TOKENS, {"params": 0.75, "state": 0.6}, **SMALL)
    params, state = sizes(plan, name)
    assert params <= 0.75
    assert state <= 0.6
    steps = len(plan.provenance["trajectory"]) - 1
    params, state = sizes(prefix(plan, steps - 1), name)
    assert params > 0.75 or state > 0.6


@pytest.mark.parametrize("name", ["mamba2", "mamba1"])
def test_the_prefix_cache_saves_work_and_changes_nothing(name):
    model = model_of(name)
    with_cache = search(model, TOKENS, {"params": 0.75}, **SMALL)
    without = search(model, TOKENS, {"params": 0.75}, prefix_cache=False, **SMALL)
    assert with_cache.layers == without.layers
    losses = [[record["loss"] for record in plan.provenance["trajectory"]] for plan in (with_cache, without)]
    assert losses[0] == losses[1]
    assert with_cache.provenance["layer_evaluations"] < 0.9 * without.provenance["layer_evaluations"]


def test_a_candidate_costs_only_the_layers_from_its_own():
    plan = search(model_of("mamba2"), TOKENS, {"params": 0.9}, ["block"], **SMALL)
    before, after = (record["layer_evaluations"] for record in plan.provenance["trajectory"][:2])
    # Removing block 0, 1, 2 of three runs 2, 1, 0 blocks; the walk to the last candidate runs 2.
    assert (before, after) == (3, 3 + 2 + 1 + 0 + 2)


@pytest.mark.parametrize("rescore", [None, 2])
def test_two_runs_give_one_plan(rescore):
    plans = [search(model_of("mamba2"), TOKENS, {"params": 0.7}, rescore=rescore, **SMALL) for _ in range(2)]
    assert plans[0] == plans[1]
    assert plans[0].to_json() == plans[1].to_json()


def test_rescoring_a_few_scores_fewer():
    options = {"norm_repair": "exact", **SMALL}
    every = search(model_of("mamba2"), TOKENS, {"params": 0.7}, **options)
    few = search(model_of("mamba2"), TOKENS, {"params": 0.7}, rescore=2, **options)
    assert sizes(few, "mamba2")[0] <= 0.7
    assert few.provenance["layer_evaluations"] < 0.7 * every.provenance["layer_evaluations"]
    assert all(record["scored"] <= 2 + 4 for record in few.provenance["trajectory"][2:])


def deep() -> LanguageModel:
    layout = SSDLayout(headdim=4, dstate=4, ngroups=1, head_to_group=(0, 0), norm_segments=(NormSegment(8, 1e-5),))
    torch.manual_seed(3)
    return LanguageModel(ModelConfig("mamba2", d_model=8, vocab_size=32, layers=(layout,) * 64)).eval()


def blocks_run(run) -> int:
    """How many blocks are called while run() runs."""
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: count() if isinstance(module, Block) else None)
    try:
        run()
    finally:
        handle.remove()
    return calls


def test_with_64_layers_the_prefix_cache_runs_1_8_times_fewer_blocks_and_finds_the_same_plan():
    model, plans, runs = deep(), {}, {}

    def run(prefix_cache: bool) -> None:
        plans[prefix_cache] = search(model, TOKENS, {"params": 0.98}, ["block"], sequences=1, length=4,
                                     norm_repair="exact", prefix_cache=prefix_cache, progress=False)
    runs[True] = blocks_run(lambda: run(True))
    runs[False] = blocks_run(lambda: run(False))
    assert plans[True].layers == plans[False].layers
    assert len(plans[True].provenance["trajectory"]) > 2
    assert runs[False] >= 1.8 * runs[True]
    # One batch of calibration tokens, so a call is a layer evaluation.
    assert {cache: plan.provenance["layer_evaluations"] for cache, plan in plans.items()} == runs


class Killed(BaseException):
    pass


def kill_after(step: int):
    def progress(record):
        if record["step"] == step:
            raise Killed
    return progress


@pytest.mark.parametrize(("name", "rescore"), [("mamba2", None), ("mamba2", 2), ("mamba1", None)])
def test_a_killed_search_goes_on_where_it_was(name, rescore, tmp_path):
    log = tmp_path / "search.jsonl"
    options = {"budget": {"params": 0.6}, "rescore": rescore, **SMALL}
    whole = search(model_of(name), TOKENS, **options)
    with pytest.raises(Killed):
        search(model_of(name), TOKENS, log=log, **{**options, "progress": kill_after(2)})
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [event["step"] for event in events[1:] if "step" in event] == [0, 1, 2]

    steps = []
    resumed = search(model_of(name), TOKENS, log=log, **{**options, "progress": steps.append})
    assert steps[0]["step"] == 3
    assert resumed == whole
    before = log.read_bytes()
    assert search(model_of(name), TOKENS, log=log, **options) == whole         # nothing left to do
    assert log.read_bytes() == before


@pytest.mark.parametrize("rescore", [None, 2])
def test_a_log_may_end_at_any_byte(rescore, tmp_path):
    """What a kill leaves: the first bytes of the log. The lines that are whole are not computed again."""
    log = tmp_path / "search.jsonl"
    options = {"budget": {"params": 0.85}, "rescore": rescore, **SMALL}
    whole = search(model_of("mamba2"), TOKENS, log=log, **options)
    text = log.read_bytes()
    ends = [0, 1, len(text) - 1, *random.Random(0).sample(range(len(text)), 12)]
    for end in ends:
        log.write_bytes(text[:end])
        model = model_of("mamba2")
        runs = blocks_run(lambda model=model: search(model, TOKENS, log=log, **options) == whole)
        assert log.read_bytes().splitlines()[0] == text.splitlines()[0]
        assert search(model, TOKENS, log=log, **options) == whole
        if end == len(text) - 1:
            assert runs < whole.provenance["layer_evaluations"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_ten_kills_at_random_times_change_nothing(tmp_path):
    script = Path(__file__).with_name("search_process.py")
    subprocess.run([sys.executable, script, "killed", tmp_path, tmp_path / "log.jsonl", "10", "0"], check=True,
                   timeout=300)
    lengths = json.loads((tmp_path / "lengths.json").read_text())
    assert len(lengths) == 10
    assert len(set(lengths)) > 5                       # it was killed at different points, and went on between them
    assert (tmp_path / "resumed.json").read_text() == (tmp_path / "whole.json").read_text()


def test_the_processes_of_torchrun_share_the_candidates_and_come_to_the_same_plan(tmp_path):
    import search_process

    script, log = Path(__file__).with_name("search_process.py"), tmp_path / "log.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script,
               "together", tmp_path, log]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    first, second = ((tmp_path / f"plan.{rank}.json").read_text() for rank in (0, 1))
    assert first == second
    alone = search_process.plan(None)
    assert Plan.from_json(first).layers == alone.layers
    assert search_process.plan(log) == Plan.from_json(first)                   # the log serves one process as well


def test_a_log_of_another_search_is_refused(tmp_path):
    log = tmp_path / "search.jsonl"
    search(model_of("mamba2"), TOKENS, {"params": 0.9}, log=log, **SMALL)
    before = log.read_bytes()
    for change, words in (({"budget": {"state": 0.9}}, "its settings is"), ({"text": TOKENS.flip(0)}, "its tokens is"),
                          ({"model": model_of("mamba1")}, "its"), ({"seed": 1}, "its settings is")):
        arguments = {"model": model_of("mamba2"), "text": TOKENS, "budget": {"params": 0.9}, **change}
        with pytest.raises(ValueError, match=f"belongs to another search: {words}"):
            search(**arguments, log=log, **SMALL)
        assert log.read_bytes() == before
    for text in ("{}\n", "notes of mine", "notes\nof mine", '{"version": 2}\n{"trial": 1}\n', "\xff\xfe\n"):
        log.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=r"is not the log of a search|belongs to another search"):
            search(model_of("mamba2"), TOKENS, {"params": 0.9}, log=log, **SMALL)
        assert log.read_bytes() == text.encode("latin-1")                      # and left alone


def test_two_searches_do_not_share_a_log(tmp_path):
    log = tmp_path / "search.jsonl"

    def second_search(record):
        with pytest.raises(ValueError, match="is being written by another search"):
            search(model_of("mamba2"), TOKENS, {"params": 0.9}, log=log, **SMALL)
    search(model_of("mamba2"), TOKENS, {"params": 0.9}, log=log, **{**SMALL, "progress": second_search})


def test_a_log_serves_other_budgets_of_the_same_measure(tmp_path):
    log = tmp_path / "search.jsonl"
    model = model_of("mamba2")
    search(model, TOKENS, {"params": 0.7}, log=log, **SMALL)
    before = log.read_bytes()
    looser = search(model, TOKENS, {"params": 0.85}, log=log, solve_only=True, **SMALL)
    assert log.read_bytes() == before
    assert looser == search(model, TOKENS, {"params": 0.85}, **SMALL)
    with pytest.raises(ValueError, match="does not reach the budget"):
        search(model, TOKENS, {"params": 0.6}, log=log, solve_only=True, **SMALL)
    assert search(model, TOKENS, {"params": 0.6}, log=log, **SMALL) == search(model, TOKENS, {"params": 0.6}, **SMALL)


@pytest.mark.parametrize("name", ["mamba2", "mamba1"])
@pytest.mark.parametrize("budget", [{"flops": 0.8}, {"params": 0.9, "state": 0.7, "flops": 0.85}])
@pytest.mark.parametrize("method", ["greedy", "one-shot"])
def test_every_measure_of_the_budget_is_met(name, budget, method):
    plan = search(model_of(name), TOKENS, budget, method=method, **SMALL)
    after = plan.compacted_config(CONFIGS[name])
    for measure, share in budget.items():
        count = {"params": parameter_count, "state": state_bytes, "flops": flops}[measure]
        assert count(after) <= share * count(CONFIGS[name])


def test_without_bundles_every_unit_is_a_candidate():
    options = {**SMALL, "bundle": None, "norm_repair": "exact"}
    plan = search(model_of("one layer"), TOKENS, {"params": 0.9}, ["head"], **options)
    first = plan.provenance["trajectory"][1]
    assert first["candidates"] == 8
    losses = {}
    for head in range(8):
        small = compact(model_of("one layer"), Plan("mamba2", {0: LayerPlan(heads=(head,))}))
        losses[head] = search(small, TOKENS, {"params": 1.0}, ["block"], **options).provenance["trajectory"][0]["loss"]
    assert first["removed"] == {"heads": [min(losses, key=losses.__getitem__)]}
    assert math.isclose(first["loss"], min(losses.values()), rel_tol=1e-6)


def test_a_bundle_may_be_a_number_and_differ_by_axis():
    plan = search(model_of("mamba2"), TOKENS, {"params": 0.9}, ["head", "state"],
                  **{**SMALL, "bundle": {"head": 3, "state": 0.5}})
    for record in plan.provenance["trajectory"][1:]:
        removed = record["removed"]
        assert len(removed.get("heads", (0, 0, 0))) <= 3
        assert all(len(states) <= 4 for states in removed.get("states", ()))
    assert {len(record["removed"].get("heads", ())) for record in plan.provenance["trajectory"][1:]} & {3}


def test_group_aware_cuts_keep_groups_equal():
    plan = search(model_of("mamba2"), TOKENS, {"params": 0.7}, ["head"], group_aware=True, **SMALL)
    for layout in plan.compacted_config(CONFIGS["mamba2"]).layers:
        assert layout.head_to_group.count(0) == layout.head_to_group.count(1)


GROUPS = SSDLayout(headdim=4, dstate=8, ngroups=4, head_to_group=(0, 0, 1, 1, 2, 2, 3, 3), mlp_channels=8,
                   norm_segments=(NormSegment(8, 1e-5),) * 4)
CONFIGS["groups"] = ModelConfig("mamba2", d_model=16, vocab_size=32, layers=(GROUPS,) * 2)
SCAN_GROUPS = ScanLayout(d_inner=32, dstate=8, dt_rank=4, channel_to_group=(0,) * 16 + (1,) * 16)
CONFIGS["scan groups"] = ModelConfig("mamba1", d_model=16, vocab_size=32, layers=(SCAN_GROUPS,) * 2)


GOING_DOWN = [("groups", axis) for axis in ("group", "merge", "head", "head_channel", "mlp", "tap", "d_model")] + [
    ("scan groups", axis) for axis in ("group", "merge", "channel", "rank", "tap", "d_model")]


@pytest.mark.parametrize(("name", "axis", "bundle"), [
    (name, axis, bundle) for name, axis in GOING_DOWN for bundle in (0.25, 3, None)
    if (axis, bundle) != ("channel", None)])           # 64 candidates a step
def test_every_axis_goes_down_to_what_must_stay(name, axis, bundle):
    """A search for more than there is says so; what it had removed by then is a legal plan that compacts."""
    model, records = model_of(name), []
    least = 1.05 * 33 * 16 / parameter_count(model.config)                     # little more than embedding and norm
    if axis == "d_model":
        least = 1 / parameter_count(model.config)
    with pytest.raises(ValueError, match="nothing is left to remove"):
        search(model, TOKENS, {"params": least}, [axis], rescore=2,
               **{**SMALL, "bundle": bundle, "progress": records.append})
    cuts, d_model = together(map(Removal.from_json, records))
    plan = Plan(model.config.family, cuts, "exact", d_model=d_model)
    small = compact(model, plan)
    assert parameter_count(small.config) == records[-1]["params"]
    left = {"group": "ngroups", "merge": "ngroups", "head_channel": "headdim", "mlp": "mlp_channels",
            "tap": "conv_width", "rank": "dt_rank", "head": "nheads", "channel": "d_inner"}
    if axis == "d_model":
        assert small.config == dataclasses.replace(model.config, d_model=1, norm_eps=small.config.norm_eps,
                                                   norm_scale=4.0)
    else:
        assert [getattr(layout, left[axis]) for layout in small.config.layers] == [0 if axis == "mlp" else 1] * 2
    assert loss_on(small, TOKENS[None, :20]) < 20


@pytest.mark.parametrize("name", ["groups", "scan groups"])
def test_all_axes_together_meet_a_budget(name):
    axes = [axis for axis in AXES[CONFIGS[name].family] if axis not in ("block", "ssm")]
    plan = search(model_of(name), TOKENS, {"params": 0.6, "state": 0.5}, axes, **SMALL)
    assert sizes(plan, name)[0] <= 0.6 and sizes(plan, name)[1] <= 0.5
    assert len({record["axis"] for record in plan.provenance["trajectory"][1:]}) > 2


# Budgets that take both: merged groups alone shrink the state, and little more than 38 % of the parameters can stay.
TIGHT = {"groups": {"params": 0.55, "state": 0.8}, "scan groups": {"params": 0.385}}


@pytest.mark.parametrize("name", TIGHT)
@pytest.mark.parametrize("rescore", [None, 2])
def test_d_model_and_merged_groups_are_searched_like_any_axis(name, rescore, tmp_path):
    """The budget is met, with and without the prefix cache and after a kill, and every step is the model it says."""
    model, log, seen = model_of(name), tmp_path / "log.jsonl", []
    options = {"budget": TIGHT[name], "axes": ["d_model", "merge"], "rescore": rescore, "repairs": ["out_proj"],
               **SMALL}
    plan = search(model, TOKENS, **{**options, "progress": seen.append})
    assert plan.d_model and any(cut.merge for cut in plan.layers.values())
    after = plan.compacted_config(model.config)
    assert parameter_count(after) <= TIGHT[name]["params"] * parameter_count(model.config)
    assert state_bytes(after) <= TIGHT[name].get("state", 1) * state_bytes(model.config)
    assert search(model, TOKENS, prefix_cache=False, **options).layers == plan.layers
    with pytest.raises(Killed):
        search(model, TOKENS, log=log, **{**options, "progress": kill_after(3)})
    assert search(model, TOKENS, log=log, **options) == plan
    assert search(model, TOKENS, log=log, solve_only=True, **options) == plan
    assert {record["layer"] for record in seen if record["axis"] == "d_model"} == {None}
    rows = calibration_of(model, TOKENS, plan.provenance)
    for step, record in enumerate(plan.provenance["trajectory"]):
        small = compact(model, prefix(plan, step), rows)
        assert sum(p.numel() for p in small.parameters()) == record["params"]
        assert math.isclose(loss_on(small, rows.rows), record["loss"], rel_tol=1e-4)


def test_a_trial_of_d_model_runs_every_block():
    plan = search(model_of("mamba2"), TOKENS, {"params": 0.9}, ["d_model"], **SMALL)
    trajectory = plan.provenance["trajectory"]
    assert [record["layer_evaluations"] for record in trajectory] == [3 * (step + 1) for step in range(len(trajectory))]
    config = plan.compacted_config(CONFIGS["mamba2"])
    assert config.d_model == 16 - len(trajectory) + 1 == 14                    # a quarter of 16 over 3 layers: 1
    assert config.layers == CONFIGS["mamba2"].layers


@pytest.mark.parametrize("name", TIGHT)
@pytest.mark.parametrize(("method", "evenly"), [("taylor1", None), ("magnitude", None), ("perplexity", False)])
def test_d_model_and_merged_groups_go_in_one_shot_and_from_saved_scores(name, method, evenly, tmp_path):
    model, path = model_of(name), tmp_path / "scores.safetensors"
    axes, budget = ["d_model", "merge"], TIGHT[name]
    scores = score(model, TOKENS, method, axes, sequences=3, length=12, batch=2, progress=False)
    scores.save(path)
    options = {"axes": axes, "method": "one-shot", "score": path, "evenly": evenly, **SMALL}
    plan = search(model, TOKENS, budget, **options)
    assert plan.d_model and any(cut.merge for cut in plan.layers.values())
    assert plan.compacted_config(model.config).d_model == 16 - len(plan.d_model)
    small = compact(model, plan, calibration_of(model, TOKENS, plan.provenance))
    assert parameter_count(small.config) <= budget["params"] * parameter_count(model.config)
    assert math.isfinite(plan.provenance["loss"])
    solved = solve(model.config, path, budget, axes, bundle=0.25, evenly=evenly)
    assert (solved.layers, solved.d_model) == (plan.layers, plan.d_model)
    values = scores.of(-1, "d_model")                  # taken in bundles of the lowest
    assert set(plan.d_model) == set(sorted(range(16), key=values.__getitem__)[:len(plan.d_model)])


def test_groups_that_are_alike_are_merged_first_and_cost_nothing(tmp_path):
    model = model_of("groups")
    with torch.no_grad():
        mixer = model.layers[1].mixer
        for start in (72 + 8, 72 + 8 + 32):            # B and C of in_proj, behind the MLP, z and x
            mixer.in_proj.weight[start + 24:start + 32] = mixer.in_proj.weight[start:start + 8]
        for start in (32, 64):
            mixer.conv1d.weight[start + 24:start + 32] = mixer.conv1d.weight[start:start + 8]
            mixer.conv1d.bias[start + 24:start + 32] = mixer.conv1d.bias[start:start + 8]
    log = tmp_path / "log.jsonl"
    search(model, TOKENS, {"params": 0.97}, ["merge"], log=log, **{**SMALL, "bundle": 1})
    events = [json.loads(line) for line in log.read_text().splitlines()]
    merged, = (event["loss"] for event in events[2:4] if event["trial"] == [1, "merge", -1])
    assert math.isclose(events[1]["loss"], merged, rel_tol=1e-5)
    unequal, = (event["loss"] for event in events[2:4] if event["trial"] == [0, "merge", -1])
    assert not math.isclose(events[1]["loss"], unequal, rel_tol=1e-4)


@pytest.mark.parametrize("method", ["greedy", "one-shot"])
@pytest.mark.parametrize(("name", "axes", "round_to", "budget"), [
    ("groups", ["state", "head_channel", "mlp", "d_model"], {"states": 4, "head_channels": 2, "mlp": 4, "d_model": 6},
     {"params": 0.5, "state": 0.7}),
    ("mamba1", None, {"channels": 8, "states": 3}, {"params": 0.6})])
def test_what_stays_is_a_multiple_and_the_budget_is_met(method, name, axes, round_to, budget):
    options = {"method": method, "round_to": round_to, **SMALL, "bundle": 1}
    plan = search(model_of(name), TOKENS, budget, axes, **options)
    config, after = CONFIGS[name], plan.compacted_config(CONFIGS[name])
    counted = {"states": "dstate", "head_channels": "headdim", "mlp": "mlp_channels", "channels": "d_inner"}
    changed = set()
    for before, layout in zip(config.layers, after.layers, strict=True):
        for field, attribute in counted.items():
            count = getattr(layout, attribute, 0)
            if field in round_to and count != getattr(before, attribute, 0):
                assert count % round_to[field] == 0, field
                changed.add(field)
    assert after.d_model == config.d_model or after.d_model % round_to["d_model"] == 0
    assert changed
    for measure, share in budget.items():
        size = {"params": parameter_count, "state": state_bytes}[measure]
        assert size(after) <= share * size(config)
    assert plan.provenance["settings"]["round_to"] == round_to


def strict(text: str):
    """JSON as the standard has it: without Infinity and NaN."""
    def refuse(constant):
        raise AssertionError(constant)
    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("rescore", [None, 1])
def test_what_makes_the_loss_infinite_is_not_removed(rescore, monkeypatch, tmp_path):
    log, losses = tmp_path / "log.jsonl", Trials.losses

    def overflowing(self, trials, known, on_loss):
        found = losses(self, trials, known, on_loss)
        return {key: math.inf if key[0] > 0 else loss for key, loss in found.items()}
    monkeypatch.setattr(Trials, "losses", overflowing)
    options = {"log": log, "rescore": rescore, **SMALL}
    plan = search(model_of("mamba2"), TOKENS, {"params": 0.95}, ["head", "state"], **options)
    assert set(plan.layers) == {0}
    assert strict(plan.to_json())["provenance"]["trajectory"][-1]["loss"] > 0
    with pytest.raises(ValueError, match=r"each of the \d+ things left to remove makes the loss infinite; accepted: a"):
        search(model_of("mamba2"), TOKENS, {"params": 0.6}, ["head", "state"], **options)
    assert all(map(strict, log.read_text().splitlines()))
    monkeypatch.setattr(Trials, "losses", None)        # what the log knows is not run again
    with pytest.raises(TypeError):
        search(model_of("mamba2"), TOKENS, {"params": 0.6}, ["head", "state"], **options)
    assert search(model_of("mamba2"), TOKENS, {"params": 0.95}, ["head", "state"], **options) == plan


def test_a_perplexity_beyond_a_float_is_null_and_the_plan_can_be_saved(tmp_path):
    model = model_of("mamba2")
    with torch.no_grad():
        model.backbone.norm_f.weight.mul_(1e5)
    for options in ({}, {"method": "one-shot"}):
        plan = search(model, TOKENS, {"params": 0.9}, ["head"], **options, **SMALL)
        text = strict(plan.to_json(tmp_path / "plan.json"))
        last = text["provenance"]["trajectory"][-1] if not options else text["provenance"]
        assert last["perplexity"] is None
        assert last["loss"] > 700
        compact(model, plan, calibration_of(model, TOKENS, plan.provenance)).save_pretrained(tmp_path / "small")
        assert shedder.load(tmp_path / "small").plan["provenance"] == text["provenance"]
        assert "The search" in render(report.collect("t", model.config, plan))


@pytest.mark.parametrize("options", [{}, {"method": "one-shot", "score": "magnitude", "evenly": False}])
def test_a_model_whose_loss_is_no_number_is_refused(options):
    model = model_of("mamba2")
    with torch.no_grad():
        model.backbone.norm_f.weight[3] = math.nan
    with pytest.raises(ValueError, match="on the calibration text is nan; accepted: a finite one"):
        search(model, TOKENS, {"params": 0.9}, ["head"], **options, **SMALL)


def test_group_aware_head_channels_are_the_same_in_every_head():
    plan = search(model_of("mamba2"), TOKENS, {"params": 0.8}, ["head_channel"], group_aware=True, **SMALL)
    assert plan.layers
    assert all(len(set(cut.head_channels)) == 1 for cut in plan.layers.values())


# ---- one shot


def test_one_shot_takes_the_lowest_scores_and_says_what_the_loss_became():
    model = model_of("mamba2")
    plan = search(model, TOKENS, {"params": 0.8}, ["head"], method="one-shot", score="taylor2",
                  **{**SMALL, "bundle": 1})
    scores = score(model, TOKENS, "taylor2", ["head"], sequences=3, length=12, batch=2)
    taken = [scores.of(layer, "head")[head] for layer, cut in plan.layers.items() for head in cut.heads]
    left = [value for layer in range(3) for head, value in enumerate(scores.of(layer, "head"))
            if layer not in plan.layers or head not in plan.layers[layer].heads]
    assert max(taken) <= min(left)
    small = compact(model, plan, calibration_of(model, TOKENS, plan.provenance))
    nothing = search(small, TOKENS, {"params": 1.0}, ["block"], **SMALL)
    assert math.isclose(plan.provenance["loss"], nothing.provenance["trajectory"][0]["loss"], rel_tol=1e-6)


def test_scores_within_layers_take_as_much_from_every_layer():
    plan = search(model_of("mamba2"), TOKENS, {"params": 0.8}, ["head", "state"], method="one-shot",
                  score={"head": "activation", "state": "ghost"}, **SMALL)
    after = plan.compacted_config(CONFIGS["mamba2"])
    assert len({(layout.nheads, layout.dstate) for layout in after.layers}) == 1
    with pytest.raises(ValueError, match="cannot go evenly"):
        search(model_of("mamba2"), TOKENS, {"params": 0.8}, ["block", "head"], method="one-shot", score="magnitude",
               **SMALL)


def test_saved_scores_solve_another_budget_without_running_the_model(tmp_path):
    model = model_of("mamba2")
    path = tmp_path / "scores.safetensors"
    score(model, TOKENS, "taylor2", sequences=3, length=12, batch=2).save(path)
    options = {"method": "one-shot", "score": path, **SMALL}
    for share in (0.9, 0.7):
        found = search(model, TOKENS, {"params": share}, **options)
        assert blocks_run(lambda share=share: solve(model, path, {"params": share}, bundle=0.25)) == 0
        assert solve(model.config, path, {"params": share}, bundle=0.25).layers == found.layers
        only = search(model, TOKENS, {"params": share}, solve_only=True, **options)
        assert only.layers == found.layers
        assert "loss" not in only.provenance
    other = model_of("mamba2")
    with torch.no_grad():
        other.layers[1].mixer.A_log += 1
    with pytest.raises(ValueError, match="scores of another model"):
        search(other, TOKENS, {"params": 0.9}, **options)
    with pytest.raises(ValueError, match="solve_only takes saved scores"):
        search(model, TOKENS, {"params": 0.9}, method="one-shot", solve_only=True, **SMALL)


def test_what_a_search_will_cost_is_said_before_it_starts(capfd):
    plan = search(model_of("mamba2"), TOKENS, {"params": 0.75}, **{**SMALL, "progress": True})
    first = capfd.readouterr().err.splitlines()[0]
    assert first.startswith("search: 12 candidates, about ")
    said = int(first.split(" layer evaluations")[0].split(", ")[-1].replace(",", ""))
    assert 0.2 < said / plan.provenance["layer_evaluations"] < 5


@pytest.mark.parametrize("name", ["mamba2", "mamba1"])
@pytest.mark.parametrize("repair", [{"norm_repair": "exact"}, {"norm_repair": "none"}, {},
                                    {"repairs": ["gain", "dt_bias", "out_proj"]}])
def test_the_trajectory_tells_what_the_sliced_and_repaired_models_are(name, repair):
    model = model_of(name)
    seen = []
    plan = search(model, TOKENS, {"params": 0.75}, **{**SMALL, "progress": seen.append}, **repair)
    assert plan.norm_repair == repair.get("norm_repair", "stats")
    trajectory = plan.provenance["trajectory"]
    assert [record["step"] for record in seen] == list(range(1, len(trajectory)))
    assert prefix(plan, len(trajectory) - 1).layers == plan.layers
    rows = TOKENS[:97].unfold(0, 13, 12)               # as search cuts the text, before it draws
    picked = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:3].sort().values]
    for step in (0, 1, len(trajectory) - 1):
        small = compact(model, prefix(plan, step), Calibration(picked, batch=2))
        assert sum(p.numel() for p in small.parameters()) == trajectory[step]["params"]
        assert small.allocate_state(1).nbytes == trajectory[step]["state"]
        loss = loss_on(small, picked)
        assert math.isclose(loss, trajectory[step]["loss"], rel_tol=1e-5)      # fp32, other batches
        assert math.isclose(math.exp(loss), trajectory[step]["perplexity"], rel_tol=1e-4)


def test_plain_shedder_takes_the_lowest_perplexity():
    model = model_of("mamba2")
    plan = search(model, TOKENS, {"params": 0.95}, ["block", "ssm"], rule="perplexity", norm_repair="exact", **SMALL)
    first = plan.provenance["trajectory"][1]
    losses = []
    for layer in range(3):
        for cut in (LayerPlan(block=True), LayerPlan(ssm=True)):
            small = compact(model, Plan("mamba2", {layer: cut}))
            nothing = search(small, TOKENS, {"params": 1.0}, ["block"], **SMALL)
            assert nothing.layers == {}
            losses.append(nothing.provenance["trajectory"][0]["loss"])
    assert math.isclose(first["loss"], min(losses), rel_tol=1e-6)


def test_units_that_do_nothing_go_first():
    model = model_of("one layer")
    with torch.no_grad():
        mixer = model.layers[0].mixer
        mixer.out_proj.weight.view(16, 8, 4)[:, [2, 5]] = 0                    # heads 2 and 5
        for state in (3, 6, 8 + 1, 8 + 7):             # B of states 3, 6 of group 0 and 1, 7 of group 1
            mixer.in_proj.weight[2 * 32 + state] = 0
            mixer.conv1d.bias[32 + state] = 0
    for axis, budget, cut in (("head", 0.9, LayerPlan(heads=(2, 5))),
                              ("state", 0.95, LayerPlan(states=((3, 6), (1, 7))))):
        plan = search(model, TOKENS, {"params": budget}, [axis], **SMALL)
        before, after = plan.provenance["trajectory"][:2]
        assert LayerPlan.from_json(after["removed"]) == cut
        if axis == "state":                            # the gated norm notices dead heads
            assert math.isclose(before["loss"], after["loss"], rel_tol=1e-6)


@pytest.mark.parametrize(("change", "message"), [
    ({"budget": {"parameters": 0.5}}, r"budget is \{'parameters': 0.5\}; accepted: a dict with some of"),
    ({"budget": {"params": 1.5}}, r"budget\['params'\] is 1.5; accepted: a share"),
    ({"budget": {"params": 0.001}}, r"budget\['params'\] is 0.001; accepted: more than 0\.\d+, the share of the embed"),
    ({"budget": {"params": 0.5}, "axes": ["state"]}, "cannot be met with axes .*nothing is left to remove at"),
    ({"axes": ["channel"]}, r"axes is \['channel'\]; a mamba2 model accepts"),
    ({"axes": "block"}, "axes is 'block'; a mamba2 model accepts"),
    ({"rule": "best"}, "rule is 'best'; accepted: one of"),
    ({"norm_repair": "best"}, "norm_repair is 'best'; accepted: one of"),
    ({"bundle": 0}, r"bundle is 0; accepted: a share in \(0, 1\], a number of units >= 1, or None"),
    ({"bundle": 1.5}, "bundle is 1.5; accepted"),
    ({"bundle": {"head": 1}}, r"bundle has the axes \['head'\]; accepted: one bundle for all, or one for each"),
    ({"method": "magic"}, "method is 'magic'; accepted: one of"),
    ({"score": "magic"}, "score is 'magic'; accepted: one of"),
    ({"score": {"head": "magnitude"}}, r"score names no method for \['state'\]"),
    ({"round_to": {"taps": 2}}, "round_to has the key 'taps'; accepted: some of"),
    ({"round_to": {"heads": 0}}, r"round_to\['heads'\] is 0; accepted: an integer >= 1"),
    ({"round_to": {"heads": 2}, "bundle": None}, r"bundle is None for \['head'\], which round_to has too"),
    ({"axes": ["merge", "head"], "group_aware": True}, "axes has 'merge', which makes groups of unequal numbers"),
    ({"score": "ghost"}, r"method 'ghost' has no scores for \['head'\]; it has \['state'\]"),
    ({"sequences": 0}, "sequences is 0; accepted: an integer >= 1"),
    ({"text": "some text"}, "this model has no tokenizer"),
    ({"text": torch.zeros(2, 2, 2)}, r"text has shape \(2, 2, 2\)"),
    ({"text": torch.tensor([1, 99, 2])}, r"text has tokens in \[1, 99\]; accepted: \[0, 31\]"),
    ({"text": torch.tensor([1])}, "tokens has 1 tokens"),
])
def test_wrong_arguments_are_named(change, message):
    arguments = {"model": model_of("mamba2"), "text": TOKENS, "budget": {"params": 0.9}, **SMALL, **change}
    with pytest.raises(ValueError, match=message):
        search(**arguments)


def test_text_goes_through_the_models_tokenizer():
    config = ModelConfig("mamba2", d_model=16, vocab_size=256, layers=(SSD,))
    model = LanguageModel(config)
    model.tokenizer_name = "bytes"
    text = "Some words, and more of them, until there are enough for two windows."
    plan = search(model, text, {"params": 0.99}, ["state"], **SMALL)
    same = search(model, torch.tensor(list(text.encode())), {"params": 0.99}, ["state"], **SMALL)
    assert plan == same
    assert model.training
    small = compact(model, plan, text)                 # the windows that the search drew
    assert math.isclose(loss_on(small, calibration_of(model, text, plan.provenance).rows),
                        plan.provenance["trajectory"][-1]["loss"], rel_tol=1e-5)
    with pytest.raises(PlanError, match="needs calibration text"):
        compact(model, plan)


def test_provenance_is_json():
    plan = search(model_of("mamba2"), TOKENS, {"params": 0.9}, **SMALL)
    assert Plan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["provenance"]["settings"]["budget"] == {"params": 0.9}
