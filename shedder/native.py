"""The two compiled libraries: finds them, loads each on its own, and knows why one is not there."""

from __future__ import annotations

import ctypes
import functools
import json
import struct
from pathlib import Path
from typing import Any

import torch

LIBRARY_FOLDER = Path(__file__).resolve().parent / "_lib"


def cpu_status() -> str:
    """"loaded", or why the CPU library is not; the first call loads it. Never raises."""
    return _load("libshedder_cpu.so")


def cuda_status() -> str:
    """"loaded", or why the CUDA library is not; the first call loads it. Says nothing about a GPU. Never raises."""
    return _load("libshedder_cuda.so")


@functools.cache
def build_info() -> dict[str, Any]:
    """What the build wrote down of compilers, torch, architectures and options; {} before any build."""
    try:
        info = json.loads((LIBRARY_FOLDER / "build.json").read_text())
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def cpu_isa() -> str | None:
    """The instruction set level that the CPU kernels take on this machine (base, v3, v4, v4bf16); None: not loaded."""
    if cpu_status() != "loaded":
        return None
    function = getattr(ctypes.CDLL(str(LIBRARY_FOLDER / "libshedder_cpu.so")), "shedder_cpu_isa", None)
    if function is None:
        return None
    function.restype = ctypes.c_char_p
    return function().decode()


@functools.cache
def _load(name: str) -> str:
    path = LIBRARY_FOLDER / name
    if not path.exists():
        reason = build_info().get("no_cuda") if name == "libshedder_cuda.so" else None
        return f"{name} was not built" + (f": {reason}" if reason else f" ({path} does not exist)")
    try:
        if (damage := _damage(path)) is not None:
            return f"{path} {damage}; build it again"
        torch.ops.load_library(path)
    except Exception as error:          # an OSError of the loader, or whatever a library throws while it registers
        return f"{path} does not load: {error}"
    return "loaded"


def _damage(path: Path) -> str | None:
    """Why this is no whole ELF file. The loader would map a truncated one and die of SIGBUS, beyond any except."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return "is not a shared library"
    (table,) = struct.unpack_from("<Q", header, 0x28)
    entry_size, entries = struct.unpack_from("<HH", header, 0x3A)
    needed, found = table + entry_size * entries, path.stat().st_size      # the section table ends the file
    return f"is truncated: {found} bytes of {needed}" if found < needed else None
