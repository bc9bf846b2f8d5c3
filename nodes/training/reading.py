"""How a model of the host is asked in a training: by what loss, and with prompts that have a gradient."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels.denoising_loss import noise_loss, velocity_loss
from .. import host


def loss_of(model: Any, technique: str) -> Callable[..., Tensor]:
    """The loss that a MODEL was trained with. Raises ValueError for other models than diffusion in eps or v."""
    import comfy.model_sampling as kinds

    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, kinds.EPS) or not hasattr(sampling, "sigmas"):
        raise ValueError(
            f"{technique} trains with eps- and v-prediction models, the connected one is sampled by "
            f"{type(sampling).__name__}: load an SD 1.x, SD 2.x or SDXL checkpoint."
        )
    return velocity_loss if isinstance(sampling, kinds.V_PREDICTION) else noise_loss


@dataclass
class ReadTokens:
    """CALC_COND_BATCH wrapper: the model reads `context` (B, L, C) and `pooled` (B, P), with a gradient.

    The host itself makes of them what its model takes. token_mask (B, L): False at tokens that only fill up a row.
    more: whatever else of a CONDITIONING the model is to read, by the host's key, such as a picture beside the latent.
    """

    context: Tensor | None = None
    pooled: Tensor | None = None
    token_mask: Tensor | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def __call__(self, executor: Any, model: Any, conds: list, x: Tensor, *args: Any) -> list[Tensor]:
        entry = conds[0][0]
        made = model.extra_conds(
            cross_attn=self.context,
            pooled_output=self.pooled,
            noise=x,
            device=x.device,
            prompt_type="positive",
            width=x.shape[3] * 8,
            height=x.shape[2] * 8,
            **self.more,
        )
        cond = entry | {"model_conds": entry["model_conds"] | made, "uuid": uuid.uuid4()}
        return executor(model, [[cond], *conds[1:]], x, *args)


def embedding_weights(model: Any) -> list[str]:
    """The U-Net's weights that a gradient into the pooled output touches, and that none into the tokens does."""
    names = [name for name, _ in model.model.diffusion_model.named_parameters()]
    return [name for name in names if name.startswith(("label_emb.", "time_embed."))]


def placeholder(model: Any) -> tuple[Tensor, Tensor]:
    """A prompt of the model's width, in the place of those that each step reads."""
    return torch.zeros(1, 77, host.text_width(model)), torch.zeros(1, 1280)


def own_resolution(model: Any) -> int:
    """The side in pixels of what a MODEL's family was trained at."""
    return 1024 if host.reads_pooled(model) else 512


def family_of(model: Any) -> str:
    """The name of a MODEL's family in kohya's metadata."""
    if host.reads_pooled(model):
        return "sdxl_base_v1-0"
    return "sd_v1" if host.text_width(model) == 768 else "sd_v2"


@contextmanager
def told_of_memory(technique: str, way_out: str) -> Iterator[None]:
    """Within, a GPU that runs out of memory is told in words that name the settings which need it."""
    import comfy.model_management

    try:
        yield
    except comfy.model_management.OOM_EXCEPTION as error:
        raise RuntimeError(f"{technique} needs more graphics memory than there is: {way_out}.") from error
