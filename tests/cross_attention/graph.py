"""The workflows of the regions: words act in a mask, and the original flows back in everywhere else."""

from __future__ import annotations

from graphs.parts import (
    SCHEDULER,
    SOURCE,
    checkpoint,
    decode,
    encode,
    group,
    invert,
    load_image,
    note,
    sampler,
    save,
    text,
)

MASKED_PICTURE = "palimpsest_example_masked.png"
RECOLOURED = "a blue cat standing on the right in the snow"
MOVED = "a red cat standing on the right in the park"
BOTH = "a blue cat standing on the right in the park"
SITTING = "a red cat sitting on the right in the snow"
BLEND = "palimpsest_example"  # Save Blend Weights adds _00001.safetensors

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

START_KEEP = """## Keep everything else, after any edit

1. Any graph that edits a photo: here image to image. Put yours in its place.
2. **Load Image**: the photo with a mask over what may change (right-click, *Open in Mask Editor*).
3. **Keep Outside**: finds how the edit shifted and tinted the picture, undoes it, and puts the edit into the photo.
   Outside the mask every pixel is the photo's own, bit for bit.
4. **Edit Report** measures what was kept, before and after."""

START_FIND = """## A mask by a word

1. **Load Checkpoint**, **Load Image**: your model, your photo. No mask is painted.
2. **Select Words**: describe the photo, and write into *words* what you want to find: a phrase such as *red cat*
   covers more of it than its noun alone.
3. Queue.

**Find Words in Picture** asks the model where it sees the words in the photo itself: nothing is sampled. **Read
Attention Map** makes a heat map and a mask of it. Raise *threshold* for a tighter mask, *clean* to drop specks."""

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

VALUES = """## Not right yet?

- **The word does not show**: guidance (cfg) up; Feature Blend: start_percent 0.1, or fewer *layers*.
- **The word shows elsewhere**: a tighter mask; *layers* of Cross-Attention Mask on *all*.
- **A seam at the mask's edge**: *feather* 8 to 32 in Cross-Attention Mask and Keep Outside.
- **The photo's detail is lost inside**: alpha_inside 0.8 in Feature Blend lets some of it flow back.

Steps and scheduler must agree between Invert Picture and the sampler. Real models: 30 to 50 steps, cfg 5 to 7.5."""


def words(at: list[int], value: str | None, chosen: str, title: str = "The picture as it should be") -> dict:
    """Select Words, with its text written here or (value None) linked from the node `prompt`."""
    node = {"type": "PalimpsestSelectWords", "title": title, "at": at, "size": [380, 220],
            "widgets": {"words": chosen}, "inputs": {"clip": "checkpoint.CLIP"}}  # fmt: skip
    if value is None:
        return {**node, "inputs": {**node["inputs"], "text": "prompt.STRING"}}
    return {**node, "widgets": {"text": value, **node["widgets"]}}


def mask_words(at: list[int], tokens: str, mask: str, model: str = "checkpoint.MODEL", **widgets) -> dict:
    return {"type": "PalimpsestCrossAttentionMask", "at": at, "size": [380, 320], "widgets": widgets,
            "inputs": {"model": model, "tokens": tokens, "mask": mask}}  # fmt: skip


def blend(at: list[int], model: str, mask: str, weights: str | None = None, **widgets) -> dict:
    inputs = {"model": model, "trajectory": "invert.trajectory", "positive": "source.CONDITIONING", "mask": mask}
    widgets = {"control_after_generate": "fixed", **widgets}
    return {"type": "PalimpsestFeatureBlend", "at": at, "size": [380, 400], "widgets": widgets,
            "inputs": inputs | ({"blend_weights": weights} if weights else {})}  # fmt: skip


def keep_outside(at: list[int], mask: str) -> dict:
    return {"type": "PalimpsestKeepOutside", "at": at, "size": [380, 260], "widgets": {"grow": 4, "feather": 4},
            "inputs": {"source": "image.IMAGE", "edited": "decode.IMAGE", "mask": mask}}  # fmt: skip


def report(at: list[int], edited: str, mask: str, prompt: str, title: str = "Edit Report") -> dict:
    return {"type": "PalimpsestEditReport", "title": title, "at": at, "size": [380, 460], "widgets": {"prompt": prompt},
            "inputs": {"source": "image.IMAGE", "edited": edited, "mask": mask}}  # fmt: skip


def inverted_mask(at: list[int]) -> dict:
    return {"type": "InvertMask", "title": "Everything else", "at": at, "size": [270, 40],
            "inputs": {"mask": "image.MASK"}}  # fmt: skip


def kept(at: list[int]) -> dict:
    return {**save(at), "inputs": {"images": "keep.image"}}


def photo() -> dict:
    """The first column: model, photo with its mask, the text of what it shows, and its inversion."""
    return {
        "checkpoint": checkpoint([40, 80]),
        "image": load_image([40, 250], MASKED_PICTURE, "Your photo, with a mask"),
        "encode": encode([40, 720], "image.IMAGE"),
        "source": text("The picture as it is", [40, 850], SOURCE),
        "negative": text("Negative prompt", [40, 1030], ""),
        "invert": invert([480, 80]),
    }


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


def learn_blend() -> dict:
    nodes = {
        **photo(),
        "edit": text("The picture as it should be", [480, 500], RECOLOURED),
        "tune": {"type": "PalimpsestTuneFeatureBlend", "at": [940, 80], "size": [380, 380],
                 "widgets": {"control_after_generate": "fixed"},
                 "inputs": {"model": "checkpoint.MODEL", "trajectory": "invert.trajectory",
                            "positive": "source.CONDITIONING", "target_positive": "edit.CONDITIONING",
                            "negative": "negative.CONDITIONING", "mask": "image.MASK"}},
        "keep weights": {"type": "PalimpsestSaveBlendWeights", "at": [940, 530], "size": [380, 110],
                         "widgets": {"filename": BLEND}, "inputs": {"blend_weights": "tune.blend_weights"}},
        "plot": {"type": "PreviewImage", "title": "What was learned", "at": [940, 710], "size": [380, 420],
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
    "Recolour one object by a word (Regions)": recolour,
    "Replace the background by words (Regions)": background,
    "Two words, two regions (Regions)": two_words,
    "Keep everything else, after any edit (Regions)": keep_everything_else,
    "Make a mask by a word (Regions)": find,
    "Learn how much of the photo flows back (Regions)": learn_blend,
    "Blend again with learned weights (Regions)": blend_again,
}
