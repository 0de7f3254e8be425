"""The tensors of weight files, known by name, shape and type before any of them is read.

safetensors, one file or shards with an index, and torch.save files of which only tensors and plain
containers are taken (weights_only: no code runs).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shedder.models.family import CheckpointError

WEIGHTS, PICKLED_WEIGHTS, INDEX_SUFFIX = "model.safetensors", "pytorch_model.bin", ".index.json"
MAX_JSON_BYTES = 1 << 26
_TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Declared:
    """What a file says of a tensor. A type that no model of ours has is given by its name."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str


class WeightFiles:
    """The tensors of several files, none of them twice; a context manager that closes the files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.declared: dict[str, Declared] = {}
        self._sources: dict[str, Any] = {}              # an open safetensors file, or a dict of tensors
        self._stack = ExitStack()
        try:
            for path in paths:
                self._open(path)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stack.close()

    def read(self, name: str) -> Tensor:
        source, file = self._sources[name], self.declared[name].file
        if isinstance(source, dict):
            return source.pop(name)                     # freed once it has been copied
        try:
            return source.get_tensor(name)
        except (SafetensorError, KeyError, AttributeError, OSError) as error:
            raise CheckpointError(f"{file}: {name} cannot be read ({error})") from error

    def _open(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if path.suffix == ".safetensors":
            try:
                source = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                slices = {name: source.get_slice(name) for name in source.keys()}    # noqa: SIM118  (not a dict)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: not a complete safetensors file ({error})") from error
            for name, one in slices.items():
                kind = one.get_dtype()
                self._declare(name, Declared(path.name, tuple(one.get_shape()), _TYPES.get(kind, kind)), source)
            return
        tensors = _unpickled(path)
        for name, tensor in tensors.items():
            if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
                raise CheckpointError(f"{path.name}: {name} is {tuple(tensor.shape)}, the file holds "
                                      f"{tensor.untyped_storage().nbytes()} bytes for it")
            dtype = tensor.dtype if tensor.dtype in _TYPES.values() else str(tensor.dtype)
            self._declare(name, Declared(path.name, tuple(tensor.shape), dtype), tensors)

    def _declare(self, name: str, declared: Declared, source: Any) -> None:
        if name in self.declared:
            raise CheckpointError(f"{declared.file}: {name} is in {self.declared[name].file} too")
        self.declared[name], self._sources[name] = declared, source


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                          # a damaged pickle raises whatever its bytes happen to mean
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: not a file of tensors ({reason})") from error
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"{path}: holds a {type(tensors).__name__}; accepted: a dict of tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise CheckpointError(f"{path.name}: {name} is a {type(tensor).__name__}; accepted: a dense tensor")
    return dict(tensors)


def open_weights(folder: Path) -> WeightFiles:
    """The weights of a mamba_ssm or transformers folder, whichever of the usual files it has."""
    for single in (WEIGHTS, PICKLED_WEIGHTS):
        if (folder / single).is_file():
            return WeightFiles([folder / single])
        index = folder / f"{single}{INDEX_SUFFIX}"
        if index.is_file():
            return _shards(folder, index)
    raise CheckpointError(f"{folder}: no weights; accepted: {WEIGHTS}, {PICKLED_WEIGHTS}, or either with "
                          f"{INDEX_SUFFIX}")


def _shards(folder: Path, index: Path) -> WeightFiles:
    """The files that an index names; they must hold the tensors that it says, and no others."""
    said = read_json(index).get("weight_map")
    if not isinstance(said, dict) or not said or not all(isinstance(name, str) for name in said.values()):
        raise CheckpointError(f"{index}: weight_map is not an object of tensor name to file name")
    names = sorted(set(said.values()))
    for name in names:
        if not is_plain_name(name) or not (folder / name).is_file():
            raise CheckpointError(f"{index}: weight_map names {name!r}, which is not a file in the folder")
    weights = WeightFiles([folder / name for name in names])
    found = {name: declared.file for name, declared in weights.declared.items()}
    for name in sorted(said.keys() | found.keys()):
        if said.get(name) != found.get(name):
            raise CheckpointError(f"{index}: weight_map has {name} in {said.get(name) or 'no file'}, "
                                  f"it is in {found.get(name) or 'none'}")
    return weights


def is_plain_name(name: str) -> bool:
    """A name of a file in this very folder: no separators, no dots that climb, nothing hidden or unprintable."""
    return name.isprintable() and name.strip() == name != "" and name[0] != "." and not set(name) & set("/\\:")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; repeated keys are refused."""
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes; accepted: up to {MAX_JSON_BYTES}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a {type(data).__name__}; accepted: an object")
    return data


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} appears twice")
    return values
