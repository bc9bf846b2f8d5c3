"""LoRA on a few pictures: low-rank changes of a U-Net and its text encoders, trained inside a node."""

from .layers import unet_layers

__all__ = ["unet_layers"]
