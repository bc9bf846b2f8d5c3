"""Pictures of a subject's class that the model draws itself, so that it does not forget them (arXiv:2208.12242)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .. import host, training
from ..training.prompts import literal
from .pictures import Example
from .settings import LoRASettings

STEPS = 20


def drawn(
    model: Any, clip: Any, caption: str, settings: LoRASettings, tell: Callable[[str], None] = lambda text: None
) -> Iterator[Example]:
    """`class_count` pictures of what the caption says, square, by DPM-Solver++ (2M); the same seed draws the same.

    They stay latents: nothing is lost to the VAE. Raises ValueError without a caption, and where the model draws NaN.
    """
    from comfy.k_diffusion.sampling import get_sigmas_karras, sample_dpmpp_2m

    count, caption = settings.class_count, caption.strip()
    if not count:
        return
    if not caption:
        raise ValueError(
            f"class_count is {count} and class_caption empty: say what the pictures of the class show, such as 'a "
            "cat', or set class_count to 0."
        )
    sampling = model.get_model_object("model_sampling")
    levels = get_sigmas_karras(STEPS, float(sampling.sigma_min), float(sampling.sigma_max))
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (literal(caption), ""))
    # The host takes the form of a LATENT from the model, and 8 pixels are one of its cells.
    shape = (1, model.get_model_object("latent_format").latent_channels, *[settings.resolution // 8] * 2)
    for number in range(count):
        tell(f"drawing picture {number + 1} of {count} of the class")
        noise = torch.randn(shape, generator=training.generator_at(settings.seed, "class", number))
        start = model.model.process_latent_out(noise * (1 + levels[0] ** 2) ** 0.5)
        prompts = {"positive": positive, "negative": negative, "guidance": settings.guidance}
        found = host.sample(model, sample_dpmpp_2m, start, sigmas=levels, **prompts, guided=True)
        latent = model.model.process_latent_in(found).float().cpu().clone()
        if not host.is_finite(latent):
            raise ValueError("the model draws NaN for class_caption: run it in another precision (--fp32-unet).")
        yield Example(latent, caption, prior=True)
