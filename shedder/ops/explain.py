"""Which backend and kernel a call takes, and why no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from shedder.ops.backend import OPS, Explanation, decide
from shedder.ops.register import Recording


def explain(op: str | Callable[..., Any], *args: Any, backend: str | None = None,
            **kwargs: Any) -> list[Explanation]:
    """The decision for every op that a call would run; nothing is computed.

    Either a public function (or its name) with the arguments of the call:
        explain(mamba_chunk_scan_combined, x, dt, A, B, C, chunk_size=256)
    or the name of one op with facts of the call (see shedder.ops.backend; those left out are unknown):
        explain("ssd", device="cuda", dtype=torch.bfloat16, headdim=61, dstate=128)

    Returns:
        One Explanation for each op, in order; print one to read it.
    Raises:
        ValueError: for an unknown op, and wherever the call itself would raise for its arguments.
    """
    if isinstance(op, str) and op in OPS and not args:
        facts = {"device": "cpu", "dtype": torch.float32, "batch": 1, "length": 1, **kwargs}
        return [decide(op, backend or "auto", tuple(facts.items()))]
    if isinstance(op, str):
        from shedder import ops
        if op not in ops.__all__ or op == "explain":
            names = sorted(set(ops.__all__) - {"explain"})
            raise ValueError(f"op is {op!r}; accepted: one of {names} with the arguments of a call, or one of "
                             f"{list(OPS)} with facts as keywords")
        op = getattr(ops, op)
    assert callable(op)
    mode = FakeTensorMode()
    fake_args, fake_kwargs = tree_map_only(Tensor, lambda t: mode.from_tensor(t.detach()), (args, kwargs))
    with mode, torch.no_grad(), Recording() as decisions:
        op(*fake_args, backend=backend, **fake_kwargs)
    return decisions
