"""Scores of states from the recurrence h <- exp(dt A) h + dt B x, y = C h."""

from __future__ import annotations

import torch
from torch import Tensor

from shedder.layout import ScanLayout, SSDLayout
from shedder.nn import LanguageModel, Mixer
from shedder.prune.calibration import Calibration
from shedder.prune.scores.observe import Sums, live_mixers, watch
from shedder.prune.scores.table import Found, layer_adaptive


def controllability_observability(model: LanguageModel, calibration: Calibration) -> Found:
    """E[h_n^2] E[C_n^2], the energy that inputs bring into a state times how strongly it is read (GHOST, 2026).

    h is walked step by step over the calibration tokens; energies add up over the channels that have the state.
    """
    return _from_sums(model, calibration, walk=True, score=lambda sums, mixer: sums["h^2"] * sums["C^2"])


def delta_activity(model: LanguageModel, calibration: Calibration) -> Found:
    """E[dt |B_n|] over the channels that have the state: how much the step size lets into it (as PerfMamba, 2025)."""
    return _from_sums(model, calibration, walk=False, score=lambda sums, mixer: sums["dt |B|"])


def h_infinity(model: LanguageModel, calibration: Calibration) -> Found:
    """Squared H-infinity norms of the states' own systems, as shares of their layer (LAST, Gwak et al., 2024).

    With dt, B^2 and C^2 at their means a state is the system dt B / (1 - exp(dt A) / z) C; A < 0, so its gain is
    largest at z = 1. Squared norms add up over the channels that have the state. Shares are layer-adaptive: of what
    is left when all smaller states of the layer are gone, which makes layers comparable.
    """
    scores = _from_sums(model, calibration, walk=False, score=_squared_gain)
    return {index: {axis: torch.tensor([layer_adaptive(row) for row in values.view(-1, values.shape[-1]).tolist()],
                                       dtype=torch.float64).view(values.shape) for axis, values in layer.items()}
            for index, layer in scores.items()}


def _squared_gain(sums: Sums, mixer: Mixer) -> Tensor:
    A = torch.exp(mixer.A_log.double())                                       # type: ignore[operator, arg-type]
    dt = sums["dt"]
    if A.dim() == 2:                                                          # (D, N), one group or several
        gains = (dt[:, None] / -torch.expm1(-dt[:, None] * A)).square()
    else:                                                                     # (H,) for all states
        gains = (dt / -torch.expm1(-dt * A)).square()[:, None]
    groups = _group_of_each(mixer).to(gains.device)
    reach = torch.zeros(sums["B^2"].shape[0], gains.shape[1], dtype=gains.dtype, device=gains.device)
    return reach.index_add(0, groups, gains) * sums["B^2"] * sums["C^2"]


def _group_of_each(mixer: Mixer) -> Tensor:
    """The B/C group of each channel (Mamba-1) or head."""
    layout = mixer.layout
    if isinstance(layout, ScanLayout):
        return torch.tensor(layout.channel_to_group or (0,) * layout.d_inner)
    assert isinstance(layout, SSDLayout)
    return torch.tensor(layout.head_to_group)


def _from_sums(model: LanguageModel, calibration: Calibration, walk: bool, score) -> Found:
    mixers = {index: mixer for index, mixer in live_mixers(model).items()
              if isinstance(mixer.layout, (ScanLayout, SSDLayout))}
    watchers = {index: _Recurrence(mixer, walk) for index, mixer in mixers.items()}
    watch(model, calibration.inputs, {index: watcher.see for index, watcher in watchers.items()})
    scores: Found = {index: {} for index in range(len(model.config.layers))}
    for index, watcher in watchers.items():
        watcher.average()
        states = score(watcher.sums, mixers[index])                           # (G, N)
        scores[index] = {"state": states.sum(0) if isinstance(mixers[index].layout, ScanLayout) else states}
    return scores


class _Recurrence:
    """Means over tokens of what goes into, through and out of the states of one layer; of (G, N) where it has them."""

    def __init__(self, mixer: Mixer, walk: bool) -> None:
        self.mixer, self.walk = mixer, walk
        self.time_last = isinstance(mixer.layout, ScanLayout)
        self.sums = Sums()
        self.tokens = 0
        self._seen: dict[str, Tensor] = {}

    def see(self, name: str, value: Tensor) -> None:
        if name in ("x", "dt", "B", "C"):
            value = value.double()
            if self.time_last:                         # to (B, L, D, 1), (B, L, D), (B, L, G, N)
                value = value.movedim(-1, 1)
                value = value[..., None] if name == "x" else value
            self._seen[name] = value
        if len(self._seen) == 4:
            self._add(**self._seen)
            self._seen = {}

    def _add(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> None:
        """x (B, L, H, P), dt (B, L, H), B and C (B, L, G, N); in Mamba-1 a channel is a head."""
        self.tokens += x.shape[0] * x.shape[1]
        groups = _group_of_each(self.mixer).to(x.device)
        dt_of_group = torch.zeros(*dt.shape[:2], B.shape[2], dtype=dt.dtype, device=dt.device).index_add(2, groups, dt)
        self.sums.add("dt", dt.sum((0, 1)))
        self.sums.add("B^2", B.square().sum((0, 1)))
        self.sums.add("C^2", C.square().sum((0, 1)))
        self.sums.add("dt |B|", (dt_of_group[..., None] * B.abs()).sum((0, 1)))
        if self.walk:
            self.sums.add("h^2", self._walked(x, dt, B, groups))

    def _walked(self, x: Tensor, dt: Tensor, B: Tensor, groups: Tensor) -> Tensor:
        """Sum over sequences, time and the channels of a group of h^2: (G, N)."""
        A = -torch.exp(self.mixer.A_log.float())                              # type: ignore[operator, arg-type]
        A = A[:, None] if A.dim() == 1 else A                                 # (H, 1) or (D, N)
        x, dt, B = x.float(), dt.float(), B.float()
        h = torch.zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3], device=x.device)      # (B, H, P, N)
        energy = torch.zeros(x.shape[2], B.shape[3], device=x.device)
        for t in range(x.shape[1]):
            decay = torch.exp(dt[:, t, :, None] * A)                          # (B, H, 1 or N)
            step = dt[:, t, :, None] * B[:, t].index_select(1, groups)        # (B, H, N)
            h = h * decay[:, :, None] + x[:, t, :, :, None] * step[:, :, None]
            energy += h.square().sum((0, 2))
        return torch.zeros(B.shape[2], B.shape[3], dtype=torch.float64, device=x.device).index_add(
            0, groups, energy.double())

    def average(self) -> None:
        self.sums.values = {name: value / self.tokens for name, value in self.sums.values.items()}
