"""Scores of units: each says what its formula says, dead units are worth nothing, and files are read as written."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_search import CONFIGS, SMALL, TOKENS, model_of

from shedder.nn import LanguageModel
from shedder.prune import LayerPlan, Plan, Scores, compact, masked, score, search
from shedder.prune.calibration import Calibration
from shedder.prune.scores import METHODS, ScoresError
from shedder.prune.scores.states import controllability_observability, h_infinity
from shedder.prune.scores.table import layer_adaptive
from shedder.prune.scores.taylor import _gradients, first_order, second_order
from shedder.prune.units import AXES

ROWS = TOKENS[:39].view(3, 13)
DRAWN = {"sequences": 3, "length": 12, "batch": 2}
STATES = {"ghost", "delta", "hinf"}


def loss_of(model: LanguageModel, rows: torch.Tensor = ROWS) -> float:
    with torch.no_grad():
        logits = model(rows[:, :-1])
    return torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), rows[:, 1:].flatten()).item()


def with_dead_units(name: str) -> LanguageModel:
    """Head 5 or channel 7 of layer 1 writes nothing; state 3 (of group 1) has B = C = 0."""
    model = model_of(name)
    mixer = model.layers[1].mixer
    with torch.no_grad():
        if name == "mamba1":
            mixer.out_proj.weight[:, 7] = 0
            mixer.in_proj.weight[7] = mixer.in_proj.weight[32 + 7] = 0
            mixer.conv1d.bias[7] = mixer.conv1d.weight[7] = 0
            mixer.x_proj.weight[:, 7] = mixer.dt_proj.weight[7] = 0
            mixer.x_proj.weight[2 + 3] = mixer.x_proj.weight[2 + 8 + 3] = 0
        else:
            mixer.out_proj.weight[:, 20:24] = 0
            mixer.in_proj.weight[20:24] = mixer.in_proj.weight[32 + 20:32 + 24] = 0
            mixer.conv1d.weight[20:24] = mixer.conv1d.bias[20:24] = 0
            for start in (64, 80):                     # B and C, of two groups of 8 states
                mixer.in_proj.weight[start + 8 + 3] = 0
                mixer.conv1d.weight[start - 32 + 8 + 3] = mixer.conv1d.bias[start - 32 + 8 + 3] = 0
            mixer.in_proj.weight[96 + 5] = 0           # dt of head 5
    return model


@pytest.mark.parametrize("name", ["mamba2", "mamba1"])
@pytest.mark.parametrize("method", METHODS)
def test_dead_units_are_worth_least_and_shapes_fit(name, method):
    scores = score(with_dead_units(name), TOKENS, method, progress=False, **DRAWN)
    scores.check(CONFIGS[name])
    axes = set(scores.layers[1])
    assert axes == {"state"} if method in STATES else axes & {"head", "channel"}
    if method != "perplexity":                         # which gives a bundle's units the same
        if "state" in axes:
            values = scores.layers[1]["state"]
            assert values.shape == ((8,) if name == "mamba1" else (2, 8))
            assert (values[..., 3] if name == "mamba1" else values[1, 3]).abs() <= 1e-12 * values.abs().max()
        for axis, unit in (("head", 5), ("channel", 7)):
            if axis in axes:
                assert scores.layers[1][axis][unit].abs() <= 1e-12 * scores.layers[1][axis].abs().max()
    assert all(values.isfinite().all() for layer in scores.layers for values in layer.values())


@pytest.mark.parametrize("name", ["mamba2", "mamba1", "pruned"])
@pytest.mark.parametrize("method", METHODS)
def test_every_score_belongs_to_a_unit(name, method):
    scores = score(model_of(name), TOKENS, method, AXES[CONFIGS[name].family] if method == "perplexity" else None,
                   levels=2, progress=False, **DRAWN)
    scores.check(CONFIGS[name])
    assert any(scores.layers)


@pytest.mark.parametrize("name", ["mamba2", "mamba1", "pruned"])
@pytest.mark.parametrize("method", METHODS)
def test_scoring_twice_gives_the_same_and_leaves_the_model_alone(name, method):
    model = model_of(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first, second = (score(model, TOKENS, method, progress=False, **DRAWN) for _ in range(2))
    assert first.provenance == second.provenance
    for one, other in zip(first.layers, second.layers, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[axis], other[axis]) for axis in one)
    assert model.training
    assert all(mixer is None or mixer.probe is None for mixer in model.mixers)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def with_dead_channel_and_twins(name: str) -> LanguageModel:
    """Nothing writes channel 5 of the residual stream; in layer 1, groups 0 and 1 have the same B and C."""
    model = model_of(name)
    with torch.no_grad():
        for block in model.layers:
            block.mixer.out_proj.weight[5] = 0
            block.mixer.in_proj.weight[:, 5] = 0
            block.norm.weight[5] = 0
        model.backbone.embedding.weight[:, 5] = 0
        mixer = model.layers[1].mixer
        if name == "groups":
            for start in (80, 112):                    # B and C, behind the MLP, z and x; 4 groups of 8 states
                mixer.in_proj.weight[start + 8:start + 16] = mixer.in_proj.weight[start:start + 8]
            for start in (32, 64):
                mixer.conv1d.weight[start + 8:start + 16] = mixer.conv1d.weight[start:start + 8]
                mixer.conv1d.bias[start + 8:start + 16] = mixer.conv1d.bias[start:start + 8]
        else:
            for start in (4, 20):
                mixer.x_proj.weight[start + 8:start + 16] = mixer.x_proj.weight[start:start + 8]
    return model


@pytest.mark.parametrize("name", ["groups", "scan groups"])
@pytest.mark.parametrize("method", [method for method in METHODS if method not in STATES])
def test_dead_channels_of_d_model_and_twin_groups_are_worth_least(name, method, tmp_path):
    model = with_dead_channel_and_twins(name)
    scores = score(model, TOKENS, method, levels=16, norm_repair="none", progress=False, **DRAWN)
    if method == "perplexity":
        assert "d_model" not in scores.shared          # no default axis
        scores = score(model, TOKENS, method, ["d_model", "merge"], levels=16, norm_repair="none", progress=False,
                       **DRAWN)
    scores.check(model.config)
    values = scores.shared["d_model"]
    assert values.shape == (16,)
    assert (values if method == "perplexity" else values.abs()).argmin() == 5
    if method != "perplexity":                         # the norm notices a dead channel's square: 0 of 16
        assert values[5].abs() <= 1e-12 * values.abs().max()
    if method != "activation":
        twins = scores.layers[1]["merge"]
        assert twins.shape == ((6,) if name == "groups" else (1,))
        assert twins[0].abs() <= 1e-6 * scores.layers[0]["merge"].abs().max()
        assert twins.abs().argmin() == 0
    scores.save(tmp_path / "scores.safetensors")
    assert torch.equal(Scores.load(tmp_path / "scores.safetensors").shared["d_model"], values)
    wrong = dataclasses.replace(CONFIGS[name], d_model=15)
    with pytest.raises(ScoresError, match="d_model has 16 scores; this model has d_model 15"):
        scores.check(wrong)


# ---- Taylor


@pytest.mark.parametrize("name", ["mamba2", "mamba1"])
def test_the_gate_of_a_channel_of_d_model_is_a_mask(name):
    from shedder.prune.scores import taylor

    model = model_of(name).double()

    def loss(value: float) -> float:
        stream = torch.ones(3, 16, dtype=torch.float64)
        stream[:, 9] = value
        with torch.no_grad():
            logits = taylor._logits(model, ROWS[:, :-1], {}, stream)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ROWS[:, 1:].flatten()).item()

    gradient, = (g.sum(0)[9].item() / 3 for index, axis, g in _gradients(model, ROWS[:, :-1], ROWS[:, 1:])
                 if axis == "d_model")
    assert math.isclose(gradient, (loss(1 + 1e-5) - loss(1 - 1e-5)) / 2e-5, rel_tol=2e-3, abs_tol=1e-8)
    with masked(model, Plan(name, d_model=(9,))):
        assert math.isclose(loss_of(model), loss(0.0), rel_tol=1e-9)


@pytest.mark.parametrize("name", ["groups", "scan groups"])
def test_the_gate_of_two_groups_leads_to_their_mean(name):
    """In Mamba-1 that is the masked model; in Mamba-2 the mean is taken behind the convolution's SiLU."""
    from shedder.prune.scores import taylor
    from shedder.prune.scores.observe import probes

    model, pair = model_of(name).double(), (0, 1) if name == "scan groups" else (1, 3)

    def see(name, value):
        dim = 1 if model.config.family == "mamba1" else 2
        if name in "BC":
            value = value.clone()
            one, other = (value.select(dim, group) for group in pair)
            mean = (one + other) / 2
            one.copy_(mean)
            other.copy_(mean)
        return value

    def loss(value: float) -> float:
        gates = taylor._gates(model, 1, 3)
        with torch.no_grad():
            gates = {key: gate.double() for key, gate in gates.items()}
            gates["merge"][:, 4 if name == "groups" else 0] = value            # (1, 3) of (0, 1), (0, 2), ...
            with probes(model, {1: taylor._gated(model.mixers[1], model.config.layers[1], gates)}):
                return loss_of(model)

    gradient, = (g.sum(0)[4 if name == "groups" else 0].item() / 3
                 for index, axis, g in _gradients(model, ROWS[:, :-1], ROWS[:, 1:]) if (index, axis) == (1, "merge"))
    assert math.isclose(gradient, (loss(1 + 1e-5) - loss(1 - 1e-5)) / 2e-5, rel_tol=2e-3, abs_tol=1e-8)
    with probes(model, {1: see}):
        assert math.isclose(loss_of(model), loss(0.0), rel_tol=1e-9)
    if name == "scan groups":
        with masked(model, Plan("mamba1", {1: LayerPlan(merge=(pair,))})):
            assert math.isclose(loss_of(model), loss(0.0), rel_tol=1e-9)


@pytest.mark.parametrize(("name", "axis", "unit", "cut"), [
    ("mamba2", "block", (), LayerPlan(block=True)),
    ("mamba2", "ssm", (), LayerPlan(ssm=True)),
    ("mamba2", "head", (3,), LayerPlan(heads=(3,))),
    ("mamba2", "state", (1, 2), None),
    ("mamba1", "block", (), LayerPlan(block=True)),
    ("mamba1", "ssm", (), LayerPlan(ssm=True)),
    ("mamba1", "channel", (9,), LayerPlan(channels=(9,))),
    ("mamba1", "state", (5,), LayerPlan(states=((5,),))),
])
def test_a_closed_gate_is_a_mask_and_its_gradient_a_difference(name, axis, unit, cut):
    """In float64: the loss with a gate at 0 is that of the masked model, and its slope at 1 the gate's gradient."""
    from shedder.prune.scores import taylor
    from shedder.prune.scores.observe import probes

    model, layer = model_of(name).double(), 1

    def loss(value: float) -> float:
        gates = taylor._gates(model, layer, len(ROWS))
        with torch.no_grad():
            gates = {key: gate.double() for key, gate in gates.items()}
            gates[axis][(slice(None), *unit)] = value
            with probes(model, {layer: taylor._gated(model.mixers[layer], model.config.layers[layer], gates)}):
                return loss_of(model)

    gradient = sum(g.sum(0)[unit].item() for index, its, g in _gradients(model, ROWS[:, :-1], ROWS[:, 1:])
                   if (index, its) == (layer, axis)) / len(ROWS)
    step = 1e-5
    assert math.isclose(gradient, (loss(1 + step) - loss(1 - step)) / (2 * step), rel_tol=2e-3, abs_tol=1e-8)
    assert math.isclose(loss(1.0), loss_of(model), rel_tol=1e-12)
    if cut is not None:
        with masked(model, Plan(model.config.family, {layer: cut})):
            assert math.isclose(loss_of(model), loss(0.0), rel_tol=1e-9)


def test_second_order_has_the_curvature_of_the_models_own_targets():
    """1/2 T E[g^2] over many draws is 1/2 of the exact Fisher information of a gate."""
    model = model_of("one layer").double()
    row = ROWS[:1, :6]
    tokens = row[:, :-1]
    slope = first_order(model, Calibration(row))[0]
    many = Calibration(row.repeat(400, 1), batch=400, seed=1)
    predicted = second_order(model, many)[0]["block"]
    signed = sum(g.sum() for _, axis, g in _gradients(model, tokens, row[:, 1:]) if axis == "block")
    assert math.isclose(abs(signed.item()), slope["block"].item(), rel_tol=1e-9)
    # The Fisher information of one gate: sum over positions and tokens of p (dlog p/dm)^2, by finite differences.
    from shedder.prune.scores import taylor
    from shedder.prune.scores.observe import probes

    def log_p(value: float) -> torch.Tensor:
        gates = {key: gate.double().detach() for key, gate in taylor._gates(model, 0, 1).items()}
        gates["block"] = gates["block"] * value
        with torch.no_grad(), probes(model, {0: taylor._gated(model.mixers[0], model.config.layers[0], gates)}):
            return model(tokens).log_softmax(-1)

    derivative = (log_p(1 + 1e-5) - log_p(1 - 1e-5)) / 2e-5
    fisher = (log_p(1.0).exp() * derivative.square()).sum(-1).mean()
    assert math.isclose(predicted.item(), (-signed + 0.5 * fisher).item(), rel_tol=0.25)              # 400 draws


# ---- states


def test_controllability_is_the_energy_of_the_state_that_decoding_has():
    model = model_of("one layer")
    ghost = controllability_observability(model, Calibration(ROWS))[0]["state"]
    seen: dict[str, list[torch.Tensor]] = {"C": []}
    model.mixers[0].probe = lambda name, value: seen["C"].append(value) or value if name == "C" else value
    energy = torch.zeros(2, 8, dtype=torch.float64)
    state = model.allocate_state(3)
    with torch.no_grad():
        for t in range(12):
            model(ROWS[:, t:t + 1], state)
            h = state.layers[0].ssm.double().square().sum((0, 2))              # (H, N)
            energy += torch.stack([h[:4].sum(0), h[4:].sum(0)])
    readout = torch.cat(seen["C"], 1).double().square().mean((0, 1))
    assert torch.allclose(ghost, energy / 36 * readout, rtol=1e-4)


def test_h_infinity_of_mamba1_follows_the_decay():
    """With B = C for all states alike, the slowest state has the largest gain."""
    model = model_of("mamba1")
    with torch.no_grad():
        mixer = model.layers[0].mixer
        mixer.x_proj.weight[2:10] = mixer.x_proj.weight[2]
        mixer.x_proj.weight[10:18] = mixer.x_proj.weight[10]
        mixer.A_log.copy_(torch.arange(8.0).log1p().expand(32, 8))
    values = h_infinity(model, Calibration(ROWS))[0]["state"]
    assert values.argsort(descending=True).tolist() == list(range(8))


def test_layer_adaptive_shares():
    assert layer_adaptive([1.0, 3.0, 2.0]) == [1 / 6, 1.0, 2 / 5]
    assert layer_adaptive([0.0, 0.0]) == [0.0, 0.0]


# ---- the others


def test_magnitude_is_the_energy_that_slicing_takes_away():
    for name in ("mamba2", "mamba1"):
        model = model_of(name)
        scores = score(model, TOKENS, "magnitude", **DRAWN)

        def energy(of: LanguageModel) -> float:
            return sum(p.double().square().sum().item() for key, p in of.layers[1].mixer.named_parameters()
                       if p.dim() > 1 and "A_log" not in key)

        unit = LayerPlan(heads=(2,)) if name == "mamba2" else LayerPlan(channels=(2,))
        state = LayerPlan(states=((1,), (4,))) if name == "mamba2" else LayerPlan(states=((4,),))
        for axis, cut, value in (("head" if name == "mamba2" else "channel", unit, None), ("state", state, None)):
            small = compact(model, Plan(name, {1: cut}, "none"))
            values = scores.layers[1][axis]
            value = values[2] if axis != "state" else values[0, 1] + values[1, 4] if name == "mamba2" else values[4]
            assert math.isclose(energy(model) - energy(small), value.item(), rel_tol=1e-5)
        assert math.isclose(scores.layers[1]["block"].item(), energy(model), rel_tol=1e-6)


def test_activation_is_minitrons_norm_of_the_x_branch():
    model = model_of("mamba2")
    scores = score(model, ROWS, "activation", **DRAWN)
    seen = []
    handle = model.layers[0].norm.register_forward_hook(lambda module, inputs, out: seen.append(out))
    with torch.no_grad():
        model(ROWS[:, :-1])
        handle.remove()
        s = (seen[0] @ model.layers[0].mixer.in_proj.weight[32:64].T).abs().mean(1).square().sum(0)
    assert torch.allclose(scores.layers[0]["head"], s.view(8, 4).sum(1).double(), rtol=1e-4)


@pytest.mark.parametrize("name", ["mamba2", "mamba1"])
def test_perplexity_scores_add_up_to_measured_rises(name):
    model = model_of(name)
    axis = "head" if name == "mamba2" else "channel"
    scores = score(model, ROWS, "perplexity", ["block", axis], levels=2, norm_repair="exact", progress=False, **DRAWN)
    for layer in range(3):
        small = compact(model, Plan(name, {layer: LayerPlan(block=True)}))
        assert math.isclose(scores.layers[layer]["block"].item(), loss_of(small) - loss_of(model), abs_tol=1e-5)
        values = scores.layers[layer][axis]
        order = score(model, ROWS, "contribution", **DRAWN).layers[layer][axis].argsort()
        assert (values[order].diff() >= 0).all()       # the order in which they went
        gone = tuple(order[:-1].tolist())              # of all units but one, both bundles
        cut = LayerPlan(heads=gone) if name == "mamba2" else LayerPlan(channels=gone)
        rise = loss_of(compact(model, Plan(name, {layer: cut}))) - loss_of(model)
        assert math.isclose(values[list(gone)].sum().item(), rise, rel_tol=1e-4, abs_tol=1e-4)


def test_perplexity_scores_go_on_after_a_kill(tmp_path):
    model, log = model_of("mamba2"), tmp_path / "scores.jsonl"
    options = {"levels": 4, "progress": False, **DRAWN}
    whole = score(model, TOKENS, "perplexity", log=log, **options)
    text = log.read_bytes()
    log.write_bytes(text[:len(text) // 2])
    resumed = score(model, TOKENS, "perplexity", log=log, **options)
    assert all(torch.equal(a[axis], b[axis]) for a, b in zip(whole.layers, resumed.layers, strict=True) for axis in a)
    with pytest.raises(ValueError, match="belongs to another search"):
        score(model, TOKENS, "perplexity", log=log, **{**options, "levels": 3})


# ---- files


def test_scores_come_back_from_disk_as_they_were(tmp_path):
    scores = score(model_of("pruned"), TOKENS, "contribution", **DRAWN)
    path = tmp_path / "scores.safetensors"
    scores.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    loaded = Scores.load(path)
    assert (loaded.family, loaded.comparable, loaded.provenance) == (
        scores.family, scores.comparable, scores.provenance)
    for one, other in zip(scores.layers, loaded.layers, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[axis], other[axis]) for axis in one)
    script = "import sys; from shedder.prune import Scores; print(len(Scores.load(sys.argv[1]).layers))"
    found = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "3"


def test_a_write_that_fails_leaves_the_old_scores(tmp_path, monkeypatch):
    scores = score(model_of("mamba2"), TOKENS, "magnitude", **DRAWN)
    path = tmp_path / "scores.safetensors"
    scores.save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        scores.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def damaged(path, change) -> None:
    from safetensors import safe_open
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["shedder"])
    tensors = load_file(path)
    change(facts, tensors)
    save_file(tensors, path, {"shedder": json.dumps(facts)})


@pytest.mark.parametrize(("change", "message"), [
    (lambda facts, tensors: facts.update(version=9), "version is 9; accepted: 1"),
    (lambda facts, tensors: facts.update(format="x"), "is not a file of scores"),
    (lambda facts, tensors: facts.update(layers=10**9), "has the facts"),
    (lambda facts, tensors: facts.update(family="rwkv"), "has the facts"),
    (lambda facts, tensors: tensors.update({"layers.7.head": torch.zeros(8, dtype=torch.float64)}), "layers.7.head"),
    (lambda facts, tensors: tensors.update({"layers.0.nose": torch.zeros(8, dtype=torch.float64)}), "layers.0.nose"),
    (lambda facts, tensors: tensors.update({"layers.0.head": torch.full((8,), math.nan).double()}), "finite float64"),
    (lambda facts, tensors: tensors.update({"layers.0.head": torch.zeros(8)}), "finite float64"),
    (lambda facts, tensors: tensors["layers.0.head"][3].mul_(1.01), "is not what was written: its digest differs"),
    (lambda facts, tensors: facts.update(comparable=not facts["comparable"]), "its digest differs"),
])
def test_damaged_scores_are_refused(change, message, tmp_path):
    path = tmp_path / "scores.safetensors"
    score(model_of("mamba2"), TOKENS, "magnitude", **DRAWN).save(path)
    damaged(path, change)
    with pytest.raises(ScoresError, match=message):
        Scores.load(path)


def test_files_that_are_no_scores_are_named(tmp_path):
    path = tmp_path / "scores.safetensors"
    with pytest.raises(ScoresError, match=r"scores.safetensors: cannot be read as scores"):
        Scores.load(path)
    score(model_of("mamba2"), TOKENS, "magnitude", **DRAWN).save(path)
    text = path.read_bytes()
    for broken in (b"", text[:20], text[:-5], b"\x80\x04\x95" + text, os.urandom(200)):
        path.write_bytes(broken)
        with pytest.raises(ScoresError, match=r"scores.safetensors: cannot be read as scores"):
            Scores.load(path)


def test_scores_must_fit_the_model():
    scores = score(model_of("mamba2"), TOKENS, "magnitude", **DRAWN)
    with pytest.raises(ScoresError, match="scores are of a mamba2 model of 3 layers"):
        scores.check(CONFIGS["mamba1"])
    small = Plan("mamba2", {1: LayerPlan(heads=(1,))}).compacted_config(CONFIGS["mamba2"])
    with pytest.raises(ScoresError, match=r"layers.1.head has 8 scores; this layer has 7 units"):
        scores.check(small)
    with pytest.raises(ScoresError, match="axis 'ssm' has no scores in layer 0"):
        search(model_of("mamba2"), TOKENS, {"params": 0.8}, ["ssm", "head"], method="one-shot", score=scores,
               evenly=False, **SMALL)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"method": "best"}, "method is 'best'; accepted: one of"),
    ({"method": "magnitude", "axes": ["nose"]}, r"axes is \['nose'\]; a mamba2 model accepts"),
    ({"method": "ghost", "axes": ["head"]}, r"method 'ghost' has no scores for \['head'\]; it has \['state'\]"),
])
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        score(model_of("mamba2"), TOKENS, **arguments)
