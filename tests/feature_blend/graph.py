"""The workflows of Feature Blend's learned weights."""

from __future__ import annotations

from feature_blend import flow_graph
from graphs.parts import (
    BLUE_CUP,
    blend,
    compare,
    decode,
    graph,
    group,
    invert,
    note,
    photo,
    preview,
    sampler,
    save,
    text,
)

BLEND = "palimpsest_example"  # Save Blend Weights adds _00001.safetensors
WHITE_CUP = "a photo of a white cup of coffee on a wooden table"

START_TUNE = """## Let it learn how much of the photo flows back

1. **Load Checkpoint**, **Load Image** with a painted mask.
2. **The picture as it is**, **The picture as it should be**.
3. Queue. **Tune Feature Blend** learns one weight for each layer: as much of the edit as can be had while the photo
   outside the mask stays. The plot shows what it learned; **Save Blend Weights** keeps it.
4. **Feature Blend** uses the weights in their place. The template *Blend again with learned weights* takes them from
   the file."""

START_BLEND_AGAIN = """## Use learned blend weights again

**No file yet?** Run the template *Learn how much of the photo flows back* once: it writes it. Then press R here.

1. **Load Blend Weights**: the file that Save Blend Weights wrote (models/palimpsest_blend).
2. **Load Checkpoint**, **Load Image** with a painted mask, the two prompts.
3. Queue. The weights belong to an architecture, not to a photo: they serve others as well."""


def learn_blend() -> dict:
    return graph(
        {"start": note("Start here", START_TUNE, 350)},
        group(
            "1 Your photo, and what should become of it",
            "yours",
            photo(),
            {"invert": invert(), "edit": text("The picture as it should be", BLUE_CUP)},
        ),
        group(
            "2 Learn the blend",
            "learned",
            {
                "tune": {"type": "PalimpsestTuneFeatureBlend", "size": [380, 330],
                         "widgets": {"control_after_generate": "fixed"},
                         "inputs": {"model": "checkpoint.MODEL", "trajectory": "invert.trajectory",
                                    "positive": "source.CONDITIONING", "target_positive": "edit.CONDITIONING",
                                    "negative": "negative.CONDITIONING", "mask": "image.MASK"}},
                "plot": preview("What was learned", "tune.plot"),
                "keep weights": {"type": "PalimpsestSaveBlendWeights", "size": [380, 60],
                                 "widgets": {"filename": BLEND}, "inputs": {"blend_weights": "tune.blend_weights"}},
            },
        ),
        group(
            "3 Edit with it",
            "edit",
            {
                "blend": blend("checkpoint.MODEL", "image.MASK", "tune.blend_weights"),
                "sample": sampler("blend.MODEL", "edit.CONDITIONING"),
            },
            {"decode": decode(), "save": save(), "compare": compare()},
        ),
    )  # fmt: skip


def blend_again() -> dict:
    return graph(
        {"start": note("Start here", START_BLEND_AGAIN, 290)},
        group(
            "1 Your photo, and what was learned",
            "yours",
            photo(),
            {
                "invert": invert(),
                "edit": text("The picture as it should be", WHITE_CUP),
                "load": {"type": "PalimpsestLoadBlendWeights", "size": [380, 90], "unset": ["file"]},
            },
        ),
        group(
            "2 Edit with it",
            "edit",
            {
                "blend": blend("checkpoint.MODEL", "image.MASK", "load.blend_weights"),
                "sample": sampler("blend.MODEL", "edit.CONDITIONING"),
            },
            {"decode": decode(), "save": save(), "compare": compare()},
        ),
    )


GRAPHS = {
    "Learn how much of the photo flows back (Regions)": learn_blend,
    "Blend again with learned weights (Regions)": blend_again,
    **flow_graph.GRAPHS,
}
