"""Which heads, channels and states of a layer matter least, from activations on calibration tokens.

Cheap ranks inside one layer; what a removal really costs is measured by the search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from shedder.layout import RemovedBlock, RemovedSSM, ScanLayout, SSDLayout
from shedder.nn import LanguageModel, Mixer
from shedder.nn.config import ModelConfig


@dataclass
class Importance:
    """units: one value per head (Mamba-2) or channel (Mamba-1). states: (G, N), None without an SSM."""

    units: Tensor
    states: Tensor | None


@torch.no_grad()
def importance(model: LanguageModel, batches: Iterable[Tensor]) -> list[Importance | None]:
    """Per layer, None for removed blocks.

    A channel counts for what it adds to the block's output: the energy of gated y, relative to its norm
    segment, times the squared norm weight and the squared norm of its out_proj column; a head for the
    sum over its channels. A state counts for E[B^2] E[C^2], in Mamba-1 times the energy that
    its decay lets it accumulate, sum over c of E[(dt x)^2] / (1 - exp(-2 E[dt] |A|)).
    """
    mixers = {index: mixer for index, mixer in enumerate(model.mixers) if mixer is not None}
    moments = {index: _Moments(model.config.family) for index in mixers}
    before = {index: mixer.probe for index, mixer in mixers.items()}
    try:
        for index, mixer in mixers.items():
            mixer.probe = moments[index].watch(before[index])
        for tokens in batches:
            model(tokens, last_only=True)
    finally:
        for index, mixer in mixers.items():
            mixer.probe = before[index]
    return [_layer_importance(model.config, index, mixers[index], moments[index].sums) if index in mixers else None
            for index in range(len(model.config.layers))]


class _Moments:
    """Sums over batch and time of what importance needs, in float64."""

    def __init__(self, family: str) -> None:
        self.sums: dict[str, Tensor] = {}
        self.time_last = family == "mamba1"            # (B, ..., L) rather than (B, L, ...)
        self._dt: Tensor | None = None

    def watch(self, inner: Callable[[str, Tensor], Tensor] | None) -> Callable[[str, Tensor], Tensor]:
        def probe(name: str, value: Tensor) -> Tensor:
            value = value if inner is None else inner(name, value)
            if name == "gated":
                self._add("gated", value.double().square().sum((0, 1)))
            elif name in ("B", "C"):
                self._add(name, self._over_time(value.double().square()))
            elif name in ("x", "dt") and self.time_last:
                self._energy(name, value.double())
            return value
        return probe

    def _energy(self, name: str, value: Tensor) -> None:
        """dt and x of Mamba-1 arrive one after the other, in either order."""
        if name == "dt":
            self._add("dt", self._over_time(value))
            self._add("count", torch.tensor(value.shape[0] * value.shape[-1], device=value.device))
        if self._dt is None:
            self._dt = value
        else:
            self._add("(dt x)^2", self._over_time((self._dt * value).square()))
            self._dt = None

    def _over_time(self, value: Tensor) -> Tensor:
        return value.sum((0, -1) if self.time_last else (0, 1))

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value


def _layer_importance(config: ModelConfig, index: int, mixer: Mixer, sums: dict[str, Tensor]) -> Importance:
    layout = config.layers[index]
    assert not isinstance(layout, RemovedBlock)
    energy = sums["gated"]
    if isinstance(layout, (SSDLayout, RemovedSSM)) and layout.norm_segments:
        parts = energy.split([segment.channels for segment in layout.norm_segments])
        energy = torch.cat([part / part.mean().clamp(min=1e-30) for part in parts])
        energy = energy * mixer.norm.weight.double().square()                 # type: ignore[union-attr, operator]
    units = energy * mixer.out_proj.weight.double().square().sum(0)           # type: ignore[union-attr, operator]
    if not isinstance(layout, ScanLayout):
        units = units.unflatten(0, (layout.nheads, layout.headdim)).sum(1)
    if isinstance(layout, RemovedSSM):
        return Importance(units.cpu(), None)
    states = sums["B"] * sums["C"]                                            # (G, N)
    if isinstance(layout, ScanLayout):
        decay = torch.exp(mixer.A_log.double())                               # type: ignore[arg-type]
        mean_dt = sums["dt"] / sums["count"]
        reach = sums["(dt x)^2"][:, None] / -torch.expm1(-2 * mean_dt[:, None] * decay)       # (D, N)
        groups = torch.tensor(layout.channel_to_group or (0,) * layout.d_inner, device=reach.device)
        states = states * torch.zeros_like(states).index_add(0, groups, reach)
    return Importance(units.cpu(), states.cpu())
