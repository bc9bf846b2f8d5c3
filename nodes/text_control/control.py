"""AnyText's ControlNet as one of the host's: only what makes a hint of a picture is another module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management
import comfy.ops
import torch
from torch import Tensor

from ...kernels.text_control import AuxiliaryLatent, fitted, packed
from .. import host
from ..quoting import quoted

MOST = {"model_channels": 1280, "context_dim": 4096, "num_heads": 64, "num_head_channels": 256}  # of a layout


@dataclass(frozen=True)
class Layout:
    """The sizes of a U-Net whose first half a ControlNet repeats, by the host's names; -1 heads: so many channels each.

    Those of SD 1.x are the published checkpoints'.
    """

    model_channels: int = 320
    num_res_blocks: list = (2, 2, 2, 2)
    channel_mult: list = (1, 2, 4, 4)
    transformer_depth: list = (1, 1, 1, 1, 1, 1, 0, 0)
    transformer_depth_middle: int = 1
    context_dim: int = 768
    num_heads: int = 8
    num_head_channels: int = -1
    use_linear_in_transformer: bool = False

    @classmethod
    def of(cls, model: Any) -> Layout:
        """The layout of a MODEL's U-Net. Raises ValueError for one that reads more than a latent and a text."""
        found = model.model.model_config.unet_config
        if found.get("in_channels", 4) != 4 or found.get("adm_in_channels") or found.get("num_classes"):
            raise ValueError(
                "text control is made for SD 1.x models, the connected one reads more than a latent and a prompt "
                "(SDXL, an inpainting or an instruction model): connect an SD 1.x checkpoint."
            )
        named = {name: found[name] for name in asdict(cls()) if name in found}
        lists = {name: list(value) for name, value in named.items() if isinstance(value, list | tuple)}
        return cls(**named | lists)

    def require_sane(self) -> None:
        """Raise ValueError for sizes that no U-Net has, before anything is built of them."""
        for name, most in MOST.items():
            if not (1 <= getattr(self, name) <= most or (name.startswith("num_") and getattr(self, name) == -1)):
                raise ValueError(f"its {name} is {quoted(getattr(self, name))}, which no U-Net has")
        for name in ("num_res_blocks", "channel_mult", "transformer_depth"):
            values = getattr(self, name)
            if not (1 <= len(values) <= 32 and all(isinstance(v, int) and 0 <= v <= 16 for v in values)):
                raise ValueError(f"its {name} is {quoted(values)}, which no U-Net has")


def build(layout: Layout, dtype: torch.dtype, device: Any = None, operations: Any = None) -> torch.nn.Module:
    """The host's ControlNet of a layout with AnyText's hint block, its weights not filled."""
    operations = operations or host.whole(comfy.ops.disable_weight_init)
    sizes = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(layout).items()}
    network = comfy.cldm.cldm.ControlNet(
        image_size=32,
        in_channels=4,
        hint_channels=1,
        use_spatial_transformer=True,
        legacy=False,
        dtype=dtype,
        device=device,
        operations=operations,
        **sizes,
    )
    made = {"dtype": dtype, "device": device}
    network.input_hint_block = AuxiliaryLatent(layout.model_channels, operations.Conv2d, **made)
    network.layout = layout
    return network.eval()


@dataclass(frozen=True, eq=False)
class Hint:
    """What is to be written where: glyphs (1, 1, 16h, 16w), positions (1, 1, 8h, 8w) in 0..1, and what is there.

    masked (B, 4, h, w): the picture without its text, as the VAE encodes it; the model's own factor comes later.
    """

    glyphs: Tensor
    positions: Tensor
    masked: Tensor


class TextControl(comfy.controlnet.ControlNet):
    """A CONTROL_NET that writes: strength, percents, chaining and memory are the host's, the hint is `Hint`'s."""

    hint: Hint | None = None
    scaled: Tensor | None = None

    def __init__(self, control_model: torch.nn.Module | None = None, **named: Any):
        super().__init__(control_model, compression_ratio=1, **named)

    @classmethod
    def of(cls, network: torch.nn.Module, manual_cast: torch.dtype | None = None) -> TextControl:
        """A network under the host's management."""
        return cls(network, load_device=comfy.model_management.get_torch_device(), manual_cast_dtype=manual_cast)

    def with_hint(self, hint: Hint, strength: float = 1.0, percents: tuple[float, float] = (0.0, 1.0)) -> TextControl:
        """A copy that writes this; it shares the network."""
        found = self.copy()
        found.hint, found.strength, found.timestep_percent_range = hint, strength, percents
        return found

    def set_cond_hint(self, *_: Any, **__: Any) -> None:
        """Raise ValueError: a node of the host gave it a picture."""
        raise ValueError(
            "this ControlNet writes text and takes no picture as its hint: connect it to Apply Text Control instead of "
            "Apply ControlNet."
        )

    def pre_run(self, model: Any, percent_to_timestep_function: Callable) -> None:
        """Before a sampling run: the masked picture in the scale of the model that samples."""
        super().pre_run(model, percent_to_timestep_function)
        if self.hint is None:
            raise ValueError("this ControlNet was not told what to write: connect it to Apply Text Control.")
        self.scaled, self.cond_hint_original = model.process_latent_in(self.hint.masked), None

    def get_control(self, x_noisy: Tensor, *args: Any) -> Any:
        """The host's own, on a hint of the latent's size."""
        size = tuple(x_noisy.shape[-2:])
        if self.cond_hint_original is None or tuple(self.cond_hint_original.shape[-2:]) != size:
            maps = fitted(self.hint.glyphs, self.hint.positions, self.scaled, size)
            self.cond_hint_original = packed(*maps)
        return super().get_control(x_noisy, *args)

    def copy(self) -> TextControl:
        """Another object on the same network."""
        found = type(self)(None, load_device=self.load_device, manual_cast_dtype=self.manual_cast_dtype)
        found.control_model, found.control_model_wrapped = self.control_model, self.control_model_wrapped
        self.copy_to(found)
        found.hint, found.cond_hint_original = self.hint, None
        return found

    def cleanup(self) -> None:
        """After a sampling run."""
        self.scaled = self.cond_hint_original = None
        super().cleanup()


def require_text_control(control: Any) -> None:
    """Raise ValueError for a CONTROL_NET of another kind."""
    if not isinstance(control, TextControl):
        raise ValueError(
            "control_net is no text control, but a ControlNet that follows pictures: connect Load AnyText or Train "
            "Text Control."
        )
