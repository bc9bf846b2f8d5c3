"""A file that a node saves stands in the loaders' lists of the page that is open."""

from browser.editor import Editor, needs_browser
from graphs.pocket import stand_ins
from graphs.shipped import MAKES_TUNING, WORKFLOWS


def test_a_saved_file_is_listed_without_a_refresh_by_hand(server):
    needs_browser()
    (workflow,) = (path for path in WORKFLOWS if path.stem == MAKES_TUNING)
    question = {
        "workflow": str(workflow),
        "stand_ins": stand_ins(workflow.stem, {"steps": 2, "inner_steps": 0, "filename": "listed"}),
        "loader": "PalimpsestLoadKV", "widget": "file",
    }  # fmt: skip
    with Editor("list_files.mjs", server.url, "canvas", "en") as editor:
        told = editor.ask(question)
    assert told["result"] == "execution_success"
    assert set(told["after"]) - set(told["before"]) == {"listed_00001.safetensors"}
    assert told["pageErrors"] == []
    assert told["badRequests"] == []
