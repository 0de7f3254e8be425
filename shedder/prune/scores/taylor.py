"""Taylor scores: the loss as a function of gates on the units, 1 as trained and 0 when removed.

A gate stands where removing the unit acts: on the mixer's output (block), on the part of y that comes from the state
(ssm), on x after the convolution (head, head_channel, channel), on B (state), on the MLP; on the embedding and every
mixer's output (d_model). A gate of two groups (merge) leads from their B and C, after the convolution, to the means.
Gates are per sequence, so one backward pass gives the gradient of each sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shedder.layout import LayerLayout, RemovedBlock, RemovedSSM, ScanLayout, SSDLayout
from shedder.nn import LanguageModel, Mixer
from shedder.nn.block import Block
from shedder.nn.mixer import Probe
from shedder.prune.calibration import Calibration
from shedder.prune.removal import STREAM
from shedder.prune.scores.observe import live_mixers, probes
from shedder.prune.scores.table import Found
from shedder.prune.units import group_pairs

Gates = dict[int, dict[str, Tensor]]                   # of each layer (or STREAM) and axis: (sequences, units...)


def first_order(model: LanguageModel, calibration: Calibration) -> Found:
    """|dL/dm|, L the mean loss per token (Molchanov et al., 2019, on gates)."""
    slopes, _ = _derivatives(model, calibration, curvature=False)
    return {index: {axis: value.abs() for axis, value in scores.items()} for index, scores in slopes.items()}


def second_order(model: LanguageModel, calibration: Calibration) -> Found:
    """The rise of L that its expansion to second order predicts, -dL/dm + 1/2 d^2L/dm^2.

    The curvature is the diagonal of the Fisher matrix: the variance of the gradient with targets drawn from the
    model itself. Over a sequence of T such targets gradients add up without correlation, so T E[g^2] is what one
    token has.
    """
    slopes, curvatures = _derivatives(model, calibration, curvature=True)
    return {index: {axis: -value + 0.5 * curvatures[index][axis] for axis, value in slope.items()}
            for index, slope in slopes.items()}


def _derivatives(model: LanguageModel, calibration: Calibration, curvature: bool) -> tuple[Found, Found]:
    count, length = calibration.rows.shape[0], calibration.rows.shape[1] - 1
    generator = torch.Generator(model.device).manual_seed(calibration.seed)
    layers = (STREAM, *range(len(model.config.layers)))
    slopes: Found = {index: {} for index in layers}
    curvatures: Found = {index: {} for index in layers}
    for tokens, targets in zip(calibration.inputs, calibration.targets, strict=True):
        for index, axis, gradient in _gradients(model, tokens, targets):
            _add(slopes[index], axis, gradient.sum(0) / count)
        if curvature:
            for index, axis, gradient in _gradients(model, tokens, generator):
                _add(curvatures[index], axis, gradient.square().sum(0) * length / count)
    return slopes, curvatures


def _add(scores: dict[str, Tensor], axis: str, value: Tensor) -> None:
    scores[axis] = scores[axis] + value if axis in scores else value


@torch.enable_grad()
def _gradients(model: LanguageModel, tokens: Tensor, targets: Tensor | torch.Generator
               ) -> list[tuple[int, str, Tensor]]:
    """The gradient of each sequence's mean loss by its gates; a generator draws the targets from the model."""
    mixers = live_mixers(model)
    gates: Gates = {index: _gates(model, index, tokens.shape[0]) for index in mixers}
    stream = torch.ones(tokens.shape[0], model.config.d_model, device=model.device, requires_grad=True)
    logits = _logits(model, tokens, gates, stream)
    gates[STREAM] = {"d_model": stream}
    log_p = logits.float().log_softmax(-1)
    if isinstance(targets, torch.Generator):
        drawn = torch.multinomial(log_p.detach().exp().flatten(0, 1), 1, generator=targets)
        targets = drawn.view(tokens.shape)
    loss = -log_p.gather(-1, targets[..., None]).squeeze(-1).mean(1).sum()
    named = [(index, axis, gate) for index, of_layer in gates.items() for axis, gate in of_layer.items()]
    gradients = torch.autograd.grad(loss, [gate for _, _, gate in named])
    return [(index, axis, gradient.double()) for (index, axis, _), gradient in zip(named, gradients, strict=True)]


def _logits(model: LanguageModel, tokens: Tensor, gates: Gates, stream: Tensor) -> Tensor:
    mixers = live_mixers(model)
    hidden, residual = model.embed(tokens), None
    hidden = hidden * stream[:, None].to(hidden.dtype)
    with probes(model, {index: _gated(mixers[index], model.config.layers[index], gates[index])
                        for index in gates}):
        for layer in model.layers:
            hidden, residual = layer(hidden, residual)
            if isinstance(layer, Block):
                hidden = hidden * stream[:, None].to(hidden.dtype)
    return model.head(hidden, residual)


def _gates(model: LanguageModel, index: int, batch: int) -> dict[str, Tensor]:
    layout = model.config.layers[index]
    assert not isinstance(layout, RemovedBlock)
    shapes: dict[str, tuple[int, ...]] = {"block": ()}
    if isinstance(layout, (ScanLayout, SSDLayout)):
        shapes["ssm"] = ()
    if model.config.family == "mamba1":
        shapes["channel"] = (layout.d_inner,)
    else:
        assert isinstance(layout, (SSDLayout, RemovedSSM))
        shapes |= {"head": (layout.nheads,), "head_channel": (layout.nheads, layout.headdim)}
        if layout.mlp_channels:
            shapes["mlp"] = (layout.mlp_channels,)
    if isinstance(layout, ScanLayout):
        shapes["state"] = (layout.dstate,)
    elif isinstance(layout, SSDLayout):
        shapes["state"] = (layout.ngroups, layout.dstate)
    if pairs := group_pairs(layout):
        shapes["merge"] = (len(pairs),)
    return {axis: torch.ones(batch, *shape, device=model.device, requires_grad=True)
            for axis, shape in shapes.items()}


def _gated(mixer: Mixer, layout: LayerLayout, gates: dict[str, Tensor]) -> Probe:
    x_seen: list[Tensor] = []
    pairs = torch.tensor(group_pairs(layout), device=mixer.out_proj.weight.device)

    def probe(name: str, value: Tensor) -> Tensor:
        if name == "x":
            gate = (gates["channel"][:, :, None] if "channel" in gates else
                    (gates["head"][..., None] * gates["head_channel"])[:, None])
            value = value * gate.to(value.dtype)
            x_seen[:] = [value]
        elif name == "y" and "ssm" in gates:
            skip = (_skip_gain(mixer, value) * x_seen.pop()).to(value.dtype)
            value = skip + gates["ssm"].view(-1, *(1,) * (value.dim() - 1)).to(value.dtype) * (value - skip)
        elif name in ("B", "C") and "state" in gates:
            if name == "B":
                gate = gates["state"]
                gate = gate[:, None, :, None] if gate.dim() == 2 else gate[:, None]       # (B,G,N,L) or (B,L,G,N)
                value = value * gate.to(value.dtype)
            if "merge" in gates:
                value = _towards_means(value, gates["merge"], pairs, dim=1 if gates["state"].dim() == 2 else 2)
        elif name == "mlp":
            value = value * gates["mlp"][:, None].to(value.dtype)
        elif name == "out":
            value = value * gates["block"][:, None, None].to(value.dtype)
        return value

    return probe


def _towards_means(value: Tensor, gates: Tensor, pairs: Tensor, dim: int) -> Tensor:
    """B or C with the groups (along `dim`) of each pair by 1 - gate of the way at their mean."""
    first, second = pairs.unbind(1)
    way = (1 - gates).to(value.dtype).view(len(gates), *(-1 if d == dim else 1 for d in range(1, value.dim())))
    step = way * (value.index_select(dim, second) - value.index_select(dim, first)) / 2
    return value.index_add(dim, first, step).index_add(dim, second, -step)


def _skip_gain(mixer: Mixer, y: Tensor) -> Tensor:
    """D in the shape of y: (B, L, H, P), or (B, D, L) in Mamba-1."""
    D = mixer.D
    assert D is not None
    return D[:, None] if y.dim() == 3 or D.numel() == y.shape[2] else D.view(y.shape[2:])
