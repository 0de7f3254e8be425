"""The training paths of the shipped models: logits and loss as plain PyTorch functions of a LanguageModel's parameters.

The convolution is a sum of shifted products and Mamba-2's SSD is in its chunked form (matrix products that autograd
differentiates), so that torch.compile fuses everything between the matrix products. Mamba-1's scan is an op: that of
mamba_ssm on a GPU where it is installed, because its backward is a kernel; else shedder's own. Weights are fp32, matrix
products `dtype`, the residual fp32. tests/test_demo_train.py holds the logits against LanguageModel's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shedder.layout import ScanLayout, SSDLayout
from shedder.nn import LanguageModel
from shedder.ops import selective_scan_fn

CHUNK = 64                                              # Q of the chunked SSD


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def head_logits(residual: Tensor, norm: Tensor, embedding: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return F.linear(rms_norm(residual, norm, eps).to(dtype), embedding.to(dtype)).float()


def head_loss(residual: Tensor, norm: Tensor, embedding: Tensor, eps: float, dtype: torch.dtype,
              targets: Tensor) -> Tensor:
    return F.cross_entropy(head_logits(residual, norm, embedding, eps, dtype).flatten(0, 1), targets.flatten())


class TrainingPath:
    """Logits of a LanguageModel whose layers all have one layout. A subclass says what one block does."""

    layout_type: type
    block_parameters: tuple[str, ...]                   # names below backbone.layers.{i}
    compiled: tuple[Callable[..., Any], ...]            # the functions of a block: one graph each serves all blocks
    multiple = 1                                        # of which the length must be

    def __init__(self, model: LanguageModel, dtype: torch.dtype) -> None:
        config = model.config
        first = config.layers[0]
        if not isinstance(first, self.layout_type) or set(config.layers) != {first} or not config.tie_embeddings:
            raise ValueError(f"model has layers that {type(self).__name__} does not know; accepted: equal "
                             f"{self.layout_type.__name__} layers and tied embeddings")
        parameters = dict(model.named_parameters())
        self.blocks = [[parameters[f"backbone.layers.{index}.{name}"] for name in self.block_parameters]
                       for index in range(len(config.layers))]
        self.embedding = parameters["backbone.embedding.weight"]
        self.norm = parameters["backbone.norm_f.weight"]
        self.eps, self.dtype = config.norm_eps, dtype
        self.functions: tuple[Callable[..., Any], ...] = self.compiled
        self.loss_of: Callable[..., Tensor] = head_loss

    @property
    def is_compiled(self) -> bool:
        return self.functions is not self.compiled

    def compile(self) -> None:
        self.functions = tuple(torch.compile(function, dynamic=False) for function in self.compiled)
        self.loss_of = torch.compile(head_loss, dynamic=False)

    def eager(self) -> None:
        self.functions, self.loss_of = self.compiled, head_loss

    def block(self, residual: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError

    def hidden(self, tokens: Tensor, removed: Sequence[int] = ()) -> Tensor:
        residual = F.embedding(tokens, self.embedding).float()
        for index, parameters in enumerate(self.blocks):
            if index not in removed:
                residual = self.block(residual, parameters)
        return residual

    def logits(self, tokens: Tensor) -> Tensor:
        return head_logits(self.hidden(tokens), self.norm, self.embedding, self.eps, self.dtype)

    def loss(self, tokens: Tensor, targets: Tensor, removed: Sequence[int] = ()) -> Tensor:
        return self.loss_of(self.hidden(tokens, removed), self.norm, self.embedding, self.eps, self.dtype, targets)


# Mamba-2.

def chunked_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int) -> Tensor:
    """y (B, L, H, P) of shedder.reference.ssd with one group, dt as it acts, L a multiple of `chunk`.

        s[i]    = sum of dt A up to i, within the chunk
        y[i]    = sum_{j <= i} exp(s[i] - s[j]) (C[i].B[j]) dt[j] x[j]  +  exp(s[i]) C[i].h
        h'      = exp(s[Q]) h + sum_j exp(s[Q] - s[j]) dt[j] x[j] B[j]^T            h of the chunk before
    """
    batch, length, heads, headdim = x.shape
    count, dstate = length // chunk, B.shape[-1]
    x = x.reshape(batch, count, chunk, heads, headdim)
    B, C = (M.reshape(batch, count, chunk, dstate) for M in (B, C))
    dt = dt.reshape(batch, count, chunk, heads).transpose(2, 3)                     # (B, c, H, Q), fp32
    s = torch.cumsum(dt * A[:, None], dim=-1)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    decay = (s[..., :, None] - s[..., None, :]).masked_fill(later, -torch.inf).exp()
    scores = (C @ B.transpose(-1, -2)).float()                                      # (B, c, Q, Q)
    weights = (scores[:, :, None] * decay * dt[..., None, :]).to(x.dtype)           # (B, c, H, Q, Q)
    inside = weights @ x.transpose(2, 3)                                            # (B, c, H, Q, P)

    to_end = ((s[..., -1:] - s).exp() * dt).transpose(2, 3)                         # (B, c, Q, H)
    gathered = (x * to_end[..., None]).to(x.dtype).flatten(3).transpose(2, 3) @ B   # (B, c, H P, N)
    total = torch.cumsum(s[..., -1], dim=1).transpose(1, 2)                         # (B, H, c), to a chunk's end
    before = F.pad(total, (1, 0))[..., :-1]
    not_before = torch.ones(count, count, dtype=torch.bool, device=x.device).triu()
    passing = (before[..., :, None] - total[..., None, :]).masked_fill(not_before, -torch.inf).exp()
    per_head = gathered.reshape(batch, count, heads, headdim * dstate).transpose(1, 2)
    h = (passing.to(x.dtype) @ per_head).transpose(1, 2).reshape(batch, count, heads * headdim, dstate)
    across = (C @ h.transpose(-1, -2)).reshape(batch, count, chunk, heads, headdim)
    y = inside.transpose(2, 3).float() + across.float() * s.exp().transpose(2, 3)[..., None]
    return y.reshape(batch, length, heads, headdim)


def mamba2_block(residual: Tensor, norm: Tensor, in_proj: Tensor, conv: Tensor, conv_bias: Tensor, dt_bias: Tensor,
                 A_log: Tensor, D: Tensor, gated_norm: Tensor, out_proj: Tensor, headdim: int, dstate: int,
                 eps: float, chunk: int, dtype: torch.dtype) -> Tensor:
    """One Mamba-2 block on the fp32 residual (B, L, d_model); matrix products in `dtype`."""
    heads = dt_bias.shape[0]
    d_inner, rows = heads * headdim, in_proj.shape[0]
    in_proj = F.pad(in_proj, (0, 0, 0, -rows % 8))      # aligned rows of the product
    hidden = F.linear(rms_norm(residual, norm, eps).to(dtype), in_proj.to(dtype))
    conv_channels = d_inner + 2 * dstate
    z, xBC, dt = hidden[..., :rows].split([d_inner, conv_channels, heads], dim=-1)
    width, length = conv.shape[-1], xBC.shape[1]
    past = F.pad(xBC, (0, 0, width - 1, 0)).float()
    xBC = F.silu(sum((past[:, k:k + length] * conv[:, 0, k] for k in range(width)), start=conv_bias)).to(dtype)
    x, B, C = xBC.split([d_inner, dstate, dstate], dim=-1)
    x = x.unflatten(-1, (heads, headdim))
    step = F.softplus(dt.float() + dt_bias)
    y = chunked_ssd(x, step, -A_log.exp(), B, C, chunk) + D[:, None] * x.float()
    y = rms_norm(y.flatten(2) * F.silu(z.float()), gated_norm, eps)
    return residual + F.linear(y.to(dtype), out_proj.to(dtype)).float()


class SSDPath(TrainingPath):
    """Mamba-2 with one group of B and C and one norm segment of the model's eps."""

    layout_type = SSDLayout
    block_parameters = ("norm.weight", "mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.conv1d.bias",
                        "mixer.dt_bias", "mixer.A_log", "mixer.D", "mixer.norm.weight", "mixer.out_proj.weight")
    compiled = (mamba2_block,)

    def __init__(self, model: LanguageModel, dtype: torch.dtype, chunk: int = CHUNK) -> None:
        super().__init__(model, dtype)
        layout = model.config.layers[0]
        assert isinstance(layout, SSDLayout)
        if layout.ngroups != 1 or len(layout.norm_segments) != 1 or layout.norm_segments[0].eps != self.eps:
            raise ValueError("model has layers that SSDPath does not know; accepted: one group and one norm segment "
                             "of the model's eps")
        self.headdim, self.dstate, self.multiple = layout.headdim, layout.dstate, chunk

    def block(self, residual: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        whole, = self.functions
        return whole(residual, *parameters, self.headdim, self.dstate, self.eps, self.multiple, self.dtype)


# Mamba-1. Activations are (channels, B, L): a projection is one matrix product, and the scan reads unit strides in L.

def scan_inputs(residual: Tensor, norm: Tensor, in_proj: Tensor, conv: Tensor, conv_bias: Tensor, x_proj: Tensor,
                dt_proj: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[x | z] (2 D, B, L), x after the convolution (D, B, L), [rank | B | C] (R + 2 N, B, L), dt before its bias."""
    batch, length, _ = residual.shape
    hidden = rms_norm(residual, norm, eps).to(dtype).flatten(0, 1)
    xz = (in_proj.to(dtype) @ hidden.T).unflatten(1, (batch, length))
    channels, _, width = conv.shape
    past = F.pad(xz[:channels], (width - 1, 0)).float()
    shifted = (past[..., k:k + length] * conv[:, 0, k, None, None] for k in range(width))
    x = F.silu(sum(shifted, start=conv_bias[:, None, None])).to(dtype)
    rank_B_C = x_proj.to(dtype) @ x.flatten(1)
    dt = dt_proj.to(dtype) @ rank_B_C[:dt_proj.shape[1]]
    return xz, x, rank_B_C.unflatten(1, (batch, length)), dt.unflatten(1, (batch, length))


def scan_output(residual: Tensor, y: Tensor, out_proj: Tensor, dtype: torch.dtype) -> Tensor:
    """The residual (B, L, d_model) plus the projection of the gated y (D, B, L)."""
    return residual + F.linear(y.flatten(1).T, out_proj.to(dtype)).view_as(residual).float()


def scan_function(device: torch.device) -> Callable[..., Tensor]:
    """mamba_ssm's selective scan on a GPU where it is installed, else shedder's."""
    if device.type == "cuda":
        try:
            from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as peer
            return peer
        except ImportError as error:
            print(f"mamba_ssm cannot be imported ({error}); training with shedder's selective scan", flush=True)
    return selective_scan_fn


class ScanPath(TrainingPath):
    """Mamba-1 with one group of B and C."""

    layout_type = ScanLayout
    block_parameters = ("norm.weight", "mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.conv1d.bias",
                        "mixer.x_proj.weight", "mixer.dt_proj.weight", "mixer.dt_proj.bias", "mixer.A_log", "mixer.D",
                        "mixer.out_proj.weight")
    compiled = (scan_inputs, scan_output)

    def __init__(self, model: LanguageModel, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        layout = model.config.layers[0]
        assert isinstance(layout, ScanLayout)
        if layout.ngroups != 1:
            raise ValueError(f"model has {layout.ngroups} groups in a layer; ScanPath accepts one")
        self.sections = [layout.dt_rank, layout.dstate, layout.dstate]
        self.scan = scan_function(self.embedding.device)

    def block(self, residual: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        *projections, dt_bias, A_log, D, out_proj = parameters
        inputs, output = self.functions
        xz, x, rank_B_C, dt = inputs(residual, *projections, self.eps, self.dtype)
        _, B, C = rank_B_C.split(self.sections)
        z = xz[x.shape[0]:]
        x, dt, z, B, C = (part.transpose(0, 1) for part in (x, dt, z, B, C))        # (B, ., L)
        y = self.scan(x, dt, -A_log.exp(), B, C, D, z=z, delta_bias=dt_bias, delta_softplus=True)
        return output(residual, y.transpose(0, 1), out_proj, self.dtype)


PATHS: dict[str, type[TrainingPath]] = {"mamba1": ScanPath, "mamba2": SSDPath}
