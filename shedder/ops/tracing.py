"""Whether a call computes, or is watched: by torch.compile, fake tensors, other modes, transforms of torch.func."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_traced() -> bool:
    """Whether something stands between a call and its kernel; then nothing may be kept from it, or go around it."""
    return (torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
            or torch._C._functorch.peek_interpreter_stack() is not None)
