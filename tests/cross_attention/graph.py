"""The workflows of Cross-Attention Mask: words act in a mask, the source flows back in everywhere else."""

from __future__ import annotations

from cross_attention import flow_graph
from graphs.parts import (
    BLUE_CUP,
    blend,
    compare,
    decode,
    graph,
    group,
    invert,
    keep_outside,
    mask_words,
    note,
    photo,
    preview,
    report,
    sampler,
    save,
    words,
)

ON_MARBLE = "a photo of a red cup of coffee on a marble table"
BOTH = "a photo of a blue cup of coffee on a marble table"

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
Map** shows where the words inside the mask acted; *leakage* is the share of it that went beyond. For the other words
connect their *tokens* to both."""

VALUES_TWO = """## Not right yet?

- **A word does not show**: guidance (cfg) up.
- **A word shows elsewhere**: a tighter mask; *layers* of Cross-Attention Mask on *all*.
- **A seam at the mask's edge**: *feather* 8 to 32 in Cross-Attention Mask.

30 to 50 steps, cfg 5 to 7.5."""

VALUES = """## Not right yet?

- **The word does not show**: guidance (cfg) up; Feature Blend: start_percent 0.1, or fewer *layers*.
- **The word shows elsewhere**: a tighter mask; *layers* of Cross-Attention Mask on *all*.
- **A seam at the mask's edge**: *feather* 8 to 32 in Cross-Attention Mask and Keep Outside.
- **The photo's detail is lost inside**: alpha_inside 0.8 in Feature Blend lets some of it flow back.

Steps and scheduler must agree between Invert Picture and the sampler: 30 to 50 steps, cfg 5 to 7.5."""


def inverted_mask() -> dict:
    return {"type": "InvertMask", "title": "Everything else", "size": [380, 40],
            "inputs": {"mask": "image.MASK"}}  # fmt: skip


def edited(mask: str) -> tuple[dict[str, dict], ...]:
    """Two columns: the words act in a mask, the photo flows back and is kept outside of it; and what came out."""
    return (
        {"mask": mask_words("words.tokens", mask), "blend": blend("mask.MODEL", mask)},
        {"sample": sampler("blend.MODEL", "words.positive"), "decode": decode(), "keep": keep_outside(mask)},
        {"save": save(images="keep.image"), "compare": compare(after="keep.image")},
    )


def notes(start: str, height: int, values: str = VALUES) -> dict[str, dict]:
    return {"start": note("Start here", start, height), "values": note("Not right yet?", values, 330)}


YOURS = "1 Your photo, and what should become of it"


def recolour() -> dict:
    first, second, _ = edited("image.MASK")
    keep = second.pop("keep")
    return graph(
        notes(START_RECOLOUR, 400),
        group(YOURS, "yours", photo(), {"words": words(BLUE_CUP, "blue"), "invert": invert()}),
        group(
            "2 The word acts in the mask",
            "edit",
            first,
            second,
            {"keep": keep, "save": save(images="keep.image")},
            {"compare": compare(after="keep.image"), "report": report("keep.image", "keep.mask", BLUE_CUP)},
        ),
    )


def background() -> dict:
    other = {"words": words(ON_MARBLE, "marble"), "rest": inverted_mask(), "invert": invert()}
    return graph(
        notes(START_BACKGROUND, 390),
        group(YOURS, "yours", photo(), other),
        group("2 The new place, around what stays", "edit", *edited("rest.MASK")),
    )


def two_words() -> dict:
    return graph(
        notes(START_TWO, 400, VALUES_TWO),
        group(
            YOURS,
            "yours",
            photo(),
            {
                "prompt": {"type": "PrimitiveStringMultiline", "title": "The picture as it should be",
                           "size": [380, 110], "widgets": {"value": BOTH}},
                "inside": words(None, "blue", "Words inside the mask"),
                "outside": words(None, "marble", "Words outside the mask"),
                "invert": invert(),
            },
        ),
        group(
            "2 Each word in its region",
            "edit",
            {
                "mask": mask_words("inside.tokens", "image.MASK"),
                "mask 2": mask_words("outside.tokens", "image.MASK", "mask.MODEL", side="outside"),
                "look": {"type": "PalimpsestAttentionMap", "size": [380, 130],
                         "inputs": {"model": "mask 2.MODEL", "tokens": "inside.tokens"}},
            },
            {
                "sample": sampler("look.model", "inside.positive"),
                "decode": decode(),
                "read": {"type": "PalimpsestReadAttentionMap", "size": [380, 340],
                         "inputs": {"record": "look.record", "samples": "sample.LATENT", "image": "decode.IMAGE",
                                    "mask": "image.MASK"}},
            },
            {"save": save(), "map": preview("Where the word acted", "read.heat_map"), "compare": compare()},
        ),
    )  # fmt: skip


GRAPHS = {
    "Recolour one object by a word (Regions)": recolour,
    "Replace the background by words (Regions)": background,
    "Two words in two regions (Regions)": two_words,
    **flow_graph.GRAPHS,
}
