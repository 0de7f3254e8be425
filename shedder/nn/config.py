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
    norm_scale: float = 1.0                             # of their weights; not in them, where bf16 would round it
    tie_embeddings: bool = True
    residual_in_fp32: bool = True
    conv_bias: bool = True
    proj_bias: bool = False
    d_has_hdim: bool = False                            # Mamba-2: D per channel instead of per head
    norm_before_gate: bool = False
    dt_limit: tuple[float, float] = (0.0, math.inf)

    def __post_init__(self) -> None:
        self._check_scalars()
        if self.family not in FAMILIES:
            raise LayoutError(f"family is {self.family!r}; accepted: one of {FAMILIES}")
        allowed = {"mamba1": ("scan", "removed_ssm", "removed_block"),
                   "mamba2": ("ssd", "removed_ssm", "removed_block")}[self.family]
        for index, layout in enumerate(self.layers):
            if layout.kind not in allowed:
                raise LayoutError(f"layers[{index}] is a {layout.kind} layout; a {self.family} model accepts {allowed}")

    def _check_scalars(self) -> None:
        for name in ("d_model", "vocab_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise LayoutError(f"{name} is {value!r}; accepted: an integer >= 1")
        for name in ("tie_embeddings", "residual_in_fp32", "conv_bias", "proj_bias", "d_has_hdim",
                     "norm_before_gate"):
            if not isinstance(getattr(self, name), bool):
                raise LayoutError(f"{name} is {getattr(self, name)!r}; accepted: true or false")
        if not isinstance(self.norm_eps, float) or not 0 <= self.norm_eps < 1:
            raise LayoutError(f"norm_eps is {self.norm_eps!r}; accepted: a float in [0, 1)")
        if not isinstance(self.norm_scale, float) or not 0 < self.norm_scale < math.inf:
            raise LayoutError(f"norm_scale is {self.norm_scale!r}; accepted: a float above 0")
        low, high = self.dt_limit
        if not (isinstance(low, (int, float)) and isinstance(high, (int, float)) and 0 <= low <= high):
            raise LayoutError(f"dt_limit is {self.dt_limit!r}; accepted: two numbers, 0 <= low <= high")

    def with_layer(self, index: int, layout: LayerLayout) -> ModelConfig:
        """The same model with another layout at `index`."""
        return replace(self, layers=(*self.layers[:index], layout, *self.layers[index + 1:]))

    def to_json(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["layers"] = [layout_to_json(layout) for layout in self.layers]
        low, high = self.dt_limit
        values["dt_limit"] = [low, None if math.isinf(high) else high]   # JSON has no infinity
        return values

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelConfig:
        names = {field.name for field in fields(cls)}
        values = {"norm_scale": 1.0} | data             # the first files do not have it
        if set(values) != names:
            raise LayoutError(f"model config has fields {sorted(data)}; accepted: exactly {sorted(names)}")
        if not isinstance(values["layers"], list):
            raise LayoutError(f"layers is {values['layers']!r}; accepted: a list of layouts")
        layers = []
        for index, layer in enumerate(values["layers"]):
            try:
                layers.append(layout_from_json(layer))
            except LayoutError as error:
                raise LayoutError(f"layers[{index}]: {error}") from error
        values["layers"] = tuple(layers)
        if not isinstance(values["dt_limit"], list) or len(values["dt_limit"]) != 2:
            raise LayoutError(f"dt_limit is {values['dt_limit']!r}; accepted: [low, high], high null for no limit")
        low, high = values["dt_limit"]
        values["dt_limit"] = (low, math.inf if high is None else high)
        return cls(**values)
