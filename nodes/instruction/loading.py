"""Load MGIE: a folder's U-Net, edit head and language model; the last is read when it is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..settings import Settings
from .edit_head import EMBEDDINGS, PREFIX, EditHead, head_of
from .folder import HEAD, MGIE, UNET, MgieFolder, tensors_of
from .llava import MgieModel, load_mgie
from .unet import load_unet


@dataclass(frozen=True)
class MgieSettings(Settings):
    """Which folder, and its precision; see PalimpsestLoadMGIE for each."""

    folder: str
    dtype: str = "auto"


@dataclass(eq=False)
class WhenAsked:
    """The language model of a folder, which is read when a node asks for it: 13 GB are not read for the U-Net alone."""

    folder: MgieFolder
    dtype: str
    model: MgieModel | None = field(default=None, repr=False)

    def loaded(self) -> MgieModel:
        """The model."""
        if self.model is None:
            self.model = load_mgie(self.folder, self.dtype)
        return self.model


@dataclass(frozen=True, eq=False)
class Loaded:
    """A folder's MODEL (None where it has no U-Net), its edit head with its language model, and what it holds."""

    model: Any
    head: EditHead
    report: str


def load(settings: MgieSettings) -> Loaded:
    """Read a folder. Raises ValueError for one that is not allowed, and for what is damaged in it."""
    folder = MgieFolder(MGIE.path(settings.folder))
    config, files = folder.config(), folder.language_files()
    unet, network, embeddings = folder.file(UNET), *head_in(folder)
    model = None if unet is None else load_unet(unet)
    head = EditHead(folder.name, network, embeddings, WhenAsked(folder, settings.dtype))
    text, size = config.text_config, sum(path.stat().st_size for path in files)
    lines = [
        f"language model: {text.num_hidden_layers} layers of {text.hidden_size} channels, {size / 1e9:.2f} GB on the "
        "disk, read when a text is asked for",
        "edit head: none"
        if network is None
        else f"edit head: {numbers(network) / 1e6:.1f} M numbers, "
        f"{network.config.queries} tokens of {network.config.context} channels",
        "U-Net: none"
        if model is None
        else f"U-Net: {numbers(model.model.diffusion_model) / 1e6:.1f} M numbers, "
        f"{model.model.diffusion_model.in_channels} channels",
    ]
    return Loaded(model, head, "\n".join([folder.name, *lines]))


def head_in(folder: MgieFolder) -> tuple[Any, Any]:
    """(edit head, embeddings) of a folder; None twice where it has none."""
    path = folder.head_file()
    if path is None:
        return None, None
    own = path.name == HEAD
    tensors = dict(tensors_of(path, lambda name: own or name.startswith(PREFIX) or name == EMBEDDINGS))
    return head_of(tensors, folder.heads(), f"{folder.name}/{path.name}") if tensors else (None, None)


def numbers(network: Any) -> int:
    """How many numbers a network has."""
    return sum(parameter.numel() for parameter in network.parameters())
