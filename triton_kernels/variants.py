"""Variants of a Triton kernel, compiled side by side.

A model whose layers all differ asks for one variant of a kernel after another, and would wait for each. So the first
that is asked for brings the others with it, which takes little longer than one of them.
"""

from collections.abc import Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton

_known: set[Hashable] = set()


def compile_side_by_side(kernel: Any, kind: Hashable, arguments: tuple, variants: Iterable[dict[str, Any]],
                         **options: Any) -> None:
    """Compile the variants of a kernel for such arguments, once for each kind of them."""
    if (kernel, kind) in _known:
        return
    _known.add((kernel, kind))
    with ThreadPoolExecutor() as threads, triton.AsyncCompileMode(threads):
        for variant in variants:
            kernel.warmup(*arguments, grid=(1,), **variant, **options)
