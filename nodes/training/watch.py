"""Who looks on at a training, and what becomes of it when it ends early."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor


def nothing(*_: Any) -> None:
    """Nobody looks on."""


@dataclass(frozen=True)
class Watch:
    """What a node wants to be told while it trains.

    begin(bytes by part): how much there will be to save, before the first step; it may raise. show(step, latent or
    None): a step is done, and what is drawn by now. tell(text): one line. save(what was learned): while there is more
    to come, or because it ends early.
    """

    show: Callable[[int, Tensor | None], None] = nothing
    tell: Callable[[str], None] = nothing
    save: Callable[[Any], None] = nothing
    begin: Callable[[dict[str, int]], None] = nothing


def watched(model: Any, steps: int, tell: Callable[..., None], save: Callable[[Any], str]) -> Watch:
    """The Watch of a node: what is drawn on its bar, and what was saved told at once by the name that `save` gives."""

    def keep(learned: Any) -> None:
        name = save(learned)
        tell(f"{learned.step} steps saved as {name}", now=True)

    return Watch(previews(model, steps), tell, keep)


@contextmanager
def kept_if_it_ends_early(keep: Callable[[], None]) -> Iterator[None]:
    """Call `keep` where a training is cancelled or fails within; what ended it goes on its way."""
    try:
        yield
    except BaseException:
        keep()
        raise


def previews(model: Any, steps: int) -> Callable[[int, Tensor | None], None]:
    """show(step, latent or None) of a Watch: the progress bar of the node that runs, with what is drawn."""
    import comfy.utils
    import latent_preview

    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    progress = comfy.utils.ProgressBar(steps)

    def show(step: int, latent: Tensor | None) -> None:
        seen = None
        if latent is not None and previewer is not None:
            seen = previewer.decode_latent_to_preview_image("JPEG", latent)
        progress.update_absolute(step + 1, steps, seen)

    return show
