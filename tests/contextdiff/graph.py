"""The workflows of context-aware sampling: pictures that follow their prompt closer, and clips edited by text."""

from __future__ import annotations

from graphs.parts import (
    EDIT,
    GUIDANCE,
    PICTURE,
    SCHEDULER,
    SOURCE,
    STEPS,
    checkpoint,
    decode,
    encode,
    group,
    invert,
    load_image,
    note,
    sampler,
    save,
    text,
)
from pocket.settings import POCKET

CLIP = "palimpsest_walk.webp"
CLIP_SOURCE = "a brown dog standing on the left in the park"
CLIP_EDIT = "a blue dog standing on the left in the park"
ADAPTER = "palimpsest_example"  # Save Context Adapter adds _00001.safetensors

START_ALIGN = """## Align a picture with its prompt

1. **Load Checkpoint**, **Load Image**: your SD 1.5 or SDXL model, your photo at the model's size.
2. **The picture as it is**: describe the photo. **The picture as it should be**: the same text with the change.
3. Queue.

**Train Context Adapter** learns on the photo what its prompt means there; **Save Context Adapter** keeps it for other
prompts. **Context-Aware Sampler** goes up to the photo's noise and down to the edit on a path that the adapter shifts.
The plot under the training tells whether sampling gained what the loss did. The small example is content with 60 steps;
give a real photo 200."""

START_DRAW = """## Draw with a saved context adapter

1. **Load Context Adapter**: the file that Save Context Adapter wrote (models/palimpsest_context; press R to list new
   ones).
2. **Load Checkpoint**: a model of the family that the adapter was trained with.
3. Write a prompt, queue: the same noise is drawn by the plain sampler and by the **Context-Aware Sampler**.

*strength* 0 is the plain sampler, bit for bit; 0.5 to 1.5 is useful."""

START_CLIP = """## Edit a clip by text

1. **Load Checkpoint**: your SD 1.5 or SDXL model.
2. **Load Image**: an animated picture; or put **Load Video** and **Get Video Components** in its place. 8 to 24 frames
   at the model's size.
3. **The clip as it is**: describe it. **The clip as it should be**: the same text with other words.
4. Queue.

**Video Attention** lets the frames see one another, so that they stay one clip. **Attention Fusion** makes the edit
look where the source looked, so that its motion stays."""

VALUES_CLIP = """## Not right yet?

- **The edit does not show**: both *..._until* down to 0.3; *emphasis* 2; guidance (cfg) up.
- **The motion is lost**: *self_attention_until* up to 0.8.
- **The shape must change** (a dog becomes a cat): its word into *blend_words*.
- **It flickers**: *look_at* "all" in Video Attention; *temporal* 0.1.

Steps and scheduler must agree between Invert Picture and the sampler."""


def schedule(at: list[int]) -> dict:
    return {"type": "BasicScheduler", "at": at, "size": [270, 110],
            "widgets": {"scheduler": SCHEDULER, "steps": STEPS, "denoise": 1.0},
            "inputs": {"model": "checkpoint.MODEL"}}  # fmt: skip


def sampler_custom(
    at: list[int], title: str, positive: str, sampler: str, sigmas: str, latent: str, *, cfg: float = GUIDANCE,
    noise: bool = False,
) -> dict:  # fmt: skip
    return {
        "type": "SamplerCustom", "title": title, "at": at, "size": [380, 320],
        "widgets": {"add_noise": noise, "noise_seed": 0, "control_after_generate": "fixed", "cfg": cfg},
        "inputs": {"model": "checkpoint.MODEL", "positive": positive, "negative": "negative.CONDITIONING",
                   "sampler": sampler, "sigmas": sigmas, "latent_image": latent},
    }  # fmt: skip


def shown(at: list[int], decoded: str, title: str) -> dict:
    return {**save(at, title), "inputs": {"images": decoded}}


def align() -> dict:
    nodes = {
        "checkpoint": checkpoint([40, 80]),
        "image": load_image([40, 250], PICTURE, "Your photo"),
        "encode": encode([40, 720], "image.IMAGE"),
        "source": text("The picture as it is", [40, 850], SOURCE),
        "edit": text("The picture as it should be", [40, 1030], EDIT),
        "negative": text("Negative prompt", [40, 1210], ""),
        "train": {"type": "PalimpsestTrainContextAdapter", "at": [500, 80], "size": [380, 460],
                  "widgets": POCKET["PalimpsestTrainContextAdapter"]
                  | {"steps": 60, "validate_every": 30, "control_after_generate": "fixed"},
                  "inputs": {"model": "checkpoint.MODEL", "latent": "encode.LATENT",
                             "positive": "source.CONDITIONING"}},
        "keep": {"type": "PalimpsestSaveContextAdapter", "at": [500, 760], "size": [380, 110],
                 "widgets": {"filename": ADAPTER}, "inputs": {"context_adapter": "train.context_adapter"}},
        "plot": {"type": "PreviewImage", "title": "What was learned", "at": [500, 950], "size": [380, 340],
                 "inputs": {"images": "train.plot"}},
        "context": {"type": "PalimpsestContextSampler", "at": [960, 80], "size": [380, 180],
                    "inputs": {"context_adapter": "train.context_adapter"}},
        "levels": schedule([960, 460]),
        "upward": {"type": "FlipSigmas", "at": [960, 640], "size": [270, 40], "inputs": {"sigmas": "levels.SIGMAS"}},
        "noise": sampler_custom([1400, 80], "Up to the photo's noise", "source.CONDITIONING", "context.sampler",
                                "upward.SIGMAS", "encode.LATENT", cfg=1.0),
        "sample": sampler_custom([1400, 520], "Down to the edit", "edit.CONDITIONING", "context.sampler",
                                 "levels.SIGMAS", "noise.output"),
        "decode": decode([1840, 80], "sample.output"),
        "save": save([1840, 210]),
        "start": note("Start here", [-480, 40], [440, 340], START_ALIGN),
    }  # fmt: skip
    groups = [
        group("1 Your photo, its prompt and the edit's", "yours", 0, 460, 1440),
        group("2 Learn what the prompt means in it", "learned", 480, 440, 1440),
        group("3 Edit", "edit", 940, 1300, 1440),
    ]
    return {"nodes": nodes, "groups": groups}


def draw() -> dict:
    nodes = {
        "load": {"type": "PalimpsestLoadContextAdapter", "at": [40, 80], "size": [380, 110],
                 "widgets": {"file": f"{ADAPTER}_00001.safetensors"}},
        "checkpoint": checkpoint([40, 270]),
        "prompt": text("The picture to draw", [40, 450], EDIT),
        "negative": text("Negative prompt", [40, 630], ""),
        "empty": {"type": "EmptyLatentImage", "at": [40, 810], "size": [380, 130],
                  "widgets": {"width": 128, "height": 128, "batch_size": 4}},
        "context": {"type": "PalimpsestContextSampler", "at": [480, 80], "size": [380, 180],
                    "inputs": {"context_adapter": "load.context_adapter"}},
        "plain": {"type": "KSamplerSelect", "at": [480, 470], "size": [270, 60], "widgets": {"sampler_name": "ddim"}},
        "levels": schedule([480, 610]),
        "sample": sampler_custom([920, 80], "With the adapter", "prompt.CONDITIONING", "context.sampler",
                                 "levels.SIGMAS", "empty.LATENT", noise=True),
        "sample plain": sampler_custom([920, 620], "Without", "prompt.CONDITIONING", "plain.SAMPLER",
                                       "levels.SIGMAS", "empty.LATENT", noise=True),
        "decode": decode([1360, 80], "sample.output"),
        "save": shown([1360, 210], "decode.IMAGE", "With the adapter"),
        "decode plain": decode([1360, 720], "sample plain.output"),
        "save plain": shown([1360, 850], "decode plain.IMAGE", "Without"),
        "start": note("Start here", [-480, 40], [440, 300], START_DRAW),
    }  # fmt: skip
    groups = [
        group("1 Model, adapter, prompt", "yours", 0, 440, 1340),
        group("2 The same noise, with and without", "edit", 460, 1320, 1340),
    ]
    return {"nodes": nodes, "groups": groups}


def edit_clip() -> dict:
    nodes = {
        "checkpoint": checkpoint([40, 80]),
        "image": load_image([40, 250], CLIP, "Your clip"),
        "encode": encode([40, 720], "image.IMAGE"),
        "source": text("The clip as it is", [40, 850], CLIP_SOURCE),
        "negative": text("Negative prompt", [40, 1030], ""),
        "video": {"type": "PalimpsestVideoAttention", "at": [480, 80], "size": [380, 140],
                  "inputs": {"model": "checkpoint.MODEL"}},
        "invert": {**invert([480, 400]), "inputs": invert([0, 0])["inputs"] | {"model": "video.MODEL"}},
        "fusion": {"type": "PalimpsestAttentionFusion", "at": [940, 80], "size": [380, 480],
                   "widgets": {"source_text": CLIP_SOURCE, "edit_text": CLIP_EDIT, "self_attention_until": 0.8,
                               "cross_attention_until": 0.8} | POCKET["PalimpsestAttentionFusion"],
                   "inputs": {"model": "video.MODEL", "trajectory": "invert.trajectory", "clip": "checkpoint.CLIP"}},
        "sample": sampler([940, 800], "fusion.MODEL", "fusion.positive", "invert.noise"),
        "decode": decode([1380, 80], "sample.LATENT"),
        "save": {"type": "SaveAnimatedWEBP", "title": "The edited clip", "at": [1380, 210], "size": [380, 480],
                 "widgets": {"filename_prefix": "palimpsest_clip", "fps": 8.0, "lossless": True, "quality": 90,
                             "method": "default"}, "inputs": {"images": "decode.IMAGE"}},
        "report": {"type": "PalimpsestEditReport", "at": [1820, 80], "size": [380, 460],
                   "widgets": {"prompt": CLIP_EDIT, "source_prompt": CLIP_SOURCE, "is_clip": True},
                   "inputs": {"source": "image.IMAGE", "edited": "decode.IMAGE"}},
        "start": note("Start here", [-480, 40], [440, 320], START_CLIP),
        "values": note("Not right yet?", [-480, 400], [440, 280], VALUES_CLIP),
    }  # fmt: skip
    groups = [
        group("1 Your clip, as it is", "yours", 0, 900),
        group("2 Edit it", "edit", 920, 1320),
    ]
    return {"nodes": nodes, "groups": groups}


GRAPHS = {
    "Align a picture with its prompt (Context)": align,
    "Draw with a saved context adapter (Context)": draw,
    "Edit a clip by text (Context)": edit_clip,
}
