"""What the pack tells the host's graph editor."""

import sys
from types import SimpleNamespace

from palimpsest.nodes import host


def test_the_text_under_a_node_is_safe_in_a_page(monkeypatch):
    shown = []
    instance = SimpleNamespace(send_progress_text=lambda text, node: shown.append((text, node)))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    host.show_text("7", "a <img src=x onerror=alert(1)> cat & dog")
    assert shown == [("a &lt;img src=x onerror=alert(1)&gt; cat &amp; dog", "7")]


def test_without_a_server_there_is_nobody_to_tell(monkeypatch):
    monkeypatch.delitem(sys.modules, "server", raising=False)
    host.show_text("7", "text")
