"""The inputs of the node that trains a multimodal encoder, with what each does."""

from __future__ import annotations

from comfy_api.latest import io

from ....kernels.lora import CONSTANT
from ... import inputs, sockets
from ...settings import AS_SET_ABOVE
from ...training.widgets import shared
from ..dataset import files as dataset_files
from . import files
from .settings import AS_TRAINED, TrainSettings

NAME = "connector"


def rate(name: str, tooltip: str, *, default: float, step: float, advanced: bool | None = True) -> io.Input:
    """The learning rate of a part, or of one in a lesson."""
    bounds = {"min": 1e-7, "max": 0.1, "step": step, "round": False}
    return io.Float.Input(name, default=default, tooltip=tooltip, advanced=advanced, **bounds)


def sources() -> list[io.Input]:
    """Connected, and by name: what is trained, and on what."""
    return [
        io.Model.Input(
            "model",
            tooltip="An SD 1.x, SD 2.x or SDXL model in eps or v, which stays as it is. The gradient passes "
            "through it: with checkpointing 0.9 GB beside the weights for a picture of SDXL at 1024 px, 0.3 GB "
            "for one of SD 1.5 at 512 px.",
        ),
        io.Vae.Input(
            "vae",
            tooltip="The model's VAE. Each picture is encoded once and kept in memory: 0.26 MB at 1024 px.",
        ),
        sockets.MultimodalEncoder.Input(
            "multimodal_encoder",
            tooltip="From Load Multimodal Encoder. With a connector: training goes on from it. Without: a new "
            "one is begun. The vision-language model stays as it is.",
        ),
        sockets.MultimodalDataset.Input(
            "dataset",
            optional=True,
            tooltip="From Build Multimodal Dataset. Connected, it is used instead of the one in folder.",
        ),
        io.Clip.Input(
            "clip",
            optional=True,
            tooltip="For align_steps and read_steps, and for pooled_output CLIP text: the model's own text "
            "encoder, which reads the words of each prompt.",
        ),
        io.Combo.Input(
            "folder",
            options=dataset_files.dataset_names(),
            tooltip="A dataset in output/palimpsest_datasets or input/palimpsest_datasets, where none is connected.",
        ),
    ]


def choices() -> list[io.Input]:
    """How it is trained, in what nearly every training sets."""
    return [
        io.Combo.Input(
            "stage",
            options=list(TrainSettings.CHOICES["stage"]),
            tooltip="1 (default): up to three crops and perhaps the whole picture in a prompt, 324 tokens "
            "each. 2, afterwards: one face or person of 1296 tokens, for faces; it needs crops of people.",
        ),
        io.Int.Input(
            "steps",
            default=1000,
            min=1,
            max=10000000,
            tooltip="Steps to train now, behind those of align_steps and read_steps; a training that is gone "
            "on with adds them. The paper took about 300,000 on eight GPUs.",
        ),
        io.Int.Input(
            "batch_size",
            default=4,
            min=1,
            max=256,
            tooltip="Pictures in one model call, as many as the memory holds: it grows with them. "
            "gradient_accumulation is the slower way to the same.",
        ),
        rate(
            "connector_rate",
            "Learning rate of the connector. 0.00001 (default) is the paper's, for 300,000 steps.",
            default=0.00001,
            step=0.000001,
            advanced=None,
        ),
        io.Boolean.Input(
            "train_unet",
            default=False,
            tooltip="Train a LoRA on the U-Net's attention beside the connector, as the paper does. Its file "
            "goes into Load LoRA when you sample.",
        ),
        io.Boolean.Input(
            "train_language",
            default=False,
            tooltip="Train a LoRA on the language model beside the connector, as the paper does. Language "
            "model and U-Net must then fit the GPU together; its file goes into Load Multimodal Encoder.",
        ),
        io.Combo.Input(
            "pooled_output",
            options=list(TrainSettings.CHOICES["pooled_output"]),
            tooltip="What SDXL gets beside the tokens. zeros (default): nothing, as the paper removes CLIP. learned: a "
            "vector that the connector makes. CLIP text: the words, from clip. Without effect on SD 1.x.",
        ),
        io.Combo.Input(
            "resume",
            options=files.trainings(),
            tooltip="A training to go on with, exactly where it stopped, with its optimiser: choose the same "
            "encoder, LoRAs and rank that it began with. (new): begin with the connected encoder.",
        ),
        inputs.seed(
            "Sets new weights, the order of the pictures, what is drawn from each, and the noise. The same "
            "seed gives the same connector.",
            control_after_generate=True,
        ),
        io.String.Input(
            "name",
            default=NAME,
            tooltip="Name of the files in models/palimpsest_connectors, models/loras and "
            "models/palimpsest_trainings, to which a number is added. Folders (mine/cats) and dates "
            "(%date:yyyy-MM-dd%) are understood.",
        ),
    ]


def advanced() -> list[io.Input]:
    """What few change."""
    return [
        io.Int.Input(
            "tokens",
            default=0,
            min=0,
            max=4900,
            advanced=True,
            tooltip="Tokens of each picture; 0 (default): as the stage says. A square number such as 64, 256 "
            "or 1024; in the paper quality saturates near 1000, and cost grows with it.",
        ),
        io.Int.Input(
            "gradient_accumulation",
            default=1,
            min=1,
            max=1024,
            advanced=True,
            tooltip="Model calls whose gradients are added up to one step: a larger batch without its memory. "
            "Time grows with it.",
        ),
        rate(
            "language_rate",
            "Learning rate of the language model's LoRA. 0.000003 (default) is the paper's, for 300,000 steps.",
            default=0.000003,
            step=0.000001,
        ),
        rate(
            "unet_rate",
            "Learning rate of the U-Net's LoRA. 0.000005 (default) is the paper's, for 300,000 steps.",
            default=0.000005,
            step=0.000001,
        ),
        io.Int.Input(
            "lora_rank",
            default=8,
            min=1,
            max=256,
            advanced=True,
            tooltip="Rank of the LoRAs. 8 (default) is the paper's; their files grow with it, and how far "
            "they can change the models.",
        ),
        io.Int.Input(
            "depth",
            default=16,
            min=1,
            max=64,
            advanced=True,
            tooltip="Blocks of a new connector. 16 (default) is the paper's: 0.8 billion weights for SDXL, "
            "0.1 for SD 1.5, beside Idefics2. 4 take a quarter of that.",
        ),
        io.Float.Input(
            "prompt_dropout",
            default=0.1,
            min=0.0,
            max=0.9,
            step=0.05,
            advanced=True,
            tooltip="How often a picture comes with an empty prompt, so that guidance has something to lead "
            "away from. 0.1 is usual for diffusion models; the paper does not say. At 0 sample with cfg 1.",
        ),
        io.Int.Input(
            "warmup",
            default=100,
            min=0,
            max=100000,
            advanced=True,
            tooltip="Steps over which the learning rates rise from 0, at the start of a new training. More "
            "where the loss jumps up at the beginning; the paper does not say.",
        ),
        shared(
            "checkpointing",
            "On (default): activations are made again for the gradient. It takes a third more time, and for a "
            "picture of SDXL 0.9 GB in place of 8.4 GB (10.8 GB with train_unet). The result is the same.",
            advanced=True,
        ),
        io.Int.Input(
            "preview_every",
            default=100,
            min=0,
            max=1000000,
            advanced=True,
            tooltip="Draws a picture after so many steps, shown under the node; costs 40 model calls of one "
            "row. 0: only at the end.",
        ),
        io.Int.Input(
            "save_every",
            default=500,
            min=0,
            max=1000000,
            advanced=True,
            tooltip="Writes the files anew after so many steps. 0: only at the end, and when cancelled.",
        ),
        io.Boolean.Input(
            "keep_state",
            default=True,
            advanced=True,
            tooltip="Keep what resume needs in models/palimpsest_trainings, three times the size of what is "
            "trained: 10 GB for SDXL at depth 16.",
        ),
    ]


def lessons() -> list[io.Input]:
    """The two lessons before the last, and all values by one name."""
    return [
        io.Int.Input(
            "align_steps",
            default=0,
            min=0,
            max=10000000,
            advanced=True,
            tooltip="Steps in which a new connector first learns to say what the text encoder says of the "
            "words, and of each picture what it says of the words it is bound to; needs clip, not the U-Net. "
            "0 (default): none. 2500 and more, until its error no longer falls: a small model told collars after "
            "2500 steps, hardly after 1200.",
        ),
        io.Int.Input(
            "read_steps",
            default=0,
            min=0,
            max=10000000,
            advanced=True,
            tooltip="Steps in which the U-Net's LoRA alone then learns to draw from many tokens a picture, as "
            "a connector would say them that made no mistake; needs clip and train_unet. 0 (default): none. "
            "6000 and more: a small model still gained after 3500.",
        ),
        rate(
            "align_rate",
            "Learning rate of the connector in align_steps. 0.0003 (default) for 16 blocks; 0.001 "
            "where depth is 1 or 2. The language model's LoRA keeps its own rate.",
            default=0.0003,
            step=0.0001,
        ),
        rate(
            "read_rate",
            "Learning rate of the U-Net's LoRA in read_steps. 0.0001 (default) is usual for LoRA.",
            default=0.0001,
            step=0.0001,
        ),
        io.Combo.Input(
            "preset",
            options=[AS_SET_ABOVE, *TrainSettings.PRESETS],
            advanced=True,
            tooltip="as set above (default): every value as you set it. in lessons: 2500 steps of align, 6000 of "
            "read, then draw, faster rates that fall, SNR + 1, crop_weight 6 and train_unet, for small sets of "
            "pictures. paper: MUMU's rates, rank and depth, both LoRAs, no lessons before the last; train stage 1, "
            "then 2.",
        ),
    ]


def later() -> list[io.Input]:
    """What came with later versions: graphs that were saved before do without."""
    return [
        io.Float.Input(
            "picture_dropout",
            default=0.0,
            min=0.0,
            max=0.9,
            step=0.05,
            optional=True,
            advanced=True,
            tooltip="How often a prompt comes as its words alone, its pictures left out. 0 (default): never; a "
            "new connector then draws badly from a prompt without a picture. 0.1 shows it such prompts, too.",
        ),
        io.Boolean.Input(
            "keep_moments",
            default=True,
            optional=True,
            advanced=True,
            tooltip="Keep AdamW's two moments in the state as well (default): a resumed training ends bit for "
            "bit as one that was never stopped. Off: a third of the size, 3.3 GB for SDXL at depth 16; a "
            "resumed training begins AdamW anew, with its warm-up.",
        ),
        io.Combo.Input(
            "weighting",
            options=list(TrainSettings.CHOICES["weighting"]),
            default=AS_TRAINED,
            optional=True,
            advanced=True,
            tooltip="How much noisy steps count in read and draw. as trained (default): as in the model's own loss, in "
            "which an eps model hardly learns from much noise. SNR + 1: the error of x_0 counts there as well, where "
            "it is decided what a picture is of.",
        ),
        shared(
            "schedule",
            "How the learning rates of each lesson fall behind its warm-up: not at all (constant, the default), along "
            "a cosine or a line to 0. A training that is gone on with falls over all its steps, those behind it too.",
            default=CONSTANT,
            optional=True,
            advanced=True,
        ),
        io.Float.Input(
            "crop_weight",
            default=1.0,
            min=1.0,
            max=100.0,
            step=0.5,
            optional=True,
            advanced=True,
            tooltip="How many times as much an error within the boxes of a picture's crops counts in read and draw. 1 "
            "(default): as much as around them. 3 to 6 where what the crops show is small in the picture.",
        ),
    ]
