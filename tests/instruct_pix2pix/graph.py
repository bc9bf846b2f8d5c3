"""The workflow of an instruction that acts in a mask: the host's InstructPix2Pix nodes with the pack's around them."""

from __future__ import annotations

from graphs.parts import (
    GUIDANCE,
    MASKED_COFFEE,
    SCHEDULER,
    STEPS,
    blend,
    checkpoint,
    compare,
    decode,
    encode,
    graph,
    group,
    invert,
    keep_outside,
    load_image,
    negative,
    note,
    preview,
    report,
    save,
    words,
)

EDIT_CHECKPOINT = {
    "name": "instruct-pix2pix-00-22000.safetensors",
    "url": "https://huggingface.co/timbrooks/instruct-pix2pix/resolve/main/instruct-pix2pix-00-22000.safetensors"
    "?download=true",
    "directory": "checkpoints",
}
INSTRUCTION, ITS_OBJECT = "make the cup blue", "cup"
PICTURE_GUIDANCE = 1.5  # of InstructPix2Pix, beside 7.5 for the text (arXiv:2211.09800)

START = """## Tell the model what to change, and where

1. **Load Checkpoint**: an InstructPix2Pix model (SD 1.5, or SDXL such as CosXL Edit).
2. **Load Image**: your photo. Right-click it, *Open in Mask Editor*, paint what may change.
3. **The instruction**: what to do, in a sentence. In *words*: the thing it is about.
4. Queue.

**Cross-Attention Mask** lets the instruction act in the mask alone, **Feature Blend** brings the photo back outside of
it while the picture is drawn, and **Keep Outside** puts the result into the photo: no pixel outside moves.

**No mask painted?** Connect *mask* of **Read Attention Map** in its place: it is where the model finds the thing. Its
report says how much it shares with yours. Masks of a detector serve as well."""

VALUES = """## Not right yet?

- **Nothing changes**: *cfg_conds* (text) up to 10, or *cfg_cond2_negative* (picture) down to 1.2.
- **Too much changes**: picture guidance 1.8 to 2.5; text guidance 5.
- **The instruction leaks out of the mask**: *layers* of Cross-Attention Mask on *all*, a tighter mask.
- **The new thing needs another shape**: sample from fresh noise, RandomNoise and an empty latent in the place of
  DisableNoise and *noise*; Feature Blend: *source_latents* re-noised source with the same seed, *end_percent* 0.5,
  *blend_latents_until* 0.8.

The three prompts of **Dual CFG Guider**: instruction and picture, the picture alone, nothing. Invert Picture and
Feature Blend take *the picture alone*, so that they see what the sampler sees."""


def edit_checkpoint() -> dict:
    return {**checkpoint(EDIT_CHECKPOINT), "title": "An InstructPix2Pix model"}


def shown() -> dict:
    """The host's node that puts the picture on both prompts: `positive` with the instruction, `negative` without."""
    return {"type": "InstructPixToPixConditioning", "title": "With the picture", "size": [380, 120],
            "inputs": {"positive": "words.positive", "negative": "negative.CONDITIONING", "vae": "checkpoint.VAE",
                       "pixels": "image.IMAGE"}}  # fmt: skip


def two_guidances(model: str) -> dict[str, dict]:
    """The host's sampler under the guidance of the text and that of the picture, from noise that was found."""
    return {
        "guider": {"type": "DualCFGGuider", "size": [380, 200],
                   "widgets": {"cfg_conds": GUIDANCE, "cfg_cond2_negative": PICTURE_GUIDANCE, "style": "regular"},
                   "inputs": {"model": model, "cond1": "shown.positive", "cond2": "shown.negative",
                              "negative": "negative.CONDITIONING"}},
        "noise": {"type": "DisableNoise", "size": [380, 40]},
        "euler": {"type": "KSamplerSelect", "size": [380, 60], "widgets": {"sampler_name": "euler"}},
        "sigmas": {"type": "BasicScheduler", "size": [380, 110],
                   "widgets": {"scheduler": SCHEDULER, "steps": STEPS, "denoise": 1.0},
                   "inputs": {"model": "checkpoint.MODEL"}},
        "sample": {"type": "SamplerCustomAdvanced", "size": [380, 130],
                   "inputs": {"noise": "noise.NOISE", "guider": "guider.GUIDER", "sampler": "euler.SAMPLER",
                              "sigmas": "sigmas.SIGMAS", "latent_image": "invert.noise"}},
    }  # fmt: skip


def masked_instruction() -> dict:
    mask = "image.MASK"
    return graph(
        {"start": note("Start here", START, 460), "values": note("Not right yet?", VALUES, 400)},
        group(
            "1 Your photo, and the instruction",
            "yours",
            {"checkpoint": edit_checkpoint(), "image": load_image(MASKED_COFFEE, "Your photo, with a mask"),
             "encode": encode()},
            {"words": words(INSTRUCTION, ITS_OBJECT, "The instruction"), "negative": negative(), "shown": shown(),
             "invert": invert(positive="shown.negative") },
        ),
        group(
            "2 Where it is, by the words",
            "learned",
            {
                "find": {"type": "PalimpsestFindWords", "size": [380, 180],
                         "inputs": {"model": "checkpoint.MODEL", "trajectory": "invert.trajectory",
                                    "tokens": "words.tokens", "positive": "shown.positive"}},
                "read": {"type": "PalimpsestReadAttentionMap", "size": [380, 340],
                         "inputs": {"record": "find.record", "image": "image.IMAGE", "mask": mask}},
                "map": preview("Where the model finds it", "read.heat_map", 260),
            },
        ),
        group(
            "3 The instruction acts in the mask",
            "edit",
            {
                "mask": {"type": "PalimpsestCrossAttentionMask", "size": [380, 300],
                         "inputs": {"model": "checkpoint.MODEL", "mask": mask}},
                "blend": with_the_picture(blend("mask.MODEL", mask)),
            },
            two_guidances("blend.MODEL"),
            {"decode": decode("sample.output"), "keep": keep_outside(mask), "save": save(images="keep.image")},
            {"compare": compare(after="keep.image"), "report": report("keep.image", "keep.mask", "")},
        ),
    )  # fmt: skip


def with_the_picture(node: dict) -> dict:
    """Feature Blend that looks at the source by the prompt that shows the picture alone."""
    return {**node, "inputs": node["inputs"] | {"positive": "shown.negative"}}


GRAPHS = {"Instruction with a mask (InstructPix2Pix, Feature Blend, Cross-Attention Mask)": masked_instruction}
