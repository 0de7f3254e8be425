"""Greedy search: it meets the budget, is the same with and without its shortcuts, and survives being killed."""

from __future__ import annotations

import json
import math

import pytest
import torch

from shedder.evaluate import negative_log_likelihood
from shedder.layout import NormSegment, RemovedBlock, RemovedSSM, ScanLayout, SSDLayout
from shedder.nn import LanguageModel, ModelConfig
from shedder.prune import LayerPlan, Plan, compact, parameter_count, prefix, search, state_bytes
from shedder.prune.importance import importance

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
    every = search(model_of("mamba2"), TOKENS, {"params": 0.7}, **SMALL)
    few = search(model_of("mamba2"), TOKENS, {"params": 0.7}, rescore=2, **SMALL)
    assert sizes(few, "mamba2")[0] <= 0.7
    assert few.provenance["layer_evaluations"] < 0.7 * every.provenance["layer_evaluations"]
    assert all(record["scored"] <= 2 + 4 for record in few.provenance["trajectory"][2:])


@pytest.mark.parametrize(("name", "rescore"), [("mamba2", None), ("mamba2", 2), ("mamba1", None)])
def test_a_killed_search_goes_on_where_it_was(name, rescore, tmp_path):
    log = tmp_path / "search.jsonl"
    options = {"budget": {"params": 0.75}, "rescore": rescore, **SMALL}
    whole = search(model_of(name), TOKENS, **options)

    class Killed(BaseException):
        pass

    def kill_after_two(record):
        if record["step"] == 2:
            raise Killed
    with pytest.raises(Killed):
        search(model_of(name), TOKENS, log=log, **{**options, "progress": kill_after_two})
    assert len(log.read_text().splitlines()) == 1 + 3  # header, the untouched model, two steps

    steps = []
    resumed = search(model_of(name), TOKENS, log=log, **{**options, "progress": steps.append})
    assert steps[0]["step"] == 3
    assert resumed == whole
    assert search(model_of(name), TOKENS, log=log, **options) == whole         # nothing left to do


def test_a_log_of_another_search_is_refused(tmp_path):
    log = tmp_path / "search.jsonl"
    search(model_of("mamba2"), TOKENS, {"params": 0.9}, log=log, **SMALL)
    for change, words in (({"budget": {"params": 0.8}}, "its settings is"), ({"text": TOKENS.flip(0)}, "its tokens is"),
                          ({"model": model_of("mamba1")}, "its")):
        arguments = {"model": model_of("mamba2"), "text": TOKENS, "budget": {"params": 0.9}, **change}
        with pytest.raises(ValueError, match=f"belongs to another search: {words}"):
            search(**arguments, log=log, **SMALL)
    log.write_text("{")
    with pytest.raises(ValueError, match="is not the log of a search"):
        search(model_of("mamba2"), TOKENS, {"params": 0.9}, log=log, **SMALL)


@pytest.mark.parametrize("name", ["mamba2", "mamba1"])
def test_the_trajectory_tells_what_the_sliced_models_are(name):
    model = model_of(name)
    seen = []
    plan = search(model, TOKENS, {"params": 0.75}, **{**SMALL, "progress": seen.append})
    trajectory = plan.provenance["trajectory"]
    assert [record["step"] for record in seen] == list(range(1, len(trajectory)))
    assert prefix(plan, len(trajectory) - 1).layers == plan.layers
    rows = TOKENS[:97].unfold(0, 13, 12)               # as search cuts the text, before it draws
    for step in (0, 1, len(trajectory) - 1):
        small = compact(model, prefix(plan, step))
        assert sum(p.numel() for p in small.parameters()) == trajectory[step]["params"]
        assert small.allocate_state(1).nbytes == trajectory[step]["state"]
        picked = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:3].sort().values]
        with torch.no_grad():
            loss = negative_log_likelihood(small(picked[:, :-1]), picked[:, 1:]).item()
        assert math.isclose(loss, trajectory[step]["loss"], rel_tol=1e-5)      # fp32, other batches
        assert math.isclose(math.exp(loss), trajectory[step]["perplexity"], rel_tol=1e-4)


def test_plain_shedder_takes_the_lowest_perplexity():
    model = model_of("mamba2")
    plan = search(model, TOKENS, {"params": 0.95}, ["block", "ssm"], rule="perplexity", **SMALL)
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


def test_importance_sees_dead_channels_and_states_of_mamba1():
    model = model_of("mamba1")
    with torch.no_grad():
        mixer = model.layers[0].mixer
        mixer.out_proj.weight[:, 7] = 0
        mixer.x_proj.weight[2 + 8 + 5] = 0                                     # C of state 5
    ranks = importance(model, [TOKENS[None, :20], TOKENS[None, 20:40]])[0]
    assert ranks.units.argmin() == 7
    assert ranks.states.shape == (1, 8)
    assert ranks.states.argmin() == 5
    assert all(mixer.probe is None for mixer in model.mixers)


@pytest.mark.parametrize(("change", "message"), [
    ({"budget": {"parameters": 0.5}}, r"budget is \{'parameters': 0.5\}; accepted: a dict with some of"),
    ({"budget": {"params": 1.5}}, r"budget\['params'\] is 1.5; accepted: a share"),
    ({"budget": {"params": 0.001}}, r"budget\['params'\] is 0.001; accepted: more than 0\.\d+, the share of the embed"),
    ({"budget": {"params": 0.5}, "axes": ["state"]}, "cannot be met with axes .*nothing is left to remove at"),
    ({"axes": ["channel"]}, r"axes is \['channel'\]; a mamba2 model accepts"),
    ({"axes": "block"}, "axes is 'block'; a mamba2 model accepts"),
    ({"rule": "best"}, "rule is 'best'; accepted: one of"),
    ({"norm_repair": "best"}, "norm_repair is 'best'; accepted: one of"),
    ({"bundle": 0}, r"bundle is 0; accepted: a share in \(0, 1\]"),
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


def test_provenance_is_json():
    plan = search(model_of("mamba2"), TOKENS, {"params": 0.9}, **SMALL)
    assert Plan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["provenance"]["settings"]["budget"] == {"params": 0.9}
