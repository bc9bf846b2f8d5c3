"""A frozen vision-language model: what it makes of prompts of words and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...host.cancelling import Cancellable
from ...host.gradient import alias
from ..interleaved import Picture, Prompt, squared
from .families import Family
from .spans import Span


@dataclass(frozen=True, eq=False)
class Hidden:
    """What the language model thought of some prompts.

    states (B, L, hidden width): the last layer's, behind its final norm, on the model's device and in its dtype.
    mask (B, L): True for tokens, False for the padding at the end of shorter prompts. layouts: for each prompt, what
    its tokens are.
    """

    states: Tensor
    mask: Tensor
    layouts: tuple[tuple[Span, ...], ...]


@dataclass(frozen=True, eq=False)
class VisionLanguage:
    """A frozen vision-language model, and how it is shown pictures.

    perceiver: pictures go through the model's own perceiver (Idefics2: 64 tokens each) instead of past it. folder: that
    it was read from, where its language head lies.
    """

    name: str
    family: Family
    patcher: Any
    tokenizer: Any = field(repr=False)
    perceiver: bool = False
    folder: Path | None = None

    # ---- what it is

    @property
    def model(self) -> Any:
        """transformers' model, without its head."""
        return self.patcher.model.model

    @property
    def text(self) -> Any:
        """Its language model."""
        return getattr(self.model, self.family.text)

    @property
    def config(self) -> Any:
        """transformers' configuration."""
        return self.model.config

    @property
    def width(self) -> int:
        """Channels of a hidden state."""
        return self.config.text_config.hidden_size

    @property
    def limit(self) -> int:
        """Tokens it can read at once."""
        return self.config.text_config.max_position_embeddings

    @property
    def mark(self) -> str:
        """What tells models apart whose hidden states a connector cannot exchange; it stands in connectors' files."""
        text, vision_tower = self.config.text_config, self.config.vision_config
        layers = getattr(vision_tower, "depth", None) or vision_tower.num_hidden_layers
        return (
            f"{self.config.model_type} {text.hidden_size}x{text.num_hidden_layers} "
            f"eye {vision_tower.hidden_size}x{layers}"
        )

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def bytes(self) -> int:
        """Size of its weights."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    # ---- tokens of a picture

    def max_tokens(self) -> int:
        """Tokens of the largest picture its vision tower can take in."""
        if self.family.max_tokens is not None:
            return self.family.max_tokens
        vision_tower = self.config.vision_config
        return (vision_tower.image_size // vision_tower.patch_size // self.family.scale(self.config)) ** 2

    def default_tokens(self) -> int:
        """Tokens a picture where nothing else is said."""
        if self.perceiver:
            return self.config.perceiver_config.resampler_n_latents
        return min(self.family.tokens or self.max_tokens(), self.max_tokens())

    def side(self, tokens: int) -> int:
        """Pixels along a picture's side that make so many tokens. Raises ValueError where none do."""
        if self.perceiver:
            return self.perceiver_side(tokens)
        root, most = math.isqrt(max(tokens, 0)), self.max_tokens()
        if root * root != tokens or not 1 <= tokens <= most:
            near = min(max(round(math.sqrt(max(tokens, 1))), 1), math.isqrt(most))
            raise ValueError(
                f"{self.name} shows a picture by a square number of tokens from 1 to {most}, {tokens} are wanted: take "
                f"{near * near}."
            )
        return root * self.family.scale(self.config) * self.config.vision_config.patch_size

    def perceiver_side(self, tokens: int) -> int:
        """Pixels along the side of every picture, which the perceiver turns into as many tokens as it has latents."""
        vision_tower, latents = self.config.vision_config, self.config.perceiver_config.resampler_n_latents
        if tokens != latents:
            raise ValueError(
                f"{self.name} shows every picture by {latents} tokens through its perceiver, {tokens} are wanted: "
                f"take {latents}, or load it with the perceiver bypassed."
            )
        return vision_tower.image_size // vision_tower.patch_size * vision_tower.patch_size

    # ---- tokens of a prompt

    def tokenised(self, prompt: Prompt) -> tuple[list[int], list[Span]]:
        """(ids, layout) of a prompt. An empty one is the tokenizer's first token alone.

        Raises ValueError for more tokens than the model can read, and for text that holds the picture token itself.
        """
        pictures = [part for part in prompt if isinstance(part, Picture)]
        counts = [self.default_tokens() if each.tokens is None else each.tokens for each in pictures]
        sides = [self.side(count) for count in counts]
        ids = self.tokenizer(self.written(prompt, counts))["input_ids"] or [self.first_token()]
        if len(ids) > self.limit:
            shown = ", ".join(f"{each.name} {count}" for each, count in zip(pictures, counts, strict=True))
            raise ValueError(
                f"the prompt has {len(ids)} tokens and {self.name} reads {self.limit} at once (pictures: {shown}): "
                "take fewer tokens a picture, or fewer pictures."
            )
        return ids, self.layout(ids, pictures, counts, sides)

    def written(self, prompt: Prompt, counts: Sequence[int]) -> str:
        """A prompt as its tokenizer is given it: every picture as so many picture tokens, with what goes around."""
        family, left, text = self.family, iter(counts), ""
        for part in prompt:
            if isinstance(part, str) and family.image in part:
                raise ValueError(
                    f"the text holds {family.image}, which names no picture: write <image1>, <image2>, ..."
                )
            text += part if isinstance(part, str) else family.before + family.image * next(left) + family.after
        return text

    def first_token(self) -> int:
        """What an empty prompt is."""
        first = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if first is None else first

    def layout(self, ids: list[int], pictures: list[Picture], counts: list[int], sides: list[int]) -> list[Span]:
        """Which tokens are text and which are pictures, each with what goes around it."""
        image = self.tokenizer.convert_tokens_to_ids(self.family.image)
        before, after = (
            len(self.tokenizer(around, add_special_tokens=False)["input_ids"])
            for around in (self.family.before, self.family.after)
        )
        spans, at = [], 0
        for picture, count, side in zip(pictures, counts, sides, strict=True):
            first = ids.index(image, at)
            spans += [Span(at, first - before)] if first - before > at else []
            at = first + count + after
            spans.append(Span(first - before, at, picture, side))
        return [*spans, Span(at, len(ids))] if at < len(ids) else spans

    # ---- hidden states

    def hidden_states(self, prompts: Sequence[Prompt], gradient: bool = False) -> Hidden:
        """What the language model thinks of prompts; shorter ones are padded at their end.

        Pictures of one size are looked at together. gradient: keep what autograd needs of all but the vision tower,
        where it is switched on. Raises ValueError as tokenised does.
        """
        read = [self.tokenised(prompt) for prompt in prompts]
        layouts, length = tuple(tuple(spans) for _, spans in read), max(len(ids) for ids, _ in read)
        self.load(len(prompts) * length)
        ids, mask = self.batch([row for row, _ in read], length)
        token_mask, positions = None if bool(mask.all()) else mask.long(), self.family.positions(layouts, length)
        where = {} if positions is None else {"position_ids": positions.to(ids.device)}
        with torch.set_grad_enabled(gradient and torch.is_grad_enabled()), Cancellable():
            if torch.is_grad_enabled():
                make_ordinary(self.model)
            given = self.embedded(ids, mask, layouts)
            text = self.text(**given, attention_mask=token_mask, use_cache=False, **where)
        return Hidden(text.last_hidden_state, mask, layouts)

    def load(self, tokens: int) -> None:
        """Bring the weights to the device, with memory for so many tokens, as the host does with any model."""
        import comfy.model_management

        text = self.config.text_config
        needed = tokens * (text.intermediate_size * 4 + text.hidden_size * 8) * self.dtype.itemsize
        comfy.model_management.load_models_gpu([self.patcher], memory_required=needed)
        device = self.patcher.load_device
        for module in self.model.modules():  # what the host leaves behind when it streams the rest
            if not hasattr(module, "comfy_cast_weights"):
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    tensor.data = tensor.data.to(device)

    def batch(self, rows: Sequence[list[int]], length: int) -> tuple[Tensor, Tensor]:
        """(ids, mask), each (B, length) on the device, of prompts' tokens: padded at their end."""
        padding, device = self.tokenizer.pad_token_id, self.patcher.load_device
        padding = self.first_token() if padding is None else padding
        ids = torch.tensor([row + [padding] * (length - len(row)) for row in rows], device=device)
        mask = torch.tensor([[i < len(row) for i in range(length)] for row in rows], device=device)
        return ids, mask

    def embedded(self, ids: Tensor, mask: Tensor, layouts: Sequence[Sequence[Span]]) -> dict[str, Any]:
        """What the language model is given, by the names of its inputs.

        inputs_embeds (B, L, hidden width): the tokens, the pictures' being what was seen; where a family shows further
        levels of it, which tokens those belong to (B, L), and each level (picture tokens, hidden width).
        """
        levels: dict[str, Any] = {}
        found = self.model.get_input_embeddings()(ids).to(self.dtype)
        looked = self.look([(span.picture, span.side) for spans in layouts for span in spans if span.picture])
        if looked:
            image = mask & (ids == self.tokenizer.convert_tokens_to_ids(self.family.image))
            top, *more = torch.cat(looked).to(found).split(self.width, dim=-1)
            found = found.masked_scatter(image[..., None], top)
            levels = {"visual_pos_masks": image, "deepstack_visual_embeds": more} if more else {}
        if torch.is_grad_enabled() and not found.requires_grad:  # gradient checkpointing follows nothing else
            found = found.detach().requires_grad_(True)
        return {"inputs_embeds": found, **levels}

    def look(self, pictures: Sequence[tuple[Picture, int]]) -> list[Tensor]:
        """What stands for pictures in the language model, in their order: what its family's `look` gives of each."""
        family, device, found = self.family, self.patcher.load_device, {}
        for side in sorted({side for _, side in pictures}):
            which = [i for i, (_, other) in enumerate(pictures) if other == side]
            pixels = torch.cat([squared(pictures[i][0].pixels.to(device), side) for i in which])
            seen = family.look(self.model, family.normalised(pixels).to(self.dtype), self.perceiver)
            found |= dict(zip(which, seen, strict=True))
        return [found[i] for i in range(len(pictures))]


def make_ordinary(model: nn.Module) -> None:
    """Let autograd save the weights of a model that was moved in inference mode: same memory."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_inference():
                setattr(module, name, nn.Parameter(alias(parameter), requires_grad=False))
