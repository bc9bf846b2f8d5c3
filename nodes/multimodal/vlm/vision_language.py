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

from ...host import gradient as tuning_runtime
from ..interleaved import Picture, Prompt, squared

BOUNDARY, IMAGE, GLOBAL = "<fake_token_around_image>", "<image>", "<global-img>"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


# ---- families -------------------------------------------------------------------------------------------------------


def siglip(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """What the eye of the Idefics models sees (n, patches, D), and which patches are there: all of them."""
    side = pixels.shape[-1] // model.config.vision_config.patch_size
    patches = torch.ones(len(pixels), side, side, dtype=torch.bool, device=pixels.device)
    return model.vision_model(pixel_values=pixels, patch_attention_mask=patches).last_hidden_state, patches


def projected(model: Any, pixels: Tensor, perceiver: bool) -> Tensor:
    """Idefics2: a token a patch; or, through its perceiver, as many as that has latents."""
    seen, patches = siglip(model, pixels)
    if perceiver:
        return model.connector(seen, attention_mask=patches.flatten(1))
    return model.connector.modality_projection(seen)


def shuffled(model: Any, pixels: Tensor, perceiver: bool) -> Tensor:
    """Idefics3, SmolVLM: scale x scale patches become the channels of one token (pixel shuffle)."""
    return model.connector(siglip(model, pixels)[0])


def merged(model: Any, pixels: Tensor, perceiver: bool) -> Tensor:
    """Qwen2.5-VL: merge x merge patches become one token; a still picture is a film of equal ones, a patch deep."""
    eye = model.config.vision_config
    patch, merge, count = eye.patch_size, eye.spatial_merge_size, len(pixels)
    rows = pixels.shape[-1] // patch
    parts = pixels.unflatten(3, (rows // merge, merge, patch)).unflatten(2, (rows // merge, merge, patch))
    parts = parts.permute(0, 2, 5, 3, 6, 1, 4, 7)[..., None, :, :]  # tokens, patches in a token, channels, pixels
    films = parts.expand(*parts.shape[:-3], eye.temporal_patch_size, patch, patch).reshape(count * rows**2, -1)
    found = model.visual(films, grid_thw=torch.tensor([[1, rows, rows]] * count, device=pixels.device))
    found = getattr(found, "pooler_output", found)  # until transformers 4 it is given back as it is
    return found.reshape(count, (rows // merge) ** 2, -1)


def with_clips_contrast(pixels: Tensor) -> Tensor:
    """Pictures (n, 3, H, W) in -1..1 as CLIP's were normalised, which Qwen2.5-VL was trained with."""
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return ((pixels + 1) / 2 - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(deviation)[:, None, None]


def places_in_line(layouts: Sequence[Sequence[Span]], length: int) -> None:
    """One token behind the other, as transformers counts them where nothing is said."""
    return


def places_in_pictures(layouts: Sequence[Sequence[Span]], length: int) -> Tensor:
    """Qwen2.5-VL: places in time, row and column (3, prompts, length) of tokens.

    They rise together, but for a picture's tokens, which have one time, and their own row and column from there on;
    what follows goes on behind its last row.
    """
    found = torch.zeros(3, len(layouts), length, dtype=torch.long)
    for number, spans in enumerate(layouts):
        begin = 0
        for span in spans:
            places = torch.arange(span.tokens).expand(3, -1).clone()
            if span.picture is not None:
                side = math.isqrt(span.tokens - 2)  # a mark before and a mark behind
                token = torch.arange(side**2)
                places[:, 1:-1] = 1 + torch.stack([torch.zeros_like(token), token // side, token % side])
                places[:, -1] = 1 + side
            found[:, number, span.start : span.end] = begin + places
            begin += int(places[0, -1]) + 1
    return found


@dataclass(frozen=True)
class Family:
    """How a kind of model is shown a picture.

    before, after: what its text says around a picture's tokens, each of which is `image`. look: (model, pictures
    (n, 3, side, side), perceiver) -> (n, tokens, hidden width). scale: patches along the side of a token, of its
    configuration. has_perceiver: it may be left out. tokens: a picture where nothing else is said, None: `most`; most:
    None: as many as its eye was trained on. normalised: pictures in -1..1 as its eye wants them. text: the name of its
    language model. places: where the tokens of prompts stand for it.
    """

    name: str
    before: str
    after: str
    look: Callable[[Any, Tensor, bool], Tensor]
    scale: Callable[[Any], int]
    has_perceiver: bool = False
    tokens: int | None = None
    most: int | None = None
    image: str = IMAGE
    text: str = "text_model"
    normalised: Callable[[Tensor], Tensor] = lambda pixels: pixels
    places: Callable[[Sequence[Sequence[Span]], int], Tensor | None] = places_in_line


FAMILIES = {
    "idefics2": Family("Idefics2", BOUNDARY, BOUNDARY, projected, lambda config: 1, True, 324),
    "idefics3": Family("Idefics3", BOUNDARY + GLOBAL, BOUNDARY, shuffled, lambda config: config.scale_factor),
    "smolvlm": Family("SmolVLM", BOUNDARY + GLOBAL, BOUNDARY, shuffled, lambda config: config.scale_factor),
    "qwen2_5_vl": Family(
        "Qwen2.5-VL", "<|vision_start|>", "<|vision_end|>", merged,
        lambda config: config.vision_config.spatial_merge_size, tokens=324, most=16384, image="<|image_pad|>",
        text="language_model", normalised=with_clips_contrast, places=places_in_pictures,
    ),  # most: of its own processor's largest picture
}  # fmt: skip


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
        if not hasattr(model, family.text):
            raise ValueError(f"{family.name} needs transformers 4.52 or later: update it.")
        held = Held(hosted(model.eval().requires_grad_(False)))
    marks = (family.image, family.after)
    unknown = [t for t in marks if tokenizer.convert_tokens_to_ids(t) in (None, tokenizer.unk_token_id)]
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
        """What tells models apart whose hidden states a connector cannot exchange."""
        text, eye = self.config.text_config, self.config.vision_config
        layers = getattr(eye, "depth", None) or eye.num_hidden_layers
        return f"{self.config.model_type} {text.hidden_size}x{text.num_hidden_layers} eye {eye.hidden_size}x{layers}"

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
        if self.family.most is not None:
            return self.family.most
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
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    tensor.data = tensor.data.to(device)

    def tokenised(self, prompt: Prompt) -> tuple[list[int], list[Span]]:
        """(ids, layout) of a prompt. An empty one is the tokenizer's first token alone.

        Raises ValueError for more tokens than the model can read, and for text that holds the picture token itself.
        """
        family, text, pictures = self.family, "", [part for part in prompt if isinstance(part, Picture)]
        counts = [self.default_tokens() if p.tokens is None else p.tokens for p in pictures]
        sides = [self.side(count) for count in counts]
        expanded = iter(counts)
        for part in prompt:
            if isinstance(part, str) and family.image in part:
                raise ValueError(
                    f"the text holds {family.image}, which names no picture: write <image1>, <image2>, ..."
                )
            text += part if isinstance(part, str) else family.before + family.image * next(expanded) + family.after
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
        image = self.tokenizer.convert_tokens_to_ids(self.family.image)
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

    def hidden_states(self, prompts: Sequence[Prompt], gradient: bool = False) -> Hidden:
        """What the language model thinks of prompts; shorter ones are padded at their end.

        Pictures of one size are looked at together. gradient: keep what autograd needs of all but the eye, where it is
        switched on. Raises ValueError as tokenised does.
        """
        read = [self.tokenised(prompt) for prompt in prompts]
        layouts, length = tuple(tuple(spans) for _, spans in read), max(len(ids) for ids, _ in read)
        self.load(len(prompts) * length)
        model, device = self.model, self.patcher.load_device
        padding = self.tokenizer.pad_token_id
        padding = self.first_token() if padding is None else padding
        ids = torch.tensor([row + [padding] * (length - len(row)) for row, _ in read], device=device)
        mask = torch.tensor([[i < len(row) for i in range(length)] for row, _ in read], device=device)
        there, places = None if bool(mask.all()) else mask.long(), self.family.places(layouts, length)
        where = {} if places is None else {"position_ids": places.to(device)}
        with torch.set_grad_enabled(gradient and torch.is_grad_enabled()):
            if torch.is_grad_enabled():
                make_ordinary(model)
            embedded = model.get_input_embeddings()(ids).to(self.dtype)
            image = mask & (ids == self.tokenizer.convert_tokens_to_ids(self.family.image))
            looked = self.look([(span.picture, span.side) for spans in layouts for span in spans if span.picture])
            if looked:
                embedded = embedded.masked_scatter(image[..., None], torch.cat(looked).to(embedded))
            if torch.is_grad_enabled() and not embedded.requires_grad:  # gradient checkpointing follows nothing else
                embedded = embedded.detach().requires_grad_(True)
            text = self.text(inputs_embeds=embedded, attention_mask=there, use_cache=False, **where)
        return Hidden(text.last_hidden_state, mask, layouts)

    def look(self, pictures: list[tuple[Picture, int]]) -> list[Tensor]:
        """What stands for pictures in the language model, in their order: (tokens, hidden width) each."""
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
                setattr(module, name, nn.Parameter(tuning_runtime.alias(parameter), requires_grad=False))


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
