"""The tables of docs/search.md are those of the committed results."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import quality

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "search.md"


def test_the_documents_tables_are_filled_from_the_results(tmp_path):
    text = DOCUMENT.read_text(encoding="utf-8")
    assert quality.tables() in text
    assert " - |" not in quality.tables()               # every case was run on both models
    copy = tmp_path / "search.md"
    copy.write_text(text.replace("| greedy |", "| greedy by hand |"), encoding="utf-8")
    quality.fill(copy)
    assert copy.read_text(encoding="utf-8") == text
    copy.write_text("no marks", encoding="utf-8")
    with pytest.raises(SystemExit, match="has 0 places"):
        quality.fill(copy)
