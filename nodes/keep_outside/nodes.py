"""An edit in its untouched source: bit-identical outside the mask."""

from __future__ import annotations

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io

from ...kernels.pausing import pause, pausing
from .. import host, inputs
from . import compositing, matching


class KeepOutside(io.ComfyNode):
    """The finisher after any edit model: composite by mask, with proof."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestKeepOutside",
            display_name="Keep Outside",
            category="palimpsest/regions",
            description="Puts an edit back into the source picture: outside the mask every pixel is the source's, "
            "bit for bit, whatever model made the edit. Moves the edit back and matches its colours first where the "
            "model shifted or tinted the whole picture.",
            search_aliases=[
                "composite",
                "image composite masked",
                "paste back",
                "stitch",
                "inpaint",
                "keep background",
                "preserve unmasked",
                "color match",
                "align",
                "feather",
                "keep",
                "paste",
                "replace background",
                "before after",
            ],
            inputs=[
                io.Image.Input(  # first: a bypassed node hands on its first input of the output's type
                    "edited",
                    tooltip="What the edit model returned, of any size. A batch of edits takes one source for all of "
                    "them, or one for each, and is worked on picture by picture.",
                ),
                io.Image.Input(
                    "source",
                    tooltip="The untouched picture, or a batch of them. Size, precision and transparency of the result "
                    "are taken from it.",
                ),
                io.Mask.Input(
                    "mask",
                    tooltip="White is where the edit is wanted, black where nothing may move; grey blends. Any size; "
                    "one mask for all pictures, or one for each.",
                ),
                io.Int.Input(
                    "grow",
                    default=0,
                    min=-512,
                    max=512,
                    step=1,
                    tooltip="Widens the white by this many pixels of the source, or shrinks it below 0. Try 4 to 32 "
                    "where the edit is cut off; the time grows with it (2 s at 16, 7 s at 64 on an 8k picture).",
                ),
                io.Int.Input(
                    "feather",
                    default=8,
                    min=0,
                    max=512,
                    step=1,
                    tooltip="Fades from the source to the edit over this many pixels, inside the mask only: at the "
                    "(grown) edge the edit begins at exactly 0. 0 is a hard edge, 4 to 32 hide a seam.",
                ),
                io.Combo.Input(
                    "colour_match",
                    options=list(matching.COLOUR_FITS),
                    default="mean and spread",
                    tooltip="Takes a tint of the whole edit away, found by comparing both pictures outside the mask. "
                    "mean: brightness and tint; mean and spread: contrast as well; linear: colours that were mixed "
                    "into each other, too. A simpler one, or none, is taken where it holds better outside.",
                ),
                io.Combo.Input(
                    "align",
                    options=list(matching.ROUNDED),
                    default=matching.SUB_PIXEL,
                    tooltip="Moves the edit back if the model shifted the whole picture, found outside the mask; up to "
                    "an eighth of each side. whole pixels keeps the edit's sharpness untouched. About a second a "
                    "megapixel, 10 s on an 8k picture; an edit that lies in place is not touched.",
                ),
                io.Combo.Input(
                    "fit",
                    options=list(compositing.FITS),
                    default=compositing.AUTOMATIC,
                    advanced=True,
                    tooltip="Where an edit of another size lies. automatic: where the host's VAE cut it, if sides are "
                    "no multiples of 8 (or 16, 32, 64), else stretched. stretch: over the whole source. centre crop: "
                    "over its middle, for models that crop the picture to their own proportions; the rest stays.",
                ),
                io.Boolean.Input(
                    "invert_mask",
                    default=False,
                    advanced=True,
                    tooltip="Keeps the white and replaces the black, for a new background behind a masked subject. "
                    "Acts on all masks joined.",
                ),
                io.Autogrow.Input(
                    "more_masks",
                    optional=True,
                    template=io.Autogrow.TemplatePrefix(
                        io.Mask.Input("mask", optional=True, tooltip="Another region where the edit is wanted."),
                        prefix="mask_",
                        min=0,
                        max=16,
                    ),
                    tooltip="Further masks, joined with the first: the edit is wanted wherever one of them is white. "
                    "Each may have its own size.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    tooltip="The source with the edit in it: its size, its precision, its transparency.",
                ),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="How much of the edit each pixel got, after growing and feathering; exactly 0 outside.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What was found: shift, change of colour, share of the picture that was replaced.",
                ),
                io.Float.Output(
                    display_name="difference",
                    tooltip="The largest difference from the source outside the mask, measured on the result: 0.",
                ),
            ],
            hidden=inputs.unique_id(),
        )

    @classmethod
    def execute(cls, source, edited, mask, more_masks=None, **chosen) -> io.NodeOutput:
        """One picture after the other, so that a long batch needs memory for one."""
        more_masks = inputs.grown(chosen, "more_masks", "mask_", more_masks)
        masks = [mask, *(more for more in more_masks.values() if more is not None)]
        settings = compositing.KeepOutsideSettings.of(chosen)
        count = compositing.picture_count(source, edited, masks)
        images = source.new_empty(count, *source.shape[1:])
        weights = torch.empty(images.shape[:3])
        progress, found = comfy.utils.ProgressBar(count), []
        with pausing(host.stop_if_cancelled):
            for i in range(count):
                pause()
                pair = (compositing.row(batch, i, name) for batch, name in ((source, "source"), (edited, "edited")))
                union = compositing.union(masks, i, weights.shape[1:], settings.invert_mask)
                images[i], weights[i], one = compositing.keep(*pair, union, settings)
                found.append(one)
                progress.update(1)
        report = compositing.report(found)
        largest = max(one.largest_outside for one in found)
        return io.NodeOutput(images, weights, report, largest, ui=host.told(cls, report))


NODES = [KeepOutside]
