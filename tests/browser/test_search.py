"""Everyday words find a node or blueprint of the pack in the graph editor's own search."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser.editor import Editor, needs_browser

SUBGRAPHS = Path(__file__).resolve().parents[2] / "subgraphs"
SEEN = 12  # as many results as the search box shows before it scrolls
WORDS = (
    "pose", "identity", "consistent character", "edit photo", "recolour", "recolor", "change color",
    "replace background", "background", "mask from text", "segment", "inpaint", "before after", "compare", "keep",
    "face", "style",
)  # fmt: skip


@pytest.fixture(scope="module")
def search(server):
    needs_browser()
    with Editor("search_nodes.mjs", server.url) as opened:
        yield lambda words: opened.ask({"query": words})["results"]


@pytest.mark.parametrize("words", WORDS)
def test_an_everyday_word_finds_us(search, words):
    blueprints = {path.stem for path in SUBGRAPHS.glob("*.json")}
    seen = search(words)[:SEEN]
    assert any(name.startswith("Palimpsest") or shown in blueprints for name, shown in seen), [s for _, s in seen]
