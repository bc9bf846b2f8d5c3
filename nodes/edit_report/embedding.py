"""What pictures and texts are to CLIP."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Embedder:
    """CLIP's two sides: pictures by the host's CLIP_VISION, texts by a CLIP whose projection belongs to it."""

    vision: Any
    clip: Any = None

    def pictures(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, C) and patch features (B, N, C') of an IMAGE, one picture at a time."""
        with torch.no_grad():
            found = [self.vision.encode_image(picture[None, ..., :3]) for picture in image]
        patches = torch.cat([f["penultimate_hidden_states"][:, 1:] for f in found])
        return torch.cat([f["image_embeds"] for f in found]).float(), patches.float()

    def text(self, prompt: str, width: int) -> Tensor:
        """The prompt's embedding (1, width). Raises ValueError for a text model that does not share the space."""
        with torch.no_grad():
            pooled = self.clip.encode_from_tokens(self.clip.tokenize(prompt), return_pooled=True)[1].float()
        if pooled.shape[-1] != width:
            raise ValueError(
                f"the clip's texts have {pooled.shape[-1]} numbers, the clip_vision's pictures {width}: they are not "
                "two halves of one CLIP. Load the text model that was trained with the vision model (clip_l for "
                "ViT-L, clip_g for ViT-bigG), or leave clip unconnected."
            )
        if not any(trained(weight) for weight in projections(self.clip, width)):
            raise ValueError(
                "this clip cannot compare texts with pictures: it comes without the projection that CLIP learned for "
                "that (SD 1.5 checkpoints drop it). Load clip_l.safetensors or clip_g.safetensors with Load CLIP, or "
                "leave clip unconnected."
            )
        return pooled


def projections(clip: Any, width: int) -> list[Tensor]:
    """The text projections (width, width) of a host CLIP."""
    return [
        weight
        for name, weight in clip.cond_stage_model.named_parameters()
        if name.endswith("text_projection.weight") and weight.shape == (width, width)
    ]


def trained(projection: Tensor) -> bool:
    """Whether a projection was loaded: not the identity, and neither zeros nor memory as it was found."""
    weight = projection.detach().float()
    spread = float(weight.std())
    identity = torch.eye(len(weight), device=weight.device)
    return math.isfinite(spread) and 1e-3 < spread < 1.0 and not torch.equal(weight, identity)
