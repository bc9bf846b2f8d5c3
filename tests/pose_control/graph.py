"""The workflow of an action that is shown, not told: a pose ControlNet beside Apply KV."""

from __future__ import annotations

from graphs.parts import (
    CAT,
    WIDE,
    checkpoint,
    compare,
    decode,
    encode,
    graph,
    group,
    invert,
    load_image,
    negative,
    note,
    preview,
    sampler,
    save,
    text,
)
from kv.graph import apply, tune

TITLE = "An action that the words do not reach (pose ControlNet)"
CONTROL = {
    "name": "control_v11p_sd15_openpose_fp16.safetensors",
    "url": "https://huggingface.co/comfyanonymous/ControlNet-v1-1_fp16_safetensors/resolve/main/"
    "control_v11p_sd15_openpose_fp16.safetensors?download=true",
    "directory": "controlnet",
}
POSE = "palimpsest_pose.webp"
UPRIGHT = "a photo of a tabby cat"
SITTING_UPRIGHT = "a photo of a tabby cat sitting upright, whole body"

START = """## An action that the words do not reach

Some actions a prompt alone does not bring about, and words hardly say which way someone looks. A skeleton does.

1. **Load Checkpoint**: an SD 1.5 model. **Load ControlNet Model**: OpenPose for SD 1.5 (ControlNet 1.1, licence
   OpenRAIL, 723 MB). The editor offers to download both.
2. **Your photo**: someone whose body can be seen. The cat only stands in for it: this ControlNet knows people. For
   animals take one that was trained on animals' skeletons.
3. **The pose**: an OpenPose picture, coloured limbs on black. Pose editors draw them, *OpenPose* preprocessors read
   them off a photo. Let it stand where your subject stands, and as large.
4. **The picture as it should be**: the action in words, too.
5. Queue."""

HELP = """## Not right yet?

- **The old pose stays**: *strength* (Apply ControlNet) to 1.5, start_percent (Apply KV) to 0.2.
- **Stiff, or limbs doubled**: *end_percent* of Apply ControlNet to 0.5; the pose is decided early.
- **Coat, clothes or colours missing**: raise source_guidance (Apply KV) by steps of 2.
- **It stands in the wrong place**: move the skeleton in its picture.

The ControlNet acts on the edit alone. The photo is inverted and recorded without it."""


def control() -> dict:
    """The editor offers to download what `models` names."""
    return {"type": "ControlNetLoader", "size": [WIDE, 60], "widgets": {"control_net_name": CONTROL["name"]},
            "models": [CONTROL]}  # fmt: skip


def posed() -> dict:
    """Both prompts of the edit with the pose."""
    return {
        "type": "ControlNetApplyAdvanced", "size": [WIDE, 190],
        "widgets": {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0},
        "inputs": {"positive": "edit.CONDITIONING", "negative": "negative.CONDITIONING",
                   "control_net": "control.CONTROL_NET", "image": "pose.IMAGE", "vae": "checkpoint.VAE"},
    }  # fmt: skip


def by_a_pose() -> dict:
    sampled = sampler("apply.MODEL", "posed.positive")
    sampled["inputs"] |= {"negative": "posed.negative"}
    return graph(
        {"start": note("Start here", START, 520), "help": note("Not right yet?", HELP, 330)},
        group("1 Your picture", "yours", {
            "checkpoint": checkpoint(),
            "image": load_image(CAT, "Your photo"),
            "encode": encode(),
            "source": text("The picture as it is", UPRIGHT),
            "negative": negative(),
        }),
        group("2 Record it", "learned", {"invert": invert(), "tune": tune()}, {
            "rebuilt": decode("invert.reconstruction"), "look": preview("The picture, redrawn", "rebuilt.IMAGE"),
        }),
        group("3 The pose", "edit", {
            "control": control(),
            "pose": load_image(POSE, "The pose"),
            "edit": text("The picture as it should be", SITTING_UPRIGHT),
            "posed": posed(),
        }),
        group("4 Edit it", "edit", {"apply": apply("tune.kv"), "sample": sampled, "decode": decode()}, {
            "save": save(), "compare": compare(),
        }),
    )  # fmt: skip


GRAPHS = {TITLE: by_a_pose}
