"""Where the host lets patches meet a U-Net's features: before its blocks, and before what stands behind the last."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .. import host
from .layers import MIDDLE, OUT, Feature

# Each patch looks for a step under its node's name among the options, and lets step.meet(feature, h, options) have h.


@dataclass(frozen=True)
class AfterInputBlock:
    """input_block_patch_after_skip: the next block's input; the skip that has just been taken stays the edit's own."""

    name: str
    last: int

    @host.not_compiled
    def __call__(self, h: Tensor, options: dict) -> Tensor:
        step = options.get(self.name)
        number = options["block"][1]
        return h if step is None else step.meet(("input", number + 1) if number < self.last else MIDDLE, h, options)


@dataclass(frozen=True)
class BeforeOutputBlock:
    """output_block_patch: what the block before returned, before the skip is joined to it."""

    name: str

    @host.not_compiled
    def __call__(self, h: Tensor, skip: Tensor, options: dict) -> tuple[Tensor, Tensor]:
        step = options.get(self.name)
        return (h if step is None else step.meet(("output", options["block"][1]), h, options)), skip


OPTIONS: ContextVar[dict | None] = ContextVar("palimpsest_feature_blend", default=None)


def share_options(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
    """APPLY_MODEL wrapper: the module behind the last block is given no options; it finds them here."""
    options = kwargs["transformer_options"] if "transformer_options" in kwargs else args[5]
    token = OPTIONS.set(options)
    try:
        return executor(*args, **kwargs)
    finally:
        OPTIONS.reset(token)


class BlendBeforeOut(nn.Sequential):
    """Stands for the U-Net's `out` around the same children, so that names of weights stay: blends its input first."""

    def __init__(self, previous: nn.Sequential, names: tuple[str, ...]):
        super().__init__(*previous)
        self.names = names

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(self.blended(h))

    @host.not_compiled
    def blended(self, h: Tensor) -> Tensor:
        """The input as the steps of our nodes would have it."""
        options = OPTIONS.get() or {}
        for step in (options.get(name) for name in self.names):
            h = h if step is None else step.meet(OUT, h, options)
        return h


def patch_features(patched: Any, name: str, met: Iterable[Feature]) -> None:
    """Let a node's steps meet features of a clone; in a transformer they meet every block.

    Raises ValueError where another node has replaced the network's end.
    """
    if (family := host.family_of(patched)) is not None:
        host.meet_blocks(patched, family, name)
        return
    met, network = set(met), patched.model.diffusion_model
    if any(block in ("input", "middle") for block, _ in met):
        patched.set_model_input_block_patch_after_skip(AfterInputBlock(name, len(network.input_blocks) - 1))
    if any(block == "output" for block, _ in met):
        patched.set_model_output_block_patch(BeforeOutputBlock(name))
    if OUT in met:
        replace_out(patched, name)


def replace_out(patched: Any, name: str) -> None:
    """Put BlendBeforeOut in the place of the network's end."""
    from comfy.patcher_extension import WrappersMP

    # What stands in the network now may be another clone's that is loaded: its children are ours, its names not.
    earlier = patched.object_patches.get("diffusion_model.out")
    previous = patched.model.diffusion_model.out if earlier is None else earlier
    if not isinstance(previous, nn.Sequential):
        raise ValueError(
            "another node has replaced the end of the network, so that 'out' cannot be blended: take it out, or leave "
            "'out' off the layers."
        )
    names = (*getattr(earlier, "names", ()), name)
    patched.add_object_patch("diffusion_model.out", BlendBeforeOut(previous, names))
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, name, share_options)
