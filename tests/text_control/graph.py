"""The workflows of exact text in the picture's own style: written into a new picture, and changed in a photo."""

from __future__ import annotations

from graphs.parts import MASKED_COFFEE, WIDE, checkpoint, compare, decode, graph, group, load_image, note, preview, save

SIGN = "Write on a sign (Exact Text)"
PHOTO = "Change the text in a photo (Exact Text)"
TEACH = "Teach exact text with your pictures (Exact Text)"
STYLED = "Your style and exact text (Exact Text)"
LINES, CHANGED = "OPEN", "TEA"
QUALITY = ", best quality, extremely detailed"
WANTED = f'a photo of a shop front, with a wooden sign that says "{LINES}"{QUALITY}'
WANTED_THERE = f'a photo of a red mug on a wooden table, with "{CHANGED}" written on it{QUALITY}'
WANTED_STYLED = f'an ink wash painting of mountains by a lake, in the upper corner the words "{LINES}"{QUALITY}'
UNWANTED = (
    "longbody, lowres, bad anatomy, bad hands, missing fingers, extra digit, fewer digits, cropped, worst quality, low "
    "quality, watermark"
)
ANYTEXT = "anytext_v1.1.safetensors"

FILE = """**The file**: AnyText v1.1 is a pickled checkpoint (ModelScope, *damo/cv_anytext_text_generation_editing*).
Convert it once with *tests/recipes/anytext_to_safetensors.py* of Palimpsest's repository, and put it into
models/palimpsest_text_control. Its diffusers conversion works as well; the help page of *Load AnyText* has both."""

START_SIGN = f"""## Write on a sign

1. **Load Checkpoint**: any SD 1.5 model, with any LoRA.
2. **Load AnyText**: the file below.
3. **lines**: your text. Without a mask it stands in rows down the middle; a painted mask says other places.
4. The prompt names every line in double quotes, letter for letter.
5. Queue. *Read Text* says whether it came out.

{FILE}"""

HELP_SIGN = """## Not right yet?

- **Wrong letters**: larger ones (30 pixels and more), fewer of them, another *seed*; *strength* 1.1.
- **No sign around the letters**: say in the prompt what they stand on.
- **Letters pasted on**: *strength* 0.8, or *end_percent* 0.8.
- **With a LoRA**: *strength_clip* 0 where letters get worse; its look stays.
- Steps 20, cfg 9, ddim and the endings of both prompts are AnyText's."""

START_PHOTO = f"""## Change the text in a photo

1. Your photo, its sides multiples of 8: right-click it, *Open in Mask Editor*, paint over the old text.
2. **lines**: the new text, one line for each painted part.
3. The prompt says what the photo shows, and each line in double quotes.
4. Queue. Outside of the places every pixel is your photo's, by *Keep Outside*.

{FILE}"""

HELP_PHOTO = """## Not right yet?

- **The old text shines through**: paint all of it, and a little more.
- **A seam**: *feather* 8 in Keep Outside; or *keep_rest* on, which draws nothing but the places.
- **Other lighting than the photo's**: say it in the prompt; *keep_rest* on.
- **Wrong letters**: paint a larger place; another *seed*."""


START_TEACH = f"""## Teach exact text with your pictures

1. A folder in input/palimpsest_texts: pictures, and *texts.jsonl* with a line for each: caption, texts, their corners.
   The help page of *Train Text Control* has the format.
2. **Load AnyText**: what the training goes on from. Without it, a new control begins.
3. Queue. The sheet shows the first two pictures' texts, drawn anew, and what a reader reads there.

{FILE}"""

HELP_TEACH = """## Not right yet?

- **Out of memory**: *checkpointing* on, *batch_size* 1, *resolution* down, 8-bit AdamW.
- **A letter is missing**: choose a *font* that has it, here and in Text Lines.
- **Letters fall apart**: half the *learning_rate*.
- **Stopped**: *resume* goes on to the same file, bit for bit."""


START_STYLED = f"""## Your style and exact text

1. **Load Checkpoint**: the SD 1.5 model that your LoRA was made for.
2. **Your style**: the LoRA; template *Teach a style with your pictures* trains one.
3. **Load AnyText**: the file below. It knows nothing of your style, and needs not.
4. **lines**: your text. The prompt tells the style as your LoRA's captions do, and every line in double quotes.
5. Queue. *Read Text* says whether the letters came out.

{FILE}"""

HELP_STYLED = """## Not right yet?

- **Wrong letters**: *strength_clip* 0, for a LoRA's text encoder part changes how the lines are read; then
  *strength_model* 0.6 to 0.8; larger letters.
- **Too little style**: *strength_clip* 1, above all where the LoRA has a trigger word; *end_percent* 0.8 of *Apply Text
  Control* lets the style into the strokes.
- **Letters pasted on**: *strength* 0.8.
- **In a photo**: the same LoRA stands before the template *Change the text in a photo*."""


def load_anytext() -> dict:
    return {"type": "PalimpsestLoadAnyText", "size": [WIDE, 160], "widgets": {"file": ANYTEXT}}


def text_lines(lines: str, **inputs: str) -> dict:
    return {"type": "PalimpsestTextLines", "size": [WIDE, 620], "widgets": {"lines": lines}, "inputs": inputs}


def text_prompt(prompt: str) -> dict:
    return {
        "type": "PalimpsestTextPrompt", "size": [WIDE, 200], "widgets": {"text": prompt},
        "inputs": {"clip": "checkpoint.CLIP", "text_lines": "lines.text_lines",
                   "text_embedder": "anytext.text_embedder"},
    }  # fmt: skip


def unwanted() -> dict:
    return {
        "type": "CLIPTextEncode", "title": "Negative prompt", "size": [WIDE, 130], "widgets": {"text": UNWANTED},
        "inputs": {"clip": "checkpoint.CLIP"},
    }  # fmt: skip


def styled() -> dict:
    return {
        "type": "LoraLoader", "title": "Your style", "size": [WIDE, 130], "unset": ["lora_name"],
        "widgets": {"strength_model": 0.8, "strength_clip": 0.8},
        "inputs": {"model": "checkpoint.MODEL", "clip": "checkpoint.CLIP"},
    }  # fmt: skip


def through(node: dict, **inputs: str) -> dict:
    """A node with other inputs in the place of some of its own."""
    return node | {"inputs": node["inputs"] | inputs}


def apply(**more: str) -> dict:
    inputs = {
        "positive": "wanted.positive", "negative": "unwanted.CONDITIONING", "control_net": "anytext.control_net",
        "text_lines": "lines.text_lines", "vae": "checkpoint.VAE",
    }  # fmt: skip
    return {"type": "PalimpsestApplyTextControl", "size": [WIDE, 300], "inputs": inputs | more}


def sample() -> dict:
    return {
        "type": "KSampler", "size": [WIDE, 280],
        "widgets": {"seed": 0, "control_after_generate": "fixed", "steps": 20, "cfg": 9.0,
                    "sampler_name": "ddim", "scheduler": "ddim_uniform", "denoise": 1.0},
        "inputs": {"model": "checkpoint.MODEL", "positive": "apply.positive", "negative": "apply.negative",
                   "latent_image": "apply.latent"},
    }  # fmt: skip


def read_text(image: str) -> dict:
    return {
        "type": "PalimpsestReadText", "size": [WIDE, 520],
        "inputs": {"image": image, "text_lines": "lines.text_lines"},
    }  # fmt: skip


def write_on_a_sign() -> dict:
    return graph(
        {"start": note("Start here", START_SIGN, 720), "help": note("Not right yet?", HELP_SIGN, 420)},
        group("1  Your model and AnyText", "yours", {"checkpoint": checkpoint(), "anytext": load_anytext()}),
        group("2  The text", "learned", {"lines": text_lines(LINES)}, {
            "wanted": text_prompt(WANTED), "unwanted": unwanted(), "glyphs": preview("The lines", "lines.preview"),
        }),
        group("3  The picture", "edit", {"apply": apply(), "sample": sample(), "decode": decode()}, {
            "save": save("The picture with its text"), "read": read_text("decode.IMAGE"),
        }),
    )  # fmt: skip


def change_in_a_photo() -> dict:
    kept = {
        "type": "PalimpsestKeepOutside", "size": [WIDE, 260], "widgets": {"grow": 4, "feather": 4},
        "inputs": {"source": "image.IMAGE", "edited": "decode.IMAGE", "mask": "apply.mask"},
    }  # fmt: skip
    return graph(
        {"start": note("Start here", START_PHOTO, 700), "help": note("Not right yet?", HELP_PHOTO, 360)},
        group("1  Your photo, model and AnyText", "yours", {
            "checkpoint": checkpoint(), "anytext": load_anytext(),
            "image": load_image(MASKED_COFFEE, "Your photo, the old text painted over"),
        }),
        group("2  The new text", "learned", {"lines": text_lines(CHANGED, image="image.IMAGE", mask="image.MASK")}, {
            "wanted": text_prompt(WANTED_THERE), "unwanted": unwanted(),
            "glyphs": preview("The lines", "lines.preview"),
        }),
        group("3  The photo", "edit", {
            "apply": apply(picture="image.IMAGE"), "sample": sample(), "decode": decode(), "keep": kept,
        }, {
            "save": save("The photo with its new text", "keep.image"), "compare": compare(after="keep.image"),
            "read": read_text("keep.image"),
        }),
    )  # fmt: skip


def train() -> dict:
    return {
        "type": "PalimpsestTrainTextControl", "size": [WIDE, 760],
        "widgets": {"folder": "my_signs", "filename": "my_signs"},
        "inputs": {"model": "checkpoint.MODEL", "clip": "checkpoint.CLIP", "vae": "checkpoint.VAE",
                   "control_net": "anytext.control_net", "text_embedder": "anytext.text_embedder"},
    }  # fmt: skip


def teach() -> dict:
    prompt = text_prompt(WANTED)
    prompt["inputs"]["text_embedder"] = "train.text_embedder"
    return graph(
        {"start": note("Start here", START_TEACH, 620), "help": note("Not right yet?", HELP_TEACH, 380)},
        group("1  Your model and AnyText", "yours", {"checkpoint": checkpoint(), "anytext": load_anytext()}),
        group("2  Learn", "learned", {"train": train()}, {
            "sheet": preview("What it writes, and how that reads", "train.sheet"),
            "plot": preview("The training loss", "train.plot"),
        }),
        group("3  A new picture", "edit", {"lines": text_lines(LINES), "wanted": prompt, "unwanted": unwanted()}, {
            "apply": apply(control_net="train.control_net"), "sample": sample(), "decode": decode(),
            "save": save("The picture with its text"),
        }),
    )  # fmt: skip


def in_your_style() -> dict:
    clip, model = {"clip": "lora.CLIP"}, {"model": "lora.MODEL"}
    return graph(
        {"start": note("Start here", START_STYLED, 660), "help": note("Not right yet?", HELP_STYLED, 420)},
        group("1  Your model, your style, AnyText", "yours", {
            "checkpoint": checkpoint(), "lora": styled(), "anytext": load_anytext(),
        }),
        group("2  The text", "learned", {"lines": text_lines(LINES)}, {
            "wanted": through(text_prompt(WANTED_STYLED), **clip), "unwanted": through(unwanted(), **clip),
            "glyphs": preview("The lines", "lines.preview"),
        }),
        group("3  The picture", "edit", {"apply": apply(), "sample": through(sample(), **model), "decode": decode()}, {
            "save": save("The picture in your style"), "read": read_text("decode.IMAGE"),
        }),
    )  # fmt: skip


GRAPHS = {SIGN: write_on_a_sign, PHOTO: change_in_a_photo, TEACH: teach, STYLED: in_your_style}
