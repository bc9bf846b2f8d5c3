"""Training a LoRA through the host's own model, text encoders and sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.denoising_loss import velocity_loss
from ...kernels.scripts import split_lines
from .. import host, training
from ..host import checkpointing, gradient
from ..training.fitting import History
from ..training.pictures import split_pictures
from ..training.prompts import Prompts, cloned_norm_inputs
from . import files
from .fit import FitLoRA
from .layers import text_layers, unet_layers, unet_vectors
from .pictures import Example, captions_for, examples, masks_for
from .settings import TECHNIQUE, LoRASettings

NAME = "palimpsest_lora"
LESS_MEMORY = (
    "switch checkpointing on, set batch_size to 1 (with accumulation in its place), lower resolution, or set text_rate "
    "to 0"
)


@dataclass(frozen=True, eq=False)
class Given:
    """Pictures to train on: IMAGEs (B, H, W, C), captions, MASKs (B, H, W), and pictures of the class beside them."""

    images: Sequence[Tensor]
    captions: Sequence[str]
    masks: Sequence[Tensor] = ()
    class_images: Sequence[Tensor] = ()
    class_caption: str = ""


def resolution_of(model: Any, settings: LoRASettings) -> LoRASettings:
    """The settings with a resolution: for 0 the one that the model's family was trained at."""
    return settings if settings.resolution else replace(settings, resolution=training.own_resolution(model))


def examples_of(model: Any, vae: Any, given: Given, settings: LoRASettings) -> list[Example]:
    """Everything that is trained on, encoded. Raises ValueError where captions or masks do not fit the pictures."""
    pictures = split_pictures(given.images)
    captions = captions_for(len(pictures), given.captions, settings.trigger)
    found = list(examples(model, vae, pictures, captions, masks_for(len(pictures), given.masks), settings=settings))
    priors = split_pictures(given.class_images)
    if priors and not given.class_caption.strip():
        raise ValueError("class_images need class_caption: the words that describe them all, such as 'a cat'.")
    words, none = [given.class_caption.strip()] * len(priors), [None] * len(priors)
    found += examples(model, vae, priors, words, none, settings=settings, prior=True)
    if not all(host.is_finite(example.latent) for example in found):
        raise ValueError(
            "the VAE returns NaN for these pictures: look at its precision (start ComfyUI with --fp32-vae)."
        )
    return found


def factors_for(model: Any, clip: Any, settings: LoRASettings) -> tuple[files.Parts, files.Names]:
    """(what is trained by part, kohya's names of it by part). Raises ValueError for a CLIP of another model."""
    names = {"unet": unet_layers(model, settings.convolutions)}
    host.require_readable(model, clip.encode_from_tokens_scheduled(clip.tokenize("")), "clip")
    networks = {"unet": model.model.diffusion_model}
    if settings.text_rate > 0:
        names["text"], networks["text"] = text_layers(clip), clip.cond_stage_model
    with torch.inference_mode(False):
        made = {
            part: training.Factors(
                training.weighted_layers(networks[part], layers), settings.rank, settings.seed + number, settings.alpha
            )
            for number, (part, layers) in enumerate(names.items())
        }
        if settings.biases:
            names["biases"] = unet_vectors(model, names["unet"])
            made["biases"] = training.Changes.of(networks["unet"], names["biases"])
    return made, names


def patched_for_training(
    model: Any, prompts: Prompts, factors: files.Parts, settings: LoRASettings
) -> tuple[Any, training.ReadTokens]:
    """A clone of the MODEL with all that a gradient into the factors needs, and its reader of prompts."""
    from comfy.patcher_extension import WrappersMP

    patched, _ = gradient.prepare(model, host.AttentionLayer("input", 0, 0, 0), False)
    reader = training.ReadTokens()
    patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, NAME, reader)
    training.act_in_unet(patched, factors["unet"])
    if "biases" in factors:
        training.changes_act_in_unet(patched, factors["biases"])
    if settings.checkpointing:
        checkpointing.install(patched)
    if prompts.factors is not None:  # loaded together with the U-Net, before the first step
        patched.set_additional_models(NAME, [prompts.clip.patcher])
        aliases = gradient.AliasWeights(training.embedding_weights(model))  # the pooled output has a gradient too
        patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, NAME, aliases)
    return patched, reader


def train(
    model: Any,
    clip: Any,
    found: list[Example],
    factors: files.Parts,
    *,
    settings: LoRASettings,
    watch: training.Watch,
    state: dict[str, Tensor] | None = None,
) -> History:
    """Train factors on examples; they hold the result. The model and clip stay as they were.

    watch.save is given what was Learned on the way, at the end, and where the training is cancelled or fails after its
    first step. Raises ValueError for other models, and for one that returns NaN.
    """
    loss = training.loss_of(model, TECHNIQUE)
    sampling = model.get_model_object("model_sampling")
    model, previewed = host.single_device(model), prompts_to_preview(found, settings)
    with torch.inference_mode(False):
        prompts = Prompts.of(clip, factors.get("text"))
        texts = dict.fromkeys([*(example.caption for example in found), *previewed, ""])
        if prompts.factors is None:
            prompts.remember(list(texts))
        patched, reader = patched_for_training(model, prompts, factors, settings)
        fitting = FitLoRA(
            found,
            prompts,
            factors,
            settings,
            loss=loss,
            velocity=loss is velocity_loss,
            sigmas=sampling.sigmas.detach().float().cpu().clone(),
            reader=reader,
            previewed=previewed,
            watch=watch,
            state=state,
        )

        largest = max((example.latent for example in found), key=lambda latent: latent.numel())
        start = model.model.process_latent_out(largest.repeat(settings.batch_size, 1, 1, 1))
        tokens, pooled = training.placeholder(model)
        levels = torch.tensor([float(sampling.sigma_max), 0.0])
        with (
            training.kept_if_it_ends_early(fitting.rescue),
            cloned_norm_inputs(clip.cond_stage_model),
            training.told_of_memory(TECHNIQUE, LESS_MEMORY),
        ):
            positive = [[tokens, {"pooled_output": pooled}]]
            host.sample(patched, fitting, start, sigmas=levels, positive=positive)
    watch.save(fitting.learned(final=True))
    return fitting.history


def with_lora(model: Any, clip: Any, content: dict[str, Tensor]) -> tuple[Any, Any]:
    """The model and clip with a LoRA's content on them, as the host's own loader puts it there."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, clip, content, 1.0, 1.0)


def prompts_to_preview(found: list[Example], settings: LoRASettings) -> list[str]:
    """The prompts that previews draw: the ones given, or the first picture's caption."""
    if not settings.preview_every:
        return []
    return split_lines(settings.preview_prompts) or [found[0].caption]
