"""Prompt-to-Prompt (arXiv:2208.01626, Algorithm 1): the edit looks at its words where the source looked at its own.

    M_t*  <- Edit(M_t, M_t*)      cross-attention maps, first 0.8 of the steps
    A_t*  <- A_t                  self-attention maps, first 0.4 of the steps, in layers of at most a quarter of the
                                  latent's places (32 x 32 of SD 1.5's 64 x 64)

Edit is a word swap where words stand in the place of others, and a prompt refinement where words are new:

    M*[j] <- sum_i M[i] / n       j in a run of n tokens that replaces a run of the source's tokens i
    M*[j] <- M[A(j)]              j is the source's token A(j), or what stands behind both prompts' words
    M*[j]                         j is new: its own map

Only the edit's conditional rows change, the source's maps are those of its own branch. With direct inversion
(arXiv:2310.01506) the branch is set back onto the trajectory in every step: see source_branch. The shares of the steps
are those with which the method was published; local blend and reweighting are not built.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from palimpsest.nodes import host
from torch import Tensor

from . import source_branch

CROSS_END = 0.8
SELF_END = 0.4
LARGEST = 1 / 4  # of the latent's places, for self-attention
END_OF_TEXT = 49407


def words_of(ids: list[int]) -> list[int]:
    """A prompt's tokens up to its end."""
    return ids[: ids.index(END_OF_TEXT)] if END_OF_TEXT in ids else ids


def alignment(source: list[int], edit: list[int]) -> tuple[Tensor, Tensor]:
    """Token ids of both prompts, L each -> (spread (L, L), taken (L,)).

    M @ spread is the source's map at every place of the edit's prompt; taken is 1 where it is used and 0 at new words.
    """
    length, (was, now) = len(edit), map(words_of, (source, edit))
    spread, taken = torch.zeros(length, length), torch.ones(length)
    for kind, i, i_end, j, j_end in SequenceMatcher(None, was, now, autojunk=False).get_opcodes():
        if kind == "equal":
            spread[range(i, i_end), range(j, j_end)] = 1.0
        elif kind == "replace":
            spread[i:i_end, j:j_end] = 1.0 / (j_end - j)
        else:
            taken[j:j_end] = 0.0
    for j in range(len(now), length):
        spread[min(len(was) + j - len(now), length - 1), j] = 1.0
    return spread, taken


def edited_maps(source: Tensor, edit: Tensor, spread: Tensor, taken: Tensor) -> Tensor:
    """Edit(M, M*): maps (B, H, N, L), spread (B, L, L), taken (B, L) -> (B, H, N, L)."""
    moved = source @ spread[:, None]
    taken = taken[:, None, None]
    return taken * moved + (1 - taken) * edit


def maps(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """softmax(Q K^T / sqrt(d)) in float32; (B, N, C), (B, L, C) -> (B, H, N, L)."""
    q, k = (t.float().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key))
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


def conditional(options: dict, pictures: int) -> list[slice]:
    """Where the edit's conditional rows stand in a model call."""
    chunks = enumerate(options["cond_or_uncond"])
    return [slice(i * pictures, (i + 1) * pictures) for i, kind in chunks if kind == 0]


@dataclass(frozen=True, eq=False)
class CrossAttention:
    """attn2 replacement: the edit's conditional rows get the source's maps, moved to their own words."""

    spread: Tensor
    taken: Tensor
    end: float

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict, **_: Any) -> Tensor:
        out = host.run_attention(options, None, query, key, value)
        now = source_branch.moment(options)
        if now is None or now.progress >= self.end:
            return out
        heads, spread, taken = options["n_heads"], self.spread.to(query.device), self.taken.to(query.device)
        source = maps(query[-now.pictures :], key[-now.pictures :], heads)
        out = out.clone()
        for rows in conditional(options, now.pictures):
            mixed = edited_maps(source, maps(query[rows], key[rows], heads), spread, taken)
            seen = mixed @ value[rows].float().unflatten(-1, (heads, -1)).transpose(1, 2)
            out[rows] = seen.transpose(1, 2).flatten(2).to(out)
        return out


@dataclass(frozen=True)
class SelfAttention:
    """attn1 replacement: the edit's conditional rows attend where the source does, in the smaller layers."""

    end: float

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict, **_: Any) -> Tensor:
        now = source_branch.moment(options)
        if now is not None and now.progress < self.end and query.shape[1] <= LARGEST * places(options):
            query, key = query.clone(), key.clone()
            for rows in conditional(options, now.pictures):
                query[rows], key[rows] = query[-now.pictures :], key[-now.pictures :]
        return host.run_attention(options, None, query, key, value)


def places(options: dict) -> int:
    """Places of the latent of a model call."""
    height, width = options["original_shape"][-2:]
    return height * width


def apply(
    model: Any,
    trajectory: Any,
    prompts: tuple[list, list],
    exact: bool,
    cross_end: float = CROSS_END,
    self_end: float = SELF_END,
) -> Any:
    """A clone of the model that samples an edit by Prompt-to-Prompt; `exact` adds direct inversion's offsets.

    prompts: CONDITIONING of source and edit, with "token_ids" of every picture beside the embeddings.
    """
    patched = source_branch.add(model, trajectory, prompts[0], exact, max(cross_end, self_end))
    ids = zip(*(prompt[0][1]["token_ids"] for prompt in prompts), strict=True)
    spread, taken = (torch.stack(parts) for parts in zip(*(alignment(*pair) for pair in ids), strict=True))
    for layer in host.cross_attention_layers(model, "Prompt-to-Prompt"):
        patched.set_model_attn2_replace(CrossAttention(spread, taken, cross_end), *layer.key)
    for layer in host.self_attention_layers(model, "Prompt-to-Prompt"):
        patched.set_model_attn1_replace(SelfAttention(self_end), *layer.key)
    return patched
