"""A multimodal encoder out of its parts: a model folder, a connector, and a LoRA of the model by choice."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..settings import Settings
from . import files
from .encoder import Connector, MultimodalEncoder, join
from .vlm import load_vlm, with_lora

NONE = "none"
PERCEIVER = {"as trained": None, "bypassed": False, "kept": True}


@dataclass(frozen=True)
class EncoderSettings(Settings):
    """The parts of an encoder; see PalimpsestLoadMultimodalEncoder for each."""

    folder: str
    connector: str = NONE
    perceiver: str = "as trained"
    dtype: str = "auto"
    lora: str = NONE
    lora_strength: float = 1.0

    def keeps_perceiver(self, connector: Connector | None) -> bool:
        """Whether pictures go through the model's perceiver: as chosen, else as the connector was trained."""
        chosen = PERCEIVER[self.perceiver]
        return connector is not None and connector.reads.perceiver if chosen is None else chosen


def load_encoder(settings: EncoderSettings) -> MultimodalEncoder:
    """The encoder of some parts. Raises ValueError for those that do not belong together."""
    connector = None
    if settings.connector != NONE:
        connector = files.load_connector(files.SHELF.path(settings.connector))
    folder = files.ENCODERS.path(settings.folder)
    vlm = load_vlm(folder, settings.dtype, settings.keeps_perceiver(connector))
    if settings.lora != NONE and settings.lora_strength != 0.0:
        vlm = with_lora(vlm, read_lora(settings.lora), settings.lora_strength, settings.lora)
    return join(vlm, connector)


def read_lora(name: str) -> dict[str, Tensor]:
    """A LoRA file of the host's. Raises ValueError for one of another format than .safetensors."""
    import comfy.utils
    import folder_paths

    path = folder_paths.get_full_path_or_raise("loras", name)
    if not path.endswith(".safetensors"):
        raise ValueError(f"{name} is no .safetensors file: convert it, or choose another LoRA.")
    return comfy.utils.load_torch_file(path, safe_load=True)
