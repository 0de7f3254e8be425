"""Each op as the benchmarks see it: random inputs, our call, the peer's call on the same tensors, the reference.

Inputs are unstructured: A is random, since an A of -(n+1) would let the exponentials of all
states collapse into one. Values are model-like: dt between 0.001 and 0.1 after bias and softplus.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.workloads import Workload
from shedder import reference
from shedder.prune.kept import ROW_MULTIPLE

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PEER_CHUNK = 256                                        # mamba_ssm's default chunk_size
EPS = 1e-5

Inputs = dict[str, Any]
Outputs = tuple[Tensor, ...]


class Draw:
    """Random tensors of one workload."""

    def __init__(self, workload: Workload, device: str, seed: int) -> None:
        self.device = device
        self.dtype = DTYPES[workload.dtype]
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        values = torch.empty(shape, device=self.device, dtype=dtype or self.dtype)
        return values.normal_(generator=self.generator).mul_(scale)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.device).uniform_(low, high, generator=self.generator)

    def decay(self, *shape: int) -> Tensor:
        """A: negative, fp32, between -16 and -0.1."""
        return -self.uniform(-2.3, 2.77, *shape).exp_()

    def dt_bias(self, *shape: int) -> Tensor:
        """The inverse softplus of a step size between 0.001 and 0.1."""
        return torch.log(torch.expm1(self.uniform(-6.9, -2.3, *shape).exp_()))


@dataclass(frozen=True)
class Op:
    inputs: Callable[[Workload, Draw], Inputs]
    ours: Callable[[Inputs, str | None], Outputs] | None
    peer: Callable[[Inputs], Outputs] | None
    reference: Callable[[Inputs], Outputs]
    peer_name: str = "mamba_ssm"
    pass_: str = "fwd"


def make_inputs(workload: Workload, device: str = "cuda", seed: int = 0) -> Inputs:
    return OPS[workload.op].inputs(workload, Draw(workload, device, seed))


def input_bytes(inputs: Inputs) -> int:
    """Bytes of the distinct memory behind the tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in inputs.values() if isinstance(t, Tensor)}
    return sum(storages.values())


def check_workload(workload: Workload) -> Workload:
    """The same layer on few tokens, so that a float64 recurrence stays cheap; the tail of L is kept."""
    shape = dict(workload.shape)
    if "L" in shape and shape["L"] > 320:
        shape["L"] = 256 + shape["L"] % 64
    if "rows" in shape:
        shape["rows"] = min(shape["rows"], 256)
    if "B" in shape:
        shape["B"] = min(shape["B"], 2)
    return replace(workload, shape=shape)


def _double(inputs: Inputs, *names: str) -> list[Any]:
    return [inputs[name].double() if isinstance(inputs[name], Tensor) else inputs[name] for name in names]


# ---- selective scan


def _scan_inputs(w: Workload, draw: Draw) -> Inputs:
    batch, channels, length, states = (w.shape[key] for key in "BDLN")
    rows = {name: draw.normal(batch, channels, length) for name in ("u", "delta", "z")}
    return rows | {"A": draw.decay(channels, states), "B": draw.normal(batch, states, length),
                   "C": draw.normal(batch, states, length), "D": draw.normal(channels, dtype=torch.float32),
                   "delta_bias": draw.dt_bias(channels)}


def _scan_ours(t: Inputs, backend: str | None) -> Outputs:
    from shedder.ops import selective_scan_fn
    return (selective_scan_fn(t["u"], t["delta"], t["A"], t["B"], t["C"], t["D"], t["z"], t["delta_bias"], True,
                              backend=backend),)


def _scan_peer(t: Inputs) -> Outputs:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    return (selective_scan_fn(t["u"], t["delta"], t["A"], t["B"], t["C"], t["D"], t["z"], t["delta_bias"], True),)


def _scan_reference(t: Inputs) -> Outputs:
    u, delta, A, B, C, D, z, bias = _double(t, "u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    return (reference.selective_scan(u, delta, A, B, C, D, z, bias, True)[0],)


def _mamba1_inputs(w: Workload, draw: Draw) -> Inputs:
    batch, channels, length, states = (w.shape[key] for key in "BDLN")
    d_model = w.shape.get("d_model", channels // 2)
    rank = w.shape.get("R", -(-d_model // 16))
    return {"xz": draw.normal(batch, 2 * channels, length), "conv_weight": draw.normal(channels, 1, 4, scale=0.5),
            "conv_bias": draw.normal(channels),
            "x_proj": draw.normal(rank + 2 * states, channels, scale=channels ** -.5),
            "dt_proj": draw.normal(channels, rank, scale=rank ** -.5),
            "out_proj": draw.normal(d_model, channels, scale=channels ** -.5),
            "A": draw.decay(channels, states), "D": draw.normal(channels, dtype=torch.float32),
            "delta_bias": draw.dt_bias(channels)}


def _mamba1_arguments(t: Inputs) -> tuple[Any, ...]:
    """Positional arguments of mamba_inner_fn; its delta_softplus is True by default."""
    return (t["xz"], t["conv_weight"], t["conv_bias"], t["x_proj"], t["dt_proj"], t["out_proj"], None,
            t["A"], None, None, t["D"], t["delta_bias"])


def _mamba1_ours(t: Inputs, backend: str | None) -> Outputs:
    from shedder.ops import mamba_inner_fn
    return (mamba_inner_fn(*_mamba1_arguments(t), backend=backend),)


def _mamba1_peer(t: Inputs) -> Outputs:
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn
    return (mamba_inner_fn(*_mamba1_arguments(t)),)


def _mamba1_reference(t: Inputs) -> Outputs:
    xz, weight, bias, x_proj, dt_proj, out_proj, A, D, delta_bias = _double(
        t, "xz", "conv_weight", "conv_bias", "x_proj", "dt_proj", "out_proj", "A", "D", "delta_bias")
    x, z = xz.chunk(2, dim=1)
    x, _ = reference.causal_conv1d(x, weight[:, 0], bias, "silu")
    rank, states = dt_proj.shape[1], A.shape[1]
    dt, B, C = torch.einsum("rd,bdl->brl", x_proj, x).split([rank, states, states], dim=1)
    delta = torch.einsum("dr,brl->bdl", dt_proj, dt)
    y, _ = reference.selective_scan(x, delta, A, B, C, D, z, delta_bias, True)
    return (torch.einsum("md,bdl->blm", out_proj, y),)


# ---- SSD


def _head_to_group(w: Workload) -> tuple[int, ...] | None:
    """A map only where groups are ragged; equal runs are the default of every op."""
    if "groups" not in w.shape:
        return None
    return tuple(group for group, heads in enumerate(w.shape["groups"]) for _ in range(heads))


def _ssd_inputs(w: Workload, draw: Draw) -> Inputs:
    batch, length, heads, headdim, states, groups = (w.shape[key] for key in "BLHPNG")
    return {"x": draw.normal(batch, length, heads, headdim), "dt": draw.normal(batch, length, heads),
            "A": draw.decay(heads), "B": draw.normal(batch, length, groups, states),
            "C": draw.normal(batch, length, groups, states), "D": draw.normal(heads, dtype=torch.float32),
            "dt_bias": draw.dt_bias(heads), "head_to_group": _head_to_group(w)}


def _ssd_ours(t: Inputs, backend: str | None) -> Outputs:
    from shedder.ops import mamba_chunk_scan_combined
    return (mamba_chunk_scan_combined(t["x"], t["dt"], t["A"], t["B"], t["C"], PEER_CHUNK, D=t["D"],
                                      dt_bias=t["dt_bias"], dt_softplus=True, head_to_group=t["head_to_group"],
                                      backend=backend),)


def _ssd_peer(t: Inputs) -> Outputs:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    return (mamba_chunk_scan_combined(t["x"], t["dt"], t["A"], t["B"], t["C"], PEER_CHUNK, D=t["D"],
                                      dt_bias=t["dt_bias"], dt_softplus=True),)


def _ssd_reference(t: Inputs) -> Outputs:
    x, dt, A, B, C, D, bias = _double(t, "x", "dt", "A", "B", "C", "D", "dt_bias")
    groups = None if t["head_to_group"] is None else torch.tensor(t["head_to_group"], device=x.device)
    return (reference.ssd(x, dt, A, B, C, D, dt_bias=bias, dt_softplus=True, head_to_group=groups)[0],)


def _mamba2_inputs(w: Workload, draw: Draw) -> Inputs:
    """zxbcdt as a compacted in_proj leaves it, in whole rows."""
    batch, length, heads, headdim, states, groups = (w.shape[key] for key in "BLHPNG")
    inner, conv = heads * headdim, heads * headdim + 2 * groups * states
    padding = -(inner + conv + heads) % ROW_MULTIPLE
    return {"zxbcdt": draw.normal(batch, length, inner + conv + heads + padding), "row_padding": padding,
            "conv_weight": draw.normal(conv, 4, scale=0.5), "conv_bias": draw.normal(conv),
            "dt_bias": draw.dt_bias(heads), "A": draw.decay(heads), "D": draw.normal(heads, dtype=torch.float32),
            "norm_weight": draw.normal(inner, scale=0.1).add_(1), "headdim": headdim, "groups": groups}


def _mamba2_call(function: Callable[..., Tensor], zxbcdt: Tensor, t: Inputs, **extra: Any) -> Outputs:
    return (function(zxbcdt, t["conv_weight"], t["conv_bias"], t["dt_bias"], t["A"], t["D"], PEER_CHUNK,
                     activation="silu", rmsnorm_weight=t["norm_weight"], rmsnorm_eps=EPS, headdim=t["headdim"],
                     ngroups=t["groups"], norm_before_gate=False, **extra),)


def _mamba2_ours(t: Inputs, backend: str | None) -> Outputs:
    from shedder.ops import mamba_split_conv1d_scan_combined
    return _mamba2_call(mamba_split_conv1d_scan_combined, t["zxbcdt"], t, row_padding=t["row_padding"],
                        backend=backend)


def _mamba2_peer(t: Inputs) -> Outputs:
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined
    inner, conv, pitch = t["norm_weight"].numel(), t["conv_weight"].shape[0], t["zxbcdt"].shape[-1]
    if conv % 8 == 0 and inner % 8 != 0:
        raise RuntimeError("not run: causal_conv1d reads 16 bytes at a misaligned address and loses the CUDA context")
    return _mamba2_call(mamba_split_conv1d_scan_combined, t["zxbcdt"][..., :pitch - t["row_padding"]], t)


def _mamba2_reference(t: Inputs) -> Outputs:
    zxbcdt, weight, bias, dt_bias, A, D, norm_weight = _double(
        t, "zxbcdt", "conv_weight", "conv_bias", "dt_bias", "A", "D", "norm_weight")
    heads, inner, conv, groups = A.numel(), norm_weight.numel(), weight.shape[0], t["groups"]
    z, xBC, dt, _ = zxbcdt.split([inner, conv, heads, t["row_padding"]], dim=-1)
    xBC = reference.causal_conv1d(xBC.transpose(1, 2), weight, bias, "silu")[0].transpose(1, 2)
    states = (conv - inner) // (2 * groups)
    x, B, C = xBC.split([inner, groups * states, groups * states], dim=-1)
    y, _ = reference.ssd(x.unflatten(-1, (heads, -1)), dt, A, B.unflatten(-1, (groups, -1)),
                         C.unflatten(-1, (groups, -1)), D, dt_bias=dt_bias, dt_softplus=True)
    return (reference.gated_rmsnorm(y.flatten(2), norm_weight, None, z, segments=[inner // groups] * groups,
                                    eps=[EPS] * groups, norm_before_gate=False),)


def _removed_inputs(w: Workload, draw: Draw) -> Inputs:
    batch, length, heads, headdim = (w.shape[key] for key in "BLHP")
    inner = heads * headdim
    return {"zx": draw.normal(batch, length, 2 * inner), "conv_weight": draw.normal(inner, 4, scale=0.5),
            "conv_bias": draw.normal(inner), "D": draw.normal(heads, dtype=torch.float32),
            "norm_weight": draw.normal(inner, scale=0.1).add_(1)}


def _removed_ours(t: Inputs, backend: str | None) -> Outputs:
    from shedder.ops import removed_ssm
    z, x = t["zx"].chunk(2, dim=-1)
    return (removed_ssm(x, z, t["conv_weight"], t["conv_bias"], t["D"], t["norm_weight"],
                        norm_segments=[(x.shape[-1], EPS)], norm_before_gate=False, backend=backend),)


def _removed_reference(t: Inputs) -> Outputs:
    zx, weight, bias, D, norm_weight = _double(t, "zx", "conv_weight", "conv_bias", "D", "norm_weight")
    z, x = zx.chunk(2, dim=-1)
    x = reference.causal_conv1d(x.transpose(1, 2), weight, bias, "silu")[0].transpose(1, 2)
    y = (x.unflatten(-1, (D.numel(), -1)) * D[:, None]).flatten(2)
    return (reference.gated_rmsnorm(y, norm_weight, None, z, segments=[y.shape[-1]], eps=[EPS],
                                    norm_before_gate=False),)


# ---- conv


def _conv_inputs(w: Workload, draw: Draw) -> Inputs:
    batch, length, channels, width = (w.shape[key] for key in ("B", "L", "channels", "width"))
    x = (draw.normal(batch, channels, length) if w.layout == "BDL"
         else draw.normal(batch, length, channels).transpose(1, 2))
    return {"x": x, "weight": draw.normal(channels, width, scale=0.5), "bias": draw.normal(channels)}


def _conv_ours(t: Inputs, backend: str | None) -> Outputs:
    from shedder.ops import causal_conv1d_fn
    return (causal_conv1d_fn(t["x"], t["weight"], t["bias"], activation="silu", backend=backend),)


def _conv_peer(t: Inputs) -> Outputs:
    from causal_conv1d import causal_conv1d_fn
    return (causal_conv1d_fn(t["x"], t["weight"], t["bias"], activation="silu"),)


def _conv_reference(t: Inputs) -> Outputs:
    x, weight, bias = _double(t, "x", "weight", "bias")
    return (reference.causal_conv1d(x, weight, bias, "silu")[0],)


def _conv_update_inputs(w: Workload, draw: Draw) -> Inputs:
    batch, channels, width = (w.shape[key] for key in ("B", "channels", "width"))
    return {"x": draw.normal(batch, channels), "conv_state": draw.normal(batch, channels, width),
            "weight": draw.normal(channels, width, scale=0.5), "bias": draw.normal(channels)}


def _conv_update_ours(t: Inputs, backend: str | None) -> Outputs:
    from shedder.ops import causal_conv1d_update
    return (causal_conv1d_update(t["x"], t["conv_state"], t["weight"], t["bias"], "silu", backend=backend),
            t["conv_state"])


def _conv_update_peer(t: Inputs) -> Outputs:
    from causal_conv1d import causal_conv1d_update
    return causal_conv1d_update(t["x"], t["conv_state"], t["weight"], t["bias"], "silu"), t["conv_state"]


def _conv_update_reference(t: Inputs) -> Outputs:
    x, state, weight, bias = _double(t, "x", "conv_state", "weight", "bias")
    y, state = reference.causal_conv1d_update(x[..., None], state, weight, bias, "silu")
    return y[..., 0], state


# ---- norm


def _norm_inputs(w: Workload, draw: Draw) -> Inputs:
    rows, width = w.shape["rows"], w.shape["width"]
    return {"x": draw.normal(rows, width), "z": draw.normal(rows, width),
            "weight": draw.normal(width, scale=0.1).add_(1), "segments": list(w.shape["segments"])}


def _norm_ours(t: Inputs, backend: str | None) -> Outputs:
    from shedder.ops import rmsnorm_fn
    return (rmsnorm_fn(t["x"], t["weight"], None, z=t["z"], eps=EPS, norm_before_gate=False,
                       segments=t["segments"], segment_eps=[EPS] * len(t["segments"]), backend=backend),)


def _norm_peer(t: Inputs) -> Outputs:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
    if len(set(t["segments"])) > 1:
        raise ValueError("group_size cannot express unequal segments")
    return (rmsnorm_fn(t["x"], t["weight"], None, z=t["z"], eps=EPS, group_size=t["segments"][0],
                       norm_before_gate=False),)


def _norm_reference(t: Inputs) -> Outputs:
    x, z, weight = _double(t, "x", "z", "weight")
    return (reference.gated_rmsnorm(x, weight, None, z, segments=t["segments"], eps=[EPS] * len(t["segments"]),
                                    norm_before_gate=False),)


# ---- decode


def _state_inputs(w: Workload, draw: Draw) -> Inputs:
    state_dtype = DTYPES[w.state_dtype or w.dtype]
    batch, states = w.shape["B"], w.shape["N"]
    if "D" in w.shape:                                  # Mamba-1: every channel has its own dt and decay
        channels = w.shape["D"]
        return {"state": draw.normal(batch, channels, states, dtype=state_dtype), "x": draw.normal(batch, channels),
                "dt": draw.normal(batch, channels), "A": draw.decay(channels, states), "B": draw.normal(batch, states),
                "C": draw.normal(batch, states), "D": draw.normal(channels, dtype=torch.float32),
                "z": draw.normal(batch, channels), "dt_bias": draw.dt_bias(channels)}
    heads, headdim, groups = (w.shape[key] for key in "HPG")
    return {"state": draw.normal(batch, heads, headdim, states, dtype=state_dtype),
            "x": draw.normal(batch, heads, headdim),
            "dt": draw.normal(batch, heads)[..., None].expand(-1, -1, headdim),
            "A": draw.decay(heads)[:, None, None].expand(-1, headdim, states),
            "B": draw.normal(batch, groups, states), "C": draw.normal(batch, groups, states),
            "D": draw.normal(heads, dtype=torch.float32)[:, None].expand(-1, headdim), "z": None,
            "dt_bias": draw.dt_bias(heads)[:, None].expand(-1, headdim)}


def _state_call(function: Callable[..., Tensor], t: Inputs, **extra: Any) -> Outputs:
    y = function(t["state"], t["x"], t["dt"], t["A"], t["B"], t["C"], t["D"], z=t["z"], dt_bias=t["dt_bias"],
                 dt_softplus=True, **extra)
    return y, t["state"]


def _state_ours(t: Inputs, backend: str | None) -> Outputs:
    from shedder.ops import selective_state_update
    return _state_call(selective_state_update, t, backend=backend)


def _state_peer(t: Inputs) -> Outputs:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    return _state_call(selective_state_update, t)


def _state_reference(t: Inputs) -> Outputs:
    state, x, dt, A, B, C, D, z, bias = _double(t, "state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    if x.dim() == 3:
        return reference.state_update(state, x, dt, A, B, C, D, z, bias, True)
    y, state = reference.state_update(state[:, None], x[:, None], dt[:, None], A[None], B[:, None], C[:, None],
                                      D[None], z[:, None], bias[None], True)
    return y[:, 0], state[:, 0]


OPS: dict[str, Op] = {
    "selective_scan": Op(_scan_inputs, _scan_ours, _scan_peer, _scan_reference),
    "mamba1_inner": Op(_mamba1_inputs, _mamba1_ours, _mamba1_peer, _mamba1_reference),
    "ssd": Op(_ssd_inputs, _ssd_ours, _ssd_peer, _ssd_reference),
    "mamba2_inner": Op(_mamba2_inputs, _mamba2_ours, _mamba2_peer, _mamba2_reference),
    "removed_ssm": Op(_removed_inputs, _removed_ours, None, _removed_reference),
    "conv1d": Op(_conv_inputs, _conv_ours, _conv_peer, _conv_reference, "causal_conv1d"),
    "conv1d_update": Op(_conv_update_inputs, _conv_update_ours, _conv_update_peer, _conv_update_reference,
                        "causal_conv1d", "step"),
    "gated_rmsnorm": Op(_norm_inputs, _norm_ours, _norm_peer, _norm_reference),
    "state_update": Op(_state_inputs, _state_ours, _state_peer, _state_reference, "mamba_ssm", "step"),
}


def tolerance(workload: Workload) -> float:
    """The largest RMS error, relative to the RMS of the reference, at which a speed still counts.

    A bf16 result is rounded once at 2^-9 (2e-3 RMS) and the intermediate values of fused ops once or
    twice more; fp32 allows for TF32 products, the peers' default.
    """
    rounded = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-3}[workload.dtype]
    return 2 * rounded if workload.op in ("mamba1_inner", "mamba2_inner") else rounded


def error(outputs: Outputs, expected: Outputs) -> float:
    """The largest RMS(out - ref) / RMS(ref) over the outputs; not a number counts as infinite."""
    worst = 0.0
    for out, ref in zip(outputs, expected, strict=True):
        relative = float((out.double() - ref).square().mean().sqrt() / ref.square().mean().sqrt())
        worst = max(worst, relative if relative == relative else float("inf"))
    return worst


def clone(inputs: Inputs) -> Inputs:
    """The same values in other memory, strides and zero strides kept."""
    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        fresh = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        if 0 in value.stride():                         # one element behind several indices: write it once
            index = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.stride())
            fresh[index].copy_(value[index])
            return fresh
        return fresh.copy_(value)

    return {name: copy(value) for name, value in inputs.items()}
