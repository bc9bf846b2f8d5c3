"""Pictures of a dataset: read from its folder, written into it, and drawn without their looks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image
from torch import Tensor

from ....kernels.conditioning_pictures import sketch
from ... import plots


def read_picture(path: Path) -> Tensor:
    """A picture file as (H, W, 3) in 0..1. Raises ValueError for one that is missing or damaged."""
    try:
        with Image.open(path) as image:
            return plots.to_tensor(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"{path.parent.name}/{path.name} of the dataset is missing or damaged: build the dataset again."
        ) from error


def write_picture(picture: Tensor, folder: Path, file: str) -> str:
    """Write a picture into the dataset's folder; returns `file`."""
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.to_image(picture).save(path, compress_level=4)
    return file


def canny(picture: Tensor) -> Tensor:
    """The picture's edges in white on black, by the detector that the host's own Canny node uses."""
    from kornia.filters import canny as edges

    return edges(picture.movedim(-1, 0)[None])[1][0].movedim(0, -1).expand_as(picture).contiguous()


WHOLES: dict[str, Callable[[Tensor], Tensor]] = {"canny": canny, "sketch": sketch}
