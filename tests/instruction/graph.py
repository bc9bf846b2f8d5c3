"""The workflow of instruction editing: a language model says what the edit means, an InstructPix2Pix model makes it."""

from __future__ import annotations

from graphs.parts import (
    CAT,
    GUIDANCE,
    SCHEDULER,
    STEPS,
    WIDE,
    compare,
    decode,
    graph,
    group,
    load_image,
    note,
    save,
)
from instruct_pix2pix.graph import PICTURE_GUIDANCE, edit_checkpoint

TITLE = "Edit by an instruction (MGIE)"
VAGUE = "let it rest"

START = """## Say what to do, see what it means

1. **Load Checkpoint**: an InstructPix2Pix model (SD 1.5, or SDXL such as CosXL Edit).
2. **Load Image**: your photo, any size near 512 pixels a side.
3. **Load Multimodal Encoder**: a vision-language model, such as SmolVLM or Qwen2.5-VL, in models/palimpsest_encoders.
   Or connect **Load CLIP** with Qwen3-VL or Gemma to *clip* in its place.
4. **Express Instruction**: say what to do, short or vague. Queue.

**The expressed text** shows what the model made of it. Not what you meant? Write your own into *text* of **Edit
Instruction** and queue again: the language model is not run for it."""

HELP = """## Not right yet?

- **Nothing changes**: *cfg_conds* (text) up to 10, or *cfg_cond2_negative* (picture) down to 1.2.
- **Too much changes**: picture guidance 1.8 to 2.5, text guidance 5; or a mask, as in *Instruction with a mask*.
- **The text rambles**: *question*, add "Answer in one sentence that describes the new picture."
- **Another picture each time**: the seed of *RandomNoise* is fixed here; change it for another try."""

APPLE = """## With MGIE's own weights

**Load MGIE** reads a folder that was converted from the published files (its help page says how; they may not be used
commercially). Connect its *model* in the place of the checkpoint's, *edit_head* to *mgie* of Express Instruction
(disconnect the encoder), and set *route* of Edit Instruction to *edit head*. VAE and clip stay the checkpoint's."""


def language_model() -> dict:
    return {"type": "PalimpsestLoadMultimodalEncoder", "title": "A vision-language model", "size": [WIDE, 180],
            "unset": ["folder"], "widgets": {"connector": "none"}}  # fmt: skip


def express() -> dict:
    return {"type": "PalimpsestExpressInstruction", "title": "Your instruction", "size": [WIDE, 330],
            "widgets": {"instruction": VAGUE},
            "inputs": {"image": "image.IMAGE", "multimodal_encoder": "language.multimodal_encoder"}}  # fmt: skip


def in_view() -> dict:
    return {"type": "PreviewAny", "title": "The expressed text", "size": [WIDE, 220],
            "inputs": {"source": "express.expressed"}}  # fmt: skip


def prompts() -> dict:
    return {"type": "PalimpsestEditInstruction", "title": "Your own text instead, if you like", "size": [WIDE, 260],
            "inputs": {"expressed": "express.expressed", "clip": "checkpoint.CLIP",
                       "edit_head": "express.edit_head"}}  # fmt: skip


def with_picture() -> dict:
    return {"type": "InstructPixToPixConditioning", "title": "With the picture", "size": [WIDE, 120],
            "inputs": {"positive": "prompts.positive", "negative": "prompts.without_text", "vae": "checkpoint.VAE",
                       "pixels": "image.IMAGE"}}  # fmt: skip


def sampling() -> dict[str, dict]:
    """The host's sampler under both guidances, from new noise."""
    return {
        "guider": {"type": "DualCFGGuider", "size": [WIDE, 200],
                   "widgets": {"cfg_conds": GUIDANCE, "cfg_cond2_negative": PICTURE_GUIDANCE, "style": "regular"},
                   "inputs": {"model": "checkpoint.MODEL", "cond1": "shown.positive", "cond2": "shown.negative",
                              "negative": "prompts.negative"}},
        "noise": {"type": "RandomNoise", "size": [WIDE, 90],
                  "widgets": {"noise_seed": 0, "control_after_generate": "fixed"}},
        "euler": {"type": "KSamplerSelect", "size": [WIDE, 60], "widgets": {"sampler_name": "euler"}},
        "sigmas": {"type": "BasicScheduler", "size": [WIDE, 110],
                   "widgets": {"scheduler": SCHEDULER, "steps": STEPS, "denoise": 1.0},
                   "inputs": {"model": "checkpoint.MODEL"}},
        "sample": {"type": "SamplerCustomAdvanced", "size": [WIDE, 130],
                   "inputs": {"noise": "noise.NOISE", "guider": "guider.GUIDER", "sampler": "euler.SAMPLER",
                              "sigmas": "sigmas.SIGMAS", "latent_image": "shown.latent"}},
    }  # fmt: skip


def instruction() -> dict:
    apple = {"type": "PalimpsestLoadMGIE", "title": "MGIE's own weights, if you have them", "size": [WIDE, 120],
             "unset": ["folder"]}  # fmt: skip
    return graph(
        {
            "start": note("Start here", START, 460),
            "help": note("Not right yet?", HELP, 320),
            "apple": note("With MGIE's own weights", APPLE, 300),
        },
        group(
            "1 Your photo",
            "yours",
            {"checkpoint": edit_checkpoint(), "image": load_image(CAT, "Your photo"), "mgie": apple},
        ),
        group(
            "2 What the instruction means",
            "learned",
            {"language": language_model(), "express": express()},
            {"view": in_view()},
        ),
        group(
            "3 The edit",
            "edit",
            {"prompts": prompts(), "shown": with_picture()},
            sampling(),
            {"decode": decode("sample.output"), "save": save(), "compare": compare()},
        ),
    )


GRAPHS = {TITLE: instruction}
