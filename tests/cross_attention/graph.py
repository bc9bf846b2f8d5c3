"""The workflows of Cross-Attention Mask: words act in a mask, the source flows back in everywhere else."""

from __future__ import annotations

from graphs.parts import (
    BLUE_CUP,
    blend,
    compare,
    decode,
    graph,
    group,
    invert,
    keep_outside,
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


def mask_words(tokens: str, mask: str, model: str = "checkpoint.MODEL", **widgets) -> dict:
    return {"type": "PalimpsestCrossAttentionMask", "size": [380, 300], "widgets": widgets,
            "inputs": {"model": model, "tokens": tokens, "mask": mask}}  # fmt: skip


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


# ---- transformers ---------------------------------------------------------------------------------------------------

SCENE = "a wooden table in a cafe, morning light, photo"
PAIR = "a photo of a red cup of coffee and a blue book on a wooden table"
LEFT_WORDS, RIGHT_WORDS = "red cup", "blue book"
LEFT_PHRASE, RIGHT_PHRASE = "a red cup of coffee", "a blue book with a silver clasp"
SIDE = 1024
HUB = "https://huggingface.co/"
Z_IMAGE = HUB + "Comfy-Org/z_image_turbo/resolve/main/split_files/"

START_Z_IMAGE = """## Words in regions on Z-Image

1. The loaders: **Z-Image Turbo**, its text encoder, its VAE. The editor offers to download them.
2. **Prompt**: the whole scene, once.
3. **Select Words**, twice: which of its words act on the left, which on the right.
4. **The left half**: any mask will do, for instance one painted in **Load Image**.
5. Queue.

Z-Image mixes the words of a prompt before the picture sees any, so both masks have *hide_from_text* and
*hide_from_refiner* on: a masked word then reaches nothing of the other half. What stays is what the text encoder itself
has put of it into the words behind it. Where that shows, take **Phrase in Region**."""

START_FLUX = """## A phrase for each region on FLUX.1

1. The loaders: **FLUX.1 dev**, its two text encoders, its VAE. The editor offers to download them.
2. **The scene**: what holds the picture together.
3. **Phrase in Region**, twice: what stands on the left, what on the right. Each phrase is encoded by itself.
4. **The left half**: any mask will do, for instance one painted in **Load Image**.
5. Queue.

No phrase sees the other, and neither is seen by the other half. All parts of the picture still look at each other, so
it stays one picture. The same graph serves FLUX.2, Chroma, Qwen-Image, Z-Image, SD 3.5 and SDXL with their loaders."""

Z_IMAGE_VALUES = """## Not right yet?

- **The word shows elsewhere**: *hide_from_text* and *hide_from_refiner* on, as they are here.
- **A seam at the border**: *feather* 16 to 64.
- **The region looks pale**: mode *after softmax, renormalised*, as it is here.
- **Where do the words act?** Put **Attention Map** before the sampler.

Layers are named *double 0-29*: choose *custom* to hold the words in some of them only."""

FLUX_VALUES = """## Not right yet?

- **A seam at the border**: *feather* 16 to 64.
- **Scene and phrase contradict**: *prompt_inside* 0.3.
- **Where do the words act?** Put **Attention Map** before the sampler."""


def file(kind: str, key: str, name: str, url: str, directory: str, **more) -> dict:
    """A loader of one file that the editor offers to download."""
    return {"type": kind, "size": [380, 110], "widgets": {key: name, **more},
            "models": [{"name": name, "url": url, "directory": directory}]}  # fmt: skip


def clip_text(title: str, value: str) -> dict:
    return {"type": "CLIPTextEncode", "title": title, "size": [380, 110], "widgets": {"text": value},
            "inputs": {"clip": "clip.CLIP"}}  # fmt: skip


def halves() -> dict[str, dict]:
    """A mask that is white on the left, and its inverse."""
    return {
        "whole": {"type": "SolidMask", "title": "Everything", "size": [380, 110],
                  "widgets": {"value": 0.0, "width": SIDE, "height": SIDE}},
        "white": {"type": "SolidMask", "title": "Half of it", "size": [380, 110],
                  "widgets": {"value": 1.0, "width": SIDE // 2, "height": SIDE}},
        "left": {"type": "MaskComposite", "title": "The left half", "size": [380, 150],
                 "widgets": {"x": 0, "y": 0, "operation": "add"},
                 "inputs": {"destination": "whole.MASK", "source": "white.MASK"}},
        "right": {"type": "InvertMask", "title": "The right half", "size": [380, 40],
                  "inputs": {"mask": "left.MASK"}},
    }  # fmt: skip


def drawing(model: str, positive: str, steps: int, sampler_name: str) -> dict[str, dict]:
    """From noise to the picture, at the host's own values for models that were distilled: cfg 1."""
    return {
        "empty": {"type": "EmptySD3LatentImage", "size": [380, 110],
                  "widgets": {"width": SIDE, "height": SIDE, "batch_size": 1}},
        "zero": {"type": "ConditioningZeroOut", "size": [380, 40], "inputs": {"conditioning": positive}},
        "sample": {"type": "KSampler", "size": [380, 270],
                   "widgets": {"seed": 0, "control_after_generate": "fixed", "steps": steps, "cfg": 1.0,
                               "sampler_name": sampler_name, "scheduler": "simple", "denoise": 1.0},
                   "inputs": {"model": model, "positive": positive, "negative": "zero.CONDITIONING",
                              "latent_image": "empty.LATENT"}},
        "decode": {"type": "VAEDecode", "size": [380, 60],
                   "inputs": {"samples": "sample.LATENT", "vae": "vae.VAE"}},
        "save": save("The picture"),
    }  # fmt: skip


def chosen(title: str, some: str) -> dict:
    return {"type": "PalimpsestSelectWords", "title": title, "size": [380, 180], "widgets": {"words": some},
            "inputs": {"clip": "clip.CLIP", "text": "prompt.STRING"}}  # fmt: skip


def words_on_z_image() -> dict:
    tight = {"mode": "after softmax, renormalised", "hide_from_text": True, "hide_from_refiner": True}
    left = mask_words("one.tokens", "left.MASK", "shifted.MODEL", **tight)
    unet, clip, vae = ("z_image_turbo_bf16.safetensors", "qwen_3_4b.safetensors", "ae.safetensors")
    return graph(
        {"start": note("Start here", START_Z_IMAGE, 400), "values": note("Not right yet?", Z_IMAGE_VALUES, 330)},
        group(
            "1 The model, and the whole prompt",
            "yours",
            {
                "unet": file("UNETLoader", "unet_name", unet, f"{Z_IMAGE}diffusion_models/{unet}", "diffusion_models"),
                "clip": file("CLIPLoader", "clip_name", clip, f"{Z_IMAGE}text_encoders/{clip}", "text_encoders",
                             type="lumina2"),
                "vae": file("VAELoader", "vae_name", vae, f"{Z_IMAGE}vae/{vae}", "vae"),
                "shifted": {"type": "ModelSamplingAuraFlow", "size": [380, 60], "widgets": {"shift": 3.0},
                            "inputs": {"model": "unet.MODEL"}},
            },
            {
                "prompt": {"type": "PrimitiveStringMultiline", "title": "Prompt", "size": [380, 110],
                           "widgets": {"value": PAIR}},
                "one": chosen("Words on the left", LEFT_WORDS),
                "two": chosen("Words on the right", RIGHT_WORDS),
            },
        ),
        group(
            "2 Each word in its half",
            "edit",
            halves(),
            {"mask": left, "mask 2": mask_words("two.tokens", "right.MASK", "mask.MODEL", **tight)},
            drawing("mask 2.MODEL", "one.positive", 8, "res_multistep"),
        ),
    )  # fmt: skip


def phrase(value: str, mask: str, model: str, positive: str, title: str) -> dict:
    return {"type": "PalimpsestRegionPhrase", "title": title, "size": [380, 260], "widgets": {"phrase": value},
            "inputs": {"model": model, "clip": "clip.CLIP", "positive": positive, "mask": mask}}  # fmt: skip


def phrases_on_flux() -> dict:
    unet, vae = "flux1-dev.safetensors", "ae.safetensors"
    encoders = [
        {"name": name, "url": f"{HUB}comfyanonymous/flux_text_encoders/resolve/main/{name}",
         "directory": "text_encoders"}
        for name in ("clip_l.safetensors", "t5xxl_fp16.safetensors")
    ]  # fmt: skip
    return graph(
        {"start": note("Start here", START_FLUX, 380), "values": note("Not right yet?", FLUX_VALUES, 330)},
        group(
            "1 The model, and what holds the picture together",
            "yours",
            {
                "unet": file("UNETLoader", "unet_name", unet, f"{HUB}Comfy-Org/flux1-dev/resolve/main/{unet}",
                             "diffusion_models"),
                "clip": {"type": "DualCLIPLoader", "size": [380, 130], "models": encoders,
                         "widgets": {"clip_name1": encoders[0]["name"], "clip_name2": encoders[1]["name"],
                                     "type": "flux"}},
                "vae": file("VAELoader", "vae_name", vae,
                            f"{HUB}Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/{vae}", "vae"),
                "scene": clip_text("The scene", SCENE),
            },
            halves(),
        ),
        group(
            "2 A phrase for each half",
            "edit",
            {
                "one": phrase(LEFT_PHRASE, "left.MASK", "unet.MODEL", "scene.CONDITIONING", "On the left"),
                "two": phrase(RIGHT_PHRASE, "right.MASK", "one.MODEL", "one.positive", "On the right"),
            },
            drawing("two.MODEL", "two.positive", 20, "euler"),
        ),
    )  # fmt: skip


GRAPHS = {
    "Recolour one object by a word (Regions)": recolour,
    "Replace the background by words (Regions)": background,
    "Two words in two regions (Regions)": two_words,
    "Words in regions on Z-Image (Cross-Attention Mask)": words_on_z_image,
    "A phrase for each region on FLUX (Phrase in Region)": phrases_on_flux,
}
