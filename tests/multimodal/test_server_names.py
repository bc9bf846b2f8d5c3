"""Multimodal Prompt in a running ComfyUI, by graphs as programs write them."""

import demo
import pytest
from api import ExecutionFailed


def graph(image: str, **connected) -> dict:
    """A graph that shows what a prompt of a picture holds."""
    given = {"text": "a <image1> dog", "model": ["checkpoint", 0], "multimodal_encoder": ["encoder", 0]}
    rest = {"negative_text": "", "tokens_per_picture": "as trained", "background": "removed", "pooled_output": "auto"}
    loaded = {
        "folder": "palimpsest_pocket", "connector": "palimpsest_pocket.safetensors", "perceiver": "as trained",
        "dtype": "auto", "lora": "none", "lora_strength": 1.0,
    }  # fmt: skip
    return {
        "checkpoint": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": demo.POCKET}},
        "encoder": {"class_type": "PalimpsestLoadMultimodalEncoder", "inputs": loaded},
        "image": {"class_type": "LoadImage", "inputs": {"image": image}},
        "white": {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 64, "height": 64}},
        "prompt": {"class_type": "PalimpsestMultimodalPrompt", "inputs": given | rest | connected},
        "report": {"class_type": "PreviewAny", "inputs": {"source": ["prompt", 3]}},
    }


def report(client, nodes: dict) -> str:
    return client.queue(nodes)["outputs"]["report"]["text"][0]


@pytest.mark.expects_error
def test_a_picture_is_known_by_its_plain_name_as_by_that_of_the_editor(client):
    image = client.upload_image(demo.TESTS / "data" / "input" / "palimpsest_example.png")
    wanted = report(client, graph(image, **{"images.image1": ["image", 0]}))
    assert "image1" in wanted
    assert report(client, graph(image, image1=["image", 0])) == wanted
    both = {"images.image1": ["image", 0], "masks.mask1": ["white", 0]}
    assert report(client, graph(image, image1=["image", 0], mask1=["white", 0])) == report(client, graph(image, **both))
    for odd, says in (
        ({"image1": ["image", 1]}, r"image1 has the form \(1, \d+, \d+\): connect pictures"),
        ({"image12": ["image", 0]}, "'image12' is no input: they are image1 to image10"),
        ({"picture": ["image", 0]}, "this node has no input 'picture', it has text"),
        ({"images.image1": ["image", 0], "text": "a <image1:0,3> dog"}, "'<image1:0,3>' cannot be read"),
    ):
        with pytest.raises(ExecutionFailed, match=says):
            client.queue(graph(image, **odd))
