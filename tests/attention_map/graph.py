"""The workflow of Find Words: a mask by a word."""

from __future__ import annotations

from graphs.parts import COFFEE, CUP, checkpoint, encode, graph, group, invert, load_image, negative, note, words

FOUND = "red cup"

START_FIND = """## A mask by a word

1. **Load Checkpoint**, **Load Image**: your model, your photo. No mask is painted.
2. **Select Words**: describe the photo, and write into *words* what you want to find: a phrase such as *red cup*
   covers more of it than its noun alone.
3. Queue.

**Find Words in Picture** asks the model where it sees the words in the photo itself: nothing is sampled. **Read
Attention Map** makes a heat map and a mask of it. Raise *threshold* for a tighter mask, *clean* to drop specks."""


def find() -> dict:
    return graph(
        {"start": note("Start here", START_FIND, 320)},
        group(
            "1 Your photo",
            "yours",
            {
                "checkpoint": checkpoint(),
                "image": load_image(COFFEE, "Your photo"),
                "encode": encode(),
                "words": words(CUP, FOUND, "The picture as it is"),
                "negative": negative(),
            },
        ),
        group(
            "2 Where its words are",
            "edit",
            {
                "invert": invert(positive="words.positive"),
                "find": {"type": "PalimpsestFindWords", "size": [380, 180],
                         "inputs": {"model": "checkpoint.MODEL", "trajectory": "invert.trajectory",
                                    "tokens": "words.tokens", "positive": "words.positive"}},
                "read": {"type": "PalimpsestReadAttentionMap", "size": [380, 340],
                         "inputs": {"record": "find.record", "image": "image.IMAGE"}},
            },
            {
                "save": {"type": "SaveImage", "title": "Where the word is", "size": [380, 440],
                         "widgets": {"filename_prefix": "palimpsest_map"}, "inputs": {"images": "read.heat_map"}},
                "mask": {"type": "MaskPreview", "title": "The mask", "size": [380, 360],
                         "inputs": {"mask": "read.mask"}},
            },
        ),
    )  # fmt: skip


GRAPHS = {
    "Make a mask by a word (Regions)": find,
}
