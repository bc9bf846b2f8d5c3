"""Help pages as the editor's panel shows them, in English and Chinese, in a window of ordinary size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browser.editor import Editor, needs_browser

ROOT = Path(__file__).resolve().parents[2]
NODES = sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md"))
OVERHANG = 30  # pixels of a table that may be scrolled to: the last letters of a word


@pytest.fixture(scope="module", params=["en", "zh"])
def panel(request, server):
    needs_browser()
    with Editor("read_help.mjs", server.url, request.param) as opened:
        yield opened, request.param


def test_every_page_can_be_read(panel):
    opened, language = panel
    names = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    for node in NODES:
        shown = opened.ask({"node": node})
        assert shown["title"] == names[node]["display_name"], f"{node}: a page in another language"
        assert all(natural and wide <= shown["width"] for _, natural, wide in shown["pictures"]), node
        wider = [needed - wide for wide, needed in shown["tables"] if needed > wide + OVERHANG]
        assert wider == [], f"{node}: a table is wider than the panel; a list can be read there"
        assert shown["pageErrors"] == []
        assert shown["badRequests"] == []
