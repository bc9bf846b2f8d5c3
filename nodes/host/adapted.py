"""Text of which a network makes another one before its picture looks at it (Anima), and phrases behind such a prompt.

A text adapter reads all words together, so that a phrase that is to stand alone goes through it alone. The host adapts
a prompt when a run begins; phrases wait beside it in its CONDITIONING and are adapted by the same call of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

PHRASES = "palimpsest_phrases"  # in a CONDITIONING: the phrases behind its prompt
TEXT, IDS, WEIGHTS = "c_crossattn", "t5xxl_ids", "t5xxl_weights"  # the host's keys for what the network is given
LEAST_ADAPTED = 512  # to how many rows Anima pads the text that it makes


def adapted_rows(text: Tensor, ids: Tensor | None) -> int:
    """Rows that the picture looks at, of an encoded text (B, L, D) that is adapted by the tokens ids (..., P)."""
    return text.shape[1] if ids is None else max(ids.shape[-1], LEAST_ADAPTED)


@dataclass(frozen=True, eq=False)
class Phrase:
    """A phrase of its own, as the text encoder gave it.

    text (1, L, D); where a network adapts it, ids (P,) and weights (P,) of the tokens of which that makes rows.
    """

    name: str
    text: Tensor
    ids: Tensor | None = None
    weights: Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows that the picture looks at, with those that pad it."""
        return adapted_rows(self.text, self.ids)


def tokens_in(text: Tensor, extra: Mapping[str, Any]) -> int:
    """Tokens of a prompt (B, L, D) of a CONDITIONING with the phrases behind it, without what pads an adapted text."""
    ids = extra.get(IDS)
    own = text.shape[1] if ids is None else ids.shape[-1]
    return own + sum(tokens_in(phrase.text, {IDS: phrase.ids}) for phrase in extra.get(PHRASES, ()))


def phrase_starts(cond: Mapping[str, Any], rows: int) -> dict[str, int]:
    """The first row of each phrase behind one of the host's prompts, by its name; the text has `rows` with them."""
    phrases = cond.get(PHRASES, ())
    lengths = [phrase.rows for phrase in phrases]
    starts = accumulate(lengths[:-1], initial=rows - sum(lengths))
    return {phrase.name: start for phrase, start in zip(phrases, starts, strict=False)}


@torch.no_grad()
def adapted(model: Any, text: Tensor, ids: Tensor | None, weights: Tensor | None, device: torch.device) -> Tensor:
    """The text (1, M, D) that the network of a host's BaseModel makes of an encoded one, as the host has it made.

    text (1, L, D), ids (1, P), weights (1, P, 1); without ids the text itself.
    """
    if ids is None:
        return text.to(device)
    kind = model.get_dtype_inference()
    weights = None if weights is None else weights.to(text).to(device, kind)
    return model.diffusion_model.preprocess_text_embeds(text.to(device, kind), ids.to(device), t5xxl_weights=weights)


def joined(model: Any, cond: Mapping[str, Any], device: torch.device) -> Any:
    """What the network is given for one of the host's prompts: its text with its phrases behind; None without phrases.

    Each brings the rows that pad it, so that attention to some of them is what it would be to these alone.
    """
    given = cond["model_conds"]
    text, *tokens = (getattr(given.get(name), "cond", None) for name in (TEXT, IDS, WEIGHTS))
    if not cond.get(PHRASES) or text is None:
        return None
    texts = [adapted(model, text, *tokens, device)]
    for phrase in cond[PHRASES]:
        ids = None if phrase.ids is None else phrase.ids[None]
        weights = None if phrase.weights is None else phrase.weights[None, :, None]
        own = adapted(model, phrase.text, ids, weights, device)
        texts.append(own.to(texts[0]).expand(len(texts[0]), -1, -1))
    return type(given[TEXT])(torch.cat(texts, 1))


def with_phrases(
    conds: list[list[dict] | None], model: Any, device: torch.device, kept: Callable[[Any, Callable], Any]
) -> list[list[dict] | None]:
    """The prompts of a model call with the phrases that stand behind some of them, adapted once a run (kept).

    Beside a prompt limited to an area the host puts copies among the others, which have their text but not their keys:
    what was made of a text is known by that text, and copies stand behind what they copy.
    """
    if not any(PHRASES in cond for group in conds for cond in group or ()):
        return conds

    def whole(cond: dict) -> dict:
        given = cond["model_conds"].get(TEXT)
        _, made = kept((PHRASES, id(given)), lambda: (given, joined(model, cond, device)))
        if made is None:
            return cond
        others = {name: value for name, value in cond["model_conds"].items() if name not in (IDS, WEIGHTS)}
        return cond | {"model_conds": others | {TEXT: made}}

    return [None if group is None else [whole(cond) for cond in group] for group in conds]
