"""What one step of a search removes: a cut of a layer, or channels of the residual stream that all layers share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shedder.prune.layer_plan import LayerPlan, indices, runs

STREAM = -1                                             # in place of a layer's number
NOTHING = LayerPlan()


@dataclass(frozen=True)
class Removal:
    """cut is of layer `layer`; where that is STREAM, d_model lists channels of the residual stream instead."""

    layer: int
    cut: LayerPlan = NOTHING
    d_model: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        if self.layer == STREAM:
            return {"layer": None, "removed": {"d_model": list(self.d_model)}}
        return {"layer": self.layer, "removed": self.cut.to_json()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Removal:
        """From a step of a search's trajectory, which says more besides."""
        if record["layer"] is None:
            return cls(STREAM, d_model=indices("d_model", record["removed"]["d_model"]))
        return cls(record["layer"], LayerPlan.from_json(record["removed"]))

    def __str__(self) -> str:
        return f"channels {runs(self.d_model)} of d_model" if self.layer == STREAM else str(self.cut)


def together(removals: Iterable[Removal]) -> tuple[dict[int, LayerPlan], tuple[int, ...]]:
    """The cuts of the layers, and the channels of the residual stream, that go with all of them."""
    cuts: dict[int, LayerPlan] = {}
    d_model: set[int] = set()
    for removal in removals:
        if removal.layer == STREAM:
            d_model.update(removal.d_model)
        else:
            cuts[removal.layer] = cuts.get(removal.layer, NOTHING).merged(removal.cut)
    return cuts, tuple(sorted(d_model))
