"""The workflow of Find Words: a mask by a word."""

from __future__ import annotations

from graphs.parts import SOURCE, checkpoint, encode, group, invert, load_image, note, text, words

START_FIND = """## A mask by a word

1. **Load Checkpoint**, **Load Image**: your model, your photo. No mask is painted.
2. **Select Words**: describe the photo, and write into *words* what you want to find: a phrase such as *red cat*
   covers more of it than its noun alone.
3. Queue.

**Find Words in Picture** asks the model where it sees the words in the photo itself: nothing is sampled. **Read
Attention Map** makes a heat map and a mask of it. Raise *threshold* for a tighter mask, *clean* to drop specks."""


def find() -> dict:
    nodes = {
        "checkpoint": checkpoint([40, 80]),
        "image": load_image([40, 250], "palimpsest_example.png", "Your photo"),
        "encode": encode([40, 720], "image.IMAGE"),
        "words": words([40, 850], SOURCE, "red cat", "The picture as it is"),
        "negative": text("Negative prompt", [40, 1130], ""),
        "invert": invert([500, 80], positive="words.positive"),
        "find": {"type": "PalimpsestFindWords", "at": [500, 500], "size": [380, 200],
                 "inputs": {"model": "checkpoint.MODEL", "trajectory": "invert.trajectory", "tokens": "words.tokens",
                            "positive": "words.positive"}},
        "read": {"type": "PalimpsestReadAttentionMap", "at": [960, 80], "size": [380, 380],
                 "inputs": {"record": "find.record", "image": "image.IMAGE"}},
        "save": {"type": "SaveImage", "title": "Where the word is", "at": [960, 540], "size": [380, 440],
                 "widgets": {"filename_prefix": "palimpsest_map"}, "inputs": {"images": "read.heat_map"}},
        "mask": {"type": "MaskPreview", "title": "The mask", "at": [1400, 80], "size": [380, 420],
                 "inputs": {"mask": "read.mask"}},
        "start": note("Start here", [-480, 40], [440, 320], START_FIND),
    }  # fmt: skip
    groups = [
        group("1 Your photo", "yours", 0, 920, 1320),
        group("2 Where its words are", "edit", 940, 880, 1320),
    ]
    return {"nodes": nodes, "groups": groups}


GRAPHS = {
    "Make a mask by a word (Regions)": find,
}
