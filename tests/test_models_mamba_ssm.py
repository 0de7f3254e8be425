"""Folders as state-spaces publishes them: config.json with ssm_cfg, pytorch_model.bin with mamba_ssm's names."""

import json

import pytest
import torch

import shedder
from shedder.checkpoint import CheckpointError
from shedder.layout import ScanLayout, SSDLayout

D_MODEL, LAYERS, VOCAB = 32, 2, 61
PADDED_VOCAB = 64


def mamba1_tensors():
    d_inner, dstate, rank = 64, 16, 2
    for i in range(LAYERS):
        mixer = f"backbone.layers.{i}.mixer."
        yield mixer + "A_log", torch.rand(d_inner, dstate)
        yield mixer + "D", torch.randn(d_inner)
        yield mixer + "in_proj.weight", 0.2 * torch.randn(2 * d_inner, D_MODEL)
        yield mixer + "conv1d.weight", 0.5 * torch.randn(d_inner, 1, 4)
        yield mixer + "conv1d.bias", 0.1 * torch.randn(d_inner)
        yield mixer + "x_proj.weight", 0.2 * torch.randn(rank + 2 * dstate, d_inner)
        yield mixer + "dt_proj.weight", torch.randn(d_inner, rank)
        yield mixer + "dt_proj.bias", torch.randn(d_inner) - 3
        yield mixer + "out_proj.weight", 0.2 * torch.randn(D_MODEL, d_inner)
    yield from shared_tensors()


def mamba2_tensors(heads=4, groups=1, dstate=128, d_ssm=64):
    d_inner = 64
    conv = d_ssm + 2 * groups * dstate
    for i in range(LAYERS):
        mixer = f"backbone.layers.{i}.mixer."
        yield mixer + "dt_bias", torch.randn(heads) - 3
        yield mixer + "A_log", torch.rand(heads)
        yield mixer + "D", torch.randn(heads)
        yield mixer + "in_proj.weight", 0.2 * torch.randn(2 * d_inner - d_ssm + conv + heads, D_MODEL)
        yield mixer + "conv1d.weight", 0.5 * torch.randn(conv, 1, 4)
        yield mixer + "conv1d.bias", 0.1 * torch.randn(conv)
        yield mixer + "norm.weight", 1 + 0.1 * torch.randn(d_ssm)
        yield mixer + "out_proj.weight", 0.2 * torch.randn(D_MODEL, d_inner)
    yield from shared_tensors()


def shared_tensors():
    embedding = 0.5 * torch.randn(PADDED_VOCAB, D_MODEL)
    for i in range(LAYERS):
        yield f"backbone.layers.{i}.norm.weight", 1 + 0.1 * torch.randn(D_MODEL)
    yield "backbone.embedding.weight", embedding
    yield "backbone.norm_f.weight", 1 + 0.1 * torch.randn(D_MODEL)
    yield "lm_head.weight", embedding                   # tied, and stored twice


# As on the hub: the Mamba-1 configs are older and leave most to the class defaults.
MAMBA1_CONFIG = {"d_model": D_MODEL, "n_layer": LAYERS, "vocab_size": VOCAB, "ssm_cfg": {}, "rms_norm": True,
                 "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
MAMBA2_CONFIG = {"d_model": D_MODEL, "d_intermediate": 0, "n_layer": LAYERS, "vocab_size": VOCAB,
                 "ssm_cfg": {"layer": "Mamba2", "headdim": 16}, "attn_layer_idx": [], "attn_cfg": {},
                 "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16,
                 "tie_embeddings": True}


def write(folder, config, tensors):
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(dict(tensors), folder / "pytorch_model.bin")
    return folder


def dense_logits(tensors, ids, mixer):
    """The model written out: mamba_ssm's unfused Block, norms and head, around `mixer`."""
    def norm(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    residual = tensors["backbone.embedding.weight"][ids]
    for i in range(LAYERS):
        hidden = norm(residual, tensors[f"backbone.layers.{i}.norm.weight"])
        own = {k.split("mixer.")[1]: v for k, v in tensors.items() if f"layers.{i}.mixer." in k}
        residual = residual + mixer(hidden, own)
    return norm(residual, tensors["backbone.norm_f.weight"]) @ tensors["lm_head.weight"].T


def conv_silu(x, p):
    y = torch.nn.functional.conv1d(x.transpose(1, 2), p["conv1d.weight"], p["conv1d.bias"], padding=3,
                                   groups=x.shape[-1])[..., :x.shape[1]]
    return torch.nn.functional.silu(y.transpose(1, 2))


def mamba1_mixer(hidden, p):
    x, z = (hidden @ p["in_proj.weight"].T).chunk(2, dim=-1)
    x = conv_silu(x, p)
    rank, B, C = (x @ p["x_proj.weight"].T).split([2, 16, 16], dim=-1)
    dt = torch.nn.functional.softplus(rank @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    h, ys = torch.zeros(x.shape[0], 64, 16, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * -p["A_log"].exp()) * h + (dt * x)[:, t, :, None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1) + p["D"] * x[:, t])
    return (torch.stack(ys, 1) * torch.nn.functional.silu(z)) @ p["out_proj.weight"].T


def mamba2_mixer(hidden, p):
    heads, dstate = p["A_log"].numel(), 128
    d_ssm = 16 * heads
    z0, x0, z, xBC, dt = (hidden @ p["in_proj.weight"].T).split(
        [64 - d_ssm, 64 - d_ssm, d_ssm, d_ssm + 2 * dstate, heads], dim=-1)
    x, B, C = conv_silu(xBC, p).split([d_ssm, dstate, dstate], dim=-1)
    x = x.unflatten(-1, (heads, 16))
    dt = torch.nn.functional.softplus(dt + p["dt_bias"])
    h, ys = torch.zeros(x.shape[0], heads, 16, dstate, dtype=x.dtype), []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * -p["A_log"].exp())[..., None, None]
        h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, None, None]
        ys.append((h * C[:, t, None, None]).sum(-1) + p["D"][:, None] * x[:, t])
    y = torch.stack(ys, 1).flatten(2) * torch.nn.functional.silu(z)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * p["norm.weight"]
    y = torch.cat([torch.nn.functional.silu(z0) * x0, y], -1)
    return y @ p["out_proj.weight"].T


@torch.no_grad()
@pytest.mark.parametrize(("config", "tensors", "mixer"), [
    pytest.param(MAMBA1_CONFIG, mamba1_tensors, mamba1_mixer, id="mamba1"),
    pytest.param(MAMBA2_CONFIG, mamba2_tensors, mamba2_mixer, id="mamba2"),
    pytest.param({**MAMBA2_CONFIG, "ssm_cfg": {"layer": "Mamba2", "headdim": 16, "d_ssm": 32}},
                 lambda: mamba2_tensors(heads=2, d_ssm=32), mamba2_mixer, id="mamba2 with an MLP beside the SSM"),
])
def test_the_model_computes_what_its_names_mean(config, tensors, mixer, tmp_path):
    model = shedder.load(write(tmp_path, config, tensors()), dtype=torch.float64)
    stored = {k: v.double() for k, v in torch.load(tmp_path / "pytorch_model.bin", weights_only=True).items()}
    ids = torch.randint(0, VOCAB, (2, 9))
    expected = dense_logits(stored, ids, mixer)
    assert (model(ids) - expected).abs().max() < 1e-10 * expected.abs().max()
    assert model.lm_head.weight is model.backbone.embedding.weight


def test_class_defaults_fill_what_the_config_leaves_out(tmp_path):
    model = shedder.load(write(tmp_path / "1", MAMBA1_CONFIG, mamba1_tensors()))
    assert model.config.layers == (ScanLayout(d_inner=64, dstate=16, dt_rank=2),) * LAYERS
    assert model.config.vocab_size == PADDED_VOCAB
    layout = shedder.load(write(tmp_path / "2", MAMBA2_CONFIG, mamba2_tensors())).config.layers[0]
    assert isinstance(layout, SSDLayout)
    assert (layout.nheads, layout.headdim, layout.dstate, layout.ngroups) == (4, 16, 128, 1)
    assert [(s.channels, s.eps) for s in layout.norm_segments] == [(64, 1e-5)]


def test_the_norm_has_one_segment_per_group(tmp_path):
    ssm = {"layer": "Mamba2", "headdim": 16, "ngroups": 2, "d_state": 10}
    folder = write(tmp_path, {**MAMBA2_CONFIG, "ssm_cfg": ssm}, mamba2_tensors(groups=2, dstate=10))
    layout = shedder.load(folder).config.layers[0]
    assert [s.channels for s in layout.norm_segments] == [32, 32]
    assert layout.head_to_group == (0, 0, 1, 1)


def test_half_precision_keeps_decay_in_fp32(tmp_path):
    model = shedder.load(write(tmp_path, MAMBA1_CONFIG, mamba1_tensors()), dtype=torch.bfloat16)
    mixer = model.mixers[0]
    assert model.dtype == mixer.in_proj.weight.dtype == torch.bfloat16
    assert mixer.A_log.dtype == mixer.D.dtype == mixer.dt_proj.bias.dtype == torch.float32
    stored = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert torch.equal(mixer.A_log, stored["backbone.layers.0.mixer.A_log"])


@pytest.mark.parametrize(("change", "message"), [
    ({"ssm_cfg": {"layer": "Mamba3"}}, r"ssm_cfg.layer is 'Mamba3'"),
    ({"ssm_cfg": {"layer": "Mamba2", "surprise": 1}}, r"ssm_cfg.surprise is not known"),
    ({"ssm_cfg": {"layer": "Mamba2", "headdim": 24}}, r"64 channels in heads of 24"),
    ({"ssm_cfg": {"layer": "Mamba2", "headdim": 16, "ngroups": 3}}, r"4 heads in 3 groups"),
    ({"ssm_cfg": {"layer": "Mamba2", "headdim": 16, "d_ssm": 80}}, r"ssm_cfg.d_ssm is 80; accepted: up to"),
    ({"ssm_cfg": {"layer": "Mamba2", "headdim": 16, "d_ssm": 24}}, r"24 channels in heads of 16"),
    ({"attn_layer_idx": [1]}, r"attn_layer_idx is \[1\]"),
    ({"d_intermediate": 128}, r"d_intermediate is 128"),
    ({"rms_norm": False}, r"rms_norm is False"),
    ({"d_model": "wide"}, r"d_model is 'wide'; accepted: int"),
    ({"n_layer": 3}, r"pytorch_model.bin: backbone.layers.2.\S+ is missing"),
    ({"n_layer": 1}, r"pytorch_model.bin: backbone.layers.1.\S+ .*is not in the layout"),
    ({"vocab_size": 200}, r"backbone.embedding.weight is \(64, 32\), the layout in config.json says \(208, 32\)"),
])
def test_configs_that_do_not_fit_are_refused(change, message, tmp_path):
    write(tmp_path, {**MAMBA2_CONFIG, **change}, mamba2_tensors())
    with pytest.raises(CheckpointError, match=message):
        shedder.load(tmp_path)


def test_an_untied_head_in_a_tied_config_is_refused(tmp_path):
    tensors = dict(mamba2_tensors())
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    write(tmp_path, MAMBA2_CONFIG, tensors)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from backbone.embedding.weight"):
        shedder.load(tmp_path)


class Trap:
    """Unpickled, it would leave a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_pickle_is_not_run(tmp_path):
    write(tmp_path, MAMBA2_CONFIG, mamba2_tensors())
    torch.save({"backbone.embedding.weight": Trap(tmp_path / "trace")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: not a file of tensors"):
        shedder.load(tmp_path)
    assert not (tmp_path / "trace").exists()


def test_a_damaged_bin_is_refused(tmp_path):
    folder = write(tmp_path, MAMBA2_CONFIG, mamba2_tensors())
    data = (folder / "pytorch_model.bin").read_bytes()
    for damaged in (b"", b"not a file of tensors", data[: len(data) // 2]):
        (folder / "pytorch_model.bin").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"pytorch_model.bin"):
            shedder.load(folder)
