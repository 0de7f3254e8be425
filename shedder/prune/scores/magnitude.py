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
from shedder.prune.slice import axis_sizes

WEIGHTS = ("in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight")
_SECTIONS = {"mamba1": mamba1.SECTIONS, "mamba2": mamba2.SECTIONS}
# The axes of the section tables that make up a unit, in the order of the shape of its scores.
UNITS: dict[str, dict[str, tuple[str, ...]]] = {
    "mamba1": {"channel": ("channel",), "state": ("state",)},
    "mamba2": {"head": ("head",), "state": ("group", "state"), "head_channel": ("head", "channel"), "mlp": ("mlp",)},
}


@torch.no_grad()
def magnitude(model: LanguageModel, calibration: Calibration) -> list[dict[str, Tensor]]:
    """The sum of squares of the matrix and convolution weights that go with a unit."""
    config = model.config
    sections = _SECTIONS[config.family]
    scores: list[dict[str, Tensor]] = [{} for _ in config.layers]
    for index, mixer in enumerate(model.mixers):
        layout = config.layers[index]
        if mixer is None or isinstance(layout, RemovedBlock):
            continue
        energies = {name: weight.double().square() for name, weight in mixer.named_parameters() if name in WEIGHTS}
        parts = _parts(sections, energies, axis_sizes(sections, config, layout), isinstance(layout, RemovedSSM))
        scores[index]["block"] = torch.stack([energy.sum() for energy in energies.values()]).sum()
        for unit, axes in UNITS[config.family].items():
            found = [_by_unit(energy, names, axes) for names, energy in parts if set(axes) <= set(names)]
            if found:
                scores[index][unit] = torch.stack(found).sum(0)
    return scores


def _parts(sections: Sections, energies: Mapping[str, Tensor], sizes: Mapping[str, int], no_ssm: bool
           ) -> list[tuple[tuple[str, ...], Tensor]]:
    """(axes, energy over them) of each section of rows or columns, other dimensions summed."""
    parts = []
    for name, energy in energies.items():
        for dim, names in enumerate(sections.tensors["mixer." + name]):
            along = energy.sum([other for other in range(energy.dim()) if other != dim])
            present = [s for s in names if not (no_ssm and s in sections.removed_with_ssm)]
            shapes = [tuple(sizes[axis] for axis in sections.axes[s]) for s in present]
            runs = along.split([math.prod(shape) for shape in shapes])
            parts += [(sections.axes[s], run.view(shape)) for s, shape, run in zip(present, shapes, runs, strict=True)]
    return parts


def _by_unit(energy: Tensor, names: tuple[str, ...], axes: tuple[str, ...]) -> Tensor:
    others = [dim for dim, axis in enumerate(names) if axis not in axes]
    return energy.sum(others) if others else energy
