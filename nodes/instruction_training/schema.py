"""The inputs of the node that trains a model to follow instructions, with what each does."""

from __future__ import annotations

from comfy_api.latest import io

from .. import inputs, sockets
from ..settings import AS_SET
from ..training import states
from ..training.widgets import shared
from . import files, triples
from .settings import INSTRUCT, METHODS

NAME = "my_edits"


def sources() -> list[io.Input]:
    """What is trained, and on what."""
    return [
        io.Model.Input(
            "model",
            tooltip="SD 1.5, SDXL, or an InstructPix2Pix model of either; it stays as it is. One without channels for "
            "a picture gets them, blank. Patches and LoRAs on it are a part of what is trained.",
        ),
        io.Clip.Input("clip", tooltip="The checkpoint's text encoders, which read the instructions and do not learn."),
        io.Vae.Input("vae", tooltip="The checkpoint's VAE, for the pictures and the sheet."),
        io.Combo.Input(
            "folder",
            options=triples.folder_names(),
            tooltip="A folder in output/palimpsest_datasets or input/palimpsest_datasets with triples.jsonl, a line "
            'for each: {"picture": "a.png", "instruction": "make it blue", "result": "b.png", "mask": "m.png"}, '
            "the mask if you like. Or what is connected below.",
        ),
        io.Combo.Input(
            "preset",
            options=[AS_SET, INSTRUCT],
            tooltip="as set below (default): the values below. InstructPix2Pix: its authors' recipe in place of them: "
            "the whole U-Net, 256 px, 10,000 steps of 1024 triples at 0.0001. For days on several GPUs.",
        ),
        io.Combo.Input(
            "method",
            options=list(METHODS),
            tooltip="LoRA (default): a small file for Load LoRA; of a model without picture channels its first "
            "convolution learns whole. whole U-Net: every weight, for thousands of triples; 20 bytes of memory for "
            "each, 17 GB for SD 1.5. edit head alone: the model stays as it is, and edit_head learns to speak to it.",
        ),
        io.Int.Input(
            "steps",
            default=3000,
            min=1,
            max=1_000_000,
            tooltip="Steps of the optimiser, each of batch_size x accumulation triples. 1000 to 3000 for one kind of "
            "edit from some dozens of triples, 10,000 and more for many kinds.",
        ),
        shared("batch_size", "Triples at once, of one size. 1 (default) to 4, more where memory allows."),
        shared(
            "resolution",
            "Side in pixels of a square of as many pixels as each picture gets. 0 (default): the model's own, "
            "512 for SD 1.5, 1024 for SDXL. InstructPix2Pix was trained at 256.",
        ),
        shared(
            "rank",
            "How much a LoRA can learn, and the size of its file: 16 for one kind of edit, 32 (default), 64 "
            "and more for many kinds.",
            default=32,
        ),
        shared(
            "alpha",
            "What a LoRA learned counts alpha / rank. As the rank (default); more acts like a higher rate.",
            default=32.0,
        ),
        shared(
            "learning_rate",
            "0.0001 (default); 0.00005 to 0.0005. Too high breaks shapes, too low leaves the picture as it is.",
        ),
        shared(
            "optimiser",
            "AdamW (default), or its 8-bit form, which needs the package bitsandbytes or torchao and saves 5 GB where "
            "the whole U-Net of SD 1.5 learns; without them AdamW is used and the report says so.",
        ),
        shared("schedule", "How the learning rate falls: along a cosine (default), a line, or not at all."),
        inputs.seed(
            "Sets first weights, noise, order and what is left out. The same seed gives the same file.",
            control_after_generate=True,
        ),
    ]


def course() -> list[io.Input]:
    """Files and previews."""
    return [
        io.String.Input(
            "filename",
            default=NAME,
            tooltip="Name of the files, with a number: in models/loras, or in models/diffusion_models for a whole "
            "U-Net. _s00500 is added to those on the way, _base to the U-Net that a LoRA belongs to.",
        ),
        io.Int.Input(
            "save_every",
            default=500,
            min=0,
            max=1_000_000,
            tooltip="Keeps a file after so many steps. 0: only the last. A whole U-Net of SD 1.5 has 1.7 GB each time.",
        ),
        io.Int.Input(
            "preview_every",
            default=500,
            min=0,
            max=1_000_000,
            tooltip="Draws two triples after so many steps, 20 steps each, from the same noise; under the node and on "
            "the sheet. 0: never.",
        ),
        shared(
            "checkpointing",
            "On (default): blocks of the U-Net run again for the gradient instead of being kept: far less "
            "memory, a quarter to a third more time, the same result.",
        ),
        io.Combo.Input(
            "resume",
            options=states.resumable(files.STATES),
            tooltip="A training to go on with, from models/palimpsest_instruction_states: with the same triples and "
            "settings it ends as if it had never been stopped.",
        ),
        io.Float.Input(
            "text_guidance",
            default=7.5,
            min=0.0,
            max=30.0,
            step=0.5,
            tooltip="Of the previews: how strongly they follow the instruction. 7.5 (default); 5 to 10.",
        ),
        io.Float.Input(
            "picture_guidance",
            default=1.5,
            min=0.0,
            max=10.0,
            step=0.1,
            tooltip="Of the previews: how closely they stay with the picture. 1.5 (default); 1.2 to 2.",
        ),
    ]


def advanced() -> list[io.Input]:
    """What few need to change."""
    share = {"min": 0.0, "max": 1.0, "step": 0.01, "default": 0.05, "advanced": True}
    return [
        io.Float.Input(
            "drop_text",
            **share,
            tooltip="Share of triples that are shown without the instruction. 0.05 (default), as InstructPix2Pix; 0 "
            "and the guidance of the text does not work.",
        ),
        io.Float.Input(
            "drop_both",
            **share,
            tooltip="Share of triples without instruction and picture. 0.05 (default); 0 and the guidance of the "
            "picture does not work.",
        ),
        io.Float.Input(
            "drop_picture",
            **share,
            tooltip="Share of triples without the picture, so that the text alone is still understood. 0.05 (default).",
        ),
        shared(
            "min_snr_gamma",
            "Caps the weight of low noise levels. 0 (default): all levels alike, as InstructPix2Pix; 5 learns "
            "shapes faster and fine texture slower.",
        ),
        io.Float.Input(
            "reconstruction",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.05,
            advanced=True,
            tooltip="Adds the distance of the predicted picture from the result, which counts most where all is noise: "
            "what is where. 0 (default): the noise loss alone; 0.1 to 1.",
        ),
        io.Boolean.Input(
            "words_inside",
            default=False,
            advanced=True,
            tooltip="On: the instruction acts inside of each triple's mask alone, in every layer (Cross-Attention "
            "Masking). For models that you will use with masks.",
        ),
        io.Int.Input(
            "held_out",
            default=0,
            min=0,
            max=1000,
            advanced=True,
            tooltip="So many of the last triples are not learned: previews draw the first two of these. 0 (default): "
            "they draw the first two that are learned.",
        ),
        shared(
            "accumulation",
            "Adds up the gradients of so many batches. 4 (default): as a batch of 4, without its memory.",
            default=4,
        ),
        shared(
            "convolutions",
            "On (default): a LoRA's convolutions learn too, through which the picture comes. Off: less "
            "than half the file.",
            default=True,
        ),
        shared("cycles", "How often the cosine begins anew. 1 (default): never."),
        shared("warm_up", "Steps in which the learning rate rises from 0: 50 to 500 steady a high rate."),
        shared("weight_decay", "Draws what is learned towards the model as it was. 0.01 (default) is AdamW's own."),
        io.Boolean.Input(
            "keep_widened",
            default=True,
            advanced=True,
            tooltip="On (default): beside a LoRA of a model without picture channels, the U-Net that it belongs to is "
            "kept for Load Diffusion Model, 1.7 GB for SD 1.5. Off where you have it from an earlier training.",
        ),
        shared(
            "keep_state",
            "last (default): the end, or a cancelled training, can be gone on with; its file is some six times "
            "a LoRA's, 10 GB for the whole U-Net of SD 1.5. with every file: each of them. none.",
        ),
    ]


def blending() -> list[io.Input]:
    """What learns beside."""
    return [
        io.String.Input(
            "blend_layers",
            default="",
            advanced=True,
            tooltip="Features whose share of the source is learned beside, for Feature Blend with Load Blend Weights, "
            "such as 'output, out'. Each step then runs the model on the source as well. Empty (default): none.",
        ),
    ]


def heads() -> list[io.Input]:
    """MGIE's edit head, and the adversarial term."""
    return [
        sockets.EditHead.Input(
            "edit_head",
            optional=True,
            tooltip="From Load MGIE: its edit head learns beside, or alone (method), and the triples' prompts are what "
            "it makes of its language model's states; a folder without a head gets a new one. For SD 1.5.",
        ),
        io.String.Input(
            "expressed",
            multiline=True,
            default="",
            optional=True,
            tooltip="For edit_head: what each instruction means for its picture ('a cat in the snow'), a list, a line "
            "each, or one for all; in a folder 'expressed' of a line. Empty (default): the language model says it.",
        ),
        io.Float.Input(
            "head_rate",
            default=0.0005,
            min=0.0,
            max=0.1,
            step=0.00001,
            round=False,
            optional=True,
            advanced=True,
            tooltip="Learning rate of edit_head and its tokens. 0.0005 (default); 0.001 for a small new one, 0.0001 "
            "where it only has to follow a U-Net that learns.",
        ),
        io.Int.Input(
            "text_steps",
            default=0,
            min=0,
            max=1_000_000,
            optional=True,
            advanced=True,
            tooltip="So many of the first steps edit_head learns to say what clip says of the expressed text, without "
            "a call of the U-Net: far cheaper. 0 (default) for a trained head; for a new one half of the steps.",
        ),
        io.Boolean.Input(
            "image_tokens",
            default=True,
            optional=True,
            advanced=True,
            tooltip="On (default): the language model's tokens [IMG0] to [IMG7] learn beside edit_head, which needs it "
            "in each step. Off: its states are read once, before the first step.",
        ),
        io.Int.Input(
            "head_width",
            default=512,
            min=4,
            max=4096,
            step=4,
            optional=True,
            advanced=True,
            tooltip="Channels of a new edit head, a multiple of 4. 512 (default) is MGIE's; fewer for a small file.",
        ),
        io.Int.Input(
            "head_layers",
            default=4,
            min=1,
            max=24,
            optional=True,
            advanced=True,
            tooltip="Layers of a new edit head's encoder, and of its decoder. 4 (default) is MGIE's.",
        ),
        io.Float.Input(
            "adversarial",
            default=0.0,
            min=0.0,
            max=10.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="Weight of a small discriminator that learns beside to tell predicted pictures from the results: "
            "crisper texture, less steady. 0 (default): none; 0.01 to 0.1.",
        ),
    ]


def connected() -> list[io.Input]:
    """Triples that come from the graph."""
    return [
        io.Image.Input(
            "pictures",
            optional=True,
            tooltip="Pictures as they are, a batch or a list of any sizes, where no folder is chosen.",
        ),
        io.Image.Input(
            "results", optional=True, tooltip="What each should become, in the same order and of its shape."
        ),
        io.String.Input(
            "instructions",
            multiline=True,
            default="",
            tooltip="How you would ask for it: a list, a line for each, or one line for all. Say what to do ('make it "
            "winter'), or what the result shows, as you will later.",
        ),
        io.Mask.Input(
            "masks",
            optional=True,
            tooltip="White where each picture is to change, one for each or one for all: for words_inside.",
        ),
    ]
