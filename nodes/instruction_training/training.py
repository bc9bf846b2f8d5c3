"""Training a model to follow instructions, through the host's own model and sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels.denoising_loss import velocity_loss
from .. import host, instruction, training
from ..host import checkpointing, gradient, widening
from ..training.fitting import History
from ..training.prompts import Prompts
from . import words
from .blending import BlendedPass
from .examples import Example
from .fit import FitInstruction
from .head import HeadReader
from .head_fit import FitHead, begin
from .learning import Parts
from .reads import Reads, TextReader
from .settings import TECHNIQUE, InstructionSettings

NAME = "palimpsest_instruction"
LESS_MEMORY = (
    "switch checkpointing on, set batch_size to 1 (with accumulation in its place), lower resolution, or set method to "
    "LoRA"
)
SHOWN = 2  # triples that previews draw, where none are held out


def with_resolution(model: Any, settings: InstructionSettings) -> InstructionSettings:
    """The settings with a resolution: for 0 the one that the model's family was trained at."""
    return settings if settings.resolution else replace(settings, resolution=training.own_resolution(model))


def for_pictures(model: Any) -> tuple[Any, bool]:
    """(the MODEL with channels for a picture, whether they were added). Raises ValueError for other families."""
    host.require_unet(model, TECHNIQUE)
    training.loss_of(model, TECHNIQUE)
    model = host.single_device(model)
    if host.picture_channels(model):
        return model, False
    return widening.with_channels(model, TECHNIQUE), True


def apart(examples: list[Example], settings: InstructionSettings) -> tuple[list[Example], list[Example]]:
    """(those that are trained on, those that previews draw)."""
    learned = examples[: len(examples) - settings.held_out]
    return learned, (examples[len(learned) :] or learned)[:SHOWN]


def patched_for_training(
    model: Any, parts: Parts, settings: InstructionSettings
) -> tuple[Any, training.ReadTokens, words.WordsInside | None]:
    """(a clone of the MODEL with all that a gradient needs, its reader of prompts, where words act if they are masked).

    Patches of other nodes act in it: what is trained is the model with them.
    """
    from comfy.patcher_extension import WrappersMP

    patched, inside = model.clone(), None
    if parts.blend is not None:
        BlendedPass.of(parts.blend).patch(patched)
    if settings.words_inside:
        inside = words.WordsInside()
        words.attach(patched, inside, TECHNIQUE)
    patched, _ = gradient.prepare(patched, host.AttentionLayer("input", 0, 0, 0), False)
    reader = training.ReadTokens()
    patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, NAME, reader)
    parts.act_in(patched)
    if settings.checkpointing:
        checkpointing.install(patched)
    return patched, reader, inside


def train(
    model: Any,
    clip: Any,
    learned: Sequence[Example],
    shown: Sequence[Example],
    parts: Parts,
    *,
    settings: InstructionSettings,
    watch: training.Watch,
    state: dict[str, Tensor] | None = None,
    language: instruction.MgieModel | None = None,
) -> History:
    """Train parts of a MODEL with picture channels on examples; they hold the result, the model stays as it was.

    language: whose states an edit head among the parts reads. watch.save is given what was Learned on the way, at the
    end, and where the training is cancelled or fails after its first step. Raises ValueError for other models, and for
    one that returns NaN.
    """
    loss, sampling = training.loss_of(model, TECHNIQUE), model.get_model_object("model_sampling")
    with torch.inference_mode(False):
        make, reads = fitting_by(clip, [*learned, *shown], parts, settings, language=language, new=state is None)
        patched, reader, inside = patched_for_training(model, parts, settings)
        if parts.head is not None and parts.head.learns_rows:
            patched.set_additional_models(NAME, [language.patcher])
        fitting = make(
            learned,
            reads,
            parts.factors,
            settings,
            loss=loss,
            velocity=loss is velocity_loss,
            sigmas=sampling.sigmas.detach().float().cpu().clone(),
            reader=reader,
            inside=inside,
            blended=None if parts.blend is None else BlendedPass.of(parts.blend),
            as_latent=model.model.process_latent_in,
            shown=shown,
            watch=watch,
            state=state,
        )
        largest = max((example.latent for example in learned), key=lambda latent: latent.numel())
        rows = max(settings.batch_size, 3 if settings.preview_every else 1)
        start = model.model.process_latent_out(largest.repeat(rows, 1, 1, 1))
        tokens, pooled = training.placeholder(model)
        levels = torch.tensor([float(sampling.sigma_max), 0.0])
        with training.kept_if_it_ends_early(fitting.rescue), training.told_of_memory(TECHNIQUE, LESS_MEMORY):
            positive = [[tokens, {"pooled_output": pooled}]]
            host.sample(patched, fitting, start, sigmas=levels, positive=positive)
    watch.save(fitting.learned(final=True))
    return fitting.history


def fitting_by(
    clip: Any,
    examples: Sequence[Example],
    parts: Parts,
    settings: InstructionSettings,
    *,
    language: instruction.MgieModel | None,
    new: bool,
) -> tuple[Callable[..., FitInstruction], Reads]:
    """(what trains, who reads the prompts): the text encoders, or an edit head; new: nothing is gone on with."""
    prompts = Prompts.of(clip, None)
    if parts.head is None:
        prompts.remember(list(dict.fromkeys([*(each.instruction for each in examples), ""])))
        return FitInstruction, TextReader(prompts)
    reads = HeadReader(parts.head, language)
    reads.remember(examples)
    if settings.text_steps:
        prompts.remember(list(dict.fromkeys([*(each.told.text for each in examples), ""])))
        if new and parts.head.new:
            begin(reads, prompts, examples, settings.seed)
    return partial(FitHead, texts=prompts), reads
