"""What people see of a node at work: lines of text under it."""

from __future__ import annotations

import html
import logging
import sys
import time
from dataclasses import dataclass
from typing import Any


def show_text(node_id: Any, text: str) -> None:
    """Show a line of text under a node in the graph editor, which takes it for HTML; silent where no server runs."""
    running = sys.modules.get("server")  # never imported for this: without a server there is nobody to tell
    server = getattr(getattr(running, "PromptServer", None), "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(html.escape(text, quote=False), node_id)


def node_id(node: Any) -> Any:
    """The id of the node that runs, for messages under it; None outside of a graph."""
    return getattr(node.hidden, "unique_id", None)


def told(node: Any, report: str) -> dict[str, list[str]]:
    """Show a report under the node that runs, and give what its `ui` hands on: the history has it, and so the API."""
    show_text(node_id(node), report)
    return {"text": [report]}


@dataclass(frozen=True)
class Notice:
    """What a node's patches have to say while a sampler runs: in the log and under the node, once a run."""

    node: str
    node_id: Any = None

    def say(self, run: Any, text: str) -> None:
        """Say it, unless this run has heard it."""
        run.kept((self, text), lambda: self.tell(text))

    def tell(self, text: str) -> bool:
        """Say it."""
        logging.warning("%s: %s", self.node, text)
        show_text(self.node_id, text)
        return True


class ProgressText:
    """A line of text under a node that changes a few times a second at most."""

    def __init__(self, node_id: Any, seconds: float = 0.3):
        self.node_id, self.seconds, self.last = node_id, seconds, 0.0

    def update(self, text: str, now: bool = False) -> None:
        """Show the text if enough time has passed, or `now`."""
        if now or time.monotonic() - self.last >= self.seconds:
            self.last = time.monotonic()
            show_text(self.node_id, text)
