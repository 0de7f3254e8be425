"""What a unit adds to the output of its block: activations through gate, norm and out_proj. One forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from shedder.layout import RemovedBlock, RemovedSSM, ScanLayout, SSDLayout
from shedder.nn import LanguageModel, Mixer
from shedder.nn.config import ModelConfig
from shedder.prune.calibration import Calibration
from shedder.prune.removal import STREAM
from shedder.prune.scores.observe import Sums, live_mixers, reading_norms, watch
from shedder.prune.scores.table import Found
from shedder.prune.units import group_pairs

TINY = 1e-30


def contribution(model: LanguageModel, calibration: Calibration) -> Found:
    """Energies of what goes with a unit.

    A channel (of a head, or of Mamba-1) counts for the energy of gated y, relative to its norm segment, times the
    squared norm weight and the squared norm of its out_proj column; a head for the sum over its channels; an MLP
    channel as one without a norm. A state counts for E[B^2] E[C^2], in Mamba-1 times the energy that its decay lets
    it accumulate, sum over c of E[(dt x)^2] / (1 - exp(-2 E[dt] |A|)). Two groups count, state by state, for what their
    mean changes: E[(B_a - B_b)^2] E[C^2] and E[(C_a - C_b)^2] E[B^2]. A channel of d_model counts for its shares of the
    energies that in_proj of all blocks and the head read.
    """
    mixers = live_mixers(model)
    moments = {index: _Moments(model.config.family, len(group_pairs(model.config.layers[index])) > 0)
               for index in mixers}
    with reading_norms(model) as read:
        watch(model, calibration.inputs, {index: one.see for index, one in moments.items()}, last_only=False)
    found: Found = {index: _of_layer(model.config, index, mixers[index], moments[index].sums) if index in mixers else {}
                    for index in range(len(model.config.layers))}
    readers = {index: mixer.in_proj.weight for index, mixer in mixers.items()} | {STREAM: model.lm_head.weight}
    energies = [read[index] * weight.double().square().sum(0) for index, weight in readers.items()]
    shares = torch.stack([energy / energy.sum().clamp(min=TINY) for energy in energies])
    return found | {STREAM: {"d_model": shares.sum(0)}}


class _Moments:
    """Sums over batch and time."""

    def __init__(self, family: str, has_pairs: bool) -> None:
        self.sums = Sums()
        self.has_pairs = has_pairs
        self.time_last = family == "mamba1"            # (B, ..., L) rather than (B, L, ...)
        self._dt: Tensor | None = None

    def see(self, name: str, value: Tensor) -> None:
        if name in ("gated", "mlp"):
            self.sums.add(name, value.double().square().sum((0, 1)))
        elif name in ("B", "C"):
            self.sums.add(name, self._over_time(value.double().square()))
            if self.has_pairs:                         # products of groups, (G, G, N)
                product = "bgnl,bhnl->ghn" if self.time_last else "blgn,blhn->ghn"
                self.sums.add(name + name, torch.einsum(product, value.double(), value.double()))
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
        energy = torch.cat([part / part.mean().clamp(min=TINY) for part in parts])
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
    if pairs := group_pairs(layout):
        first, second = torch.tensor(pairs, device=states.device).unbind(1)
        own, apart = {}, {}                            # of each pair: the energies' sum, that of the difference
        for name in ("B", "C"):
            own[name] = sums[name][first] + sums[name][second]
            apart[name] = own[name] - 2 * sums[name + name][first, second]
        scores["merge"] = (apart["B"] * own["C"] + apart["C"] * own["B"]).sum(-1)
    if isinstance(layout, ScanLayout):
        decay = torch.exp(mixer.A_log.double())                               # type: ignore[operator, arg-type]
        mean_dt = sums["dt"] / sums["count"]
        reach = sums["(dt x)^2"][:, None] / -torch.expm1(-2 * mean_dt[:, None] * decay)       # (D, N)
        groups = torch.tensor(layout.channel_to_group or (0,) * layout.d_inner, device=reach.device)
        states = (states * torch.zeros_like(states).index_add(0, groups, reach)).sum(0)
    return {**scores, "state": states}
