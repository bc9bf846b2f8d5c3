"""How a model of the host is asked in a training: by what loss, and with prompts that have a gradient."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...kernels.denoising_loss import noise_loss, velocity_loss


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
    """

    context: Tensor | None = None
    pooled: Tensor | None = None
    token_mask: Tensor | None = None

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
        )
        cond = entry | {"model_conds": entry["model_conds"] | made, "uuid": uuid.uuid4()}
        return executor(model, [[cond], *conds[1:]], x, *args)


def embedding_weights(model: Any) -> list[str]:
    """The U-Net's weights that a gradient into the pooled output touches, and that none into the tokens does."""
    names = [name for name, _ in model.model.diffusion_model.named_parameters()]
    return [name for name in names if name.startswith(("label_emb.", "time_embed."))]
