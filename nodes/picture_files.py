"""Picture files that others wrote: which are opened, how many pixels are decoded, and what is said of the others."""

from __future__ import annotations

import contextlib
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import plots
from .foreign import regular_file, unreadable
from .host.cancelling import CancellableFile

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # decoded by Pillow itself; others start programs, or are no pictures
MIN_SIDE = 8  # pixels that become one of a latent's
MOST_PIXELS = 1 << 25  # 8192 x 4096, an 8K frame: a second to decode, 0.4 GB as numbers; SDXL learns from 1 << 20
MOST_FILE_BYTES = 8 * MOST_PIXELS + (1 << 20)  # uncompressed, 16 bits a channel, and what stands around it
ORIENTATION = 0x0112  # EXIF's number of it
TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def read_picture(path: Path) -> Tensor:
    """A picture file as (H, W, 3) in 0..1, upright; stopped where the run is cancelled.

    Raises ValueError for one that is missing or damaged, larger than MOST_PIXELS, of another format than FORMATS, or no
    regular file: before anything of it is decoded.
    """
    where, name = regular_file(path), f"{path.parent.name}/{path.name}"
    if where.stat().st_size > MOST_FILE_BYTES:
        raise ValueError(f"{name} of the dataset has more than {MOST_FILE_BYTES / 1e6:.0f} MB: make it smaller.")
    try:
        with CancellableFile(where) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the budget below is smaller
            with Image.open(file, formats=FORMATS) as image:
                require_pixels(*image.size, f"{name} of the dataset", least=1)
                return in_colours(upright(image))
    except WrongSize:
        raise
    except Image.DecompressionBombError as error:
        raise WrongSize(f"{name} of the dataset is too large ({error}): make it smaller.") from error
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(path, error) from error
        raise ValueError(
            f"{name} of the dataset is damaged or none of {', '.join(FORMATS)}: build the dataset again."
        ) from error


def upright(image: Image.Image) -> Image.Image:
    """A picture as it is looked at, and as the host's Load Image reads it: cameras lay it on its side and say so."""
    turn = None
    with contextlib.suppress(SyntaxError, ValueError, KeyError, TypeError, struct.error):  # nonsense says nothing
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    return image if turn is None else image.transpose(Image.Transpose[turn])


def in_colours(image: Image.Image) -> Tensor:
    """A picture that was opened as (H, W, 3) in 0..1. Grey of 16 bits, as depth maps are saved, keeps its range."""
    if image.mode.startswith("I"):  # Pillow would cut it off at 255 of 65535
        grey = torch.from_numpy(np.asarray(image, dtype=np.float32) / 65535).clamp(0, 1)
        return grey[..., None].expand(-1, -1, 3).contiguous()
    return plots.to_tensor(image.convert("RGB"))


class WrongSize(ValueError):
    """A picture of more pixels than are decoded, or of too few."""


def require_pixels(width: int, height: int, what: str, least: int = MIN_SIDE) -> None:
    """Raise ValueError for a picture that is too large for a dataset, or too small; least: pixels a side."""
    if width * height > MOST_PIXELS or min(width, height) < least:
        raise WrongSize(
            f"{what} has {width} x {height} pixels, from {least} x {least} to {MOST_PIXELS / 1e6:.1f} megapixels "
            "are taken: scale it with Scale Image to Total Pixels."
        )
