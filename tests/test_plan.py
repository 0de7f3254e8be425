"""Plans: what they accept, what they say, and their JSON."""

import dataclasses
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shedder.layout import NormSegment, RemovedBlock, RemovedSSM, ScanLayout, SSDLayout
from shedder.nn.config import ModelConfig
from shedder.prune import from_mamba_shedder, is_mamba_shedder
from shedder.prune.plan import REPAIRS, LayerPlan, Plan, PlanError
from shedder.prune.size import parameter_count, state_bytes

SSD = SSDLayout(headdim=4, dstate=6, ngroups=2, head_to_group=(0, 0, 0, 1, 1, 1),
                norm_segments=(NormSegment(12, 1e-5), NormSegment(12, 1e-5)))
SCAN = ScanLayout(d_inner=10, dstate=4, dt_rank=3)
GROUPED_SCAN = ScanLayout(d_inner=4, dstate=4, dt_rank=3, channel_to_group=(0, 0, 1, 1))
MAMBA2 = ModelConfig("mamba2", d_model=8, vocab_size=16,
                     layers=(SSD, SSD, RemovedSSM(4, 4, (NormSegment(16, 1e-5),)), RemovedBlock()))
MAMBA1 = ModelConfig("mamba1", d_model=8, vocab_size=16, layers=(SCAN, SCAN, RemovedSSM(10, 1), GROUPED_SCAN))


@pytest.mark.parametrize(("config", "layer", "cut", "message"), [
    (MAMBA2, 0, {"heads": (6,)}, "layers.0.heads lists head 6; this layer has heads 0..5"),
    (MAMBA2, 0, {"heads": tuple(range(6))},
     "layers.0.heads lists all 6 heads; accepted: at most 5 of them, use ssm or block to remove them all"),
    (MAMBA2, 1, {"states": ((6,), (0,))}, "layers.1.states[0] lists state 6; this layer has states 0..5"),
    (MAMBA2, 1, {"states": (tuple(range(6)),) * 2}, "use ssm to remove them all"),
    (MAMBA2, 1, {"states": ((1,),)}, "layers.1.states has 1 lists; this layer has 2 B/C groups"),
    (MAMBA2, 1, {"states": ((1,), (1, 2))}, "removes [1, 2] states from groups 0..1; accepted: the same number"),
    (MAMBA2, 1, {"block": True, "heads": (1,)}, "layers.1 removes the block and also heads 1; accepted: block alone"),
    (MAMBA2, 1, {"block": True, "ssm": True}, "layers.1 removes the block and also the SSM"),
    (MAMBA2, 1, {"ssm": True, "states": ((1,), (1,))}, "layers.1 removes the ssm and also lists states"),
    (MAMBA2, 1, {"channels": (1,)}, "layers.1.channels is [1]; a mamba2 layer has heads, use heads"),
    (MAMBA2, 2, {"ssm": True}, "layers.2.ssm cuts an SSM that is already removed; accepted: heads or block"),
    (MAMBA2, 2, {"states": ((1,),)}, "layers.2.states cuts an SSM that is already removed"),
    (MAMBA2, 2, {"heads": (4,)}, "layers.2.heads lists head 4; this layer has heads 0..3"),
    (MAMBA2, 3, {"block": True}, "layers.3 cuts a block that is already removed"),
    (MAMBA2, 4, {"block": True}, "layers.4 does not exist; this model has layers 0..3"),
    (MAMBA1, 0, {"heads": (1,)}, "layers.0.heads is [1]; a mamba1 layer has channels, use channels"),
    (MAMBA1, 0, {"channels": (10,)}, "layers.0.channels lists channel 10; this layer has channels 0..9"),
    (MAMBA1, 2, {"channels": tuple(range(10))}, "layers.2.channels lists all 10 channels"),
    (MAMBA1, 3, {"states": ((0,), (1,))}, "layers.3.states differs between groups"),
])
def test_a_cut_that_does_not_fit_names_layer_field_and_range(config, layer, cut, message):
    plan = Plan(config.family, {layer: LayerPlan(**cut)})
    with pytest.raises(PlanError) as error:
        plan.validate(config)
    assert message in str(error.value)


def test_the_family_must_be_the_models():
    with pytest.raises(PlanError, match="family is 'mamba1', the model is 'mamba2'"):
        Plan("mamba1").validate(MAMBA2)


@pytest.mark.parametrize(("values", "message"), [
    ({"heads": (1, 2, 1)}, "heads lists 1 more than once"),
    ({"heads": (-1,)}, "heads lists -1; accepted: integers >= 0"),
    ({"heads": (True,)}, "heads lists True; accepted: integers >= 0"),
    ({"heads": 3}, "heads is 3; accepted: a list of integers"),
    ({"states": ((1, 1),)}, "states[0] lists 1 more than once"),
    ({"states": (1, 2)}, "states[0] is 1; accepted: a list of integers"),
    ({"block": 1}, "block is 1; accepted: true or false"),
])
def test_a_layer_plan_is_checked_when_made(values, message):
    with pytest.raises(PlanError) as error:
        LayerPlan(**values)
    assert message in str(error.value)


indices = st.lists(st.integers(0, 99), unique=True, max_size=5)
layer_plans = st.builds(LayerPlan, block=st.booleans(), ssm=st.booleans(), heads=indices, channels=indices,
                        states=st.lists(indices, max_size=3), groups=indices, mlp=indices,
                        head_channels=st.lists(indices, max_size=3), taps=st.integers(0, 3), ranks=st.integers(0, 9),
                        merge=st.sampled_from([(), ((0, 1),), ((3, 1), (0, 2))]))


@given(plan=st.builds(Plan, st.sampled_from(["mamba1", "mamba2"]), st.dictionaries(st.integers(0, 99), layer_plans),
                      st.sampled_from(["exact", "stats", "none"]), st.just({"from": ["a", 1, None]}), indices,
                      st.lists(st.sampled_from(REPAIRS), unique=True)))
def test_json_gives_the_same_plan_back(plan):
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(json.loads(plan.to_json())) == plan


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    plan = Plan("mamba2", {0: LayerPlan(heads=(1,))}, provenance={"by": "hand"})
    plan.to_json(path)
    assert Plan.from_json(path) == plan == Plan.from_json(str(path))

    def fail(*_):
        raise OSError("disk full")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        Plan("mamba2").to_json(path)
    assert Plan.from_json(path) == plan
    assert os.listdir(tmp_path) == ["plan.json"]


GOOD = {"version": 1, "family": "mamba2", "layers": {}}


@pytest.mark.parametrize(("data", "message"), [
    ("{", "is not JSON"),
    ('{"version": 1, "version": 1}', "the key 'version' appears more than once"),
    ({**GOOD, "version": 2}, "version is 2; accepted: 1"),
    ({**GOOD, "family": "mamba3"}, "family is 'mamba3'; accepted: one of ('mamba1', 'mamba2')"),
    ({**GOOD, "norm_repair": "maybe"}, "norm_repair is 'maybe'; accepted: one of ('exact', 'stats', 'none')"),
    ({**GOOD, "extra": 1}, "found ['extra', 'family', 'layers', 'version']"),
    ({"version": 1, "family": "mamba2"}, "found ['family', 'version']"),
    ({**GOOD, "layers": []}, "layers is []; accepted: an object"),
    ({**GOOD, "layers": {"one": {}}}, "layers has the key 'one'; accepted: layer numbers"),
    ({**GOOD, "layers": {"1": {}, "01": {}}}, "layers lists layer 1 more than once"),
    ({**GOOD, "layers": {"7": {"head": [1]}}}, "layers.7 has unknown fields ['head']"),
    ({**GOOD, "layers": {"7": []}}, "layers.7 is []; accepted: an object"),
    ({**GOOD, "layers": {"7": {"heads": [1, 1]}}}, "layers.7.heads lists 1 more than once"),
    ({**GOOD, "layers": {"7": {"heads": "12"}}}, "layers.7.heads is '12'; accepted: a list of integers"),
])
def test_bad_json_is_refused_with_its_place(data, message, tmp_path):
    with pytest.raises(PlanError) as error:
        Plan.from_json(data)
    assert message in str(error.value)
    path = tmp_path / "plan.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(PlanError) as error:
        Plan.from_json(path)
    assert str(error.value).startswith(f"{path}: ")


def test_a_missing_file_is_named():
    with pytest.raises(PlanError, match=r"nowhere/plan\.json: cannot be read as a plan"):
        Plan.from_json("nowhere/plan.json")


def test_what_is_left_of_each_kind_of_layer():
    plan = Plan("mamba2", {0: LayerPlan(heads=(0, 1, 2), states=((0, 5), (1, 2))), 1: LayerPlan(ssm=True, heads=(4,)),
                           2: LayerPlan(heads=(0,))})
    heads, ssm, again, gone = plan.compacted_config(MAMBA2).layers
    assert heads == SSDLayout(headdim=4, dstate=4, ngroups=1, head_to_group=(0, 0, 0),
                              norm_segments=(NormSegment(12, 1e-5),), row_padding=5)       # 24 + 8 + 3 rows
    assert ssm == RemovedSSM(5, 4, (NormSegment(12, 1e-5), NormSegment(8, 1e-5 * (12 / 8))))
    assert again == RemovedSSM(3, 4, (NormSegment(12, 1e-5 * (16 / 12)),))
    assert gone == RemovedBlock()
    plan = Plan("mamba1", {0: LayerPlan(channels=(3, 9), states=((2,),)), 1: LayerPlan(ssm=True, channels=(0,)),
                           3: LayerPlan(channels=(0, 1))})
    assert plan.compacted_config(MAMBA1).layers == (
        ScanLayout(d_inner=8, dstate=3, dt_rank=3), RemovedSSM(9, 1, gain=False), RemovedSSM(10, 1),
        ScanLayout(d_inner=2, dstate=4, dt_rank=3))


def test_then_speaks_the_numbering_of_the_first_model():
    first = Plan("mamba2", {0: LayerPlan(heads=(0, 2), states=((0,), (5,))), 1: LayerPlan(heads=(5,))})
    second = Plan("mamba2", {0: LayerPlan(heads=(0,), states=((0,), (0,))), 1: LayerPlan(ssm=True)})
    assert first.then(second, MAMBA2) == Plan("mamba2", {
        0: LayerPlan(heads=(0, 1, 2), states=((0, 1), (0, 5))), 1: LayerPlan(ssm=True, heads=(5,))})


def test_explain_says_what_goes_what_stays_and_the_sizes():
    plan = Plan("mamba2", {0: LayerPlan(heads=(0, 1, 4), states=((0, 1), (2, 3))), 1: LayerPlan(block=True)})
    text = plan.explain(MAMBA2)
    assert "remove heads 0-1 4; states 0-1 of group 0, 2-3 of group 1" in text
    assert "6 heads of 4, 2 groups, 6 states -> 3 heads of 4, 2 groups (1, 2 heads each), 4 states" in text
    assert "remove the block" in text
    assert "2 layers stay as they are" in text
    after = plan.compacted_config(MAMBA2)
    assert f"parameters: {parameter_count(MAMBA2):,} -> {parameter_count(after):,}" in text
    assert f"{state_bytes(MAMBA2):,} -> {state_bytes(after):,}" in text


# ---- every cut in words

FULL = ModelConfig("mamba2", d_model=16, vocab_size=16, layers=(dataclasses.replace(SSD, mlp_channels=5),) * 3)


def test_every_reason_is_given_at_once():
    plan = Plan("mamba2", {0: LayerPlan(heads=(6, 7), taps=4, mlp=(5,)), 1: LayerPlan(ranks=1, channels=(0,)),
                           2: LayerPlan(groups=(0, 1)), 9: LayerPlan(block=True)}, d_model=(16,))
    expected = [
        "d_model lists channel 16; this model has channels 0..15",
        "layers.0.heads lists head 6; this layer has heads 0..5",
        "layers.0.mlp lists MLP channel 5; this layer has MLP channels 0..4",
        "layers.0.taps is 4; the convolution of this layer has 4 taps, accepted: at most 3",
        "layers.1.channels is [0]; a mamba2 layer has heads, use heads",
        "layers.1.ranks is 1; a mamba2 layer has none, accepted: no ranks",
        "layers.2.groups lists all 2 groups; accepted: at most 1 of them, use ssm or block to remove them all",
        "layers.9 does not exist; this model has layers 0..2"]
    assert plan.problems(FULL) == expected
    with pytest.raises(PlanError) as error:
        plan.validate(FULL)
    assert str(error.value).splitlines() == plan.problems(FULL)
    assert Plan("mamba2", {0: LayerPlan(heads=(1,))}).problems(FULL) == []


@pytest.mark.parametrize(("config", "layer", "cut", "message"), [
    (FULL, 0, {"heads": (3, 4), "groups": (0,)}, None),
    (FULL, 0, {"heads": (3, 4, 5), "groups": (0,)}, "layers.0 removes all heads, some by their groups"),
    (FULL, 0, {"head_channels": ((0,),) * 5}, "layers.0.head_channels has 5 lists; this layer has 6 heads"),
    (FULL, 0, {"head_channels": ((0,),) * 5 + ((),)},
     "removes [1, 1, 1, 1, 1, 0] channels from heads 0..5; accepted: the same number from each head"),
    (FULL, 0, {"head_channels": ((4,),) * 6}, "0.head_channels[0] lists channel 4; this layer has channels 0..3"),
    (FULL, 0, {"head_channels": ((0, 1, 2, 3),) * 6}, "lists all 4 channels; accepted: at most 3"),
    (FULL, 0, {"mlp": (0, 1, 2, 3, 4)}, None),
    (MAMBA2, 0, {"mlp": (0,)}, "layers.0.mlp lists MLP channel 0; this layer has no MLP channels"),
    (MAMBA2, 0, {"merge": ((0, 2),)}, "layers.0.merge[0] lists group 2; this layer has groups 0..1"),
    (MAMBA2, 0, {"merge": ((0, 1),), "ssm": True}, "removes the ssm and also lists merge"),
    (MAMBA2, 2, {"merge": ((0, 1),)}, "layers.2.merge cuts an SSM that is already removed"),
    (MAMBA2, 2, {"groups": (0,)}, "layers.2.groups cuts an SSM that is already removed"),
    (MAMBA1, 0, {"ranks": 3}, "layers.0.ranks is 3; dt of this layer has rank 3, accepted: at most 2"),
    (MAMBA1, 0, {"ranks": 1, "ssm": True}, "removes the ssm and also lists ranks"),
    (MAMBA1, 0, {"head_channels": ((1,),)}, "0.head_channels is [[1]]; a mamba1 layer has channels, use channels"),
])
def test_every_cut_is_checked(config, layer, cut, message):
    found = Plan(config.family, {layer: LayerPlan(**cut)}).problems(config)
    assert (found == []) if message is None else any(message in reason for reason in found)


@pytest.mark.parametrize(("values", "message"), [
    ({"taps": -1}, "taps is -1; accepted: an integer >= 0"),
    ({"ranks": True}, "ranks is True; accepted: an integer >= 0"),
    ({"merge": ((1,),)}, "merge[0] is [1]; accepted: at least two groups"),
    ({"merge": ((0, 1), (1, 2))}, "merge lists group 1 in more than one set"),
    ({"merge": (0, 1)}, "merge[0] is 0; accepted: a list of integers"),
    ({"head_channels": "abc"}, "head_channels is 'abc'; accepted: one list per head"),
])
def test_the_newer_fields_are_checked_when_made(values, message):
    with pytest.raises(PlanError) as error:
        LayerPlan(**values)
    assert message in str(error.value)


def test_the_words_of_every_cut():
    cut = LayerPlan(ssm=True, heads=(0, 1, 4), groups=(1,), mlp=(2, 3), head_channels=((0,),) * 6, taps=2)
    assert str(cut) == ("the SSM; heads 0-1 4; groups 1; MLP channels 2-3; head channels 0 of each head; "
                        "the oldest 2 taps")
    assert str(LayerPlan(merge=((0, 2), (1, 3)), ranks=3, taps=1)) == (
        "merge groups 0 2, 1 3; the oldest tap; 3 of the rank of dt")
    text = Plan("mamba2", {0: LayerPlan(heads=(0,), mlp=(0,), taps=1)}, "stats", d_model=(1, 2, 3),
                repairs=("out_proj", "gain")).explain(FULL)
    assert "norm repair stats, further repairs gain, out_proj" in text
    assert "remove channels 1-3 of the residual stream: d_model 16 -> 13" in text
    assert "6 heads of 4, 5 MLP channels, 2 groups, 6 states -> 5 heads of 4, 4 MLP channels" in text
    assert "3 taps" in text
    assert "slow: d_model 13 is no multiple of 8" in text
    assert "slow: layer 0: 20 channels are no multiple of 8" in text


# ---- plans from plans

def test_diff_lists_what_the_other_does_besides_and_what_it_leaves():
    mine = Plan("mamba2", {0: LayerPlan(heads=(0, 1, 2), taps=1), 1: LayerPlan(ssm=True)}, d_model=(0, 1))
    other = Plan("mamba2", {0: LayerPlan(heads=(2, 3), states=((1,), (2,)), merge=((0, 1),)), 2: LayerPlan(block=True)},
                 "stats", d_model=(1, 2), repairs=("gain",))
    assert mine.diff(other).splitlines() == [
        "norm_repair: exact -> stats", "repairs: none -> gain", "d_model: + channels 2", "d_model: - channels 0",
        "layer 0: + heads 3", "layer 0: - heads 0-1", "layer 0, group 0: + states 1", "layer 0, group 1: + states 2",
        "layer 0: + merge groups 0-1", "layer 0: taps 1 -> 0", "layer 1: - the SSM", "layer 2: + the block"]
    assert mine.diff(mine) == ""
    everywhere = Plan("mamba2", {0: LayerPlan(head_channels=((0, 3),) * 6)})
    assert Plan("mamba2").diff(everywhere) == "layer 0, each head: + head channels 0 3"


def test_override_replaces_layers_and_none_leaves_them_whole():
    plan = Plan("mamba2", {0: LayerPlan(heads=(0,)), 1: LayerPlan(ssm=True)}, provenance={"by": "search"})
    changed = plan.override({1: None, 2: LayerPlan(block=True)})
    assert changed.layers == {0: LayerPlan(heads=(0,)), 2: LayerPlan(block=True)}
    assert changed.provenance == plan.provenance
    assert 1 in plan.layers


def test_round_to_gives_units_back_until_the_rest_is_a_multiple():
    config = dataclasses.replace(FULL, d_model=40)
    plan = Plan("mamba2", {0: LayerPlan(heads=(0, 2, 3), states=((0, 1, 2), (3, 4, 5)), mlp=(1,),
                                        head_channels=((0,), (1,), (2,), (3,), (0,), (1,)))},
                d_model=tuple(range(0, 18, 2)))
    rounded = plan.round_to(config, {"heads": 2, "states": 4, "head_channels": 2, "mlp": 4, "d_model": 8})
    cut = rounded.layers[0]
    assert cut.heads == (2, 3)                                         # 3 stayed, now 4
    assert cut.states == ((1, 2), (4, 5))                              # 3 stayed, now 4 of 6
    assert cut.head_channels == ()                                     # 3 of 4 stayed, now all
    assert cut.mlp == (1,)                                             # 4 stayed already
    assert rounded.d_model == (2, 4, 6, 8, 10, 12, 14, 16)             # 31 stayed, now 32
    assert plan.round_to(config, {"heads": 4}).layers[0].heads == (2, 3)
    assert plan.round_to(config, {"heads": 100}).layers[0].heads == ()
    best = plan.round_to(config, {"heads": 2}, importance=lambda layer, name, outer, unit: unit == 2)
    assert best.layers[0].heads == (0, 3)                              # the most important one is back
    with pytest.raises(ValueError, match="multiples has the key 'taps'; accepted: some of"):
        plan.round_to(config, {"taps": 2})
    with pytest.raises(ValueError, match=r"multiples\['heads'\] is 0"):
        plan.round_to(config, {"heads": 0})


def test_then_refuses_cuts_that_have_no_common_plan():
    config = ModelConfig("mamba2", d_model=8, vocab_size=16, layers=(
        SSDLayout(headdim=2, dstate=4, ngroups=4, head_to_group=(0, 1, 2, 3)),))
    merge = Plan("mamba2", {0: LayerPlan(merge=((0, 1), (2, 3)))})
    with pytest.raises(PlanError, match=r"layers\.0: merge and then merge are no single cut"):
        merge.then(Plan("mamba2", {0: LayerPlan(merge=((0, 1),))}), config)
    assert merge.then(Plan("mamba2", {0: LayerPlan(groups=(1,))}), config).layers[0] == LayerPlan(
        merge=((0, 1), (2, 3)), groups=(2, 3))
    ranks = Plan("mamba1", {0: LayerPlan(ranks=1)})
    with pytest.raises(PlanError, match=r"layers\.0: ranks and then channels are no single cut"):
        ranks.then(Plan("mamba1", {0: LayerPlan(channels=(0,))}), MAMBA1)
    assert ranks.then(ranks, MAMBA1).layers[0].ranks == 2


# ---- Mamba-Shedder's files

def test_a_pruning_config_of_mamba_shedder_is_read(tmp_path):
    released = {"pruned_ssm_idx": [63, 54, 42, 45, 53, 57]}
    path = tmp_path / "pruning_config.json"
    path.write_text(json.dumps(released))
    plan = from_mamba_shedder(path, "mamba2")
    assert plan.layers == {index: LayerPlan(ssm=True) for index in sorted(released["pruned_ssm_idx"])}
    assert plan.provenance["order"] == {"ssm": released["pruned_ssm_idx"]}
    both = from_mamba_shedder({"pruned_mamba_block_idx": [2, 6], "pruned_ssm_idx": [3], "pruned_mlp_idx": []}, "mamba1")
    assert both.layers == {2: LayerPlan(block=True), 3: LayerPlan(ssm=True), 6: LayerPlan(block=True)}
    assert is_mamba_shedder(released)
    assert not is_mamba_shedder(json.loads(plan.to_json()))


@pytest.mark.parametrize(("data", "message"), [
    ({}, "is not a pruning_config.json"),
    ({"layers": {}}, "is not a pruning_config.json"),
    ({"pruned_mlp_channels": {"0": 3072}}, "pruned_mlp_channels is {'0': 3072}; accepted for a mamba2 model"),
    ({"pruned_hymba_block_idx": [2]}, "pruned_hymba_block_idx is [2]"),
    ({"pruned_ssm_idx": [1, 1]}, "pruned_ssm_idx lists 1 more than once"),
    ({"pruned_ssm_idx": [-1]}, "pruned_ssm_idx lists -1"),
    ({"pruned_ssm_idx": [1], "pruned_mamba_block_idx": [1]}, "lists layer 1, whose the SSM goes already"),
])
def test_a_pruning_config_that_does_not_fit_is_refused(data, message, tmp_path):
    path = tmp_path / "pruning_config.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError) as error:
        from_mamba_shedder(path, "mamba2")
    assert message in str(error.value)
    with pytest.raises(PlanError, match=r"nowhere\.json: cannot be read"):
        from_mamba_shedder("nowhere.json", "mamba2")
