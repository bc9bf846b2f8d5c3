"""The workflows of context-aware sampling: pictures that follow their prompt closer, and clips edited by text."""

from __future__ import annotations

from graphs.parts import (
    ASLEEP,
    AWAKE,
    CAT,
    CLIP,
    GUIDANCE,
    MASKED_CAT,
    SCHEDULER,
    STEPS,
    YAWNING,
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
    save_clip,
    text,
)

CLIP_SOURCE = "a video of a red cup of coffee on a wooden table"
CLIP_EDIT = "a video of a blue cup of coffee on a wooden table"
ADAPTER = "palimpsest_example"  # Save Context Adapter adds _00001.safetensors
SIDE = 512
PAPERS_STEPS = 20

START_ALIGN = """## Align a picture with its prompt

1. **Load Checkpoint**, **Load Image**: your SD 1.5 or SDXL model, your photo at the model's size.
2. **The picture as it is**: describe the photo. **The picture as it should be**: the same text with the change.
3. Queue.

**Train Context Adapter** learns on the photo what its prompt means there; **Save Context Adapter** keeps it for other
prompts. **Context-Aware Sampler** goes up to the photo's noise and down to the edit on a path that the adapter shifts.
The plot under the training tells whether sampling gained what the loss did."""

START_DRAW = """## Draw with a saved context adapter

**No file yet?** Run the template *Align a picture with its prompt* once: it writes it. Then press R here.

1. **Load Context Adapter**: the file that Save Context Adapter wrote (models/palimpsest_context).
2. **Load Checkpoint**: a model of the family that the adapter was trained with.
3. Write a prompt, queue: the same noise is drawn by the plain sampler and by the **Context-Aware Sampler**.

*strength* 0 is the plain sampler, bit for bit; 0.5 to 1.5 is useful."""

START_CLIP = """## Edit a clip by text

1. **Load Checkpoint**: your SD 1.5 or SDXL model.
2. **Load Image**: an animated picture; or put **Load Video** and **Get Video Components** in its place. 8 to 24 frames
   at the model's size (here 8 of 512 x 384).
3. **The clip as it is**: describe it. **The clip as it should be**: the same text with other words.
4. Queue.

**Video Attention** lets the frames see one another, so that they stay one clip. **Attention Fusion** makes the edit
look where the source looked, so that its motion stays."""

VALUES_CLIP = """## Not right yet?

- **The edit does not show**: both *..._until* down to 0.3; *emphasis* 2; guidance (cfg) up.
- **The motion is lost**: *self_attention_until* up to 1.
- **The shape must change** (a dog becomes a cat): its word into *blend_words*.
- **It flickers**: *look_at* "all" in Video Attention; *temporal* 0.3.

Steps and scheduler must agree between Invert Picture and the sampler."""

START_CONTEXT = """## Edit a clip by text, with context

ContextDiff's own use, in its order and with its numbers: 20 steps, attention fused over the first half.

1. **Load Checkpoint**, **Load Image** (an animated picture), two texts: as in *Edit a clip by text*.
2. Queue.

**Train Context Adapter** learns on your clip what its prompt means there. **Invert Picture** goes up with the adapter,
so that **Attention Fusion** sees the source on the path on which the **Context-Aware Sampler** draws the edit."""

VALUES_CONTEXT = """## Not right yet?

- **The edit does not show**: both *..._until* in Attention Fusion down to 0.3; guidance (cfg) up.
- **The clip itself does not come back**: *context_refinements* 10 in Invert Picture.
- **Odd colours**: *strength* 0.5 in the Context-Aware Sampler **and** *context_strength* 0.5 in Invert Picture; or
  fewer training steps.

Both nodes take the same adapter, the same strength and the same noise levels."""


START_LAYOUT = """## Edit by prompt, the layout held

1. **Load Checkpoint**, **Load Image**: your SD 1.5 or SDXL model, your photo at the model's size. Right-click the
   photo, **Open in Mask Editor**, paint the subject.
2. **The picture as it is**: describe it. **The picture as it should be**: the same text with the change.
3. Queue.

**Class or Layout Context** gives the adapter the mask as a layout of two parts to read in the text's place; the model
itself still reads your texts. **Train Context Adapter** learns on the photo what the layout means there, **Invert
Picture** goes up with it, the **Context-Aware Sampler** down to the edit.

More parts: connect a picture of flat colours in place of the mask, and write its colours into *palette*.
*kind* class: a number for the whole picture, where you train on many pictures of several classes."""


def schedule(steps: int = STEPS) -> dict:
    return {"type": "BasicScheduler", "size": [380, 110],
            "widgets": {"scheduler": SCHEDULER, "steps": steps, "denoise": 1.0},
            "inputs": {"model": "checkpoint.MODEL"}}  # fmt: skip


def sampler_custom(
    title: str, positive: str, sampler: str, sigmas: str, latent: str, *, cfg: float = GUIDANCE, noise: bool = False,
    model: str = "checkpoint.MODEL",
) -> dict:  # fmt: skip
    return {
        "type": "SamplerCustom", "title": title, "size": [380, 260],
        "widgets": {"add_noise": noise, "noise_seed": 0, "control_after_generate": "fixed", "cfg": cfg},
        "inputs": {"model": model, "positive": positive, "negative": "negative.CONDITIONING",
                   "sampler": sampler, "sigmas": sigmas, "latent_image": latent},
    }  # fmt: skip


def align() -> dict:
    return graph(
        {"start": note("Start here", START_ALIGN, 330)},
        group(
            "1 Your photo and its prompt",
            "yours",
            {
                "checkpoint": checkpoint(),
                "image": load_image(CAT, "Your photo"),
                "encode": encode(),
                "source": text("The picture as it is", AWAKE),
                "negative": negative(),
            },
        ),
        group(
            "2 Learn what the prompt means in it",
            "learned",
            {
                "train": {"type": "PalimpsestTrainContextAdapter", "size": [380, 460],
                          "widgets": {"steps": 200, "validate_every": 50, "control_after_generate": "fixed"},
                          "inputs": {"model": "checkpoint.MODEL", "latent": "encode.LATENT",
                                     "positive": "source.CONDITIONING"}},
                "plot": preview("What was learned", "train.plot"),
                "keep": {"type": "PalimpsestSaveContextAdapter", "size": [380, 90],
                         "widgets": {"filename": ADAPTER}, "inputs": {"context_adapter": "train.context_adapter"}},
            },
        ),
        group(
            "3 Edit",
            "edit",
            {
                "edit": text("The picture as it should be", ASLEEP),
                "context": {"type": "PalimpsestContextSampler", "size": [380, 180],
                            "inputs": {"context_adapter": "train.context_adapter"}},
                "levels": schedule(),
                "upward": {"type": "FlipSigmas", "size": [380, 40], "inputs": {"sigmas": "levels.SIGMAS"}},
            },
            {
                "noise": sampler_custom("Up to the photo's noise", "source.CONDITIONING", "context.sampler",
                                        "upward.SIGMAS", "encode.LATENT", cfg=1.0),
                "sample": sampler_custom("Down to the edit", "edit.CONDITIONING", "context.sampler",
                                         "levels.SIGMAS", "noise.output"),
                "decode": decode("sample.output"),
            },
            {"save": save(), "compare": compare()},
        ),
    )  # fmt: skip


def draw() -> dict:
    return graph(
        {"start": note("Start here", START_DRAW, 320)},
        group(
            "1 Model, adapter, prompt",
            "yours",
            {
                "checkpoint": checkpoint(),
                "load": {"type": "PalimpsestLoadContextAdapter", "size": [380, 90], "unset": ["file"]},
                "prompt": text("The picture to draw", ASLEEP),
                "negative": negative(),
                "empty": {"type": "EmptyLatentImage", "size": [380, 130],
                          "widgets": {"width": SIDE, "height": SIDE, "batch_size": 4}},
            },
        ),
        group(
            "2 The same noise, with and without",
            "edit",
            {
                "context": {"type": "PalimpsestContextSampler", "size": [380, 180],
                            "inputs": {"context_adapter": "load.context_adapter"}},
                "plain": {"type": "KSamplerSelect", "size": [380, 60], "widgets": {"sampler_name": "ddim"}},
                "levels": schedule(),
            },
            {
                "sample": sampler_custom("With the adapter", "prompt.CONDITIONING", "context.sampler",
                                         "levels.SIGMAS", "empty.LATENT", noise=True),
                "decode": decode("sample.output"),
                "sample plain": sampler_custom("Without", "prompt.CONDITIONING", "plain.SAMPLER",
                                               "levels.SIGMAS", "empty.LATENT", noise=True),
                "decode plain": decode("sample plain.output"),
            },
            {"save": save("With the adapter"), "save plain": save("Without", "decode plain.IMAGE")},
            {"compare": compare("decode plain.IMAGE", title="Without and with (needs Nodes 2.0)")},
        ),
    )  # fmt: skip


def your_clip() -> dict[str, dict]:
    return {
        "checkpoint": checkpoint(),
        "image": load_image(CLIP, "Your clip"),
        "encode": encode(),
        "source": text("The clip as it is", CLIP_SOURCE),
        "negative": negative(),
    }


def frames() -> dict:
    """Frames that look at one another."""
    return {"type": "PalimpsestVideoAttention", "size": [380, 140], "inputs": {"model": "checkpoint.MODEL"}}


def fusion(until: float) -> dict:
    return {
        "type": "PalimpsestAttentionFusion", "size": [380, 480],
        "widgets": {"source_text": CLIP_SOURCE, "edit_text": CLIP_EDIT, "self_attention_until": until,
                    "cross_attention_until": until},
        "inputs": {"model": "video.MODEL", "trajectory": "invert.trajectory", "clip": "checkpoint.CLIP"},
    }  # fmt: skip


def edited_clip() -> tuple[dict[str, dict], dict[str, dict]]:
    """Two columns: the clip, and its numbers."""
    report = {
        "type": "PalimpsestEditReport", "size": [380, 470],
        "widgets": {"prompt": CLIP_EDIT, "source_prompt": CLIP_SOURCE, "is_clip": True},
        "inputs": {"source": "image.IMAGE", "edited": "decode.IMAGE"},
    }  # fmt: skip
    save = save_clip("The edited clip", 440, fps=8.0, lossless=True)
    return {"save": save, "compare": compare()}, {"report": report}


def edit_clip() -> dict:
    return graph(
        {"start": note("Start here", START_CLIP, 330), "values": note("Not right yet?", VALUES_CLIP, 270)},
        group(
            "1 Your clip, as it is",
            "yours",
            your_clip(),
            {
                "video": frames(),
                "invert": {**invert(), "inputs": invert()["inputs"] | {"model": "video.MODEL"}},
            },
        ),
        group(
            "2 Edit it",
            "edit",
            {
                "fusion": fusion(0.8),
                "sample": sampler("fusion.MODEL", "fusion.positive"),
                "decode": decode(),
            },
            *edited_clip(),
        ),
    )  # fmt: skip


def edit_clip_with_context() -> dict:
    inverted = invert()["inputs"] | {"model": "video.MODEL", "context_adapter": "train.context_adapter",
                                     "sigmas": "levels.SIGMAS"}  # fmt: skip
    return graph(
        {"start": note("Start here", START_CONTEXT, 330), "values": note("Not right yet?", VALUES_CONTEXT, 290)},
        group(
            "1 Your clip, as it is",
            "yours",
            your_clip(),
        ),
        group(
            "2 Learn it, and go up to its noise",
            "learned",
            {
                "video": frames(),
                "train": {"type": "PalimpsestTrainContextAdapter", "size": [380, 460],
                          "widgets": {"steps": 200, "validate_every": 50, "batch_size": 8, "video": True,
                                      "control_after_generate": "fixed"},
                          "inputs": {"model": "video.MODEL", "latent": "encode.LATENT",
                                     "positive": "source.CONDITIONING"}},
                "levels": schedule(PAPERS_STEPS),
            },
            {
                "invert": {**invert(), "widgets": invert()["widgets"] | {"steps": PAPERS_STEPS}, "inputs": inverted},
                "plot": preview("What was learned", "train.plot"),
            },
        ),
        group(
            "3 Edit it",
            "edit",
            {
                "fusion": fusion(0.5),
                "context": {"type": "PalimpsestContextSampler", "size": [380, 180],
                            "inputs": {"context_adapter": "train.context_adapter"}},
            },
            {
                "sample": sampler_custom("Down to the edit", "fusion.positive", "context.sampler", "levels.SIGMAS",
                                         "invert.noise", model="fusion.MODEL"),
                "decode": decode("sample.output"),
            },
            *edited_clip(),
        ),
    )  # fmt: skip


def condition(positive: str) -> dict:
    return {"type": "PalimpsestContextCondition", "size": [380, 240],
            "inputs": {"positive": positive, "layout": "parts.IMAGE"}}  # fmt: skip


def hold_layout() -> dict:
    inverted = invert("encode.LATENT", "told.positive")["inputs"] | {"context_adapter": "train.context_adapter"}
    return graph(
        {"start": note("Start here", START_LAYOUT, 370)},
        group(
            "1 Your photo, its parts and its prompt",
            "yours",
            {
                "checkpoint": checkpoint(),
                "image": load_image(MASKED_CAT, "Your photo, its subject masked"),
                "encode": encode(),
                "source": text("The picture as it is", AWAKE),
                "negative": negative(),
            },
        ),
        group(
            "2 Learn what the layout means in it",
            "learned",
            {
                "parts": {"type": "MaskToImage", "size": [380, 40], "inputs": {"mask": "image.MASK"}},
                "told": condition("source.CONDITIONING"),
                "train": {"type": "PalimpsestTrainContextAdapter", "size": [380, 460],
                          "widgets": {"steps": 200, "validate_every": 50, "control_after_generate": "fixed"},
                          "inputs": {"model": "checkpoint.MODEL", "latent": "encode.LATENT",
                                     "positive": "told.positive"}},
            },
            {
                "invert": {**invert(), "inputs": inverted},
                "plot": preview("What was learned", "train.plot"),
            },
        ),
        group(
            "3 Edit",
            "edit",
            {
                "edit": text("The picture as it should be", YAWNING),
                "told edit": condition("edit.CONDITIONING"),
                "context": {"type": "PalimpsestContextSampler", "size": [380, 180],
                            "inputs": {"context_adapter": "train.context_adapter"}},
                "levels": schedule(),
            },
            {
                "sample": sampler_custom("Down to the edit", "told edit.positive", "context.sampler", "levels.SIGMAS",
                                         "invert.noise"),
                "decode": decode("sample.output"),
            },
            {"save": save(), "compare": compare()},
        ),
    )  # fmt: skip


GRAPHS = {
    "Align a picture with its prompt (Context)": align,
    "Draw with a saved context adapter (Context)": draw,
    "Edit a clip by text (Context)": edit_clip,
    "Edit a clip by text, with context (ContextDiff)": edit_clip_with_context,
    "Edit by a prompt, the layout held (ContextDiff)": hold_layout,
}
