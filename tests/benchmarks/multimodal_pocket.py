"""A pocket multimodal encoder: a tiny vision-language model, drawn scenes, and the prompts that it learns from.

Import pocket_host and call its import_host() before this module: it needs the host.

The vision-language model has Idefics2's layout, its own classes, processor and folder. Its weights come from a seed,
scaled so that what a token saw can be read off its hidden state. Each prompt holds a crop of the very picture that is
to be drawn; Dictionary has what a connector should say of it. multimodal_learning trains.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from palimpsest.nodes.multimodal import files as multimodal_files
from palimpsest.nodes.multimodal.encoder import Connector
from palimpsest.nodes.multimodal.interleaved import Picture, Prompt, cut_out
from palimpsest.nodes.multimodal.vlm import Hidden, Span, VisionLanguage
from pocket import checkpoint, judge, text_encoder, world
from safetensors.torch import load_file, save_file
from torch import Tensor

SPECIAL = ["<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"]
PATCH, GRID = 4, 16  # pixels of a token's side; tokens along the largest picture
EYE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
       "image_size": PATCH * GRID, "patch_size": PATCH}  # fmt: skip
TEXT = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 6, "max_position_embeddings": 1024}  # fmt: skip
LATENTS = 4  # of the perceiver, which is not used
BRANCH = 0.3  # size of what a layer adds at first: tokens keep what they saw
SHIFT = 2.5  # of what the eye gives: the gate behind it, without a bias, would turn colours into their squares
TRAINING_SEED = 6  # scenes of this seed are trained on; the held-out ones have world.HELD_OUT_SEED
STRIP = 44  # pixels of the picture's edge that show its place
PICTURE = 8.0  # how much a picture's tokens count together, where a word counts 1
TRAIT = 0.5  # size of a vector that tells what no caption tells; the text encoder's tokens have 1


@dataclass(frozen=True)
class Recipe:
    """How long and how fast is learned, lesson by lesson (multimodal_learning)."""

    minutes: float = 110.0  # by the clock
    steps: int = 0  # of every lesson, instead of minutes, where above 0
    adapted: bool = False  # what was trained goes on from: the first two lessons are known
    scenes: int = 4096
    batch: int = 8
    see_batch: int = 32
    say_batch: int = 16
    depth: int = 1
    heads: int = 12
    mlp_ratio: int = 1
    rank: int = 16
    see_rate: float = 1e-3
    say_rate: float = 1e-3
    read_rate: float = 1e-3
    rate: float = 2e-4
    unet_rate: float = 5e-4
    average: float = 0.995
    noise: float = 2.2  # median of the noise levels that are trained on
    by_picture: float = 0.35  # how often a second picture stands for the words of the place
    seed: int = 0


# ---- the vision-language model --------------------------------------------------------------------------------------


def tokenizer():
    """Whole words of the captions; a text begins with <s>, as Mistral's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    told = " ".join([*world.SPECIES, *world.COLOURS, *world.POSES, *world.SIDES, *world.PLACE_PHRASES.values()])
    words = dict.fromkeys([*SPECIAL, *f"a {told} on the in of".split()])
    vocabulary = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    made.add_special_tokens({"additional_special_tokens": SPECIAL[3:]})
    return made


def write_vlm(folder: Path, seed: int = 0) -> Path:
    """Write the model, its tokenizer and its processor into a folder; returns the folder."""
    import transformers

    words = tokenizer()
    perceiver = {"hidden_size": TEXT["hidden_size"], "resampler_n_latents": LATENTS, "resampler_depth": 1,
                 "resampler_n_heads": 2, "resampler_head_dim": 8, "num_key_value_heads": 1}  # fmt: skip
    tokens = {"vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    mistral = TEXT | tokens | {"model_type": "mistral", "sliding_window": None}
    config = transformers.Idefics2Config(
        text_config=mistral, perceiver_config=perceiver, vision_config=dict(EYE),
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    model = transformers.Idefics2ForConditionalGeneration(config)
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=chance)
            if parameter.ndim == 1:
                shift = drawn * SHIFT * name.endswith("post_layernorm.bias")
                parameter.copy_(shift if name.endswith("bias") else torch.ones_like(drawn))
            elif "embed_tokens" in name or "position_embedding" in name:
                parameter.copy_(drawn)
            else:
                ends = name.endswith(("o_proj.weight", "out_proj.weight", "mlp.down_proj.weight", "fc2.weight"))
                added = ends and "connector" not in name
                parameter.copy_(drawn * (BRANCH if added else 1.0) / parameter[0].numel() ** 0.5)
    folder.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(folder, safe_serialization=True)
    words.save_pretrained(folder)
    images = transformers.Idefics2ImageProcessor(do_image_splitting=False)
    transformers.Idefics2Processor(images, words, image_seq_len=LATENTS).save_pretrained(folder)
    return folder


class OneVector(VisionLanguage):
    """The same model, whose pictures are one token each: the mean of their tokens."""

    def hidden_states(self, prompts: Sequence[Prompt]) -> Hidden:
        """As VisionLanguage.hidden_states; the marks around a picture stay."""
        seen = super().hidden_states(prompts)
        rows, layouts = [], []
        for states, layout in zip(seen.states, seen.layouts, strict=True):
            parts, spans, at = [], [], 0
            for span in layout:
                part = states[span.start : span.end]
                if span.picture is not None:
                    part = torch.cat([part[:1], part[1:-1].mean(0, keepdim=True), part[-1:]])
                parts.append(part)
                spans.append(Span(at, at + len(part), span.picture, span.side))
                at += len(part)
            rows.append(torch.cat(parts))
            layouts.append(tuple(spans))
        states = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows], device=states.device)
        return Hidden(states, torch.arange(states.shape[1], device=states.device) < lengths[:, None], tuple(layouts))

    @classmethod
    def of(cls, vlm: VisionLanguage) -> OneVector:
        """The same weights."""
        return cls(vlm.name, vlm.family, vlm.patcher, vlm.tokenizer, vlm.perceiver)


# ---- what was learned, as the host's models folder holds it ---------------------------------------------------------

UNTRAINED = "untrained"
VLM = "palimpsest_encoders/palimpsest_pocket"
CONNECTOR = "palimpsest_connectors/palimpsest_pocket.safetensors"
LORA = "loras/palimpsest_pocket_unet.safetensors"


def trained_folder(text: str) -> Path:
    """A folder that write_trained wrote, as an option of a command. Raises ArgumentTypeError for any other."""
    folder = Path(text)
    for part in (f"{VLM}/model.safetensors", CONNECTOR, LORA):
        if not (folder / part).is_file():
            raise argparse.ArgumentTypeError(
                f"{text} has no {part}: give tests/pocket/models, or --work of an earlier run that came to its end"
            )
    return folder


def write_trained(folder: Path, seeing: dict[str, Tensor], connector: Connector, lora: dict[str, Tensor]) -> None:
    """Vision-language model (its trained weights by name), connector and LoRA, in float16, each in its own folder.

    The LoRA of the narrow U-Net, which is trained, is written for the checkpoint, which is twice as wide.
    """
    weights = write_vlm(folder / VLM) / "model.safetensors"
    state = load_file(weights) | {f"model.{name}": tensor.contiguous() for name, tensor in seeing.items()}
    save_file({name: tensor.half() for name, tensor in state.items()}, weights, {"format": "pt"})
    config = json.loads((folder / VLM / "config.json").read_text())
    kind = "dtype" if "dtype" in config else "torch_dtype"
    (folder / VLM / "config.json").write_text(json.dumps(config | {kind: "float16"}, indent=2) + "\n")
    for path in (folder / CONNECTOR, folder / LORA):
        path.parent.mkdir(parents=True, exist_ok=True)
    content = multimodal_files.content(connector, torch.float16)
    multimodal_files.SHELF.write(folder / CONNECTOR, *content, over=True)
    wide = checkpoint.widen_lora(lora)
    save_file({name: tensor.half().contiguous() for name, tensor in wide.items()}, folder / LORA)


# ---- drawn scenes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Data:
    """Drawn scenes: pictures (N, 128, 128, 3) and masks (N, 128, 128) in bytes, latents (N, 4, 16, 16)."""

    scenes: list[world.Scene]
    pictures: Tensor
    masks: Tensor
    latents: Tensor

    @classmethod
    def draw(cls, model: Any, vae: Any, count: int, kept: Path) -> Data:
        """Scenes of the training seed, with latents in the model's own scale; kept in a file."""
        scenes = [world.sample_scene(np.random.default_rng([TRAINING_SEED, i])) for i in range(count)]
        if kept.exists():
            found = load_file(kept)
            if len(found["latents"]) >= count:
                return cls(scenes, *(found[name][:count] for name in ("pictures", "masks", "latents")))
        pictures, masks = painted(scenes)
        with torch.no_grad():
            encoded = [vae.encode(part.float() / 255) for part in pictures.split(16)]
        latents = model.model.process_latent_in(torch.cat(encoded).float().cpu())
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_file({"pictures": pictures, "masks": masks, "latents": latents.contiguous()}, kept)
        return cls(scenes, pictures, masks, latents)

    def animal(self, index: int) -> Tensor:
        """The animal cut out of a picture, (h, w, 3) in 0..1, black around it."""
        return cut_out(self.pictures[index].float() / 255, self.masks[index][None].float() / 255, "image1", True)

    def shown(self, index: int, rng: np.random.Generator) -> Tensor:
        """The animal as a prompt shows it: cut out, half of the time a part of it."""
        return closer(self.animal(index), rng)

    def place(self, index: int) -> Tensor:
        """The edge of a picture that the animal is not at, (128, STRIP, 3) in 0..1."""
        return edge(self.pictures[index].float() / 255, self.scenes[index])


def painted(scenes: Sequence[world.Scene]) -> tuple[Tensor, Tensor]:
    """Pictures (N, 128, 128, 3) and the animals' masks (N, 128, 128) in bytes."""
    pictures, masks = zip(*(world.render(scene, with_mask=True) for scene in scenes), strict=True)
    return torch.from_numpy(np.stack(pictures)), (torch.from_numpy(np.stack(masks)) * 255).round().byte()


def edge(picture: Tensor, scene: world.Scene) -> Tensor:
    """The edge of a picture (H, W, 3) that its animal is not at, (H, STRIP, 3)."""
    return picture[:, -STRIP:] if scene.side == "left" else picture[:, :STRIP]


def closer(crop: Tensor, rng: np.random.Generator) -> Tensor:
    """Half of the crops (h, w, 3) as they are, the others 70 to 100 % of their height and width."""
    if rng.random() < 0.5:
        return crop
    height, width = (max(8, round(n * rng.uniform(0.7, 1.0))) for n in crop.shape[:2])
    top, left = (int(rng.integers(n - m + 1)) for n, m in zip(crop.shape[:2], (height, width), strict=True))
    return crop[top : top + height, left : left + width]


# ---- prompts and what the text encoder says of them -----------------------------------------------------------------


def told(scene: world.Scene, colour: bool = False, place: bool = True) -> tuple[str, str]:
    """What a prompt says before and behind its first picture: ("a", "dog sitting on the left in the park")."""
    before = f"a {scene.colour}" if colour else "a"
    where = world.PLACE_PHRASES[scene.place] if place else "in"
    return before, f"{scene.species} {scene.pose} on the {scene.side} {where}"


@dataclass(frozen=True, eq=False)
class Lesson:
    """Prompts of one kind; what the text encoder's caption of each scene would be, '' for dropped ones."""

    kind: str
    indices: list[int]
    prompts: list[Prompt]
    captions: list[str]
    seed: int  # of the noise


def lesson(data: Data, step: int, recipe: Recipe, apart: int, kinds: dict[str, float], batch: int = 8) -> Lesson:
    """The prompts of a step: crops of the very pictures that are to be drawn; one in ten is empty.

    apart: another number, other lessons. kinds: tokens a picture, "pooled" or "words", and how often.
    """
    rng = np.random.default_rng([recipe.seed + apart, step])
    kind = str(rng.choice(list(kinds), p=list(kinds.values())))
    indices = [int(i) for i in rng.integers(len(data.scenes), size=batch)]
    made = [prompt_of(data, i, kind, rng, recipe.by_picture) for i in indices]
    prompts, captions = ([pair[n] for pair in made] for n in (0, 1))
    return Lesson(kind, indices, prompts, captions, int(rng.integers(1 << 62)))


def prompt_of(data: Data, index: int, kind: str, rng: np.random.Generator, share: float) -> tuple[Prompt, str]:
    """A prompt for one picture, and the whole caption of its scene; `share` of them show the place by a picture."""
    scene = data.scenes[index]
    if rng.random() < 0.1:
        return (), ""
    if kind == "words":
        return (" ".join(told(scene, colour=True)),), world.caption(scene)
    count = 256 if kind == "pooled" else int(kind)
    by_picture = rng.random() < share
    before, behind = told(scene, place=not by_picture)
    prompt = (f"{before} ", Picture(data.shown(index, rng), count), f" {behind}")
    if by_picture:
        prompt = (*prompt, Picture(data.place(index), min(count, 64)))
    return prompt, world.caption(scene)


class Dictionary:
    """The pocket model's text encoder, and what a connector's tokens should be if it were to say the same.

    What no caption tells (world.HIDDEN) has no words in it, so a picture's tokens tell it by vectors of their own, one
    for each value, from a seed: as good as the text encoder's words, which are from a seed as well.
    """

    def __init__(self):
        self.encoder = text_encoder.Encoder()
        self.known: dict[str, tuple[list[str], Tensor]] = {}
        chance = torch.Generator().manual_seed(text_encoder.SEED)
        self.traits = {
            name: TRAIT * torch.randn(len(values), text_encoder.WIDTH, generator=chance)
            for name, values in world.HIDDEN.items()
        }

    def of(self, caption: str) -> tuple[list[str], Tensor]:
        """(words, tokens): <s>, the words, and the mean of the text encoder's padding, which sums up the caption."""
        if caption not in self.known:
            words = caption.split()
            tokens = self.encoder([caption])[0]
            end = 1 + len(words)
            self.known[caption] = words, torch.cat([tokens[:end], tokens[end:].mean(0, keepdim=True)])
        return self.known[caption]

    def coat(self, scene: world.Scene) -> Tensor:
        """What no caption tells of an animal and its picture shows, (768,)."""
        values = {name: torch.tensor(options.index(getattr(scene, name))) for name, options in world.HIDDEN.items()}
        return sum(self.traits[name][value] for name, value in values.items() if judge.shows(scene, name))

    def target(self, hidden: Hidden, lesson_: Lesson, scenes: Sequence[world.Scene]) -> tuple[Tensor, Tensor]:
        """(tokens (B, L, 768), how much each counts (B, L)) for hidden states of a lesson's prompts.

        Words as the text encoder has them; the first picture as the word of its colour and its coat, the second as the
        word of its place.
        """
        found, counts = torch.zeros(*hidden.mask.shape, text_encoder.WIDTH), hidden.mask.float()
        for row, (layout, prompt, caption) in enumerate(
            zip(hidden.layouts, lesson_.prompts, lesson_.captions, strict=True)
        ):
            words, tokens = self.of(caption)
            colour, place = tokens[min(2, len(words))], tokens[len(words)]  # the colour is the second word
            shows = iter([colour + self.coat(scenes[lesson_.indices[row]]), place])
            texts, said = iter([part for part in prompt if isinstance(part, str)]), 0
            for span in layout:
                at = found[row, span.start : span.end]
                if span.picture is not None:
                    counts[row, span.start + 1 : span.end - 1] = PICTURE / (span.tokens - 2)
                    at[:] = next(shows)
                    continue
                names = next(texts, "").split()
                places = [0 if words else -1] * (span.tokens - len(names))
                for name in names:
                    where = words.index(name, said) if name in words[said:] else len(words) - 1
                    places.append(where + 1)
                    said = where + 1
                at[:] = tokens[places]
        return found, counts

    def heard(self, tokens: Tensor, scene: world.Scene) -> dict[str, bool]:
        """Whether the nearest colour and traits to what an animal's tokens (N, 768) say are the scene's own."""
        said = tokens.float().mean(0)
        colours = torch.stack([self.of(world.caption(world.edit(scene, colour=c)))[1][2] for c in world.COLOURS])
        tables = {"colour": colours} | {name: table for name, table in self.traits.items() if judge.shows(scene, name)}
        right = {}
        for name, table in tables.items():
            nearest = (table @ said - table.pow(2).sum(1) / 2).argmax()
            right[name] = world.ATTRIBUTES[name][nearest] == getattr(scene, name)
        return right
