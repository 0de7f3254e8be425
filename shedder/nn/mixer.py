"""What all mixers share: the probe, the causal convolution with its state, and derived constants."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shedder.nn.precision import WideParameters
from shedder.nn.state import LayerState
from shedder.ops import causal_conv1d_fn, causal_conv1d_update

Probe = Callable[[str, Tensor], Tensor]


class Mixer(WideParameters):
    """Base of the mixers: in_proj, a causal convolution, something along time, a gate, out_proj.

    `probe`, when set, sees and may replace the activations on their way (an activation mask, a
    collector of statistics): probe(name, tensor) -> tensor, in the order
        "x"      after the convolution: (B, L, H, P) in Mamba-2, (B, D, L) in Mamba-1
        "B", "C" (B, L, G, N) in Mamba-2, (B, G, N, L) in Mamba-1
        "dt"     after bias, softplus and limit, in fp32 or wider: (B, L, H) or (B, D, L)
        "y"      output of the scan with the D skip, before the gate; like x
        "gated"  input of the norm, or of out_proj without one: (B, L, d_inner)
        "mlp"    where d_ssm < d_inner, what stands beside the SSM: (B, L, mlp_channels)
        "inner"  input of out_proj: (B, L, mlp_channels + d_inner)
        "out"    output of the mixer: (B, L, d_model)
    in prefill and in single steps. A mixer whose SSM is removed passes no B, C, dt.
    """

    in_proj: nn.Linear
    conv1d: nn.Conv1d
    out_proj: nn.Linear
    D: nn.Parameter | None
    wide = ("A_log", "D", "dt_bias", "dt_proj.bias")
    value_constants: tuple[str, ...] = ()               # parameters whose values _derive() transforms
    view_constants: tuple[str, ...] = ()                # parameters that _derive() only views

    def __init__(self) -> None:
        super().__init__()
        self.probe: Probe | None = None
        self._kept: tuple[tuple, tuple] | None = None

    def allocate_state(self, batch: int, ssm_dtype: torch.dtype) -> LayerState:
        raise NotImplementedError

    # Constants such as A = -exp(A_log) cost a launch each; a decode step should not repeat them.

    def _derive(self) -> tuple:
        raise NotImplementedError

    def _stamp(self) -> tuple | None:
        stamps: list[int] = []
        for name in self.value_constants:
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.is_inference():                   # keeps no version, so a change would pass unseen
                return None
            stamps += (tensor._version, tensor.data_ptr())
        for name in self.view_constants:
            tensor = getattr(self, name, None)
            stamps.append(0 if tensor is None else tensor.data_ptr())
        stamps.append(self.conv1d.weight.data_ptr())
        return tuple(stamps)

    def constants(self) -> tuple:
        """What _derive() returns; kept between calls while no gradient is recorded and no parameter changes."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._derive()
        stamp = self._stamp()
        if self._kept is None or stamp is None or self._kept[0] != stamp:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = (stamp or (), self._derive())
        return self._kept[1]

    def _apply(self, fn, recurse=True):
        self._kept = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": None}


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, state: LayerState | None) -> Tensor:
    """silu(causal convolution) of x (B, L, C) along L, continuing from state.conv and updating it."""
    x = x.transpose(1, 2)
    if state is None:
        return causal_conv1d_fn(x, weight, bias, activation="silu").transpose(1, 2)
    length, kept = x.shape[2], weight.shape[1] - 1
    if length == 1:
        return causal_conv1d_update(x, state.conv, weight, bias, activation="silu").transpose(1, 2)
    history = past(state.conv, x.dtype) if kept else None
    y = causal_conv1d_fn(x, weight, bias, initial_states=history, activation="silu")
    remember(state.conv, x)
    return y.transpose(1, 2)


def remember(conv_state: Tensor, x: Tensor) -> None:
    """Make conv_state (B, C, W-1) the last inputs of a convolution that has gone on over x (B, C, L)."""
    length, kept = x.shape[2], conv_state.shape[2]
    with torch.no_grad():
        if length < kept:
            conv_state.copy_(torch.cat([conv_state[..., length:], x.to(conv_state.dtype)], dim=-1))
        else:
            conv_state.copy_(x[..., length - kept:])


def split_mlp(projected: Tensor, channels: int) -> tuple[Tensor | None, Tensor]:
    """[gate | value] of the channels beside the SSM, None without any, and the rest of what in_proj put out."""
    if not channels:
        return None, projected
    return projected[..., :2 * channels], projected[..., 2 * channels:]


def beside(mlp: Tensor | None, y: Tensor, probe: Probe | None = None) -> Tensor:
    """y behind the channels beside the SSM, silu(gate) times value."""
    if mlp is None:
        return y
    gate, value = mlp.chunk(2, dim=-1)
    gated = F.silu(gate) * value
    return torch.cat([gated if probe is None else probe("mlp", gated), y], dim=-1)


def past(state: Tensor, dtype: torch.dtype) -> Tensor:
    """A state as an op's input, in dtype. No gradient flows to earlier calls; the copy keeps backward legal,
    since the state is about to be overwritten."""
    return state.to(dtype, copy=torch.is_grad_enabled())


def overwrite(state: Tensor, final: Tensor) -> None:
    with torch.no_grad():
        state.copy_(final)


def empty_linear(inputs: int, outputs: int, bias: bool, device: torch.device | None,
                 dtype: torch.dtype | None) -> nn.Linear:
    """A Linear whose values somebody else will write."""
    return nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, device=device, dtype=dtype)


def empty_conv(channels: int, width: int, bias: bool, device: torch.device | None,
               dtype: torch.dtype | None) -> nn.Conv1d:
    """Holds the weight (C, 1, W) and bias under the names of checkpoints; its forward is never called."""
    return nn.utils.skip_init(nn.Conv1d, channels, channels, width, groups=channels, padding=width - 1, bias=bias,
                              device=device, dtype=dtype)


def empty_parameter(*shape: int, device: torch.device | None, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))
