"""Pictures of a dataset: read from its folder, written into it, and drawn without their looks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ....kernels.conditioning_pictures import sketch
from ... import plots
from ...host.cancelling import Cancellable, CancellableFile
from ...picture_files import MIN_SIDE, MOST_PIXELS, read_picture, require_pixels

__all__ = ["MIN_SIDE", "MOST_PIXELS", "WHOLES", "read_picture", "require_pixels", "write_picture"]


def write_picture(picture: Tensor, folder: Path, file: str) -> str:
    """Write a picture into the dataset's folder, unless the run is cancelled; returns `file`."""
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with CancellableFile(path, "w") as opened:
        plots.to_image(picture).save(opened, "PNG", compress_level=4)
    return file


def canny(picture: Tensor) -> Tensor:
    """The picture's edges in white on black, by the detector that the host's own Canny node uses."""
    from kornia.filters import canny as edges

    with Cancellable():
        return edges(picture.movedim(-1, 0)[None])[1][0].movedim(0, -1).expand_as(picture).contiguous()


def strokes(picture: Tensor) -> Tensor:
    """The picture in grey strokes."""
    with Cancellable():
        return sketch(picture)


WHOLES: dict[str, Callable[[Tensor], Tensor]] = {"canny": canny, "sketch": strokes}
