"""Text encoders that write: what the nodes ask of a host's CLIP, without weights."""

from __future__ import annotations

import torch

ANSWER = "ASSISTANT: The park lies in snow. The cat is red. Alternatively, it rains."


class Writer:
    """A host's text encoder that sees pictures and answers; asked: what it was given, call by call."""

    def __init__(self, answer: str = ANSWER, sees: bool = True):
        self.answer, self.sees, self.asked, self.limits = answer, sees, [], []

    def tokenize(self, text, return_word_ids=False, **more):
        picture = more.get("image")
        self.asked.append((text, None if picture is None else tuple(picture.shape)))
        seen = [({"type": "image", "data": picture}, 1.0)] if self.sees and picture is not None else []
        return {"qwen": [[(1, 1.0), *seen, (2, 1.0)]]}

    def generate(self, tokens, do_sample=True, max_length=256, seed=None):
        assert do_sample is False
        self.limits.append(max_length)
        return [5] * 7

    def decode(self, ids):
        return self.answer if len(self.asked) == 1 or "summarize" not in self.asked[-1][0] else "Snow lies. Red cat."


class Reader:
    """A text encoder of a checkpoint: a text as its letters' numbers, 4 tokens of 24 channels, 8 for long ones."""

    def tokenize(self, text, **_):
        return text

    def encode_from_tokens_scheduled(self, text):
        generator = torch.Generator().manual_seed(sum(map(ord, text)))
        tokens = torch.randn(1, 8 if len(text) > 40 else 4, 24, generator=generator)
        return [[tokens, {"pooled_output": torch.full((1, 3), float(len(text)))}]]
