"""Teaches a style or a subject."""

from __future__ import annotations

import time

from comfy_api.latest import io

from ...kernels.lora import LOSS_WEIGHTS
from .. import host, inputs
from ..settings import AS_SET
from ..training import family_of, states, watched
from ..training.course import plot
from ..training.fitting import History
from ..training.pictures import Order
from ..training.widgets import shared
from . import course, files, priors, training
from .settings import PAPER, STYLE, LoRASettings

NAME = "my_lora"


class TrainLoRA(io.ComfyNode):
    """LoRA (arXiv:2106.09685) of U-Net and text encoders on 10 to 40 pictures."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestTrainLoRA",
            display_name="Train LoRA on Pictures",
            category="palimpsest/lora",
            description="Teaches the model and its text encoders a style or a subject from 10 to 40 captioned "
            "pictures. The file is an ordinary LoRA for every loader; the model and clip that come out have it on.",
            search_aliases=["lora", "train lora", "style", "dreambooth", "fine-tune", "finetune", "kohya", "subject"],
            is_input_list=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="An SD 1.x, SD 2.x or SDXL model, which itself stays as it is. LoRAs on it are taken as a "
                    "part of it. The gradient passes through all of it: leave checkpointing on if memory is short.",
                ),
                io.Clip.Input("clip", tooltip="The checkpoint's text encoders. They learn too unless text_rate is 0."),
                io.Vae.Input("vae", tooltip="The checkpoint's VAE, for the pictures and the sheet."),
                io.Image.Input(
                    "images",
                    tooltip="What is to be learned: 10 to 40 pictures of any sizes, as a batch or as a list, such as "
                    "from Load Image-Text (from Folder). Each is scaled to about `resolution` and keeps its form.",
                ),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="",
                    tooltip="What each picture shows, in the pictures' order: a list, a line for each, or one line for "
                    "all. Name the content only; what is left out, such as the style, becomes a part of the LoRA.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[AS_SET, PAPER, STYLE],
                    tooltip="as set below (default): the values below. paper: the review paper's recipe in place of "
                    "them: 5 repeats, 20 epochs, 1e-4 and 1e-5, cosine, 8-bit AdamW, a file every 2 epochs. style: "
                    "convolutions, biases, loss_weight picture without min_snr_gamma, noise_offset 0.1 and a constant "
                    "rate without warm_up, which take on other tones and colours soonest; the rest as set.",
                ),
                io.Int.Input(
                    "epochs",
                    default=10,
                    min=1,
                    max=10000,
                    tooltip="Rounds over all pictures. Too few: the style hardly shows; too many: every picture looks "
                    "like one of yours. Compare the files of the epochs on the sheet. 5 to 20.",
                ),
                io.Int.Input(
                    "repeats",
                    default=10,
                    min=1,
                    max=1000,
                    tooltip="How often an epoch shows each picture. pictures x repeats x epochs / batch_size steps in "
                    "all: 1500 to 3500 are usual.",
                ),
                shared(
                    "batch_size",
                    "Pictures in one step, of one size. 1 (default) to 4; more learns steadier, takes more "
                    "memory, and fewer steps.",
                ),
                shared(
                    "resolution",
                    "Side in pixels of a square of as many pixels as each picture gets. 0 (default): the "
                    "model's own, 512 for SD 1.5, 1024 for SDXL. Less is faster and loses fine texture.",
                ),
                shared(
                    "rank",
                    "How much can be learned, and the size of the file: 4 for a simple subject, 16 (default), "
                    "32 for a style; 64 and more learn your pictures by heart.",
                ),
                shared(
                    "alpha",
                    "What is learned counts alpha / rank. Half the rank (default) is usual; more acts like a "
                    "higher learning rate.",
                ),
                shared(
                    "learning_rate",
                    "Of the U-Net. 0.0001 (default); 0.00005 to 0.0005. Too high burns colours, breaks shapes.",
                ),
                io.Float.Input(
                    "text_rate",
                    default=0.00001,
                    min=0.0,
                    max=0.1,
                    step=0.00001,
                    round=False,
                    tooltip="Of the text encoders. 0.00001 (default) ties what is learned to the captions' words and "
                    "the trigger; 0: they do not learn, which is faster and needs less memory.",
                ),
                shared(
                    "optimiser",
                    "AdamW (default), or its 8-bit form, which saves some 40 MB at rank 16 and needs the "
                    "package bitsandbytes or torchao; without them AdamW is used and the report says so.",
                ),
                shared("schedule", "How the learning rates fall: along a cosine (default), a line, or not at all."),
                inputs.seed(
                    "Sets the first weights, the noise and the order of the pictures. The same seed gives the same "
                    "file.",
                    control_after_generate=True,
                ),
                io.String.Input(
                    "filename",
                    default=NAME,
                    tooltip="Name of the file in models/loras; a number is added, and _ep02 to files on the way.",
                ),
                io.Int.Input(
                    "save_every",
                    default=2,
                    min=0,
                    max=10000,
                    tooltip="Keeps a file after so many epochs, so that you can take the best one. 0: only the last.",
                ),
                io.Int.Input(
                    "preview_every",
                    default=2,
                    min=0,
                    max=10000,
                    tooltip="Draws the prompts below after so many epochs, 20 steps each, from the same noise. They "
                    "show under the node and on the sheet. 0: never.",
                ),
                io.String.Input(
                    "preview_prompts",
                    multiline=True,
                    default="",
                    tooltip="What previews draw, a line for each: something that your pictures do not show tells most. "
                    "Empty: the first caption.",
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    tooltip="A word that is put before every caption, and that calls up what was learned later: a rare "
                    "one, such as zwx. Empty: none, which suits a style.",
                ),
                shared(
                    "checkpointing",
                    "On (default): blocks of the U-Net run again for the gradient instead of being kept: far "
                    "less memory, a quarter to a third more time, the same result.",
                ),
                io.Combo.Input(
                    "resume",
                    options=states.resumable(files.STATES),
                    tooltip="A training to go on with, from models/palimpsest_lora_states: with the same pictures and "
                    "settings it ends as if it had never been stopped.",
                ),
                io.Boolean.Input(
                    "flip",
                    default=False,
                    advanced=True,
                    tooltip="On: half of the time a picture is seen in a mirror. Not for letters and for faces that "
                    "should be someone's.",
                ),
                shared(
                    "min_snr_gamma",
                    "Caps the weight of low noise levels. 0 (default): all levels alike, as the paper; 5 "
                    "learns shapes faster and fine texture slower.",
                ),
                io.Float.Input(
                    "noise_offset",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Lets very dark and very bright pictures be learned: 0.03 to 0.1. 0 (default): off.",
                ),
                io.Float.Input(
                    "caption_dropout",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Share of steps without a caption: 0.05 to 0.1 lets a style show without its words too.",
                ),
                shared(
                    "accumulation",
                    "Adds up the gradients of so many batches: as a larger batch_size, without its memory.",
                ),
                shared("cycles", "How often the cosine begins anew. 1 (default): never."),
                shared("warm_up", "Steps in which the learning rates rise from 0: 50 to 100 steady a high rate."),
                shared("weight_decay", "Draws the LoRA towards doing nothing. 0.01 (default) is AdamW's own."),
                shared(
                    "convolutions",
                    "On: the convolutions learn too, for fine texture. The U-Net's part of the file grows from "
                    "14 to 32 MB for SD 1.5 at rank 16, from 85 to 97 MB for SDXL.",
                ),
                shared("guidance", "Guidance (cfg) of the previews. 7.5 (default) for SD 1.5, 6 for SDXL."),
                shared(
                    "keep_state",
                    "last (default): the end, or a cancelled training, can be gone on with; its file is some "
                    "six times the LoRA's. with every file: each of them. none.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="White where a picture is to be learned from, such as the subject: one for each picture, "
                    "or one for all.",
                ),
                io.Image.Input(
                    "class_images",
                    optional=True,
                    tooltip="Pictures of the kind that your subject is one of, such as cats, best drawn by this model: "
                    "each step shows one, so that the model does not forget the others.",
                ),
                io.String.Input(
                    "class_caption",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="What class_images show, such as 'a cat'.",
                ),
                io.Float.Input(
                    "prior_weight",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="How much class_images count. 1 (default): as much as your pictures.",
                ),
                io.Int.Input(
                    "class_count",
                    default=0,
                    min=0,
                    max=1000,
                    optional=True,
                    advanced=True,
                    tooltip="So many pictures of class_caption are drawn by the model itself before it learns, 20 "
                    "steps each, in place of class_images or beside them: 20 to 100. 0 (default): none.",
                ),
                io.Combo.Input(
                    "loss_weight",
                    options=list(LOSS_WEIGHTS),
                    optional=True,
                    advanced=True,
                    tooltip="What noisy levels count, where a picture's tone, colours and composition are decided. all "
                    "levels alike (default): as the model was trained. debiased: noisy ones count more, for a style "
                    "of another tone. picture: most of all, as the host's Train LoRA; fine texture is learned last. "
                    "min_snr_gamma multiplies with it: leave that at 0.",
                ),
                io.Boolean.Input(
                    "biases",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="On: norms learn too, and the biases of the layers that learn: tones and colours come "
                    "sooner. The file grows by 1 MB for SD 1.5, 3 MB for SDXL. ComfyUI reads all of it; other programs "
                    "may leave biases out.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the LoRA, strength 1."),
                io.Clip.Output(display_name="clip", tooltip="The text encoders with the LoRA, strength 1."),
                io.Image.Output(display_name="plot", tooltip="The training loss, and the loss by noise level."),
                io.Image.Output(display_name="sheet", tooltip="What the previews drew, by epoch."),
                io.String.Output(display_name="report", tooltip="Steps, loss, time, files."),
                io.String.Output(display_name="file", tooltip="The name to pick in Load LoRA."),
            ],
            hidden=inputs.unique_id(),
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        images,
        captions=("",),
        filename=(NAME,),
        resume=(states.NEW,),
        masks=None,
        class_images=None,
        class_caption=("",),
        **chosen,
    ) -> io.NodeOutput:
        (model,), (clip,), (vae,), began = model, clip, vae, time.monotonic()
        way_out = "train on the text-to-image checkpoint of its family, whose LoRAs it takes"
        host.require_text_to_image(model, "Train LoRA", way_out)
        given = training.Given(images, captions, masks or (), class_images or (), class_caption[0])
        settings = training.resolution_of(model, LoRASettings.of({name: value[0] for name, value in chosen.items()}))
        shown = host.ProgressText(host.node_id(cls))
        factors, names = training.factors_for(model, clip, settings)
        state = states.load_state(files.STATES, resume[0], settings, files.FREE)
        target = files.TrainingFiles.new(filename[0], names, settings, family_of(model))
        target.require_room(factors)
        shown.update("encoding the pictures", now=True)
        found = training.examples_of(model, vae, given, settings)
        found += priors.drawn(model, clip, given.class_caption, settings, shown.update)

        steps = settings.epochs * Order(found, settings).steps_per_epoch
        watch = watched(model, steps, shown.update, target.save)
        history = training.train(model, clip, found, factors, settings=settings, watch=watch, state=state)
        report = describe(history, settings, target.written, time.monotonic() - began) + host.guidance_left_out(model)
        changed, read = training.with_lora(model, clip, files.content(factors, names))
        sheet = course.sheet(model, vae, history, training.prompts_to_preview(found, settings))
        told = host.told(cls, report, saved=target.written)
        return io.NodeOutput(changed, read, plot(history), sheet, report, target.written[-1], ui=told)


def describe(history: History, settings: LoRASettings, written: list[str], seconds: float) -> str:
    """What was trained, in one line."""
    text = "text encoders too" if settings.text_rate > 0 else "U-Net alone"
    vectors = ", norms and biases" if settings.biases else ""
    parts = [
        history.counted(),
        history.fallen(),
        f"rank {settings.rank}{vectors}, {text}, {history.optimiser}",
        history.stopped,
        f"{seconds:.0f} s; {', '.join(written)}",
    ]
    return "; ".join(filter(None, parts))


NODES = [TrainLoRA]
SHELVES = [files.STATES]
