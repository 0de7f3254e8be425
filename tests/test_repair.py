"""Repairs do what they say on the activations that they were fitted on: compared with plain least squares."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from random_plans import CONFIGS, FULL_PLANS, random_model

from shedder.layout import NormSegment, ScanLayout, SSDLayout
from shedder.nn import LanguageModel, ModelConfig
from shedder.prune import LayerPlan, Plan, PlanError, compact
from shedder.prune.calibration import Calibration
from shedder.prune.plan import REPAIRS
from shedder.prune.repair import OUT_RIDGE
from shedder.prune.slice import compact_block
from shedder.prune.statistics import dense_statistics

SSD = ModelConfig("mamba2", d_model=12, vocab_size=31, layers=(
    SSDLayout(headdim=4, dstate=5, ngroups=1, head_to_group=(0,) * 5, norm_segments=(NormSegment(20, 1e-9),),
              mlp_channels=3),))
SCAN = ModelConfig("mamba1", d_model=12, vocab_size=31, layers=(ScanLayout(d_inner=16, dstate=4, dt_rank=6),))
CALIBRATION = Calibration(torch.randint(0, 31, (6, 65), generator=torch.Generator().manual_seed(1)), batch=4)
CHANNELS = LayerPlan(channels=(1, 2, 6, 9, 15))
HEADS = LayerPlan(heads=(1, 4), mlp=(0,))


def activations(model: LanguageModel) -> dict[str, torch.Tensor]:
    """What the first mixer's probe sees on the calibration tokens, (tokens, features)."""
    seen: dict[str, list[torch.Tensor]] = {}
    mixer = model.mixers[0]
    last = {"mamba1": {"x", "y", "dt", "B", "C"}, "mamba2": set()}[model.config.family]

    def probe(name, value):
        rows = value.movedim(-1, 1) if name in last else value
        seen.setdefault(name, []).append(rows.flatten(2).flatten(0, 1))
        return value
    mixer.probe = probe
    try:
        with torch.no_grad():
            for tokens in CALIBRATION.inputs:
                model(tokens)
    finally:
        mixer.probe = None
    return {name: torch.cat(parts) for name, parts in seen.items()}


def repaired(model: LanguageModel, cut: LayerPlan, *repairs: str, norm_repair: str = "exact") -> LanguageModel:
    return compact(model, Plan(model.config.family, {0: cut}, norm_repair, repairs=repairs), CALIBRATION)


def squares(value: torch.Tensor) -> float:
    return float(value.square().mean())


# ---- norms

def test_stats_keeps_the_scale_that_the_surviving_channels_had():
    model = random_model(SSD)
    dense = activations(model)
    kept = torch.cat([torch.arange(0, 4), torch.arange(8, 16)])        # of 20 channels, without heads 1 and 4
    share = dense["gated"][:, kept].square().mean() / dense["gated"].square().mean()
    plain = repaired(model, HEADS, norm_repair="none").mixers[0].norm.weight
    assert torch.allclose(repaired(model, HEADS, norm_repair="stats").mixers[0].norm.weight, plain * share.sqrt())
    assert torch.allclose(repaired(model, HEADS, norm_repair="exact").mixers[0].norm.weight,
                          plain * (20 / 12) ** 0.5)
    assert abs(share - 1) > 0.01                                       # the three differ here


@pytest.mark.parametrize("modes", [("stats", "exact")])
def test_channels_without_energy_may_go_for_nothing(modes):
    """Heads whose gate is always closed: every repair but "none" gives the dense model back."""
    model = random_model(SSD)
    with torch.no_grad():
        for head in HEADS.heads:
            start = 6 + 4 * head                                       # z stands behind the MLP's gate and value
            model.mixers[0].in_proj.weight[start:start + 4] = 0
        model.mixers[0].out_proj.weight[:, 0] = 0                      # the MLP channel that goes
        expected = model(CALIBRATION.inputs[0])
        for mode in modes:
            got = repaired(model, HEADS, norm_repair=mode)(CALIBRATION.inputs[0])
            assert (got - expected).abs().max() < (1e-10 if mode == "exact" else 1e-4)      # eps is not scaled
        assert (repaired(model, HEADS, norm_repair="none")(CALIBRATION.inputs[0]) - expected).abs().max() > 0.01


def test_stats_repairs_every_norm_of_a_cut_residual_stream():
    model = random_model(dataclasses.replace(SSD, layers=SSD.layers * 2))
    streams = []
    hooks = [norm.register_forward_pre_hook(lambda _, args: streams.append(args[0].flatten(0, 1)))
             for norm in (model.layers[0].norm, model.layers[1].norm, model.backbone.norm_f)]
    with torch.no_grad():
        model(CALIBRATION.rows[:, :-1])
    for hook in hooks:
        hook.remove()
    plan = Plan("mamba2", norm_repair="stats", d_model=(0, 5, 11))
    small = compact(model, plan, CALIBRATION)
    kept = [j for j in range(12) if j not in plan.d_model]
    norms = [(model.layers[0].norm, small.layers[0].norm), (model.layers[1].norm, small.layers[1].norm),
             (model.backbone.norm_f, small.backbone.norm_f)]
    for stream, (before, after) in zip(streams, norms, strict=True):
        factor = (stream[:, kept].square().mean() / stream.square().mean()).sqrt()
        assert torch.allclose(after.weight, before.weight[kept] * factor)
    assert small.config.norm_eps == model.config.norm_eps


# ---- removed SSMs

@pytest.mark.parametrize(("config", "per_unit"), [
    (SSD, 4), (dataclasses.replace(SSD, d_has_hdim=True), 1), (SCAN, 1)], ids=["head", "channel of a head", "channel"])
def test_the_gain_is_the_least_squares_of_y_on_x(config, per_unit):
    model = random_model(config)
    dense = activations(model)
    x, y = (dense[name].unflatten(1, (-1, per_unit)) for name in ("x", "y"))
    expected = torch.stack([torch.linalg.lstsq(x[:, u].reshape(-1, 1), y[:, u].reshape(-1, 1)).solution[0, 0]
                            for u in range(x.shape[1])])
    small = repaired(model, LayerPlan(ssm=True), "gain")
    if config.family == "mamba2":
        assert torch.allclose(small.mixers[0].D, expected)
    else:                                                              # no norm: D is in out_proj
        assert small.mixers[0].D is None
        assert torch.allclose(small.mixers[0].out_proj.weight, model.mixers[0].out_proj.weight * expected)


# ---- x_proj and dt of Mamba-1

def projections(model: LanguageModel) -> torch.Tensor:
    """What x_proj gives, with dt_proj applied to its rows of dt: dt before its bias, B, C."""
    mixer = model.mixers[0]
    rows = activations(model)["x"] @ mixer.x_proj.weight.T
    rank = mixer.layout.dt_rank
    return torch.cat([rows[:, :rank] @ mixer.dt_proj.weight.T, rows[:, rank:]], 1).detach()


KEPT = torch.tensor([c for c in range(16) if c not in CHANNELS.channels])
TARGETS = torch.cat([KEPT, torch.arange(16, 24)])                      # dt of the channels that stay, B, C


@pytest.mark.parametrize("level", [0.0, -6.0])           # of the bias: a softplus that bends, and an exponential
@pytest.mark.parametrize("cut", [CHANNELS, LayerPlan(ranks=4), dataclasses.replace(CHANNELS, ranks=4)], ids=str)
@pytest.mark.parametrize("d_model", [(), (2, 7)])
def test_dt_bias_restores_a_mean_of_dt_and_brings_the_output_nearer(level, cut, d_model):
    model = random_model(SCAN)
    with torch.no_grad():
        model.mixers[0].dt_proj.bias += level
    kept = KEPT if cut.channels else torch.arange(16)
    stay = [j for j in range(12) if j not in d_model]
    expected = activations(model)
    plan = Plan("mamba1", {0: cut}, d_model=d_model)
    before = compact(model, plan)
    after = compact(model, dataclasses.replace(plan, repairs=("dt_bias",)), CALIBRATION)
    errors = [squares(activations(small)["out"] - expected["out"][:, stay]) for small in (before, after)]
    assert errors[1] <= errors[0]

    def inverse(dt):
        return dt.expm1().log()

    dt, old = activations(after)["dt"], expected["dt"][:, kept]
    shift = (after.mixers[0].dt_proj.bias - before.mixers[0].dt_proj.bias).detach()
    half = torch.nn.functional.softplus(inverse(dt) + shift)           # once more as far
    ways = {"none": shift, "behind": dt.mean(0) / old.mean(0) - 1, "before": inverse(dt).mean(0) - inverse(old).mean(0),
            "half": half.mean(0) / old.mean(0) - 1}
    assert sum(error.abs().max() < 1e-8 for error in ways.values()) == 1
    if (cut, level, d_model) == (CHANNELS, 0.0, ()):   # here it does help
        assert errors[1] < errors[0]


def test_x_proj_is_refitted_by_least_squares():
    model = random_model(SCAN)
    target = projections(model)[:, TARGETS]
    inputs = activations(model)["x"][:, KEPT]
    best = squares(inputs @ torch.linalg.lstsq(inputs, target).solution - target)
    assert squares(projections(repaired(model, CHANNELS)) - target) > 1.2 * best
    assert squares(projections(repaired(model, CHANNELS, "x_proj")) - target) < 1.01 * best     # a ridge holds it back


@pytest.mark.parametrize("cut", [LayerPlan(ranks=4), dataclasses.replace(CHANNELS, ranks=4)], ids=["all", "channels"])
def test_a_lower_rank_of_dt_is_the_best_for_the_activations(cut):
    model = random_model(SCAN)
    kept = torch.arange(16) if not cut.channels else KEPT
    target = projections(model)[:, kept]
    inputs = activations(model)["x"][:, kept]
    fitted = inputs @ torch.linalg.lstsq(inputs, target).solution
    u, s, v = torch.linalg.svd(fitted, full_matrices=False)
    best = squares((u[:, :2] * s[:2]) @ v[:2] - target)                # reduced-rank regression
    plain, whitened = (squares(projections(repaired(model, cut, *repairs))[:, :len(kept)] - target)
                       for repairs in ([], ["x_proj"]))
    assert whitened < 1.01 * best < plain


# ---- out_proj

@pytest.mark.parametrize(("config", "cut"), [
    (SSD, HEADS), (SSD, LayerPlan(ssm=True)), (SSD, LayerPlan(states=((0, 1, 2),), taps=1)),
    (SSD, LayerPlan(head_channels=((0,), (1,), (2,), (3,), (0,)))), (SCAN, CHANNELS), (SCAN, LayerPlan(ssm=True)),
    (SCAN, LayerPlan(ranks=5, states=((0, 2),)))], ids=str)
@pytest.mark.parametrize("d_model", [(), (2, 7)])
def test_out_proj_is_refitted_by_least_squares_near_the_old_weights(config, cut, d_model):
    model = random_model(config)
    plan = Plan(config.family, {0: cut}, "stats", d_model=d_model)
    stay = [j for j in range(12) if j not in d_model]
    target = activations(model)["out"][:, stay]
    small, refitted = (compact(model, dataclasses.replace(plan, repairs=repairs), CALIBRATION)
                       for repairs in ((), ("out_proj",)))
    before, after = activations(small), activations(refitted)
    inner, old = before["inner"], small.mixers[0].out_proj.weight.detach().T
    pull = (OUT_RIDGE * inner.shape[1] / len(inner) * inner.square().sum(0).mean()).sqrt()
    best = torch.linalg.lstsq(torch.cat([inner, pull * torch.eye(inner.shape[1])]), torch.cat([target, pull * old]))
    assert (after["out"] - inner @ best.solution).abs().max() < 1e-7 * target.abs().max()
    assert squares(before["out"] - target) > 1.005 * squares(after["out"] - target)
    assert torch.equal(before["inner"], after["inner"])                # nothing else changes


# ---- what repairs need, and leave alone

def test_a_repair_without_calibration_is_refused():
    model = random_model(SSD)
    for plan in (Plan("mamba2", {0: HEADS}, "stats"), Plan("mamba2", {0: HEADS}, repairs=("out_proj",))):
        with pytest.raises(PlanError, match="needs calibration text, none was given; accepted: calibration="):
            compact(model, plan)
    with pytest.raises(PlanError, match="repairs lists out_proj, the statistics were taken without it"):
        compact(model, Plan("mamba2", {0: HEADS}, repairs=("out_proj",)), dense_statistics(model, CALIBRATION))
    model = random_model(SCAN)
    with pytest.raises(PlanError, match="repairs lists x_proj, the statistics were taken without it"):
        compact(model, Plan("mamba1", {0: CHANNELS}, repairs=("x_proj",)), dense_statistics(model, CALIBRATION))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_search_sees_what_ships(name):
    """Block by block from the dense model, as the search slices its candidates, gives the very tensors of compact."""
    model = random_model(CONFIGS[name])
    plan = dataclasses.replace(FULL_PLANS[name], norm_repair="stats", repairs=REPAIRS)
    calibration = Calibration(torch.randint(0, 11, (4, 9), generator=torch.Generator().manual_seed(1)))
    before = copy.deepcopy(model.state_dict())
    small = compact(model, plan, calibration)
    statistics = dense_statistics(model, calibration, REPAIRS)
    for index, block in enumerate(model.layers):
        alone = compact_block(block, model.config, index, plan, statistics).state_dict()
        assert alone.keys() == small.layers[index].state_dict().keys()
        assert all(torch.equal(alone[key], value) for key, value in small.layers[index].state_dict().items())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(mixer.probe is None for mixer in model.mixers)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layers_that_lose_nothing_stay_as_they_are():
    model = random_model(dataclasses.replace(SSD, layers=SSD.layers * 2))
    small = compact(model, Plan("mamba2", {1: HEADS}, "stats", repairs=REPAIRS), CALIBRATION)
    for key, value in small.layers[0].state_dict().items():
        assert torch.equal(value, model.layers[0].state_dict()[key])
