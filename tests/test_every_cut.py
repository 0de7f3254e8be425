"""What must hold for every cut: the order of units means nothing, files and training keep a model pruned."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import subprocess
import sys

import pytest
import torch
from random_plans import CONFIGS, FULL_PLANS, MODELS, TOKENS, TOLERANCE, random_plan

import shedder
from shedder.layout import RemovedSSM, ScanLayout, SSDLayout
from shedder.nn import LanguageModel, ModelConfig
from shedder.prune import LayerPlan, Plan, compact, parameter_count

# ---- the order of units. `order[new] = old` of each kind, per layer; written without the slicer.

FIELDS = ("heads", "channels", "mlp", "groups")


@dataclasses.dataclass
class Shuffled:
    """A dense model whose units stand in another order, and what turns a plan for the old order into one for it."""

    model: LanguageModel
    layers: list[dict]
    d_model: list[int]

    def plan(self, plan: Plan) -> Plan:
        layers = {}
        for index, cut in plan.layers.items():
            order, own = self.layers[index], {}
            for name in FIELDS:
                own[name] = tuple(order[name].index(unit) for unit in getattr(cut, name))
            own["merge"] = tuple(tuple(order["groups"].index(g) for g in groups) for groups in cut.merge)
            if cut.states:
                own["states"] = tuple(tuple(order["states"][g].index(n) for n in cut.states[g])
                                      for g in order["groups"])
            if cut.head_channels:
                own["head_channels"] = tuple(tuple(order["head_channels"][h].index(p) for p in cut.head_channels[h])
                                             for h in order["heads"])
            layers[index] = dataclasses.replace(cut, **own)
        return dataclasses.replace(plan, layers=layers,
                                   d_model=tuple(self.d_model.index(j) for j in plan.d_model))


def shuffled(model: LanguageModel, rng: random.Random, same_states: bool) -> Shuffled:
    """same_states: all groups in one order, for Mamba-1 and for groups that a plan merges."""
    config = model.config
    stream = rng.sample(range(config.d_model), config.d_model)
    orders, layouts = [], []
    for layout in config.layers:
        units = layout.d_inner if isinstance(layout, ScanLayout) else layout.nheads
        order = rng.sample(range(units), units)
        if getattr(layout, "norm_segments", ()):       # a head stays within its segment of the norm
            starts = [sum(s.channels for s in layout.norm_segments[:i]) for i in range(len(layout.norm_segments))]
            order.sort(key=lambda h, layout=layout, starts=starts: max(
                i for i, s in enumerate(starts) if s <= h * layout.headdim))
        groups = rng.sample(range(getattr(layout, "ngroups", 0)), getattr(layout, "ngroups", 0))
        dstate, headdim = getattr(layout, "dstate", 0), getattr(layout, "headdim", 1)
        one = rng.sample(range(dstate), dstate)
        same = same_states or isinstance(layout, ScanLayout)
        mlp = getattr(layout, "mlp_channels", 0)
        orders.append({"heads": order, "channels": order, "groups": groups, "mlp": rng.sample(range(mlp), mlp),
                       "states": [one if same else rng.sample(range(dstate), dstate) for _ in groups],
                       "head_channels": [rng.sample(range(headdim), headdim) for _ in range(units)]})
        if isinstance(layout, SSDLayout):
            layout = dataclasses.replace(layout, head_to_group=tuple(groups.index(layout.head_to_group[h])
                                                                     for h in order))
        elif isinstance(layout, ScanLayout) and layout.channel_to_group:
            layout = dataclasses.replace(layout, channel_to_group=tuple(groups.index(layout.channel_to_group[c])
                                                                        for c in order))
        layouts.append(layout)
    other = LanguageModel(dataclasses.replace(config, layers=tuple(layouts)), dtype=torch.float64).eval()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("backbone.embedding.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:, stream]
    tensors["backbone.norm_f.weight"] = tensors["backbone.norm_f.weight"][stream]
    for index, (layout, order) in enumerate(zip(config.layers, orders, strict=True)):
        own = {name.removeprefix(f"backbone.layers.{index}."): name for name in tensors
               if name.startswith(f"backbone.layers.{index}.")}
        for name, full in own.items():
            tensors[full] = shuffle_tensor(name, tensors[full], config, layout, order, stream)
    other.load_state_dict(tensors)
    return Shuffled(other, orders, stream)


def shuffle_tensor(name: str, tensor: torch.Tensor, config: ModelConfig, layout, order: dict, stream: list[int]
                   ) -> torch.Tensor:
    headdim = getattr(layout, "headdim", 1)

    def inner(rows):                                   # (d_inner, ...)
        rows = rows.unflatten(0, (-1, headdim))
        return torch.stack([rows[h][order["head_channels"][h]] for h in order["heads"]]).flatten(0, 1)

    def states(rows):                                  # (G N, ...)
        rows = rows.unflatten(0, (-1, layout.dstate))
        return torch.stack([rows[g][order["states"][g]] for g in order["groups"]]).flatten(0, 1)

    def parts(tensor, sizes, changes):
        return torch.cat([change(part) for part, change in zip(tensor.split(sizes), changes, strict=True)])

    def same(rows):
        return rows

    def heads(rows):
        return rows[order["heads"]]

    def mlp(rows):
        return rows[order["mlp"]]
    count, bc = layout.d_inner, getattr(layout, "ngroups", 0) * getattr(layout, "dstate", 0)
    beside = getattr(layout, "mlp_channels", 0)
    if name in ("norm.weight", "mixer.out_proj.bias"):
        return tensor[stream]
    if name.startswith("mixer.in_proj"):
        if isinstance(layout, SSDLayout):
            tensor = parts(tensor, [beside, beside, count, count, bc, bc, layout.nheads, layout.row_padding],
                           [mlp, mlp, inner, inner, states, states, heads, same])
        else:
            tensor = parts(tensor, [beside, beside, count, count], [mlp, mlp, inner, inner])
        return tensor[:, stream] if tensor.dim() == 2 else tensor
    if name.startswith("mixer.conv1d"):
        is_ssd = isinstance(layout, SSDLayout)
        return parts(tensor, [count, bc, bc], [inner, states, states]) if is_ssd else inner(tensor)
    if name == "mixer.out_proj.weight":
        return parts(tensor.T, [beside, count], [mlp, inner]).T[stream]
    if name == "mixer.norm.weight":
        return inner(tensor)
    if name == "mixer.x_proj.weight":
        return parts(inner(tensor.T).T, [layout.dt_rank, bc, bc], [same, states, states])
    if name == "mixer.A_log" and isinstance(layout, ScanLayout):
        return heads(tensor)[:, order["states"][0]]
    if name == "mixer.D":
        return inner(tensor) if tensor.numel() == count else heads(tensor)
    return heads(tensor)                               # dt_bias, A_log, dt_proj


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_the_order_of_units_before_pruning_means_nothing(name):
    model = MODELS[name]
    for seed in range(12):
        rng = random.Random(seed)
        plan = FULL_PLANS[name] if seed == 0 else random_plan(rng, model.config)
        # Which states of merged groups pair up is their order: that may not change, nor what is left of it.
        plan = dataclasses.replace(plan, layers={
            i: dataclasses.replace(cut, states=()) if cut.merge else cut for i, cut in plan.layers.items()})
        other = shuffled(model, rng, same_states=any(cut.merge for cut in plan.layers.values()))
        assert (other.model(TOKENS) - model(TOKENS)).abs().max() < TOLERANCE
        got = compact(other.model, other.plan(plan))
        expected = compact(model, plan)
        assert (got(TOKENS) - expected(TOKENS)).abs().max() < TOLERANCE
        assert parameter_count(got.config) == parameter_count(expected.config)


# ---- files and training

AGAIN = """
import sys, torch, shedder
generation, *folders = sys.argv[1:]
for folder in folders:
    model = shedder.load(folder)
    torch.save(model(torch.load("tokens")).detach(), folder + generation + ".logits")
    model.save_pretrained(folder + generation)
"""


def test_saved_and_loaded_twice_in_fresh_processes_nothing_changes(tmp_path):
    torch.save(TOKENS, tmp_path / "tokens")
    smaller = {name: compact(model, FULL_PLANS[name]) for name, model in MODELS.items()}
    for name, small in smaller.items():
        small.save_pretrained(tmp_path / name)
    for generation, folders in (("1", list(smaller)), ("2", [f"{name}1" for name in smaller])):
        subprocess.run([sys.executable, "-c", AGAIN, generation, *folders], check=True, timeout=120, cwd=tmp_path)
    for name, small in smaller.items():
        with torch.no_grad():
            expected = small(TOKENS)
        for file in (f"{name}1.logits", f"{name}12.logits"):
            assert torch.equal(torch.load(tmp_path / file), expected)
        again = shedder.load(tmp_path / f"{name}12")
        assert again.config == small.config
        assert again.plan == json.loads(FULL_PLANS[name].to_json())
        sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in (name, f"{name}12")]
        assert sizes[0] == sizes[1]
        assert sizes[0] >= 8 * parameter_count(small.config)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_of_an_optimiser_keeps_it_pruned(name, tmp_path):
    model = compact(copy.deepcopy(MODELS[name]), FULL_PLANS[name]).train()
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    before = model(TOKENS)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    before.logsumexp(-1).sum().backward()
    optimiser.step()
    model.eval()
    assert {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} == shapes
    for block, layout in zip(model.layers, model.config.layers, strict=True):
        if getattr(layout, "row_padding", 0):
            assert not block.mixer.in_proj.weight[-layout.row_padding:].any()
    with torch.no_grad():
        after = model(TOKENS)
        assert (after - before).abs().max() > 1e-3
        model.save_pretrained(tmp_path / "tuned")
        assert torch.equal(shedder.load(tmp_path / "tuned")(TOKENS), after)


@pytest.mark.parametrize("cut", [
    LayerPlan(heads=(0,)), LayerPlan(groups=(1,)), LayerPlan(merge=((0, 1),)), LayerPlan(states=((0,), (1,), (2,))),
    LayerPlan(head_channels=((0,), (1,)) * 2 + ((0,),)), LayerPlan(mlp=(0,)), LayerPlan(taps=1), LayerPlan(ssm=True),
    LayerPlan(block=True)], ids=str)
def test_each_cut_alone_makes_a_model_smaller(cut):
    model = MODELS["mamba2"]
    small = compact(model, Plan("mamba2", {1: cut}))
    assert sum(p.numel() for p in small.parameters()) == parameter_count(small.config)
    assert parameter_count(small.config, padding=False) < parameter_count(model.config, padding=False)
    assert small.layers[0].state_dict().keys() == model.layers[0].state_dict().keys()
    assert not any(isinstance(layout, RemovedSSM) for layout in small.config.layers[:1])
