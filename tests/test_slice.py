"""Contract 2: a compacted model computes what the untouched dense model computes with its activations masked."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections import Counter

import pytest
import torch
from random_plans import CONFIGS, FULL_PLANS, MODELS, TOKENS, TOLERANCE, difference, kinds, random_plan

import shedder.prune.slice as slicer
from shedder.layout import LayoutError, NormSegment, RemovedSSM, ScanLayout, SSDLayout
from shedder.nn import LanguageModel, ModelConfig
from shedder.prune import LayerPlan, Plan, PlanError, compact, masked, parameter_count, repair, state_bytes

EVERY_CUT = {
    "mamba2": {"block", "ssm", "heads", "states", "groups", "merge", "head_channels", "mlp", "taps", "d_model",
               "heads and ssm", "heads and states", "head_channels and heads", "head_channels and states",
               "merge and states", "merge and mlp", "groups and ssm", "groups and merge", "heads of a removed ssm",
               "head_channels of a removed ssm", "mlp of a removed ssm", "taps of a removed ssm",
               "a group lost all its heads", "other states in each group", "other channels in each head",
               "a norm segment shrank", "a norm segment vanished"},
    "mamba1": {"block", "ssm", "channels", "states", "groups", "merge", "taps", "ranks", "d_model", "channels and ssm",
               "channels and states", "channels and ranks", "merge and ranks", "groups and ranks",
               "channels of a removed ssm", "taps of a removed ssm", "a group lost all its channels"},
}


@pytest.mark.parametrize("family", ["mamba2", "mamba1"])
@pytest.mark.parametrize(("plans", "least"), [(250, 3), pytest.param(5000, 50, marks=pytest.mark.slow)])
def test_compacted_equals_masked_for_any_plan(family, plans, least):
    """Drawn by their numbers; every cut and the pairs that meet in code are among them `least` times."""
    seen: Counter[str] = Counter()
    names = [name for name in CONFIGS if CONFIGS[name].family == family]
    for seed in range(plans):
        model = MODELS[names[seed % len(names)]]
        plan = random_plan(random.Random(seed), model.config)
        seen.update(kinds(plan, model.config))
        assert difference(model, plan) < TOLERANCE, (seed, plan)
    assert {cut: seen[cut] for cut in EVERY_CUT[family] if seen[cut] < least} == {}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_compacted_model_can_be_compacted_again(name):
    model, first = MODELS[name], FULL_PLANS[name]
    once = compact(model, first)
    own = "channels" if model.config.family == "mamba1" else "heads"
    second = Plan(model.config.family, {
        index: LayerPlan(**({own: (0,)} if name.startswith("mamba2") or not first.layers[index].ranks else {}),
                         states=() if isinstance(layout, RemovedSSM) else ((0,),) * layout.ngroups)
        for index, layout in enumerate(once.config.layers)}, d_model=(0, 3))
    assert difference(once, second) < TOLERANCE
    twice, together = compact(once, second), compact(model, first.then(second, model.config))
    assert (twice(TOKENS) - together(TOKENS)).abs().max() < TOLERANCE
    assert parameter_count(twice.config) == parameter_count(together.config)


# ---- mutations of the slicer: the check above must see them

def swap_b_and_c(monkeypatch):
    """Wherever rows of B and C stand one after the other, those of C come first."""
    original = slicer.dimension_rows

    def rows(sections, names, sizes, kept, after):
        right = original(sections, names, sizes, kept, after)
        if "B" not in names or "B" in after:
            return right
        count = len(slicer.section_rows(sections.axes["B"], sizes, kept))
        start = sum(len(slicer.section_rows(sections.axes[name], sizes, kept)) for name in names[:names.index("B")])
        b, c = right[start:start + count], right[start + count:start + 2 * count]
        return [*right[:start], *c, *b, *right[start + 2 * count:]]
    monkeypatch.setattr(slicer, "dimension_rows", rows)


def one_off(axis):
    """The slicer keeps the unit after each unit that it should keep."""
    def mutation(monkeypatch):
        original = slicer.kept_axes

        def kept(sections, config, layout, after, plan, cut):
            axes = original(sections, config, layout, after, plan, cut)
            size = slicer.axis_sizes(sections, config, layout)[axis]
            choice = axes[axis]
            if isinstance(choice, dict):
                return {**axes, axis: {outer: [(i + 1) % size for i in inner] for outer, inner in choice.items()}}
            return {**axes, axis: [tuple((i + 1) % size for i in row) for row in choice]}
        monkeypatch.setattr(slicer, "kept_axes", kept)
    mutation.__name__ = f"one_{axis}_off"
    return mutation


def first_keeps_for_all(axis):
    """All groups keep the states that group 0 keeps, all heads the channels of head 0."""
    def mutation(monkeypatch):
        original = slicer.kept_axes

        def kept(*arguments):
            axes = original(*arguments)
            return {**axes, axis: dict.fromkeys(axes[axis], axes[axis].get(0, ()))}
        monkeypatch.setattr(slicer, "kept_axes", kept)
    mutation.__name__ = f"first_{axis}_for_all"
    return mutation


def first_group_instead_of_the_mean(monkeypatch):
    original = slicer._take
    monkeypatch.setattr(slicer, "_take", lambda tensor, dim, rows: original(tensor, dim, [row[:1] for row in rows]))


def dt_of_other_heads(monkeypatch):
    """A_log and dt_bias are cut at the end instead of where the heads are."""
    original = slicer.section_rows
    monkeypatch.setattr(slicer, "section_rows", lambda axes, sizes, kept: (
        [(i,) for i in range(len(kept["head"]))] if tuple(axes) == ("head",) else original(axes, sizes, kept)))


def norm_weight_not_repaired(monkeypatch):
    monkeypatch.setattr(repair, "_factor", lambda *_: 1.0)


def norm_eps_not_repaired(monkeypatch):
    original = Plan.compacted_config

    def config(self, before):
        after = original(self, before)
        for index, layout in enumerate(after.layers):
            if getattr(layout, "norm_segments", ()):
                flat = tuple(NormSegment(s.channels, 1e-2) for s in layout.norm_segments)
                after = after.with_layer(index, dataclasses.replace(layout, norm_segments=flat))
        return after
    monkeypatch.setattr(Plan, "compacted_config", config)


def stream_eps_not_repaired(monkeypatch):
    original = Plan.compacted_config
    monkeypatch.setattr(Plan, "compacted_config",
                        lambda self, before: dataclasses.replace(original(self, before), norm_eps=before.norm_eps))


def stream_scale_not_repaired(monkeypatch):
    original = Plan.compacted_config
    monkeypatch.setattr(Plan, "compacted_config",
                        lambda self, before: dataclasses.replace(original(self, before), norm_scale=1.0))


def gain_not_folded(monkeypatch):
    monkeypatch.setattr(repair, "_fold_gain", lambda tensors, channels: None)


MUTATIONS = {
    "mamba2": [swap_b_and_c, one_off("head"), one_off("channel"), one_off("state"), one_off("group"), one_off("mlp"),
               one_off("tap"), one_off("model"), first_keeps_for_all("state"), first_keeps_for_all("channel"),
               first_group_instead_of_the_mean, dt_of_other_heads, norm_weight_not_repaired, norm_eps_not_repaired,
               stream_eps_not_repaired, stream_scale_not_repaired, gain_not_folded],
    "mamba2-options": [swap_b_and_c, one_off("head"), one_off("state"), one_off("group"), one_off("model"),
                       first_keeps_for_all("state"), dt_of_other_heads, norm_weight_not_repaired,
                       norm_eps_not_repaired],
    "mamba1": [swap_b_and_c, one_off("channel"), one_off("state"), one_off("group"), one_off("tap"), one_off("rank"),
               one_off("model"), first_group_instead_of_the_mean, stream_eps_not_repaired, stream_scale_not_repaired],
    "mamba1-options": [gain_not_folded, one_off("rank"), one_off("channel")],
}


@pytest.mark.parametrize(("name", "mutation"), [(name, mutation) for name in MUTATIONS for mutation in MUTATIONS[name]])
def test_a_wrong_slicer_is_seen(mutation, name, monkeypatch):
    model, plan = MODELS[name], FULL_PLANS[name]
    assert difference(model, plan) < TOLERANCE
    mutation(monkeypatch)
    assert difference(model, plan) > 1e4 * TOLERANCE


# ---- sizes, dtypes, and what must not change

@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_state_follow_the_closed_formulas(name):
    for model in (MODELS[name], compact(MODELS[name], FULL_PLANS[name])):
        assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(model.config)
        assert model.allocate_state(1).nbytes == state_bytes(model.config, ssm_bytes=8, conv_bytes=8)


def test_removal_is_physical():
    small = compact(MODELS["mamba2"], FULL_PLANS["mamba2"])
    shapes = {name: tuple(parameter.shape) for name, parameter in small.layers[0].mixer.named_parameters()}
    # heads 3 and 5 of group 1 stay with 2 channels and 3 states: z 4, x 4, B 3, C 3, dt 2 = 16 rows, no padding
    assert shapes == {"in_proj.weight": (16, 6), "conv1d.weight": (10, 1, 4), "conv1d.bias": (10,), "dt_bias": (2,),
                      "A_log": (2,), "D": (2,), "norm.weight": (4,), "out_proj.weight": (6, 4)}
    shapes = {name: tuple(parameter.shape) for name, parameter in small.layers[1].mixer.named_parameters()}
    # MLP 2 of 3, heads 0, 2, 3, 4 of 2, groups 0 with 2 and 1, 3 states: 4 + 8 + 8 + 6 + 6 + 4 = 36 rows, 4 of padding
    assert shapes == {"in_proj.weight": (40, 6), "conv1d.weight": (20, 1, 2), "conv1d.bias": (20,), "dt_bias": (4,),
                      "A_log": (4,), "D": (4,), "norm.weight": (8,), "out_proj.weight": (6, 10)}
    assert not small.layers[1].mixer.in_proj.weight[-4:].any()
    shapes = {name: tuple(parameter.shape) for name, parameter in small.layers[3].mixer.named_parameters()}
    # no norm stands between D and out_proj, which takes it in
    assert shapes == {"in_proj.weight": (18, 6), "conv1d.weight": (8, 1, 4), "conv1d.bias": (8,),
                      "out_proj.weight": (6, 9)}
    assert small.allocate_state(1).layers[3].ssm is None
    gone = compact(small, Plan("mamba2", {1: LayerPlan(block=True)}))
    assert len(gone.layers) == 4
    assert not list(gone.layers[1].parameters())
    assert gone.allocate_state(1).layers[1] is None


@pytest.mark.parametrize("name", CONFIGS)
def test_the_original_model_is_untouched_and_shares_nothing(name):
    model = copy.deepcopy(MODELS[name])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = {index: cut for index, cut in FULL_PLANS[name].layers.items() if index > 0}      # layer 0 stays whole
    small = compact(model, dataclasses.replace(FULL_PLANS[name], layers=layers, d_model=()))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.fill_(7)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_dtypes_ties_and_gradients_are_kept():
    model = copy.deepcopy(MODELS["mamba2"]).to(torch.float32).to(torch.bfloat16)
    small = compact(model, FULL_PLANS["mamba2"])
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {name: p.dtype for name, p in small.named_parameters()} == {
        name: dtypes[name] for name, _ in small.named_parameters()}
    assert small.layers[0].mixer.A_log.dtype == torch.float32
    assert small.lm_head.weight is small.backbone.embedding.weight
    small(TOKENS).float().sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def bf16_case(family: str) -> tuple[ModelConfig, Plan]:
    if family == "mamba1":
        return (ModelConfig(family, d_model=64, vocab_size=128, layers=(ScanLayout(128, 16, 4),) * 3),
                Plan(family, {0: LayerPlan(channels=tuple(range(40)), states=((1, 2, 9),)), 1: LayerPlan(ssm=True),
                              2: LayerPlan(ranks=2, taps=1)}))
    layout = SSDLayout(headdim=8, dstate=16, ngroups=2, head_to_group=(0,) * 8 + (1,) * 8,
                       norm_segments=(NormSegment(64, 1e-5), NormSegment(64, 1e-5)), mlp_channels=16)
    return (ModelConfig(family, d_model=64, vocab_size=128, layers=(layout,) * 3),
            Plan(family, {0: LayerPlan(heads=(0, 3, 5, 9), states=((0, 1, 2), (3, 4, 5))),
                          1: LayerPlan(ssm=True, heads=(1, 2, 3), mlp=(0, 5)),
                          2: LayerPlan(heads=(0, 1, 2, 3, 4), merge=((0, 1),), taps=1,
                                       head_channels=tuple((h % 8, (3 * h + 1) % 8) if h % 8 != (3 * h + 1) % 8
                                                           else (0, 5) for h in range(16)))}))


@pytest.mark.parametrize("family", ["mamba2", "mamba1"])
@pytest.mark.parametrize("d_model", [(), tuple(range(0, 64, 7)), tuple(range(20))])
@torch.no_grad()
def test_in_bf16_compacting_costs_no_accuracy(family, d_model):
    """Norm weights are all 1: rounding errors of a factor folded into them would add up."""
    config, plan = bf16_case(family)
    plan = dataclasses.replace(plan, d_model=d_model)
    torch.manual_seed(1)
    model = LanguageModel(config).to(torch.bfloat16).eval()
    tokens = torch.randint(0, 128, (4, 64))
    with masked(copy.deepcopy(model).double(), plan) as exact:
        expected = exact(tokens)
    with masked(model, plan):
        masked_error = (model(tokens).double() - expected).square().mean().sqrt()
    error = (compact(model, plan)(tokens).double() - expected).square().mean().sqrt()
    assert error <= 1.1 * masked_error                 # contract 2


def test_an_empty_plan_gives_a_copy():
    for name, model in MODELS.items():
        same = compact(model, Plan(model.config.family))
        assert same.config == model.config, name
        assert torch.equal(same(TOKENS), model(TOKENS))


def test_without_repair_the_weights_are_plain_slices():
    plan = dataclasses.replace(FULL_PLANS["mamba2"], norm_repair="none", d_model=())
    small = compact(MODELS["mamba2"], plan)
    weight = MODELS["mamba2"].layers[2].mixer.norm.weight
    assert torch.equal(small.layers[2].mixer.norm.weight, weight[:6])
    assert small.config.layers[2].norm_segments == (NormSegment(6, 1e-2),)
    assert difference(MODELS["mamba2"], plan) > 1e-3


def test_masks_leave_no_probe_behind_and_keep_those_that_were_set():
    model = MODELS["mamba2"]
    seen = []
    model.layers[0].mixer.probe = lambda name, value: seen.append(name) or value
    try:
        with pytest.raises(IndexError), masked(model, FULL_PLANS["mamba2"]):
            [model(TOKENS)][1]
        assert {"x", "dt", "B", "C", "y", "gated", "out"} <= set(seen)
        assert model.layers[0].mixer.probe is not None
    finally:
        model.layers[0].mixer.probe = None
    assert all(mixer.probe is None for mixer in model.mixers)


def test_a_plan_that_does_not_fit_is_refused_by_both():
    plan = Plan("mamba2", {0: LayerPlan(heads=(9,))})
    with pytest.raises(PlanError, match=r"layers\.0\.heads lists head 9; this layer has heads 0\.\.5"):
        compact(MODELS["mamba2"], plan)
    with pytest.raises(PlanError, match="lists head 9"), masked(MODELS["mamba2"], plan):
        pass


def test_a_tensor_that_the_tables_do_not_know_is_refused():
    with pytest.raises(LayoutError, match=r"the block has the tensors \['extra'\]"):
        slicer.slice_block({"extra": torch.zeros(1)}, CONFIGS["mamba2"], 0, Plan("mamba2"))
