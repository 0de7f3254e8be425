"""Perplexity of a language model on tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from shedder.nn import LanguageModel


def windows(tokens: Tensor, length: int) -> Tensor:
    """Cut (T,) tokens into (n, length + 1) windows that overlap by one token, so that each token is predicted once.

    The rest that does not fill a window is left out.

    Raises:
        ValueError: there are not enough tokens for one window.
    """
    count = (tokens.numel() - 1) // length
    if count < 1:
        raise ValueError(f"tokens has {tokens.numel()} tokens; a window of length {length} needs at least {length + 1}")
    return tokens[: count * length + 1].unfold(0, length + 1, length)


def batches(rows: Tensor, batch: int) -> Iterator[Tensor]:
    """Consecutive slices of at most `batch` rows."""
    yield from rows.split(batch)


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean natural-log loss per token, in fp32; logits (B, L, V), targets (B, L)."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def perplexity(model: LanguageModel, tokens: Tensor, *, length: int = 1024, batch: int = 8) -> float:
    """exp of the mean loss per token over consecutive windows of `length` tokens, each starting from no state."""
    rows = windows(tokens, length).to(next(model.parameters()).device)
    total = 0.0
    for part in batches(rows, batch):
        total += negative_log_likelihood(model(part[:, :-1]), part[:, 1:]).item() * part.shape[0]
    return math.exp(total / rows.shape[0])
