"""Edit Report: what an edit kept of its source, how well it follows its text, in numbers and in one picture."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from comfy_api.latest import io, ui
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...kernels import edit_metrics as metrics
from .. import host

NOT_MEASURED = math.nan
CELL, LABEL, GAP, MOST_ROWS = 256, 22, 6, 8
AMPLIFIED = 4.0  # of the differences in the picture


@dataclass(frozen=True)
class Measure:
    """One number of the report: its name, unit, what it says, and how many digits are worth showing."""

    label: str
    unit: str
    says: str
    digits: int = 2


MEASURES = {
    "psnr": Measure("PSNR", "dB", "whole picture against the source, higher is nearer", 2),
    "ssim": Measure("SSIM", "", "whole picture against the source, 1 is equal", 4),
    "background_psnr": Measure("background PSNR", "dB", "outside the mask, inf is bit-identical", 2),
    "background_ssim": Measure("background SSIM", "", "outside the mask, 1 is equal", 4),
    "structure": Measure("structure distance", "x 1000", "layout against the source, 0 is equal", 2),
    "ideal_psnr": Measure("PSNR to the ideal", "dB", "whole picture against the ideal edit", 2),
    "ideal_inside_psnr": Measure("PSNR to the ideal, inside", "dB", "inside the mask against the ideal edit", 2),
    "clip_text": Measure("CLIP-text", "", "agreement with the prompt, CLIP score 0 to 100", 2),
    "clip_direction": Measure("CLIP-direction", "", "whether the change is the change of the prompts, -1 to 1", 3),
    "clip_temporal": Measure("CLIP-temp", "", "mean cosine of all pairs of frames, 1 is still", 4),
    "frame_change": Measure("frame change", "", "change between frames relative to the source's, 1 is as steady", 3),
}


@dataclass(frozen=True)
class Embedder:
    """CLIP's two sides: pictures by the host's CLIP_VISION, texts by a CLIP whose projection belongs to it."""

    vision: Any
    clip: Any = None

    def pictures(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, C) and patch features (B, N, C') of an IMAGE, one picture at a time."""
        with torch.no_grad():
            found = [self.vision.encode_image(picture[None, ..., :3]) for picture in image]
        patches = torch.cat([f["penultimate_hidden_states"][:, 1:] for f in found])
        return torch.cat([f["image_embeds"] for f in found]).float(), patches.float()

    def text(self, prompt: str, width: int) -> Tensor:
        """The prompt's embedding (1, width). Raises ValueError for a text model that does not share the space."""
        with torch.no_grad():
            pooled = self.clip.encode_from_tokens(self.clip.tokenize(prompt), return_pooled=True)[1].float()
        if pooled.shape[-1] != width:
            raise ValueError(
                f"the clip's texts have {pooled.shape[-1]} numbers, the clip_vision's pictures {width}: they are not "
                "two halves of one CLIP. Load the text model that was trained with the vision model (clip_l for "
                "ViT-L, clip_g for ViT-bigG), or leave clip unconnected."
            )
        if not any(trained(weight) for weight in projections(self.clip, width)):
            raise ValueError(
                "this clip cannot compare texts with pictures: it comes without the projection that CLIP learned for "
                "that (SD 1.5 checkpoints drop it). Load clip_l.safetensors or clip_g.safetensors with Load CLIP, or "
                "leave clip unconnected."
            )
        return pooled


def projections(clip: Any, width: int) -> list[Tensor]:
    """The text projections (width, width) of a host CLIP."""
    return [
        weight
        for name, weight in clip.cond_stage_model.named_parameters()
        if name.endswith("text_projection.weight") and weight.shape == (width, width)
    ]


def trained(projection: Tensor) -> bool:
    """Whether a projection was loaded: not the identity, and neither zeros nor memory as it was found."""
    weight = projection.detach().float()
    spread = float(weight.std())
    identity = torch.eye(len(weight), device=weight.device)
    return math.isfinite(spread) and 1e-3 < spread < 1.0 and not torch.equal(weight, identity)


def measure(
    source: Tensor,
    edited: Tensor,
    mask: Tensor | None = None,
    ideal: Tensor | None = None,
    embedder: Embedder | None = None,
    prompt: str = "",
    source_prompt: str = "",
    clip_of_frames: bool = False,
) -> dict[str, Tensor]:
    """Every number that the inputs allow: name in MEASURES -> (B,), or a scalar for those of a whole clip.

    source, edited, ideal (B, H, W, 3) in 0..1; mask (B, H, W), 1 where the edit was wanted. What lies outside is
    counted alone: an average over outside pixels, not over pictures with the inside blackened.
    """
    found = {"psnr": metrics.psnr(edited, source), "ssim": metrics.ssim(edited, source)}
    if mask is not None:
        outside = (mask == 0).float()
        found["background_psnr"] = metrics.psnr(edited, source, outside)
        found["background_ssim"] = metrics.ssim(edited, source, outside)
    if ideal is not None:
        found["ideal_psnr"] = metrics.psnr(edited, ideal)
        if mask is not None:
            found["ideal_inside_psnr"] = metrics.psnr(edited, ideal, mask)
    if embedder is not None:
        (was, patches_was), (now, patches_now) = embedder.pictures(source), embedder.pictures(edited)
        found["structure"] = 1000 * metrics.structure_distance(patches_now, patches_was)
        if embedder.clip is not None and prompt.strip():
            wanted = embedder.text(prompt, now.shape[-1])
            found["clip_text"] = metrics.text_score(now, wanted)
            if source_prompt.strip():
                before = embedder.text(source_prompt, now.shape[-1])
                found["clip_direction"] = metrics.direction_score(was, now, before, wanted)
        if clip_of_frames:
            found["clip_temporal"] = metrics.frame_consistency(now)
    if clip_of_frames:
        found["frame_change"] = metrics.frame_change(edited) / metrics.frame_change(source)
    return found


def shown(value: float, digits: int) -> str:
    """A number as people read it."""
    return "inf" if math.isinf(value) else "-" if math.isnan(value) else f"{value:.{digits}f}"


def mean(values: Tensor) -> float:
    """The mean over pictures, leaving out those without a value (a mask that leaves nothing outside)."""
    return float(values.double().nanmean())


def markdown(numbers: dict[str, Tensor], pictures: int, note: str) -> str:
    """The numbers as a table: their mean, and one column per picture up to eight."""
    columns = range(pictures) if 1 < pictures <= MOST_ROWS else ()
    head = ["", "mean" if pictures > 1 else "value", *(f"{i + 1}" for i in columns), "what it says"]
    lines = [head, ["---"] * len(head)]
    for name, values in numbers.items():
        kind = MEASURES[name]
        each = [shown(float(v), kind.digits) for v in values] if values.ndim else ["" for _ in columns]
        label = f"{kind.label} ({kind.unit})" if kind.unit else kind.label
        lines.append([label, shown(mean(values), kind.digits), *(each[i] for i in columns), kind.says])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n{note}" if note else table


def plot(source: Tensor, edited: Tensor, mask: Tensor | None, numbers: dict[str, Tensor]) -> Tensor:
    """Source, edit and their difference for up to eight pictures, and the course of PSNR over a longer batch: IMAGE."""
    rows = range(min(len(edited), MOST_ROWS))
    height = round(CELL * edited.shape[1] / edited.shape[2])
    columns = ["source", "edited", f"difference x {AMPLIFIED:g}"] + ["difference outside the mask"] * (mask is not None)
    curve = CELL if len(edited) > 1 else 0
    width = len(columns) * (CELL + GAP) - GAP
    sheet = Image.new("RGB", (width, LABEL + len(rows) * (height + GAP) + curve), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, text in enumerate(columns):
        draw.text((column * (CELL + GAP) + CELL / 2, LABEL / 2), text, fill=(30, 30, 30), font=font, anchor="mm")
    for row in rows:
        difference = (edited[row] - source[row]).abs().mean(-1, keepdim=True).mul(AMPLIFIED).clamp(0, 1)
        cells = [source[row], edited[row], heat(difference)]
        if mask is not None:
            cells.append(heat(difference * (mask[row][..., None] == 0)))
        for column, cell in enumerate(cells):
            picture = Image.fromarray((cell * 255).round().byte().cpu().numpy())
            place = (column * (CELL + GAP), LABEL + row * (height + GAP))
            sheet.paste(picture.resize((CELL, height), Image.Resampling.LANCZOS), place)
    if curve:
        draw_curves(draw, font, numbers, (0, sheet.height - curve, width, sheet.height))
    return torch.from_numpy(np.array(sheet)).float()[None] / 255


def heat(amount: Tensor) -> Tensor:
    """Amounts (H, W, 1) in 0..1 as colours from black over red and yellow to white."""
    return torch.cat([(3 * amount - i).clamp(0, 1) for i in range(3)], -1)


def draw_curves(draw: Any, font: Any, numbers: dict[str, Tensor], box: tuple[int, int, int, int]) -> None:
    """PSNR of every picture of a batch, whole and outside the mask, over its place in the batch."""
    left, top, right, bottom = box[0] + 44, box[1] + 24, box[2] - 10, box[3] - 24
    curves = {k: numbers[k].double() for k in ("psnr", "background_psnr") if k in numbers}
    finite = torch.cat([v[torch.isfinite(v)] for v in curves.values()])
    low, high = (float(finite.min()) - 0.5, float(finite.max()) + 0.5) if finite.numel() else (0.0, 1.0)
    draw.rectangle((left, top, right, bottom), outline=(200, 200, 200))
    for value, y in ((high, top), (low, bottom)):
        draw.text((left - 6, y), f"{value:.1f}", fill=(90, 90, 90), font=font, anchor="rm")
    colours = {"psnr": (40, 90, 160), "background_psnr": (190, 110, 30)}
    for place, (name, values) in enumerate(curves.items()):
        step = (right - left) / max(len(values) - 1, 1)
        points = [
            (left + i * step, bottom - (bottom - top) * (min(float(v), high) - low) / (high - low))
            for i, v in enumerate(values.nan_to_num(nan=low))
        ]
        draw.line(points, fill=colours[name], width=2)
        label = f"{MEASURES[name].label} per picture, dB"
        draw.text((left + 4 + place * 260, top - 12), label, fill=colours[name], font=font, anchor="lm")


def matched(image: Tensor, pictures: int, size: tuple[int, int], what: str) -> tuple[Tensor, bool]:
    """An IMAGE as (pictures, *size, 3) in 0..1, and whether it was resized.

    Raises ValueError for another batch or NaN.
    """
    if image.numel() == 0 or not torch.isfinite(image).all():
        raise ValueError(f"{what} is empty or holds NaN: connect a picture that decoded well.")
    if len(image) not in (1, pictures):
        raise ValueError(f"{what} has {len(image)} pictures, edited has {pictures}: give one for all, or one for each.")
    image = image[..., :3].float().clamp(0, 1)
    resized = tuple(image.shape[1:3]) != size
    if resized:
        image = F.interpolate(image.movedim(-1, 1), size=size, mode="bicubic", antialias=True).movedim(1, -1)
    return image.clamp(0, 1).expand(pictures, -1, -1, -1), resized


class EditReport(io.ComfyNode):
    """Numbers of an edit, of any technique."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, and which numbers each makes possible."""
        return io.Schema(
            node_id="PalimpsestEditReport",
            display_name="Edit Report",
            category="palimpsest/evaluate",
            description="Measures an edit: what it kept of the source, inside and outside a mask, how near it is to an "
            "ideal answer, how well it follows its prompt, and how steady a clip is.",
            search_aliases=["metrics", "psnr", "ssim", "clip score", "structure distance", "evaluate edit", "compare"],
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
                    "clip_of_frames",
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
                io.Image.Output(display_name="plot", tooltip="Source, edit and difference side by side, and curves."),
                io.String.Output(display_name="numbers", tooltip="All numbers as JSON: means, and one per picture."),
                *(
                    io.Float.Output(
                        display_name=name, tooltip=f"{kind.label}: {kind.says}. NaN where it is not measured."
                    )
                    for name, kind in MEASURES.items()
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        source,
        edited,
        prompt,
        source_prompt,
        clip_of_frames,
        mask=None,
        ideal=None,
        clip_vision=None,
        clip=None,
    ) -> io.NodeOutput:
        """Measure, and say it."""
        if clip is not None and clip_vision is None:
            raise ValueError("clip compares the prompt with what clip_vision sees: connect clip_vision, too.")
        if clip_of_frames and len(edited) < 2:
            raise ValueError("clip_of_frames is on, but edited is a single picture: connect all frames as one batch.")
        pictures, size = len(edited), tuple(source.shape[1:3])
        source, _ = matched(source, pictures, size, "source")
        edited, resized = matched(edited, pictures, size, "edited")
        if ideal is not None:
            ideal, _ = matched(ideal, pictures, size, "ideal")
        if mask is not None:
            mask = host.picture_rows(mask, pictures, *size)[:, 0]
        embedder = None if clip_vision is None else Embedder(clip_vision, clip)
        numbers = measure(source, edited, mask, ideal, embedder, prompt, source_prompt, clip_of_frames)
        note = "The edit was resized to the source's size before measuring." if resized else ""
        report = markdown(numbers, pictures, note)
        means = {name: mean(numbers[name]) if name in numbers else NOT_MEASURED for name in MEASURES}
        host.show_text(host.node_id(cls), line(means))
        picture = plot(source, edited, mask, numbers)
        preview = ui.PreviewImage(picture, cls=cls if cls.hidden else None)
        return io.NodeOutput(report, picture, as_json(numbers, means), *means.values(), ui=preview)


def line(means: dict[str, float]) -> str:
    """The most telling numbers in one line, for under the node."""
    parts = [
        f"{MEASURES[name].label} {shown(value, MEASURES[name].digits)} {MEASURES[name].unit}".strip()
        for name, value in means.items()
        if not math.isnan(value)
    ]
    return ", ".join(parts)


def as_json(numbers: dict[str, Tensor], means: dict[str, float]) -> str:
    """Means and values of every picture; what is infinite or not measured is a string or missing, as JSON wants."""

    def plain(value: float) -> float | str | None:
        return None if math.isnan(value) else value if math.isfinite(value) else "inf"

    each = {name: [plain(float(v)) for v in values] for name, values in numbers.items() if values.ndim}
    return json.dumps({"mean": {k: plain(v) for k, v in means.items() if not math.isnan(v)}, "each": each})


NODES = [EditReport]
