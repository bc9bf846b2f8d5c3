"""The workflow of Feature Blend on a transformer: an edit that begins in a photo's noise, the photo around it."""

from __future__ import annotations

from graphs.families import SD_35, both_ways, guided_sampling, inverted, published
from graphs.parts import (
    CUP,
    MASKED_COFFEE,
    WIDE,
    blend,
    checkpoint,
    compare,
    decode,
    encode,
    graph,
    group,
    keep_outside,
    load_image,
    negative,
    note,
    save,
    text,
)

TITLE = "Edit a photo, its place kept, on SD 3.5 (Feature Blend)"
JUICE = "a photo of a glass of orange juice on a wooden table"
STEPS, GUIDANCE, SCHEDULER, SIDES = 30, 4.0, "sgm_uniform", 16

START_HERE = """## Edit a photo on SD 3.5, its place kept

1. **Load Checkpoint**: SD 3.5 Large or Medium, with its text encoders in the file. The editor offers to download it.
2. **Your photo**: right-click it, *Open in Mask Editor*, paint what may change, a little beyond its outline.
3. **The picture as it is**: describe the photo. **The picture as it should be**: the same text with the change.
4. Queue. As long as you change only the new text, later runs only sample.

**Invert Picture** finds the noise from which SD 3.5 redraws the photo, and the edit begins in it. **Feature Blend**
brings the photo back around the mask at every step, **Keep Outside** puts the result into the photo: no pixel outside
moves at all.

SD 3.5 multiplies a latent by 0 where it begins, so the noise has a socket of its own, *inverted_noise*."""

VALUES = """## Not right yet?

- **The edit hardly shows**: cfg 5 to 7; a longer new text; *grow_mask* 1 to 2.
- **The old outline shows through**: a mask with more room; *end_percent* 0.8.
- **The old shape should stay**: *alpha_inside* 0.7 to 0.9.
- **A seam around the mask**: *blend_latents_until* 0.5 to 0.8; *feather* 16 in Keep Outside.
- **The photo alone does not come back** (Invert Picture's report): a text that fits it better; more steps.

*blend_latents_until* is 1, for SD 3.5's pooled text acts behind the last block, too, where features do not reach.

The same graph serves FLUX.2, Klein, Qwen-Image and Z-Image, the base models, with their loaders; there 0.5 will do.

Values to start from; they were not tried on published weights."""


def scaled() -> dict:
    return {"type": "ImageScaleToTotalPixels", "title": "Your photo, at the model's size", "size": [WIDE, 130],
            "widgets": {"upscale_method": "lanczos", "megapixels": 1.0, "resolution_steps": SIDES},
            "inputs": {"image": "photo.IMAGE"}}  # fmt: skip


def edit_in_place() -> dict:
    held = blend("checkpoint.MODEL", "photo.MASK")
    held["widgets"] = held["widgets"] | {"blend_latents_until": 1.0}
    return graph(
        {"start": note("Start here", START_HERE, 440), "values": note("Not right yet?", VALUES, 440)},
        group(
            "1 Your photo, and the way to its noise",
            "yours",
            {
                "checkpoint": checkpoint(published(SD_35, "checkpoints")),
                "photo": load_image(MASKED_COFFEE, "Your photo, with a mask"),
                "image": scaled(),
                "encode": encode(),
            },
            {
                "source": text("The picture as it is", CUP),
                "sigmas": both_ways("checkpoint.MODEL", STEPS, SCHEDULER),
                "invert": inverted("checkpoint.MODEL"),
            },
        ),
        group(
            "2 Edit it, the photo around it",
            "edit",
            {"edit": text("The picture as it should be", JUICE), "negative": negative(), "blend": held},
            {
                **guided_sampling("blend.MODEL", "edit.CONDITIONING", GUIDANCE, "invert.inverted_noise",
                                  "invert.noise"),
                "decode": decode("sample.output"),
                "keep": keep_outside("photo.MASK"),
            },
            {"save": save(images="keep.image"), "compare": compare(after="keep.image")},
        ),
    )  # fmt: skip


GRAPHS = {TITLE: edit_in_place}
