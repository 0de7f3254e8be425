"""Activations of the mixers on calibration tokens, as the probes of shedder.nn hand them out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from shedder.nn import LanguageModel, Mixer
from shedder.nn.block import Block
from shedder.nn.mixer import Probe
from shedder.prune.removal import STREAM

Watcher = Callable[[str, Tensor], None]


@contextmanager
def probes(model: LanguageModel, wanted: Mapping[int, Probe]) -> Iterator[None]:
    """Sets the probes of some layers, each after the one that is already there, and takes them away again."""
    mixers = {index: mixer for index, mixer in enumerate(model.mixers) if mixer is not None and index in wanted}
    before = {index: mixer.probe for index, mixer in mixers.items()}
    try:
        for index, mixer in mixers.items():
            mixer.probe = _after(before[index], wanted[index])
        yield
    finally:
        for index, mixer in mixers.items():
            mixer.probe = before[index]


def _after(first: Probe | None, then: Probe) -> Probe:
    return then if first is None else lambda name, value: then(name, first(name, value))


@torch.no_grad()
def watch(model: LanguageModel, inputs: Iterable[Tensor], watchers: Mapping[int, Watcher], last_only: bool = True
          ) -> None:
    """Runs the model over the inputs; watchers[i](name, value) sees what passes the probe of layer i.

    last_only: the last norm and the head see only the last token.
    """

    def probe(watcher: Watcher) -> Probe:
        def see(name: str, value: Tensor) -> Tensor:
            watcher(name, value)
            return value
        return see

    with probes(model, {index: probe(watcher) for index, watcher in watchers.items()}):
        for tokens in inputs:
            model(tokens, last_only=last_only)


@contextmanager
def reading_norms(model: LanguageModel) -> Iterator[Sums]:
    """Squares of what the norms before the blocks put out, summed over tokens, by layer; STREAM: of the last norm."""
    sums = Sums()
    norms = {index: cast(Block, model.layers[index]).norm for index in live_mixers(model)}

    def hook(index: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, inputs, hidden: sums.add(index, hidden.double().square().sum((0, 1)))
    handles = [norm.register_forward_hook(hook(index))
               for index, norm in (norms | {STREAM: model.backbone.norm_f}).items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


class Sums:
    """Sums by name, in float64."""

    def __init__(self) -> None:
        self.values: dict[str | int, Tensor] = {}

    def add(self, name: str | int, value: Tensor) -> None:
        self.values[name] = self.values[name] + value.double() if name in self.values else value.double()

    def __getitem__(self, name: str | int) -> Tensor:
        return self.values[name]


def live_mixers(model: LanguageModel) -> dict[int, Mixer]:
    return {index: mixer for index, mixer in enumerate(model.mixers) if mixer is not None}
