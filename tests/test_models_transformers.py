"""Folders written by transformers: shedder computes the same logits, in one call, in steps, and in both."""

import json

import pytest
import torch

import shedder
from shedder.checkpoint import CheckpointError

transformers = pytest.importorskip("transformers")

# fp32 on both sides; the two add in different orders.
TOLERANCE = 1e-4
PROMPT, STEPS, BATCH, VOCAB = 13, 4, 2, 67

MAMBA1 = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {"use_bias": True, "use_conv_bias": False},
    "odd": {"hidden_size": 20, "state_size": 5, "time_step_rank": 3, "conv_kernel": 3, "layer_norm_epsilon": 1e-3},
}
MAMBA2 = {
    "one group": {"n_groups": 1},
    "eight groups": {"n_groups": 8},
    "tied": {"n_groups": 2, "tie_word_embeddings": True},
    "biases": {"n_groups": 1, "use_bias": True, "use_conv_bias": False},
    "other heads": {"n_groups": 4, "num_heads": 16, "head_dim": 4, "state_size": 6, "layer_norm_epsilon": 1e-3},
}


def mamba1(**changes):
    config = {"vocab_size": VOCAB, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 3, **changes}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**config))


def mamba2(**changes):
    config = {"vocab_size": VOCAB, "hidden_size": 32, "state_size": 12, "num_heads": 8, "head_dim": 8,
              "num_hidden_layers": 3, "chunk_size": 8, **changes}
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**config))
    if model.config.n_groups > 1 and not hasattr(model.backbone.layers[0].mixer.norm, "group_size"):
        pytest.skip(f"transformers {transformers.__version__} takes one norm over all groups")
    return model


def randomise(model):
    """Fresh models have constant D, A_log, norms and biases, which would hide permuted or ignored ones."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("D", "norm.weight", "norm_f.weight", "A_log")):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


CASES = [pytest.param((mamba1, changes), id=f"mamba1-{name}") for name, changes in MAMBA1.items()]
CASES += [pytest.param((mamba2, changes), id=f"mamba2-{name}") for name, changes in MAMBA2.items()]


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    """(transformers' model, the same loaded by shedder, tokens)."""
    build, changes = request.param
    torch.manual_seed(0)
    theirs = randomise(build(**changes))
    theirs.save_pretrained(tmp_path / "theirs")
    ids = torch.randint(0, VOCAB, (BATCH, PROMPT + STEPS))
    return theirs, shedder.load(tmp_path / "theirs"), ids


def close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < TOLERANCE


@torch.no_grad()
def test_prefill_has_the_same_logits(pair):
    theirs, ours, ids = pair
    expected = theirs(ids).logits
    assert expected.std() > 0.01                        # not a comparison of zeros
    close(ours(ids), expected)
    close(ours(ids, last_only=True), expected[:, -1:])


@torch.no_grad()
def test_steps_have_the_same_logits(pair):
    theirs, ours, ids = pair
    state, cache = ours.allocate_state(BATCH), None
    for t in range(PROMPT):
        out = theirs(ids[:, t:t + 1], cache_params=cache, use_cache=True)
        cache = out.cache_params
        close(ours(ids[:, t:t + 1], state), out.logits)


@torch.no_grad()
def test_prefill_then_steps_have_the_same_logits(pair):
    theirs, ours, ids = pair
    state = ours.allocate_state(BATCH)
    out = theirs(ids[:, :PROMPT], use_cache=True)
    close(ours(ids[:, :PROMPT], state), out.logits)
    for t in range(PROMPT, PROMPT + STEPS):
        out = theirs(ids[:, t:t + 1], cache_params=out.cache_params, use_cache=True)
        close(ours(ids[:, t:t + 1], state), out.logits)


@torch.no_grad()
def test_greedy_generation_is_the_same(pair):
    theirs, ours, ids = pair
    expected = theirs.generate(ids[:, :PROMPT], max_new_tokens=STEPS, do_sample=False, eos_token_id=None,
                               pad_token_id=0)
    assert torch.equal(ours.generate(ids[:, :PROMPT], STEPS), expected)


@torch.no_grad()
def test_dt_limits_apply_in_prefill_and_in_steps(tmp_path):
    """transformers limits dt in prefill only; here a text gives the same logits however it is split."""
    torch.manual_seed(0)
    theirs = randomise(mamba2(n_groups=1, time_step_limit=(0.02, 0.05)))
    theirs.save_pretrained(tmp_path)
    ours, ids = shedder.load(tmp_path), torch.randint(0, VOCAB, (BATCH, PROMPT))
    assert ours.config.dt_limit == (0.02, 0.05)
    close(ours(ids), theirs(ids).logits)
    state = ours.allocate_state(BATCH)
    close(torch.cat([ours(token, state) for token in ids.split(1, dim=1)], dim=1), theirs(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("build", [mamba1, mamba2])
def test_sharded_folders_load(build, tmp_path):
    torch.manual_seed(0)
    theirs = randomise(build())
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ids = torch.randint(0, VOCAB, (BATCH, PROMPT))
    close(shedder.load(tmp_path)(ids), theirs(ids).logits)


@torch.no_grad()
def test_half_precision_folders_keep_decay_in_fp32(tmp_path):
    torch.manual_seed(0)
    theirs = randomise(mamba2()).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = shedder.load(tmp_path)
    mixer = ours.mixers[0]
    assert ours.dtype == torch.bfloat16
    assert mixer.A_log.dtype == mixer.D.dtype == mixer.dt_bias.dtype == torch.float32
    assert torch.equal(mixer.A_log, theirs.backbone.layers[0].mixer.A_log.float())


def test_other_models_are_refused(tmp_path):
    mamba2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(CheckpointError, match=r"model_type is 'llama'; accepted: .*mamba2"):
        shedder.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    with pytest.raises(CheckpointError, match=r"hidden_act is 'gelu'; accepted: 'silu'"):
        shedder.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "state_size": 11}))
    with pytest.raises(CheckpointError, match=r"model.safetensors: .*layers.0.mixer.* is \(\d+.*says \(\d+"):
        shedder.load(tmp_path)
