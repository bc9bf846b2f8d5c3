"""A phrase of its own for a region: encoded by itself, put behind the prompt, and seen by one part of the picture only.

Masked words of one sentence were read together by the text encoder, and each has left something in the others. A phrase
that is encoded alone has not. Where the network makes another text of the encoded one, each phrase waits beside the
prompt and is adapted alone.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.cross_attention_mask import feathered
from .. import host
from ..quoting import quoted
from ..settings import Settings
from ..words import ChosenWords, rows_of, without_padding
from .attention import NAME, attach
from .regions import MODES, Hidden, Region

TECHNIQUE = "Phrase in Region"
RENORMALISED = "after softmax, renormalised"
EVERY_WAY = Hidden(picture=True, text=True, refiner=True)
OWN_WAYS = Hidden(picture=True, text=True, refiner=True, others_see=True)


@dataclass(frozen=True)
class PhraseSettings(Settings):
    """What a region shows, and how much of the prompt it still sees; see PalimpsestRegionPhrase."""

    phrase: str = ""
    prompt_inside: float = 1.0
    feather: float = 0.0
    start_percent: float = 0.0
    end_percent: float = 1.0


def add_phrase(
    model: Any, clip: Any, positive: list, mask: Tensor, settings: PhraseSettings, remarks: host.Remarks = host.UNHEARD
) -> tuple[Any, list]:
    """(a clone of the model in which a phrase is seen in one part of the picture, the prompt with the phrase behind).

    Raises ValueError for an empty phrase, one of another model's text encoder, what is no mask, and an empty span.
    """
    family = host.family_of(model)
    adapted = family is not None and family.adapted
    phrase = encoded(clip, settings.phrase, adapted)
    joined = [(beside if adapted else behind)(tensor, extra, phrase) for tensor, extra in positive]
    own = ChosenWords(
        (settings.phrase.strip(),),
        (tuple(range(phrase.rows)),),
        phrase.text,
        length=phrase.rows,
        phrase=phrase.name if adapted else "",
        nth=len(rows_of(phrase.text[0], positive[0][0])),
    )
    name = uuid.uuid4().hex
    regions = [region(model, own, mask, settings, remarks, name)]
    if settings.prompt_inside < 1:
        texts = [tensor[:1] for tensor, _ in positive]
        rows = min(host.adapted_rows(text, extra.get(host.IDS)) for text, extra in positive)
        prompt = ChosenWords(("the prompt",), (tuple(range(rows)),), texts[0], tuple(texts[1:]), rows, nth=0)
        regions.append(region(model, prompt, mask, settings, remarks, name, outside=1 - settings.prompt_inside))
    patched = model.clone()
    attach(patched, host.word_layers(model, TECHNIQUE), regions=tuple(regions))
    return patched, joined


def region(
    model: Any,
    words: ChosenWords,
    mask: Tensor,
    settings: PhraseSettings,
    remarks: host.Remarks,
    node: str,
    outside: float | None = None,
) -> Region:
    """Words that are seen inside a mask only, or so much less inside of it and by the node's phrase than elsewhere."""
    mask = mask.reshape(-1, *mask.shape[-2:]).float()
    host.picture_rows(mask, len(mask), 1, 1)
    return Region(
        name=f"{NAME}.{uuid.uuid4().hex}",
        words=words,
        mask=feathered(mask.clamp(0, 1), settings.feather),
        mode=MODES[RENORMALISED],
        outside=outside is not None,
        strength=1.0 if outside is None else outside,
        layers=frozenset(layer.key for layer in host.word_layers(model, TECHNIQUE)),
        window=host.Window.of(model, settings.start_percent, settings.end_percent),
        mask_negative=False,
        remarks=remarks,
        hidden=EVERY_WAY if outside is None else OWN_WAYS,
        technique=TECHNIQUE,
        source=TECHNIQUE,
        phrase_of=node,
    )


def encoded(clip: Any, phrase: str, adapted: bool) -> host.Phrase:
    """A phrase as the text encoder reads it alone, without what pads it; adapted: for a network that adapts text."""
    if clip is None:
        raise ValueError("clip is empty: this checkpoint holds no text encoder; connect one (Load CLIP).")
    if not phrase.strip():
        raise ValueError("phrase is empty: write what the region shows, for instance 'a red fox'.")
    made = clip.encode_from_tokens_scheduled(clip.tokenize(phrase))
    if len(made) > 1:
        raise ValueError(
            f"the text encoder changes during the sampling and gives {len(made)} texts of {quoted(phrase)}: connect "
            "the clip from before that schedule."
        )
    (text, extra), name = made[0], uuid.uuid4().hex
    if adapted:
        return host.Phrase(name, text, extra.get(host.IDS), extra.get(host.WEIGHTS))
    return host.Phrase(name, text[:, : without_padding(clip, phrase, text.shape[1])])


def behind(text: Tensor, extra: dict, phrase: host.Phrase) -> list:
    """A prompt (B, L, D) with a phrase behind it, (B, L + P, D)."""
    require_one_encoder(text, extra, phrase)
    own = phrase.text.to(text).expand(len(text), -1, -1)
    return [torch.cat([text, own], 1), with_mask(extra, text, phrase.text)]


def beside(text: Tensor, extra: dict, phrase: host.Phrase) -> list:
    """A prompt (B, L, D) as it was, with a phrase that stands behind the text that the network makes of it."""
    require_one_encoder(text, extra, phrase)
    return [text, extra | {host.PHRASES: (*extra.get(host.PHRASES, ()), phrase)}]


def require_one_encoder(text: Tensor, extra: dict, phrase: host.Phrase) -> None:
    """Raise ValueError where another encoder made the prompt (B, L, D) than the phrase."""
    if text.shape[-1] != phrase.text.shape[-1]:
        raise ValueError(
            f"positive has {text.shape[-1]} channels, the phrase {phrase.text.shape[-1]}: connect the clip that "
            "encoded the prompt."
        )
    if extra.get(host.IDS) is not None and phrase.ids is None:
        raise ValueError(
            "positive has tokens for the model's text adapter, and this clip gives the phrase none: connect the clip "
            "that encoded the prompt."
        )


def with_mask(extra: dict, text: Tensor, phrase: Tensor) -> dict:
    """A prompt's options; where they name its tokens that count (attention_mask), the phrase's among them.

    The mask is (B, L), or (B, T, T) of text and picture (Apply Style Model's attn_bias).
    """
    seen = extra.get("attention_mask")
    if isinstance(seen, Tensor) and seen.ndim == 3 and seen.shape[1] == seen.shape[2] >= text.shape[1]:
        return extra | {"attention_mask": wider_square(seen, text.shape[1], phrase.shape[1])}
    if not isinstance(seen, Tensor) or seen.shape[-1] != text.shape[1]:
        return dict(extra)
    return extra | {"attention_mask": torch.cat([seen, seen.new_ones(len(seen), phrase.shape[1])], -1)}


def wider_square(mask: Tensor, first: int, more: int) -> Tensor:
    """A mask (B, T, T) with `more` tokens behind the first ones, which see what the first token sees, and are seen."""
    order = torch.tensor([*range(first), *[0] * more, *range(first, mask.shape[1])], device=mask.device)
    wider = mask[:, order][:, :, order]
    wider[:, :, first : first + more] = mask.dtype == torch.bool
    return wider


def report(mask: Tensor, settings: PhraseSettings, positive: list, family: host.Family | None) -> str:
    """What was asked for, and what of the prompt no mask reaches."""
    where = {"black": "nowhere: the mask is black all over", "white": "everywhere: the mask is white all over"}.get(
        host.one_colour(mask), f"in {float(mask.float().mean()):.0%} of the picture"
    )
    told = [f"{quoted(settings.phrase.strip())} is seen {where}"]
    if settings.prompt_inside < 1:
        told.append(f"there the prompt has {settings.prompt_inside:.0%} of its weight")
        if family is not None and family.pooled:
            told.append("its pooled vector acts everywhere")
    told.append(f"{host.tokens_in(*positive[0])} tokens in all")
    return "; ".join(told)
