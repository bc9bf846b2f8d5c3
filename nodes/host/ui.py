"""What people see of a node at work: lines of text under it."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Iterable
from typing import Any


def show_text(node_id: Any, text: str) -> None:
    """Show a line of text under a node in the graph editor, which takes it for HTML, to the client that queued it.

    Silent where no server runs, and where nobody waits for news of the run: the server would tell every client else.
    """
    running = sys.modules.get("server")  # never imported for this: without a server there is nobody to tell
    server = getattr(getattr(running, "PromptServer", None), "instance", None)
    client = getattr(server, "client_id", None)
    if client is not None and node_id is not None:
        server.send_progress_text(html.escape(text, quote=False), node_id, client)


def node_id(node: Any) -> Any:
    """The id of the node that runs, for messages under it; None outside of a graph."""
    return getattr(node.hidden, "unique_id", None)


def told(node: Any, report: str, remarks: Any = None, saved: Iterable[str] = ()) -> dict[str, list]:
    """Show a report under the node that runs, and give what its `ui` hands on: the history has it, and so the API.

    remarks: agreement.Remarks, whose entries come while others sample. saved: names of files and folders that loaders
    list from now on, for the editor (web/js/refresh_lists.js).
    """
    show_text(node_id(node), report)
    shown = {"text": [report]}
    if remarks is not None:
        remarks.text = report
        shown["remarks"] = [remarks.entries]
    return shown | ({"palimpsest_saved": [*saved]} if saved else {})


class ProgressText:
    """A line of text under a node that changes a few times a second at most."""

    def __init__(self, node_id: Any, seconds: float = 0.3):
        self.node_id, self.seconds, self.last = node_id, seconds, 0.0

    def update(self, text: str, now: bool = False) -> None:
        """Show the text if enough time has passed, or `now`."""
        if now or time.monotonic() - self.last >= self.seconds:
            self.last = time.monotonic()
            show_text(self.node_id, text)
