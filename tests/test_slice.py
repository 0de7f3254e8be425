"""Contract 2: a compacted model computes what the untouched dense model computes with its activations masked."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shedder.prune.slice as slicer
from shedder.layout import LayoutError, NormSegment, RemovedBlock, RemovedSSM, ScanLayout, SSDLayout
from shedder.nn import LanguageModel, ModelConfig
from shedder.prune import LayerPlan, Plan, PlanError, compact, masked, parameter_count, state_bytes

TOLERANCE = 1e-10                   # of float64 logits of order 1; sums in another order differ by some 1e-15
LENGTH, PROMPT = 7, 4


def segments(*channels: int) -> tuple[NormSegment, ...]:
    return tuple(NormSegment(c, 1e-2) for c in channels)      # an eps large enough that not repairing it shows


# Three ragged or regular Mamba-2 layers and one without SSM; Mamba-1 with and without channel groups.
CONFIGS = {
    "mamba2": ModelConfig("mamba2", d_model=8, vocab_size=11, layers=(
        SSDLayout(headdim=3, dstate=5, ngroups=2, head_to_group=(0, 0, 0, 1, 1, 1), norm_segments=segments(9, 9)),
        SSDLayout(headdim=2, dstate=4, ngroups=3, head_to_group=(2, 0, 1, 1, 0), norm_segments=segments(6, 4),
                  row_padding=3, conv_width=3),
        RemovedSSM(nheads=4, headdim=2, norm_segments=segments(8)),
        SSDLayout(headdim=4, dstate=3, ngroups=1, head_to_group=(0, 0, 0))), dt_limit=(0.05, 2.0)),
    "mamba2-options": ModelConfig("mamba2", d_model=8, vocab_size=11, layers=(
        SSDLayout(headdim=2, dstate=4, ngroups=2, head_to_group=(0, 0, 1, 1), norm_segments=segments(4, 4)),
        SSDLayout(headdim=2, dstate=4, ngroups=2, head_to_group=(0, 0, 1, 1), norm_segments=segments(8),
                  conv_width=2)),
        norm_before_gate=True, d_has_hdim=True, proj_bias=True, conv_bias=False, tie_embeddings=False,
        residual_in_fp32=False),
    "mamba1": ModelConfig("mamba1", d_model=8, vocab_size=11, layers=(
        ScanLayout(d_inner=6, dstate=4, dt_rank=2), RemovedSSM(nheads=5, headdim=1),
        ScanLayout(d_inner=6, dstate=3, dt_rank=3, channel_to_group=(0, 1, 0, 2, 1, 1), conv_width=3))),
    "mamba1-options": ModelConfig("mamba1", d_model=8, vocab_size=11, layers=(
        ScanLayout(d_inner=5, dstate=4, dt_rank=1, conv_width=2), ScanLayout(d_inner=6, dstate=3, dt_rank=3)),
        proj_bias=True, conv_bias=False, tie_embeddings=False, residual_in_fp32=False),
}


def random_model(config: ModelConfig) -> LanguageModel:
    """Every parameter random, none at a value that would hide an exchange; the padding rows of in_proj zero."""
    model = LanguageModel(config, dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7)
        for block, layout in zip(model.layers, config.layers, strict=True):
            if getattr(layout, "row_padding", 0):
                block.mixer.in_proj.weight[-layout.row_padding:] = 0
    return model


MODELS = {name: random_model(config) for name, config in CONFIGS.items()}
TOKENS = torch.randint(0, 11, (2, LENGTH), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def runs(model: LanguageModel) -> dict[str, torch.Tensor]:
    """Logits of all tokens, by prefill, step by step, and by prefill then steps."""
    def steps(start: int, state) -> list[torch.Tensor]:
        return [model(TOKENS[:, t:t + 1], state) for t in range(start, LENGTH)]
    state = model.allocate_state(TOKENS.shape[0])
    both = torch.cat([model(TOKENS[:, :PROMPT], state), *steps(PROMPT, state)], 1)
    return {"prefill": model(TOKENS), "steps": torch.cat(steps(0, model.allocate_state(TOKENS.shape[0])), 1),
            "prefill then steps": both}


def difference(model: LanguageModel, plan: Plan) -> float:
    """The largest difference between compacted and masked, over all ways to run."""
    with masked(model, plan):
        expected = runs(model)
    got = runs(compact(model, plan))
    return max((got[way] - expected[way]).abs().max().item() for way in expected)


# ---- random plans

@st.composite
def layer_plans(draw: st.DrawFn, layout, family: str) -> LayerPlan:
    """Any cut that the layer allows: nothing, its block, or any mix of SSM, heads or channels, and states."""
    if draw(st.integers(0, 5)) == 0:
        return LayerPlan(block=True)
    units = layout.d_inner if family == "mamba1" else layout.nheads
    removed = tuple(draw(st.permutations(range(units))))[:draw(st.integers(0, units - 1))]
    own = {"channels" if family == "mamba1" else "heads": removed}
    if isinstance(layout, RemovedSSM):
        return LayerPlan(**own)
    if draw(st.integers(0, 3)) == 0:
        return LayerPlan(ssm=True, **own)
    count = draw(st.integers(0, layout.dstate - 1))
    subsets = st.permutations(range(layout.dstate)).map(lambda order: tuple(order[:count]))
    if family == "mamba1":
        return LayerPlan(states=(draw(subsets),) * layout.ngroups, **own)
    return LayerPlan(states=tuple(draw(subsets) for _ in range(layout.ngroups)), **own)


@st.composite
def plans(draw: st.DrawFn, config: ModelConfig) -> Plan:
    return Plan(config.family, {index: draw(layer_plans(layout, config.family))
                                for index, layout in enumerate(config.layers) if not isinstance(layout, RemovedBlock)
                                and draw(st.integers(0, 4))})


def kinds(plan: Plan, config: ModelConfig) -> list[str]:
    """Which cuts a plan has, to see that all were tried."""
    found = []
    for index, cut in plan.layers.items():
        layout = config.layers[index]
        own = "channels" if config.family == "mamba1" else "heads"
        found += [name for name in ("block", "ssm", "heads", "channels", "states") if getattr(cut, name)]
        if cut.ssm and getattr(cut, own):
            found.append(f"ssm and {own}")
        if cut.states and getattr(cut, own):
            found.append(f"states and {own}")
        if isinstance(layout, RemovedSSM) and getattr(cut, own):
            found.append(f"{own} of a removed ssm")
        after = plan.compacted_config(config).layers[index]
        if getattr(after, "ngroups", 9) < getattr(layout, "ngroups", 9):
            found.append(f"a group lost all its {own}")
        if len(set(cut.states)) > 1:
            found.append("other states in each group")
        if getattr(layout, "norm_segments", ()) and not isinstance(after, RemovedBlock):
            lost = [(a, b) for a, b in zip(layout.norm_segments, after.norm_segments, strict=False) if a != b]
            found += ["a norm segment shrank"] if lost else []
            if len(after.norm_segments) < len(layout.norm_segments):
                found.append("a norm segment vanished")
    return found


EVERY_CUT = {
    "mamba2": {"block", "ssm", "heads", "states", "ssm and heads", "states and heads", "heads of a removed ssm",
               "a group lost all its heads", "other states in each group", "a norm segment shrank",
               "a norm segment vanished"},
    "mamba1": {"block", "ssm", "channels", "states", "ssm and channels", "states and channels",
               "channels of a removed ssm", "a group lost all its channels"},
}
EXAMPLES = {"mamba2": 80, "mamba2-options": 40, "mamba1": 60, "mamba1-options": 30}


def check_random_plans(name: str) -> Counter[str]:
    """Returns how many plans had which cuts; "plans" counts them all."""
    seen: Counter[str] = Counter()
    model = MODELS[name]

    @settings(max_examples=EXAMPLES[name], deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(plan=plans(model.config))
    def check(plan):
        seen.update(["plans", *kinds(plan, model.config)])
        assert difference(model, plan) < TOLERANCE

    check()
    return seen


@pytest.mark.parametrize("family", ["mamba2", "mamba1"])
def test_compacted_equals_masked_for_any_plan(family):
    seen = sum((check_random_plans(name) for name in CONFIGS if CONFIGS[name].family == family), Counter[str]())
    assert seen["plans"] >= {"mamba2": 115, "mamba1": 85}[family]             # 200 over both families
    assert {cut: seen[cut] for cut in EVERY_CUT[family] if seen[cut] < 5} == {}


FULL_PLANS = {                      # every kind of cut at once, for the tests below
    "mamba2": Plan("mamba2", {0: LayerPlan(heads=(0, 1, 2, 4), states=((0, 2), (1, 4))), 1: LayerPlan(heads=(1,)),
                              2: LayerPlan(heads=(3,)), 3: LayerPlan(ssm=True, heads=(1,))}),
    "mamba2-options": Plan("mamba2", {0: LayerPlan(ssm=True, heads=(0,)),
                                      1: LayerPlan(heads=(0, 3), states=((1,), (0,)))}),
    "mamba1": Plan("mamba1", {0: LayerPlan(channels=(1, 4), states=((0, 3),)), 1: LayerPlan(channels=(2,)),
                              2: LayerPlan(channels=(0, 2), states=((1,),) * 3)}),
    "mamba1-options": Plan("mamba1", {0: LayerPlan(ssm=True, channels=(0,)), 1: LayerPlan(channels=(5,))}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_compacted_model_can_be_compacted_again(name):
    model, first = MODELS[name], FULL_PLANS[name]
    once = compact(model, first)
    own = "channels" if model.config.family == "mamba1" else "heads"
    second = Plan(model.config.family, {
        index: LayerPlan(**{own: (0,)}, states=() if isinstance(layout, RemovedSSM) else ((0,),) * layout.ngroups)
        for index, layout in enumerate(once.config.layers)})
    assert difference(once, second) < TOLERANCE
    twice, together = compact(once, second), compact(model, first.then(second, model.config))
    assert (twice(TOKENS) - together(TOKENS)).abs().max() < TOLERANCE
    assert parameter_count(twice.config) == parameter_count(together.config)


# ---- mutations of the slicer: the check above must see them

def swap_b_and_c(monkeypatch):
    """Wherever rows of B and C stand one after the other, those of C come first."""
    original = slicer._rows

    def rows(sections, names, present, sizes, kept, layout):
        right = original(sections, names, present, sizes, kept, layout)
        if "B" not in present:
            return right
        count = len(slicer.section_rows(sections.axes["B"], sizes, kept))
        start = sum(len(slicer.section_rows(sections.axes[name], sizes, kept)) for name in names[:names.index("B")])
        b, c = right[start:start + count], right[start + count:start + 2 * count]
        return [*right[:start], *c, *b, *right[start + 2 * count:]]
    monkeypatch.setattr(slicer, "_rows", rows)


def one_head_off(monkeypatch):
    """The slicer keeps the head after each head it should keep (channel in Mamba-1)."""
    original = slicer._kept_indices

    def kept(sections, config, layout, cut):
        indices = original(sections, config, layout, cut)
        axis = "head" if config.family == "mamba2" else "channel"
        units = layout.nheads if config.family == "mamba2" else layout.d_inner
        return {**indices, axis: [(i + 1) % units for i in indices[axis]]}
    monkeypatch.setattr(slicer, "_kept_indices", kept)


def states_of_the_first_group(monkeypatch):
    """All groups keep the states that group 0 keeps."""
    original = slicer._kept_indices

    def kept(sections, config, layout, cut):
        indices = original(sections, config, layout, cut)
        return {**indices, "state": dict.fromkeys(indices["state"], indices["state"][None])}
    monkeypatch.setattr(slicer, "_kept_indices", kept)


def dt_of_other_heads(monkeypatch):
    """A_log and dt_bias are cut at the end instead of where the heads are."""
    original = slicer.section_rows
    monkeypatch.setattr(slicer, "section_rows", lambda axes, sizes, kept: (
        list(range(len(kept["head"]))) if tuple(axes) == ("head",) else original(axes, sizes, kept)))


def norm_weight_not_repaired(monkeypatch):
    monkeypatch.setattr(slicer, "_repaired", lambda weight, layout, cut, norm_repair: weight)


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


@pytest.mark.parametrize(("mutation", "name"), [
    (swap_b_and_c, "mamba2"), (swap_b_and_c, "mamba2-options"), (swap_b_and_c, "mamba1"),
    (one_head_off, "mamba2"), (one_head_off, "mamba2-options"), (one_head_off, "mamba1"),
    (states_of_the_first_group, "mamba2"), (states_of_the_first_group, "mamba2-options"),
    (dt_of_other_heads, "mamba2"), (dt_of_other_heads, "mamba2-options"),
    (norm_weight_not_repaired, "mamba2"), (norm_weight_not_repaired, "mamba2-options"),
    (norm_eps_not_repaired, "mamba2"), (norm_eps_not_repaired, "mamba2-options"),
])
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
    # heads 3 and 5 of group 1 stay with states 0, 2, 3: z 6, x 6, B 3, C 3, dt 2 = 20 rows and 4 of padding
    assert shapes == {"in_proj.weight": (24, 8), "conv1d.weight": (12, 1, 4), "conv1d.bias": (12,), "dt_bias": (2,),
                      "A_log": (2,), "D": (2,), "norm.weight": (6,), "out_proj.weight": (8, 6)}
    assert not small.layers[0].mixer.in_proj.weight[-4:].any()
    shapes = {name: tuple(parameter.shape) for name, parameter in small.layers[3].mixer.named_parameters()}
    assert shapes == {"in_proj.weight": (16, 8), "conv1d.weight": (8, 1, 4), "conv1d.bias": (8,), "D": (2,),
                      "out_proj.weight": (8, 8)}
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
    small = compact(model, dataclasses.replace(FULL_PLANS[name], layers=layers))
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
                Plan(family, {0: LayerPlan(channels=tuple(range(40)), states=((1, 2, 9),)), 1: LayerPlan(ssm=True)}))
    layout = SSDLayout(headdim=8, dstate=16, ngroups=2, head_to_group=(0,) * 8 + (1,) * 8,
                       norm_segments=(NormSegment(64, 1e-5), NormSegment(64, 1e-5)))
    return (ModelConfig(family, d_model=64, vocab_size=128, layers=(layout,) * 3),
            Plan(family, {0: LayerPlan(heads=(0, 3, 5, 9), states=((0, 1, 2), (3, 4, 5))),
                          1: LayerPlan(ssm=True, heads=(1, 2, 3)), 2: LayerPlan(heads=(0, 1, 2, 3, 4))}))


@pytest.mark.parametrize("family", ["mamba2", "mamba1"])
@torch.no_grad()
def test_in_bf16_compacting_costs_no_accuracy(family):
    config, plan = bf16_case(family)
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
    plan = dataclasses.replace(FULL_PLANS["mamba2"], norm_repair="none")
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
    with pytest.raises(LayoutError, match=r"mixer has the tensors \['extra'\]"):
        slicer.slice_mixer({"extra": torch.zeros(1)}, CONFIGS["mamba2"], CONFIGS["mamba2"].layers[0], LayerPlan())
