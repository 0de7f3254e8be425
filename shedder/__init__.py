"""shedder: take a trained Mamba, shed part of it, and run what is left faster."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["Plan", "__version__", "compact", "load", "search"]

_HOMES = {"load": "shedder.checkpoint", "compact": "shedder.prune", "search": "shedder.prune",
          "Plan": "shedder.prune"}


def __getattr__(name: str) -> Any:
    # Lazy: `import shedder` for the version or the layouts should not cost an import of torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'shedder' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
