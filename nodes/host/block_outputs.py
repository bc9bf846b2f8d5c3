"""What the blocks of a transformer give back for the picture, and how a technique may meet it there.

Two doors of the host: a block replacement (`patches_replace["dit"]`), and in Z-Image and Lumina Image 2, which have
none, the patch behind a layer (`double_block`). Ours are put around what other nodes have put there, for the length of
a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .call import EachCall, observe
from .compiled import not_compiled
from .families import Family, joint_keys
from .joint import Sequence, require_no_references, sequence_of
from .text_first import with_text_checked

Block = tuple[str, int]


def block_outputs(model: Any, family: Family) -> list[Block]:
    """The blocks of a transformer, (block type, number), in the order of a forward pass.

    Raises ValueError where the host lets nobody see what they give back.
    """
    if not family.meets:
        raise ValueError(
            f"the host lets no other node see what the blocks of {family.name} give back, so that its features cannot "
            "be blended: take Apply KV, which works in its attention, and Keep Outside for what must not change."
        )
    return [key[:2] for key in joint_keys(model, family)]


@dataclass(frozen=True)
class Meeting:
    """The step that meets a call's features: step.meet(block, h, options) -> h.

    h is (R, C, h, w), of a clip of several frames (R, C, F, h, w).
    """

    step: Any
    sequence: Sequence
    options: dict

    def met(self, block: Block, tokens: Tensor, first: int) -> Tensor:
        """A block's tokens (R, T, C), of which the picture's begin at `first`, as the step would have them.

        The same tensor where nothing changes; else a new one, for some networks write into what a block gives back.
        """
        image = slice(first, first + self.sequence.places)
        frames, grid = self.sequence.frames, self.sequence.grid
        given = tokens[:, image].transpose(1, 2).unflatten(2, (frames, *grid) if frames > 1 else grid)
        h = self.step.meet(block, given, self.options)
        if h is given:
            return tokens
        tokens = tokens.clone()
        tokens[:, image] = h.flatten(2).transpose(1, 2)
        return tokens


@dataclass(frozen=True)
class MeetBlock:
    """Block replacement: what a block gives back for the picture meets the step."""

    block: Block
    meeting: Meeting
    earlier: Any = None

    @not_compiled
    def __call__(self, args: dict, extra: dict) -> dict:
        out = extra["original_block"](args) if self.earlier is None else self.earlier(args, extra)
        first = self.meeting.sequence.text if self.block[0] == "single" else 0  # there text and picture are one
        return out | {"img": self.meeting.met(self.block, out["img"], first)}


@dataclass(frozen=True)
class MeetLayer:
    """double_block patch: the same behind a layer of Z-Image and Lumina Image 2."""

    meeting: Meeting

    @not_compiled
    def __call__(self, args: dict) -> dict:
        tokens = self.meeting.met(("double", args["block_index"]), args["img"], 0)
        return {} if tokens is args["img"] else {"img": tokens}


@dataclass(frozen=True)
class MeetBlocks(EachCall):
    """For the length of a call in which a node's step is among the options, lets it meet the blocks."""

    family: Family
    name: str

    def prepared(self, model: Any, x: Tensor, t: Tensor, text: Tensor | None, options: dict, conds: dict) -> dict:
        if self.name not in options:
            return options
        network = model.diffusion_model
        require_no_references(self.family, network, conds)
        sequence = sequence_of(self.family, network, x, text, conds)
        if sequence.frames > 1 and not self.family.apart:
            raise ValueError(
                f"blocks of {self.family.name} are met for one picture at a time, the latent has {sequence.frames} "
                "frames: sample a single picture."
            )
        if not self.family.apart:
            options["patches"] = with_text_checked(options, self.family.name, sequence.text)
        meeting = Meeting(options[self.name], sequence, options)
        if self.family.refiner:
            patches = options.get("patches", {})
            options["patches"] = {**patches, "double_block": [*patches.get("double_block", ()), MeetLayer(meeting)]}
        else:
            options["patches_replace"] = around(self.family, network, options.get("patches_replace", {}), meeting)
        return options


def around(family: Family, network: Any, replaced: Mapping[str, Mapping], meeting: Meeting) -> dict:
    """The host's block replacements, with ours around them."""
    present = dict(replaced.get("dit", {}))
    for kind, blocks in family.blocks:
        for number in range(len(getattr(network, blocks))):
            key = (f"{kind}_block", number)
            present[key] = MeetBlock((kind, number), meeting, present.get(key))
    return {**replaced, "dit": present}


def meet_blocks(patched: Any, family: Family, name: str) -> None:
    """Let a node's steps, which stand under its name among the options of a call, meet the blocks of a clone."""
    from comfy.patcher_extension import WrappersMP

    observe(patched)
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, name + ".blocks", MeetBlocks(family, name))
