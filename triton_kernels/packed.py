"""Packed rows for the scans: from the names of sequences to numbers that kernels can compare."""

import torch
from torch import Tensor


def sequence_runs(seq_idx: Tensor) -> Tensor:
    """(B, L) int32: how many sequences began before or at each token, less one; ~run for a padding token.

    A sequence begins where the name differs from that of the last token that was not padding.
    Only device work, so it can be captured in a CUDA graph.
    """
    padding = seq_idx < 0
    position = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    last = torch.where(padding, -1, position).cummax(dim=1).values         # last real token up to t, or -1
    before = torch.nn.functional.pad(last, (1, 0), value=-1)[:, :-1]
    name_before = seq_idx.gather(1, before.clamp(min=0))
    starts = ~padding & (before >= 0) & (seq_idx != name_before)
    runs = starts.cumsum(dim=1, dtype=torch.int32)
    return torch.where(padding, ~runs, runs)
