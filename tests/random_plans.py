"""Small models of both families, random plans over every cut, and what contract 2 compares."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from shedder.layout import NormSegment, RemovedBlock, RemovedSSM, ScanLayout, SSDLayout
from shedder.nn import LanguageModel, ModelConfig
from shedder.prune import LayerPlan, Plan, compact, masked

TOLERANCE = 1e-10                   # of float64 logits of order 1; sums in another order differ by some 1e-15
LENGTH, PROMPT = 5, 3


def segments(*channels: int) -> tuple[NormSegment, ...]:
    return tuple(NormSegment(c, 1e-2) for c in channels)      # an eps large enough that not repairing it shows


# Ragged and regular Mamba-2 layers, with and without norm, MLP channels and SSM; Mamba-1 with and without channel
# groups; both with every option of the config.
CONFIGS = {
    "mamba2": ModelConfig("mamba2", d_model=8, vocab_size=11, norm_eps=1e-2, layers=(
        SSDLayout(headdim=3, dstate=5, ngroups=2, head_to_group=(0, 0, 0, 1, 1, 1), norm_segments=segments(9, 9)),
        SSDLayout(headdim=2, dstate=4, ngroups=3, head_to_group=(2, 0, 1, 1, 0), norm_segments=segments(6, 4),
                  row_padding=3, conv_width=3, mlp_channels=3),
        RemovedSSM(nheads=4, headdim=2, norm_segments=segments(8), mlp_channels=2),
        SSDLayout(headdim=4, dstate=3, ngroups=1, head_to_group=(0, 0, 0), mlp_channels=2)), dt_limit=(0.05, 2.0)),
    "mamba2-options": ModelConfig("mamba2", d_model=8, vocab_size=11, layers=(
        SSDLayout(headdim=2, dstate=4, ngroups=2, head_to_group=(0, 0, 1, 1), norm_segments=segments(4, 4),
                  mlp_channels=1),
        SSDLayout(headdim=2, dstate=4, ngroups=4, head_to_group=(0, 1, 2, 3), norm_segments=segments(8),
                  conv_width=2)),
        norm_before_gate=True, d_has_hdim=True, proj_bias=True, conv_bias=False, tie_embeddings=False,
        residual_in_fp32=False),
    "mamba1": ModelConfig("mamba1", d_model=8, vocab_size=11, norm_eps=1e-2, layers=(
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


# ---- contract 2

@torch.no_grad()
def runs(model: LanguageModel) -> dict[str, torch.Tensor]:
    """Logits of all tokens, by prefill, and by a prompt and then single steps."""
    state, tokens = model.allocate_state(TOKENS.shape[0]), TOKENS.to(model.device)
    steps = [model(tokens[:, :PROMPT], state), *(model(tokens[:, t:t + 1], state) for t in range(PROMPT, LENGTH))]
    return {"prefill": model(tokens), "prefill then steps": torch.cat(steps, 1)}


def difference(model: LanguageModel, plan: Plan) -> float:
    """The largest difference between compacted and masked, over all ways to run."""
    with masked(model, plan):
        expected = runs(model)
    got = runs(compact(model, plan))
    return max((got[way] - expected[way]).abs().max().item() for way in expected)


FULL_PLANS = {                      # every kind of cut at once, for tests that want one plan
    "mamba2": Plan("mamba2", {
        0: LayerPlan(heads=(0, 1, 2, 4), states=((0, 2), (1, 4)), head_channels=((0,), (1,), (2,), (0,), (1,), (2,))),
        1: LayerPlan(heads=(1,), merge=((0, 2),), mlp=(1,), taps=1, states=((0,), (1,), (2,))),
        2: LayerPlan(heads=(3,), mlp=(0,)), 3: LayerPlan(ssm=True, heads=(1,), mlp=(0,))}, d_model=(2, 5)),
    "mamba2-options": Plan("mamba2", {0: LayerPlan(ssm=True, heads=(0,), mlp=(0,)),
                                      1: LayerPlan(heads=(0,), merge=((1, 3),), states=((1,), (0,), (2,), (3,)))},
                           d_model=(0,)),
    "mamba1": Plan("mamba1", {0: LayerPlan(channels=(1, 4), states=((0, 3),), ranks=1), 1: LayerPlan(channels=(2,)),
                              2: LayerPlan(channels=(0,), states=((1,),) * 3, merge=((0, 2),), taps=1, ranks=1)},
                   d_model=(7,)),
    "mamba1-options": Plan("mamba1", {0: LayerPlan(ssm=True, channels=(0,)), 1: LayerPlan(channels=(5,), ranks=2)}),
}


# ---- random plans

def some(rng: random.Random, units: Sequence[int], most: int) -> tuple[int, ...]:
    """Up to `most` of the units, often none."""
    return tuple(rng.sample(list(units), rng.randint(0, most))) if most > 0 and rng.randint(0, 1) else ()


def lists(rng: random.Random, outer: int, inner: int) -> tuple[tuple[int, ...], ...]:
    """Equally many of range(inner) for each of `outer`, never all; often none."""
    count = rng.randint(0, inner - 1) if rng.randint(0, 1) else 0
    return tuple(tuple(rng.sample(range(inner), count)) for _ in range(outer))


def merge_sets(rng: random.Random, groups: int) -> tuple[tuple[int, ...], ...]:
    """Some of the groups, in sets of two and more."""
    if groups < 2 or rng.randint(0, 1):
        return ()
    order = rng.sample(range(groups), groups)
    first = rng.randint(2, groups)
    rest = order[first:]
    return (tuple(order[:first]), *((tuple(rest),) if len(rest) > 1 else ()))


def random_layer_plan(rng: random.Random, layout, family: str) -> LayerPlan:
    """Any cut that the layer allows: its block, or any mix of all the others."""
    if rng.randint(0, 7) == 0:
        return LayerPlan(block=True)
    units = layout.d_inner if family == "mamba1" else layout.nheads
    own = "channels" if family == "mamba1" else "heads"
    cut = {own: some(rng, range(units), units - 1), "taps": rng.choice((0, 0, rng.randint(0, layout.conv_width - 1)))}
    if family == "mamba2":
        cut |= {"mlp": some(rng, range(layout.mlp_channels), layout.mlp_channels),
                "head_channels": lists(rng, units, layout.headdim)}
    if isinstance(layout, RemovedSSM):
        return LayerPlan(**cut)
    reads = layout.head_to_group if family == "mamba2" else layout.channel_to_group or (0,) * units
    groups = some(rng, range(layout.ngroups), layout.ngroups - 1)
    loses_all = layout.ngroups > 1 and rng.randint(0, 5) == 0
    if loses_all:                                       # one group all its units, without a word of the group
        alone = rng.choice(reads)
        cut[own] = tuple(unit for unit in range(units) if reads[unit] == alone)
    elif any(unit not in cut[own] and reads[unit] not in groups for unit in range(units)):
        cut["groups"] = groups
    if rng.randint(0, 3) == 0:
        return LayerPlan(ssm=True, **cut)
    if not loses_all:
        cut["merge"] = merge_sets(rng, layout.ngroups)
    states = lists(rng, layout.ngroups, layout.dstate)
    if family == "mamba1":
        return LayerPlan(states=states[:1] * layout.ngroups, ranks=rng.randint(0, layout.dt_rank - 1), **cut)
    return LayerPlan(states=states, **cut)


def random_plan(rng: random.Random, config: ModelConfig) -> Plan:
    return Plan(config.family, {index: random_layer_plan(rng, layout, config.family)
                                for index, layout in enumerate(config.layers) if not isinstance(layout, RemovedBlock)
                                and rng.randint(0, 4)},
                d_model=some(rng, range(config.d_model), config.d_model - 2))


def kinds(plan: Plan, config: ModelConfig) -> list[str]:
    """Which cuts a plan has, to see that all were tried."""
    found = ["d_model"] if plan.d_model else []
    own = "channels" if config.family == "mamba1" else "heads"
    after = plan.compacted_config(config)
    for index, cut in plan.layers.items():
        layout, left = config.layers[index], after.layers[index]
        cuts = [name for name in cut.to_json() if name != "block"]
        found += ["block"] if cut.block else cuts
        found += [f"{a} and {b}" for a in cuts for b in cuts if a < b]
        if isinstance(layout, RemovedSSM):
            found += [f"{name} of a removed ssm" for name in cuts]
        if len(set(cut.states)) > 1:
            found.append("other states in each group")
        if len(set(cut.head_channels)) > 1:
            found.append("other channels in each head")
        if getattr(left, "ngroups", 9) < getattr(layout, "ngroups", 9) and getattr(cut, own) and not (
                cut.merge or cut.groups):
            found.append(f"a group lost all its {own}")
        if getattr(layout, "norm_segments", ()) and not isinstance(left, RemovedBlock):
            lost = [(a, b) for a, b in zip(layout.norm_segments, left.norm_segments, strict=False) if a != b]
            found += ["a norm segment shrank"] if lost else []
            if len(left.norm_segments) < len(layout.norm_segments):
                found.append("a norm segment vanished")
    return found
