"""Vision-language models in the folders that transformers writes, under the host's memory management.

A model is read once, offline, from .safetensors, by transformers' own classes; its large layers are then exchanged for
the host's of the same name and weights, so that the host casts, streams and offloads them as those of any model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .interleaved import Picture, Prompt, squared

BOUNDARY, IMAGE, GLOBAL = "<fake_token_around_image>", "<image>", "<global-img>"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


# ---- families -------------------------------------------------------------------------------------------------------


def projected(model: Any, seen: Tensor, patches: Tensor, perceiver: bool) -> Tensor:
    """Idefics2: a token a patch; or, through its perceiver, as many as that has latents."""
    if perceiver:
        return model.connector(seen, attention_mask=patches.flatten(1))
    return model.connector.modality_projection(seen)


def shuffled(model: Any, seen: Tensor, patches: Tensor, perceiver: bool) -> Tensor:
    """Idefics3, SmolVLM: scale x scale patches become the channels of one token (pixel shuffle)."""
    return model.connector(seen)


@dataclass(frozen=True)
class Family:
    """How a kind of model is shown a picture.

    before, after: what its text says around a picture's tokens. features: (model, what its eye saw (n, patches, D),
    patches (n, rows, columns) all True, perceiver) -> (n, tokens, hidden width). has_perceiver: it may be left out.
    """

    name: str
    before: str
    after: str
    features: Callable[[Any, Tensor, Tensor, bool], Tensor]
    has_perceiver: bool
    tokens: int | None  # a picture where nothing else is said; None: as many as its eye was trained on

    def scale(self, config: Any) -> int:
        """Patches along the side of a token."""
        return 1 if self.has_perceiver else config.scale_factor


FAMILIES = {
    "idefics2": Family("Idefics2", BOUNDARY, BOUNDARY, projected, True, 324),
    "idefics3": Family("Idefics3", BOUNDARY + GLOBAL, BOUNDARY, shuffled, False, None),
    "smolvlm": Family("SmolVLM", BOUNDARY + GLOBAL, BOUNDARY, shuffled, False, None),
}


# ---- folders --------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    """A JSON file of a model folder; empty where there is none. Raises ValueError for one that is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, OSError) as error:
        raise ValueError(f"{path.parent.name}/{path.name} is damaged ({error}): copy the folder again.") from error
    return found if isinstance(found, dict) else {}


def check_folder(folder: Path) -> Family:
    """The family of a model folder. Raises ValueError for one that is no such model, is pickled, or brings code."""
    name = folder.name
    config = read_json(folder / "config.json")
    if not config:
        raise ValueError(f"{name} is no model folder, it has no config.json: copy the whole folder of a model there.")
    for file in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if "auto_map" in read_json(folder / file):
            raise ValueError(
                f"{name} asks to run program code of its own ({file} has an 'auto_map'), which is never done here: "
                f"take a model that transformers itself knows: {families()}."
            )
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{name} is a model of type {kind!r}; this node reads {families()}.")
    if not list(folder.glob("*.safetensors")):
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
        if pickled:
            raise ValueError(
                f"{name} has its weights in {pickled[0]}, a format that can run code when it is read, and only "
                ".safetensors are: take the model in that format."
            )
        raise ValueError(f"{name} has no weights in it (no .safetensors): copy the model's weights there, too.")
    return FAMILIES[kind]


def families() -> str:
    """The names of the families, in words."""
    *first, last = (family.name for family in FAMILIES.values())
    return f"{', '.join(first)} and {last}"


def best_dtype() -> torch.dtype:
    """bfloat16 where the host's device computes in it, else float16 or float32 as the host would choose."""
    import comfy.model_management

    device = comfy.model_management.get_torch_device()
    if comfy.model_management.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if comfy.model_management.should_use_fp16(device) else torch.float32


DTYPES: dict[str, Callable[[], torch.dtype]] = {
    "auto": best_dtype,
    "bfloat16": lambda: torch.bfloat16,
    "float16": lambda: torch.float16,
    "float32": lambda: torch.float32,
}


def load(folder: Path, dtype: str = "auto", perceiver: bool = False) -> VisionLanguage:
    """Read a model folder. Raises ValueError for folders that check_folder refuses and for incomplete weights."""
    family = check_folder(folder)
    import comfy.model_management
    import comfy.model_patcher

    with torch.inference_mode(False), torch.no_grad():
        model, tokenizer = read(folder, DTYPES[dtype]())
        held = Held(hosted(model.eval().requires_grad_(False)))
    unknown = [t for t in (IMAGE, BOUNDARY) if tokenizer.convert_tokens_to_ids(t) in (None, tokenizer.unk_token_id)]
    if unknown:
        raise ValueError(f"the tokenizer of {folder.name} does not know {unknown[0]}: copy the model's folder again.")
    patcher = comfy.model_patcher.CoreModelPatcher(
        held,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.text_encoder_offload_device(),
    )
    return VisionLanguage(folder.name, family, patcher, tokenizer, perceiver and family.has_perceiver)


def read(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """(model without its word-predicting head, tokenizer) by transformers: offline, safetensors, none of its code."""
    import transformers
    from safetensors import SafetensorError

    offline = {"local_files_only": True, "trust_remote_code": False}
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    kind = {"dtype" if version >= (4, 56) else "torch_dtype": dtype}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **offline)
        model, info = transformers.AutoModel.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **kind, **offline
        )
    except (OSError, ImportError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{folder.name} cannot be read: {first.rstrip('.')}. Copy the model's folder again."
        ) from error
    lacking = sorted(info["missing_keys"])
    if lacking or info.get("mismatched_keys"):
        odd = lacking or sorted(map(str, info["mismatched_keys"]))
        raise ValueError(
            f"{folder.name} is incomplete, {len(odd)} of its weights are missing or of another shape, {odd[0]} for "
            "one: copy the model's folder again."
        )
    return model, tokenizer


class Held(nn.Module):
    """A model of transformers where the host's patcher expects a module whose `device` it may note on it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


def hosted(model: nn.Module) -> nn.Module:
    """The model with the host's linear layers and token table in place of torch's: same weights, same names.

    What is left (norms, convolutions of the eye, position tables) is a thousandth of the weights.
    """
    import comfy.ops

    layers = comfy.ops.manual_cast
    table = model.get_input_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                made = layers.Linear(child.in_features, child.out_features, child.bias is not None, device="meta")
            elif child is table:
                made = layers.Embedding(child.num_embeddings, child.embedding_dim, device="meta")
            else:
                continue
            made.weight = child.weight
            made.bias = getattr(child, "bias", None)
            setattr(parent, name, made)
    return model


# ---- what it makes of a prompt --------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Span:
    """Tokens start..end of a prompt: a text, or a picture with the two or three tokens that mark it."""

    start: int
    end: int
    picture: Picture | None = field(default=None, compare=False)
    side: int = 0

    @property
    def tokens(self) -> int:
        """How many."""
        return self.end - self.start


@dataclass(frozen=True, eq=False)
class VisionLanguage:
    """A frozen vision-language model, and how it is shown pictures.

    perceiver: pictures go through the model's own perceiver (Idefics2: 64 tokens each) instead of past it.
    """

    name: str
    family: Family
    patcher: Any
    tokenizer: Any = field(repr=False)
    perceiver: bool = False

    @property
    def model(self) -> Any:
        """transformers' model, without its head."""
        return self.patcher.model.model

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
        """What tells models apart whose hidden states a connector cannot exchange."""
        text, eye = self.config.text_config, self.config.vision_config
        return (
            f"{self.config.model_type} {text.hidden_size}x{text.num_hidden_layers} eye "
            f"{eye.hidden_size}x{eye.num_hidden_layers}"
        )

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def bytes(self) -> int:
        """Size of its weights."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def most_tokens(self) -> int:
        """Tokens of the largest picture its eye can take in."""
        eye = self.config.vision_config
        return (eye.image_size // eye.patch_size // self.family.scale(self.config)) ** 2

    def default_tokens(self) -> int:
        """Tokens a picture where nothing else is said."""
        if self.perceiver:
            return self.config.perceiver_config.resampler_n_latents
        return min(self.family.tokens or self.most_tokens(), self.most_tokens())

    def side(self, tokens: int) -> int:
        """Pixels along a picture's side that make so many tokens. Raises ValueError where none do."""
        eye, scale, most = self.config.vision_config, self.family.scale(self.config), self.most_tokens()
        if self.perceiver:
            latents = self.config.perceiver_config.resampler_n_latents
            if tokens != latents:
                raise ValueError(
                    f"{self.name} shows every picture by {latents} tokens through its perceiver, {tokens} are wanted: "
                    f"take {latents}, or load it with the perceiver bypassed."
                )
            return eye.image_size // eye.patch_size * eye.patch_size
        root = math.isqrt(max(tokens, 0))
        if root * root != tokens or not 1 <= tokens <= most:
            near = min(max(round(math.sqrt(max(tokens, 1))), 1), math.isqrt(most))
            raise ValueError(
                f"{self.name} shows a picture by a square number of tokens from 1 to {most}, {tokens} are wanted: take "
                f"{near * near}."
            )
        return root * scale * eye.patch_size

    def load(self, tokens: int) -> None:
        """Bring the weights to the device, with room for so many tokens, as the host does with any model."""
        import comfy.model_management

        text = self.config.text_config
        room = tokens * (text.intermediate_size * 4 + text.hidden_size * 8) * self.dtype.itemsize
        comfy.model_management.load_models_gpu([self.patcher], memory_required=room)
        device = self.patcher.load_device
        for module in self.model.modules():  # what the host leaves behind when it streams the rest
            if not hasattr(module, "comfy_cast_weights"):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(device)

    def tokenised(self, prompt: Prompt) -> tuple[list[int], list[Span]]:
        """(ids, layout) of a prompt. An empty one is the tokenizer's first token alone.

        Raises ValueError for more tokens than the model can read, and for text that holds the picture token itself.
        """
        text, pictures = "", [part for part in prompt if isinstance(part, Picture)]
        counts = [self.default_tokens() if p.tokens is None else p.tokens for p in pictures]
        sides = [self.side(count) for count in counts]
        expanded = iter(counts)
        for part in prompt:
            if isinstance(part, str) and IMAGE in part:
                raise ValueError(f"the text holds {IMAGE}, which names no picture: write <image1>, <image2>, ...")
            shown = part if isinstance(part, str) else self.family.before + IMAGE * next(expanded) + self.family.after
            text += shown
        ids = self.tokenizer(text)["input_ids"] or [self.first_token()]
        if len(ids) > self.limit:
            shown = ", ".join(f"{p.name} {count}" for p, count in zip(pictures, counts, strict=True))
            raise ValueError(
                f"the prompt has {len(ids)} tokens and {self.name} reads {self.limit} at once (pictures: {shown}): "
                "take fewer tokens a picture, or fewer pictures."
            )
        return ids, self.layout(ids, pictures, counts, sides)

    def first_token(self) -> int:
        """What an empty prompt is."""
        first = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if first is None else first

    def layout(self, ids: list[int], pictures: list[Picture], counts: list[int], sides: list[int]) -> list[Span]:
        """Which tokens are text and which are pictures, each with the marks around it."""
        image = self.tokenizer.convert_tokens_to_ids(IMAGE)
        before, after = (
            len(self.tokenizer(mark, add_special_tokens=False)["input_ids"])
            for mark in (self.family.before, self.family.after)
        )
        spans, at = [], 0
        for picture, count, side in zip(pictures, counts, sides, strict=True):
            first = ids.index(image, at)
            spans += [Span(at, first - before)] if first - before > at else []
            at = first + count + after
            spans.append(Span(first - before, at, picture, side))
        return [*spans, Span(at, len(ids))] if at < len(ids) else spans

    def hidden_states(self, prompts: Sequence[Prompt]) -> Hidden:
        """What the language model thinks of prompts, without a gradient; shorter ones are padded at their end.

        Pictures of one size are looked at together. Raises ValueError as tokenised does.
        """
        read = [self.tokenised(prompt) for prompt in prompts]
        length = max(len(ids) for ids, _ in read)
        self.load(len(prompts) * length)
        model, device = self.model, self.patcher.load_device
        padding = self.tokenizer.pad_token_id
        padding = self.first_token() if padding is None else padding
        ids = torch.tensor([row + [padding] * (length - len(row)) for row, _ in read], device=device)
        mask = torch.tensor([[i < len(row) for i in range(length)] for row, _ in read], device=device)
        with torch.no_grad():
            embedded = model.get_input_embeddings()(ids).to(self.dtype)
            image = mask & (ids == self.tokenizer.convert_tokens_to_ids(IMAGE))
            looked = self.look([(span.picture, span.side) for _, spans in read for span in spans if span.picture])
            if looked:
                embedded = embedded.clone()
                embedded[image] = torch.cat(looked).to(embedded)
            there = None if bool(mask.all()) else mask.long()
            states = model.text_model(inputs_embeds=embedded, attention_mask=there, use_cache=False).last_hidden_state
        return Hidden(states, mask, tuple(tuple(spans) for _, spans in read))

    def look(self, pictures: list[tuple[Picture, int]]) -> list[Tensor]:
        """What stands for pictures in the language model, in their order: (tokens, hidden width) each."""
        model, device = self.model, self.patcher.load_device
        patch, found = self.config.vision_config.patch_size, {}
        for side in sorted({side for _, side in pictures}):
            which = [i for i, (_, other) in enumerate(pictures) if other == side]
            pixels = torch.cat([squared(pictures[i][0].pixels.to(device), side) for i in which]).to(self.dtype)
            patches = torch.ones(len(which), side // patch, side // patch, dtype=torch.bool, device=device)
            seen = model.vision_model(pixel_values=pixels, patch_attention_mask=patches).last_hidden_state
            found |= dict(zip(which, self.family.features(model, seen, patches, self.perceiver), strict=True))
        return [found[i] for i in range(len(pictures))]


def with_lora(vlm: VisionLanguage, weights: dict[str, Tensor], strength: float, name: str) -> VisionLanguage:
    """The model with a LoRA of its own on it. Raises ValueError for a file that fits none of its layers.

    Files as PEFT writes them (base_model.model.<layer>.lora_A.weight) and as this pack does (<layer>.lora_A.weight).
    """
    from dataclasses import replace

    import comfy.lora

    keys = {}
    for key in vlm.patcher.model.state_dict():
        if key.endswith(".weight"):
            layer = key.removeprefix("model.").removesuffix(".weight")
            starts = ("", "model.", "base_model.model.", "base_model.model.model.")
            keys |= {start + layer: key for start in starts}
    patcher = vlm.patcher.clone()
    patches = comfy.lora.load_lora(weights, keys, log_missing=False)
    taken = patcher.add_patches(patches, strength)
    if not taken:
        raise ValueError(
            f"{name} fits no layer of {vlm.name}: pick a LoRA that was trained on this vision-language model; one for "
            "the U-Net belongs in Load LoRA."
        )
    return replace(vlm, patcher=patcher)
