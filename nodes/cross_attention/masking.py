"""Cross-attention inside the host: words masked by region, and recorders that look on, in one replacement a layer."""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ...kernels.cross_attention_mask import biased_keys, fused, weight
from .. import host
from ..host.areas import Area, NoteAreas
from ..words.words import ChosenWords

NAME = "palimpsest_cross_attention"
RUN, PROMPTS, AREAS = NAME + ".run", NAME + ".prompts", NAME + ".areas"  # in the host's options; see NoteAreas


# ---- which words act where ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mode:
    """What a mask does to a word's attention.

    renormalise: what the word loses goes to the prompt's other words, instead of to nothing. cut: the mask counts as
    black below 0.5 and as white from there on.
    """

    renormalise: bool
    cut: bool


MODES = {
    "after softmax": Mode(renormalise=False, cut=False),
    "after softmax, renormalised": Mode(renormalise=True, cut=False),
    "before softmax (PFB-Diff)": Mode(renormalise=True, cut=True),
}


@dataclass(frozen=True, eq=False)
class Region:
    """One Cross-Attention Mask: words (None: every token) that act in one part of the picture only.

    mask (1 or B, h, w) in 0..1 at any size; outside: they act where it is black. layers: where in the network; window:
    from which noise level to which, the second not included, or None for all. mask_uncond: the same positions of
    negative prompts too.
    """

    name: str
    words: ChosenWords | None
    mask: Tensor
    mode: Mode
    outside: bool
    strength: float
    layers: frozenset[host.LayerKey]
    window: tuple[float, float] | None
    mask_uncond: bool

    def weights(self, area: Area | None, pictures: int, height: int, width: int) -> Tensor:
        """The words' weight at each of a layer's height x width places, (pictures or 1, height * width) in float32."""
        mask = self.mask if area is None else area.crop(self.mask)
        grid = host.picture_rows(mask, pictures, height, width)[: len(mask)].flatten(1)
        return weight((grid >= 0.5).float() if self.mode.cut else grid, self.strength, self.outside)

    def acts(self, call: Call) -> bool:
        """Whether it acts at the noise level of a model call."""
        return self.window is None or self.window[1] < call.sigma <= self.window[0]


# ---- one sampling run -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prompt:
    """A sampled prompt: its text (B, L, D) or None, and whether the host takes it for a negative one."""

    text: Tensor | None
    negative: bool

    @property
    def length(self) -> int:
        """Tokens."""
        return 1 if self.text is None else self.text.shape[1]


def sampled_text(cond: dict) -> Tensor | None:
    """What the model sees of one of the host's prompts.

    Beside a prompt limited to an area the host puts copies of that one among the others, with their text in
    model_conds only; even its id is the same.
    """
    found = cond.get("model_conds", {}).get("c_crossattn")
    return cond.get("cross_attn") if found is None else found.cond


@dataclass(frozen=True, eq=False)
class LayerMask:
    """What the attention of layers of one size needs in one kind of call; see biased_keys. zero: the number."""

    index: Tensor | None
    bias: Tensor
    zero: Tensor

    def attend(self, query: Tensor, key: Tensor, options: dict, value: Tensor) -> Tensor:
        """The layer's attention under the mask, for these values (R, M, C) -> (R, N, C)."""
        nothing = None
        if self.index is not None:
            nothing = self.zero.expand(len(value), len(self.index) - value.shape[1], value.shape[2])
        return fused(partial(host.biased_attention, options), query, key, value, self.index, self.bias, nothing)


class Run:
    """What one sampling run keeps: its prompts, where words stand in them, the layers' masks.

    groups: the guider's prompts by the name it gives them.
    """

    def __init__(self, groups: dict[str, list | None] | None = None) -> None:
        named = [(cond, name) for name, group in (groups or {}).items() for cond in group or ()]
        self.negative = {cond["uuid"]: cond.get("prompt_type", name) == "negative" for cond, name in named}
        self.prompts: dict[tuple, Prompt] = {}
        self.offsets: dict[tuple, tuple[int, ...]] = {}
        self.masks: dict[tuple, LayerMask | None] = {}

    def note(self, conds: list[list | None]) -> dict[tuple, Prompt]:
        """The prompts of a model call by (index of their group, host's id): one object for one prompt in all calls.

        A group is what the guider named it, which the host's copies at its end do not tell. One that the guider does
        not know is another node's.
        """
        found = {}
        for index, group in enumerate(conds):
            for cond in group or ():
                kind = group[0].get("prompt_type") == "negative"
                text, negative = sampled_text(cond), self.negative.get(group[0]["uuid"], kind)
                prompt = self.prompts.setdefault((id(text), negative), Prompt(text, negative))
                found[index, cond["uuid"]] = prompt
        return found

    def starts(self, region: Region, prompt: Prompt) -> tuple[int, ...]:
        """Where in a prompt the region's words are counted from; nowhere if they are not in it."""
        found = (region.name, prompt)
        if found not in self.offsets:
            self.offsets[found] = () if prompt.text is None else region.words.offsets(prompt.text)
        return self.offsets[found]

    def tokens(self, region: Region, prompt: Prompt, joined: int, keys: int) -> set[int]:
        """Which of a layer's keys are the region's words in the rows of a prompt.

        Prompts of different lengths share a call, repeated to `joined` tokens, and the words are in every copy. Keys
        behind those are what another node added.
        """
        if region.words is None:
            return set(range(keys)) if region.mask_uncond or not prompt.negative else set()
        starts = set(self.starts(region, prompt))
        if not starts and prompt.negative and region.mask_uncond:
            starts = {start for other in self.prompts.values() for start in self.starts(region, other)}
        places = {start + place for start in starts for place in region.words.every_position}
        copies = range(0, joined, prompt.length)
        return {copy + place for copy in copies for place in places if place < prompt.length}


@dataclass(frozen=True, eq=False)
class Call:
    """One model call: its noise levels, its prompts in the order of their rows, their areas, its run."""

    sigmas: Tensor
    prompts: tuple[Prompt, ...]
    areas: tuple[Area | None, ...]
    run: Run

    @cached_property
    def sigma(self) -> float:
        """Its noise level, read from the device once, and only where a region asks."""
        return float(self.sigmas.flatten()[0])

    def mask(self, regions: tuple[Region, ...], query: Tensor, key: Tensor, options: dict) -> LayerMask | None:
        """What the regions make of a layer, from the run's memory where it can be; None where nothing is masked."""
        height, width = options["activations_shape"][-2:]
        _, pictures = host.chunk_rows(options, len(query))
        if height * width != query.shape[1]:
            raise ValueError(
                f"the mask of Cross-Attention Mask cannot find its place: a layer of {width} x {height} places asks "
                f"for {query.shape[1]} here because another node merges or tiles them: take that node out."
            )
        dtype = host.attention_dtype(options, query)
        like = (pictures, height, width, key.shape[1], dtype, query.device)
        name = (tuple(region.name for region in regions), self.prompts, self.areas, *like)
        if name not in self.run.masks:
            self.run.masks[name] = self.build(regions, *like)
        return self.run.masks[name]

    def build(
        self, regions: tuple, pictures: int, height: int, width: int, keys: int, dtype: torch.dtype, device: Any
    ) -> LayerMask | None:
        """`mask`, from nothing. Raises ValueError where another node took tokens away."""
        joined = math.lcm(*(prompt.length for prompt in self.prompts))
        masked = [[self.run.tokens(region, prompt, joined, keys) for prompt in self.prompts] for region in regions]
        tokens = sorted({token for rows in masked for row in rows for token in row})
        if not tokens:
            return None
        if tokens[-1] >= keys:
            raise ValueError(
                f"a prompt of {joined} tokens reaches a layer as {keys}: another node shortens the text that the model "
                "sees, and chosen words cannot be found in the rest: take that node out."
            )
        counts = [min(len(region.mask), pictures) for region in regions]
        before = torch.ones(len(self.prompts), max(counts), height * width, len(tokens))
        after = torch.ones_like(before)
        for region, rows in zip(regions, masked, strict=True):
            target = before if region.mode.renormalise else after
            for chunk, (row, area) in enumerate(zip(rows, self.areas, strict=True)):
                columns = [column for column, token in enumerate(tokens) if token in row]
                target[chunk, ..., columns] *= region.weights(area, pictures, height, width)[..., None].cpu()
        if bool((before == 1).all()) and bool((after == 1).all()):
            return None
        index, bias = biased_keys(before, after, tokens, keys)
        bias = bias.to(device, dtype).expand(-1, pictures, -1, -1).flatten(0, 1)[:, None]
        return LayerMask(None if index is None else index.to(device), bias, torch.zeros((), device=device, dtype=dtype))


# ---- what the host calls --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CrossAttention:
    """attn2 replacement: the layer's attention with words masked by region; recorders are shown it.

    Every Cross-Attention Mask adds a region; where several act on a word at a place, their weights are multiplied.
    Without a region in force this is the host's own attention, bit for bit.

    recorders: called as recorder(attend, query, key, options), where attend(value) is this attention for any other
    values (R, M, C) -> (R, N, C): an indicator of some tokens as value gives the share they have of each query.

    previous: another node's replacement that was here before. Under a mask the result is
    previous(Q, K, V) + masked(Q, K, V) - plain(Q, K, V): exact for those that add to the plain attention, as image
    prompts do (IP-Adapter).
    """

    regions: tuple[Region, ...] = ()
    recorders: tuple[Callable, ...] = ()
    previous: Any = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict, **_: Any) -> Tensor:
        mask = self.mask(query, key, options)
        plain = partial(host.run_attention, options, None, query, key)
        attend = plain if mask is None else partial(mask.attend, query, key, options)
        for recorder in self.recorders:
            recorder(attend, query, key, options)
        if self.previous is None:
            return attend(value)
        earlier = self.previous(query, key, value, options)
        return earlier if mask is None else earlier + attend(value) - plain(value)

    def mask(self, query: Tensor, key: Tensor, options: dict) -> LayerMask | None:
        """What the regions in force make of this layer."""
        call, layer = options.get(NAME), host.layer_key(options)
        if call is None:
            return None
        active = tuple(region for region in self.regions if layer in region.layers and region.acts(call))
        return call.mask(active, query, key, options) if active else None


@dataclass(frozen=True)
class StartRun:
    """OUTER_SAMPLE wrapper: a fresh memory for every sampling run, gone when the run ends."""

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        guider = executor.class_obj
        options = guider.model_options.setdefault("transformer_options", {})
        options[RUN] = Run(guider.conds)
        try:
            return executor(*args, **kwargs)
        finally:
            options.pop(RUN, None)


@dataclass(frozen=True)
class RequireWords:
    """OUTER_SAMPLE wrapper: refuse to sample where no prompt holds the chosen words.

    Nodes that look at the source by its own prompt run without them.
    """

    words: ChosenWords = field(repr=False)

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        if executor.class_obj.model_options.get("transformer_options", {}).get(host.OF_A_NODE):
            return executor(*args, **kwargs)
        conds = [cond for group in executor.class_obj.conds.values() for cond in group or ()]
        texts = [text for text in (cond.get("cross_attn") for cond in conds) if text is not None]
        if not any(self.words.offsets(text) for text in texts):
            raise ValueError(
                f"the words {', '.join(map(repr, self.words.words))} of Cross-Attention Mask are in no prompt that is "
                "sampled: theirs was averaged, or encoded by another CLIP or LoRA. Connect the positive output of "
                "Select Words to the sampler; combining, concatenating and areas are fine."
            )
        return executor(*args, **kwargs)


@dataclass(frozen=True)
class NotePrompts:
    """CALC_COND_BATCH wrapper: note the prompts of a model call while the host still names them."""

    def __call__(
        self, executor: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, model_options: dict, **kwargs: Any
    ) -> Any:
        options = model_options.get("transformer_options", {})
        run = options.get(RUN) or Run()  # from outside of a run: its memory lasts as long as the call
        options = options | {RUN: run, PROMPTS: run.note(conds)}
        return executor(model, conds, x, timestep, model_options | {"transformer_options": options}, **kwargs)


@dataclass(frozen=True)
class NoteCall:
    """APPLY_MODEL wrapper: tell the layers which call they are in."""

    def __call__(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict | None = None,
        **kwargs: Any,
    ) -> Any:
        options = dict(transformer_options or {})
        if PROMPTS in options and "uuids" in options:
            rows, areas = zip(options["cond_or_uncond"], options["uuids"], strict=True), options.get(AREAS, {})
            prompts = tuple(options[PROMPTS][row] for row in rows)
            areas = tuple(map(areas.get, options["uuids"]))
            options[NAME] = Call(t, prompts, areas, options[RUN])
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def attach(
    patched: Any,
    layers: list[host.AttentionLayer],
    regions: tuple[Region, ...] = (),
    recorders: tuple[Callable, ...] = (),
) -> None:
    """Add regions or recorders to the cross-attention of some layers of a clone, behind those that are there."""
    from comfy.patcher_extension import WrappersMP

    def attention(earlier: Any) -> CrossAttention:
        ours = earlier if isinstance(earlier, CrossAttention) else CrossAttention(previous=earlier)
        return replace(ours, regions=ours.regions + regions, recorders=ours.recorders + recorders)

    host.replace_attention(patched, "attn2", layers, attention)
    if not patched.get_wrappers(WrappersMP.OUTER_SAMPLE, NAME):
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, NAME, StartRun())
        patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, NAME, NotePrompts())
        patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, NAME, NoteAreas(NAME))
        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, NAME, NoteCall())
    for region in (region for region in regions if region.words is not None):
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, region.name, RequireWords(region.words))


def mask_words(
    model: Any,
    words: ChosenWords | None,
    mask: Tensor,
    mode: str,
    outside: bool,
    strength: float,
    layers: str,
    custom_layers: str,
    mask_uncond: bool,
    start_percent: float,
    end_percent: float,
) -> Any:
    """A clone of the model in which words act in one part of the picture. At strength 0 it is the model, bit for bit.

    words None: every token of the prompts. Raises ValueError for a model without such layers, for layers that it does
    not have, and for every token in a mode that only moves attention from one word to another.
    """
    chosen = choose_layers(model, layers, custom_layers)
    if words is None and MODES[mode].renormalise:
        raise ValueError(
            f"mode {mode!r} gives what a masked word loses to the prompt's other words, and without tokens there are "
            "none: connect tokens from Select Words, or take mode 'after softmax'."
        )
    patched = model.clone()
    if strength == 0.0:
        return patched
    to_sigma = model.get_model_object("model_sampling").percent_to_sigma
    always = start_percent <= 0.0 and end_percent >= 1.0
    region = Region(
        name=f"{NAME}.{uuid.uuid4().hex}",
        words=words,
        mask=mask,
        mode=MODES[mode],
        outside=outside,
        strength=strength,
        layers=frozenset(layer.key for layer in chosen),
        window=None if always else (to_sigma(start_percent), to_sigma(end_percent)),
        mask_uncond=mask_uncond,
    )
    attach(patched, chosen, regions=(region,))
    return patched


# ---- layers ---------------------------------------------------------------------------------------------------------


def in_pfb_diff_object(place: host.Place) -> bool:
    """PFB-Diff's layers for an object (a), at their sizes in SD 1.5: 16 x 16 and 8 x 8, 32 x 32 in the decoder but one.

    The levels are counted from the finest, so that in SDXL, whose finest is 64 x 64 as well, the sizes are the same.
    """
    behind = place.layer.block == "output" and not place.last
    return place.layer.block == "middle" or place.level > 1 or (place.level == 1 and behind)


CUSTOM = "custom"
PRESETS: dict[str, Callable[[host.Place], bool]] = {
    "all": lambda place: True,
    "PFB-Diff object": in_pfb_diff_object,
    "PFB-Diff background": lambda place: place.layer.block == "middle" or place.level > 0,
    "1/1 of the latent": lambda place: place.scale == 1,
    "1/2 of the latent": lambda place: place.scale == 2,
    "1/4 of the latent": lambda place: place.scale == 4,
    "1/8 of the latent": lambda place: place.scale == 8,
}
LAYERS = [*PRESETS, CUSTOM]
PART = re.compile(r"(input|middle|output)(?: (\d+)(?: ?- ?(\d+))?)?(?:\.(\d+))?")


def choose_layers(model: Any, layers: str, custom: str = "") -> list[host.AttentionLayer]:
    """The layers of a preset, or those that `custom` lists. Raises ValueError, naming what exists, if there are none.

    custom: parts with commas between them; each is input, middle or output, a block's number or a range of them behind
    it if not all are meant, and .number for one of several layers in a block: "input 7-8, middle, output 3.1".
    """
    available = host.places(model)
    if layers != CUSTOM:
        chosen = [place.layer for place in available if PRESETS[layers](place)]
        if not chosen:
            scales = ", ".join(f"1/{scale}" for scale in sorted({place.scale for place in available}))
            raise ValueError(f"this model looks at the prompt at {scales} of the latent, not in layers {layers!r}.")
        return chosen
    chosen = []
    for part in filter(None, (part.strip() for part in custom.split(","))):
        found = PART.fullmatch(" ".join(part.lower().split()))
        named = [place.layer for place in available if found and selects(found, place.layer)]
        if not named:
            raise ValueError(
                f"custom_layers: {part!r} is no layer of this model that looks at the prompt. It has "
                f"{listed(available)}; write for instance 'input 1-4, middle, output 3'."
            )
        chosen += named
    if not chosen:
        raise ValueError(f"custom_layers is empty: name layers of this model. It has {listed(available)}.")
    return sorted(set(chosen), key=[place.layer for place in available].index)


def selects(part: re.Match, layer: host.AttentionLayer) -> bool:
    """Whether a part of custom_layers means a layer."""
    block, first, last, index = part.groups()
    return (
        layer.block == block
        and (first is None or int(first) <= layer.number <= int(last or first))
        and (index is None or int(index) == layer.index)
    )


def listed(available: list[host.Place]) -> str:
    """The blocks that look at the prompt, in words."""
    blocks: dict[str, list[int]] = {}
    for place in available:
        blocks.setdefault(place.layer.block, []).append(place.layer.number)
    return "; ".join(
        name if name == "middle" else f"{name} {', '.join(map(str, sorted(set(numbers))))}"
        for name, numbers in blocks.items()
    )
