"""The ways in which a layer may look at the source, each an object: what it reads, shows, and does with strength."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...kernels.kv_inversion import content_preserving_folded
from .embeddings import LEARNED, SOURCE, KVEmbeddings, LayerEmbeddings
from .recorded import RecordedKV
from .tokens import Part, Tokens

EXTEND, RECOMPUTE, FROZEN = "extend", "recompute", "frozen"


@dataclass(frozen=True)
class Shown:
    """What one layer is shown of P pictures at one step: keys and values (P, M, C).

    own_key, own_value (P, N or 1, 1): in mode recompute the weights of the edit's own K, V. bias (P, M): added to the
    scores of these keys, where the pictures' masks leave different tokens.
    """

    key: Tensor
    value: Tensor
    own_key: Tensor | None = None
    own_value: Tensor | None = None
    bias: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Shown:
        """The same with every tensor changed."""
        return Shown(**{name: None if t is None else change(t) for name, t in vars(self).items()})

    def for_rows(self, rows: int) -> Part:
        """Its keys and values for every row of a call."""
        return Part(self.key.expand(rows, -1, -1), self.value.expand(rows, -1, -1), self.bias)


class Mode(ABC):
    """A way to look at the source.

    needs: the parts of the embeddings it reads. corresponds: its tokens stand for the edit's own, one for one, so that
    sizes must fit and a prompt's area takes its part of them. longer: there are more keys than queries.
    """

    needs: ClassVar[tuple[str, ...]]
    corresponds: ClassVar[bool] = False
    longer: ClassVar[bool] = False

    @abstractmethod
    def shown(self, learned: LayerEmbeddings, mask: Tensor | None) -> Shown:
        """What a layer is shown of one step. mask (P or 1, N): the weight of the source's tokens, None for all."""

    @abstractmethod
    def act(self, tokens: Tokens, shown: Shown, strength: float) -> None:
        """Let a layer's tokens be joined by what it is shown. Raises ValueError where the two do not fit."""


class Extend(Mode):
    """The source's own K, V stand behind the edit's: every query may look at both pictures.

    They are what the untouched network computes on the path that rebuilds the source, without K_hat, V_hat: those mend
    the source's own errors token by token, and mean nothing at another pose.
    """

    needs = (SOURCE,)
    longer = True

    def shown(self, learned: LayerEmbeddings, mask: Tensor | None) -> Shown:
        return visible(learned.k_source, learned.v_source, mask)

    def act(self, tokens: Tokens, shown: Shown, strength: float) -> None:
        """strength weighs the source's keys: its logarithm is added to their scores."""
        part = shown.for_rows(len(tokens.own.key))
        if strength != 1.0:
            weight = tokens.own.key.new_full((1, part.count), math.log(strength))
            part = Part(part.key, part.value, weight if part.bias is None else part.bias + weight)
        tokens.added.append(part)


class Recompute(Mode):
    """K_bar, V_bar from the edit's own K, V and the learned ones (eq. 1; Algorithm 1, stage 3).

    gamma, and the mask m on the tokens, are folded into K_hat once a step (content_preserving_folded).
    """

    needs = (LEARNED,)
    corresponds = True

    def shown(self, learned: LayerEmbeddings, mask: Tensor | None) -> Shown:
        return shown_of(learned, None if mask is None else mask[..., None].to(learned.k_hat))

    def act(self, tokens: Tokens, shown: Shown, strength: float) -> None:
        """strength is the share of the way from K to K_bar."""
        key, value = tokens.own.key, tokens.own.value
        if shown.key.shape[1] != key.shape[1]:
            raise ValueError(
                f"mode recompute learned {shown.key.shape[1]} tokens for a layer that has {key.shape[1]} here: "
                "another node changes the layer's size (a downscale patch?): take it out, or choose mode extend."
            )
        k_bar = content_preserving_folded(key, shown.key, shown.own_key)
        v_bar = content_preserving_folded(value, shown.value, shown.own_value)
        tokens.own = Part(mix(key, k_bar, strength), mix(value, v_bar, strength))


class Frozen(Mode):
    """K_bar, V_bar as they were when the source was rebuilt ("use the learned K_bar, V_bar of the tuning stage")."""

    needs = (LEARNED, SOURCE)

    def shown(self, learned: LayerEmbeddings, mask: Tensor | None) -> Shown:
        return visible(
            content_preserving_folded(learned.k_source, product(learned.k_hat, learned.gamma_k), learned.lambda_k),
            content_preserving_folded(learned.v_source, product(learned.v_hat, learned.gamma_v), learned.lambda_v),
            mask,
        )

    def act(self, tokens: Tokens, shown: Shown, strength: float) -> None:
        """strength is the share of the way from K to K_bar, which stands in the place of the layer's own."""
        own, part = tokens.own, shown.for_rows(len(tokens.own.key))
        if strength != 1.0 and part.key.shape != own.key.shape:
            raise ValueError(
                f"mode frozen at strength {strength:g} needs the tuned size and no source_mask: set strength to 1, or "
                "take mode extend."
            )
        tokens.replaced = True
        tokens.added.append(Part(mix(own.key, part.key, strength), mix(own.value, part.value, strength), part.bias))


MODES: dict[str, Mode] = {EXTEND: Extend(), RECOMPUTE: Recompute(), FROZEN: Frozen()}


def served(kv: KVEmbeddings | RecordedKV) -> list[str]:
    """The modes for which embeddings hold what is read; of weights alone, the source's K, V stand for K_hat, V_hat.

    Of a transformer frozen shows the source's K, V as they are.
    """
    if isinstance(kv, RecordedKV):
        return [name for name in MODES if name != RECOMPUTE or kv.learned is not None]
    held = {SOURCE} if kv.keeps_source else set()
    if not kv.recorded_only:
        held.add(LEARNED)
    return [name for name, mode in MODES.items() if held.issuperset(mode.needs)]


def shown_of(learned: LayerEmbeddings, mask: Tensor | None = None) -> Shown:
    """What mode recompute shows of a layer, with the source's mask (P or 1, N, 1) folded in."""

    def own(weight: Tensor) -> Tensor:
        return weight if mask is None else 1 + mask * (weight - 1)

    return Shown(
        product(learned.k_hat, learned.gamma_k, mask),
        product(learned.v_hat, learned.gamma_v, mask),
        own(learned.lambda_k),
        own(learned.lambda_v),
    )


def product(tensor: Tensor, *weights: Tensor | None) -> Tensor:
    """A tensor times the weights that are given; None is 1, without a pass over memory."""
    for weight in weights:
        tensor = tensor if weight is None else tensor * weight
    return tensor


def mix(own: Tensor, other: Tensor, strength: float) -> Tensor:
    """The share `strength` of the way from the edit's own tensor to the other."""
    return other if strength == 1.0 else torch.lerp(own, other, strength)


def visible(key: Tensor, value: Tensor, mask: Tensor | None) -> Shown:
    """Only the tokens of which at least half is white, or the whitest one if there is none.

    Pictures that leave the same tokens simply have fewer keys; else the hidden ones get a bias of minus infinity.
    """
    if mask is None:
        return Shown(key, value)
    seen = (mask >= 0.5) | (mask == mask.amax(1, keepdim=True))
    if len(seen) == 1 or bool((seen == seen[:1]).all()):
        tokens = seen[0].nonzero()[:, 0]
        return Shown(key[:, tokens], value[:, tokens])
    return Shown(key, value, bias=torch.zeros_like(key[..., 0]).masked_fill(~seen, -math.inf))
