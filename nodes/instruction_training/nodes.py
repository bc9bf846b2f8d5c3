"""Teaches a model to edit as you ask."""

from __future__ import annotations

import time
from typing import Any

import torch
from comfy_api.latest import io

from ...kernels.instruction_training import dropout_bands
from .. import host, inputs, sockets
from ..training import family_of, states, watched
from ..training.course import plot
from ..training.fitting import History
from . import expressing, files, training, triples
from .course import sheet
from .examples import encoded
from .head import LearningHead
from .learning import Parts, unet_file
from .schema import NAME, advanced, blending, connected, course, heads, sources
from .settings import InstructionSettings


class TrainInstruction(io.ComfyNode):
    """InstructPix2Pix (arXiv:2211.09800) from triples, by LoRA or in full."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestTrainInstruction",
            display_name="Train Instruction",
            category="palimpsest/instruction",
            description="Teaches a model to edit a picture as an instruction says, from triples: a picture, an "
            "instruction, and what the picture should become. The file is a LoRA or a U-Net for the host's own "
            "loaders; the model that comes out has it on.",
            search_aliases=["instructpix2pix", "ip2p", "train edit model", "mgie", "edit by text", "before and after"],
            is_input_list=True,
            inputs=[*sources(), *course(), *advanced(), *connected(), *blending(), *heads()],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The model with what was learned, and with channels for the picture: for "
                    "InstructPixToPixConditioning and DualCFGGuider.",
                ),
                io.Image.Output(display_name="plot", tooltip="The training loss, and the loss by noise level."),
                io.Image.Output(
                    display_name="sheet", tooltip="Some triples: the picture, what was drawn by step, the result."
                ),
                io.String.Output(display_name="report", tooltip="Triples, steps, loss, time, files."),
                io.String.Output(
                    display_name="file",
                    tooltip="The name to pick in Load LoRA, or in Load Diffusion Model; of an edit "
                    "head alone in head_file of Load MGIE.",
                ),
                sockets.EditHead.Output(
                    display_name="edit_head",
                    tooltip="The edit head with what it learned, for mgie of Express Instruction. Without edit_head: "
                    "nothing.",
                ),
            ],
            hidden=inputs.unique_id(),
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        folder=(triples.CONNECTED,),
        filename=(NAME,),
        resume=(states.NEW,),
        pictures=None,
        results=None,
        instructions=("",),
        masks=None,
        edit_head=(None,),
        expressed=("",),
        **chosen,
    ) -> io.NodeOutput:
        (model,), (clip,), (vae,), began = model, clip, vae, time.monotonic()
        given = training.with_resolution(model, settings_of(chosen))
        wired = triples.Connected(pictures or (), results or (), instructions, masks or (), expressed)
        head = (edit_head or (None,))[0]
        source = source_of(folder[0], wired, given)
        wide, added = training.for_pictures(model)
        host.require_readable(wide, clip.encode_from_tokens_scheduled(clip.tokenize("")), "clip")
        shown_text = host.ProgressText(host.node_id(cls))
        language = None if head is None else expressing.language_of(head)
        parts = Parts.of(wide, given, None if head is None else LearningHead.of(head, wide, given))
        state = states.load_state(files.STATES, resume[0], given, files.FREE)
        target = target_of(filename[0], wide, parts, given, keep_base=added and given.keep_widened)

        def tell(done: int) -> None:
            shown_text.update(f"encoding {done} of {source.count}")

        told = None if head is None else expressing.by(language)
        found = encoded(wide, vae, source.read(), given.resolution, tell, told)
        learned, shown = training.apart(found, given)
        target.save_base()

        watch = watched(wide, given.steps, shown_text.update, target.save)
        more = {"settings": given, "watch": watch, "state": state, "language": language}
        history = training.train(wide, clip, learned, shown, parts, **more)
        report = describe(history, given, len(learned), target, time.monotonic() - began)
        report += host.guidance_left_out(model)
        drawn = sheet(wide, vae, history, shown)
        ui = host.told(cls, report, saved=[*target.written, *filter(None, [target.base_name])])
        learned_head = None if head is None else parts.head.on(head, target.written[-1])
        outputs = (parts.on(wide), plot(history), drawn, report, target.written[-1], learned_head)
        return io.NodeOutput(*outputs, ui=ui)


def settings_of(chosen: dict[str, list]) -> InstructionSettings:
    """The settings of inputs that come as lists of one."""
    return InstructionSettings.of({name: value[0] for name, value in chosen.items()})


def target_of(
    prefix: str, wide: Any, parts: Parts, settings: InstructionSettings, *, keep_base: bool
) -> files.TrainingFiles:
    """Where the files will lie, where there is room for them. Raises ValueError and OSError as TrainingFiles.new."""
    target = files.TrainingFiles.new(
        prefix,
        settings,
        parts,
        model=wide,
        kind=family_of(wide),
        whole=lambda: unet_file(parts.on(wide)),
        base=(lambda: unet_file(wide)) if keep_base and parts.is_lora else None,
    )
    target.require_room(2 * sum(weight.numel() for weight in wide.model.diffusion_model.parameters()))
    return target


def source_of(folder: str, wired: triples.Connected, settings: InstructionSettings) -> triples.Source:
    """What is trained on: of a folder where one is chosen, else what is connected. Raises ValueError for unfit ones."""
    dropout_bands(torch.zeros(0), settings.drop_text, settings.drop_both, settings.drop_picture)
    if folder == triples.CONNECTED:
        found = wired.source()
    elif wired.pictures or wired.results:
        raise ValueError(
            f"pictures are connected and the folder {folder} is chosen: disconnect them, or choose {triples.CONNECTED}."
        )
    else:
        found = triples.in_folder(folder)
    if settings.words_inside and not found.masked:
        raise ValueError("words_inside needs masks, and no triple has one: connect masks, or switch it off.")
    if settings.held_out >= found.count:
        raise ValueError(
            f"held_out is {settings.held_out} of {found.count} triples, so that none is left to learn from: lower it."
        )
    return found


def describe(
    history: History, settings: InstructionSettings, count: int, target: files.TrainingFiles, seconds: float
) -> str:
    """What learned from how many triples, how well, and where it went."""
    lora = f"LoRA of rank {settings.rank}" + (", first convolution" if "first" in target.parts.factors else "")
    blend = f"weights for Feature Blend: {target.parts.blend}" if target.parts.blend else ""
    head = f"edit head in {target.head_name} (Load MGIE)" if target.head_name else ""
    base = f"belongs to {target.base_name} (Load Diffusion Model)" if target.base_name else ""
    parts = [
        f"{count} triples, {history.counted()}",
        history.fallen(),
        f"{lora if target.parts.is_lora else settings.method}, {history.optimiser}",
        history.stopped,
        f"{seconds:.0f} s; {', '.join(target.written)}",
        base,
        head,
        blend,
    ]
    return "; ".join(filter(None, parts))


NODES = [TrainInstruction]
SHELVES = [files.STATES]
