"""Generation: what it chooses, when it stops, what it refuses."""

import pytest
import torch

from shedder.layout import ScanLayout, SSDLayout
from shedder.nn import DecodeGraph, LanguageModel, ModelConfig

VOCAB, BATCH = 40, 3
LAYERS = {"mamba1": (ScanLayout(d_inner=20, dstate=8, dt_rank=3),) * 2,
          "mamba2": (SSDLayout(headdim=8, dstate=12, ngroups=1, head_to_group=(0,) * 3),) * 2}


@pytest.fixture(params=LAYERS, name="model")
def _model(request):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(request.param, 24, VOCAB, LAYERS[request.param], tie_embeddings=False)).eval()
    with torch.no_grad():                               # an untrained head repeats itself; a larger one varies
        model.backbone.embedding.weight.mul_(50)
    return model


@pytest.fixture(name="prompt")
def _prompt():
    return torch.randint(0, VOCAB, (BATCH, 7), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_greedy_takes_the_likeliest_token_of_the_whole_text(model, prompt):
    out = model.generate(prompt, 6)
    assert out.shape == (BATCH, 13)
    assert torch.equal(out[:, :7], prompt)
    for t in range(7, 13):
        assert torch.equal(out[:, t], model(out[:, :t])[:, -1].argmax(-1))
    assert out[:, 7:].unique().numel() > 2


def test_a_seed_repeats_and_another_differs(model, prompt):
    first = model.generate(prompt, 12, temperature=1.5, seed=5)
    assert torch.equal(model.generate(prompt, 12, temperature=1.5, seed=5), first)
    assert not torch.equal(model.generate(prompt, 12, temperature=1.5, seed=6), first)


def test_one_candidate_is_greedy(model, prompt):
    assert torch.equal(model.generate(prompt, 6, temperature=2.0, top_k=1, seed=0), model.generate(prompt, 6))


@torch.no_grad()
def test_top_k_draws_among_the_k_likeliest(model, prompt):
    out = model.generate(prompt, 20, temperature=3.0, top_k=3, seed=0)
    for t in range(7, 27):
        likeliest = model(out[:, :t])[:, -1].topk(3).indices
        assert (likeliest == out[:, t:t + 1]).any(-1).all()


def test_rows_end_at_eos_and_generation_stops_when_all_have(model, prompt):
    free = model.generate(prompt, 8)
    eos = int(free[0, 9])                               # row 0 produces it at its third token at the latest
    out = model.generate(prompt, 8, eos_token_id=eos)
    first = int((free[0, 7:] == eos).nonzero()[0]) + 7
    assert (out[0, first:] == eos).all()
    assert torch.equal(out[0, :first + 1], free[0, :first + 1])
    alone = model.generate(prompt[:1], 8, eos_token_id=eos)
    assert alone.shape[1] == first + 1


def test_tokens_are_streamed(model, prompt):
    seen = []
    out = model.generate(prompt, 5, on_token=seen.append)
    assert torch.equal(torch.stack(seen, dim=1), out[:, 7:])


def test_nothing_asked_nothing_added(model, prompt):
    assert torch.equal(model.generate(prompt, 0), prompt)


@pytest.mark.parametrize(("options", "message"), [
    ({"max_new_tokens": -1}, "max_new_tokens is -1"), ({"temperature": -1.0}, "temperature is -1.0"),
    ({"top_k": 0, "temperature": 1.0}, "top_k is 0"), ({"graph": True}, "graph is True; accepted only on CUDA"),
])
def test_bad_options_are_named(model, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, **{"max_new_tokens": 2, **options})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_graph_decodes_as_the_eager_step_does(model, prompt, dtype):
    model, prompt = model.to("cuda", dtype), prompt.cuda()
    eager = model.generate(prompt, 16, graph=False)
    assert torch.equal(model.generate(prompt, 16), eager)
    captured = model._decode_graph
    assert isinstance(captured, DecodeGraph)
    assert torch.equal(model.generate(prompt, 16), eager)
    assert model._decode_graph is captured              # captured once
    with torch.no_grad():
        model.mixers[0].A_log.add_(1.0)
    assert torch.equal(model.generate(prompt, 16), model.generate(prompt, 16, graph=False))
    assert model._decode_graph is not captured          # and again when a parameter has changed
