"""The workflows of Cross-Attention Mask: words act in a mask, the source flows back in everywhere else."""

from __future__ import annotations

from graphs.parts import RECOLOURED, blend, decode, group, keep_outside, kept, note, photo, report, sampler, save, words

MOVED = "a red cat standing on the right in the park"
BOTH = "a blue cat standing on the right in the park"
SITTING = "a red cat sitting on the right in the snow"

START_RECOLOUR = """## Give one thing another colour, by a word

1. **Load Checkpoint**: your SD 1.5 or SDXL model.
2. **Load Image**: your photo, at the model's size. Right-click it, *Open in Mask Editor*, paint what should change.
3. **The picture as it is**: describe the photo.
4. **Select Words**: the same text with the new word; write that word into *words*, too.
5. Queue.

**Cross-Attention Mask** lets the word act in the mask alone, **Feature Blend** brings the photo back outside of it
while the picture is drawn, and **Keep Outside** puts the result into the photo: no pixel outside moves at all."""

START_BACKGROUND = """## Another background, by words

1. **Load Checkpoint**, **Load Image**: your model, your photo. Paint a mask over **what stays** (right-click, *Open in
   Mask Editor*).
2. **The picture as it is**: describe the photo.
3. **Select Words**: the same text with another place; write the place's words into *words*.
4. Queue.

**Invert Mask** makes everything else the region that changes. **Cross-Attention Mask** keeps the new place's words off
the subject, **Feature Blend** brings the subject back, **Keep Outside** leaves it as it was, to the bit."""

START_TWO = """## Two words, two regions

1. **Load Checkpoint**, **Load Image** with a painted mask.
2. **The picture as it is**: describe the photo.
3. **The picture as it should be**: the whole new prompt, once.
4. **Select Words**, twice: which of its words act inside the mask, which outside.
5. Queue.

One **Cross-Attention Mask** after the other, each with its words. **Attention Map** looks on, and **Read Attention
Map** shows where each word acted; *leakage* is the share of it that went beyond its mask."""

VALUES = """## Not right yet?

- **The word does not show**: guidance (cfg) up; Feature Blend: start_percent 0.1, or fewer *layers*.
- **The word shows elsewhere**: a tighter mask; *layers* of Cross-Attention Mask on *all*.
- **A seam at the mask's edge**: *feather* 8 to 32 in Cross-Attention Mask and Keep Outside.
- **The photo's detail is lost inside**: alpha_inside 0.8 in Feature Blend lets some of it flow back.

Steps and scheduler must agree between Invert Picture and the sampler. Real models: 30 to 50 steps, cfg 5 to 7.5."""


def mask_words(at: list[int], tokens: str, mask: str, model: str = "checkpoint.MODEL", **widgets) -> dict:
    return {"type": "PalimpsestCrossAttentionMask", "at": at, "size": [380, 320], "widgets": widgets,
            "inputs": {"model": model, "tokens": tokens, "mask": mask}}  # fmt: skip


def inverted_mask(at: list[int]) -> dict:
    return {"type": "InvertMask", "title": "Everything else", "at": at, "size": [270, 40],
            "inputs": {"mask": "image.MASK"}}  # fmt: skip


def recolour() -> dict:
    nodes = {
        **photo(),
        "words": words([480, 500], RECOLOURED, "blue"),
        "mask": mask_words([940, 80], "words.tokens", "image.MASK"),
        "blend": blend([940, 470], "mask.MODEL", "image.MASK"),
        "sample": sampler([1380, 80], "blend.MODEL", "words.positive", "invert.noise"),
        "decode": decode([1380, 500], "sample.LATENT"),
        "keep": keep_outside([1380, 630], "image.MASK"),
        "save": kept([1820, 80]),
        "report": report([1820, 600], "keep.image", "keep.mask", RECOLOURED),
        "start": note("Start here", [-480, 40], [440, 420], START_RECOLOUR),
        "values": note("Not right yet?", [-480, 520], [440, 400], VALUES),
    }
    groups = [
        group("1 Your photo, and what should become of it", "yours", 0, 900),
        group("2 The word acts in the mask", "edit", 920, 1320),
    ]
    return {"nodes": nodes, "groups": groups}


def background() -> dict:
    nodes = {
        **photo(),
        "words": words([480, 500], MOVED, "park"),
        "rest": inverted_mask([480, 800]),
        "mask": mask_words([940, 80], "words.tokens", "rest.MASK"),
        "blend": blend([940, 470], "mask.MODEL", "rest.MASK"),
        "sample": sampler([1380, 80], "blend.MODEL", "words.positive", "invert.noise"),
        "decode": decode([1380, 500], "sample.LATENT"),
        "keep": keep_outside([1380, 630], "rest.MASK"),
        "save": kept([1820, 80]),
        "start": note("Start here", [-480, 40], [440, 400], START_BACKGROUND),
        "values": note("Not right yet?", [-480, 500], [440, 400], VALUES),
    }
    groups = [
        group("1 Your photo, and what should become of it", "yours", 0, 900),
        group("2 The new place, around what stays", "edit", 920, 1320),
    ]
    return {"nodes": nodes, "groups": groups}


def two_words() -> dict:
    nodes = {
        **photo(),
        "prompt": {"type": "PrimitiveStringMultiline", "title": "The picture as it should be", "at": [480, 500],
                   "size": [380, 120], "widgets": {"value": BOTH}},
        "inside": words([480, 690], None, "blue", "Words inside the mask"),
        "outside": words([480, 980], None, "park", "Words outside the mask"),
        "mask": mask_words([940, 80], "inside.tokens", "image.MASK"),
        "mask 2": mask_words([940, 470], "outside.tokens", "image.MASK", "mask.MODEL", side="outside"),
        "look": {"type": "PalimpsestAttentionMap", "at": [940, 860], "size": [380, 120],
                 "inputs": {"model": "mask 2.MODEL", "tokens": "inside.tokens"}},
        "sample": sampler([1380, 80], "look.model", "inside.positive", "invert.noise"),
        "decode": decode([1380, 500], "sample.LATENT"),
        "read": {"type": "PalimpsestReadAttentionMap", "at": [1380, 630], "size": [380, 380],
                 "inputs": {"record": "look.record", "samples": "sample.LATENT", "image": "decode.IMAGE",
                            "mask": "image.MASK"}},
        "save": save([1820, 80]),
        "map": {"type": "PreviewImage", "title": "Where the word acted", "at": [1820, 600], "size": [380, 420],
                "inputs": {"images": "read.heat_map"}},
        "start": note("Start here", [-480, 40], [440, 400], START_TWO),
        "values": note("Not right yet?", [-480, 500], [440, 400], VALUES),
    }  # fmt: skip
    groups = [
        group("1 Your photo, and what should become of it", "yours", 0, 900),
        group("2 Each word in its region", "edit", 920, 1320),
    ]
    return {"nodes": nodes, "groups": groups}


GRAPHS = {
    "Recolour one object by a word (Regions)": recolour,
    "Replace the background by words (Regions)": background,
    "Two words, two regions (Regions)": two_words,
}
