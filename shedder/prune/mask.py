"""The untouched dense model, made to behave as if a plan had been applied: activations are set to zero.

This is what a compacted model is compared with, so it shares no index arithmetic with the slicer: it knows
units only as positions in activations, and in the few weights for which no activation stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from shedder.layout import ScanLayout, SSDLayout
from shedder.nn import LanguageModel
from shedder.nn.mamba1 import Mamba1Mixer
from shedder.nn.mamba2 import Mamba2Mixer
from shedder.nn.mixer import Mixer, Probe
from shedder.prune.layer_plan import LayerPlan
from shedder.prune.plan import Plan

Rows = Callable[[Tensor], Tensor]


@contextmanager
def masked(model: LanguageModel, plan: Plan) -> Iterator[LanguageModel]:
    """Within the context, `model` computes what compact(model, plan) computes (norm repair "exact", no repairs).

    A removed head, channel or channel of a head has x = 0 after the convolution and y = 0; a removed state has
    B = C = 0; a removed SSM has dt = 0, so that its state stays zero and y = D x; an MLP channel and a
    removed block's output are zero. A channel of the residual stream is zero in the embedding and in every output.
    What no activation can say is put into the dense weights meanwhile: zeros for old taps, the mean of B and C rows
    for merged groups, the product of lower rank for dt. The masks sit on top of probes that are already set.

    Raises:
        PlanError: the plan does not fit the model.
    """
    plan.validate(model.config)
    mixers = {index: mixer for index, mixer in enumerate(model.mixers)
              if mixer is not None and (index in plan.layers or plan.d_model)}
    before = {index: mixer.probe for index, mixer in mixers.items()}
    with ExitStack() as stack:
        for index, mixer in mixers.items():
            stack.callback(setattr, mixer, "probe", before[index])
        if plan.d_model:
            embedding = model.backbone.embedding.weight.detach().clone()
            embedding[:, list(plan.d_model)] = 0
            stack.enter_context(_value(model.backbone.embedding.weight, embedding))
        for index, mixer in mixers.items():
            cut = plan.layers.get(index, LayerPlan())
            if not cut.block:
                for parameter, value in _weights(mixer, cut):
                    stack.enter_context(_value(parameter, value))
            mixer.probe = _mask(mixer, cut, plan, before[index])
        yield model


@contextmanager
def _value(parameter: Tensor, value: Tensor) -> Iterator[None]:
    original = parameter.data
    parameter.data = value
    try:
        yield
    finally:
        parameter.data = original


# ---- activations

def _mask(mixer: Mixer, cut: LayerPlan, plan: Plan, inner: Probe | None) -> Probe:
    is_mamba1 = plan.family == "mamba1"
    units = {*cut.heads, *cut.channels} | _readers(mixer, cut)

    def probe(name: str, value: Tensor) -> Tensor:
        if inner is not None:
            value = inner(name, value)
        if name == "dt" and cut.ssm:
            return torch.zeros_like(value)
        if name == "out" and cut.block:
            return torch.zeros_like(value)
        value = value.clone()
        if name in ("x", "y"):
            for unit in units:
                if is_mamba1:                          # (B, D, L)
                    value[:, unit] = 0
                else:                                  # (B, L, H, P)
                    value[:, :, unit] = 0
            for head, channels in enumerate(cut.head_channels):
                for channel in channels:
                    value[:, :, head, channel] = 0
        if name in ("B", "C"):
            for group, states in enumerate(cut.states):
                for state in states:
                    if is_mamba1:                      # (B, G, N, L)
                        value[:, group, state] = 0
                    else:                              # (B, L, G, N)
                        value[:, :, group, state] = 0
        if name == "mlp":
            for channel in cut.mlp:
                value[..., channel] = 0
        if name == "out":
            for channel in plan.d_model:
                value[..., channel] = 0
        return value

    return probe


def _readers(mixer: Mixer, cut: LayerPlan) -> set[int]:
    """The heads or channels that read a group which goes."""
    if not cut.groups:
        return set()
    layout = mixer.layout
    if isinstance(layout, SSDLayout):
        return {head for head in range(layout.nheads) if layout.head_to_group[head] in cut.groups}
    assert isinstance(layout, ScanLayout)
    groups = layout.channel_to_group
    return {channel for channel in range(layout.d_inner) if (groups[channel] if groups else 0) in cut.groups}


# ---- weights

def _weights(mixer: Mixer, cut: LayerPlan) -> Iterator[tuple[Tensor, Tensor]]:
    """Parameters that mask what activations cannot, with their values."""
    conv = mixer.conv1d.weight.detach().clone()
    conv[..., :cut.taps] = 0
    if cut.merge and isinstance(mixer, Mamba2Mixer):
        layout: Any = mixer.layout
        sizes = [2 * layout.mlp_channels + 2 * layout.d_inner, *[layout.ngroups * layout.dstate] * 2,
                 layout.nheads + layout.row_padding]
        for parameter in (mixer.in_proj.weight, mixer.in_proj.bias):
            if parameter is not None:
                yield parameter, _merged(parameter, sizes, cut, layout.dstate)
        sizes = [layout.d_inner, *sizes[1:3]]
        conv = _merged(conv, sizes, cut, layout.dstate)
        if mixer.conv1d.bias is not None:
            yield mixer.conv1d.bias, _merged(mixer.conv1d.bias, sizes, cut, layout.dstate)
    if isinstance(mixer, Mamba1Mixer) and (cut.merge or cut.ranks):
        x_proj, dt_proj = mixer.x_proj.weight.detach(), mixer.dt_proj.weight.detach().clone()
        layout = mixer.layout
        if cut.merge:
            sizes = [layout.dt_rank, *[layout.ngroups * layout.dstate] * 2]
            x_proj = _merged(x_proj, sizes, cut, layout.dstate)
        if cut.ranks:
            x_proj = x_proj.clone()
            stays = torch.ones(layout.d_inner, dtype=x_proj.dtype, device=x_proj.device)
            stays[list({*cut.channels} | _readers(mixer, cut))] = 0
            product = (stays[:, None] * (dt_proj @ x_proj[:layout.dt_rank]) * stays).double()
            u, s, v = torch.linalg.svd(product)
            s[layout.dt_rank - cut.ranks:] = 0
            dt_proj[:, :] = (u * s)[:, :layout.dt_rank]
            x_proj[:layout.dt_rank] = v[:layout.dt_rank]
        yield mixer.x_proj.weight, x_proj
        yield mixer.dt_proj.weight, dt_proj
    yield mixer.conv1d.weight, conv


def _merged(tensor: Tensor, sizes: list[int], cut: LayerPlan, dstate: int) -> Tensor:
    """Rows [anything | B | C | anything] in which the groups of a set all have the mean of their B and C rows.

    The states that stay in one group stand, in order, for those that stay in the others.
    """
    parts = list(tensor.detach().clone().split(sizes))
    for part in parts[1:3]:
        rows = part.unflatten(0, (-1, dstate))
        for groups in cut.merge:
            stay = [[n for n in range(dstate) if not cut.states or n not in cut.states[g]] for g in groups]
            mean = torch.stack([rows[g, states] for g, states in zip(groups, stay, strict=True)]).mean(0)
            for g, states in zip(groups, stay, strict=True):
                rows[g, states] = mean
    return torch.cat(parts)
