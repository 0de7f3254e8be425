"""Sharing the candidates of a search among the processes of torchrun."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")


@contextmanager
def torchrun() -> Iterator[Workers]:
    """Joins the processes that torchrun started, and leaves them at the end; alone, where it started none.

    Each process of a host gets the CUDA device of its number. What they exchange are a few numbers, so gloo serves
    GPUs as well.
    """
    started = "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized()
    if started:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group("gloo")
    try:
        yield Workers()
    finally:
        if started:
            dist.destroy_process_group()


class Workers:
    """The processes of the default group, or this one alone."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.count = dist.get_world_size() if together else 1
        self._group = dist.new_group(backend="gloo") if self.count > 1 else None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def mine(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every count-th item: neighbours cost about the same."""
        return items[self.rank::self.count]

    def merged(self, keys: Sequence[Item], values: Mapping[Item, float]) -> dict[Item, float]:
        """The values of all processes, each of which has those of mine(keys)."""
        if self._group is None:
            return dict(values)
        numbers = torch.tensor([values.get(key, 0.0) for key in keys], dtype=torch.float64)
        dist.all_reduce(numbers, group=self._group)                           # a value and zeros: the sum is exact
        return dict(zip(keys, numbers.tolist(), strict=True))

    def from_first(self, value: Any) -> Any:
        """The first process's value, of JSON, in all."""
        if self._group is None:
            return value
        text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        size = torch.tensor([text.numel()])
        dist.broadcast(size, 0, group=self._group)
        text = text if self.is_first else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(text, 0, group=self._group)
        return json.loads(bytes(text.tolist()))
