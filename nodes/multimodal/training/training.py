"""Training a multimodal connector, and LoRAs beside it, through the host's U-Net: MUMU, arXiv:2406.18790, section 5.

What each step is shown is in lessons, who prepares it in encoding, what learns from it in learner, how the U-Net takes
part in gradient, and the steps themselves in fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import host
from ...training import Watch
from ..dataset import Dataset
from ..encoder import MultimodalEncoder, join
from ..vlm import with_lora
from .course import ALIGN
from .drawing import sample_sheet
from .fit import Fit, History
from .gradient import TECHNIQUE
from .learner import Process, Snapshot
from .settings import CLIP_TEXT, TrainSettings


@dataclass(frozen=True, eq=False)
class Trained:
    """A snapshot at the end of a training, the encoder with it, how it went, and what it draws."""

    snapshot: Snapshot
    encoder: MultimodalEncoder
    history: History
    samples: Tensor


def train(
    model: Any,
    vae: Any,
    encoder: MultimodalEncoder,
    dataset: Dataset,
    settings: TrainSettings,
    *,
    clip: Any = None,
    state: dict[str, Tensor] | None = None,
    process: Process | None = None,
    watch: Watch | None = None,
) -> Trained:
    """Train the connector of an encoder, and LoRAs by choice, on a dataset of interleaved prompts.

    The loss and its gradient run through the host's guider and U-Net, so that LoRA and patches of other nodes act. The
    model, the vision-language model and the encoder's connector are left as they were. state: of a Snapshot, to go on
    from. watch.save is given what was learned every save_every steps, at the end, and when the training is cancelled or
    fails. Raises ValueError for unusable inputs and for a model that returns NaN.
    """
    host.require_unet(model, TECHNIQUE)
    host.require_text_to_image(model, TECHNIQUE, "connect the text-to-image checkpoint of its family")
    if settings.pooled_output == CLIP_TEXT and clip is None:
        raise ValueError("pooled_output 'CLIP text' needs a text encoder: connect clip, or choose 'zeros'.")
    if settings.course.before_drawing and clip is None:
        raise ValueError(
            f"align_steps is {settings.align_steps} and read_steps {settings.read_steps}: these lessons are taught by "
            "the text encoder that the model was trained with: connect clip, or set both to 0."
        )
    watch = watch or Watch()
    with torch.inference_mode(False):
        parts = {"clip": clip, "state": state, "process": process or Process(), "watch": watch}
        fit, snapshot = Fit(model, vae, encoder, dataset, settings, **parts), None
        watch.begin(fit.learner.sizes())
        try:
            fit.run()
        finally:
            fit.read_losses()
            if fit.ready and fit.history.finite:
                snapshot = fit.snapshot()
                watch.save(snapshot)
        fit.require_finite()
        return result(fit, snapshot, model, vae)


def result(fit: Fit, snapshot: Snapshot, model: Any, vae: Any) -> Trained:
    """What has been learned, as sockets carry it."""
    vlm = fit.vlm
    if snapshot.language_lora:
        vlm = with_lora(vlm, snapshot.language_lora, 1.0, "the trained LoRA")
    latents = [model.model.process_latent_out(latent) for latent in fit.samples]
    samples = sample_sheet(vae, fit.lessons.dataset, fit.shown, latents)
    return Trained(snapshot, join(vlm, snapshot.connector), fit.history, samples)


def fallen(history: History) -> str:
    """From where to where the loss of each lesson went."""
    lessons = history.by_lesson() if history.course.before_drawing else {"": history}
    told = []
    for name, part in lessons.items():
        what = f"{name} {len(part.losses)}: " if name else ""
        error = "error of the tokens" if name == ALIGN else "loss"
        told.append(f"{what}{error} {part.early():.4f} at first, {part.recent():.4f} at last")
    return "; ".join(told)


def describe(trained: Trained) -> str:
    """What was trained and how it went, in one line."""
    info, history = trained.snapshot.info, trained.history
    parts = [
        f"{len(history.losses)} steps ({history.steps} in all), {fallen(history)}",
        f"stage {info['stage']}, {info['tokens']} tokens a picture, pooled output {info['pooled']}",
        f"connector {trained.snapshot.connector.parameters / 1e6:.1f} M",
    ]
    for name, lora in (("U-Net", trained.snapshot.unet_lora), ("language", trained.snapshot.language_lora)):
        if lora:
            parts.append(f"{name} LoRA rank {info['rank']}, {sum(t.numel() for t in lora.values()) / 1e6:.2f} M")
    return "; ".join([*parts, *([history.stopped] if history.stopped else [])])
