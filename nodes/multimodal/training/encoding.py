"""What other models than the U-Net make of a dataset's pictures and prompts, each of it once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import host
from ...training.pictures import bucket_of, covering
from ..dataset import Dataset, Record
from ..encoder import POOLED_WIDTH
from ..interleaved import Prompt
from ..vlm import Hidden, VisionLanguage
from .course import ALIGN, DRAW, READ
from .lessons import Lesson
from .saying import Speaker
from .settings import CLIP_TEXT, LEARNED, ZEROS


def trained_cells(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """(columns, rows) of the latent of a picture: at its own size, at a bucket's where it has more pixels than that."""
    width, height = size if size[0] * size[1] <= resolution**2 else bucket_of(*size, resolution)
    return width // 8, height // 8


def in_cells(picture: Tensor, columns: int, rows: int) -> Tensor:
    """A picture (1, H, W, 3) for a latent of this size: as it is where it has it, else its middle, smaller."""
    if (picture.shape[2] // 8, picture.shape[1] // 8) == (columns, rows):
        return picture
    return covering(picture.movedim(-1, 1), 8 * columns, 8 * rows).movedim(1, -1)


def cells_of_crops(record: Record, columns: int, rows: int) -> Tensor:
    """How much of each cell of a picture's latent lies in a box of its crops, (1, rows, columns) in 0..1."""
    width, height = record.size
    inside = torch.zeros(1, height, width, 1)
    for left, top, right, bottom in (crop.box for crop in record.crops):
        inside[:, top:bottom, left:right] = 1.0
    return F.adaptive_avg_pool2d(in_cells(inside, columns, rows).movedim(-1, 1), (rows, columns))[0]


def spoken(prompt: Prompt) -> str:
    """The words of a prompt, its pictures left out."""
    return " ".join("".join(words_alone(prompt)).split())


def words_alone(prompt: Prompt) -> Prompt:
    """A prompt without its pictures, which nobody looks at any more."""
    return tuple(part for part in prompt if isinstance(part, str))


@dataclass(frozen=True, eq=False)
class Encoders:
    """The VAE, the language model and the text encoder of a training; what they make is kept on the CPU.

    sizes: (columns, rows) of each picture's latent. pooled_output: which one the U-Net is given, a word of POOLING.
    language_learns: hidden states change with every step, so that they cannot be made ahead.
    """

    model: Any
    vae: Any
    vlm: VisionLanguage
    clip: Any
    dataset: Dataset
    sizes: dict[int, tuple[int, int]]
    pooled_output: str
    language_learns: bool
    speaker: Speaker
    latents: dict[int, Tensor] = field(default_factory=dict)
    in_crops: dict[int, Tensor] = field(default_factory=dict)
    pooled_texts: dict[str, Tensor] = field(default_factory=dict)

    def latent(self, record: int) -> Tensor:
        """A picture's latent (C, h, w) in the model's own scale."""
        if record not in self.latents:
            with torch.no_grad():
                encoded = self.vae.encode(in_cells(self.dataset.picture(record)[None], *self.sizes[record]))
                self.latents[record] = self.model.model.process_latent_in(encoded.float().cpu())[0].clone()
        return self.latents[record]

    def crops(self, record: int) -> Tensor:
        """How much of each cell of a picture's latent its crops show, (1, h, w) in 0..1."""
        if record not in self.in_crops:
            self.in_crops[record] = cells_of_crops(self.dataset.records[record], *self.sizes[record])
        return self.in_crops[record]

    def hidden(self, prompts: Sequence[Prompt]) -> Hidden:
        """What the language model makes of prompts, without a gradient."""
        found = self.vlm.hidden_states(prompts)
        return Hidden(found.states.cpu().clone(), found.mask.cpu().clone(), found.layouts)

    def pooled_text(self, prompt: Prompt) -> Tensor:
        """CLIP's pooled output of a prompt's words, (1, P)."""
        text = spoken(prompt)
        if text not in self.pooled_texts:
            with torch.no_grad():
                pooled = self.clip.encode_from_tokens(self.clip.tokenize(text), return_pooled=True)[1]
            self.pooled_texts[text] = torch.zeros(1, POOLED_WIDTH) if pooled is None else pooled.float().cpu().clone()
        return self.pooled_texts[text]

    def pooled(self, learned: Tensor | None, prompts: Sequence[Prompt]) -> Tensor:
        """The pooled output (B, P) of prompts; learned: the connector's."""
        return POOLING[self.pooled_output](self, learned, prompts)

    def read_words(self, prompts: Sequence[Prompt]) -> None:
        """Let CLIP read prompts now, where its pooled output is wanted, so that it is not loaded later on."""
        for prompt in prompts if self.pooled_output == CLIP_TEXT else ():
            self.pooled_text(prompt)

    def ahead(self, steps: Sequence[Sequence[Lesson]], kind: str) -> list[list[Lesson]]:
        """The lessons of some steps of one kind with everything encoded that can be; the text encoder reads first."""
        if kind != DRAW:
            steps = [
                [replace(each, said=self.speaker.say_all(self.vlm, each.prompts, each.wholes)) for each in lessons]
                for lessons in steps
            ]
        return [[self.seen(lesson, kind) for lesson in lessons] for lessons in steps]

    def seen(self, lesson: Lesson, kind: str) -> Lesson:
        """A lesson of a kind with what VAE and language model make of it."""
        host.stop_if_cancelled()
        if kind != ALIGN:
            for record in lesson.records:
                self.latent(record)
            self.read_words(lesson.prompts)
        if self.language_learns:
            return lesson
        hidden = None if kind == READ else self.hidden(lesson.prompts)
        return replace(lesson, hidden=hidden, prompts=tuple(map(words_alone, lesson.prompts)), wholes=())


def no_pooled(encoders: Encoders, learned: Tensor | None, prompts: Sequence[Prompt]) -> Tensor:
    """Zeros, (B, 1280): the paper removes the encoder that this came from."""
    return torch.zeros(len(prompts), POOLED_WIDTH)


def learned_pooled(encoders: Encoders, learned: Tensor | None, prompts: Sequence[Prompt]) -> Tensor:
    """What the connector makes, (B, 1280), with a gradient."""
    return learned


def text_pooled(encoders: Encoders, learned: Tensor | None, prompts: Sequence[Prompt]) -> Tensor:
    """CLIP's, of the prompts' words, (B, 1280)."""
    return torch.cat([encoders.pooled_text(prompt) for prompt in prompts])


POOLING: dict[str, Callable[[Encoders, Tensor | None, Sequence[Prompt]], Tensor]] = {
    ZEROS: no_pooled,
    LEARNED: learned_pooled,
    CLIP_TEXT: text_pooled,
}
