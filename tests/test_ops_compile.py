"""The ops as torch sees them: opcheck, torch.compile without a graph break, gradients through it, explain."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from shedder import ops
from shedder.ops.backend import ORDER

# importing shedder.ops registers torch.ops.shedder


def rand(*shape: int, grad: bool = True, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def negative(*shape: int) -> torch.Tensor:
    return (-torch.rand(*shape)).requires_grad_()


MAP = torch.tensor([1, 0, 1], dtype=torch.int32)
SEQ = torch.tensor([[0, 0, 1, 1, 1, -1]] * 2, dtype=torch.int32)

CASES = {
    "selective_scan": lambda: (rand(2, 3, 6), rand(2, 3, 6), negative(3, 4), rand(2, 2, 4, 6), rand(2, 2, 4, 6),
                               rand(3), rand(2, 3, 6), rand(3), True, rand(2, 3, 4), MAP, SEQ, True, "reference"),
    "selective_scan_plain": lambda: (rand(2, 6, 3).transpose(1, 2), rand(2, 3, 6), negative(3, 4), rand(2, 1, 4, 6),
                                     rand(3, 4), None, None, None, False, None, None, None, False,
                                     "auto"),
    "ssd": lambda: (rand(2, 6, 3, 4), rand(2, 6, 3), negative(3), rand(2, 6, 2, 5), rand(2, 6, 2, 5), rand(3, 4),
                    rand(2, 6, 3, 4), rand(3), True, 0.01, 2.0, MAP, rand(2, 3, 4, 5), SEQ, True, "reference"),
    "ssd_plain": lambda: (rand(2, 6, 3, 4), rand(2, 6, 3), negative(3), rand(2, 6, 1, 5), rand(2, 6, 1, 5), None,
                          None, None, False, 0.0, float("inf"), torch.zeros(3, dtype=torch.int32), None, None,
                          False, "auto"),
    "state_update": lambda: (rand(4, 3, 2, 5, grad=False), rand(2, 3, 2, grad=False), rand(2, 3, 2, grad=False),
                             -torch.rand(3, 2, 5), rand(2, 2, 5, grad=False), rand(2, 2, 5, grad=False),
                             torch.ones(3, 2), None, None, True, MAP, torch.tensor([3, -1], dtype=torch.int32), "auto"),
    "causal_conv1d": lambda: (rand(2, 3, 6), rand(3, 4), rand(3), True, rand(2, 3, 3), SEQ, True, "reference"),
    "causal_conv1d_channel_last": lambda: (torch.randn(2, 6, 9)[..., 2:5].transpose(1, 2), rand(3, 4), None, False,
                                           None, None, False, "auto"),
    "causal_conv1d_update": lambda: (rand(2, 3, 1, grad=False), rand(4, 3, 4, grad=False), rand(3, 4, grad=False), None,
                                     True, None, torch.tensor([3, -1], dtype=torch.int32), "auto"),
    "removed_ssm": lambda: (rand(2, 6, 12), rand(2, 6, 12), rand(12, 4), rand(12), rand(3, 4), rand(12), [4, 8],
                            [1e-5, 1e-2], False, rand(2, 12, 3), "reference"),
    "gated_rmsnorm": lambda: (rand(2, 3, 7), rand(7), rand(7), rand(2, 3, 7), [3, 4], [1e-5, 1e-2], False, "reference"),
}


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case):
    name = case.removesuffix("_plain").removesuffix("_channel_last")
    torch.library.opcheck(getattr(torch.ops.shedder, name).default, CASES[case]())


def whole_mixer(zxbcdt, conv_weight, dt_bias, A, D, norm_weight, out_weight):
    out, states = ops.mamba_split_conv1d_scan_combined(
        zxbcdt, conv_weight, None, dt_bias, A, D, 64, rmsnorm_weight=norm_weight, outproj_weight=out_weight, headdim=4,
        ngroups=2, norm_before_gate=False, head_to_group=(0, 1, 1), norm_segments=[(4, 1e-5), (8, 1e-5)],
        return_final_states=True)
    return out.sum() + states.square().sum()


def whole_mamba1(xz, conv_weight, x_proj, dt_proj, out_proj, A, D):
    return ops.mamba_inner_fn(xz, conv_weight, None, x_proj, dt_proj, out_proj, None, A, D=D).square().sum()


GRAPHS = {
    "mamba2": (whole_mixer, lambda: (rand(2, 9, 2 * 12 + 20 + 3), rand(32, 4), rand(3), negative(3), rand(3), rand(12),
                                     rand(6, 12))),
    "mamba1": (whole_mamba1, lambda: (rand(2, 6, 9), rand(3, 1, 4), rand(10, 3), rand(3, 2), rand(5, 3),
                                      negative(3, 4), rand(3))),
}


@pytest.mark.parametrize(("graph", "compiler"), [
    ("mamba1", "eager"), ("mamba1", "aot_eager"), ("mamba2", "eager"), ("mamba2", "aot_eager"),
    pytest.param("mamba2", "inductor", marks=pytest.mark.slow)])
def test_compiled_training_is_eager_training(graph, compiler):
    function, make = GRAPHS[graph]
    inputs = make()
    torch._dynamo.reset()
    loss = torch.compile(function, fullgraph=True, backend=compiler)(*inputs)
    grads = torch.autograd.grad(loss, inputs)
    expected = function(*inputs)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(grads, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def decode_step(state, conv_state, x, dt, A, B, C):
    x = ops.causal_conv1d_update(x, conv_state, torch.ones(6, 4) / 4, None, "silu")
    return ops.selective_state_update(state, x, dt, A, B, C, dt_softplus=True, head_to_group=(0, 1, 1, 0, 1, 0))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_step_moves_the_state_in_place(compiler):
    state, conv_state = torch.zeros(2, 6, 5), torch.zeros(2, 6, 4)
    states = state.clone(), conv_state.clone()
    inputs = (torch.randn(2, 6), torch.randn(2, 6), -torch.rand(6, 5), torch.randn(2, 2, 5), torch.randn(2, 2, 5))
    torch._dynamo.reset()
    compiled = torch.compile(decode_step, fullgraph=True, backend=compiler)
    for _ in range(2):
        torch.testing.assert_close(compiled(state, conv_state, *inputs), decode_step(*states, *inputs))
    torch.testing.assert_close((state, conv_state), states)
    assert state.any()


def test_a_bad_argument_raises_under_compile_too():
    torch._dynamo.reset()
    compiled = torch.compile(ops.rmsnorm_fn, backend="eager")
    with pytest.raises(ValueError, match="weight has shape"):
        compiled(torch.randn(2, 7), torch.ones(6), None)


def test_a_map_used_in_inference_mode_can_train_later():
    inputs = (rand(1, 5, 3, 4), rand(1, 5, 3), negative(3), rand(1, 5, 2, 5), rand(1, 5, 2, 5), 64)
    with torch.inference_mode():
        ops.mamba_chunk_scan_combined(*inputs, head_to_group=[1, 1, 0])
    ops.mamba_chunk_scan_combined(*inputs, head_to_group=[1, 1, 0]).sum().backward()
    assert inputs[0].grad is not None


def test_only_inputs_are_kept_for_the_gradient():
    kept = []
    x = rand(1, 50, 3, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.mamba_chunk_scan_combined(x, rand(1, 50, 3), negative(3), rand(1, 50, 1, 5), rand(1, 50, 1, 5), 64)
    assert {t.numel() for t in kept} == {600, 150, 3, 250}


def test_explain_tells_of_every_op_in_a_call():
    _, make = GRAPHS["mamba2"]
    zxbcdt, conv_weight, dt_bias, A, D, norm_weight, _ = make()
    arguments = {"rmsnorm_weight": norm_weight, "headdim": 4, "ngroups": 2, "head_to_group": (0, 1, 1),
                 "norm_segments": [(4, 1e-5), (8, 1e-5)]}
    for op in (ops.mamba_split_conv1d_scan_combined, "mamba_split_conv1d_scan_combined"):
        decisions = ops.explain(op, zxbcdt, conv_weight, None, dt_bias, A, D, 64, **arguments)
        assert [decision.op for decision in decisions] == ["causal_conv1d", "ssd", "gated_rmsnorm"]
        for decision in decisions:
            assert decision.backend in ORDER["cpu"]
            assert set(decision.rejected) == {"cuda", "triton", "cpu", "reference"} - {decision.backend}
            assert all(decision.rejected.values())
            assert decision.op in decision.kernel
            assert str(decision).startswith(f"{decision.op}: {decision.backend} (")
    ops.mamba_split_conv1d_scan_combined(zxbcdt, conv_weight, None, dt_bias, A, D, 64, **arguments)


@pytest.mark.filterwarnings("error")
def test_explain_leaves_states_alone():
    state = torch.zeros(2, 6, 5)
    x = 2 * rand(2, 6)                                   # no leaf: torch warns where its .grad is looked at
    decisions = ops.explain("selective_state_update", state, x, x, -torch.ones(6, 5),
                            torch.ones(2, 5), torch.ones(2, 5))
    assert [decision.op for decision in decisions] == ["state_update"]
    assert not state.any()


def test_explain_takes_facts_alone():
    decision, = ops.explain("ssd", dtype=torch.float64, headdim=61)
    assert decision.backend == "reference"
    decision, = ops.explain("ssd", length=0)
    assert decision.rejected["cpu"] == "there is nothing to compute"
    with pytest.raises(ValueError, match="op is 'sdd'; accepted"):
        ops.explain("sdd")
    with pytest.raises(ValueError, match="backend='triton' cannot run ssd: "):
        ops.explain("ssd", backend="triton", dtype=torch.float64)


def test_importing_the_ops_is_quiet_and_touches_no_gpu():
    code = "import torch, shedder.ops; assert not torch.cuda.is_initialized()"
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
