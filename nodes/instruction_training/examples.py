"""Triples as a training sees them: encoded by the VAE, each once, at the size of a bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from .. import host, instruction
from ..training.pictures import bucket_of, covering
from .triples import Triple


@dataclass(frozen=True, eq=False)
class Example:
    """An encoded triple, on the CPU.

    latent (1, C, h, w): the result, in the model's scale. source (1, C, h, w): the picture as the VAE encodes it, which
    is what the host's InstructPixToPixConditioning hands on. mask (1, 1, h, w): what is to change, or None. told: the
    picture and the expressed text as a language model is given them, for an edit head.
    """

    latent: Tensor
    source: Tensor
    instruction: str
    mask: Tensor | None = None
    told: instruction.Reading | None = None
    prior: ClassVar[bool] = False

    @property
    def bucket(self) -> tuple[int, ...]:
        """Triples of one bucket can share a batch."""
        return tuple(self.latent.shape[2:])


def encoded(
    model: Any,
    vae: Any,
    triples: Iterable[Triple],
    resolution: int,
    tell: Callable[[int], None],
    express: Callable[[Triple], instruction.Reading] | None = None,
) -> list[Example]:
    """Each triple, encoded; tell is called with how many are. Raises ValueError where the VAE returns NaN.

    express: what a language model is given of a triple, where its states are wanted.
    """
    found = []
    for triple in triples:
        host.stop_if_cancelled()
        example = example_of(model, vae, triple, resolution)
        found.append(example if express is None else replace(example, told=express(triple)))
        tell(len(found))
    if not all(host.is_finite(example.latent) and host.is_finite(example.source) for example in found):
        raise ValueError(
            "the VAE returns NaN for these pictures: look at its precision (start ComfyUI with --fp32-vae)."
        )
    return found


def example_of(model: Any, vae: Any, triple: Triple, resolution: int) -> Example:
    """One triple."""
    width, height = bucket_of(triple.picture.shape[2], triple.picture.shape[1], resolution)

    def latent(picture: Tensor) -> Tensor:
        pixels = covering(picture.movedim(-1, 1).float(), width, height).movedim(1, -1)
        return vae.encode(pixels).float().cpu().clone()

    result = model.model.process_latent_in(latent(triple.result))
    mask = None
    if triple.mask is not None:
        mask = F.adaptive_avg_pool2d(covering(triple.mask[:, None].float(), width, height), result.shape[2:]).cpu()
    return Example(result, latent(triple.picture), triple.instruction, mask)
