"""What the pack tells the host's graph editor."""

import sys
from types import SimpleNamespace

import pytest
from palimpsest.nodes import host


@pytest.fixture
def shown(monkeypatch):
    """What a server, whose graph client "a" queued, was told to send, and the server."""
    found = []
    instance = SimpleNamespace(client_id="a", send_progress_text=lambda *told: found.append(told))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    return found, instance


def test_the_text_under_a_node_is_safe_in_a_page(shown):
    host.show_text("7", "a <img src=x onerror=alert(1)> cat & dog")
    assert shown[0] == [("a &lt;img src=x onerror=alert(1)&gt; cat &amp; dog", "7", "a")]


def test_the_text_goes_to_the_client_that_queued_and_to_no_other(shown):
    told, server = shown
    host.show_text("7", "mine")
    server.client_id = None  # queued over HTTP alone: the host would send it to every client
    host.show_text("7", "nobody's")
    assert [(text, client) for text, _, client in told] == [("mine", "a")]


def test_without_a_server_there_is_nobody_to_tell(monkeypatch):
    monkeypatch.delitem(sys.modules, "server", raising=False)
    host.show_text("7", "text")
