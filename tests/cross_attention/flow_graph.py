"""Words and phrases in regions of transformers, each on its own loaders: two halves of one picture, or of one clip."""

from __future__ import annotations

from dataclasses import dataclass

from graphs import families
from graphs.families import Family, clip_text, drawing, halves, loaders, model_of
from graphs.parts import graph, group, mask_words, note, words

STEPS_OF_WORDS = """## {heading}

1. The loaders: {files}. The editor offers to download them.
2. **Prompt**: the whole scene, once.
3. **Select Words**, twice: which of its words act on the left, which on the right.
4. **The left half**: any mask will do, for instance one painted in **Load Image**.
5. Queue.

{more}"""

STEPS_OF_PHRASES = """## {heading}

1. The loaders: {files}. The editor offers to download them.
2. **The scene**: what holds the {whole} together.
3. **Phrase in Region**, twice: what stands on the left, what on the right. Each phrase is encoded by itself.
4. **The left half**: any mask will do, for instance one painted in **Load Image**.
5. Queue.

No phrase sees the other, and neither is seen by the other half. All parts of the {whole} still look at each other, so
it stays one {whole}. {more}"""

OF_Z_IMAGE = """Z-Image mixes the words of a prompt before the picture sees any, so both masks have *hide_from_text* and
*hide_from_refiner* on: a masked word then reaches nothing of the other half. What stays is what the text encoder itself
has put of it into the words behind it. Where that shows, take **Phrase in Region**."""

OF_QWEN = """The words of a prompt look at one another in Qwen-Image, and the picture at all of them, so both masks have
*hide_from_text* on: a masked word then reaches nothing of the other half. What stays is what the text encoder itself
has put of it into the words behind it. Where that shows, take **Phrase in Region**. *mask_negative* is off, for the
negative prompt has other words in those places.

With a Lightning LoRA: its 4 or 8 steps, cfg 1."""

OF_FLUX = "The same graph serves FLUX.2, Chroma, Qwen-Image, Z-Image, SD 3.5 and SDXL with their loaders."

OF_KLEIN = """The two
never stand in one sentence, so that colours do not change places.

**Another size**: in *Empty Flux 2 Latent*, *Flux2Scheduler* and both masks; multiples of 16.

**Distilled Klein**: its file, 4 steps, cfg 1. **Klein 9B**: its file and its text encoder."""

OF_ANIMA = """Anima's
network makes another text of what its text encoder gave; each phrase goes through that alone.

Describe each character as in a prompt of its own: hair, eyes, clothes, pose. Needs ComfyUI 0.30 or newer."""

OF_WAN = """A batch of masks,
one for each frame, lets a region move.

33 frames at 16 a second are two seconds. For a file in mp4 put *Create Video* and *Save Video* in the place of the
last node. **Wan 2.1 14B**: its file, the same graph."""

Z_IMAGE_VALUES = """## Not right yet?

- **The word shows elsewhere**: *hide_from_text* and *hide_from_refiner* on, as they are here.
- **A seam at the border**: *feather* 16 to 64.
- **The region looks pale**: mode *after softmax, renormalised*, as it is here.
- **Where do the words act?** Put **Attention Map** before the sampler.

Layers are named *double 0-29*: choose *custom* to hold the words in some of them only."""

UNTRIED = "\n\nValues to start from; they were not tried on published weights."
QWEN_VALUES = f"""## Not right yet?

- **The word shows elsewhere**: *hide_from_text* on, as it is here; choose the words that repeat it, too.
- **A seam at the border**: *feather* 16 to 64, or *end_percent* 0.8.
- **The word hardly acts**: a larger mask; cfg up to 6.
- **Where do the words act?** Put **Attention Map** before the sampler.

Layers are named *double 0-59*: choose *custom* to hold the words in some of them only.{UNTRIED}"""

FLUX_VALUES = """## Not right yet?

- **A seam at the border**: *feather* 16 to 64.
- **Scene and phrase contradict**: *prompt_inside* 0.3.
- **Where do the words act?** Put **Attention Map** before the sampler."""

PHRASE_VALUES = f"""## Not right yet?

- **A seam at the border**: *feather* 16 to 64, or *end_percent* 0.8.
- **Scene and phrase contradict**: *prompt_inside* 0.3.
- **One subject is missing**: name both in the scene, too: *a fox and a hare in the snow*.
- **A subject stands across the border**: say where it looks or goes; leave room between the masks.{UNTRIED}"""


@dataclass(frozen=True)
class Start:
    """What the note "Start here" says: a heading, the files, more about the family; and how tall the notes are."""

    heading: str
    files: str
    more: str
    height: int = 400
    values_height: int = 330


def notes(start: Start, steps: str, values: str, whole: str) -> dict[str, dict]:
    told = steps.format(heading=start.heading, files=start.files, more=start.more, whole=whole)
    return {
        "start": note("Start here", told, start.height),
        "values": note("Not right yet?", values, start.values_height),
    }


# ---- words of one prompt --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """A prompt, and those of its words that act in one half each."""

    prompt: str
    left: str
    right: str


CUP_AND_BOOK = Words("a photo of a red cup of coffee and a blue book on a wooden table", "red cup", "blue book")
TEAPOT_AND_LEMONS = Words(
    "a photo of a blue teapot and a bowl of yellow lemons on a wooden table by a window", "blue teapot", "yellow lemons"
)


def words_in_halves(family: Family, told: Words, start: Start, values: str, **widgets) -> dict:
    """widgets: of both masks, beside those that hold words tight."""
    tight = {"mode": "after softmax, renormalised", "hide_from_text": True} | widgets
    return graph(
        notes(start, STEPS_OF_WORDS, values, "picture"),
        group(
            "1 The model, and the whole prompt",
            "yours",
            loaders(family),
            {
                "prompt": {"type": "PrimitiveStringMultiline", "title": "Prompt", "size": [380, 110],
                           "widgets": {"value": told.prompt}},
                "one": words(None, told.left, "Words on the left", "clip.CLIP"),
                "two": words(None, told.right, "Words on the right", "clip.CLIP"),
            },
        ),
        group(
            "2 Each word in its half",
            "edit",
            halves(family),
            {
                "mask": mask_words("one.tokens", "left.MASK", model_of(family), **tight),
                "mask 2": mask_words("two.tokens", "right.MASK", "mask.MODEL", **tight),
            },
            *drawing(family, "mask 2.MODEL", "one.positive"),
        ),
    )  # fmt: skip


def words_on_z_image() -> dict:
    files = "**Z-Image Turbo**, its text encoder, its VAE"
    start = Start("Words in regions on Z-Image", files, OF_Z_IMAGE)
    return words_in_halves(families.Z_IMAGE_TURBO, CUP_AND_BOOK, start, Z_IMAGE_VALUES, hide_from_refiner=True)


def words_on_qwen_image() -> dict:
    files = "**Qwen-Image 2512**, its text encoder, its VAE"
    start = Start("Words in regions on Qwen-Image", files, OF_QWEN, 430, 360)
    return words_in_halves(families.QWEN_IMAGE, TEAPOT_AND_LEMONS, start, QWEN_VALUES, mask_negative=False)


# ---- a phrase for each half -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phrases:
    """What holds two halves together, and what stands in each."""

    scene: str
    left: str
    right: str


IN_A_CAFE = Phrases(
    "a wooden table in a cafe, morning light, photo", "a red cup of coffee", "a blue book with a silver clasp"
)
IN_A_GARDEN = Phrases(
    "a garden bench under an apple tree, late summer, photo",
    "a ginger cat asleep on a striped cushion",
    "a green watering can full of white daisies",
)
ON_A_CLIFF = Phrases(
    "two travellers on a cliff above the sea at sunset, wind, anime illustration",
    "a knight with short silver hair and blue eyes, in white armour, one hand on a sword",
    "a wizard with long red hair and green eyes, in a dark green cloak, holding a lantern",
)
IN_A_FOREST = Phrases(
    "a clearing in a snowy forest, morning light, the camera moves slowly to the right",
    "a red fox trotting through the snow",
    "a white hare that sits up and looks around",
)


def phrase(value: str, mask: str, model: str, positive: str, title: str) -> dict:
    return {"type": "PalimpsestRegionPhrase", "title": title, "size": [380, 260], "widgets": {"phrase": value},
            "inputs": {"model": model, "clip": "clip.CLIP", "positive": positive, "mask": mask}}  # fmt: skip


def phrases_in_halves(family: Family, phrases: Phrases, start: Start, values: str = PHRASE_VALUES) -> dict:
    whole = "clip" if family.frames else "picture"
    return graph(
        notes(start, STEPS_OF_PHRASES, values, whole),
        group(
            f"1 The model, and what holds the {whole} together",
            "yours",
            {**loaders(family), "scene": clip_text("The scene", phrases.scene)},
            halves(family),
        ),
        group(
            "2 A phrase for each half",
            "edit",
            {
                "one": phrase(phrases.left, "left.MASK", model_of(family), "scene.CONDITIONING", "On the left"),
                "two": phrase(phrases.right, "right.MASK", "one.MODEL", "one.positive", "On the right"),
            },
            *drawing(family, "two.MODEL", "two.positive"),
        ),
    )


def phrases_on_flux() -> dict:
    files = "**FLUX.1 dev**, its two text encoders, its VAE"
    start = Start("A phrase for each region on FLUX.1", files, OF_FLUX, 380)
    return phrases_in_halves(families.FLUX_1, IN_A_CAFE, start, FLUX_VALUES)


def phrases_on_klein() -> dict:
    files = "**FLUX.2 Klein 4B**, the base model, its text encoder, its VAE"
    start = Start("A phrase for each region on FLUX.2 Klein", files, OF_KLEIN, 430, 340)
    return phrases_in_halves(families.FLUX_2_KLEIN, IN_A_GARDEN, start)


def phrases_on_anima() -> dict:
    files = "**Anima**, its text encoder, its VAE"
    start = Start("Two characters, each in its half, on Anima", files, OF_ANIMA, 410, 340)
    return phrases_in_halves(families.ANIMA, ON_A_CLIFF, start)


def phrases_on_wan() -> dict:
    files = "**Wan 2.1, text to video, 1.3B**, its text encoder, its VAE"
    start = Start("Two phrases in a clip on Wan", files, OF_WAN, 430, 340)
    return phrases_in_halves(families.WAN_VIDEO, IN_A_FOREST, start)


GRAPHS = {
    "Words in regions on Z-Image (Cross-Attention Mask)": words_on_z_image,
    "Words in regions on Qwen-Image (Cross-Attention Mask)": words_on_qwen_image,
    "A phrase for each region on FLUX (Phrase in Region)": phrases_on_flux,
    "A phrase for each region on FLUX.2 Klein (Phrase in Region)": phrases_on_klein,
    "Two characters, each in its half, on Anima (Phrase in Region)": phrases_on_anima,
    "Two phrases in a clip on Wan (Phrase in Region)": phrases_on_wan,
}
