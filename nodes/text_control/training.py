"""Training a text control through the host's own model, text encoder and sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import exact_text, host, training
from ..exact_text import TextEmbedder
from ..host import checkpointing, gradient
from ..training.fitting import History
from ..training.prompts import Prompts, cloned_norm_inputs
from .control import TextControl
from .examples import Example, Reader
from .fit import FitTextControl
from .reading import ReadDrawn
from .settings import TECHNIQUE, TrainSettings
from .trained import ControlWeights, LearningControl, Projection, cloned

NAME = "palimpsest_text_control"
LESS_MEMORY = (
    "switch checkpointing on, set batch_size to 1 (with accumulation in its place), lower resolution, choose 8-bit "
    "AdamW, or set reading_weight to 0"
)
Learning = tuple[ControlWeights, Projection]


def begin(
    model: Any, clip: Any, control: TextControl | None, embedder: TextEmbedder | None, settings: TrainSettings
) -> Learning:
    """What will learn: as given, or anew. Raises ValueError for a model, CLIP, control or embedder that do not fit."""
    host.require_unet(model, TECHNIQUE)
    tokens = clip.tokenize("")
    host.require_readable(model, clip.encode_from_tokens_scheduled(tokens), "clip")
    with torch.inference_mode(False):
        known = embedder or TextEmbedder(exact_text.shipped_recogniser(), {"weight": torch.zeros(token_width(clip), 1)})
        if exact_text.encoders(clip, tokens, known):
            raise ValueError(f"{TECHNIQUE} trains for SD 1.x models with one text encoder, this CLIP has several.")
        projection = Projection(embedder.projection) if embedder else Projection.new(known.width)
        return ControlWeights.begin(model, control, settings.seed), projection


def token_width(clip: Any) -> int:
    """Numbers of a token's embedding in CLIP ViT-L; 0 where there is none, which `encoders` refuses by name."""
    part = getattr(clip.cond_stage_model, "clip_l", None)
    return part.transformer.get_input_embeddings().weight.shape[1] if part is not None else 0


def patched_for_training(model: Any, others: list[Any], settings: TrainSettings) -> tuple[Any, training.ReadTokens]:
    """A clone of the MODEL through which gradients reach control and prompt, and its reader of prompts.

    others: patchers that are loaded beside it.
    """
    from comfy.patcher_extension import WrappersMP

    patched, _ = gradient.prepare(model, host.AttentionLayer("input", 0, 0, 0), False)
    reader = training.ReadTokens()
    patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, NAME, reader)
    patched.set_model_input_block_patch_after_skip(cloned)
    patched.set_additional_models(NAME, others)
    if settings.checkpointing:
        checkpointing.install(patched)
    return patched, reader


def require_same_tensors(learning: Learning, state: dict[str, Tensor] | None) -> None:
    """Raise ValueError for the state of a training of another model."""
    if state is None:
        return
    wanted = {f"factor.control.{name}": t.shape for name, t in learning[0].named().items()}
    wanted |= {f"factor.embeddings.{name}": t.shape for name, t in learning[1].named().items()}
    if {name: t.shape for name, t in state.items() if name.startswith("factor.")} != wanted:
        raise ValueError(
            "the training to go on with was of another model, or began from other embeddings: connect what it began "
            "with, or choose (new)."
        )


def train(
    model: Any,
    clip: Any,
    vae: Any,
    found: list[Example],
    learning: Learning,
    *,
    settings: TrainSettings,
    reader: Reader,
    watch: training.Watch,
    state: dict[str, Tensor] | None = None,
) -> History:
    """Train a control and a projection on examples; they hold the result. Model, CLIP and VAE stay as they were.

    watch.save is given what was Learned on the way, at the end, and where the training is cancelled or fails after its
    first step. Raises ValueError for other models, and for one that returns NaN.
    """
    loss = training.loss_of(model, TECHNIQUE)
    sampling = model.get_model_object("model_sampling")
    model = host.single_device(model)
    require_same_tensors(learning, state)
    if settings.reading_weight and not hasattr(vae, "first_stage_model"):
        raise ValueError(
            f"reading_weight is {settings.reading_weight:g} and the connected VAE has no decoder of the host's own, "
            "through which a gradient could go: connect the checkpoint's VAE, or set reading_weight to 0."
        )
    with torch.inference_mode(False):
        text = clip.clone()
        reading = None
        if settings.reading_weight:
            reading = ReadDrawn(vae, reader, model.model.process_latent_out)
        others = [text.patcher, *([vae.patcher] if reading else [])]
        patched, tokens = patched_for_training(model, others, settings)
        if settings.checkpointing:
            learning[0].keep_inputs_alone()
        control = LearningControl(learning[0].network)
        fitting = FitTextControl(
            found,
            learning,
            settings,
            control=control,
            prompts=Prompts(text, None),
            reader=tokens,
            loss=loss,
            sigmas=sampling.sigmas.detach().float().cpu().clone(),
            reading=reading,
            watch=watch,
            state=state,
        )
        largest = max((example.latent for example in found), key=lambda latent: latent.numel())
        start = model.model.process_latent_out(largest.repeat(settings.batch_size, 1, 1, 1))
        placeholder, pooled = training.placeholder(model)
        more = {"pooled_output": pooled, "control": control, "control_apply_to_uncond": False}
        levels = torch.tensor([float(sampling.sigma_max), 0.0])
        with (
            training.kept_if_it_ends_early(fitting.rescue),
            cloned_norm_inputs(text.cond_stage_model),
            training.told_of_memory(TECHNIQUE, LESS_MEMORY),
        ):
            host.sample(patched, fitting, start, sigmas=levels, positive=[[placeholder, more]])
    watch.save(fitting.learned(final=True))
    return fitting.history
