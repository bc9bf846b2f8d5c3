"""Load MGIE: a folder's U-Net, edit head and language model; the last is read when it is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..settings import Settings
from . import heads
from .edit_head import EMBEDDINGS, PREFIX, EditHead
from .folder import HEAD, MGIE, UNET, MgieFolder, tensors_of
from .llava import MgieModel, load_mgie
from .unet import load_unet


@dataclass(frozen=True)
class MgieSettings(Settings):
    """Which folder, and its precision; see PalimpsestLoadMGIE for each."""

    folder: str
    dtype: str = "auto"
    head_file: str = heads.OF_FOLDER


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
    unet, trained = folder.file(UNET), trained_head(folder, settings.head_file)
    model = None if unet is None else load_unet(unet)
    head = EditHead(folder.name, None, None, WhenAsked(folder, settings.dtype))
    if trained is not None:
        require_fitting(trained, config.text_config.hidden_size, folder.name)
        head = trained.on(head, folder.name)
    network = head.network
    text, size = config.text_config, sum(path.stat().st_size for path in files)
    lines = [
        f"language model: {text.num_hidden_layers} layers of {text.hidden_size} channels, {size / 1e9:.2f} GB on the "
        "disk, read when a text is asked for",
        "edit head: none"
        if network is None
        else f"edit head: {numbers(network) / 1e6:.1f} M numbers, "
        f"{network.config.queries} tokens of {network.config.context} channels{told(settings, trained)}",
        "U-Net: none"
        if model is None
        else f"U-Net: {numbers(model.model.diffusion_model) / 1e6:.1f} M numbers, "
        f"{model.model.diffusion_model.in_channels} channels",
    ]
    return Loaded(model, head, "\n".join([folder.name, *lines]))


def trained_head(folder: MgieFolder, file: str) -> heads.TrainedHead | None:
    """The edit head of a file, or a folder's own; None where that has none."""
    return head_in(folder) if file == heads.OF_FOLDER else heads.load(file)


def head_in(folder: MgieFolder) -> heads.TrainedHead | None:
    """The edit head of a folder; None where it has none."""
    path = folder.head_file()
    if path is None:
        return None
    own = path.name == HEAD
    tensors = dict(tensors_of(path, lambda name: own or name.startswith(PREFIX) or name == EMBEDDINGS))
    return heads.from_content(tensors, folder.heads(), f"{folder.name}/{path.name}") if tensors else None


def require_fitting(trained: heads.TrainedHead, hidden: int, name: str) -> None:
    """Raise ValueError for a head of a language model of other channels."""
    found = trained.network.config.hidden
    if found != hidden:
        raise ValueError(
            f"the edit head reads states of {found} channels, {name} has {hidden}: choose the folder that it was "
            "trained with."
        )


def told(settings: MgieSettings, trained: heads.TrainedHead) -> str:
    """What a report adds of where a head comes from, and whether its tokens learned."""
    where = "" if settings.head_file == heads.OF_FOLDER else f", of {settings.head_file}"
    return where + (", with its own [IMG0] to [IMG7]" if trained.rows else "")


def numbers(network: Any) -> int:
    """How many numbers a network has."""
    return sum(parameter.numel() for parameter in network.parameters())
