"""What a language model is made of: sizes shared by all layers and one layout per layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from shedder.layout import LayerLayout, LayoutError, layout_from_json, layout_to_json

FAMILIES = ("mamba1", "mamba2")


@dataclass(frozen=True)
class ModelConfig:
    """A Mamba language model whose layers may all have different shapes.

    layers[i] is the layout of block i; a removed block keeps its index, so that names of
    parameters, plans and layouts mean the same layer before and after pruning.
    """

    family: str                                         # one of FAMILIES
    d_model: int
    vocab_size: int                                     # rows of the embedding, padding included
    layers: tuple[LayerLayout, ...]
    norm_eps: float = 1e-5                              # of the norms before each block and at the end
    tie_embeddings: bool = True
    residual_in_fp32: bool = True
    conv_bias: bool = True
    proj_bias: bool = False
    d_has_hdim: bool = False                            # Mamba-2: D per channel instead of per head
    norm_before_gate: bool = False
    dt_limit: tuple[float, float] = (0.0, math.inf)

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise LayoutError(f"family is {self.family!r}; accepted: one of {FAMILIES}")
        allowed = {"mamba1": ("scan", "removed_ssm", "removed_block"),
                   "mamba2": ("ssd", "removed_ssm", "removed_block")}[self.family]
        for index, layout in enumerate(self.layers):
            if layout.kind not in allowed:
                raise LayoutError(f"layers[{index}] is a {layout.kind} layout; a {self.family} model accepts {allowed}")

    def with_layer(self, index: int, layout: LayerLayout) -> ModelConfig:
        """The same model with another layout at `index`."""
        return replace(self, layers=self.layers[:index] + (layout,) + self.layers[index + 1:])

    def to_json(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["layers"] = [layout_to_json(layout) for layout in self.layers]
        low, high = self.dt_limit
        values["dt_limit"] = [low, None if math.isinf(high) else high]   # JSON has no infinity
        return values

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelConfig:
        names = {field.name for field in fields(cls)}
        if set(data) != names:
            raise LayoutError(f"model config has fields {sorted(data)}; accepted: exactly {sorted(names)}")
        values = dict(data)
        layers = []
        for index, layer in enumerate(values["layers"]):
            try:
                layers.append(layout_from_json(layer))
            except LayoutError as error:
                raise LayoutError(f"layers[{index}]: {error}") from error
        values["layers"] = tuple(layers)
        low, high = values["dt_limit"]
        values["dt_limit"] = (low, math.inf if high is None else high)
        return cls(**values)
