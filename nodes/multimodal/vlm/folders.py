"""Folders of models as transformers writes them: looked at and read offline, .safetensors only, none of their code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

OFFLINE = {"local_files_only": True, "trust_remote_code": False}  # for every from_pretrained
DESCRIPTIONS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


def read_json(path: Path) -> dict:
    """A JSON file of a model folder; empty where there is none. Raises ValueError for one that is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, OSError) as error:
        raise ValueError(f"{path.parent.name}/{path.name} is damaged ({error}): copy the folder again.") from error
    return found if isinstance(found, dict) else {}


def refuse_code(folder: Path, instead: str) -> None:
    """Raise ValueError for a folder that asks to run program code of its own; instead: the model to take."""
    for file in DESCRIPTIONS:
        if "auto_map" in read_json(folder / file):
            raise ValueError(
                f"{folder.name} asks to run program code of its own ({file} has an 'auto_map'), which is never done "
                f"here: take {instead}."
            )


def unreadable(folder: Path, error: Exception) -> ValueError:
    """What to raise where transformers cannot read a folder: the first line of what it says."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ValueError(f"{folder.name} cannot be read: {first.rstrip('.')}. Copy the model's folder again.")


class Held(nn.Module):
    """A model of transformers where the host's patcher expects a module whose `device` it may note on it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


def managed(model: nn.Module) -> Any:
    """A frozen model under the host's memory management, as text encoders are; it is the patcher's model.model."""
    import comfy.model_management
    import comfy.model_patcher

    return comfy.model_patcher.CoreModelPatcher(
        Held(model.eval().requires_grad_(False)),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.text_encoder_offload_device(),
    )
