"""Lines of text and where they stand, and what a network knows of their look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels import exact_text
from ...kernels.text_recognition import CHANNELS, WIDTH, prepared

NECK = WIDTH // 8 * CHANNELS  # numbers of a line's neck, 2560
STRIP = (80, 512)  # height and width of a line drawn for the recogniser, AnyText's


@dataclass(frozen=True, eq=False)
class TextLine:
    """One line of text. polygon (n, 2): its corners in pixels of the picture, x and y; vertical: written downwards."""

    text: str
    polygon: Tensor
    vertical: bool = False


@dataclass(frozen=True, eq=False)
class TextLines:
    """Lines of text of one picture of size (H, W). Pictures are float32 of 0..1, white on black.

    glyphs (1, 2H, 2W): all lines drawn where they stand, at twice the picture; positions (1, H, W): their polygons,
    filled; strips (L, 80, 512): each line by itself, upright, as the recogniser reads it.
    """

    lines: tuple[TextLine, ...]
    glyphs: Tensor
    positions: Tensor
    strips: Tensor
    size: tuple[int, int]

    def require_sound(self) -> None:
        """Raise ValueError where its parts do not belong together."""
        height, width = self.size
        wanted = {
            "glyphs": (1, 2 * height, 2 * width),
            "positions": (1, height, width),
            "strips": (len(self.lines), *STRIP),
        }
        for name, shape in wanted.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(
                    f"text_lines has {name} of the shape {tuple(getattr(self, name).shape)}, {shape} is wanted for "
                    f"{len(self.lines)} lines in {width} x {height} pixels: make it again with Text Lines."
                )
        for number, line in enumerate(self.lines, 1):
            if line.polygon.ndim != 2 or len(line.polygon) < 3 or not torch.isfinite(line.polygon).all():
                raise ValueError(f"text_lines has a line {number} whose place is no polygon: make it again.")
        if not self.lines:
            raise ValueError("text_lines holds no line: make it again with Text Lines.")


@dataclass(frozen=True, eq=False)
class TextEmbedder:
    """Makes a token's embedding of a line's look: LayerNorm(Linear(recogniser's neck)).

    projection: "weight" (768, 2560), "bias" (768,), and where it has a LayerNorm "norm_weight" (768,), "norm_bias".
    """

    recogniser: Any
    projection: Mapping[str, Tensor]

    def require_sound(self) -> None:
        """Raise ValueError where its projection is not of one piece, or holds NaN."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.projection.items()}
        width = shapes.get("weight", (0,))[0]
        wanted = {"weight": (width, NECK)} | dict.fromkeys(("bias", "norm_weight", "norm_bias"), (width,))
        if shapes != wanted or not all(torch.isfinite(tensor).all() for tensor in self.projection.values()):
            raise ValueError(
                f"text_embedder has a projection of {shapes}, {wanted} with finite numbers is wanted: load it again."
            )

    @property
    def width(self) -> int:
        """Numbers of an embedding: 768 for CLIP ViT-L."""
        return self.projection["weight"].shape[0]

    def embed(self, strips: Tensor) -> Tensor:
        """Embeddings (L, 768) of lines drawn by themselves (L, 80, 512), 0..1, white on black."""
        where = next(self.recogniser.parameters())
        pictures = torch.stack([prepared(strip[None]) for strip in strips]).to(where)
        with torch.no_grad():
            neck = self.recogniser.features(pictures)
            return exact_text.token_embedding(neck, **{k: v.to(neck) for k, v in self.projection.items()})
