"""LLaVA as MGIE runs it: CLIP's vision tower, one linear layer, and Llama, of transformers' own classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.edit_head import IMAGE_TOKENS, where_images_begin
from ...kernels.greedy_decoding import Limits
from .. import host
from ..host.cancelling import Cancellable
from ..multimodal import COPY_AGAIN, DTYPES, Measured, decode, hosted, managed, read_tokenizer, reading
from .edit_head import PREFIX, Reading
from .folder import MgieFolder, tensors_of
from .rows import ImageRows

START, PATCH, END = "<im_start>", "<im_patch>", "<im_end>"
IMAGES = tuple(f"[IMG{i}]" for i in range(IMAGE_TOKENS))
LAYER = -2  # of the vision tower, whose states stand for a picture; its first token is left out
SYSTEM = (  # conversation vicuna_v1_1
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
CLIP_MEAN, CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROJECTOR = {"model.mm_projector.": "projector.", "mm_projector.": "projector."}
TOWER = {"model.vision_tower.vision_tower.": "vision.", "vision_model.": "vision.", "vision_tower.": "vision."}
LANGUAGE = {"model.": "language.model.", "lm_head.": "language.lm_head."}


class Llava(nn.Module):
    """The three parts, where the host's patcher finds them."""

    def __init__(self, config: Any, operations: Any):
        from transformers import CLIPVisionModel, LlamaForCausalLM

        super().__init__()
        self.vision = CLIPVisionModel(config.vision_config)
        self.projector = operations.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.language = LlamaForCausalLM(config.text_config)

    def get_input_embeddings(self) -> Any:
        """The table of tokens."""
        return self.language.get_input_embeddings()

    def look(self, pixels: Tensor) -> Tensor:
        """(B, patches, D): what stands for pictures (B, 3, side, side) in the language model."""
        seen = self.vision(pixel_values=pixels, output_hidden_states=True).hidden_states[LAYER]
        return self.projector(seen[:, 1:])


@dataclass(frozen=True, eq=False)
class MgieModel:
    """MGIE's language model under the host's memory management."""

    name: str
    config: Any
    patcher: Any
    tokenizer: Any = field(repr=False)
    rows: ImageRows | None = None  # learned ones of [IMG0..7], in the place of its own

    @property
    def llava(self) -> Llava:
        """The network."""
        return self.patcher.model.model

    @property
    def bytes(self) -> int:
        """Size of its weights."""
        return sum(p.numel() * p.element_size() for p in self.llava.parameters())

    @property
    def patches(self) -> int:
        """Tokens of a picture."""
        return (self.config.vision_config.image_size // self.config.vision_config.patch_size) ** 2

    def token(self, name: str) -> int:
        """The id of a token."""
        return self.tokenizer.convert_tokens_to_ids(name)

    @property
    def says_images(self) -> bool:
        """Whether it knows [IMG0..7], as MGIE's does; a plain LLaVA writes texts alone."""
        known = self.llava.get_input_embeddings().num_embeddings
        return all(each not in (None, self.tokenizer.unk_token_id) and each < known for each in self.images)

    @property
    def images(self) -> list[int]:
        """The ids of [IMG0..7]."""
        return [self.token(name) for name in IMAGES]

    def require_images(self) -> None:
        """Raise ValueError where it does not know [IMG0..7]."""
        if not self.says_images:
            raise ValueError(f"{self.name} does not know {IMAGES[0]}: convert MGIE's mllm.pt as well.")

    def given(self, tokens: Tensor) -> Tensor:
        """(1, L, D): tokens (1, L) as the language model is given them."""
        table = self.llava.get_input_embeddings()
        found = table(tokens).to(table.weight.dtype)
        return found if self.rows is None else self.rows.embed(found, tokens, self.images)

    def said(self, states: Tensor) -> Tensor:
        """Logits (..., V) of the token that states (..., D) say."""
        logits = self.llava.language.lm_head(states)
        return logits if self.rows is None else self.rows.speak(logits, states, self.images)

    def pixels(self, picture: Tensor) -> Tensor:
        """A picture (H, W, 3) in 0..1 as the vision tower is given it: the square in its middle (1, 3, side, side)."""
        return centre_square(picture, self.config.vision_config.image_size)

    def prompt(self, question: str) -> str:
        """The conversation vicuna_v1_1 up to the model's turn, with one token in the picture's place."""
        return f"{SYSTEM} USER: {question}\n{START}{PATCH}{END} ASSISTANT:"

    def tokens(self, prompt: str) -> list[int]:
        """A prompt's tokens, its picture's all there."""
        patch, found = self.token(PATCH), []
        for token in self.tokenizer(prompt)["input_ids"]:
            found += [token] * (self.patches if token == patch else 1)
        return found

    def load(self, tokens: int) -> None:
        """Bring the weights to the device, with memory for so many tokens, as the host does with any model."""
        import comfy.model_management

        text = self.config.text_config
        width = next(self.llava.language.parameters()).dtype.itemsize
        needed = tokens * (text.intermediate_size * 4 + text.hidden_size * 8) * width
        comfy.model_management.load_models_gpu([self.patcher], memory_required=needed)
        self.settle()

    def settle(self) -> None:
        """Bring what is left to the device, once the host has loaded the rest."""
        device = self.patcher.load_device
        for module in self.llava.modules():  # what the host leaves behind when it streams the rest
            if not hasattr(module, "comfy_cast_weights"):
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    tensor.data = tensor.data.to(device)

    def embedded(self, ids: Sequence[int], pixels: Tensor) -> Tensor:
        """(1, L, D): tokens as the language model is given them, the picture's being what was seen."""
        tokens = torch.tensor([list(ids)], device=self.patcher.load_device)
        embedded = self.given(tokens)
        seen = self.llava.look(pixels.to(embedded)).to(embedded.dtype)
        return embedded.masked_scatter((tokens == self.token(PATCH))[..., None], seen)

    def write(
        self, picture: Tensor, question: str, most: int, heard: Callable[[str, int], None]
    ) -> tuple[Reading, str, int, bool]:
        """(reading, its words, tokens, whether it said [IMG0]) of what the model answers to a question.

        The reading's text is the answer as it is. heard: told of the text so far, and its tokens, after each one.
        """
        prompt, pixels = self.prompt(question), self.pixels(picture)
        ids = self.require_room(self.tokens(prompt), most)
        self.load(len(ids) + most)
        with torch.no_grad(), Cancellable():
            embedded = self.embedded(ids, pixels)
        written, states = decode(
            self.llava.language.model,
            {"inputs_embeds": embedded},
            ids,
            embed=self.given,
            speak=self.said,
            limits=Limits(most, frozenset({self.tokenizer.eos_token_id})),
            heard=lambda tokens: heard(self.tokenizer.decode(tokens), len(tokens)),
        )
        image = self.token(IMAGES[0]) if self.says_images else -1
        first, said = where_images_begin([*ids, *written], image, len(states))
        text = self.tokenizer.decode(written)
        read = Reading(prompt, pixels.cpu(), text, states[first : first + IMAGE_TOKENS].float().cpu())
        return read, text, len(written), said

    def read(self, asked: Reading, text: str) -> Reading:
        """The states of the same picture and question where the answer was another text: the model is told it."""
        self.require_images()
        ids = [*self.tokens(f"{asked.prompt} {text}"), *self.images]
        self.require_room(ids, 0)
        self.load(len(ids))
        with torch.no_grad(), Cancellable():
            embedded = self.embedded(ids, asked.pixels)
            states = self.llava.language.model(inputs_embeds=embedded, use_cache=False).last_hidden_state[0]
        first = len(ids) - IMAGE_TOKENS - 1
        return Reading(asked.prompt, asked.pixels, text, states[first : first + IMAGE_TOKENS].float().cpu())

    def require_room(self, ids: list[int], most: int) -> list[int]:
        """The tokens. Raises ValueError for more than the model reads at once."""
        limit = self.config.text_config.max_position_embeddings
        if len(ids) + most > limit:
            raise ValueError(
                f"the question has {len(ids)} tokens with its picture, and {self.name} reads {limit} at once, {most} "
                "of them for the answer: shorten the text."
            )
        return ids


def centre_square(picture: Tensor, side: int) -> Tensor:
    """(1, 3, side, side): the square in the middle of a picture (H, W, 3), normalised as CLIP's pictures were."""
    pixels = picture[..., :3].movedim(-1, 0)[None].float()
    scale = side / min(pixels.shape[-2:])
    size = [max(side, round(length * scale)) for length in pixels.shape[-2:]]
    pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = ((length - side) // 2 for length in size)
    mean, deviation = (pixels.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_DEVIATION))
    return (pixels[..., top : top + side, left : left + side] - mean) / deviation


# ---- reading one ----------------------------------------------------------------------------------------------------


def load_mgie(folder: MgieFolder, dtype: str) -> MgieModel:
    """MGIE's language model. Raises ValueError for folders that are not allowed, and for incomplete weights."""
    import comfy.ops

    config, paths = folder.config(), folder.language_files()
    tokenizer = read_tokenizer(folder.path, config)
    require_tokens(tokenizer, folder.name)
    with torch.inference_mode(False), torch.no_grad():
        state = language_state(paths, DTYPES[dtype]())
        table = state.get("language.model.embed_tokens.weight")
        if table is not None and table.ndim == 2:
            config.text_config.vocab_size = len(table)
        with reading(folder.name), Measured(folder.name, sum(path.stat().st_size for path in paths)):
            llava = Llava(config, host.whole(comfy.ops.manual_cast))
        fill(llava, state, folder.name)
        patcher = managed(hosted(llava))
    made = MgieModel(folder.name, config, patcher, tokenizer)
    known, tokens = llava.get_input_embeddings().num_embeddings, set(tokenizer.get_vocab())
    if len(tokens - (set() if made.says_images else set(IMAGES))) > known:
        raise ValueError(
            f"the tokenizer of {folder.name} has {len(tokenizer)} tokens, its weights know {known}: {COPY_AGAIN}."
        )
    return made


def language_state(paths: Sequence[Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of some files by the names of Llava's; those of later files lie over those of earlier ones."""
    found = {}
    for path in paths:
        for name, tensor in tensors_of(path, lambda name: not name.startswith(PREFIX)):
            place = next((new + name.removeprefix(old) for old, new in names() if name.startswith(old)), None)
            if place is not None and not place.endswith("position_ids"):
                found[place] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return found


def names() -> list[tuple[str, str]]:
    """(published, ours) beginnings of names; the longer stand before those that they begin with."""
    return [*PROJECTOR.items(), *TOWER.items(), *LANGUAGE.items()]


def fill(llava: Llava, state: dict[str, Tensor], name: str) -> None:
    """Put tensors into a network without weights. Raises ValueError for missing ones, and those of another shape."""
    wanted = {key: tuple(tensor.shape) for key, tensor in llava.state_dict().items()}
    inner = {key for key in wanted if key.startswith("vision.vision_model.")}  # until transformers 4
    if inner:
        state = {key.replace("vision.", "vision.vision_model.", 1) if key.startswith("vision.") else key: tensor
                 for key, tensor in state.items()}  # fmt: skip
    odd = sorted(key for key, shape in wanted.items() if key not in state or tuple(state[key].shape) != shape)
    odd = [key for key in odd if not key.startswith(("vision.post_layernorm", "vision.vision_model.post_layernorm"))]
    if odd:
        raise ValueError(
            f"{name} is incomplete, {len(odd)} of its weights are missing or of another shape, {odd[0]} for one: "
            f"{COPY_AGAIN}."
        )
    llava.load_state_dict({key: state[key] for key in wanted if key in state}, strict=False, assign=True)
    for module in llava.modules():
        for key, tensor in module.named_parameters(recurse=False):
            if tensor.is_meta:  # of a layer behind the one whose states are taken
                dtype = state["projector.weight"].dtype
                setattr(module, key, nn.Parameter(torch.zeros(tensor.shape, dtype=dtype), requires_grad=False))


def require_tokens(tokenizer: Any, name: str) -> None:
    """Raise ValueError for a tokenizer without the tokens around a picture."""
    for token in (START, PATCH, END):
        if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer of {name} does not know {token}: convert the published files again.")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name} names no last token: {COPY_AGAIN}.")
