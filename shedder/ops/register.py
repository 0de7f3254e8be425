"""Registration of the ops with torch, in namespace `shedder`: kernel, fake tensors, autograd.

Library.define and impl rather than custom_op: a call costs less host time. Each op with a
gradient gets an opaque companion `<name>_backward` that runs the forward's specification
again with gradients on, so that what autograd keeps alive is the inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shedder.ops.backend import Explanation, Facts, choose, decide
from shedder.ops.tracing import is_traced

_library = torch.library.Library("shedder", "FRAGMENT")
_recording: list[list[Explanation]] = []          # lists that fake calls append their decision to


class Recording:
    """Collects the decision of every op that is called on fake tensors inside the `with`."""

    def __enter__(self) -> list[Explanation]:
        _recording.append([])
        return _recording[-1]

    def __exit__(self, *exc: object) -> None:
        _recording.pop()


def record(decision: Explanation) -> None:
    """Show explain a decision that no op on fake tensors makes."""
    if _recording:
        _recording[-1].append(decision)


def register(name: str, arguments: str, returns: str, *, facts: Callable[..., Facts], fake: Callable[..., Any],
             recompute: Callable[..., Any] | None = None,
             check_values: Callable[..., None] | None = None) -> Callable[..., Any]:
    """Define op `name` and return a function that calls it; it takes `arguments` and then `backend`.

    Where a backend or `fake` gives None for an output that is not wanted, the op gives an empty tensor.

    Args:
        facts: the facts of a call (see backend.py). fake: outputs without data. check_values:
            raises for values that no backend may see; called on real tensors only.
        recompute: the differentiable form that the gradient runs through. Without it the op
            has no gradient, like the steps of the peer.
    """
    def kernel(*args: Any) -> Any:
        inputs, backend = args[:-1], args[-1]
        if check_values is not None:
            check_values(*inputs)
        return _all_tensors(choose(name, backend, facts(*inputs))(*inputs), inputs[0])

    def fake_kernel(*args: Any) -> Any:
        inputs, backend = args[:-1], args[-1]
        if _recording:
            _recording[-1].append(decide(name, backend, facts(*inputs)))
        return _all_tensors(fake(*inputs), inputs[0])

    _library.define(f"{name}({arguments}, str backend) -> {returns}")
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"shedder::{name}", fake_kernel, lib=_library)
    if recompute is None:
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    else:
        _register_gradient(name, arguments, recompute)
    op = getattr(torch.ops.shedder, name).default

    def call(*args: Any) -> Any:
        # A step is short: where no gradient and no tracer wait in the dispatcher, skip its 5 us.
        first = args[0]
        if torch.is_grad_enabled() or is_traced() or type(first) is not Tensor or not (first.is_cpu or first.is_cuda):
            return op(*args)
        return kernel(*args)

    return call


def _all_tensors(outputs: Any, first: Tensor) -> Any:
    """Outputs as torch takes them: empty tensors for None."""
    if not isinstance(outputs, tuple):
        return outputs
    return tuple(first.new_empty(0) if output is None else output for output in outputs)


def _register_gradient(name: str, arguments: str, recompute: Callable[..., Any]) -> None:

    def backward_kernel(grads: Sequence[Tensor | None], *args: Any) -> list[Tensor]:
        inputs, needs = args[:-1], args[-1]
        device = next(a.device.type for a in inputs if isinstance(a, Tensor))
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            leaves = [a.detach().requires_grad_(need) if isinstance(a, Tensor) else a
                      for a, need in zip(inputs, needs, strict=True)]
            outputs = recompute(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            reached = [(o, g) for o, g in zip(outputs, grads, strict=True)
                       if g is not None and o is not None and o.requires_grad]
            wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
            found: Sequence[Tensor | None] = [None] * len(wanted)
            if reached:
                found = torch.autograd.grad([o for o, _ in reached], wanted, [g.to(o.dtype) for o, g in reached],
                                            allow_unused=True)
        return [_laid_out_like(leaf.detach(), grad) for leaf, grad in zip(wanted, found, strict=True)]

    def backward_fake(grads: Sequence[Tensor | None], *args: Any) -> list[Tensor]:
        return [torch.empty_like(a) for a, need in zip(args[:-1], args[-1], strict=True) if need]

    _library.define(f"{name}_backward(Tensor?[] grads, {arguments}, bool[] needs) -> Tensor[]")
    _library.impl(f"{name}_backward", backward_kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"shedder::{name}_backward", backward_fake, lib=_library)
    backward_op = getattr(torch.ops.shedder, f"{name}_backward").default

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        inputs = inputs[:-1]                                     # all but `backend`
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))
        ctx.others = [None if isinstance(a, Tensor) else (a,) for a in inputs]

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        args = [next(saved) if other is None else other[0] for other in ctx.others]
        needs = list(ctx.needs_input_grad[:len(args)])
        found = iter(backward_op(list(grads), *args, needs))
        return (*(next(found) if need else None for need in needs), None)

    torch.library.register_autograd(f"shedder::{name}", backward, setup_context=setup_context, lib=_library)


def _laid_out_like(tensor: Tensor, grad: Tensor | None) -> Tensor:
    """`grad` with the strides that the fake promised; zeros where the output does not depend on the tensor."""
    if grad is None:
        return torch.zeros_like(tensor)
    promised = torch.empty_like(tensor)
    return grad if grad.stride() == promised.stride() else promised.copy_(grad)
