"""Activations of the mixers on calibration tokens, as the probes of shedder.nn hand them out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from shedder.nn import LanguageModel, Mixer
from shedder.nn.mixer import Probe

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
def watch(model: LanguageModel, inputs: Iterable[Tensor], watchers: Mapping[int, Watcher]) -> None:
    """Runs the model over the inputs; watchers[i](name, value) sees what passes the probe of layer i."""

    def probe(watcher: Watcher) -> Probe:
        def see(name: str, value: Tensor) -> Tensor:
            watcher(name, value)
            return value
        return see

    with probes(model, {index: probe(watcher) for index, watcher in watchers.items()}):
        for tokens in inputs:
            model(tokens, last_only=True)


class Sums:
    """Sums by name, in float64."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        self.values[name] = self.values[name] + value.double() if name in self.values else value.double()

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]


def live_mixers(model: LanguageModel) -> dict[int, Mixer]:
    return {index: mixer for index, mixer in enumerate(model.mixers) if mixer is not None}
