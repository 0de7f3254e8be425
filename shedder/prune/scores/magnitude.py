"""Magnitude of weights: no data."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from shedder.layout import RemovedBlock, RemovedSSM
from shedder.models import mamba1, mamba2
from shedder.models.sections import Sections
from shedder.nn import LanguageModel
from shedder.prune.calibration import Calibration
from shedder.prune.removal import STREAM
from shedder.prune.scores.table import Found
from shedder.prune.slice import axis_sizes
from shedder.prune.units import group_pairs

WEIGHTS = ("in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight")
_SECTIONS = {"mamba1": mamba1.SECTIONS, "mamba2": mamba2.SECTIONS}
# The axes of the section tables that make up a unit, in the order of the shape of its scores.
UNITS: dict[str, dict[str, tuple[str, ...]]] = {
    "mamba1": {"channel": ("channel",), "state": ("state",), "d_model": ("model",)},
    "mamba2": {"head": ("head",), "state": ("group", "state"), "head_channel": ("head", "channel"), "mlp": ("mlp",),
               "d_model": ("model",)},
}


@torch.no_grad()
def magnitude(model: LanguageModel, calibration: Calibration) -> Found:
    """The sum of squares of the matrix and convolution weights that go with a unit.

    Two groups count for the squares that their mean lacks, a channel of d_model for all layers, embedding and head.
    """
    config = model.config
    sections = _SECTIONS[config.family]
    scores: Found = {index: {} for index in range(len(config.layers))}
    stream = sum(weight.double().square().sum(0) for weight in {model.backbone.embedding.weight, model.lm_head.weight})
    for index, mixer in enumerate(model.mixers):
        layout = config.layers[index]
        if mixer is None or isinstance(layout, RemovedBlock):
            continue
        weights = {name: weight.double() for name, weight in mixer.named_parameters() if name in WEIGHTS}
        parts = _parts(sections, weights, axis_sizes(sections, config, layout), isinstance(layout, RemovedSSM))
        scores[index]["block"] = torch.stack([weight.square().sum() for weight in weights.values()]).sum()
        for unit, axes in UNITS[config.family].items():
            found = [_by_unit(part.square().sum(-1), names, axes) for names, part in parts if set(axes) <= set(names)]
            if found:
                scores[index][unit] = torch.stack(found).sum(0)
        stream = stream + scores[index].pop("d_model")
        if pairs := group_pairs(layout):
            groups = [part.flatten(1) for names, part in parts if names == ("group", "state")]
            scores[index]["merge"] = torch.stack([
                sum(((part[a] - part[b]).square().sum() / 2 for part in groups), start=torch.zeros(()).to(stream))
                for a, b in pairs])
    return scores | {STREAM: {"d_model": stream}}


def _parts(sections: Sections, weights: Mapping[str, Tensor], sizes: Mapping[str, int], no_ssm: bool
           ) -> list[tuple[tuple[str, ...], Tensor]]:
    """(axes, the weights over them) of each section of rows or columns; the last dimension is all others."""
    parts = []
    for name, weight in weights.items():
        for dim, names in enumerate(sections.tensors["mixer." + name]):
            present = [s for s in names if not (no_ssm and s in sections.removed_with_ssm)]
            shapes = [tuple(sizes[axis] for axis in sections.axes[s]) for s in present]
            runs = weight.movedim(dim, 0).flatten(1).split([math.prod(shape) for shape in shapes])
            parts += [(sections.axes[s], run.reshape(*shape, run.shape[1]))
                      for s, shape, run in zip(present, shapes, runs, strict=True)]
    return parts


def _by_unit(energy: Tensor, names: tuple[str, ...], axes: tuple[str, ...]) -> Tensor:
    others = [dim for dim, axis in enumerate(names) if axis not in axes]
    return energy.sum(others) if others else energy
