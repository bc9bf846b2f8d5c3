"""Through the host's queue: a written text keeps the language model from running, an expressed one is kept."""

from __future__ import annotations

import pytest
from api import ExecutionFailed

POCKET = {"folder": "palimpsest_pocket", "connector": "none"}


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def graph(text: str, **writer) -> dict:
    """A picture, an instruction and its prompts, whose text a node shows."""
    asked = {"image": ["image", 0], "instruction": "lying", "max_tokens": 12, **writer}
    return {
        "image": node("LoadImage", image="palimpsest_example.png"),
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name="palimpsest_pocket.safetensors"),
        "encoder": node("PalimpsestLoadMultimodalEncoder", **POCKET),
        "express": node("PalimpsestExpressInstruction", **asked),
        "edit": node("PalimpsestEditInstruction", text=text, expressed=["express", 0], clip=["checkpoint", 1]),
        "view": node("PreviewAny", source=["edit", 3]),
    }


def test_a_written_text_needs_no_language_model(client):
    """Express Instruction has none here, so that it fails where it is run."""
    told = client.queue(graph("a cat in the snow"))["outputs"]["view"]["text"][0]
    assert told.startswith("a cat in the snow\n")


@pytest.mark.expects_error
def test_without_a_written_text_it_is_asked(client):
    with pytest.raises(ExecutionFailed, match="no language model is connected"):
        client.queue(graph(""))


def test_an_expressed_text_is_kept_by_the_host(client):
    writer = {"multimodal_encoder": ["encoder", 0]}
    told = [client.queue(graph("", **writer))["outputs"]["view"]["text"][0]]
    told.append(client.queue(graph("mine", **writer))["outputs"]["view"]["text"][0])
    entry = client.queue(graph("", **writer))
    ran = dict(entry["status"]["messages"])["execution_cached"]["nodes"]
    assert {"express", "encoder"} <= set(ran)
    assert entry["outputs"]["view"]["text"][0] == told[0] != told[1]
