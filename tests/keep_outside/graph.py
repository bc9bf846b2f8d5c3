"""The workflow of Keep Outside: nothing changes but the mask, whatever edits."""

from __future__ import annotations

from graphs.parts import (
    MASKED_PICTURE,
    RECOLOURED,
    SCHEDULER,
    checkpoint,
    decode,
    encode,
    group,
    keep_outside,
    kept,
    load_image,
    note,
    report,
    text,
)

START_KEEP = """## Keep everything else, after any edit

1. Any graph that edits a photo: here image to image. Put yours in its place.
2. **Load Image**: the photo with a mask over what may change (right-click, *Open in Mask Editor*).
3. **Keep Outside**: finds how the edit shifted and tinted the picture, undoes it, and puts the edit into the photo.
   Outside the mask every pixel is the photo's own, bit for bit.
4. **Edit Report** measures what was kept, before and after."""


def any_edit(at: list[int]) -> dict:
    """Image to image: stands for whatever edits."""
    return {
        "type": "KSampler", "title": "Any edit", "at": at, "size": [380, 290],
        "widgets": {"seed": 7, "control_after_generate": "fixed", "steps": 20, "cfg": 3.0, "sampler_name": "euler",
                    "scheduler": SCHEDULER, "denoise": 0.7},
        "inputs": {"model": "checkpoint.MODEL", "positive": "edit.CONDITIONING",
                   "negative": "negative.CONDITIONING", "latent_image": "encode.LATENT"},
    }  # fmt: skip


def keep_everything_else() -> dict:
    nodes = {
        "checkpoint": checkpoint([40, 80]),
        "image": load_image([40, 250], MASKED_PICTURE, "Your photo, with a mask"),
        "encode": encode([40, 720], "image.IMAGE"),
        "edit": text("The picture as it should be", [40, 850], RECOLOURED),
        "negative": text("Negative prompt", [40, 1030], ""),
        "sample": any_edit([500, 80]),
        "decode": decode([500, 440], "sample.LATENT"),
        "keep": keep_outside([960, 80], "image.MASK"),
        "save": kept([960, 420]),
        "before": report([1420, 80], "decode.IMAGE", "keep.mask", RECOLOURED, "What the edit alone keeps"),
        "after": report([1840, 80], "keep.image", "keep.mask", RECOLOURED, "What is kept in the end"),
        "start": note("Start here", [-480, 40], [440, 360], START_KEEP),
    }
    groups = [
        group("1 Any edit", "yours", 0, 920),
        group("2 Only the mask changes", "edit", 940, 1320),
    ]
    return {"nodes": nodes, "groups": groups}


GRAPHS = {
    "Keep everything else, after any edit (Regions)": keep_everything_else,
}
