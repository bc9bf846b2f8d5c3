"""MGIE's edit head (arXiv:2309.17102, section 3.2): what a language model means by [IMG0] to [IMG7], as a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IMAGE_TOKENS = 8  # [IMG0] to [IMG7]


@dataclass(frozen=True)
class EditHeadConfig:
    """Sizes of an edit head; the defaults are those of the published one.

    hidden: channels of the language model; width: its own; layers: of its encoder and of its decoder, each; queries:
    tokens of the prompt that it makes; context: their channels, 768 for SD 1.5.
    """

    hidden: int = 4096
    width: int = 512
    heads: int = 4
    layers: int = 4
    feed_forward: int = 2048
    queries: int = 77
    context: int = 768

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]], heads: int = 4) -> EditHeadConfig:
        """The sizes of a head whose tensors have these shapes; nothing in them says how many heads attention has.

        Raises KeyError for tensors of something else.
        """
        width, hidden = shapes["llm2hid.weight"]
        context, _ = shapes["hid2feat.weight"]
        feed_forward, _ = shapes["mapper.encoder.layers.0.linear1.weight"]
        named = {name.split(".")[3] for name in shapes if name.startswith("mapper.encoder.layers.")}
        queries = shapes["query"][1]
        return cls(hidden, width, heads, len(named), feed_forward, queries=queries, context=context)


class EditMapper(nn.Module):
    """The head: Linear, transformer with learned queries, Linear. Names of its tensors are those of the published file.

    prompt = hid2feat(decoder(query, encoder(llm2hid(states + embeddings))))          Apple's ml-mgie, EditMapper

    Both halves are torch's own layers: norm first, ReLU in the feed-forward, a LayerNorm behind the last layer of
    either half, no dropout. Layers come from `operations`: torch.nn, or a set with its names such as the host's.
    """

    def __init__(self, config: EditHeadConfig, operations: Any, dtype: Any = None, device: Any = None):
        super().__init__()
        made = {"dtype": dtype, "device": device}
        self.config = config
        self.llm2hid = operations.Linear(config.hidden, config.width, **made)
        self.query = nn.Parameter(torch.randn(1, config.queries, config.width, **made))
        self.mapper = nn.Transformer(
            d_model=config.width,
            nhead=config.heads,
            num_encoder_layers=config.layers,
            num_decoder_layers=config.layers,
            dim_feedforward=config.feed_forward,
            dropout=0.0,
            batch_first=True,
            norm_first=True,
            custom_encoder=encoder(config, operations, made),
            **made,
        )
        self.hid2feat = operations.Linear(config.width, config.context, **made)

    def forward(self, states: Tensor, embeddings: Tensor) -> Tensor:
        """A prompt (B, queries, context) of the states (B, 8, hidden) at the image tokens and those tokens' embeddings.

        embeddings (8, hidden) or (B, 8, hidden).
        """
        seen = self.llm2hid(states + embeddings)
        return self.hid2feat(self.mapper(seen, self.query.expand(len(seen), -1, -1)))

    def null(self, embeddings: Tensor) -> Tensor:
        """(1, queries, context): the prompt of no text, which stands in the place of CLIP's of an empty one.

        null = head(0, embeddings)
        """
        return self(torch.zeros_like(embeddings).reshape(1, -1, self.config.hidden), embeddings)


def encoder(config: EditHeadConfig, operations: Any, made: Mapping[str, Any]) -> nn.TransformerEncoder:
    """What nn.Transformer makes itself, without its warning that norm first leaves nested tensors out."""
    layer = nn.TransformerEncoderLayer(
        config.width,
        config.heads,
        config.feed_forward,
        dropout=0.0,
        batch_first=True,
        norm_first=True,
        **made,
    )
    norm = operations.LayerNorm(config.width, **made)
    return nn.TransformerEncoder(layer, config.layers, norm, enable_nested_tensor=False)


def where_images_begin(ids: Sequence[int], first: int, states: int) -> tuple[int, bool]:
    """(p, whether [IMG0] was said): the states p to p+7 are the head's, of so many that a language model had.

    p = index([IMG0]) - 1, the state that says [IMG0]; where that was not said, and at most, the last eight but one:
    p = states - 9. Apple's ml-mgie. Raises ValueError for fewer than nine states.
    """
    last = states - IMAGE_TOKENS - 1
    if last < 0:
        raise ValueError(f"a text of {states} tokens holds no {IMAGE_TOKENS} states: ask for a longer one.")
    said = first in ids
    return (min(ids.index(first) - 1, last) if said else last), said
