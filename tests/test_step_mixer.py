"""A whole Mamba-2 decode step is the composition of the specifications, on every backend that has it."""

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
# Outputs are rounded once to their dtype; the state and what passes between the parts is float32.
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
LAYOUTS = {
    "dense": {"heads": 4, "headdim": 16, "ngroups": 2, "dstate": 32},
    "odd": {"heads": 7, "headdim": 13, "ngroups": 1, "dstate": 101, "width": 3},
    "ragged": {"heads": 5, "headdim": 9, "ngroups": 3, "dstate": 6, "head_to_group": (2, 0, 0, 2, 0)},
    "one head of two groups": {"heads": 1, "headdim": 70, "ngroups": 2, "dstate": 5, "head_to_group": (1,), "width": 1},
    "removed SSM": {"heads": 5, "headdim": 13, "ngroups": 1, "dstate": 0},
    "segments": {"heads": 3, "headdim": 60, "ngroups": 1, "dstate": 17, "norm_segments": ((60, 1e-5), (120, 3e-6))},
}


def make_inputs(heads: int, headdim: int, ngroups: int, dstate: int, *, width: int = 4, batch: int = 2,
                row_padding: int = 0, kept: int | None = None, dtype: torch.dtype = torch.float32,
                state_dtype: torch.dtype = torch.float32, has_norm: bool = True, has_bias: bool = True,
                d_has_hdim: bool = False, norm_segments: Any = None, device: str = "cpu",
                seen: tuple[int, ...] = (), slots: tuple[int, ...] = (),
                **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and options of a call."""
    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    inner = heads * headdim
    channels = inner + 2 * ngroups * dstate
    steps = heads if dstate else 0
    kept = width - 1 if kept is None else kept
    batch = len(seen or slots) or batch
    states = max(slots) + 2 if slots else batch
    tensors = {
        "zxbcdt": rand(batch, inner + channels + steps + row_padding).to(dtype),
        "conv_state": rand(states, kept, channels).to(dtype).transpose(1, 2),         # as nn allocates it
        "ssm_state": rand(states, heads, headdim, dstate).to(state_dtype) if dstate else None,
        "conv_weight": (rand(channels, width) / 2).to(dtype),
        "conv_bias": rand(channels).to(dtype) if has_bias else None,
        "dt_bias": rand(heads) if dstate else None, "A": -rand(heads).exp() if dstate else None,
        "D": rand(heads, headdim) if d_has_hdim else rand(heads),
        "norm_weight": rand(inner).to(dtype) if has_norm else None,
    }
    if has_norm:
        options["norm_segments"] = norm_segments or ((inner, 1e-5),)
    for name, numbers in (("cache_seqlens", seen), ("state_batch_indices", slots)):
        if numbers:
            options[name] = torch.tensor(numbers, dtype=torch.int32, device=device)
    return tensors, {"headdim": headdim, "ngroups": ngroups, "dstate": dstate, "row_padding": row_padding, **options}


def expected(tensors: dict[str, Any], *, headdim: int, ngroups: int, dstate: int, row_padding: int,
             head_to_group: Any = None, norm_segments: Any = None, norm_before_gate: bool = True,
             dt_limit: tuple[float, float] = (0.0, math.inf), cache_seqlens: Tensor | None = None,
             state_batch_indices: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """y and both new states, composed from shedder.reference in float64."""
    t = {name: None if value is None else value.double().cpu() for name, value in tensors.items()}
    batch, heads = t["zxbcdt"].shape[0], t["D"].shape[0]
    if state_batch_indices is not None:                 # the rows that have a state, each with its own
        slots = state_batch_indices.cpu().long()
        rows = torch.nonzero(slots >= 0)[:, 0]
        own = {**tensors, "zxbcdt": t["zxbcdt"][rows]}
        for name in ("conv_state", "ssm_state"):
            own[name] = None if t[name] is None else t[name][slots[rows]]
        y = torch.zeros(batch, t["conv_weight"].shape[0] - 2 * ngroups * dstate, dtype=torch.float64)
        y[rows], conv_state, ssm_state = expected(
            own, headdim=headdim, ngroups=ngroups, dstate=dstate, row_padding=row_padding, head_to_group=head_to_group,
            norm_segments=norm_segments, norm_before_gate=norm_before_gate, dt_limit=dt_limit,
            cache_seqlens=None if cache_seqlens is None else cache_seqlens.cpu()[rows])
        t["conv_state"][slots[rows]] = conv_state
        if ssm_state is not None:
            t["ssm_state"][slots[rows]] = ssm_state
        return y, t["conv_state"], t["ssm_state"]
    inner, states = heads * headdim, ngroups * dstate
    z, xBC, dt, _ = t["zxbcdt"].split([inner, inner + 2 * states, heads if dstate else 0, row_padding], dim=-1)
    xBC, conv_state = reference.causal_conv1d_update(xBC[..., None], t["conv_state"], t["conv_weight"], t["conv_bias"],
                                                     "silu", cache_seqlens=None if cache_seqlens is None else
                                                     cache_seqlens.cpu())
    x, B, C = xBC[..., 0].split([inner, states, states], dim=-1)
    x, gate = x.view(batch, 1, heads, headdim), z.reshape(batch, 1, heads, headdim)
    if dstate:
        groups = torch.tensor(head_to_group or [head * ngroups // heads for head in range(heads)])
        y, ssm_state = reference.ssd(
            x, dt[:, None], t["A"], B.reshape(batch, 1, ngroups, dstate), C.reshape(batch, 1, ngroups, dstate),
            t["D"], gate if t["norm_weight"] is None else None, t["dt_bias"], True, dt_limit,
            head_to_group=groups, initial_states=t["ssm_state"])
    else:
        y, ssm_state = x * t["D"].view(heads, -1), None
        if t["norm_weight"] is None:
            y = y * gate * torch.sigmoid(gate)
    y = y.reshape(batch, inner)
    if t["norm_weight"] is not None:
        y = reference.gated_rmsnorm(y, t["norm_weight"], None, z, segments=[size for size, _ in norm_segments],
                                    eps=[eps for _, eps in norm_segments], norm_before_gate=norm_before_gate)
    return y, conv_state, ssm_state


def check(tensors: dict[str, Any], options: dict[str, Any], backend: str | None) -> None:
    """Some steps, each held to the reference from the state that the step before left."""
    for _ in range(STEPS):
        y_want, conv_want, ssm_want = expected(tensors, **options)
        y = ops.step_mixer(**tensors, **options, backend=backend)
        assert y.dtype == tensors["zxbcdt"].dtype
        assert_close("y", y, y_want, LIMIT[y.dtype])
        assert torch.equal(tensors["conv_state"].double().cpu(), conv_want)       # inputs are moved, not computed
        if ssm_want is not None:
            assert_close("ssm_state", tensors["ssm_state"], ssm_want, LIMIT[tensors["ssm_state"].dtype])
        tensors["zxbcdt"] = torch.randn_like(tensors["zxbcdt"])
        if "cache_seqlens" in options:
            options["cache_seqlens"] += 1


@pytest.mark.parametrize(("backend", "device"), implementations("step_mixer"))
@pytest.mark.parametrize("dtype", list(LIMIT))
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_step_is_the_composition_of_the_references(layout, dtype, backend, device, poisoned_allocator):
    check(*make_inputs(**LAYOUTS[layout], dtype=dtype, device=device), backend)


@pytest.mark.parametrize(("backend", "device"), implementations("step_mixer"))
@pytest.mark.parametrize("case", [
    {"has_norm": False}, {"has_norm": False, "d_has_hdim": True}, {"norm_before_gate": True},
    {"norm_before_gate": False}, {"dt_limit": (0.5, 0.9)}, {"dt_limit": (0.1, math.inf)}, {"d_has_hdim": True},
    {"has_bias": False}, {"row_padding": 5}, {"kept": 4}, {"batch": 1}, {"batch": 4},
    {"state_dtype": torch.bfloat16}, {"state_dtype": torch.float16}, {"slots": (3, -1, 0, 5)}, {"seen": (0, 2, 7)},
    {"seen": (5, 1, 0), "slots": (2, 0, -1), "kept": 5}, {"kept": 7}, {"kept": 1, "width": 2, "seen": (3,)}], ids=str)
def test_every_option_of_a_step(case, backend, device, poisoned_allocator):
    check(*make_inputs(**LAYOUTS["ragged"], **case, device=device), backend)


@pytest.mark.parametrize(("backend", "device"), implementations("step_mixer"))
@pytest.mark.parametrize("case", [
    {"has_norm": False}, {"has_norm": False, "d_has_hdim": True}, {"norm_before_gate": False}, {"d_has_hdim": True},
    {"has_bias": False}, {"row_padding": 5}, {"kept": 4}, {"heads": 1, "batch": 1}, {"heads": 40, "headdim": 64},
    {"norm_segments": ((60, 1e-5), (5, 3e-6))}, {"slots": (1, -1), "seen": (4, 4)}], ids=str)
def test_every_option_of_a_step_without_an_ssm(case, backend, device, poisoned_allocator):
    check(*make_inputs(**{**LAYOUTS["removed SSM"], **case}, device=device), backend)


@pytest.mark.parametrize(("backend", "device"), implementations("step_mixer"))
def test_a_large_layer_is_split_over_threads_alike(backend, device):
    check(*make_inputs(24, 64, 2, 128, batch=3, device=device), backend)


@pytest.mark.parametrize(("backend", "device"), implementations("step_mixer"))
def test_inputs_may_lie_at_any_distance(backend, device):
    tensors, options = make_inputs(**LAYOUTS["odd"], device=device)
    for name in ("zxbcdt", "conv_state", "ssm_state", "conv_weight", "A", "norm_weight"):
        apart = torch.full((*tensors[name].shape, 2), math.nan, device=device)[..., 0]
        tensors[name] = apart.copy_(tensors[name])
    check(tensors, options, backend)


@pytest.mark.parametrize("layout", ["ragged", "removed SSM"])
@pytest.mark.parametrize("has_norm", [True, False])
def test_a_float64_step_is_composed(layout, has_norm):
    tensors, options = make_inputs(**LAYOUTS[layout], has_norm=has_norm)
    tensors = {name: None if value is None else value.double() for name, value in tensors.items()}
    y_want, conv_want, ssm_want = expected(tensors, **options)
    y = ops.step_mixer(**tensors, **options)
    for got, want in ((y, y_want), (tensors["conv_state"], conv_want), (tensors["ssm_state"], ssm_want)):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_explain_names_the_kernel_or_the_parts_of_a_composition():
    tensors, options = make_inputs(**LAYOUTS["dense"])
    before = tensors["ssm_state"].clone()
    decisions = ops.explain(ops.step_mixer, **tensors, **options)
    assert torch.equal(tensors["ssm_state"], before)
    if unavailable("cpu") is None:
        assert [(one.op, one.backend) for one in decisions] == [("step_mixer", "cpu")]
    wide = {name: None if value is None else value.double() for name, value in tensors.items()}
    decisions = ops.explain(ops.step_mixer, **wide, **options)
    assert [one.op for one in decisions] == ["step_mixer", "causal_conv1d_update", "state_update", "gated_rmsnorm"]
    assert decisions[0].backend == "composed"
    assert {one.backend for one in decisions[1:]} == {"reference"}
    assert "cpu" in decisions[0].rejected


def test_weights_of_another_dtype_than_the_inputs():
    tensors, options = make_inputs(**LAYOUTS["ragged"])
    for name in ("conv_weight", "conv_bias", "norm_weight"):
        tensors[name] = tensors[name].to(torch.bfloat16)
    check(tensors, options, None)


def test_a_backend_without_the_kernel_is_asked_for_its_parts():
    tensors, options = make_inputs(**LAYOUTS["dense"])
    with pytest.raises(ValueError, match="backend='triton' cannot run causal_conv1d_update"):
        ops.step_mixer(**tensors, **options, backend="triton")


@pytest.mark.parametrize(("change", "message"), [
    ({"zxbcdt": torch.zeros(2, 7)}, r"zxbcdt has shape \(2, 7\)"),
    ({"ssm_state": torch.zeros(2, 5, 9, 7)}, r"ssm_state has shape \(2, 5, 9, 7\)"),
    ({"conv_state": torch.zeros(2, 81, 2)}, r"conv_state has shape \(2, 81, 2\); accepted: .* K >= 3"),
    ({"conv_state": torch.zeros(2, 81, 3, dtype=torch.bfloat16)}, "conv_state is torch.bfloat16; accepted"),
    ({"D": torch.zeros(4)}, r"D has shape \(4,\); accepted: \(H,\) or \(H, P\) = \(5,\) or \(5, 9\)"),
    ({"dstate": 0}, r"zxbcdt has shape \(2, 131\); accepted: \(B, 2HP \+ row_padding\)"),
    ({"dstate": 0, "zxbcdt": torch.zeros(2, 90)}, "ssm_state is given, but dstate is 0"),
    ({"ssm_state": None}, "ssm_state"),
    ({"norm_weight": None}, "norm_weight is None and norm_segments is"),
    ({"norm_segments": ((44, 1e-5),)}, "norm_segments is .* add up to HP = 45"),
    ({"head_to_group": (0, 1, 2, 3, 0)}, r"head_to_group has value 3 but B has 3 groups"),
    ({"head_to_group": torch.tensor([0, 1, 2, 3, 0])}, r"head_to_group has value 3 but B has 3 groups"),
    ({"head_to_group": (0, 1)}, "head_to_group has 2 entries"),
    ({"A": torch.zeros(5, dtype=torch.float64)}, "A is torch.float64 but zxbcdt is torch.float32"),
    ({"dt_limit": (2.0, 1.0)}, "dt_limit is"),
    ({"state_batch_indices": torch.tensor([0, 2])}, "state_batch_indices has value 2 but conv_state has 2 slots"),
    ({"state_batch_indices": torch.tensor([0.0, 1.0])}, "state_batch_indices is torch.float32"),
    ({"state_batch_indices": torch.tensor([1])}, r"state_batch_indices has shape \(1,\)"),
    ({"state_batch_indices": torch.tensor([0, 1]), "conv_state": torch.zeros(3, 81, 3)}, "conv_state has shape"),
    ({"cache_seqlens": torch.zeros(3, dtype=torch.int32)}, r"cache_seqlens has shape \(3,\)"),
    ({"backend": "gpu"}, "backend is 'gpu'"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_errors_name_the_argument(change, message):
    tensors, options = make_inputs(**LAYOUTS["ragged"])
    before = tensors["conv_state"].clone()
    with pytest.raises(ValueError, match=message):
        ops.step_mixer(**{**tensors, **options, **change})
    assert torch.equal(tensors["conv_state"], before)


def test_a_checked_call_does_not_vouch_for_another():
    tensors, options = make_inputs(**LAYOUTS["ragged"])
    ops.step_mixer(**tensors, **options)
    with pytest.raises(ValueError, match="ssm_state"):
        ops.step_mixer(**{**tensors, "ssm_state": torch.zeros(1, 5, 9, 6)}, **options)
    with pytest.raises(ValueError, match="zxbcdt"):
        ops.step_mixer(**tensors, **{**options, "row_padding": 1})


@pytest.mark.parametrize(("backend", "device"), implementations("step_mixer"))
def test_step_passes_opcheck(backend, device):
    tensors, options = make_inputs(**LAYOUTS["ragged"], device=device)
    groups = torch.tensor(options["head_to_group"], dtype=torch.int32, device=device)
    sizes, eps = zip(*options["norm_segments"], strict=True)
    torch.library.opcheck(torch.ops.shedder.step_mixer.default, (
        *tensors.values(), options["ngroups"], groups, list(sizes), list(eps), False, 0.0, math.inf, None, None,
        backend or "auto"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["one kernel", "composed"])
def test_step_compiles_into_one_graph(dtype):
    tensors, options = make_inputs(**LAYOUTS["ragged"])
    tensors = {name: None if value is None else value.to(dtype) for name, value in tensors.items()}
    y_want, conv_want, ssm_want = expected(tensors, **options)

    def step(**tensors: Tensor) -> Tensor:
        return ops.step_mixer(**tensors, **options) * 2

    y = torch.compile(step, fullgraph=True, backend="aot_eager")(**tensors)
    torch.testing.assert_close(y.double(), y_want * 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tensors["conv_state"].double(), conv_want, rtol=0, atol=0)
    torch.testing.assert_close(tensors["ssm_state"].double(), ssm_want, rtol=1e-5, atol=1e-6)
