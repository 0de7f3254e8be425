"""What may stay of a model, and how much nearer to that a cut brings it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from shedder.layout import LayerLayout
from shedder.nn.config import ModelConfig
from shedder.prune.size import flops, layer_flops, layer_parameters, layer_state_bytes, parameter_count, state_bytes


@dataclass(frozen=True)
class Measure:
    """A sum over layers and what surrounds them."""

    total: Callable[[ModelConfig], int]
    # Without alignment padding: a small cut that padding eats up still brings the next one nearer.
    of_layer: Callable[[ModelConfig, LayerLayout], int]


MEASURES = {
    "params": Measure(parameter_count, lambda config, layout: layer_parameters(config, layout, padding=False)),
    "state": Measure(state_bytes, lambda config, layout: layer_state_bytes(layout)),
    "flops": Measure(flops, lambda config, layout: layer_flops(config, layout, padding=False)),
}


class Budget:
    """Shares of a dense model: {"params": 0.7, "state": 0.5} is met when 70 % of the parameters and half of the
    bytes of decode state are left, or less.

    keeps_d_model: whether the embeddings stay whole, which some shares rule out.

    Raises:
        ValueError: an unknown measure, or a share that no plan can reach.
    """

    def __init__(self, shares: Mapping[str, float], config: ModelConfig, *, keeps_d_model: bool = True) -> None:
        if not isinstance(shares, Mapping) or not shares or not set(shares) <= set(MEASURES):
            raise ValueError(f"budget is {shares!r}; accepted: a dict with some of {sorted(MEASURES)}")
        for name, share in shares.items():
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
                raise ValueError(f"budget[{name!r}] is {share!r}; accepted: a share of the model in (0, 1]")
        self.shares = {name: float(shares[name]) for name in MEASURES if name in shares}
        self.dense = {name: measure.total(config) for name, measure in MEASURES.items()}
        for name, share in self.shares.items():
            layers = sum(MEASURES[name].of_layer(config, layout) for layout in config.layers)
            fixed = (self.dense[name] - layers) / max(self.dense[name], 1)
            if keeps_d_model and name != "state" and share < fixed:
                raise ValueError(f"budget[{name!r}] is {share}; accepted: more than {fixed:.4f}, the share of the "
                                 "embeddings alone")

    def unmet(self, config: ModelConfig) -> list[str]:
        return [name for name, share in self.shares.items() if MEASURES[name].total(config) > share * self.dense[name]]

    def reached(self, config: ModelConfig) -> dict[str, float]:
        """The shares that are left."""
        return {name: MEASURES[name].total(config) / max(self.dense[name], 1) for name in self.shares}

    def progress(self, config: ModelConfig) -> float:
        """From 0 to 1: of the measure that is furthest from its share."""
        done = [(1 - left) / (1 - self.shares[name]) if self.shares[name] < 1 else 1.0
                for name, left in self.reached(config).items()]
        return min(max(min(done), 0.0), 1.0)

    def gain(self, config: ModelConfig, layer: int, layout: LayerLayout, unmet: list[str]) -> float:
        """The shares of the unmet measures that go when a layer gets this layout, added up."""
        return sum((MEASURES[name].of_layer(config, config.layers[layer]) - MEASURES[name].of_layer(config, layout))
                   / max(self.dense[name], 1) for name in unmet)

    def gain_of_stream(self, config: ModelConfig, d_model: int, unmet: list[str]) -> float:
        """The same for a model whose residual stream gets this many channels."""
        smaller = replace(config, d_model=d_model)
        return sum((MEASURES[name].total(config) - MEASURES[name].total(smaller)) / max(self.dense[name], 1)
                   for name in unmet)


def figures(config: ModelConfig) -> dict[str, int]:
    """Every measure of a model."""
    return {name: measure.total(config) for name, measure in MEASURES.items()}
