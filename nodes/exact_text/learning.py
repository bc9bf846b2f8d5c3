"""Exact text for trainings: lines of pictures that somebody wrote down, and prompts whose embeddings are learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from . import drawing, places
from .building import texts_of
from .fonts import Font, require_drawable
from .lines import TextLine, TextLines
from .prompting import ENCODER, QUOTES, STAR, places_of, star_id, tidy, with_embeddings

JOINED = ", that reads "  # one of the phrases by which AnyText's authors add lines that a caption does not name


def filled_polygon(polygon: Tensor, size: tuple[int, int]) -> Tensor:
    """The pixels (H, W) inside of a polygon (n, 2), x and y, as bool."""
    image = Image.new("1", size[::-1])
    ImageDraw.Draw(image).polygon([tuple(point) for point in polygon.tolist()], fill=1, outline=1)
    return torch.from_numpy(np.array(image))


def lines_at(texts: Sequence[str], polygons: Sequence[Tensor], size: tuple[int, int], font: str) -> TextLines:
    """Lines in polygons (n, 2) of a picture of (H, W), as Text Lines draws them. Raises ValueError as it does.

    Without lines all is black.
    """
    face = Font.of(font)
    texts = [text for line in texts for text in texts_of(line)]
    for text in texts:
        require_drawable(face, text)
    found = [places.placed(filled_polygon(polygon, size)) for polygon in polygons]
    laid = [places.rectangle(place, places.BY_PLACE) for place in found]
    glyphs, _ = drawing.glyphs(
        [(text, place, down) for text, (place, down) in zip(texts, laid, strict=True)], size, drawing.Style(face)
    )
    lines = [TextLine(t, place.polygon, down) for t, place, (_, down) in zip(texts, found, laid, strict=True)]
    positions = torch.stack([torch.zeros(size), *(place.filled for place in found)]).amax(0)[None]
    strips = torch.stack([torch.zeros(drawing.STRIP), *(drawing.strip(text, face) for text in texts)])[1:]
    return TextLines(tuple(lines), glyphs, positions, strips, size)


def spoken(caption: str, lines: Sequence[str]) -> tuple[str, list[int]]:
    """A caption with ` * ` for each line, and which line each is.

    Lines in double quotes stand where they are; those that the caption does not quote follow it. Other quotes and stars
    are read as words.
    """
    pieces = [piece.replace(STAR, " ") for piece in QUOTES.split(caption)]
    left, order, said = Counter(lines), [], []
    for index, piece in enumerate(pieces):
        if index % 2 and index + 1 < len(pieces) and left[tidy(piece)] > 0:
            left[tidy(piece)] -= 1
            order.append(number_of(tidy(piece), lines, order))
            piece = f" {STAR} "
        said.append(piece)
    rest = [number for number in range(len(lines)) if number not in order]
    text = "".join(said).strip().rstrip(".,;")
    return text + (JOINED + " , ".join([STAR] * len(rest)) if rest else ""), order + rest


def number_of(text: str, lines: Sequence[str], taken: Sequence[int]) -> int:
    """The first line of that text which is not taken yet."""
    return next(number for number, line in enumerate(lines) if line == text and number not in taken)


def tokens_with(clip: Any, prompt: str, embeddings: Tensor) -> dict[str, list]:
    """The tokens of a prompt of `spoken`, its placeholders being embeddings (L, D), which keep their gradient."""
    tokens = clip.tokenize(prompt)
    where = list(places_of(tokens[ENCODER], star_id(clip)))
    if len(where) != len(embeddings):
        raise ValueError(
            f"the text encoder reads {len(where)} {STAR} in {prompt[:60]!r}, which has {len(embeddings)} lines of text."
        )
    return {**tokens, ENCODER: with_embeddings(tokens[ENCODER], where, embeddings)}
