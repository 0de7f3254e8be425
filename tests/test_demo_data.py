"""The text and the training path of the shipped model."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))

import data as demo_data
import train as demo_train

import shedder
from shedder.nn import LanguageModel


def test_html_keeps_sentences_and_drops_menus_and_scripts():
    page = ("<html><head><title>No</title><script>var x = 1;</script></head><body>"
            "<div class='navheader'><div>Up</div>Next</div><h1>Title</h1><p>One   <b>bold</b>\nword &amp; more.</p>"
            "<pre>a\n    b</pre><footer>foot</footer></body></html>")
    paragraphs = [part.strip() for part in demo_data.html_to_text(page).split("\n\n") if part.strip()]
    assert paragraphs == ["Title", "One bold word & more.", "a\n    b"]


def test_rst_loses_its_markup_and_keeps_its_words():
    source = (".. module:: bisect\n   :synopsis: gone\n\nTitle\n=====\n\n"
              "Call :func:`~os.open` or ``x`` of `the page <http://a>`_::\n\n   code\n\n"
              ".. function:: f(a)\n\n   Does *one* thing.\n")
    words = " ".join(demo_data.rst_to_text(source).split())
    assert words == "Title Call os.open or x of the page: code f(a) Does one thing."


def test_man_and_pod_become_paragraphs():
    man = '.TH X 1\n.\\" comment\n.SH NAME\nx \\- does\n.B bold\nthings\n.PP\nSee\n.BR y (2).\n'
    assert demo_data.man_to_text(man).split("\n\n")[1:] == ["NAME", "x - does bold things", "See y(2)."]
    pod = "=head1 NAME\n\nB<x> and L<the page|y> C<< a > b >>\n\n=cut\n"
    assert " ".join(demo_data.pod_to_text(pod).split()) == "NAME x and the page a > b"


def test_a_dictionary_is_cut_between_entries():
    text = "".join(f"word{i}\n   its {{meaning}}. [1913 Webster]\n" for i in range(1000))
    parts = list(demo_data.dictionary_to_texts(text, size=500))
    assert all(part.startswith("word") for part in parts if part)
    assert "".join(parts).count("its meaning.") == 1000
    assert "Webster" not in "".join(parts)


def test_repeated_lines_and_paragraphs_are_dropped():
    pages = [f"Copyright of the whole project\nPage {i} has a line of its own." for i in range(20)]
    double = "A paragraph that is long enough to be recognised when it appears for the second time."
    cleaned = demo_data.drop_repeats([*pages, double, double])
    assert all(page == f"Page {i} has a line of its own." for i, page in enumerate(cleaned[:20]))
    assert cleaned[20:] == [double, ""]


def test_the_split_depends_on_the_seed_and_not_on_the_order():
    documents = [f"document {i}" for i in range(200)]
    train, heldout = demo_data.split(documents, seed=0)
    assert (train, heldout) == demo_data.split(documents[::-1], seed=0)
    assert heldout != demo_data.split(documents, seed=1)[1]
    assert len(heldout) == 4
    assert sorted(train + heldout) == sorted(documents)


@pytest.mark.parametrize(("chunk", "length"), [(64, 128), (8, 40)])
def test_training_path_gives_the_logits_of_the_model(chunk, length):
    torch.manual_seed(0)
    model = LanguageModel(demo_train.model_config(d_model=32, layers=3, headdim=16, dstate=12))
    with torch.no_grad():
        for parameter in model.parameters():            # so that no norm, bias or gain is trivial
            parameter += 0.05 * torch.randn_like(parameter)
    tokens = torch.randint(256, (2, length))
    expected = model(tokens)
    actual = demo_train.TrainingPath(model, torch.float32, chunk).logits(tokens)
    scale = expected.abs().max().item()
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-4 * scale)      # fp32, sums in another order


def test_the_learning_rate_warms_up_and_ends_at_zero():
    rates = [demo_train.learning_rate(step, 1000, 3e-3) for step in range(1000)]
    assert rates[0] > 0
    assert max(rates) == pytest.approx(3e-3)
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))
    assert demo_train.learning_rate(0, 3, 1e-3) >= 0


def test_the_shipped_model_fits_into_eight_megabytes():
    model = LanguageModel(demo_train.model_config(), device="meta", initialise=False)
    assert 7.0e6 < demo_train.checkpoint_bytes(model) < 8e6 - 16_384


def test_a_few_steps_write_a_model_that_loads(tmp_path):
    text = np.frombuffer((b"the cat sat on the mat. " * 400), dtype=np.uint8)
    for name in ("train.bin", "heldout.bin"):
        text.tofile(tmp_path / name)
    options = ["--data", tmp_path, "--out", tmp_path / "out", "--device", "cpu", "--steps", 12, "--batch", 2,
               "--length", 64, "--d-model", 32, "--layers", 3, "--eval-bytes", 1024, "--sample", 4, "--log-every", 4]
    assert demo_train.main([str(option) for option in options]) == 0
    curve = json.loads((tmp_path / "out/curve.json").read_text())
    assert curve["train"][-1]["lr"] == pytest.approx(0, abs=1e-12)
    assert curve["heldout"][-1]["loss"] < math.log(256)
    assert len(curve["perplexity_rise_without_block"]) == 3
    model = shedder.load(tmp_path / "out/model")
    assert model.dtype == torch.bfloat16
    assert model.layers[0].mixer.A_log.dtype == torch.float32
