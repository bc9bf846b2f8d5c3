"""Folders of MGIE in models/palimpsest_mgie: what lies in one, and what of it is read.

    config.json            transformers' LlavaConfig: text_config (llama), vision_config (clip_vision_model)
    the tokenizer's files  with <im_start>, <im_patch>, <im_end> and [IMG0] to [IMG7]
    model.safetensors      the language model in LLaVA's names, model.mm_projector.* among them; or an index and parts
    vision.safetensors     CLIP's vision tower; it may stand in model.safetensors instead
    mllm.safetensors       what MGIE trained: its token table and language head, laid over the model's; edit_head.*, emb
    edit_head.safetensors  a head of one's own in the place of that
    unet.safetensors       the 8-channel U-Net, in diffusers' names or the checkpoints'

Each but config.json, tokenizer and model is optional. Other files are not looked at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import files as storage
from ..foreign import file_within, object_of
from ..multimodal import COPY_AGAIN, configuration, name_of, refuse_code, weight_files

MGIE = storage.ModelFolders(
    folder="palimpsest_mgie",
    put="mgie_folders",
    what="MGIE folder",
    hint="put a converted MGIE or LLaVA folder there (config.json, tokenizer, .safetensors), and refresh",
)
NO_FOLDER = "no folder in models/palimpsest_mgie"
CONFIG, VISION, TRAINED, HEAD, UNET = (
    "config.json", "vision.safetensors", "mllm.safetensors", "edit_head.safetensors", "unet.safetensors",
)  # fmt: skip
PARTS = {"text_config": ("llama",), "vision_config": ("clip_vision_model",)}
DESCRIPTIONS = (CONFIG, "tokenizer_config.json")


def mgie_folders() -> list[str]:
    """Names of the folders, as the loader offers them; a sentence where there are none."""
    return sorted(MGIE.found()) or [NO_FOLDER]


def fingerprint(name: str) -> str:
    """What changes when a file of a folder does."""
    found = MGIE.found()
    paths = sorted(str(path) for path in found[name].glob("*.*")) if name in found else []
    return " ".join(f"{path} {os.path.getmtime(path)}" for path in paths if os.path.exists(path))


@dataclass(frozen=True)
class MgieFolder:
    """A folder of MGIE, by its path."""

    path: Path

    @property
    def name(self) -> str:
        """What it is called."""
        return name_of(self.path)

    def file(self, name: str) -> Path | None:
        """Where a file of it lies; None where there is none. Raises ValueError for what is no regular file of it."""
        return file_within(self.path, name) if os.path.lexists(self.path / name) else None

    def config(self) -> Any:
        """transformers' LlavaConfig of what the folder may say. Raises ValueError for another kind of model."""
        refuse_code(self.path, DESCRIPTIONS, "a converted folder, see the help page")
        found = configuration(self.path, "llava", PARTS)
        said = self.said().get("model_type")
        if said != "llava":
            raise ValueError(
                f"config.json of {self.name} is of type {str(said)[:60]!r}, and llava is read: convert the published "
                "files, see the help page of Load MGIE."
            )
        return found

    def said(self) -> dict:
        """What config.json says."""
        return object_of(self.path / CONFIG, COPY_AGAIN)

    def heads(self) -> int:
        """Attention heads of the edit head: config.json's `edit_head_heads`, else MGIE's 4."""
        found = self.said().get("edit_head_heads", 4)
        if type(found) is not int or not 1 <= found <= 64:
            raise ValueError(f"config.json of {self.name} has edit_head_heads {found!r}: write a number from 1 to 64.")
        return found

    def language_files(self) -> list[Path]:
        """The files of the language model and its vision tower, those that are laid over others last."""
        return [*weight_files(self.path), *filter(None, map(self.file, (VISION, TRAINED)))]

    def head_file(self) -> Path | None:
        """The file that holds the edit head: one's own, or what MGIE trained."""
        return self.file(HEAD) or self.file(TRAINED)


def tensors_of(path: Path, wanted: Any = lambda name: True) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a .safetensors file that are wanted, by name. Raises ValueError for one that is damaged."""
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (no dictionary)
                if wanted(name):
                    yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path.parent.name}/{path.name} is cut off or damaged ({error}): {COPY_AGAIN}.") from error
