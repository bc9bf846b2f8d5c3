"""What a recogniser reads in the pictures that a training draws: AnyText's text perceptual loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels.text_control import reading_loss
from .. import exact_text
from ..host import gradient
from ..training.prompts import plain
from .examples import Example, Reader


@dataclass
class ReadDrawn:
    """The loss of what is read in drawn pictures (arXiv:2311.03054, section 3.4), through the VAE's decoder.

    vae: the host's, loaded by then; process_out: from the model's scale to the VAE's.
    """

    vae: Any
    reader: Reader
    process_out: Any
    weights: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, denoised: Tensor, sigma: Tensor, examples: list[Example]) -> Tensor:
        """x_0 hat (B, 4, h, w) at sigma (B,) -> (B,): the mean over each picture's lines; 0 without any."""
        pictures = self.decode(denoised)
        found = []
        for picture, level, example in zip(pictures, sigma, examples, strict=True):
            if not example.lines:
                found.append(denoised.new_zeros((), dtype=torch.float32))
                continue
            drawn = self.reader.in_picture(picture, example.lines)
            lost = reading_loss(drawn, example.wanted.to(drawn), level.to(drawn.device).expand(len(drawn)))
            found.append(lost.mean().to(denoised.device))
        return torch.stack(found)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, H, W, 3) in 0..1 with a gradient, on the VAE's own weights as autograd may save them."""
        network = self.vae.first_stage_model
        if not self.weights:  # made once the host has loaded them; they stay until the run ends
            self.weights.update((f"network.{name}", plain(weight)) for name, weight in network.named_parameters())
        kind = next(iter(self.weights.values()))
        arguments = (network.decode, self.process_out(latents).to(kind))
        decoded = torch.func.functional_call(gradient.CallNetwork(network), self.weights, arguments)
        return ((decoded.float() + 1) / 2).clamp(0, 1).movedim(1, -1)


def read_in(picture: Tensor, example: Example) -> tuple[int, list[exact_text.Read]]:
    """(how many of an example's lines are read exactly in a picture (H, W, 3), what is read)."""
    wanted = [line.text for line in example.lines]
    found = exact_text.read(picture, example.lines, wanted, exact_text.ReadSettings())
    return sum(bool(each.exact) for each in found), found
