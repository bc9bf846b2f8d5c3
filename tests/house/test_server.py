"""The whole edit through a running ComfyUI: cancelled at any moment, nothing is lost."""

import argparse
import time

import demo
import pytest
from api import ExecutionFailed, Interrupted, PromptRejected
from pocket import world

SCENE = world.held_out_scenes(139)[138]


@pytest.fixture
def edit(client):
    """The demo's graph on the example picture; `edit(inner_steps=...)`."""
    image = client.upload_image(demo.TESTS / "data" / "input" / "palimpsest_example.png")

    def make(seed: int = 0, **changes) -> dict:
        options = argparse.Namespace(
            family="unet", checkpoint=demo.POCKET, steps=3,
            guidance=3.0, inner_steps=1, layers="decoder", mode="extend", strength=1.0,
            source_guidance=2.0, start_percent=0.0, learning_rate=0.1,
        )  # fmt: skip
        vars(options).update(changes)
        edits = {"edit": demo.Edit("a red cat sitting in the snow")}
        nodes = demo.graph(image, world.caption(SCENE), edits, options)
        for name in ("ddim", "prompt_swap edit", "kv edit") if options.family == "unet" else ():
            nodes[f"sample {name}"]["inputs"]["noise_seed"] = seed  # no noise is added: only asks for a new run
        return nodes

    return make


def only(nodes: dict, *outputs: str) -> dict:
    """The graph with these output nodes alone."""
    ends = {"SaveImage", "PreviewAny", "PalimpsestSaveKV"}
    return {name: n for name, n in nodes.items() if n["class_type"] not in ends or name in outputs}


def test_cancelling_a_tuning_restores_the_model(client, edit):
    before = client.images(client.queue(only(edit(seed=1), "prompt_swap edit")), "prompt_swap edit")
    prompt_id = client.submit(only(edit(inner_steps=1000), "kv edit"))
    while not client.get_json("/queue")["queue_running"]:
        time.sleep(0.05)
    time.sleep(3.0)  # well into the first steps of the tuning
    client.interrupt()
    with pytest.raises(Interrupted):
        client.wait(prompt_id, timeout=30)
    after = client.images(client.queue(only(edit(seed=2), "prompt_swap edit")), "prompt_swap edit")
    assert [demo.picture(a).tolist() for a in after] == [demo.picture(b).tolist() for b in before]


@pytest.mark.expects_error
@pytest.mark.parametrize(
    ("filename", "says"),
    [
        ("../..", "no letters or digits"),
        ("\ud800\0", "no letters or digits"),
        ("%seed%", "%seed%' in it"),
    ],
)
def test_a_name_that_cannot_be_saved_under_stops_the_graph_before_it_runs(client, edit, filename, says):
    nodes = only(edit(), "keep")
    nodes["keep"]["inputs"]["filename"] = filename
    with pytest.raises(PromptRejected, match=says):
        client.submit(nodes)


@pytest.mark.expects_error
def test_a_wrong_size_is_one_sentence_in_the_editor(client, edit):
    nodes = only(edit(mode="recompute"), "kv edit")  # extend and frozen serve any size
    nodes["empty"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 192, "height": 128, "batch_size": 1}}
    nodes["sample kv edit"]["inputs"]["latent_image"] = ["empty", 0]
    with pytest.raises(ExecutionFailed, match="tuned to a latent of 16 x 16, sampling runs at 24 x 16"):
        client.queue(nodes)


def words_seen(seed: int, threshold: float) -> dict:
    """A drawn picture, and where its words acted."""
    return {
        "checkpoint": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": demo.POCKET}},
        "empty": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "words": {
            "class_type": "PalimpsestSelectWords",
            "inputs": {"clip": ["checkpoint", 1], "text": world.caption(SCENE), "words": "*"},
        },
        "map": {
            "class_type": "PalimpsestAttentionMap",
            "inputs": {"model": ["checkpoint", 0], "tokens": ["words", 0], "layers": "all", "start_percent": 0.0,
                       "end_percent": 1.0},
        },
        "sample": {
            "class_type": "KSampler",
            "inputs": {"model": ["map", 0], "positive": ["words", 1], "negative": ["words", 1],
                       "latent_image": ["empty", 0], "seed": seed, "steps": 2, "cfg": 1.0, "sampler_name": "euler",
                       "scheduler": "normal", "denoise": 1.0},
        },
        "read": {
            "class_type": "PalimpsestReadAttentionMap",
            "inputs": {"record": ["map", 1], "samples": ["sample", 0], "words": "", "levels": "all",
                       "start_percent": 0.0, "end_percent": 1.0, "normalise": "each word by itself",
                       "threshold": threshold, "clean": 2, "opacity": 1.0, "label": False},
        },
        "preview": {"class_type": "PreviewImage", "inputs": {"images": ["read", 0]}},
    }  # fmt: skip


def test_a_record_is_read_again_from_the_hosts_cache_run_by_run(client):
    first = client.images(client.queue(words_seen(seed=1, threshold=0.3)), "preview")
    second = client.images(client.queue(words_seen(seed=2, threshold=0.3)), "preview")
    again = client.images(client.queue(words_seen(seed=2, threshold=0.4)), "preview")
    back = client.images(client.queue(words_seen(seed=1, threshold=0.4)), "preview")
    drawn = [[demo.picture(image).tolist() for image in images] for images in (first, second, again, back)]
    assert drawn[0] != drawn[1]
    assert drawn[2] == drawn[1]
    assert drawn[3] == drawn[0]


def test_the_demo_edits_on_the_pocket_transformer(client, edit):
    nodes = only(edit(family="flux", inner_steps=0), "ceiling", "ddim", "kv edit", "invert report")
    entry = client.queue(nodes)
    source, rebuilt, edited = (demo.picture(client.images(entry, name)[0]) for name in ("ceiling", "ddim", "kv edit"))
    assert source.shape == rebuilt.shape == edited.shape == (128, 128, 3)
    assert "Uni-Inv" in entry["outputs"]["invert report"]["text"][0]
    assert (edited != rebuilt).any()
