"""The workflow of Keep Outside: nothing changes but the mask, whatever edits."""

from __future__ import annotations

from graphs.parts import (
    BLUE_CUP,
    GUIDANCE,
    MASKED_COFFEE,
    SCHEDULER,
    STEPS,
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
    report,
    save,
    text,
)

START_KEEP = """## Keep everything else, after any edit

1. Any graph that edits a photo: here image to image. Put yours in its place.
2. **Load Image**: the photo with a mask over what may change (right-click, *Open in Mask Editor*).
3. **Keep Outside**: finds how the edit shifted and tinted the picture, undoes it, and puts the edit into the photo.
   Outside the mask every pixel is the photo's own, bit for bit.
4. **Edit Report** measures what was kept, before and after."""


def any_edit() -> dict:
    """Image to image: stands for whatever edits."""
    return {
        "type": "KSampler", "title": "Any edit", "size": [380, 290],
        "widgets": {"seed": 7, "control_after_generate": "fixed", "steps": STEPS, "cfg": GUIDANCE,
                    "sampler_name": "euler", "scheduler": SCHEDULER, "denoise": 0.7},
        "inputs": {"model": "checkpoint.MODEL", "positive": "edit.CONDITIONING",
                   "negative": "negative.CONDITIONING", "latent_image": "encode.LATENT"},
    }  # fmt: skip


def keep_everything_else() -> dict:
    return graph(
        {"start": note("Start here", START_KEEP, 330)},
        group(
            "1 Any edit",
            "yours",
            {
                "checkpoint": checkpoint(),
                "image": load_image(MASKED_COFFEE, "Your photo, with a mask"),
                "encode": encode(),
            },
            {
                "edit": text("The picture as it should be", BLUE_CUP),
                "negative": negative(),
                "sample": any_edit(),
                "decode": decode(),
            },
        ),
        group(
            "2 Only the mask changes",
            "edit",
            {"keep": keep_outside("image.MASK"), "save": save(images="keep.image")},
            {
                "before": report("decode.IMAGE", "keep.mask", BLUE_CUP, "What the edit alone keeps"),
                "after": report("keep.image", "keep.mask", BLUE_CUP, "What is kept in the end"),
            },
            {"compare": compare("decode.IMAGE", "keep.image", "Alone and kept outside (needs Nodes 2.0)")},
        ),
    )


GRAPHS = {
    "Keep everything else after any edit (Regions)": keep_everything_else,
}
