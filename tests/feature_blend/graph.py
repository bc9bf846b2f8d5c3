"""The workflows of Feature Blend's learned weights."""

from __future__ import annotations

from graphs.parts import RECOLOURED, blend, decode, group, note, photo, sampler, save, text
from pocket.settings import POCKET

BLEND = "palimpsest_example"  # Save Blend Weights adds _00001.safetensors

START_TUNE = """## Let it learn how much of the photo flows back

1. **Load Checkpoint**, **Load Image** with a painted mask.
2. **The picture as it is**, **The picture as it should be**.
3. Queue. **Tune Feature Blend** learns one weight for each layer: as much of the edit as can be had while the photo
   outside the mask stays. The plot shows what it learned; **Save Blend Weights** keeps it.
4. **Feature Blend** uses the weights in their place. The workflow *Blend again with learned weights* takes them from
   the file."""

START_BLEND_AGAIN = """## Use learned blend weights again

1. **Load Blend Weights**: the file that Save Blend Weights wrote (models/palimpsest_blend; press R to list new ones).
2. **Load Checkpoint**, **Load Image** with a painted mask, the two prompts.
3. Queue. The weights belong to an architecture, not to a photo: they serve others as well."""


def learn_blend() -> dict:
    nodes = {
        **photo(),
        "edit": text("The picture as it should be", [480, 500], RECOLOURED),
        "tune": {"type": "PalimpsestTuneFeatureBlend", "at": [940, 80], "size": [380, 380],
                 "widgets": POCKET["PalimpsestTuneFeatureBlend"] | {"control_after_generate": "fixed"},
                 "inputs": {"model": "checkpoint.MODEL", "trajectory": "invert.trajectory",
                            "positive": "source.CONDITIONING", "target_positive": "edit.CONDITIONING",
                            "negative": "negative.CONDITIONING", "mask": "image.MASK"}},
        "keep weights": {"type": "PalimpsestSaveBlendWeights", "at": [940, 530], "size": [380, 110],
                         "widgets": {"filename": BLEND}, "inputs": {"blend_weights": "tune.blend_weights"}},
        "plot": {"type": "PreviewImage", "title": "What was learned", "at": [940, 820], "size": [380, 400],
                 "inputs": {"images": "tune.plot"}},
        "blend": blend([1400, 80], "checkpoint.MODEL", "image.MASK", "tune.blend_weights"),
        "sample": sampler([1400, 640], "blend.MODEL", "edit.CONDITIONING", "invert.noise"),
        "decode": decode([1840, 80], "sample.LATENT"),
        "save": save([1840, 210]),
        "start": note("Start here", [-480, 40], [440, 360], START_TUNE),
    }  # fmt: skip
    groups = [
        group("1 Your photo, and what should become of it", "yours", 0, 900),
        group("2 Learn the blend", "learned", 920, 440),
        group("3 Edit with it", "edit", 1380, 880),
    ]
    return {"nodes": nodes, "groups": groups}


def blend_again() -> dict:
    nodes = {
        **photo(),
        "edit": text("The picture as it should be", [480, 500], RECOLOURED),
        "load": {"type": "PalimpsestLoadBlendWeights", "at": [480, 680], "size": [380, 110],
                 "widgets": {"file": f"{BLEND}_00001.safetensors"}},
        "blend": blend([940, 80], "checkpoint.MODEL", "image.MASK", "load.blend_weights"),
        "sample": sampler([940, 640], "blend.MODEL", "edit.CONDITIONING", "invert.noise"),
        "decode": decode([1380, 80], "sample.LATENT"),
        "save": save([1380, 210]),
        "start": note("Start here", [-480, 40], [440, 260], START_BLEND_AGAIN),
    }  # fmt: skip
    groups = [
        group("1 Your photo, and what was learned", "yours", 0, 900),
        group("2 Edit with it", "edit", 920, 880),
    ]
    return {"nodes": nodes, "groups": groups}


GRAPHS = {
    "Learn how much of the photo flows back (Regions)": learn_blend,
    "Blend again with learned weights (Regions)": blend_again,
}
