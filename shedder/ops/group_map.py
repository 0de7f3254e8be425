"""Maps from heads (or Mamba-1 channels) to groups of B and C, as int32 tensors that backends can read.

A tuple or list is checked once and its tensor kept for each device; a tensor on the CPU has
its values checked when they are first used; a tensor on a GPU is trusted, because reading it
would make the host wait.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from shedder.ops.checks import integers
from shedder.ops.tracing import is_traced

GroupMap = Tensor | Sequence[int] | None
_checked: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}     # id -> (tensor, groups, version at the check)


def as_group_map(name: str, given: GroupMap, rows: int, groups: int, device: torch.device, unit: str) -> Tensor:
    """(rows,) int32 on `device`, values in [0, groups); None gives each group an equal run of rows."""
    if isinstance(given, Tensor):
        if given.device != device:
            raise ValueError(f"{name} is on {given.device} but x is on {device}; accepted: a tuple, "
                             "or a tensor on the device of x")
        return integers(name, given, (rows,), f"({unit},)")
    if given is None:
        if groups < 1 or rows % groups:
            raise ValueError(f"{name} is None, but {rows} {unit} cannot be shared equally by the {groups} groups of B; "
                             f"accepted: a group for each of the {unit}")
        return (_equal_runs.__wrapped__ if is_traced() else _equal_runs)(rows, groups, device)
    entries = tuple(given)
    if len(entries) != rows:
        raise ValueError(f"{name} has {len(entries)} entries; accepted: one for each of the {rows} {unit}")
    return (_from_entries.__wrapped__ if is_traced() else _from_entries)(name, entries, groups, device)


def check_group_map(name: str, group_map: Tensor | None, groups: int) -> None:
    """Raise if a map on the CPU names a group that does not exist. Each tensor is read once."""
    if group_map is None or group_map.device.type != "cpu" or group_map.numel() == 0:
        return
    version = -1 if group_map.is_inference() else group_map._version     # inference tensors count no changes
    key = id(group_map)
    seen = _checked.get(key)
    if seen is not None and version >= 0 and seen[0]() is group_map and seen[1:] == (groups, version):
        return
    low, high = (int(value) for value in group_map.aminmax())
    if low < 0 or high >= groups:
        raise ValueError(_out_of_range(name, low if low < 0 else high, groups))
    _checked[key] = weakref.ref(group_map, lambda _: _checked.pop(key, None)), groups, version


def _out_of_range(name: str, value: int, groups: int) -> str:
    return f"{name} has value {value} but B has {groups} groups; accepted: values in [0, {groups})"


def _check_entries(name: str, entries: tuple[int, ...], groups: int) -> None:
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, int):
            raise ValueError(f"{name} has entry {entry!r}; accepted: integers in [0, {groups})")
        if not 0 <= entry < groups:
            raise ValueError(_out_of_range(name, entry, groups))


# Kept tensors are made outside inference mode, or no later training step could save them.

@lru_cache(maxsize=1024)
def _from_entries(name: str, entries: tuple[int, ...], groups: int, device: torch.device) -> Tensor:
    _check_entries(name, entries, groups)
    with torch.inference_mode(False):
        return torch.tensor(entries, dtype=torch.int32, device=device)


@lru_cache(maxsize=1024)
def _equal_runs(rows: int, groups: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([row * groups // rows for row in range(rows)], dtype=torch.int32, device=device)
