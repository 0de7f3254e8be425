"""Calibration tokens: windows of a text, drawn by a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shedder.evaluate import windows
from shedder.nn import LanguageModel
from shedder.text import Tokenizer


@dataclass(frozen=True)
class Calibration:
    """rows (S, L+1) of tokens, run `batch` at a time; seed for whatever is drawn."""

    rows: Tensor
    batch: int = 8
    seed: int = 0

    @property
    def inputs(self) -> list[Tensor]:
        return [part[:, :-1] for part in self.rows.split(self.batch)]

    @property
    def targets(self) -> list[Tensor]:
        return [part[:, 1:] for part in self.rows.split(self.batch)]


def calibration_rows(model: LanguageModel, text: str | Tensor | Sequence[int], sequences: int, length: int,
                     seed: int, tokenizer: Tokenizer | None = None) -> Tensor:
    """(S, L+1) tokens on the model's device: windows of the text, drawn without replacement and left in order.

    Raises:
        ValueError: the text has no window, or tokens that the model does not know.
    """
    if isinstance(text, str):
        text = (tokenizer or model.tokenizer).encode(text)
    tokens = torch.as_tensor(text).long()
    if tokens.dim() not in (1, 2):
        raise ValueError(f"text has shape {tuple(tokens.shape)}; accepted: tokens (T,) or rows of tokens (S, L+1)")
    rows = windows(tokens, min(length, max(tokens.numel() - 1, 1))) if tokens.dim() == 1 else tokens
    if rows.shape[0] < 1 or rows.shape[1] < 2:
        raise ValueError(f"text has rows of shape {tuple(rows.shape)}; accepted: at least one row of 2 tokens")
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= model.config.vocab_size:
        raise ValueError(f"text has tokens in [{low}, {high}]; accepted: [0, {model.config.vocab_size - 1}]")
    if rows.shape[0] > sequences:
        order = torch.randperm(rows.shape[0], generator=torch.Generator().manual_seed(seed))
        rows = rows[order[:sequences].sort().values.to(rows.device)]
    return rows.to(next(model.parameters()).device)


def calibration_of(model: LanguageModel, text: str | Tensor | Sequence[int], provenance: Mapping[str, Any]
                   ) -> Calibration:
    """The tokens that the search of a plan's provenance drew from this text; of another plan, as search() does."""
    settings = provenance.get("settings", {})
    sequences, columns = settings.get("rows", (16, 513))
    seed, batch = settings.get("seed", 0), settings.get("batch", 8)
    return Calibration(calibration_rows(model, text, sequences, columns - 1, seed), batch, seed)


def digest(tensors: Sequence[Tensor]) -> str:
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        hashed.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]


def fingerprint(model: LanguageModel) -> str:
    """Of the config and the first 4096 numbers of each tensor: another model differs somewhere there."""
    config = hashlib.sha256(json.dumps(model.config.to_json(), sort_keys=True).encode()).hexdigest()[:16]
    return config + digest([p.flatten()[:4096] for p in model.parameters()])
