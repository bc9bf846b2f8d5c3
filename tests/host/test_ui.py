"""What the pack tells the host's graph editor."""

import asyncio
import sys
from types import SimpleNamespace

import aiohttp
import pytest
from palimpsest.nodes import host

TEXT = (3).to_bytes(4, "big")  # the kind of a message that is a node's text


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


def test_of_two_clients_only_the_one_that_queued_is_shown_the_text(client):
    graph = {
        "model": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "palimpsest_pocket.safetensors"}},
        "words": {
            "class_type": "PalimpsestSelectWords",
            "inputs": {"clip": ["model", 1], "text": "a red cat in the snow, of client A", "words": "cat"},
        },
        "shown": {"class_type": "PreviewAny", "inputs": {"source": ["words", 2]}},
    }
    heard = asyncio.run(texts_heard(client, graph, [client.client_id, "another"]))
    assert any("[cat]" in text for text in heard[client.client_id])
    assert heard["another"] == []


async def texts_heard(client, graph, names):
    """By client, the texts that the running host sends to each of them while a graph runs."""
    heard = {name: [] for name in names}
    async with aiohttp.ClientSession() as session:
        address = client.url.replace("http", "ws", 1) + "/ws"
        sockets = {name: await session.ws_connect(address, params={"clientId": name}) for name in names}

        async def listen(name):
            async for message in sockets[name]:
                if message.type == aiohttp.WSMsgType.BINARY and message.data[:4] == TEXT:
                    heard[name].append(message.data[4:].decode(errors="replace"))

        listening = [asyncio.ensure_future(listen(name)) for name in names]
        await asyncio.to_thread(client.queue, graph)
        await asyncio.sleep(0.5)  # for what is still on its way
        for name, task in zip(names, listening, strict=True):
            await sockets[name].close()
            await task
    return heard
