"""The graph editor in a real browser, as a process that answers lines of JSON (editor.mjs)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def needs_browser() -> None:
    """Skip the test where there is no browser to open the editor in."""
    import pytest

    if not os.environ.get("PALIMPSEST_CHROMIUM"):
        pytest.skip(os.environ.get("PALIMPSEST_NO_BROWSER", "needs a browser: run `python dev.py test`"))


class Editor:
    """One open editor. Use it as a context manager.

    PALIMPSEST_CHROMIUM is the browser, PALIMPSEST_NODE_PATH the folder whose node_modules holds playwright-core.
    """

    def __init__(self, script: str, url: str, *arguments: str):
        command = [shutil.which("node") or "node", str(HERE / script), url, *arguments]
        # stderr is no pipe: nobody reads it while it is written
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, encoding="utf-8",
            env=os.environ,
        )  # fmt: skip

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Send a question and wait for its answer. Raises RuntimeError where the editor cannot answer."""
        try:
            print(json.dumps(question), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        answer = json.loads(line) if line else {"error": self.last_words()}
        if "error" in answer:
            raise RuntimeError(f"the graph editor could not do it:\n{answer['error'][-3000:]}")
        return answer

    def last_words(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def __enter__(self) -> Editor:
        return self

    def __exit__(self, *_: object) -> None:
        """Let it close the browser; end it where it does not."""
        try:
            self.process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()
