"""The workflow of a new place with the subject found by its words: no mask is painted."""

from __future__ import annotations

from graphs.parts import (
    AWAKE,
    CAT,
    checkpoint,
    compare,
    decode,
    encode,
    graph,
    group,
    invert,
    load_image,
    negative,
    note,
    sampler,
    save,
    text,
    words,
)
from kv.graph import apply, tune

TITLE = "Another place, the subject found by its words (KV Inversion)"
SUBJECT, ELSEWHERE = "tabby cat", "a close-up photo of a tabby cat in the snow, looking ahead, eyes open"

START = """## Another place, and no mask to paint

1. **Load Checkpoint**, **Load Image**: your SD 1.5 or SDXL model, your photo at the model's size.
2. **The picture as it is**: describe the photo, and write your subject into *words*: a phrase such as *tabby cat*
   covers more of it than its noun alone.
3. **The picture as it should be**: the same words in another place.
4. Queue.

**Find Words in Picture** asks the model where it sees the subject, **Read Attention Map** makes a mask of it, and
**Apply KV** may look at that part of the photo alone (*source_mask*): the subject comes along, the old place does not.

*what_changes* on Apply KV is *place*. For an *action* or another *species* disconnect source_mask and choose that; for
a *colour or material* too."""

HELP = """## Not right yet?

- **The old place comes along**: look at *The subject*. Too large: raise *threshold* of Read Attention Map.
- **A part of the subject is lost**: lower *threshold*, or add words of that part.
- **The subject is found badly**: paint a mask on Load Image instead, and link its MASK to *source_mask*.
- **Another subject**: *what_changes* on *as set above*, and *source_guidance* up by steps of 2."""


def elsewhere() -> dict:
    applied = apply("tune.kv")
    applied["widgets"] |= {"what_changes": "place"}
    applied["inputs"] |= {"source_mask": "read.mask"}
    return graph(
        {"start": note("Start here", START, 480), "help": note("Not right yet?", HELP, 270)},
        group("1 Your picture", "yours", {
            "checkpoint": checkpoint(),
            "image": load_image(CAT),
            "encode": encode(),
            "source": words(AWAKE, SUBJECT, "The picture as it is"),
            "negative": negative(),
        }),
        group("2 Record it, and find the subject", "learned", {
            "invert": invert(positive="source.positive"), "tune": tune(positive="source.positive"),
        }, {
            "find": {"type": "PalimpsestFindWords", "size": [380, 180],
                     "inputs": {"model": "checkpoint.MODEL", "trajectory": "invert.trajectory",
                                "tokens": "source.tokens", "positive": "source.positive"}},
            "read": {"type": "PalimpsestReadAttentionMap", "size": [380, 340],
                     "inputs": {"record": "find.record", "image": "image.IMAGE"}},
            "subject": {"type": "MaskPreview", "title": "The subject", "size": [380, 300],
                        "inputs": {"mask": "read.mask"}},
        }),
        group("3 Edit it", "edit", {
            "edit": text("The picture as it should be", ELSEWHERE),
            "apply": applied,
            "sample": sampler("apply.MODEL", "edit.CONDITIONING"),
        }, {"decode": decode(), "save": save(), "compare": compare()}),
    )  # fmt: skip


GRAPHS = {TITLE: elsewhere}
