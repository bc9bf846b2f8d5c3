"""What a vision-language model answers; its language head, which no prompt needs, is read when it is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ....kernels.greedy_decoding import Limits
from ... import host
from ..interleaved import Picture, Prompt
from .decoding import decode
from .folders import weight_files
from .reading import COPY_AGAIN, managed, reading
from .vision_language import VisionLanguage

HEADS = ("lm_head.weight", "model.lm_head.weight", "language_model.lm_head.weight")  # as checkpoints name it


@dataclass(frozen=True)
class Answer:
    """What a model wrote. sent: the text it was given, with <picture> for each picture; tokens: of the answer."""

    text: str
    sent: str
    tokens: int


def language_head(vlm: VisionLanguage) -> Any:
    """The patcher of its language head: the folder's own, or where there is none the table of tokens, as those share.

    Raises ValueError where the folder has neither, and where the head is of another shape than the table.
    """
    import comfy.ops

    table = vlm.model.get_input_embeddings().weight
    weight = read_head(vlm)
    if weight is None and tied(vlm):
        weight = table
    if weight is None:
        raise ValueError(
            f"{vlm.name} has no language head in its folder ({HEADS[0]}), so it writes nothing: take the model as it "
            "was published, or another."
        )
    if tuple(weight.shape) != tuple(table.shape):
        raise ValueError(
            f"the language head of {vlm.name} has the shape {tuple(weight.shape)}, its table of tokens "
            f"{tuple(table.shape)}: {COPY_AGAIN}."
        )
    words, width = weight.shape
    head = host.whole(comfy.ops.manual_cast).Linear(width, words, bias=False, device="meta")
    head.weight = type(head.weight)(weight.detach(), requires_grad=False)
    return managed(head)


def tied(vlm: VisionLanguage) -> bool:
    """Whether a model says words by the table it reads them with."""
    config = vlm.config
    return any(getattr(each, "tie_word_embeddings", False) for each in (config, config.text_config))


def read_head(vlm: VisionLanguage) -> Tensor | None:
    """The language head's weight out of the model's folder; None where there is none."""
    if vlm.folder is None:
        return None
    with reading(vlm.name):
        for path in weight_files(vlm.folder):
            with safe_open(path, "pt") as file:
                for name in HEADS:
                    if name in file.keys():  # noqa: SIM118  (no dictionary)
                        return file.get_tensor(name).to(vlm.dtype)
    return None


def answer(
    vlm: VisionLanguage,
    head: Any,
    picture: Tensor | None,
    question: str,
    *,
    most: int,
    heard: Callable[[str, int], None] = lambda text, tokens: None,
) -> Answer:
    """What a model answers to a question about a picture (H, W, 3) in 0..1, greedily, without repeating three tokens.

    heard: told of the text so far, and its tokens, after each one. Raises ValueError as tokenised does.
    """
    import comfy.model_management

    prompt = turn(vlm, picture, question)
    ids, spans = vlm.tokenised(prompt)
    if len(ids) + most > vlm.limit:
        raise ValueError(
            f"the question has {len(ids)} tokens with its picture, and {vlm.name} reads {vlm.limit} at once, {most} of "
            "them for the answer: shorten the question, or ask for fewer tokens."
        )
    vlm.load(len(ids) + most)
    comfy.model_management.load_models_gpu([vlm.patcher, head])
    rows, mask = vlm.batch([ids], len(ids))
    table, speak = vlm.model.get_input_embeddings(), head.model.model
    with torch.no_grad():
        given = vlm.embedded(rows, mask, [spans])
    written, _ = decode(
        vlm.text,
        given,
        ids,
        embed=lambda tokens: table(tokens).to(vlm.dtype),
        speak=speak,
        limits=Limits(most, ends_of(vlm)),
        positions=vlm.family.positions([spans], len(ids)),
        heard=lambda tokens: heard(said(vlm, tokens), len(tokens)),
    )
    sent = "".join(part if isinstance(part, str) else "<picture>" for part in prompt)
    return Answer(said(vlm, written), sent, len(written))


def turn(vlm: VisionLanguage, picture: Tensor | None, question: str) -> Prompt:
    """A person's turn with a picture and a question, and the beginning of the model's."""
    begin, end = vlm.family.turn
    if picture is None:
        return (f"{begin} {question}{end}" if begin.endswith(":") else f"{begin}{question}{end}",)
    return (begin, Picture(picture), f"{question}{end}")


def ends_of(vlm: VisionLanguage) -> frozenset[int]:
    """The tokens that end an answer."""
    tokenizer = vlm.tokenizer
    named = [tokenizer.convert_tokens_to_ids(token) for token in vlm.family.ends]
    known = {token for token in named if token not in (None, tokenizer.unk_token_id)}
    return frozenset(known | {tokenizer.eos_token_id} - {None})


def said(vlm: VisionLanguage, tokens: list[int]) -> str:
    """The text of some tokens."""
    return vlm.tokenizer.decode(tokens, skip_special_tokens=True).strip()
