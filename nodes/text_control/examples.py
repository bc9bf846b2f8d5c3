"""What a text control learns from: pictures with their text, encoded and drawn once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.text_control import GREY, blanked, packed
from ...kernels.text_recognition import Recogniser, prepared
from .. import exact_text, host
from ..exact_text import TextLine, TextLines
from ..training.pictures import bucket_of
from .applying import encoded
from .dataset import Record, Texts
from .settings import TrainSettings

MOST_LINES = 5  # AnyText's in training; what goes beyond is left out of the loss
SMALLEST = 8  # pixels of a line's sides, a cell of the latent


@dataclass(frozen=True, eq=False)
class Example:
    """One picture. latent (1, 4, h, w) and masked, without its text, in the model's scale; grey: a grey one's.

    maps (1, 320, h, w): glyphs and positions, packed, as bool. necks (L, 40, 64): what the recogniser knows of its
    lines drawn. prompt with a placeholder for each line, order: which it is. where (1, 1, h, w): the loss's weight, or
    None. lines: their places; wanted (L, 40, 64): what the recogniser knows of them in the picture, where that counts.
    """

    latent: Tensor
    masked: Tensor
    grey: Tensor
    maps: Tensor
    necks: Tensor
    prompt: str
    order: list[int]
    where: Tensor | None
    lines: tuple[TextLine, ...]
    wanted: Tensor | None = None
    prior: bool = False

    @property
    def bucket(self) -> tuple[int, ...]:
        """Pictures of one bucket can share a batch."""
        return tuple(self.latent.shape[2:])

    def hint(self, blank: bool) -> Tensor:
        """(1, 324, h, w); blank: from a grey picture, as where a new one is drawn."""
        return torch.cat([self.maps.float(), self.grey if blank else self.masked], 1)


@dataclass(frozen=True, eq=False)
class Reader:
    """What the recogniser knows of lines, drawn by themselves or in a picture."""

    recogniser: Recogniser

    def necks(self, pieces: list[Tensor]) -> Tensor:
        """(L, 40, 64) of pictures (1 or 3, h, w) of one line each."""
        if not pieces:
            return torch.zeros(0, 40, 64)
        where = next(self.recogniser.parameters()).device
        return self.recogniser.features(torch.stack([prepared(piece) for piece in pieces]).to(where)).float()

    def in_picture(self, picture: Tensor, lines: tuple[TextLine, ...]) -> Tensor:
        """(L, 40, 64) of the lines' places in a picture (H, W, 3)."""
        return self.necks([exact_text.crop(picture, line, 0) for line in lines])


def chosen(record: Record, factors: Tensor, size: tuple[int, int]) -> tuple[list[tuple[str, Tensor]], list[Tensor]]:
    """(lines that are learned, places that are left out of the loss) of a picture scaled by (x, y) to (H, W)."""
    learned, left = [], []
    limits = torch.tensor([size[1], size[0]], dtype=torch.float32)
    for line in record.lines:
        polygon = (line.polygon * factors).clamp(min=0).minimum(limits)
        sides = polygon.amax(0) - polygon.amin(0)
        if not line.read or float(sides.min()) < SMALLEST or len(learned) == MOST_LINES:
            left.append(polygon)
        else:
            learned.append((line.text, polygon))
    return learned, left


def weight_of(left: list[Tensor], size: tuple[int, int]) -> Tensor | None:
    """The weight of each cell in the loss, 0 where text stands that is not learned; None where there is none."""
    if not left:
        return None
    covered = torch.stack([exact_text.filled(polygon, size) for polygon in left]).any(0).float()
    found = 1 - F.max_pool2d(covered[None, None], host.CELL)
    return found if found.any() else torch.ones_like(found)


def examples(
    model: Any, vae: Any, texts: Texts, reader: Reader, settings: TrainSettings, tell: Callable[[str], None]
) -> Iterator[Example]:
    """Each picture of a folder, scaled to its bucket. Raises ValueError that names the picture."""
    greys: dict[tuple[int, int], Tensor] = {}

    def latent_of(pixels: Tensor) -> Tensor:
        return model.model.process_latent_in(encoded(vae, pixels)).clone()

    for number, record in enumerate(texts.records):
        host.stop_if_cancelled()
        tell(f"picture {number + 1} of {len(texts.records)}")
        picture = texts.picture(number)
        width, height = bucket_of(picture.shape[1], picture.shape[0], settings.resolution)
        size, factors = (height, width), torch.tensor([width / picture.shape[1], height / picture.shape[0]])
        pixels = F.interpolate(picture.movedim(-1, 0)[None], size=size, mode="bilinear", antialias=True).clamp(0, 1)
        learned, left = chosen(record, factors, size)
        try:
            lines = exact_text.lines_at([t for t, _ in learned], [p for _, p in learned], size, settings.font)
        except ValueError as error:
            raise ValueError(f"{record.picture} of {texts.folder.name}: {error}") from error
        if size not in greys:
            greys[size] = latent_of(torch.full((1, *size, 3), GREY))
        latent = latent_of(pixels.movedim(1, -1))
        masked = latent_of(blanked(pixels, lines.positions[None]).movedim(1, -1))
        prompt, order = exact_text.spoken(record.caption, [line.text for line in lines.lines])
        wanted = reader.in_picture(pixels[0].movedim(0, -1), lines.lines) if settings.reading_weight else None
        yield Example(
            latent=latent,
            masked=masked,
            grey=greys[size],
            maps=maps_of(lines),
            necks=reader.necks([strip[None] for strip in lines.strips]),
            prompt=prompt,
            order=order,
            where=weight_of(left, size),
            lines=lines.lines,
            wanted=wanted,
        )


def maps_of(lines: TextLines) -> Tensor:
    """Glyphs and positions, packed, as bool (1, 320, h, w)."""
    height, width = (side // host.CELL for side in lines.size)
    return packed(lines.glyphs[None], lines.positions[None], torch.zeros(1, 4, height, width))[:, :-4] > 0.5
