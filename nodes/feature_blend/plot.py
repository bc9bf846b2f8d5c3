"""Learned blending weights and their loss as a picture."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .weights import BlendWeights

WIDTH, ROW, MARGIN, LABEL, CURVE = 640, 22, 16, 90, 200
INK, SOFT, BAR, LINE = (30, 30, 30), (205, 205, 205), (66, 120, 190), (200, 80, 50)


def draw(weights: BlendWeights) -> Tensor:
    """IMAGE (1, H, W, 3) in 0..1: a bar for every feature's alpha, and below the loss over the steps."""
    font = ImageFont.load_default(13)
    bars = len(weights.alphas) * ROW
    sheet = Image.new("RGB", (WIDTH, bars + CURVE + 6 * MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    left, right = MARGIN + LABEL, WIDTH - MARGIN - 40
    pen.text((MARGIN, MARGIN // 2), "alpha: 0 the original, 1 the edit", fill=INK, font=font)
    top = 2 * MARGIN
    for share in (0.0, 0.5, 1.0):
        x = left + share * (right - left)
        pen.line([(x, top), (x, top + bars)], fill=SOFT)
    for i, (name, alpha) in enumerate(weights.alphas.items()):
        y = top + i * ROW
        pen.text((MARGIN, y + 3), name, fill=INK, font=font)
        pen.rectangle([left, y + 4, left + max(1, alpha * (right - left)), y + ROW - 5], fill=BAR)
        pen.text((right + 6, y + 3), f"{alpha:.2f}", fill=INK, font=font)
    curve(pen, font, weights.info.get("losses", []), (left, top + bars + 2 * MARGIN, right, sheet.height - 2 * MARGIN))
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255)[None]


def curve(pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont, losses: list[float], box: tuple) -> None:
    """The loss, and its mean over a tenth of the steps, in a box (left, top, right, bottom)."""
    left, top, right, bottom = box
    pen.rectangle(box, outline=SOFT)
    pen.text((MARGIN, top), "loss", fill=INK, font=font)
    if len(losses) < 2:
        return
    values = np.asarray(losses)
    low, high = min(0.0, float(values.min())), float(values.max()) or 1.0
    width = max(1, len(values) // 10)
    smooth = np.convolve(np.pad(values, (width // 2, width - 1 - width // 2), "edge"), np.ones(width) / width, "valid")
    for series, colour in ((values, SOFT), (smooth, LINE)):
        xs = left + np.arange(len(series)) / (len(series) - 1) * (right - left)
        ys = bottom - (series - low) / (high - low or 1.0) * (bottom - top)
        pen.line(list(zip(xs.tolist(), ys.tolist(), strict=True)), fill=colour, width=2)
    pen.text((right + 4, top), f"{high:.2f}", fill=INK, font=font)
    pen.text((right + 4, bottom - 14), f"{low:.2f}", fill=INK, font=font)
    pen.text((left, bottom + 4), f"{len(losses)} steps", fill=INK, font=font)
