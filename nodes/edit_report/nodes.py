"""What an edit kept and followed, in numbers."""

from __future__ import annotations

import math

import torch
from comfy_api.latest import io, ui

from .. import host, inputs
from ..colours import rgb
from . import drawing, measuring, reporting
from .embedding import Embedder

RESIZED = "The edit was resized to the source's size before measuring."
CUT = "The edit shows the middle of the source, as a VAE cuts it: that was measured."
WIRED = {  # the numbers with a socket of their own
    "background_psnr": "What was kept: PSNR in dB against the source outside the mask, or of the whole picture without "
    "a mask. inf is bit-identical.",
    "clip_text": "What was followed: CLIP score 0 to 100 of the edited picture with prompt. NaN without clip and "
    "clip_vision.",
    "frame_change": "What flickers: change from frame to frame, as a multiple of the source's. NaN unless is_clip.",
}


class EditReport(io.ComfyNode):
    """Numbers of an edit, of any technique."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestEditReport",
            display_name="Edit Report",
            category="palimpsest/evaluate",
            description="Measures an edit: what it kept of the source, inside and outside a mask, how near it is to an "
            "ideal answer, how well it follows its prompt, and how steady a clip is.",
            search_aliases=[
                "metrics",
                "psnr",
                "ssim",
                "clip score",
                "structure distance",
                "evaluate edit",
                "compare",
                "before after",
                "difference",
                "quality",
                "score",
            ],
            inputs=[
                io.Image.Input("source", tooltip="The picture or frames before the edit; one, or as many as edited."),
                io.Image.Input(
                    "edited",
                    tooltip="The edited picture or frames. Another size is resized to the source's, and the report "
                    "says so.",
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="What the edit should show; used for CLIP-text, which needs clip and clip_vision.",
                ),
                io.String.Input(
                    "source_prompt",
                    default="",
                    multiline=True,
                    advanced=True,
                    tooltip="What the source shows; with it CLIP-direction says whether the picture changed as the "
                    "prompts did.",
                ),
                io.Boolean.Input(
                    "is_clip",
                    default=False,
                    tooltip="On: the batch is a clip, and its steadiness from frame to frame is measured, too.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the edit was wanted; any size. Adds the numbers of the background, which is "
                    "every pixel that is fully black.",
                ),
                io.Image.Input(
                    "ideal", optional=True, tooltip="The right answer, where one is known; adds the distance to it."
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Adds structure distance, and for clips CLIP-temp. CLIP ViT-L for CLIP-text with clip_l, "
                    "ViT-bigG with SDXL's own clip; DINOv2 is best for structure. About 0.1 s a picture on a GPU.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text half of the same CLIP, for CLIP-text: SDXL's own with ViT-bigG, clip_l from Load "
                    "CLIP with ViT-L. SD 1.5 checkpoints lack the projection and are refused.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="All numbers as a markdown table."),
                io.Image.Output(
                    display_name="picture", tooltip="Source, edit and difference side by side; PSNR over a batch."
                ),
                io.String.Output(display_name="numbers", tooltip="All numbers as JSON: means, and one per picture."),
                *(io.Float.Output(display_name=name, tooltip=tooltip) for name, tooltip in WIRED.items()),
            ],
            hidden=inputs.unique_id(),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, source, edited, mask=None, ideal=None, clip_vision=None, clip=None, **chosen) -> io.NodeOutput:
        if clip is not None and clip_vision is None:
            raise ValueError("clip compares the prompt with what clip_vision sees: connect clip_vision, too.")
        if chosen.get("is_clip") and len(edited) < 2:
            raise ValueError("is_clip is on, but edited is a single picture: connect all frames as one batch.")
        source = rgb(source, "source")
        pictures, cut = len(edited), is_cut(source, edited)
        if cut:
            size, part = tuple(source.shape[1:3]), tuple(edited.shape[1:3])
            source, ideal, mask = (cut_like(other, size, part) for other in (source, ideal, mask))
        size = tuple(source.shape[1:3])
        edited, resized = measuring.matched(edited, pictures, size, "edited")
        edit = measuring.Edit(
            source=measuring.matched(source, pictures, size, "source")[0],
            edited=edited,
            mask=None if mask is None else host.picture_rows(mask.cpu(), pictures, *size)[:, 0],
            ideal=None if ideal is None else measuring.matched(ideal, pictures, size, "ideal")[0],
            **chosen,
        )
        numbers = measuring.measure(edit, None if clip_vision is None else Embedder(clip_vision, clip))
        note = CUT if cut else RESIZED if resized else ""
        sentence = reporting.sentence(numbers, note)
        picture = drawing.draw(edit, numbers)
        shown = ui.PreviewImage(picture, cls=cls if cls.hidden else None).as_dict() | host.told(cls, sentence)
        report = reporting.markdown(numbers, pictures, note)
        return io.NodeOutput(report, picture, reporting.as_json(numbers), *wired(numbers), ui=shown)


def is_cut(source: torch.Tensor, edited: torch.Tensor) -> bool:
    """Whether the edits show the middle of their source, as the host's VAE cuts it."""
    pictures = all(each.ndim == 4 and each.numel() and torch.isfinite(each).all() for each in (source, edited))
    return bool(pictures) and host.was_cut(source[0], edited[0])


def cut_like(other: torch.Tensor | None, size: tuple[int, int], part: tuple[int, int]) -> torch.Tensor | None:
    """The middle of pictures or masks of the source's size; others as they are."""
    if other is None or tuple(other.shape[1:3]) != size:
        return other
    rows, columns = host.middle(size, part)
    return other[:, rows, columns]


def wired(numbers: measuring.Numbers) -> list[float]:
    """The means that have a socket; nan for what was not measured. Without a mask everything is background."""
    found = {"background_psnr": numbers["psnr"]} | numbers
    return [reporting.mean(found[name]) if name in found else math.nan for name in WIRED]


NODES = [EditReport]
