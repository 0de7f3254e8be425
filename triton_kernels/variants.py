"""Variants of a Triton kernel, compiled side by side.

A model whose layers all differ asks for one variant of a kernel after another, and would wait for each. So the first
that is asked for brings the others with it, and the C code that launches them, which is the same for all: that takes
little longer than one of them.
"""

from collections.abc import Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton

_known: set[Hashable] = set()


def compile_side_by_side(kernel: Any, kind: Hashable, arguments: tuple, variants: Iterable[dict[str, Any]],
                         **options: Any) -> None:
    """Compile the variants of a kernel for such arguments, once for each kind of them."""
    if (kernel, kind) in _known:
        return
    _known.add((kernel, kind))
    with ThreadPoolExecutor() as threads, triton.AsyncCompileMode(threads):
        compiled = [kernel.warmup(*arguments, grid=(1,), **variant, **options) for variant in variants]
        if hasattr(compiled[0], "result"):                   # on its way: not in Triton's interpreter
            with torch.cuda.device(arguments[0].get_device()):
                compiled[0].result()[1, 1, 1]                # ready for this grid, not launched
