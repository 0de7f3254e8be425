"""The slicer: one for all families and cuts, driven by the section tables of shedder/models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from shedder.layout import LayerLayout, LayoutError, RemovedBlock, RemovedSSM, ScanLayout, SSDLayout
from shedder.models import mamba1, mamba2
from shedder.models.sections import Axis, Sections
from shedder.nn import LanguageModel, build_block
from shedder.nn.config import ModelConfig
from shedder.prune.plan import Kept, LayerPlan, Plan, compacted_layout, repaired_segments

_LAYERS = "backbone.layers."
_SECTIONS = {"mamba1": mamba1.SECTIONS, "mamba2": mamba2.SECTIONS}
ZERO_ROW = -1                       # in a list of kept indices: a new row of zeros

# The kept indices of an axis; a dict when they depend on the index of the axis outside it
# (states differ from group to group), with the key None for a section without that axis.
Kept_indices = Sequence[int] | Mapping[int | None, Sequence[int]]


def compact(model: LanguageModel, plan: Plan) -> LanguageModel:
    """A new, physically smaller model; `model` and its tensors stay as they are. Dtypes and device are kept.

    Raises:
        PlanError: the plan does not fit the model.
    """
    config = model.config
    compacted = LanguageModel(plan.compacted_config(config), model.device, model.dtype, initialise=False)
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()
               if not name.startswith(_LAYERS)}
    for index, block in enumerate(model.layers):
        cut = plan.layers.get(index, LayerPlan())
        own = {name: parameter.detach() for name, parameter in block.named_parameters()}
        for name, tensor in compact_block_tensors(own, config, index, cut, plan.norm_repair).items():
            tensors[f"{_LAYERS}{index}.{name}"] = tensor
    _adopt(compacted, tensors)
    compacted.tokenizer_name, compacted.tokenizer_folder = model.tokenizer_name, model.tokenizer_folder
    compacted.provenance = dict(model.provenance)
    if model.plan is not None:
        compacted.provenance["earlier_plans"] = [*model.provenance.get("earlier_plans", []), model.plan]
    compacted.plan = json.loads(plan.to_json())
    return compacted.train(model.training)


def compact_block(block: nn.Module, config: ModelConfig, index: int, cut: LayerPlan, norm_repair: str) -> nn.Module:
    """Block `index` of a model of `config` after a cut, as a new module on the same device."""
    layout = compacted_layout(config.layers[index], cut, norm_repair)
    own = {name: parameter.detach() for name, parameter in block.named_parameters()}
    some = next(iter(own.values()), None)
    device, dtype = (None, None) if some is None else (some.device, some.dtype)
    compacted = build_block(config.with_layer(index, layout), index, device, dtype)
    _adopt(compacted, compact_block_tensors(own, config, index, cut, norm_repair))
    return compacted.train(block.training)


def _adopt(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Makes the tensors the module's parameters, dtypes and all; names and shapes must be exactly the module's."""
    parameters = dict(module.named_parameters())       # tied weights appear once, and stay tied
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    sliced = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != sliced:
        wrong = sorted(name for name in shapes | sliced if shapes.get(name) != sliced.get(name))
        raise LayoutError("the slicer and the layout disagree: " + "; ".join(
            f"{name} is sliced to {sliced.get(name)}, the layout says {shapes.get(name)}" for name in wrong))
    for name, parameter in parameters.items():
        parameter.data = tensors[name]


def compact_block_tensors(tensors: Mapping[str, Tensor], config: ModelConfig, index: int, cut: LayerPlan,
                          norm_repair: str) -> dict[str, Tensor]:
    """The tensors of one block (names relative to it) after a cut; always copies."""
    if cut.block:
        return {}
    mixer = {name.removeprefix("mixer."): t for name, t in tensors.items() if name.startswith("mixer.")}
    result = {name: t.clone() for name, t in tensors.items() if not name.startswith("mixer.")}
    if cut.empty:
        return {name: t.clone() for name, t in tensors.items()}
    sliced = slice_mixer(mixer, config, config.layers[index], cut)
    if "norm.weight" in sliced:
        sliced["norm.weight"] = _repaired(sliced["norm.weight"], config.layers[index], cut, norm_repair)
    return result | {f"mixer.{name}": t for name, t in sliced.items()}


def slice_mixer(tensors: Mapping[str, Tensor], config: ModelConfig, layout: LayerLayout,
                cut: LayerPlan) -> dict[str, Tensor]:
    """Every tensor of a mixer with the rows and columns that the cut leaves; norm weights unrepaired."""
    sections = _sections(config)
    unknown = sorted(set(tensors) - set(sections.tensors))
    if unknown:
        raise LayoutError(f"mixer has the tensors {unknown}; the section table of {config.family} describes "
                          f"{sorted(sections.tensors)}")
    no_ssm = sections.removed_with_ssm if cut.ssm or isinstance(layout, RemovedSSM) else frozenset[str]()
    sizes = _axis_sizes(sections, config, layout)
    kept = _kept_indices(sections, config, layout, cut)
    sliced = {}
    for name, tensor in tensors.items():
        for dim, names in enumerate(sections.tensors[name]):
            present = [s for s in names if s not in no_ssm]
            if not present:                            # the tensor served the SSM alone
                break
            tensor = _take(tensor, dim, _rows(sections, names, frozenset(present), sizes, kept, layout))
        else:
            sliced[name] = tensor
    return sliced


def _sections(config: ModelConfig) -> Sections:
    """The table of a family; models with a D per channel have the section channel_gain where others have gain."""
    sections = _SECTIONS[config.family]
    if not config.d_has_hdim:
        return sections
    return replace(sections, tensors={
        name: tuple(tuple("channel_gain" if s == "gain" else s for s in dim) for dim in dims)
        for name, dims in sections.tensors.items()})


def _has_heads(sections: Sections) -> bool:
    return any("head" in axes for axes in sections.axes.values())


def _axis_sizes(sections: Sections, config: ModelConfig, layout: LayerLayout) -> dict[Axis, int]:
    """The length of each axis before the cut; what a removed SSM no longer has is 0."""
    assert not isinstance(layout, RemovedBlock)
    units = {"channel": layout.d_inner}
    if not isinstance(layout, ScanLayout) and _has_heads(sections):
        units = {"head": layout.nheads, "channel": layout.headdim}
    return units | {"group": getattr(layout, "ngroups", 0), "state": getattr(layout, "dstate", 0),
                    "rank": getattr(layout, "dt_rank", 0), "padding": getattr(layout, "row_padding", 0),
                    "model": config.d_model, "one": 1, "tap": layout.conv_width}


def _kept_indices(sections: Sections, config: ModelConfig, layout: LayerLayout,
                  cut: LayerPlan) -> dict[Axis, Kept_indices]:
    """What stays of each axis, in the numbering before the cut."""
    kept = Kept.of(layout, cut)
    indices: dict[Axis, Kept_indices] = {axis: range(size)
                                         for axis, size in _axis_sizes(sections, config, layout).items()}
    indices["head" if _has_heads(sections) else "channel"] = kept.heads or kept.channels
    indices["group"] = kept.groups
    indices["state"] = {None: kept.states[0] if kept.states else (), **dict(enumerate(kept.states))}
    after = compacted_layout(layout, cut, "none")
    indices["padding"] = (ZERO_ROW,) * getattr(after, "row_padding", 0)
    return indices


def _rows(sections: Sections, names: Sequence[str], present: frozenset[str], sizes: Mapping[Axis, int],
          kept: Mapping[Axis, Kept_indices], layout: LayerLayout) -> list[int]:
    """The kept indices of one dimension: its sections one after the other, of each the rows that stay."""
    rows: list[int] = []
    start = 0
    for name in names:
        axes = sections.axes[name]
        if name in present:
            rows += [row if row == ZERO_ROW else start + row for row in section_rows(axes, sizes, kept)]
        if not (isinstance(layout, RemovedSSM) and name in sections.removed_with_ssm):
            size = 1
            for axis in axes:
                size *= sizes[axis]
            start += size
    return rows


def section_rows(axes: Sequence[Axis], sizes: Mapping[Axis, int], kept: Mapping[Axis, Kept_indices]) -> list[int]:
    """The kept rows of one section laid out over `axes`, outermost first, numbered within the section."""
    rows: list[tuple[int, int | None]] = [(0, None)]   # (row, index on the axis outside)
    for axis in axes:
        choice = kept[axis]
        rows = [(ZERO_ROW if i == ZERO_ROW else row * sizes[axis] + i, i) for row, outer in rows
                for i in (choice[outer] if isinstance(choice, Mapping) else choice)]
    return [row for row, _ in rows]


def _take(tensor: Tensor, dim: int, rows: Sequence[int]) -> Tensor:
    """tensor.index_select(dim, rows), with zeros for ZERO_ROW; always a copy."""
    index = torch.tensor(rows, dtype=torch.long, device=tensor.device)
    taken = tensor.index_select(dim, index.clamp(min=0))
    return taken.index_fill(dim, (index == ZERO_ROW).nonzero().flatten(), 0) if ZERO_ROW in rows else taken


def _repaired(weight: Tensor, layout: LayerLayout, cut: LayerPlan, norm_repair: str) -> Tensor:
    """Sliced norm weights times the factor of their segment."""
    assert isinstance(layout, (SSDLayout, RemovedSSM))
    factors = [factor for segment, factor in repaired_segments(layout, Kept.of(layout, cut), norm_repair)
               for _ in range(segment.channels)]
    return (weight.double() * torch.tensor(factors, dtype=torch.float64, device=weight.device)).to(weight.dtype)
