"""How an edit head learns beside an instruction model, or alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.instruction_head import begin_where_texts_are, joint_loss, prompt_error
from ...kernels.instruction_training import dropout_bands
from .. import training
from ..training.prompts import Prompts
from .examples import Example
from .fit import FitInstruction
from .head import HeadReader

BEGINNING = 256  # examples by which a new head begins


class FitHead(FitInstruction):
    """FitInstruction with prompts of an edit head; the loss is the words' and the edit's together.

    texts: what the text encoder makes of the expressed texts, which the first `text_steps` steps learn to say.
    """

    reads: HeadReader

    def __init__(self, *args: Any, texts: Prompts, **named: Any):
        super().__init__(*args, **named)
        self.texts = texts

    def prepare(self) -> None:
        if self.reads.head.learns_rows:  # the host has loaded the language model beside
            self.reads.language.settle()
        super().prepare()

    def losses(self, step: int, batch: int, rows: list[int]) -> tuple[Tensor, list[float]]:
        examples = [self.examples[row] for row in rows]
        words = self.reads.hear(examples).to(self.device)
        if step < self.settings.text_steps:
            return words + self.text_errors(step, batch, examples), [float("nan")] * len(rows)
        edit, places = super().losses(step, batch, rows)
        return joint_loss(words, edit), places

    def text_errors(self, step: int, batch: int, examples: Sequence[Example]) -> Tensor:
        """(B,): how far the head's prompts are from the text encoder's; without a call of the model."""
        drawn, settings = training.generator_at(self.settings.seed, "step", step, batch), self.settings
        bands = settings.drop_text, settings.drop_both, settings.drop_picture
        told = dropout_bands(torch.rand(len(examples), generator=drawn), *bands)[0].tolist()
        prompts, _ = self.reads.batch(examples, told, self.device)
        texts = [example.told.text if tell else "" for example, tell in zip(examples, told, strict=True)]
        return prompt_error(prompts, self.texts.batch(texts, self.device)[0])

    def draw(self) -> list[Tensor]:
        self.reads.heard = {}
        return super().draw()


def begin(reads: HeadReader, texts: Prompts, examples: Sequence[Example], seed: int) -> None:
    """Let a new head begin where some examples' states, and the text encoder's prompts of them, lie."""
    first = examples[:BEGINNING]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        states = torch.stack([reads.states(example).cpu() for example in first]) + reads.head.added
        reads.heard = {}
        torch.manual_seed(training.generator_at(seed, "edit head begins").initial_seed())
        begin_where_texts_are(reads.head.network, states, texts.batch([each.told.text for each in first], "cpu")[0])
