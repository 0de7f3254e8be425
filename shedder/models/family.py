"""What a model family is to the rest of the project: its tables, and the checkpoints it can be read from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shedder.models.sections import Sections
from shedder.nn.config import ModelConfig


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the file, the key and what is accepted."""


@dataclass(frozen=True)
class Source:
    """One foreign format: how its config.json becomes a ModelConfig and its tensor names ours."""

    name: str                                           # "mamba_ssm" or "transformers"
    recognises: Callable[[Mapping[str, Any]], bool]     # by the contents of config.json
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    rename: Callable[[str], str]


@dataclass(frozen=True)
class Family:
    """An adapter: all that is particular to one model family."""

    name: str                                           # ModelConfig.family
    sections: Sections
    sources: tuple[Source, ...]


_ABSENT = object()
MAX_SIZE = 1 << 24                                      # of anything that a foreign config may ask for


def read(config: Mapping[str, Any], key: str, kinds: type | tuple[type, ...], default: Any = _ABSENT,
         where: str = "") -> Any:
    """config[key], checked; the default stands for the class default of the library that wrote the file."""
    value = config.get(key, default)
    if value is _ABSENT:
        raise CheckpointError(f"config.json: {where}{key} is missing")
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    is_stray_bool = isinstance(value, bool) and bool not in kinds
    if not isinstance(value, kinds) or is_stray_bool:
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise CheckpointError(f"config.json: {where}{key} is {value!r}; accepted: {names}")
    if isinstance(value, (int, float)) and not abs(value) <= MAX_SIZE:                # not a number, too
        raise CheckpointError(f"config.json: {where}{key} is {value!r}; accepted: up to {MAX_SIZE}")
    return value


def require(config: Mapping[str, Any], key: str, default: Any, accepted: tuple, where: str = "") -> None:
    """config[key] must be one of the accepted values: others name a model that is not built here."""
    value = config.get(key, default)
    if value not in accepted:
        raise CheckpointError(f"config.json: {where}{key} is {value!r}; accepted: {' or '.join(map(repr, accepted))}")
