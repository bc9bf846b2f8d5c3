"""Training a context adapter: ContextDiff's loss (arXiv:2402.16627, eq. 6) through the host's U-Net."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from .. import host
from ..host import checkpointing, gradient
from ..training import (
    Factors,
    Watch,
    act_in_unet,
    kept_if_it_ends_early,
    linear_layers,
    one_prompt_per_picture,
)
from . import condition
from .adapter import ContextAdapter
from .config import RELEASED, TEXT, AdapterConfig, kind_of
from .fit import ALL_ATTENTION, FROZEN, JOINT, QUERIES, FitAdapter, Trained, TrainSettings
from .objective import PickRows
from .sight import Sight, training_sight
from .validation import verdict

TECHNIQUE = "Train Context Adapter"
NAME = "palimpsest_context_training"
# By the host's class: the rotary positions of others have a gradient within the host's own training nodes alone.
TRANSFORMERS = {"SD3": "SD 3 and 3.5"}
LAYERS = {  # of a U-Net; the authors train the queries
    QUERIES: re.compile(r"\.to_q$"),
    ALL_ATTENTION: re.compile(r"\.to_(q|k|v|out\.0)$"),
}


def starting_network(
    model: Any, text_width: int, adapter: ContextAdapter | None, settings: TrainSettings, **seen: Any
) -> nn.Module:
    """The network to train: a copy of an adapter's, or a new one. Raises ValueError for an adapter of another kind.

    seen: fields of its config that follow from what it sees, writes and is told.
    """
    if adapter is None:
        chosen = {"video": settings.video, "kind": settings.adapter, **seen}
        config = AdapterConfig.for_model(model, text_width, settings.size, **chosen)
        return ContextAdapter.new(config, settings.seed).trainable()
    adapter.refuse_mismatch(model.model)
    refuse_other(adapter.config, text_width, settings, seen)
    return adapter.trainable()


def refuse_other(config: AdapterConfig, text_width: int, settings: TrainSettings, seen: dict[str, Any]) -> None:
    """Raise ValueError where a connected adapter is of another kind than what is to be trained."""
    reads = seen.get("reads", TEXT)
    if config.reads != reads:
        raise ValueError(
            f"the connected context adapter reads a {config.reads} and positive brings a {reads}: give it the same, or "
            "leave context_adapter unconnected to begin a new one."
        )
    if config.reads_text:
        config.refuse_text(text_width)
    else:
        config.refuse_condition(reads, seen["labels"])
    if config.video != settings.video:
        have, want = ("a video", "off") if config.video else ("an image", "on")
        raise ValueError(
            f"the connected context adapter is {have} adapter and video is {want}: switch video, or leave "
            "context_adapter unconnected to begin a new one."
        )
    if config.kind != settings.adapter:
        raise ValueError(
            f"the connected context adapter is of kind {config.kind!r} and adapter is {settings.adapter!r}: choose its "
            "kind, or leave context_adapter unconnected to begin a new one."
        )
    if "vision_width" in seen:
        config.refuse_vision(seen["vision_width"])


def told_and_seen(context: Tensor | None, sight: Sight | None, latent: Tensor, settings: TrainSettings) -> dict:
    """The fields of an AdapterConfig that follow from what an adapter is told, sees and writes."""
    told = {} if context is None else {"reads": kind_of(context), "labels": context.shape[1]}
    return told | sizes_seen(sight, latent, settings)


def sizes_seen(sight: Sight | None, latent: Tensor, settings: TrainSettings) -> dict[str, int]:
    """The fields of an AdapterConfig that follow from what an adapter sees, or writes."""
    if sight is not None:
        found = sight.tokens(sight.decoded(latent[:1])) if sight.source is None else sight.source
        return {"vision_width": found.shape[-1]}
    return {"rows": latent.shape[-2], "columns": latent.shape[-1]} if settings.adapter == RELEASED else {}


def require_trainable(model: Any, settings: TrainSettings, positive: list) -> None:
    """Raise ValueError for transformers that no gradient of ours goes through, and for what they do not have."""
    kind = type(model.model).__name__
    if kind not in TRANSFORMERS:
        raise ValueError(
            f"{TECHNIQUE} works with U-Net models (SD 1.x, SD 2.x, SDXL and their fine-tunes) and with "
            f"{', '.join(TRANSFORMERS.values())}; the connected model is {kind}, whose rotary positions the host "
            "gives a gradient in its own training nodes only: load a checkpoint of one of those families."
        )
    refusals = {
        "train_unet": ("adds its LoRA to the layers of a U-Net", settings.train_unet != FROZEN),
        "checkpointing": ("runs the blocks of a U-Net again", settings.checkpointing),
    }
    for name, (why, asked) in refusals.items():
        if asked:
            raise ValueError(f"{name} {why}, the connected model is {TRANSFORMERS[kind]}: set it to its default.")
    if len({text.shape[1] for text, _ in positive}) > 1 or (len(positive) > 1 and "attention_mask" in positive[0][1]):
        raise ValueError(
            f"prompts of other lengths cannot share a step of {TRANSFORMERS[kind]}, which would read the repeated "
            "ones as longer texts: give one prompt for all pictures, or prompts of one length."
        )


def check(model: Any, latent: Tensor, positive: list, settings: TrainSettings) -> None:
    """Raise ValueError for models, latents and prompts that cannot be trained on."""
    if not host.is_unet(model):
        require_trainable(model, settings, positive)
    host.kind_of_path(model, TECHNIQUE)
    if latent.ndim != 4:
        raise ValueError(
            f"the latent has {latent.ndim} dimensions: give pictures (batch, channels, height, width), a clip as a "
            "batch of frames."
        )
    if not torch.isfinite(latent).all():
        raise ValueError("the latent holds NaN: look at the VAE's precision (start ComfyUI with --fp32-vae).")


def unet_factors(model: Any, settings: TrainSettings) -> Factors | None:
    """What is trained of the U-Net, if anything: the paper's joint training of theta, as a LoRA."""
    if settings.train_unet != JOINT:
        return None
    return Factors(
        linear_layers(model.model.diffusion_model, LAYERS[settings.trained_with]), settings.lora_rank, settings.seed
    )


def patched_for_training(model: Any, pick: PickRows, lora: Factors | None, settings: TrainSettings) -> Any:
    """A clone of the model that lets a gradient through all of the U-Net."""
    from comfy.patcher_extension import WrappersMP

    patched, _ = gradient.prepare(model, host.AttentionLayer("input", 0, 0, 0), False)
    patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, NAME, pick)
    if lora is not None:
        act_in_unet(patched, lora)
    if settings.checkpointing:
        checkpointing.install(patched)
    return patched


def train(
    model: Any,
    latent: Tensor,
    positive: list,
    settings: TrainSettings,
    adapter: ContextAdapter | None = None,
    watch: Watch | None = None,
    **encoders: Any,
) -> Trained:
    """Train a context adapter on the pictures of a LATENT (N, C, H, W), with the prompts that describe them.

    The loss and its gradient run through the host's guider and U-Net, so that LoRA and patches of other nodes act. The
    model and `adapter` are left as they were. watch.save is given what was learned so far if the training is cancelled
    or fails. encoders: clip_vision and vae, for kinds that see through CLIP. Raises ValueError for unusable inputs and
    a model that returns NaN.
    """
    check(model, latent, positive, settings)
    model, watch = host.single_device(model), watch or Watch()
    with torch.inference_mode(False):
        context = condition.joined(positive, len(latent))
        positive = one_prompt_per_picture(positive, len(latent))
        if context is not None:
            positive = condition.attached(positive, context.clone())
        sight = training_sight(settings.adapter, latent=latent, **{"clip_vision": None, "vae": None} | encoders)
        seen = told_and_seen(context, sight, latent, settings)
        network = starting_network(model, positive[0][0].shape[-1], adapter, settings, **seen)
        latents = model.model.process_latent_in(latent.clone()).to("cpu", torch.float32)
        pick, lora = PickRows(len(latent)), unet_factors(model, settings)
        fitting = FitAdapter(network, latents, pick, lora, settings, watch, sight=sight)
        fitting.history.before = adapter.info.get("steps", 0) if adapter else 0

        def rescue() -> None:
            if fitting.history.kept > 1:
                fitting.restore()
                watch.save(fitting.result())

        start = latent[[row % len(latent) for row in range(settings.batch_size)]]  # the host makes room for as many
        levels = torch.tensor([float(model.get_model_object("model_sampling").sigma_max), 0.0])
        patched = patched_for_training(model, pick, lora, settings)
        learned = {"adapter": list(network.parameters())} | ({"lora": lora.parameters()} if lora else {})
        watch.begin({part: 4 * sum(t.numel() for t in found) for part, found in learned.items()})
        with kept_if_it_ends_early(rescue):
            host.sample(patched, fitting, start, sigmas=levels, positive=positive)
    return fitting.result()


def describe(trained: Trained, settings: TrainSettings) -> str:
    """What was learned and whether it helps, in one line."""
    history, last = trained.history, trained.history.validations[-1]
    judged = verdict(settings.formula, settings.train_on, settings.train_unet == FROZEN, last)
    parts = [f"{history.kept} steps, loss {history.recent():.4f}", str(last), judged, history.stopped]
    return "; ".join(filter(None, parts))
