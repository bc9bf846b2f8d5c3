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

from ..vlm.vision_language import Held, read_json

MODEL_TYPE = "grounding-dino"
DETERMINERS = frozenset(
    ["a", "an", "the", "this", "that", "these", "those", "his", "her", "its", "their", "my", "your", "our", "some",
     "one", "two", "three", "four", "five", "six", "several"]
)  # fmt: skip
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, where a folder says nothing else
SIZES = (800, 1333)  # pixels of the shorter and, at most, of the longer side


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
    spread: tuple[float, ...] = SPREAD

    def detect(self, picture: Tensor, caption: str, box_threshold: float, text_threshold: float) -> list[Detection]:
        """The best box of every phrase of the caption, best first; phrases without their articles.

        picture (H, W, 3) in 0..1. Raises ValueError for a caption that is too long to be read whole.
        """
        import comfy.model_management

        text = caption if caption.rstrip().endswith(".") else caption.rstrip() + "."
        read = self.tokenizer(text.lower(), return_offsets_mapping=True)
        model = self.patcher.model.model
        limit = model.config.max_text_len
        if len(read["input_ids"]) > limit:
            raise ValueError(
                f"the caption that begins with {caption[:40]!r} has {len(read['input_ids'])} tokens and {self.name} "
                f"reads {limit}: shorten it."
            )
        comfy.model_management.load_models_gpu([self.patcher])
        device = self.patcher.load_device
        weight = next(model.parameters())
        for parameter in model.parameters():  # the host leaves some behind where it streams the rest
            parameter.data = parameter.data.to(device)
        inputs = {
            name: torch.tensor([read[name]], device=device)
            for name in ("input_ids", "attention_mask", "token_type_ids")
            if name in read
        }
        with torch.no_grad():
            found = model(pixel_values=self.shown(picture).to(device, weight.dtype), **inputs)
        scores = found.logits[0].float().sigmoid().cpu()[:, : len(read["input_ids"])]
        return best_by_phrase(
            scores, found.pred_boxes[0].float().cpu(), read["offset_mapping"], caption, box_threshold, text_threshold
        )

    def shown(self, picture: Tensor) -> Tensor:
        """(1, 3, h, w): at the model's size, in its range of values."""
        height, width = picture.shape[:2]
        shorter, longest = self.sizes
        scale = min(shorter / min(height, width), longest / max(height, width))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        small = F.interpolate(picture.movedim(-1, 0)[None], size=size, mode="bilinear", antialias=True).clamp(0, 1)
        mean, spread = (torch.tensor(values)[None, :, None, None] for values in (self.mean, self.spread))
        return (small - mean) / spread


def best_by_phrase(
    scores: Tensor, boxes: Tensor, offsets: Sequence[tuple[int, int]], caption: str, box_threshold: float,
    text_threshold: float,
) -> list[Detection]:  # fmt: skip
    """Detections of one picture, the best box of each phrase, best first.

    scores (Q, L): how well each of Q boxes fits each of the caption's L tokens, 0..1. boxes (Q, 4): centre, width and
    height in 0..1. offsets: the characters of each token; empty for the tokenizer's own marks. A box counts from
    box_threshold on; its phrase is the run of tokens of text_threshold and more around its best one.
    """
    words = torch.tensor([end > start and caption[start:end].strip(" .,;:!?") != "" for start, end in offsets])
    best: dict[tuple[int, int], Detection] = {}
    scores = scores.where(words[: scores.shape[1]], scores.new_zeros(()))
    tops, at = scores.max(1)
    for query in (tops >= box_threshold).nonzero()[:, 0].tolist():
        first = last = int(at[query])
        while first > 0 and scores[query, first - 1] >= text_threshold:
            first -= 1
        while last + 1 < scores.shape[1] and scores[query, last + 1] >= text_threshold:
            last += 1
        span = phrase(caption, offsets[first][0], offsets[last][1])
        x, y, w, h = boxes[query].tolist()
        box = tuple(min(max(v, 0.0), 1.0) for v in (x - w / 2, y - h / 2, x + w / 2, y + h / 2))
        score = float(tops[query])
        if span is not None and (span not in best or score > best[span].score):
            best[span] = Detection(*span, box, score)
    return sorted(best.values(), key=lambda each: -each.score)


def phrase(caption: str, start: int, end: int) -> tuple[int, int] | None:
    """start..end widened to whole words, without articles in front; None where nothing is left."""
    while start > 0 and caption[start - 1].isalnum() and caption[start : start + 1].isalnum():
        start -= 1
    while end < len(caption) and caption[end].isalnum() and caption[end - 1].isalnum():
        end += 1
    for word in re.finditer(r"[\w'-]+", caption[start:end]):
        if word.group().lower() not in DETERMINERS:
            return start + word.start(), start + len(caption[start:end].rstrip(" .,;:!?"))
    return None


def places_of(words: Sequence[str], caption: str) -> list[tuple[int, int]]:
    """Where words or phrases stand in a caption, one after the other where one comes twice.

    Raises ValueError for one that is not there.
    """
    found: list[tuple[int, int]] = []
    for word in words:
        pattern = re.compile(r"(?<!\w)" + r"\s+".join(map(re.escape, word.split())) + r"(?!\w)", re.IGNORECASE)
        spots = [match.span() for match in pattern.finditer(caption)] if word.strip() else []
        free = [spot for spot in spots if spot not in found]
        if not free:
            raise ValueError(
                f"the word {word!r} is not in the caption {caption[:60]!r}"
                f"{' that often' if spots else ''}: write words as the caption has them, separated by commas."
            )
        found.append(free[0])
    return found


# ---- folders --------------------------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Raise ValueError for a folder that is no GroundingDINO, brings program code, or has no .safetensors."""
    name, config = folder.name, read_json(folder / "config.json")
    if config.get("model_type") != MODEL_TYPE:
        kind = repr(config.get("model_type")) if config else "none (no config.json)"
        raise ValueError(
            f"{name} is a model of type {kind}, and the detector is a GroundingDINO as transformers writes it: put "
            "such a folder there, or connect boxes or masks instead."
        )
    for file in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if "auto_map" in read_json(folder / file):
            raise ValueError(
                f"{name} asks to run program code of its own ({file} has an 'auto_map'), which is never done here: "
                "take a GroundingDINO that transformers itself knows."
            )
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"{name} has no .safetensors in it, and nothing else is read: take the model in that format.")


def load(folder: Path) -> Detector:
    """Read a GroundingDINO folder: offline, .safetensors only, none of its code. Raises ValueError as check_folder."""
    check_folder(folder)
    import comfy.model_management
    import comfy.model_patcher
    import transformers

    offline = {"local_files_only": True, "trust_remote_code": False}
    with torch.inference_mode(False), torch.no_grad():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **offline)
            model = transformers.GroundingDinoForObjectDetection.from_pretrained(
                folder, use_safetensors=True, **offline
            )
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{folder.name} cannot be read: {first.rstrip('.')}. Copy the model's folder again."
            ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{folder.name} has no tokenizer.json: copy the whole folder of the model there.")
    patcher = comfy.model_patcher.CoreModelPatcher(
        Held(model.eval().requires_grad_(False)),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.text_encoder_offload_device(),
    )
    seen = read_json(folder / "preprocessor_config.json")
    size = seen.get("size", {})
    sizes = int(size.get("shortest_edge", SIZES[0])), int(size.get("longest_edge", SIZES[1]))
    mean, spread = tuple(seen.get("image_mean", MEAN)), tuple(seen.get("image_std", SPREAD))
    return Detector(folder.name, patcher, tokenizer, sizes, mean, spread)
