"""A Mamba-1 decode step between in_proj and out_proj is the composition of the specifications, on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from decode_step import assert_close, implementations
from torch import Tensor

from shedder import ops, reference
from shedder.ops.backend import unavailable

STEPS = 3
# Outputs are rounded once to their dtype; what passes between the parts is float32.
LIMIT = {torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
# What the reference backend rounds between the parts, as separate ops do, it hands on to dt and its exponential.
ROUNDED = {torch.float32: 4e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {"channels": 128, "dstate": 16, "rank": 8},
    "odd": {"channels": 75, "dstate": 11, "rank": 3, "width": 3},
    "many states": {"channels": 41, "dstate": 101, "rank": 17},
    "groups": {"channels": 90, "dstate": 6, "rank": 5, "groups": 3, "channel_to_group": (2, 0, 1) * 30},
    "one channel": {"channels": 1, "dstate": 1, "rank": 1, "width": 1},
    "removed SSM": {"channels": 77, "dstate": 0, "rank": 0},
}


def make_inputs(channels: int, dstate: int, rank: int, *, groups: int = 1, width: int = 4, batch: int = 2,
                kept: int | None = None, dtype: torch.dtype = torch.float32, state_dtype: torch.dtype = torch.float32,
                has_bias: bool = True, seen: tuple[int, ...] = (), slots: tuple[int, ...] = (), device: str = "cpu",
                **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and options of a call."""
    def rand(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=device) * scale

    kept = width - 1 if kept is None else kept
    batch = len(seen or slots) or batch
    states = max(slots) + 2 if slots else batch
    tensors = {
        "xz": rand(batch, 2 * channels).to(dtype),
        "conv_state": rand(states, kept, channels).to(dtype).transpose(1, 2),         # as nn allocates it
        "ssm_state": rand(states, channels, dstate).to(state_dtype),
        "conv_weight": rand(channels, width, scale=0.5).to(dtype),
        "conv_bias": rand(channels).to(dtype) if has_bias else None,
        "x_proj_weight": rand(rank + 2 * groups * dstate, channels, scale=channels**-0.5).to(dtype),
        "dt_proj_weight": rand(channels, rank, scale=max(rank, 1)**-0.5).to(dtype),
        "dt_bias": rand(channels), "A": -rand(channels, dstate).exp(), "D": rand(channels),
    }
    if not dstate:
        tensors.update(dict.fromkeys(("ssm_state", "x_proj_weight", "dt_proj_weight", "dt_bias", "A")))
    for name, numbers in (("cache_seqlens", seen), ("state_batch_indices", slots)):
        if numbers:
            options[name] = torch.tensor(numbers, dtype=torch.int32, device=device)
    return tensors, options


def expected(tensors: dict[str, Any], channel_to_group: Any = None, cache_seqlens: Tensor | None = None,
             state_batch_indices: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """y and both new states, composed from shedder.reference in float64."""
    t = {name: None if value is None else value.double().cpu().clone() for name, value in tensors.items()}
    batch, channels = t["xz"].shape[0], t["D"].shape[0]
    slots = torch.arange(batch) if state_batch_indices is None else state_batch_indices.cpu().long()
    rows = torch.nonzero(slots >= 0)[:, 0]
    slots, y = slots[rows], torch.zeros(batch, channels, dtype=torch.float64)
    x, z = t["xz"][rows].chunk(2, dim=-1)
    x, t["conv_state"][slots] = reference.causal_conv1d_update(
        x[..., None], t["conv_state"][slots], t["conv_weight"], t["conv_bias"], "silu",
        cache_seqlens=None if cache_seqlens is None else cache_seqlens.cpu()[rows])
    x = x[..., 0]
    if t["A"] is None:
        y[rows] = x * t["D"] * z * torch.sigmoid(z)
        return y, t["conv_state"], None
    rank, dstate = t["dt_proj_weight"].shape[1], t["A"].shape[1]
    ranks, B, C = (x @ t["x_proj_weight"].T).tensor_split((rank, (rank + t["x_proj_weight"].shape[0]) // 2), dim=-1)
    B, C = B.unflatten(-1, (-1, dstate)), C.unflatten(-1, (-1, dstate))
    groups = torch.tensor(channel_to_group or [c * B.shape[1] // channels for c in range(channels)])
    got, state = reference.state_update(
        t["ssm_state"][slots][:, None], x[:, None], (ranks @ t["dt_proj_weight"].T)[:, None], t["A"][None], B, C,
        t["D"][None], z[:, None], t["dt_bias"][None], True, head_to_group=groups)
    y[rows], t["ssm_state"][slots] = got[:, 0], state[:, 0]
    return y, t["conv_state"], t["ssm_state"]


def check(tensors: dict[str, Any], options: dict[str, Any], backend: str | None) -> None:
    """Some steps, each held to the reference from the state that the step before left."""
    for _ in range(STEPS):
        y_want, conv_want, ssm_want = expected(tensors, **options)
        limits = ROUNDED if backend == "reference" or ops.explain(
            ops.mamba_inner_step, **tensors, **options, backend=backend)[0].backend == "composed" else LIMIT
        y = ops.mamba_inner_step(**tensors, **options, backend=backend)
        assert y.dtype == tensors["xz"].dtype
        assert_close("y", y, y_want, limits[y.dtype])
        assert torch.equal(tensors["conv_state"].double().cpu(), conv_want)       # inputs are moved, not computed
        if ssm_want is not None:
            state = tensors["ssm_state"]
            assert_close("ssm_state", state, ssm_want, max(limits[y.dtype], LIMIT[state.dtype]))
        tensors["xz"] = torch.randn_like(tensors["xz"])
        if "cache_seqlens" in options:
            options["cache_seqlens"] += 1


@pytest.mark.parametrize(("backend", "device"), implementations("mamba_inner_step"))
@pytest.mark.parametrize("dtype", list(LIMIT))
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_step_is_the_composition_of_the_references(layout, dtype, backend, device, poisoned_allocator):
    check(*make_inputs(**LAYOUTS[layout], dtype=dtype, device=device), backend)


@pytest.mark.parametrize(("backend", "device"), implementations("mamba_inner_step"))
@pytest.mark.parametrize("layout", ["dense", "odd", "groups"])
@pytest.mark.parametrize("case", [
    {"has_bias": False}, {"kept": 4}, {"kept": 7}, {"batch": 1}, {"batch": 4},
    {"state_dtype": torch.bfloat16}, {"state_dtype": torch.float16}, {"slots": (3, -1, 0, 5)}, {"seen": (0, 2, 7)},
    {"seen": (5, 1, 0), "slots": (2, 0, -1), "kept": 5}], ids=str)
def test_every_option_of_a_step(case, layout, backend, device, poisoned_allocator):
    check(*make_inputs(**LAYOUTS[layout], **case, device=device), backend)


@pytest.mark.parametrize(("backend", "device"), implementations("mamba_inner_step"))
@pytest.mark.parametrize("case", [{"has_bias": False}, {"kept": 4}, {"batch": 1}, {"slots": (1, -1), "seen": (4, 4)}],
                         ids=str)
def test_every_option_of_a_step_without_an_ssm(case, backend, device, poisoned_allocator):
    check(*make_inputs(**LAYOUTS["removed SSM"], **case, device=device), backend)


@pytest.mark.parametrize(("backend", "device"), implementations("mamba_inner_step"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_layer_is_split_alike(dtype, backend, device):
    check(*make_inputs(1536, 16, 48, batch=3, dtype=dtype, device=device), backend)
    check(*make_inputs(5120, 16, 160, batch=1, dtype=dtype, device=device), backend)


@pytest.mark.parametrize(("backend", "device"), implementations("mamba_inner_step"))
@pytest.mark.parametrize("layout", ["dense", "odd"])
def test_inputs_may_lie_at_any_distance(layout, backend, device):
    tensors, options = make_inputs(**LAYOUTS[layout], device=device)
    for name in ("xz", "conv_state", "ssm_state", "conv_weight", "x_proj_weight", "dt_proj_weight", "dt_bias", "A",
                 "D"):
        apart = torch.full((*tensors[name].shape, 2), math.nan, device=device)[..., 0]
        tensors[name] = apart.copy_(tensors[name])
    check(tensors, options, backend)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_large_batch(device):
    check(*make_inputs(**LAYOUTS["groups"], batch=11, device=device), None)


@pytest.mark.parametrize("layout", ["groups", "removed SSM"])
def test_a_float64_step_is_composed(layout):
    tensors, options = make_inputs(**LAYOUTS[layout])
    tensors = {name: None if value is None else value.double() for name, value in tensors.items()}
    y_want, conv_want, ssm_want = expected(tensors, **options)
    y = ops.mamba_inner_step(**tensors, **options)
    for got, want in ((y, y_want), (tensors["conv_state"], conv_want), (tensors["ssm_state"], ssm_want)):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_step_continues_mamba_inner():
    tensors, _ = make_inputs(**LAYOUTS["dense"], batch=1)
    tensors["conv_state"].zero_()
    tensors["ssm_state"].zero_()
    xz = torch.randn(1, 9, 256)
    t = tensors
    want = ops.mamba_inner_fn(xz.transpose(1, 2), t["conv_weight"][:, None], t["conv_bias"], t["x_proj_weight"],
                              t["dt_proj_weight"], torch.eye(128), None, t["A"], D=t["D"], delta_bias=t["dt_bias"])
    got = torch.stack([ops.mamba_inner_step(**{**tensors, "xz": token}) for token in xz.unbind(1)], dim=1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_explain_names_the_kernel_or_the_parts_of_a_composition():
    tensors, options = make_inputs(**LAYOUTS["dense"])
    before = tensors["ssm_state"].clone()
    decisions = ops.explain(ops.mamba_inner_step, **tensors, **options)
    assert torch.equal(tensors["ssm_state"], before)
    if unavailable("cpu") is None:
        assert [(one.op, one.backend) for one in decisions] == [("mamba_inner_step", "cpu")]
    wide = {name: None if value is None else value.double() for name, value in tensors.items()}
    decisions = ops.explain(ops.mamba_inner_step, **wide, **options)
    assert [one.op for one in decisions] == ["mamba_inner_step", "causal_conv1d_update", "state_update"]
    assert decisions[0].backend == "composed"
    assert "cpu" in decisions[0].rejected


@pytest.mark.parametrize(("change", "message"), [
    ({"xz": torch.zeros(2, 7)}, r"xz has shape \(2, 7\); accepted: \(B, 2D\)"),
    ({"ssm_state": torch.zeros(2, 90, 7)}, r"ssm_state has shape \(2, 90, 7\)"),
    ({"conv_state": torch.zeros(2, 90, 2)}, r"conv_state has shape \(2, 90, 2\); accepted: .* K >= 3"),
    ({"conv_state": torch.zeros(2, 90, 3, dtype=torch.bfloat16)}, "conv_state is torch.bfloat16; accepted"),
    ({"x_proj_weight": torch.zeros(42, 90)}, "x_proj_weight has 42 rows; accepted: R"),
    ({"x_proj_weight": torch.zeros(41, 90, dtype=torch.float16)}, "x_proj_weight is torch.float16; accepted"),
    ({"dt_proj_weight": torch.zeros(90)}, r"dt_proj_weight has shape \(90,\); accepted: \(D, R\)"),
    ({"dt_bias": None}, "dt_bias is a NoneType"),
    ({"A": None}, "ssm_state is given, but A is None"),
    ({"D": torch.zeros(4)}, r"D has shape \(4,\)"),
    ({"channel_to_group": (0, 1, 3) * 30}, r"channel_to_group has value 3 but B has 3 groups"),
    ({"channel_to_group": (0, 1)}, "channel_to_group has 2 entries"),
    ({"A": torch.zeros(90, 6, dtype=torch.float64)}, "A is torch.float64 but xz is torch.float32"),
    ({"state_batch_indices": torch.tensor([0, 2])}, "state_batch_indices has value 2 but conv_state has 2 slots"),
    ({"cache_seqlens": torch.zeros(3, dtype=torch.int32)}, r"cache_seqlens has shape \(3,\)"),
    ({"backend": "gpu"}, "backend is 'gpu'"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_errors_name_the_argument(change, message):
    tensors, options = make_inputs(**LAYOUTS["groups"])
    before = tensors["conv_state"].clone()
    with pytest.raises(ValueError, match=message):
        ops.mamba_inner_step(**{**tensors, **options, **change})
    assert torch.equal(tensors["conv_state"], before)


@pytest.mark.parametrize(("backend", "device"), implementations("mamba_inner_step"))
def test_step_passes_opcheck(backend, device):
    tensors, options = make_inputs(**LAYOUTS["groups"], device=device)
    groups = torch.tensor(options["channel_to_group"], dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.shedder.mamba_inner_step.default,
                          (*tensors.values(), groups, None, None, backend or "auto"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["one kernel", "composed"])
def test_step_compiles_into_one_graph(dtype):
    tensors, options = make_inputs(**LAYOUTS["groups"])
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    y_want, conv_want, ssm_want = expected(tensors, **options)

    def step(**tensors: Tensor) -> Tensor:
        return ops.mamba_inner_step(**tensors, **options) * 2

    y = torch.compile(step, fullgraph=True, backend="aot_eager")(**tensors)
    torch.testing.assert_close(y.double(), y_want * 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tensors["conv_state"].double(), conv_want, rtol=0, atol=0)
    torch.testing.assert_close(tensors["ssm_state"].double(), ssm_want, rtol=1e-5, atol=1e-6)
