"""Attention of transformers, mostly over text and picture together: which call it is, where its tokens stand, and how
to stand in its place.

Two doors of the host reach all of these models: an APPLY_MODEL wrapper, which sees latent and text of a call, and
`optimized_attention_override`, which sees query, key and value of every attention. There is one place for an override.
The wrapper puts ours into it for the length of a call, around whatever stands there by then, so that it matters neither
which node came first nor that others write into that place after us.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .apart import Seen, seen_apart, text_length
from .attention_masks import longer_mask, part_of_mask
from .call import NAME, EachCall, ModelCall, call_of, observe
from .compiled import not_compiled
from .families import Family, patch_in_time, patch_of, text_multiple
from .model import Grid, LayerKey
from .text_first import with_text_checked

JOINT, SEQUENCE = NAME + ".joint", NAME + ".sequence"
OVERRIDE = "optimized_attention_override"
TYPE, NUMBER = "block_type", "block_index"  # the host's keys for the block that an attention stands in

Run = Callable[..., Tensor]


# ---- what there is to know ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sequence:
    """Where tokens stand in the joint sequence of a model call: text, then the picture, then what else there is.

    text: all its tokens, with those that pad it. grid (h, w) of the picture's tokens, frames times. references: tokens
    of reference pictures may follow. layers: how many layers refine text alone before. apart: the picture's tokens are
    a sequence of their own, and text, or vision tokens of CLIP, what they look at elsewhere.
    """

    text: int
    grid: Grid
    frames: int = 1
    layers: int = 0
    apart: bool = False
    vision: int = 0

    @property
    def places(self) -> int:
        """Tokens of the picture itself."""
        return self.frames * self.grid[0] * self.grid[1]

    @property
    def image(self) -> slice:
        """Where the picture's own tokens are among those that look."""
        first = 0 if self.apart else self.text
        return slice(first, first + self.places)


@dataclass(frozen=True, eq=False)
class JointAttention:
    """One attention of a transformer, about to be computed.

    query (R, H, T, D), key and value (R, H, M, D); M is T, or more where another node adds keys. layer: None in one
    that refines text, where T is the text alone. run: the attention that the host or another node would use,
    run(query, key, value, mask, options) -> (R, N, H * D). mask: what the model itself masks by, in any of the host's
    forms, or None. sees_text, sees_picture: what is among its keys; both, but in a refiner and where they are apart.
    """

    call: ModelCall
    layer: LayerKey | None
    sequence: Sequence
    query: Tensor
    key: Tensor
    value: Tensor
    run: Run
    mask: Tensor | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    behind: tuple[Act, ...] = ()  # the acts that have not seen it yet
    sees_text: bool = True
    sees_picture: bool = True

    @property
    def tokens(self) -> int:
        """T."""
        return self.query.shape[2]

    def part(
        self,
        chunk: int | None = None,
        pictures: slice = slice(None),
        queries: Tensor | slice = slice(None),
        keys: Tensor | slice = slice(None),
        value: Tensor | None = None,
    ) -> Tensor:
        """The attention of some queries to some keys, in the rows of one chunk or of all -> (R', N, H * D).

        value: other values (R', H, T, D) for these rows.
        """
        rows, options = slice(None), self.options
        if chunk is not None:
            first, last, _ = pictures.indices(self.call.pictures)
            rows = slice(chunk * self.call.pictures + first, chunk * self.call.pictures + last)
            options = one_chunk(options, chunk)
        value = self.value[rows] if value is None else value
        mask = None if self.mask is None else part_of_mask(self.mask, rows, queries, keys)
        return self.run(self.query[rows][:, :, queries], self.key[rows][:, :, keys], value[:, :, keys], mask, options)

    def beside(self, key: Tensor, value: Tensor, bias: Tensor | None = None) -> JointAttention:
        """The same with more keys and values (R, H, N, D) at the end; bias (R or 1, N): added to their scores."""
        mask = self.mask
        if mask is not None or bias is not None:
            mask = longer_mask(mask, self.key, key.shape[2], bias)
        return replace(self, key=torch.cat([self.key, key], 2), value=torch.cat([self.value, value], 2), mask=mask)

    def with_keys(self, key: Tensor, value: Tensor, bias: Tensor | None = None) -> JointAttention:
        """The same with other keys and values (R, H, M, D); bias: what is added to all scores, in its mask's place."""
        return replace(self, key=key, value=value, mask=self.mask if bias is None else bias)

    def own(self) -> tuple[Tensor, Tensor]:
        """Keys and values (R, H, N, D) of the picture's own tokens."""
        image = self.sequence.image
        return self.key[:, :, image], self.value[:, :, image]

    def with_picture(self, key: Tensor, value: Tensor) -> JointAttention:
        """The same with other keys and values (R, H, N, D) of the picture's own tokens."""
        image, pairs = self.sequence.image, ((self.key, key), (self.value, value))
        parts = ((whole[:, :, : image.start], new, whole[:, :, image.stop :]) for whole, new in pairs)
        return self.with_keys(*(torch.cat(part, 2) for part in parts))

    def passed(self) -> JointAttention | Tensor:
        """What the acts behind make of it: with what to go on, or what comes out, (R, T, H * D)."""
        attention = self
        for i, act in enumerate(self.behind):
            attention = replace(attention, behind=self.behind[i + 1 :])
            made = act(attention)
            if isinstance(made, Tensor):
                return made
            attention = attention if made is None else made
        return attention

    def unrecorded(self) -> JointAttention:
        """The same a second time: acts that only look on have seen it."""
        return replace(self, behind=tuple(getattr(act, "unrecorded", act) for act in self.behind))

    def as_given(self, given: JointAttention) -> bool:
        """Whether no act has changed what is attended to."""
        return all(getattr(self, name) is getattr(given, name) for name in ("query", "key", "value", "mask", "run"))

    def attended(self) -> Tensor:
        """What comes out of it in the end, (R, T, H * D)."""
        made = self.passed()
        return made if isinstance(made, Tensor) else made.part()


def one_chunk(options: Mapping[str, Any], chunk: int) -> dict:
    """The options of a call as they are for the rows of one of its prompts."""
    named = {name: options[name][chunk : chunk + 1] for name in ("cond_or_uncond", "uuids") if name in options}
    return {**options, **named}


def sequence_of(
    family: Family, network: Any, x: Tensor, text: Tensor | None, conds: Mapping[str, Any] | None = None
) -> Sequence:
    """Where tokens stand in a call, from its latent (R, C, H, W) or (R, C, F, H, W) and its text (R, L, D).

    conds: what else the model is given.
    """
    patch, multiple = patch_of(network), text_multiple(network)
    grid = tuple(-(-side // patch) for side in x.shape[-2:])
    frames = -(-x.shape[2] // patch_in_time(network)) if x.ndim == 5 else 1
    if family.apart:
        reads_vision = getattr(network, "img_emb", None) is not None
        vision = getattr((conds or {}).get("clip_fea"), "shape", (0, 0))[-2] if reads_vision else 0
        return Sequence(text_length(text, conds or {}), grid, frames, apart=True, vision=vision)
    length = multiple if text is None else -(-text.shape[1] // multiple) * multiple
    refiner = len(getattr(network, family.refiner)) if family.refiner else 0
    return Sequence(length, grid, frames, refiner)


# ---- what the host calls --------------------------------------------------------------------------------------------

Act = Callable[[JointAttention], "Tensor | JointAttention | None"]
# In what order acts stand, whatever order the nodes have: a row's own keys are recorded and others put beside them;
# rows show theirs to one another; then it is said which of them are seen.
RECORDED, SHARED, SEEN = range(3)


@dataclass(frozen=True)
class Override:
    """optimized_attention_override: shows every joint attention to some acts; earlier: what stood in this place.

    An act gives None where the attention is to go on as it is, another JointAttention with which it is to go on, or
    what comes out of it, (R, T, H * D). Where all give None, the host's own call goes through untouched.
    """

    family: Family
    acts: tuple[tuple[str, Act], ...]
    earlier: Any = None

    @not_compiled
    def __call__(self, function: Run, query: Tensor, key: Tensor, value: Tensor, heads: int, *rest: Any, **named: Any):
        run = function if self.earlier is None else partial(self.earlier, function)
        options = named.get("transformer_options") or {}
        found = self.seen(query, key, heads, named.get("skip_reshape", False), options)
        if found is None:
            return run(query, key, value, heads, *rest, **named)
        split = named.get("skip_reshape", False)
        given = JointAttention(
            call=found.call,
            layer=found.layer,
            sequence=options[SEQUENCE],
            query=heads_apart(query, heads, split),
            key=heads_apart(key, heads, split),
            value=heads_apart(value, heads, split),
            run=partial(run_again, run, heads, rest[1:], named),
            mask=rest[0] if rest else named.get("mask"),
            options=options,
            behind=tuple(act for _, act in self.acts),
            sees_text=found.text,
            sees_picture=found.picture,
        )
        made = given.passed()
        if not isinstance(made, Tensor) and made.as_given(given):
            return run(query, key, value, heads, *rest, **named)
        out = made if isinstance(made, Tensor) else made.part()
        return heads_apart(out, heads, False) if named.get("skip_output_reshape") else out

    def seen(self, query: Tensor, key: Tensor, heads: int, split: bool, options: dict) -> Seen | None:
        """The call and layer of an attention to text or picture, or of one that refines text; None for any other.

        Raises ValueError where another node took tokens out of the sequence, or added rows.
        """
        call, sequence = call_of(options), options.get(SEQUENCE)
        if call is None or sequence is None:
            return None
        tokens, keys = (tensor.shape[2 if split else 1] for tensor in (query, key))
        kind = options.get(TYPE) if self.family.typed else self.family.blocks[0][0]
        layer = None if kind is None or NUMBER not in options else (kind, options[NUMBER], 0)
        if sequence.apart:
            self.require_tokens(call, sequence, tokens, len(query))
            return seen_apart(self.family, call, sequence, layer, tokens, keys)
        if layer is None:
            return Seen(call, None) if tokens == keys and refines_text(call, sequence, tokens) else None
        if tokens == sequence.places:
            return None  # a picture that looks at itself (SD 3.5 medium), or at something of another node
        self.require_tokens(call, sequence, min(tokens, keys), len(query))
        return Seen(call, layer)

    def require_tokens(self, call: ModelCall, sequence: Sequence, tokens: int, rows: int) -> None:
        """Raise ValueError where a layer has fewer tokens than the picture, with its text, or other rows."""
        if tokens < sequence.image.stop or rows != call.chunks * call.pictures:
            there = "the picture has" if sequence.apart else "text and picture are"
            raise ValueError(
                f"a layer of {self.family.name} has {tokens} tokens in {rows} rows, and {there} "
                f"{sequence.image.stop} in {call.chunks * call.pictures}: another node merges, drops or adds some. "
                "Take that node out."
            )


def refines_text(call: ModelCall, sequence: Sequence, tokens: int) -> bool:
    """Whether an attention without a number is one of those that refine text.

    The picture is refined as well, after the text, and may have as many tokens: the text's layers are counted.
    """
    if tokens != sequence.text or not sequence.layers:
        return False
    count = call.kept(SEQUENCE, lambda: [0])
    count[0] += 1
    return count[0] <= sequence.layers


def heads_apart(tensor: Tensor, heads: int, split: bool = False) -> Tensor:
    """(R, T, C), or (R, T, H, D), as (R, H, T, D); as it is where it has that form."""
    return tensor if split else tensor.reshape(*tensor.shape[:2], heads, -1).transpose(1, 2)


def heads_joined(tensor: Tensor) -> Tensor:
    """(R, H, T, D) as (R, T, H * D)."""
    return tensor.transpose(1, 2).flatten(2)


def run_again(
    run: Run, heads: int, rest: tuple, named: dict, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Any
) -> Tensor:
    """The attention that was asked for, with other tensors (R, H, T, D) -> (R, N, H * D)."""
    others = {name: given for name, given in named.items() if name not in ("mask", "skip_output_reshape")}
    others |= {"skip_reshape": True, "transformer_options": options}
    return run(query, key, value, heads, mask, *rest, **others)


def require_no_references(family: Family, network: Any, conds: Mapping[str, Any]) -> None:
    """Raise ValueError where reference pictures stand in front of the picture (Z-Image, and Wan's Fun versions)."""
    fun = getattr(network, "ref_conv", None) is not None and conds.get("reference_latent") is not None
    if (conds.get("ref_latents") and family.refiner) or fun:
        raise ValueError(
            f"reference pictures stand in front of the picture in {family.name}, where its words cannot be "
            "told apart yet: take ReferenceLatent out."
        )


@dataclass(frozen=True)
class Numbered:
    """Block replacement for networks whose attention is not told where it stands: tells it, in a copy of the options.

    The host runs a replaced block of SD3 under torch's checkpoint, which calls it again for a gradient: nothing may be
    noted anywhere else.
    """

    kind: str
    number: int
    earlier: Any = None

    def __call__(self, args: dict, extra: dict) -> dict:
        args = args | {"transformer_options": args["transformer_options"] | {TYPE: self.kind, NUMBER: self.number}}
        return extra["original_block"](args) if self.earlier is None else self.earlier(args, extra)


@dataclass(frozen=True)
class Adapter(EachCall):
    """For the length of a call, tells where its tokens stand and puts our override in its place."""

    family: Family
    acts: tuple[tuple[str, Act], ...] = ()
    stages: Mapping[str, int] = field(default_factory=dict)  # by the acts' names

    def prepared(self, model: Any, x: Tensor, t: Tensor, text: Tensor | None, options: dict, conds: dict) -> dict:
        if call_of(options) is None:
            return options
        network = model.diffusion_model
        require_no_references(self.family, network, conds)
        options[SEQUENCE] = sequence_of(self.family, network, x, text, conds)
        options[OVERRIDE] = Override(self.family, self.acts, options.get(OVERRIDE))
        if not self.family.apart:
            options["patches"] = with_text_checked(options, self.family.name, options[SEQUENCE].text)
        if not self.family.numbered:
            options["patches_replace"] = numbered(self.family, network, options.get("patches_replace", {}))
        return options


def numbered(family: Family, network: Any, replaced: Mapping[str, Mapping]) -> dict:
    """The host's block replacements, with ours around them."""
    present = dict(replaced.get("dit", {}))
    for kind, blocks in family.blocks:
        for number in range(len(getattr(network, blocks))):
            key = (f"{kind}_block", number)
            present[key] = Numbered(kind, number, present.get(key))
    return {**replaced, "dit": present}


def replace_joint(patched: Any, family: Family, name: str, make: Callable[[Any], Act], stage: int = SEEN) -> None:
    """Put an act on every joint attention of a clone: make(the act that stands there under that name, or None)."""
    from comfy.patcher_extension import WrappersMP

    observe(patched)
    present = patched.get_wrappers(WrappersMP.APPLY_MODEL, JOINT)
    adapter = present[0] if present else Adapter(family)
    acts, stages = dict(adapter.acts), {**adapter.stages, name: stage}
    acts[name] = make(acts.get(name))
    ordered = tuple(sorted(acts.items(), key=lambda named: stages[named[0]]))
    if present:
        patched.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, JOINT)
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, JOINT, replace(adapter, acts=ordered, stages=stages))
