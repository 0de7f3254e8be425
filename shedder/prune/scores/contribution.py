"""What a unit adds to the output of its block: activations through gate, norm and out_proj. One forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from shedder.layout import RemovedBlock, RemovedSSM, ScanLayout, SSDLayout
from shedder.nn import LanguageModel, Mixer
from shedder.nn.config import ModelConfig
from shedder.prune.calibration import Calibration
from shedder.prune.scores.observe import Sums, live_mixers, watch


def contribution(model: LanguageModel, calibration: Calibration) -> list[dict[str, Tensor]]:
    """Energies of what goes with a unit.

    A channel (of a head, or of Mamba-1) counts for the energy of gated y, relative to its norm segment, times the
    squared norm weight and the squared norm of its out_proj column; a head for the sum over its channels; an MLP
    channel as one without a norm. A state counts for E[B^2] E[C^2], in Mamba-1 times the energy that its decay lets
    it accumulate, sum over c of E[(dt x)^2] / (1 - exp(-2 E[dt] |A|)).
    """
    mixers = live_mixers(model)
    moments = {index: _Moments(model.config.family) for index in mixers}
    watch(model, calibration.inputs, {index: one.see for index, one in moments.items()})
    return [_of_layer(model.config, index, mixers[index], moments[index].sums) if index in mixers else {}
            for index in range(len(model.config.layers))]


class _Moments:
    """Sums over batch and time."""

    def __init__(self, family: str) -> None:
        self.sums = Sums()
        self.time_last = family == "mamba1"            # (B, ..., L) rather than (B, L, ...)
        self._dt: Tensor | None = None

    def see(self, name: str, value: Tensor) -> None:
        if name in ("gated", "mlp"):
            self.sums.add(name, value.double().square().sum((0, 1)))
        elif name in ("B", "C"):
            self.sums.add(name, self._over_time(value.double().square()))
        elif name in ("x", "dt") and self.time_last:
            self._energy(name, value.double())

    def _energy(self, name: str, value: Tensor) -> None:
        """dt and x of Mamba-1 arrive one after the other, in either order."""
        if name == "dt":
            self.sums.add("dt", self._over_time(value))
            self.sums.add("count", torch.tensor(value.shape[0] * value.shape[-1], device=value.device))
        if self._dt is None:
            self._dt = value
        else:
            self.sums.add("(dt x)^2", self._over_time((self._dt * value).square()))
            self._dt = None

    def _over_time(self, value: Tensor) -> Tensor:
        return value.sum((0, -1) if self.time_last else (0, 1))


def _of_layer(config: ModelConfig, index: int, mixer: Mixer, sums: Sums) -> dict[str, Tensor]:
    layout = config.layers[index]
    assert not isinstance(layout, RemovedBlock)
    energy = sums["gated"]
    if isinstance(layout, (SSDLayout, RemovedSSM)) and layout.norm_segments:
        parts = energy.split([segment.channels for segment in layout.norm_segments])
        energy = torch.cat([part / part.mean().clamp(min=1e-30) for part in parts])
        energy = energy * mixer.norm.weight.double().square()                 # type: ignore[union-attr, operator]
    columns = mixer.out_proj.weight.double().square().sum(0)
    channels = energy * columns[-layout.d_inner:]
    if isinstance(layout, ScanLayout) or config.family == "mamba1":
        scores = {"channel": channels}
    else:
        of_heads = channels.unflatten(0, (layout.nheads, layout.headdim))
        scores = {"head": of_heads.sum(1), "head_channel": of_heads}
        if layout.mlp_channels:
            scores["mlp"] = sums["mlp"] * columns[:layout.mlp_channels]
    if isinstance(layout, RemovedSSM):
        return scores
    states = sums["B"] * sums["C"]                                            # (G, N)
    if isinstance(layout, ScanLayout):
        decay = torch.exp(mixer.A_log.double())                               # type: ignore[operator, arg-type]
        mean_dt = sums["dt"] / sums["count"]
        reach = sums["(dt x)^2"][:, None] / -torch.expm1(-2 * mean_dt[:, None] * decay)       # (D, N)
        groups = torch.tensor(layout.channel_to_group or (0,) * layout.d_inner, device=reach.device)
        states = (states * torch.zeros_like(states).index_add(0, groups, reach)).sum(0)
    return {**scores, "state": states}
