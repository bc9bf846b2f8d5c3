"""Open-vocabulary detection by a GroundingDINO folder: which part of a picture each phrase of its caption names.

The caption itself is the query, as the model was trained: every box comes with the caption's tokens that it belongs to,
so that the phrase's place in the caption is known and no other program has to find the nouns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...host.cancelling import Cancellable
from ...quoting import quoted
from ..vlm.folders import allowed_weights, configuration, name_of, read_json, read_tokenizer
from ..vlm.reading import COPY_AGAIN, managed, read_model
from .text import PUNCTUATION, joined

MODEL_TYPE = "grounding-dino"
PARTS = {"backbone_config": ("swin",), "text_config": ("bert",)}
DETERMINERS = frozenset(
    [
        "a",
        "an",
        "the",
        "this",
        "that",
        "these",
        "those",
        "his",
        "her",
        "its",
        "their",
        "my",
        "your",
        "our",
        "some",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "several",
    ]
)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, where a folder says nothing else
SIZES = (800, 1333)  # pixels of the shorter and, at most, of the longer side
MIN_SHOWN, MOST_SHOWN = 32, 4096  # of either: what the backbone divides by, and three times what it was trained on


@dataclass(frozen=True)
class Detection:
    """A box in 0..1 (left, top, right, bottom) for characters start..end of the caption, and its score."""

    start: int
    end: int
    box: tuple[float, float, float, float]
    score: float


@dataclass(frozen=True, eq=False)
class Detector:
    """A GroundingDINO under the host's memory management, with its tokenizer and how it is shown pictures."""

    name: str
    patcher: Any
    tokenizer: Any = field(repr=False)
    sizes: tuple[int, int] = SIZES
    mean: tuple[float, ...] = MEAN
    deviation: tuple[float, ...] = DEVIATION

    def detect(self, picture: Tensor, caption: str, box_threshold: float, text_threshold: float) -> list[Detection]:
        """The best box of every phrase of the caption, best first; phrases without their articles.

        picture (H, W, 3) in 0..1. Raises ValueError for a caption that is too long to be read whole.
        """
        read, model = self.read(caption), self.patcher.model.model
        self.load()
        device = self.patcher.load_device
        inputs = {
            name: torch.tensor([read[name]], device=device)
            for name in ("input_ids", "attention_mask", "token_type_ids")
            if name in read
        }
        pixels = self.shown(picture).to(device, next(model.parameters()).dtype)
        with torch.no_grad(), Cancellable():
            found = model(pixel_values=pixels, **inputs)
        scores = found.logits[0].float().sigmoid().cpu()[:, : len(read["input_ids"])]
        boxes = found.pred_boxes[0].float().cpu()
        return best_by_phrase(scores, boxes, read["offset_mapping"], caption, box_threshold, text_threshold)

    def read(self, caption: str) -> Any:
        """The tokens of a caption, and where they stand in it."""
        text = caption if caption.rstrip().endswith(".") else caption.rstrip() + "."
        read = self.tokenizer(text.lower(), return_offsets_mapping=True)
        limit = self.patcher.model.model.config.max_text_len
        if len(read["input_ids"]) > limit:
            raise ValueError(
                f"the caption {quoted(caption)} has {len(read['input_ids'])} tokens and {self.name} "
                f"reads {limit}: shorten it."
            )
        return read

    def load(self) -> None:
        """Bring the weights to the device, as the host does with any model."""
        import comfy.model_management

        comfy.model_management.load_models_gpu([self.patcher])
        for parameter in self.patcher.model.model.parameters():  # the host leaves some behind where it streams the rest
            parameter.data = parameter.data.to(self.patcher.load_device)

    def shown(self, picture: Tensor) -> Tensor:
        """(1, 3, h, w): at the model's size, in its range of values."""
        height, width = picture.shape[:2]
        shorter, longest = self.sizes
        scale = min(shorter / min(height, width), longest / max(height, width))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        small = F.interpolate(picture.movedim(-1, 0)[None], size=size, mode="bilinear", antialias=True).clamp(0, 1)
        mean, deviation = (torch.tensor(values)[None, :, None, None] for values in (self.mean, self.deviation))
        return (small - mean) / deviation


def best_by_phrase(
    scores: Tensor,
    boxes: Tensor,
    offsets: Sequence[tuple[int, int]],
    caption: str,
    box_threshold: float,
    text_threshold: float,
) -> list[Detection]:
    """Detections of one picture, the best box of each phrase, best first.

    scores (Q, L): how well each of Q boxes fits each of the caption's L tokens, 0..1. boxes (Q, 4): centre, width and
    height in 0..1. offsets: the characters of each token; empty for the tokenizer's own marks. A box counts from
    box_threshold on; its phrase is the run of tokens of text_threshold and more around its best one.
    """
    words = torch.tensor([end > start and caption[start:end].strip(PUNCTUATION) != "" for start, end in offsets])
    best: dict[tuple[int, int], Detection] = {}
    scores = scores.where(words[: scores.shape[1]], scores.new_zeros(()))
    tops, at = scores.max(1)
    for query in (tops >= box_threshold).nonzero()[:, 0].tolist():
        first, last = run_around(int(at[query]), scores[query] >= text_threshold)
        span, score = phrase(caption, offsets[first][0], offsets[last][1]), float(tops[query])
        if span is not None and (span not in best or score > best[span].score):
            best[span] = Detection(*span, corners(boxes[query].tolist()), score)
    return sorted(best.values(), key=lambda each: -each.score)


def run_around(token: int, fits: Tensor) -> tuple[int, int]:
    """(first, last) of the run of fitting tokens around one."""
    first = last = token
    while first > 0 and fits[first - 1]:
        first -= 1
    while last + 1 < len(fits) and fits[last + 1]:
        last += 1
    return first, last


def corners(box: Sequence[float]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) in 0..1 of a box of centre, width and height."""
    x, y, w, h = box
    return tuple(min(max(v, 0.0), 1.0) for v in (x - w / 2, y - h / 2, x + w / 2, y + h / 2))


def phrase(caption: str, start: int, end: int) -> tuple[int, int] | None:
    """start..end widened to whole words, without articles in front; None where nothing is left."""
    while 0 < start < len(caption) and joined(caption[start - 1], caption[start]):
        start -= 1
    while 0 < end < len(caption) and joined(caption[end - 1], caption[end]):
        end += 1
    for word in re.finditer(r"[\w'-]+", caption[start:end]):
        if word.group().lower() not in DETERMINERS:
            return start + word.start(), start + len(caption[start:end].rstrip(PUNCTUATION))
    return None


# ---- folders --------------------------------------------------------------------------------------------------------


def require_detector(folder: Path) -> None:
    """Raise ValueError for a folder that is no GroundingDINO."""
    config = read_json(folder, "config.json")
    if config.get("model_type") != MODEL_TYPE:
        kind = quoted(config.get("model_type")) if config else "none (no config.json)"
        raise ValueError(
            f"{name_of(folder)} is a model of type {kind}, and the detector is a GroundingDINO as transformers writes "
            "it: put such a folder there, or connect boxes or masks instead."
        )


def load_detector(folder: Path) -> Detector:
    """Read a GroundingDINO folder: offline, .safetensors only, none of its code. Raises ValueError for any other."""
    require_detector(folder)
    import transformers

    kind, name = transformers.GroundingDinoForObjectDetection, name_of(folder)
    with torch.inference_mode(False), torch.no_grad():
        files = allowed_weights(folder, "a GroundingDINO that transformers itself knows")
        config = configuration(folder, MODEL_TYPE, PARTS)
        tokenizer = read_tokenizer(folder, config)
        model = read_model(name, folder, files, config, make=kind, load=kind.from_pretrained)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{name} has no tokenizer.json: copy the whole folder of the model there.")
    return Detector(name=name, patcher=managed(model), tokenizer=tokenizer, **shown_as(folder))


def shown_as(folder: Path) -> dict[str, tuple]:
    """How a folder says that pictures are shown. Raises ValueError for sizes and colours that are none."""
    said = read_json(folder, "preprocessor_config.json")
    size = said.get("size", {})
    size = size if isinstance(size, dict) else {}
    sizes = size.get("shortest_edge", SIZES[0]), size.get("longest_edge", SIZES[1])
    mean, deviation = said.get("image_mean", MEAN), said.get("image_std", DEVIATION)
    if not all(type(side) is int and MIN_SHOWN <= side <= MOST_SHOWN for side in sizes):
        raise ValueError(
            f"preprocessor_config.json of {name_of(folder)} has the size {quoted(list(sizes))}, sides from {MIN_SHOWN} "
            f"to {MOST_SHOWN} are shown: {COPY_AGAIN}."
        )
    for values in (mean, deviation):
        if not isinstance(values, list | tuple) or len(values) != 3 or not all(is_colour(v) for v in values):
            raise ValueError(
                f"preprocessor_config.json of {name_of(folder)} has the colours {quoted(values)}, three numbers from 0 "
                f"to 1 are read: {COPY_AGAIN}."
            )
    if not all(deviation):
        raise ValueError(f"preprocessor_config.json of {name_of(folder)} has an image_std of 0: {COPY_AGAIN}.")
    return {"sizes": sizes, "mean": tuple(mean), "deviation": tuple(deviation)}


def is_colour(value: Any) -> bool:
    """Whether a value of JSON is a number from 0 to 1."""
    return type(value) in (int, float) and 0 <= value <= 1
