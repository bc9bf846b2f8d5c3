"""What Apply Text Control makes of lines, a picture and prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.text_control import GREY, blanked
from .. import host
from ..colours import rgb
from ..exact_text import TextLines
from ..settings import Settings
from .control import Hint, TextControl

CELL = host.CELL


@dataclass(frozen=True)
class ApplySettings(Settings):
    """See PalimpsestApplyTextControl for each."""

    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    batch_size: int = 1
    keep_rest: bool = False


def encoded(vae: Any, pixels: Tensor) -> Tensor:
    """The latent (B, 4, h, w) of an IMAGE. Raises ValueError for a VAE of another kind of model."""
    latent = vae.encode(pixels).float().cpu()
    if latent.ndim != 4 or latent.shape[1] != 4:
        raise ValueError(
            f"the VAE gives latents of the shape {tuple(latent.shape)}, text control writes in SD 1.x latents of 4 "
            "channels: connect the VAE of an SD 1.x checkpoint."
        )
    if not host.is_finite(latent):
        raise ValueError("the VAE returns NaN for this picture: start ComfyUI with --fp32-vae.")
    return latent


def on_cells(lines: TextLines) -> tuple[Tensor, Tensor]:
    """(glyphs (1, 1, 16h, 16w), positions (1, 1, 8h, 8w)) of the middle of the picture, which the VAE encodes."""
    part = tuple(CELL * (side // CELL) for side in lines.size)
    if 0 in part:
        raise ValueError(f"text_lines is of {lines.size[1]} x {lines.size[0]} pixels: 64 a side are the least.")
    rows, columns = host.middle(lines.size, part)
    doubled = [slice(2 * span.start, 2 * span.stop) for span in (rows, columns)]
    return lines.glyphs[None, :, doubled[0], doubled[1]], lines.positions[None, :, rows, columns]


def source_of(lines: TextLines, picture: Tensor | None) -> Tensor:
    """The IMAGE to write into: the picture, or all grey. Raises ValueError where the lines are of another size."""
    height, width = lines.size
    if picture is None:
        return torch.full((1, height, width, 3), GREY)
    if tuple(picture.shape[1:3]) != (height, width):
        raise ValueError(
            f"picture has {picture.shape[2]} x {picture.shape[1]} pixels, text_lines was made for {width} x {height}: "
            "give Text Lines this picture's size."
        )
    return rgb(picture, "picture").float()


def hint_of(vae: Any, lines: TextLines, picture: Tensor | None) -> Hint:
    """What is to be written, and the picture without its text; all grey where there is no picture."""
    glyphs, positions = on_cells(lines)
    source = source_of(lines, picture).movedim(-1, 1)
    masked = encoded(vae, blanked(source, lines.positions[None].to(source)).movedim(1, -1))
    return Hint(glyphs.float().cpu(), positions.float().cpu(), masked)


def attached(control: TextControl, *prompts: list) -> list[list]:
    """The CONDITIONINGs with a control on each of their prompts, behind what controls it already.

    All of them share one object where they had the same before, so that the host runs them together.
    """
    made: dict[int, TextControl] = {}

    def on(extra: dict) -> dict:
        before = extra.get("control")
        if id(before) not in made:
            found = control.copy()
            found.set_previous_controlnet(before)
            made[id(before)] = found
        return extra | {"control": made[id(before)], "control_apply_to_uncond": False}

    return [[[tokens, on(extra)] for tokens, extra in prompt] for prompt in prompts]


def start_of(vae: Any, lines: TextLines, picture: Tensor | None, settings: ApplySettings) -> dict:
    """The LATENT to sample: empty; or the picture, noised and drawn anew where the text stands alone."""
    _, positions = on_cells(lines)
    size = tuple(side // CELL for side in positions.shape[-2:])
    if picture is None or not settings.keep_rest:
        count = settings.batch_size if picture is None else len(picture)
        return {"samples": torch.zeros(count, 4, *size)}
    latent = encoded(vae, source_of(lines, picture))
    return {"samples": latent, "noise_mask": positions[0].expand(len(latent), -1, -1).clone()}
