"""What a search can remove next: blocks, SSMs, and bundles of units of one layer or of the residual stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from shedder.layout import LayerLayout, RemovedBlock
from shedder.nn.config import ModelConfig
from shedder.prune.budget import Budget
from shedder.prune.plan import LayerPlan, compacted_layout
from shedder.prune.removal import STREAM, Removal
from shedder.prune.scores import Scores
from shedder.prune.trials import Key, Trial
from shedder.prune.units import Axis, Rows

Bundle = float | int | None


@dataclass(frozen=True)
class Candidate:
    key: Key
    units: tuple[int, ...]
    removal: Removal                                   # alone, in the numbering of the dense model
    total: Removal                                     # with what has gone from there before
    gain: float                                        # shares of the unmet measures that it removes

    @property
    def layer(self) -> int:
        return self.key[0]

    @property
    def axis(self) -> str:
        return self.key[1]

    @property
    def trial(self) -> Trial:
        return Trial(self.key, self.total)


@dataclass
class Pruned:
    """The shape of a model as pruned so far, without its weights."""

    dense: ModelConfig
    norm_repair: str
    config: ModelConfig = field(init=False)
    cuts: dict[int, LayerPlan] = field(default_factory=dict)
    d_model: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.config = self.dense

    def cut_of(self, layer: int) -> LayerPlan:
        return self.cuts.get(layer, LayerPlan())

    def layout_with(self, layer: int, cut: LayerPlan) -> LayerLayout:
        return compacted_layout(self.dense.layers[layer], cut, self.norm_repair)

    def total(self, removal: Removal) -> Removal:
        """The removal with what has gone from there already."""
        if removal.layer == STREAM:
            return Removal(STREAM, d_model=tuple(sorted({*self.d_model, *removal.d_model})))
        return Removal(removal.layer, self.cut_of(removal.layer).merged(removal.cut))

    def apply(self, removal: Removal) -> Removal:
        """Returns the total."""
        total = self.total(removal)
        if total.layer == STREAM:
            self.d_model = total.d_model
            self.config = replace(self.config, d_model=self.dense.d_model - len(self.d_model))
        else:
            self.cuts[total.layer] = total.cut
            self.config = self.config.with_layer(total.layer, self.layout_with(total.layer, total.cut))
        return total

    @property
    def blocks_left(self) -> int:
        return sum(not isinstance(layout, RemovedBlock) for layout in self.config.layers)


class Candidates:
    """What can go, by axis and bundle.

    bundles[axis]: a share of a layer's units, a number of them, or None: each unit is a candidate of its own. Of what
    all layers share, a layer's units are its number over that of the layers: bundles of all axes weigh alike. A bundle
    takes the units of the lowest score that are still there, from each row of units as many; one always stays.
    multiples[axis]: a bundle takes as many more as it needs for what stays of each row to be a multiple.
    """

    def __init__(self, axes: Sequence[Axis], bundles: Mapping[str, Bundle], scores: Scores | None,
                 multiples: Mapping[str, int]) -> None:
        self.axes, self.bundles, self.scores, self.multiples = axes, bundles, scores, multiples

    def of_model(self, pruned: Pruned, budget: Budget) -> list[Candidate]:
        """All that bring the model nearer to its budget."""
        unmet = budget.unmet(pruned.config)
        return [*self.of_stream(pruned, budget, unmet),
                *(candidate for layer in range(len(pruned.config.layers))
                  for candidate in self.of_layer(pruned, budget, unmet, layer))]

    def of_stream(self, pruned: Pruned, budget: Budget, unmet: list[str]) -> Iterator[Candidate]:
        for axis in self.axes:
            if axis.shared:
                rows = (tuple(range(pruned.dense.d_model)),)
                for unit, units in self._choices(axis, STREAM, rows, set(pruned.d_model), len(pruned.dense.layers)):
                    gain = budget.gain_of_stream(pruned.config, pruned.config.d_model - len(units), unmet)
                    if gain > 0:
                        removal = Removal(STREAM, d_model=units)
                        yield Candidate((STREAM, axis.name, unit), units, removal, pruned.total(removal), gain)

    def of_layer(self, pruned: Pruned, budget: Budget, unmet: list[str], layer: int) -> Iterator[Candidate]:
        dense, layout = pruned.dense.layers[layer], pruned.config.layers[layer]
        if isinstance(layout, RemovedBlock):
            return
        cut = pruned.cut_of(layer)
        for axis in self.axes:
            if not axis.rows(layout) or (axis.name == "block" and pruned.blocks_left == 1):
                continue
            for unit, units in self._choices(axis, layer, axis.rows(dense), axis.removed(dense, cut)):
                removal = Removal(layer, axis.cut(dense, units))
                total = pruned.total(removal)
                gain = budget.gain(pruned.config, layer, pruned.layout_with(layer, total.cut), unmet)
                if gain > 0:
                    yield Candidate((layer, axis.name, unit), units, removal, total, gain)

    def _choices(self, axis: Axis, layer: int, rows: Rows, gone: set[int], layers: int = 1
                 ) -> Iterator[tuple[int, tuple[int, ...]]]:
        if axis.whole:
            yield -1, rows[0]
            return
        bundle = self.bundles[axis.name]
        left = [here for row in rows if (here := [unit for unit in row if unit not in gone])]
        most = len(left[0]) - axis.keeps if left else 0
        if bundle is None and not axis.ordered:
            for number, units in enumerate(zip(*rows, strict=True)):
                if not gone & set(units) and most > 0:
                    yield number, units
            return
        share = 1 if bundle is None else bundle
        count = min(share if isinstance(share, int) else max(1, round(share * len(rows[0]) / layers)), most)
        if axis.name in self.multiples and count > 0:
            multiple = self.multiples[axis.name]
            stays = (len(left[0]) - count) // multiple * multiple
            count = len(left[0]) - (stays if stays >= axis.keeps else multiple)
        if count > 0:
            yield -1, tuple(sorted(unit for row in self._by_worth(axis, layer, left) for unit in row[:count]))

    def _by_worth(self, axis: Axis, layer: int, rows: list[list[int]]) -> list[list[int]]:
        """Each row, units of the lowest score first; of rows that are alike, places of the lowest sums first."""
        if axis.ordered:
            return rows
        assert self.scores is not None
        values = self.scores.of(layer, axis.name)
        if axis.alike:
            sums = [sum(values[unit] for unit in column) for column in zip(*rows, strict=True)]
            places = sorted(range(len(sums)), key=lambda place: (sums[place], place))
            return [[row[place] for place in places] for row in rows]
        return [sorted(row, key=lambda unit: (values[unit], unit)) for row in rows]
