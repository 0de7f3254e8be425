"""Language models with a layout per layer: any split of a text, probes, dtypes, training."""

import copy
import math

import pytest
import torch

from shedder.layout import LayoutError, NormSegment, RemovedBlock, RemovedSSM, ScanLayout, SSDLayout
from shedder.nn import LanguageModel, ModelConfig, PassThrough, build_block

VOCAB, BATCH, LENGTH = 50, 3, 11


def segments(*channels):
    return tuple(NormSegment(c, 1e-5 * (i + 1)) for i, c in enumerate(channels))


RAGGED = SSDLayout(headdim=8, dstate=12, ngroups=2, head_to_group=(1, 0, 1, 1, 0), norm_segments=segments(16, 24),
                   row_padding=3)
SSD_LAYERS = (RAGGED, RemovedSSM(nheads=3, headdim=8, norm_segments=segments(24)), RemovedBlock(),
              SSDLayout(headdim=5, dstate=7, ngroups=1, head_to_group=(0, 0, 0), conv_width=2, mlp_channels=6),
              RemovedSSM(nheads=2, headdim=4, mlp_channels=3, gain=False))
SCAN_LAYERS = (ScanLayout(d_inner=20, dstate=8, dt_rank=3), RemovedSSM(nheads=13, headdim=1, conv_width=3),
               RemovedBlock(), ScanLayout(d_inner=13, dstate=5, dt_rank=2, conv_width=3,
                                          channel_to_group=tuple(c % 2 for c in range(13))),
               RemovedSSM(nheads=7, headdim=1, gain=False))


def config(family, **changes):
    layers = SSD_LAYERS if family == "mamba2" else SCAN_LAYERS
    return ModelConfig(**{"family": family, "d_model": 24, "vocab_size": VOCAB, "layers": layers, **changes})


CONFIGS = {
    "mamba2": config("mamba2"),
    "mamba1": config("mamba1"),
    "mamba2-options": config("mamba2", d_has_hdim=True, dt_limit=(0.01, 0.05), norm_before_gate=True, proj_bias=True,
                             conv_bias=False, tie_embeddings=False),
    "mamba1-options": config("mamba1", proj_bias=True, conv_bias=False, tie_embeddings=False,
                             residual_in_fp32=False),
    "all removed": config("mamba2", layers=(RemovedBlock(), RemovedBlock())),
    "one tap": config("mamba1", layers=(ScanLayout(d_inner=6, dstate=3, dt_rank=1, conv_width=1),
                                        RemovedSSM(nheads=6, headdim=1, conv_width=1))),
}


@pytest.fixture(params=CONFIGS, name="model")
def _model(request):
    return build(CONFIGS[request.param])


def build(model_config, dtype=torch.float64):
    torch.manual_seed(0)
    model = LanguageModel(model_config, dtype=dtype).eval()
    with torch.no_grad():                               # fresh norms and gains are constant
        for name, parameter in model.named_parameters():
            if name.endswith((".D", "norm.weight", "conv1d.bias")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens(length=LENGTH):
    return torch.randint(0, VOCAB, (BATCH, length), generator=torch.Generator().manual_seed(1))


def set_probe(model, probe):
    for mixer in model.mixers:
        if mixer is not None:
            mixer.probe = probe


def in_parts(model, ids, split):
    state = model.allocate_state(ids.shape[0])
    return torch.cat([model(part, state) for part in ids.split(split, dim=1)], dim=1), state


SPLITS = ([LENGTH], [1] * LENGTH, [4, 7], [5, 1, 1, 1, 3], [2, 2, 7])


@torch.no_grad()
@pytest.mark.parametrize("probed", [False, True])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_any_split_of_a_text_gives_the_same_logits_and_state(model, split, probed):
    ids = tokens()
    expected = model(ids)
    _, whole = in_parts(model, ids, [LENGTH])
    if probed:
        set_probe(model, lambda name, activation: activation)
    logits, state = in_parts(model, ids, split)
    assert (logits - expected).abs().max() < 1e-12
    for mine, reference in zip(state.tensors(), whole.tensors(), strict=True):
        assert (mine - reference).abs().max() < 1e-12 if mine.numel() else True


@torch.no_grad()
def test_last_only_is_the_last_of_all(model):
    assert torch.allclose(model(tokens(), last_only=True), model(tokens())[:, -1:], atol=1e-14)


@torch.no_grad()
def test_rows_of_a_batch_do_not_meet(model):
    ids = tokens()
    for row in range(BATCH):
        assert (model(ids[row:row + 1]) - model(ids)[row]).abs().max() < 1e-12


def test_a_removed_block_keeps_its_index_and_has_no_parameters():
    model = build(CONFIGS["mamba2"])
    assert isinstance(model.layers[2], PassThrough)
    assert not list(model.layers[2].parameters())
    assert model.mixers[2] is None
    assert model.allocate_state(2).layers[2] is None
    assert any(name.startswith("backbone.layers.3.mixer") for name, _ in model.named_parameters())


def test_a_removed_ssm_has_no_state_and_no_rows_for_it():
    model = build(CONFIGS["mamba2"])
    mixer, state = model.mixers[1], model.allocate_state(2).layers[1]
    assert state.ssm is None
    assert state.conv.shape == (2, 24, 3)
    assert mixer.in_proj.weight.shape == (48, 24)
    assert {name for name, _ in mixer.named_parameters()} == {
        "in_proj.weight", "conv1d.weight", "conv1d.bias", "D", "norm.weight", "out_proj.weight"}


def test_parameters_and_state_have_the_sizes_of_the_layout():
    for layers, family in ((SSD_LAYERS, "mamba2"), (SCAN_LAYERS, "mamba1")):
        model = build(config(family))
        for layout, mixer, state in zip(layers, model.mixers, model.allocate_state(2).layers, strict=True):
            if mixer is None:
                continue
            assert mixer.in_proj.weight.shape == (layout.in_proj_rows, 24)
            assert mixer.conv1d.weight.shape == (layout.conv_channels, 1, layout.conv_width)
            assert state.conv.shape == (2, layout.conv_channels, layout.conv_width - 1)
            assert (0 if state.ssm is None else state.ssm[0].numel()) == layout.state_elements


SHAPES = {
    "mamba2": {"x": (5, 8), "B": (2, 12), "C": (2, 12), "dt": (5,), "y": (5, 8), "gated": (40,),
               "inner": (40,), "out": (24,)},
    "mamba1": {"x": (20,), "B": (2, 8), "C": (2, 8), "dt": (20,), "y": (20,), "gated": (20,), "inner": (20,),
               "out": (24,)},
}


@torch.no_grad()
@pytest.mark.parametrize("split", [[LENGTH], [6] + [1] * 5], ids=str)
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_the_probe_sees_every_activation_in_its_shape(family, split):
    model = build(config(family))
    seen = {}
    model.mixers[0].probe = lambda name, t: seen.setdefault(name, []).append(t) or t
    in_parts(model, tokens(), split)
    assert set(seen) == set(SHAPES[family])
    for name, parts in seen.items():
        for part, length in zip(parts, split, strict=True):
            expected = (BATCH, length, *SHAPES[family][name])
            if family == "mamba1" and name in ("x", "dt", "y"):
                expected = (BATCH, 20, length)
            if family == "mamba1" and name in ("B", "C"):
                expected = (BATCH, 1, 8, length)
            assert part.shape == expected, name


@torch.no_grad()
@pytest.mark.parametrize("name", ["x", "B", "C", "dt", "y", "gated", "inner", "out"])
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_the_probe_can_edit_every_activation(family, name):
    """An edit changes the logits, and by the same amount in steps as in prefill."""
    model, ids = build(config(family)), tokens()
    plain = model(ids)
    model.mixers[0].probe = lambda seen, t: 0.5 * t if seen == name else t
    edited = model(ids)
    assert (edited - plain).abs().max() > 1e-9
    assert (in_parts(model, ids, [3] + [1] * 8)[0] - edited).abs().max() < 1e-12


@torch.no_grad()
def test_zero_y_leaves_nothing_of_a_mixer():
    """The probe's y includes the D skip: with y = 0, no MLP beside it and no biases a mixer's output is 0."""
    for family in ("mamba1", "mamba2"):
        model = build(config(family))
        outputs = []
        set_probe(model, lambda name, t, out=outputs: (out.append(t) or t) if name == "out" else
                  torch.zeros_like(t) if name in ("y", "mlp") else t)
        model(tokens())
        assert len(outputs) == 4
        assert all(not out.any() for out in outputs)


@torch.no_grad()
def test_row_padding_is_never_seen():
    model, ids = build(CONFIGS["mamba2"]), tokens()
    expected = model(ids)
    model.mixers[0].in_proj.weight[-RAGGED.row_padding:] = math.nan
    assert torch.equal(model(ids), expected)
    assert not in_parts(model, ids, [1] * LENGTH)[0].isnan().any()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_leaves_decay_gain_and_step_bias_in_fp32(half):
    for name in ("mamba1", "mamba2"):
        model = build(CONFIGS[name], torch.float32)
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        model.to(half)
        for key, parameter in model.named_parameters():
            is_wide = key.endswith(("A_log", ".D", "dt_bias", "dt_proj.bias"))
            assert parameter.dtype == (torch.float32 if is_wide else half), key
            if is_wide:
                assert torch.equal(parameter, before[key])
        assert model.to(torch.float64).mixers[0].A_log.dtype == torch.float64
        assert model.to(half).mixers[0].A_log.dtype == torch.float32
        created = LanguageModel(CONFIGS[name], dtype=half)
        assert {k: p.dtype for k, p in created.named_parameters()} == {k: p.dtype for k, p in model.named_parameters()}


@torch.no_grad()
def test_bfloat16_logits_are_near_in_prefill_and_steps():
    for name in ("mamba1", "mamba2"):
        model, ids = build(CONFIGS[name]), tokens()
        expected = model(ids)
        model.bfloat16()
        scale = expected.square().mean().sqrt()
        for logits in (model(ids), in_parts(model, ids, [4] + [1] * 7)[0]):
            # A few bf16 roundings (2^-9 each) per layer.
            assert (logits.double() - expected).square().mean().sqrt() < 0.03 * scale


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ssm_states_may_be_smaller_than_fp32(dtype):
    model, ids = build(CONFIGS["mamba2"], torch.float32), tokens()
    state = model.allocate_state(BATCH, dtype=dtype)
    logits = torch.cat([model(part, state) for part in ids.split([5, *[1] * 6], dim=1)], dim=1)
    assert state.layers[0].ssm.dtype == dtype
    assert (logits - model(ids)).abs().max() < 0.05 * model(ids).abs().max()


@torch.no_grad()
def test_constants_follow_their_parameters():
    """A = -exp(A_log) is kept between inference calls; a changed A_log must not meet an old A."""
    for name in ("mamba1", "mamba2"):
        model, ids = build(CONFIGS[name]), tokens()
        before = model(ids)
        model.mixers[0].A_log.add_(0.5)
        model.mixers[1].D.add_(0.5)
        fresh = build(CONFIGS[name])
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(model(ids), fresh(ids))
        assert not torch.equal(model(ids), before)
        twin = copy.deepcopy(model)
        twin.mixers[0].A_log.sub_(0.5)
        twin.mixers[1].D.sub_(0.5)
        assert (twin(ids) - before).abs().max() < 1e-12
        assert torch.equal(model(ids), fresh(ids))


def test_every_parameter_gets_a_gradient_and_an_optimiser_step_lowers_the_loss():
    for name in ("mamba1", "mamba2", "mamba2-options"):
        model, ids = build(CONFIGS[name], torch.float32).train(), tokens()

        def loss(model=model, ids=ids):
            return torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        before = loss()
        before.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimiser.step()
        assert loss() < before


def test_gradients_flow_with_a_state_but_not_into_the_past():
    model, ids = build(CONFIGS["mamba2"]), tokens()
    state = model.allocate_state(BATCH)
    model(ids[:, :6], state)
    assert not any(tensor.requires_grad for tensor in state.tensors())
    model(ids[:, 6:], state).sum().backward()
    assert model.mixers[0].A_log.grad.abs().sum() > 0


@torch.no_grad()
def test_new_models_start_as_mamba_ssm_does():
    torch.manual_seed(0)
    model = LanguageModel(config("mamba2", layers=(SSDLayout(headdim=4, dstate=8, ngroups=1,
                                                             head_to_group=(0,) * 200),)))
    mixer = model.mixers[0]
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert 0.0009 < dt.min() < 0.002
    assert 0.05 < dt.max() < 0.11
    A = mixer.A_log.exp()
    assert 1 <= A.min() < 2
    assert 15 < A.max() <= 16
    assert model.backbone.embedding.weight.std() == pytest.approx(0.02, rel=0.1)
    scan = LanguageModel(CONFIGS["mamba1"]).mixers[0]
    assert torch.allclose(scan.A_log.exp(), torch.arange(1.0, 9.0).expand(20, 8))


@torch.no_grad()
def test_blocks_can_be_run_one_by_one(model):
    """What search builds on: embed, blocks, head; a block built alone is the block of the model."""
    ids = tokens()
    hidden, residual = model.embed(ids), None
    for index, layer in enumerate(model.layers):
        alone = build_block(model.config, index, dtype=torch.float64)
        alone.load_state_dict(layer.state_dict())
        inputs = hidden.clone(), None if residual is None else residual.clone()
        expected = layer(hidden, residual)
        for got, want in zip(alone(*inputs), expected, strict=True):
            assert got is want is None or torch.equal(got, want)
        assert torch.equal(hidden, inputs[0])           # inputs may be cached by the caller
        hidden, residual = expected
    assert torch.equal(model.head(hidden, residual), model(ids))


@torch.no_grad()
def test_the_residual_is_fp32_when_asked():
    for in_fp32 in (True, False):
        model = build(config("mamba2", residual_in_fp32=in_fp32)).bfloat16()
        _, residual = model.layers[0](model.embed(tokens()), None)
        assert residual.dtype == (torch.float32 if in_fp32 else torch.bfloat16)


@pytest.mark.parametrize(("ids", "message"), [
    (torch.zeros(3, dtype=torch.int64), r"input_ids is torch.int64 of shape \(3,\)"),
    (torch.zeros(1, 3), r"input_ids is torch.float32"),
    (torch.zeros(1, 0, dtype=torch.int64), r"length >= 1"),
    (torch.full((1, 3), VOCAB), rf"values in \[{VOCAB}, {VOCAB}\]; accepted: \[0, {VOCAB}\)"),
    (torch.full((1, 3), -1), r"values in \[-1, -1\]"),
])
def test_bad_tokens_are_named(ids, message):
    with pytest.raises(ValueError, match=message):
        build(CONFIGS["mamba2"])(ids)


def test_a_state_of_another_batch_is_refused():
    model = build(CONFIGS["mamba2"])
    with pytest.raises(ValueError, match=r"state is for batch 2 .* batch 3"):
        model(tokens(), model.allocate_state(2))
    with pytest.raises(ValueError, match=r"batch is 0"):
        model.allocate_state(0)
    with pytest.raises(ValueError, match=r"dtype is torch.int8"):
        model.allocate_state(1, dtype=torch.int8)


@pytest.mark.parametrize(("change", "message"), [
    ({"d_model": 0}, "d_model is 0"), ({"vocab_size": "many"}, "vocab_size is 'many'"),
    ({"norm_eps": -1.0}, "norm_eps"), ({"norm_scale": 0.0}, "norm_scale is 0.0"),
    ({"tie_embeddings": 1}, "tie_embeddings is 1"),
    ({"dt_limit": (0.2, 0.1)}, "dt_limit"), ({"layers": SCAN_LAYERS}, r"layers\[0\] is a scan layout"),
])
def test_configs_that_no_model_has_are_refused(change, message):
    with pytest.raises(LayoutError, match=message):
        config("mamba2", **change)


@torch.no_grad()
def test_states_can_be_copied_and_cleared():
    model, ids = build(CONFIGS["mamba2"]), tokens()
    state = model.allocate_state(BATCH)
    model(ids[:, :6], state)
    branch = state.clone()
    expected = model(ids[:, 6:], state)
    assert torch.equal(model(ids[:, 6:], branch), expected)
    other = model.allocate_state(BATCH).copy_(state)
    assert all(torch.equal(a, b) for a, b in zip(other.tensors(), state.tensors(), strict=True))
    assert (model(ids, state.zero_()) - model(ids)).abs().max() < 1e-12
    per_layer = [(24 + 16 + 48) * 3 + 40 * 12, 24 * 3, 0, (15 + 14) * 1 + 15 * 7, 8 * 3]
    assert state.nbytes == 8 * BATCH * sum(per_layer)
