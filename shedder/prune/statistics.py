"""What repairs need to know of the dense model: moments of its activations on calibration tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shedder.layout import RemovedSSM
from shedder.nn import LanguageModel, Mixer
from shedder.nn.block import Block
from shedder.nn.mixer import Probe
from shedder.prune.calibration import Calibration


@dataclass(frozen=True)
class LayerStatistics:
    """Means over all tokens, in float64.

    stream (d_model,): squares of the residual stream before the block's norm. gated (d_inner,): squares of what
    the gated norm reads. gain, like D: the factor of x that comes nearest to y. x_moment (D, D) of Mamba-1: products
    of x behind the convolution. inputs: the residual stream itself, per batch.
    """

    stream: Tensor
    gated: Tensor | None = None
    gain: Tensor | None = None
    x_moment: Tensor | None = None
    inputs: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class DenseStatistics:
    """Of every layer (None where the block is removed), and the squares that the last norm reads."""

    layers: tuple[LayerStatistics | None, ...]
    stream: Tensor


@torch.no_grad()
def dense_statistics(model: LanguageModel, calibration: Calibration, repairs: Sequence[str] = ()) -> DenseStatistics:
    """One pass over the calibration tokens. What is large is kept only for the repairs that take it.

    "x_proj" takes x_moment, "dt_bias" and "out_proj" take inputs: d_model numbers for every token and layer.
    """
    mixers = {index: mixer for index, mixer in enumerate(model.mixers) if mixer is not None}
    watches = {index: _Watch(mixer, model.config.family, repairs) for index, mixer in mixers.items()}
    last = _Mean()
    before = {index: mixer.probe for index, mixer in mixers.items()}
    hooks = [model.backbone.norm_f.register_forward_pre_hook(lambda _, args: last.add(_squares(args[0])))]
    try:
        for index, mixer in mixers.items():
            mixer.probe = watches[index].probe(before[index])
            block = model.layers[index]
            assert isinstance(block, Block)
            hooks.append(block.norm.register_forward_pre_hook(watches[index].residual))
        for tokens in calibration.inputs:
            model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
        for index, mixer in mixers.items():
            mixer.probe = before[index]
    return DenseStatistics(tuple(watches[index].result() if index in watches else None
                                 for index in range(len(model.config.layers))), last.value)


def _squares(value: Tensor) -> Tensor:
    return value.double().square().flatten(0, -2)


@dataclass
class _Mean:
    """The mean over rows that arrive in batches."""

    total: Tensor | None = None
    rows: int = 0

    def add(self, values: Tensor, rows: int | None = None) -> None:
        """values: (rows, ...), or with `rows` their sum."""
        total = values.sum(0) if rows is None else values
        self.total = total if self.total is None else self.total + total
        self.rows += len(values) if rows is None else rows

    @property
    def value(self) -> Tensor:
        assert self.total is not None
        return self.total / self.rows


@dataclass
class _Watch:
    """Collects the moments of one layer."""

    mixer: Mixer
    family: str
    repairs: Sequence[str]
    means: dict[str, _Mean] = field(default_factory=dict)
    inputs: list[Tensor] = field(default_factory=list)
    x: Tensor | None = None

    def residual(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._add("stream", _squares(args[0]))
        if {"dt_bias", "out_proj"} & set(self.repairs):
            self.inputs.append(args[0].clone())

    def probe(self, inner: Probe | None) -> Probe:
        def see(name: str, value: Tensor) -> Tensor:
            value = value if inner is None else inner(name, value)
            if name == "gated":
                self._add("gated", _squares(value))
            elif name in ("x", "y"):
                rows = self._rows(value)
                if name == "x":
                    self.x = rows
                    if "x_proj" in self.repairs and self._feeds_x_proj():
                        self.means.setdefault("x_moment", _Mean()).add(rows.mT @ rows, len(rows))
                else:
                    assert self.x is not None
                    self._add("xx", self.x * self.x)
                    self._add("xy", self.x * rows)
            return value
        return see

    def _rows(self, value: Tensor) -> Tensor:
        """(tokens, d_inner)."""
        value = value.double()
        return (value.transpose(1, 2) if self.family == "mamba1" else value.flatten(2)).flatten(0, 1)

    def _feeds_x_proj(self) -> bool:
        return self.family == "mamba1" and not isinstance(self.mixer.layout, RemovedSSM)

    def _add(self, name: str, values: Tensor) -> None:
        self.means.setdefault(name, _Mean()).add(values)

    def result(self) -> LayerStatistics:
        means = {name: mean.value for name, mean in self.means.items()}
        like = self.mixer.D
        gain = None
        if like is not None:
            xy, xx = (means[name].view(like.numel(), -1).sum(1) for name in ("xy", "xx"))
            gain = xy / xx.clamp(min=torch.finfo(xx.dtype).tiny)
        return LayerStatistics(means["stream"], means["gated"], gain, means.get("x_moment"), tuple(self.inputs))
