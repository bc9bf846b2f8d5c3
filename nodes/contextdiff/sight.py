"""How an adapter sees pictures through CLIP's image encoder: the host's CLIP_VISION, and a VAE for predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import CLIP_KINDS, CLIP_SOURCE

PATCHED_BEFORE = "siglip2_vision_model"  # wants its pictures cut into patches by its own rules


@contextmanager
def others_stay() -> Iterator[None]:
    """Within, the host may move models out to make room; those of the run are brought back, as for its ControlNets."""
    import comfy.model_management

    loaded = comfy.model_management.loaded_models(only_currently_used=True)
    yield
    comfy.model_management.load_models_gpu(loaded)


@dataclass(frozen=True, eq=False)
class Sight:
    """The encoders that an adapter sees with. vae None: it never sees what is predicted.

    source (N, P, width): the tokens of a fixed picture, or of a picture for each row of a batch, which are then seen in
    place of what is predicted.
    """

    clip_vision: Any
    vae: Any = None
    source: Tensor | None = None

    def tokens(self, pictures: Tensor) -> Tensor:
        """CLIP's last hidden states of an IMAGE (B, H, W, 3): (B, P, width), without a gradient.

        The whole picture is seen, squeezed to a square. Its colours are not rounded to 8 bits, as the host's own
        preparation does: the shift of a path would jump with them.
        """
        import comfy.model_management

        encoder, size = self.clip_vision, self.clip_vision.image_size
        if encoder.model_type == PATCHED_BEFORE:
            raise ValueError("clip_vision is a SigLIP 2 of free sizes: connect a CLIP, SigLIP or DINO image encoder.")
        comfy.model_management.load_model_gpu(encoder.patcher)
        found = []
        with torch.no_grad():
            for picture in pictures.split(1):
                image = picture[..., :3].movedim(-1, 1).to(encoder.load_device, torch.float32)
                image = F.interpolate(image, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
                mean, std = (image.new_tensor(each)[:, None, None] for each in (encoder.image_mean, encoder.image_std))
                seen = encoder.model(pixel_values=(image - mean) / std, intermediate_output=-2)[0]
                found.append(seen.float().to(pictures.device).clone())
        return torch.cat(found)

    def decoded(self, latent: Tensor) -> Tensor:
        """The IMAGE (B, H, W, 3) of a latent (B, C, H, W) as nodes have it, without a gradient."""
        with torch.no_grad():
            return torch.cat([self.vae.decode(one) for one in latent.split(1)])

    def looking_at(self, latent: Tensor) -> Sight:
        """A sight that sees these pictures, whatever is predicted."""
        return replace(self, source=torch.cat([self.tokens(self.decoded(one)) for one in latent.split(1)]).cpu())

    def of_rows(self, rows: list[int]) -> Sight:
        """A sight for some of a batch's rows."""
        several = self.source is not None and len(self.source) > 1
        return replace(self, source=self.source[rows]) if several else self

    def seen(self, clean: Tensor, latent_out: Callable[[Tensor], Tensor]) -> Tensor:
        """Tokens (B, P, width) of what is seen beside a predicted latent (B, C, H, W) in the model's scale.

        latent_out: from the model's scale to that of nodes. Raises ValueError for another number of source pictures.
        """
        if self.source is None:
            with others_stay():
                return self.tokens(self.decoded(latent_out(clean.detach().float()))).to(clean.device)
        if len(self.source) not in (1, len(clean)):
            raise ValueError(
                f"the context adapter looks at {len(self.source)} source pictures and {len(clean)} pictures are "
                "sampled: give Load Context Adapter one source, or one for each picture."
            )
        return self.source.to(clean.device).expand(len(clean), -1, -1)


def missing(**given: Any) -> str:
    """The names of what is not connected, in words."""
    return " and ".join(name for name, thing in given.items() if thing is None)


def sight_for(kind: str, clip_vision: Any, vae: Any = None, source: Tensor | None = None) -> Sight | None:
    """What an adapter of a kind sees with; None for one that does not see through CLIP.

    source: an IMAGE. Raises ValueError for what is missing.
    """
    if kind not in CLIP_KINDS:
        return None
    fixed = kind == CLIP_SOURCE
    beside = {"source": source} if fixed else {"vae": vae}
    if absent := missing(clip_vision=clip_vision, **beside):
        raise ValueError(
            f"the adapter's kind is {kind!r}: it sees pictures through CLIP's image encoder. Connect {absent}."
        )
    sight = Sight(clip_vision, vae)
    return replace(sight, source=sight.tokens(source).cpu()) if fixed else sight


def training_sight(kind: str, clip_vision: Any, vae: Any, latent: Tensor) -> Sight | None:
    """What an adapter of a kind is trained with on the pictures of a LATENT (N, C, H, W), which are its sources.

    Raises ValueError for what is missing.
    """
    if kind not in CLIP_KINDS:
        return None
    if absent := missing(clip_vision=clip_vision, vae=vae):
        raise ValueError(
            f"adapter {kind!r} sees pictures through CLIP's image encoder: connect {absent}, or choose adapter latent."
        )
    sight = Sight(clip_vision, vae)
    return sight.looking_at(latent) if kind == CLIP_SOURCE else sight
