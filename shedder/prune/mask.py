"""The untouched dense model, made to behave as if a plan had been applied: its activations are set to zero.

This is what a compacted model is compared with, so it shares no index arithmetic with the slicer: it knows
units only as positions in activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from shedder.nn import LanguageModel
from shedder.prune.plan import LayerPlan, Plan

Probe = Callable[[str, Tensor], Tensor]


@contextmanager
def masked(model: LanguageModel, plan: Plan) -> Iterator[LanguageModel]:
    """Within the context, `model` computes what compact(model, plan) computes (with norm repair "exact").

    A removed head or channel has x = 0 after the convolution and y = 0; a removed state has B = C = 0; a removed
    SSM has dt = 0, so that its state stays zero and y = D x; a removed block adds zero to the residual. The
    masks sit on top of probes that are already set.

    Raises:
        PlanError: the plan does not fit the model.
    """
    plan.validate(model.config)
    mixers = {index: mixer for index, mixer in enumerate(model.mixers) if mixer is not None and index in plan.layers}
    before = {index: mixer.probe for index, mixer in mixers.items()}
    try:
        for index, mixer in mixers.items():
            mixer.probe = _mask(plan.layers[index], plan.family, before[index])
        yield model
    finally:
        for index, mixer in mixers.items():
            mixer.probe = before[index]


def _mask(cut: LayerPlan, family: str, inner: Probe | None) -> Probe:
    def probe(name: str, value: Tensor) -> Tensor:
        if inner is not None:
            value = inner(name, value)
        if name == "out" and cut.block:
            return torch.zeros_like(value)
        if name == "dt" and cut.ssm:
            return torch.zeros_like(value)
        if name in ("x", "y") and (cut.heads or cut.channels):
            value = value.clone()
            if family == "mamba2":                     # (B, L, H, P)
                for head in cut.heads:
                    value[:, :, head] = 0
            else:                                      # (B, D, L)
                for channel in cut.channels:
                    value[:, channel] = 0
        if name in ("B", "C") and cut.states:
            value = value.clone()
            for group, states in enumerate(cut.states):
                for state in states:
                    if family == "mamba2":             # (B, L, G, N)
                        value[:, :, group, state] = 0
                    else:                              # (B, G, N, L)
                        value[:, group, state] = 0
        return value

    return probe
