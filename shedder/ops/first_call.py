"""The first call of ops whose kernels compile when they are launched: all of them side by side.

A mixer on the Triton backend would wait for its convolution's kernel, then for its SSD's, then for its norm's. So its
parts run once on one entry of the batch, in a thread each, before the call itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from shedder.ops.backend import unavailable
from shedder.ops.tracing import is_traced

_known: set[Hashable] = set()


def compiles_first(first: Tensor, backend: str | None, kind: Hashable) -> bool:
    """Whether a call with this first argument is the first of its kind on Triton, and may run more than it computes."""
    if not first.is_cuda or is_traced() or (first.device, kind) in _known or torch.cuda.is_current_stream_capturing():
        return False
    chosen = backend == "triton" or (backend in (None, "auto") and unavailable("cuda") is not None)
    if not chosen or unavailable("triton") is not None:
        return False
    _known.add((first.device, kind))
    return True


def run_side_by_side(parts: Sequence[Callable[[], object]], device: torch.device) -> None:
    """Run the parts for what they compile; what they compute is dropped. Errors are those of the call that follows."""
    import triton
    triton.runtime.driver.active.get_current_device()        # compiles a module of its own, once
    stream = torch.cuda.current_stream(device)

    def run(part: Callable[[], object]) -> None:
        with contextlib.suppress(Exception), torch.no_grad(), torch.cuda.stream(stream):
            part()

    with ThreadPoolExecutor(len(parts)) as threads:
        list(threads.map(run, parts))
