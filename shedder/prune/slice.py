"""The slicer: one for all families and cuts, driven by the section tables of shedder/models."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from shedder.layout import LayerLayout, LayoutError, RemovedBlock, RemovedSSM, ScanLayout
from shedder.models import mamba1, mamba2
from shedder.models.sections import MODEL_SECTIONS, Axis, Section, Sections
from shedder.nn import LanguageModel, build_block
from shedder.nn.config import ModelConfig
from shedder.prune.calibration import Calibration, calibration_of
from shedder.prune.kept import Kept, compacted_layout, rest
from shedder.prune.layer_plan import LayerPlan
from shedder.prune.plan import Plan
from shedder.prune.repair import put_in, put_in_outside, refit
from shedder.prune.statistics import DenseStatistics, dense_statistics

_LAYERS = "backbone.layers."
_SECTIONS = {"mamba1": mamba1.SECTIONS, "mamba2": mamba2.SECTIONS}

# A row after the cut: the mean of these rows before it. One row stays as it is; of none comes a row of zeros.
Row = tuple[int, ...]

# What stays of an axis; a dict where that depends on the index of the axis outside it (states differ
# from group to group), with the key None for a section without that axis.
Choice = Sequence[Row] | Mapping[int | None, Sequence[int]]


def compact(model: LanguageModel, plan: Plan, calibration: str | Calibration | DenseStatistics | None = None
            ) -> LanguageModel:
    """A new, physically smaller model; `model` and its tensors stay as they are. Dtypes and device are kept.

    Args:
        calibration: for a plan with norm_repair "stats" or with repairs: the text that it was searched on, or
            tokens, or what was measured on them.
    Raises:
        PlanError: the plan does not fit the model, or lacks the calibration that its repairs need.
    """
    config = model.config
    compacted = LanguageModel(plan.compacted_config(config), model.device, model.dtype, initialise=False)
    if isinstance(calibration, str):
        calibration = calibration_of(model, calibration, plan.provenance)
    if isinstance(calibration, Calibration):
        calibration = dense_statistics(model, calibration, plan.repairs) if plan.needs_statistics else None
    _fill_outside(compacted, model, plan, calibration)
    for index, (block, small) in enumerate(zip(model.layers, compacted.layers, strict=True)):
        _fill(small, block, config, index, plan, calibration)
    compacted.tokenizer_name, compacted.tokenizer_folder = model.tokenizer_name, model.tokenizer_folder
    compacted.provenance = dict(model.provenance)
    if model.plan is not None:
        compacted.provenance["earlier_plans"] = [*model.provenance.get("earlier_plans", []), model.plan]
    compacted.plan = json.loads(plan.to_json())
    return compacted.train(model.training)


def compact_outside(model: LanguageModel, plan: Plan, statistics: DenseStatistics | None = None) -> LanguageModel:
    """What surrounds the blocks after a plan (embedding, last norm, head), as a model without blocks."""
    config = replace(plan.with_kept_d_model(model.config), layers=())
    compacted = LanguageModel(config, model.device, model.dtype, initialise=False)
    _fill_outside(compacted, model, plan, statistics)
    return compacted.train(model.training)


def compact_block(block: nn.Module, config: ModelConfig, index: int, plan: Plan,
                  statistics: DenseStatistics | None = None) -> nn.Module:
    """Block `index` of a model of `config` after its part of a plan, as a new module on the same device."""
    layout = compacted_layout(config.layers[index], plan.layers.get(index, LayerPlan()), plan.norm_repair)
    some = next(block.parameters(), None)
    device, dtype = (None, None) if some is None else (some.device, some.dtype)
    compacted = build_block(plan.with_kept_d_model(config).with_layer(index, layout), index, device, dtype)
    _fill(compacted, block, config, index, plan, statistics)
    return compacted.train(block.training)


def _fill_outside(compacted: LanguageModel, model: LanguageModel, plan: Plan,
                  statistics: DenseStatistics | None) -> None:
    """Gives a new model of the compacted shape its parameters outside the blocks."""
    config = model.config

    def outside(of: LanguageModel) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in of.named_parameters() if not name.startswith(_LAYERS)}
    own = {name: parameter.detach() for name, parameter in outside(model).items()}
    _adopt(outside(compacted), slice_tensors(
        put_in_outside(own, config, plan, statistics), MODEL_SECTIONS, _outside_axes(config),
        {"model": _rows(rest(config.d_model, plan.d_model)), "vocabulary": _rows(range(config.vocab_size))}))


def _fill(compacted: nn.Module, block: nn.Module, config: ModelConfig, index: int, plan: Plan,
          statistics: DenseStatistics | None) -> None:
    """Gives a new block of the compacted shape its parameters."""
    parameters = dict(compacted.named_parameters())
    if not parameters:                                 # the block is removed
        return
    own = {name: parameter.detach() for name, parameter in block.named_parameters()}
    _adopt(parameters, slice_block(put_in(own, config, index, plan, statistics), config, index, plan))
    if index in plan.layers or plan.d_model:
        refit(block, compacted, index, plan, statistics)


def _adopt(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Makes the tensors the values of the parameters, dtypes and all; names and shapes must be exactly theirs."""
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    sliced = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != sliced:
        wrong = sorted(name for name in shapes | sliced if shapes.get(name) != sliced.get(name))
        raise LayoutError("the slicer and the layout disagree: " + "; ".join(
            f"{name} is sliced to {sliced.get(name)}, the layout says {shapes.get(name)}" for name in wrong))
    for name, parameter in parameters.items():
        parameter.data = tensors[name]


# ---- which rows of which tensor

def slice_block(tensors: Mapping[str, Tensor], config: ModelConfig, index: int, plan: Plan) -> dict[str, Tensor]:
    """Every tensor of block `index` with the rows and columns that the plan leaves; always copies."""
    cut = plan.layers.get(index, LayerPlan())
    layout, sections = config.layers[index], _sections(config)
    after = compacted_layout(layout, cut, plan.norm_repair)
    return slice_tensors(tensors, sections, axis_sizes(sections, config, layout),
                         kept_axes(sections, config, layout, after, plan, cut),
                         before=_missing(sections, layout), after=_missing(sections, after))


def slice_tensors(tensors: Mapping[str, Tensor], sections: Sections, sizes: Mapping[Axis, int],
                  kept: Mapping[Axis, Choice], before: frozenset[Section] = frozenset(),
                  after: frozenset[Section] = frozenset()) -> dict[str, Tensor]:
    """The tensors with the rows that stay on each axis; `before` and `after`: sections that are not there."""
    unknown = sorted(set(tensors) - set(sections.tensors))
    if unknown:
        raise LayoutError(f"the block has the tensors {unknown}; the section table describes "
                          f"{sorted(sections.tensors)}")
    sliced = {}
    for name, tensor in tensors.items():
        for dim, names in enumerate(sections.tensors[name]):
            if after.issuperset(names):                # the tensor served only what is gone
                break
            tensor = _take(tensor, dim, dimension_rows(sections, [s for s in names if s not in before], sizes, kept,
                                                       after))
        else:
            sliced[name] = tensor
    return sliced


def dimension_rows(sections: Sections, names: Sequence[Section], sizes: Mapping[Axis, int],
                   kept: Mapping[Axis, Choice], after: frozenset[Section]) -> list[Row]:
    """What stays of one dimension: its sections one after the other, of each the rows that stay."""
    rows: list[Row] = []
    start = 0
    for name in names:
        axes = sections.axes[name]
        if name not in after:
            rows += [tuple(start + source for source in row) for row in section_rows(axes, sizes, kept)]
        start += math.prod(sizes[axis] for axis in axes)
    return rows


def section_rows(axes: Sequence[Axis], sizes: Mapping[Axis, int], kept: Mapping[Axis, Choice]) -> list[Row]:
    """The kept rows of one section laid out over `axes`, outermost first, numbered within the section."""
    rows: list[tuple[tuple[int, int | None], ...]] = [((0, None),)]        # of each source: row, last index
    for axis in axes:
        choice, size = kept[axis], sizes[axis]
        if isinstance(choice, Mapping):
            rows = [tuple((source * size + i, i) for (source, _), i in zip(row, inner, strict=True))
                    for row in rows for inner in zip(*(choice[outer] for _, outer in row), strict=True)]
        else:
            rows = [tuple((source * size + i, i) for source, _ in row for i in inner)
                    for row in rows for inner in choice]
    return [tuple(source for source, _ in row) for row in rows]


def _take(tensor: Tensor, dim: int, rows: Sequence[Row]) -> Tensor:
    """The rows of one dimension; always a copy."""
    def index(sources: Sequence[int]) -> Tensor:
        return torch.tensor(sources, dtype=torch.long, device=tensor.device)
    taken = tensor.index_select(dim, index([row[0] if row else 0 for row in rows]))
    for position, row in enumerate(rows):
        if not row:
            taken.select(dim, position).zero_()
        elif len(row) > 1:
            mean = tensor.index_select(dim, index(row)).double().mean(dim)
            taken.select(dim, position).copy_(mean)
    return taken


# ---- what stays of each axis

def _sections(config: ModelConfig) -> Sections:
    """The table of a family; models with a D per channel have the section channel_gain where others have gain."""
    sections = _SECTIONS[config.family]
    if not config.d_has_hdim:
        return sections
    return replace(sections, tensors={
        name: tuple(tuple("channel_gain" if s == "gain" else s for s in dim) for dim in dims)
        for name, dims in sections.tensors.items()})


def _missing(sections: Sections, layout: LayerLayout) -> frozenset[Section]:
    """The sections that a layer of this layout does not have."""
    if not isinstance(layout, RemovedSSM):
        return frozenset()
    return sections.removed_with_ssm | (frozenset() if layout.gain else {"gain", "channel_gain"})


def _has_heads(sections: Sections) -> bool:
    return any("head" in axes for axes in sections.axes.values())


def axis_sizes(sections: Sections, config: ModelConfig, layout: LayerLayout) -> dict[Axis, int]:
    """The length of each axis before the cut; what a removed SSM no longer has is 0."""
    assert not isinstance(layout, RemovedBlock)
    units = {"channel": layout.d_inner}
    if not isinstance(layout, ScanLayout) and _has_heads(sections):
        units = {"head": layout.nheads, "channel": layout.headdim}
    return units | {"group": getattr(layout, "ngroups", 0), "state": getattr(layout, "dstate", 0),
                    "rank": getattr(layout, "dt_rank", 0), "padding": getattr(layout, "row_padding", 0),
                    "mlp": getattr(layout, "mlp_channels", 0), "model": config.d_model, "one": 1,
                    "tap": layout.conv_width}


def kept_axes(sections: Sections, config: ModelConfig, layout: LayerLayout, after: LayerLayout, plan: Plan,
              cut: LayerPlan) -> dict[Axis, Choice]:
    """What stays of each axis, in the numbering before the cut."""
    kept = Kept.of(layout, cut)
    axes: dict[Axis, Choice] = {
        "group": kept.groups, "state": {None: kept.states[0] if kept.states else (), **dict(enumerate(kept.states))},
        "rank": _rows(range(kept.ranks)), "padding": [()] * getattr(after, "row_padding", 0),
        "mlp": _rows(kept.mlp), "model": _rows(rest(config.d_model, plan.d_model)), "one": [(0,)],
        "tap": _rows(kept.taps)}
    if not _has_heads(sections):
        return axes | {"channel": _rows(kept.units)}
    return axes | {"head": _rows(kept.units), "channel": dict(enumerate(kept.head_channels))}


def _outside_axes(config: ModelConfig) -> dict[Axis, int]:
    return {"vocabulary": config.vocab_size, "model": config.d_model}


def _rows(units: Sequence[int]) -> list[Row]:
    return [(unit,) for unit in units]
