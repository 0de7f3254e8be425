"""Plans: what they accept, what they say, and their JSON."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shedder.layout import NormSegment, RemovedBlock, RemovedSSM, ScanLayout, SSDLayout
from shedder.nn.config import ModelConfig
from shedder.prune.plan import LayerPlan, Plan, PlanError
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
                        states=st.lists(indices, max_size=3))


@given(plan=st.builds(Plan, st.sampled_from(["mamba1", "mamba2"]), st.dictionaries(st.integers(0, 99), layer_plans),
                      st.sampled_from(["exact", "none"]), st.just({"from": ["a", 1, None]})))
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
