"""The text that the shipped models are trained on."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))

import data as demo_data


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
