"""When a training meets numbers that are none."""

from __future__ import annotations


class NotANumber(ArithmeticError):
    """A loss, its gradient or a measurement is not finite: the weights before are to be kept."""


def nan_error(where: str, look_at: str) -> ValueError:
    """The error for a model that gives NaN `where` ("for this picture"), and what else but the precision to look at."""
    return ValueError(
        f"the model returns NaN {where}: run it in another precision (start ComfyUI with --bf16-unet or "
        f"--fp32-unet), or look at {look_at}."
    )
