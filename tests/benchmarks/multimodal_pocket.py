"""A pocket multimodal encoder: a tiny random vision-language model, and the training of a connector on drawn scenes.

Import pocket_host and call its import_host() before this module: it needs the host.

The vision-language model has Idefics2's layout, its own classes, processor and folder, and is never trained: its
weights come from a seed, scaled so that what a token saw can be read off its hidden state. All that is learned is in
the connector and in a LoRA on the U-Net.

Training has two stages. First the connector alone learns to say in its tokens what the pocket model's own text encoder
says of the same scene (a target without noise): words become the text encoder's words, the tokens of a picture its
summary of a caption that tells the picture's colour or place. Then connector and LoRA learn by the denoising loss,
which is where they learn what captions never tell. Each prompt holds a crop of the very picture that is to be drawn.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from palimpsest.kernels.reference.connector import ConnectorConfig, attend
from palimpsest.nodes.patches import multimodal_lora
from palimpsest.nodes.patches.interleaved import Picture, Prompt, cut_out
from palimpsest.nodes.patches.multimodal import Connector, Reads
from palimpsest.nodes.patches.vision_language import Hidden, Span, VisionLanguage
from pocket import checkpoint, text_encoder, world
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SPECIAL = ["<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"]
PATCH, GRID = 4, 16  # pixels of a token's side; tokens along the largest picture
EYE = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 4,
       "image_size": PATCH * GRID, "patch_size": PATCH}  # fmt: skip
TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 1024}  # fmt: skip
LATENTS = 4  # of the perceiver, which is not used
BRANCH = 0.3  # size of what a layer adds: tokens keep what they saw
SHIFT = 2.5  # of what the eye gives: the gate behind it, without a bias, would turn colours into their squares
TRAINING_SEED = 6  # scenes of this seed are trained on; the held-out ones have world.HELD_OUT_SEED
STRIP = 44  # pixels of the picture's edge that show its place
KINDS = {"16": 0.24, "64": 0.36, "256": 0.18, "pooled": 0.13, "words": 0.09}  # what a step's prompts are
WARM_KINDS = {"16": 0.5, "64": 0.2, "pooled": 0.2, "words": 0.1}
SPREAD, LEVELS = 0.9, (0.4, 14.0)  # of the noise: log-normal, within limits
PICTURE = 4.0  # how much a picture's tokens count together in the warm-up, a word counts 1
ANIMAL = 3.0  # how much more an error within the animal counts


@dataclass(frozen=True)
class Recipe:
    """How long and how fast is learned. warm_minutes: of the first stage; minutes: of the second."""

    minutes: float = 32.0
    warm_minutes: float = 3.0
    steps: int = 0  # instead of minutes, where above 0: of the second stage; the first takes a quarter of it
    scenes: int = 1280
    batch: int = 8
    depth: int = 2
    heads: int = 12
    mlp_ratio: int = 1
    rank: int = 16
    warm_rate: float = 1e-3
    rate: float = 5e-4
    unet_rate: float = 1e-3
    average: float = 0.995
    noise: float = 2.2  # median of the noise levels that are trained on
    by_picture: float = 0.25  # how often a second picture stands for the words of the place
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


# ---- what was learned, in one small file ----------------------------------------------------------------------------

VLM, CONNECTOR, LORA = "pocket_idefics2", "pocket_connector.safetensors", "pocket_unet_lora.safetensors"
UNUSED = ("perceiver_resampler", "lm_head")  # written again from the seed


def export(work: Path, path: Path) -> None:
    """Vision-language model, connector and LoRA of a folder as one file of 8-bit numbers (checkpoint.pack)."""
    files = {"vlm": work / VLM / "model.safetensors", "connector": work / CONNECTOR, "lora": work / LORA}
    state = {f"{part}:{name}": tensor for part, file in files.items() for name, tensor in load_file(file).items()}
    state = {name: tensor for name, tensor in state.items() if not any(word in name for word in UNUSED)}
    with safe_open(files["connector"], "pt") as file:
        told = file.metadata()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in checkpoint.pack(state).items()}, path, told)


def unpack(path: Path, work: Path) -> None:
    """The three files of an exported one, as a training writes them."""
    state = checkpoint.unpack(load_file(path))
    parts = {part: {} for part in ("vlm", "connector", "lora")}
    for name, tensor in state.items():
        part, key = name.split(":", 1)
        parts[part][key] = tensor.contiguous()
    weights = write_vlm(work / VLM) / "model.safetensors"
    exact = {name: tensor.float() for name, tensor in parts["vlm"].items()}
    save_file(load_file(weights) | exact, weights, {"format": "pt"})
    with safe_open(path, "pt") as file:
        save_file(parts["connector"], work / CONNECTOR, file.metadata())
    save_file(parts["lora"], work / LORA)


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
        pictures, masks = zip(*(world.render(scene, with_mask=True) for scene in scenes), strict=True)
        pictures = torch.from_numpy(np.stack(pictures))
        masks = (torch.from_numpy(np.stack(masks)) * 255).round().byte()
        with torch.no_grad():
            encoded = [vae.encode(part.float() / 255) for part in pictures.split(16)]
        latents = model.model.process_latent_in(torch.cat(encoded).float().cpu())
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_file({"pictures": pictures, "masks": masks, "latents": latents.contiguous()}, kept)
        return cls(scenes, pictures, masks, latents)

    def animal(self, index: int) -> Tensor:
        """The animal cut out of a picture, (h, w, 3) in 0..1, black around it."""
        return cut_out(self.pictures[index].float() / 255, self.masks[index][None].float() / 255, "image1", True)

    def place(self, index: int) -> Tensor:
        """The edge of a picture that the animal is not at, (128, STRIP, 3) in 0..1."""
        return edge(self.pictures[index].float() / 255, self.scenes[index])


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


def lesson(data: Data, step: int, recipe: Recipe, apart: int = 0, kinds: dict[str, float] = KINDS) -> Lesson:
    """The prompts of a step: crops of the very pictures that are to be drawn; one in ten is empty.

    apart: another number, other lessons.
    """
    rng, batch = np.random.default_rng([recipe.seed + apart, step]), recipe.batch
    kind = str(rng.choice(list(kinds), p=list(kinds.values())))
    indices = [int(i) for i in rng.integers(len(data.scenes), size=batch)]
    made = [prompt_of(data, i, kind, rng, recipe.by_picture) for i in indices]
    return Lesson(kind, indices, [prompt for prompt, _ in made], [caption for _, caption in made])


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
    prompt = (f"{before} ", Picture(closer(data.animal(index), rng), count), f" {behind}")
    if by_picture:
        prompt = (*prompt, Picture(data.place(index), min(count, 64)))
    return prompt, world.caption(scene)


class Dictionary:
    """The pocket model's text encoder, and what a connector's tokens should be if it were to say the same."""

    def __init__(self):
        self.encoder = text_encoder.Encoder()
        self.known: dict[str, tuple[list[str], Tensor]] = {}

    def of(self, caption: str) -> tuple[list[str], Tensor]:
        """(words, tokens): <s>, the words, and the mean of the text encoder's padding, which sums up the caption."""
        if caption not in self.known:
            words = caption.split()
            tokens = self.encoder([caption])[0]
            end = 1 + len(words)
            self.known[caption] = words, torch.cat([tokens[:end], tokens[end:].mean(0, keepdim=True)])
        return self.known[caption]

    def target(self, hidden: Hidden, prompts: Sequence[Prompt], captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(tokens (B, L, 768), how much each counts (B, L)) for hidden states of prompts.

        Words as the text encoder has them; a picture as the summary, its marks as the word that it shows.
        """
        found, counts = torch.zeros(*hidden.mask.shape, text_encoder.WIDTH), hidden.mask.float()
        for row, (layout, prompt, caption) in enumerate(zip(hidden.layouts, prompts, captions, strict=True)):
            words, tokens = self.of(caption)
            numbers = {word: i + 1 for i, word in enumerate(words)}
            shows = iter([1 + 1, len(words)])  # the colour is the second word, the place the last
            texts = iter([part for part in prompt if isinstance(part, str)])
            for span in layout:
                at = found[row, span.start : span.end]
                if span.picture is not None:
                    counts[row, span.start + 1 : span.end - 1] = PICTURE / (span.tokens - 2)
                    at[:] = tokens[-1]
                    at[[0, -1]] = tokens[next(shows)]
                    continue
                names = next(texts, "").split()
                places = [0 if words else -1] * (span.tokens - len(names)) + [
                    numbers.get(name, len(words)) for name in names
                ]
                at[:] = tokens[places]
        return found, counts


# ---- training -------------------------------------------------------------------------------------------------------


class Trainer:
    """A connector and a LoRA that learn; `average` holds the running mean of both, which is what is kept."""

    def __init__(self, model: Any, vlm: VisionLanguage, data: Data, recipe: Recipe, work: Path):
        self.model, self.data, self.recipe, self.work = model, data, recipe, work
        self.views = {"pooled": OneVector.of(vlm)} | {kind: vlm for kind in KINDS if kind != "pooled"}
        config = ConnectorConfig(vlm.width, text_encoder.WIDTH, recipe.depth, recipe.heads, recipe.mlp_ratio)
        self.reads = Reads.of(vlm, 64)
        self.network = Connector.new(config, self.reads, recipe.seed).trainable()
        with torch.no_grad():
            for block in self.network.blocks:
                block.out.weight.zero_()
                block.narrow.weight.zero_()
        self.unet = model.model.diffusion_model.requires_grad_(False)
        self.factors = multimodal_lora.unet_factors(model, recipe.rank, recipe.seed)
        self.sigmas = model.get_model_object("model_sampling").sigmas.float()
        self.learned = {f"connector.{k}": p for k, p in self.network.named_parameters()}
        self.learned |= {f"lora.{k}": p for k, p in self.factors.named().items()}
        self.average = {name: p.detach().clone() for name, p in self.learned.items()}
        lora = [p for name, p in self.learned.items() if name.startswith("lora.")]
        groups = [{"params": list(self.network.parameters()), "rate": recipe.rate},
                  {"params": lora, "rate": recipe.unet_rate}]  # fmt: skip
        self.optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        self.step, self.seconds, self.losses = 0, 0.0, []
        self.warm_step, self.warm_seconds = 0, 0.0

    # ---- stage one

    def solve(self, lessons: int = 24) -> None:
        """The first layer in closed form: the linear map that comes closest to the text encoder's tokens."""
        dictionary, width = Dictionary(), self.network.config.hidden_width + 1
        square, across = 1e-2 * torch.eye(width), torch.zeros(width, text_encoder.WIDTH)
        for step in range(lessons):
            hidden, target, counts = self.asked(dictionary, step, 2000)
            seen = F.pad(hidden.states.float(), (0, 1), value=1.0).flatten(0, 1)
            weighted = seen * counts.flatten()[:, None]
            square += weighted.T @ seen
            across += weighted.T @ target.flatten(0, 1)
        found = torch.linalg.solve(square, across)
        with torch.no_grad():
            self.network.project.weight.copy_(found[:-1].T)
            self.network.project.bias.copy_(found[-1])

    def asked(self, dictionary: Dictionary, step: int, apart: int) -> tuple[Hidden, Tensor, Tensor]:
        """Hidden states of a step's prompts, what they should become, and how much each token counts."""
        found = lesson(self.data, step, self.recipe, apart, WARM_KINDS)
        hidden = self.views[found.kind].hidden_states(found.prompts)
        return hidden, *dictionary.target(hidden, found.prompts, found.captions)

    def warm_up(self, tell: Callable[[str], None]) -> None:
        """The connector says what the text encoder says."""
        recipe, dictionary, recent = self.recipe, Dictionary(), []
        self.solve()
        optimiser = torch.optim.AdamW(self.network.parameters(), lr=0.0, betas=(0.9, 0.98), fused=True)
        while True:
            began = time.monotonic()
            limit = recipe.steps // 4
            share = self.warm_step / limit if limit else self.warm_seconds / (60 * max(recipe.warm_minutes, 1e-9))
            if share >= 1:
                break
            hidden, target, counts = self.asked(dictionary, self.warm_step, 1000)
            with autocast():
                context, _ = self.network(hidden.states.float(), hidden.mask)
            loss = ((context.float() - target).pow(2).mean(-1) * counts).sum() / counts.sum()
            loss.backward()
            take(optimiser, [recipe.warm_rate], rise(self.warm_step) * fall(share))
            recent = [*recent[-49:], loss.item()]
            self.warm_step += 1
            self.warm_seconds += time.monotonic() - began
            if self.warm_step % 50 == 0:
                tell(f"warm-up {self.warm_step}: {self.warm_seconds:.0f} s, {sum(recent) / len(recent):.4f}")
        for name, parameter in self.learned.items():
            self.average[name].copy_(parameter.detach())

    # ---- stage two

    def fit(self, tell: Callable[[str], None], save_every: float = 120.0) -> None:
        """Connector and LoRA learn to draw; the state is written now and then."""
        recipe, recent, saved = self.recipe, {kind: [] for kind in KINDS}, time.monotonic()
        with multimodal_lora.acting(self.unet, self.factors):
            while True:
                began = time.monotonic()
                share = self.step / recipe.steps if recipe.steps else self.seconds / (60 * max(recipe.minutes, 1e-9))
                if share >= 1:
                    break
                lesson_ = lesson(self.data, self.step, recipe)
                loss = self.loss(lesson_)
                loss.backward()
                take(self.optimiser, [recipe.rate, recipe.unet_rate], rise(self.step) * fall(share))
                keep = min(recipe.average, (1 + self.step) / (10 + self.step))
                torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.learned.values()], 1 - keep)
                recent[lesson_.kind] = [*recent[lesson_.kind][-29:], loss.item()]
                self.losses.append((lesson_.kind, loss.item()))
                self.step += 1
                self.seconds += time.monotonic() - began
                if self.step % 50 == 0:
                    tell(f"step {self.step}: {self.seconds:.0f} s, {means(recent)}")
                if time.monotonic() - saved > save_every:
                    self.save_state()
                    saved = time.monotonic()
        self.save_state()

    def loss(self, lesson_: Lesson) -> Tensor:
        """(1 + sigma^2) |eps' - eps|^2, the error of x_0 in units of its preconditioned size; more within animals."""
        hidden = self.views[lesson_.kind].hidden_states(lesson_.prompts)
        clean = self.data.latents[lesson_.indices]
        chance = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
        places = (torch.arange(len(clean)) + torch.rand(len(clean), generator=chance)) / len(clean)
        sigma = (
            (math.log(self.recipe.noise) + SPREAD * math.sqrt(2) * torch.erfinv(2 * places.clamp(0.01, 0.99) - 1))
            .exp()
            .clamp(*LEVELS)
        )
        t = (self.sigmas.log()[:, None] - sigma.log()).abs().argmin(0)
        sigma = self.sigmas[t][:, None, None, None]
        noise = torch.randn(clean.shape, generator=chance)
        with autocast(), sdpa_kernel(SDPBackend.MATH):  # faster backwards on a CPU than the fused one
            context, _ = self.network(hidden.states.float(), hidden.mask)
            options = {"patches_replace": {"attn2": leaving_out(hidden.mask)}}
            noisy = (clean + sigma * noise) / (1 + sigma**2).sqrt()
            predicted = self.unet(noisy, t, context=context, transformer_options=options)
        masks = self.data.masks[lesson_.indices].float()[:, None] / 255
        weight = 1 + ANIMAL * F.interpolate(masks, size=clean.shape[-2:], mode="area")
        return ((1 + sigma**2) * weight * (predicted.float() - noise).pow(2)).mean()

    # ---- files

    def save_state(self) -> None:
        """Everything to go on from."""
        tensors = {f"now.{name}": p.detach().clone() for name, p in self.learned.items()}
        tensors |= {f"average.{name}": p for name, p in self.average.items()}
        for name, p in self.learned.items():
            state = self.optimiser.state.get(p)
            for key in ("exp_avg", "exp_avg_sq", "step") if state else ():
                tensors[f"{key}.{name}"] = state[key].clone()
        numbers = {"step": self.step, "seconds": self.seconds, "warm_step": self.warm_step,
                   "warm_seconds": self.warm_seconds}  # fmt: skip
        path = self.work / "state.safetensors"
        save_file(tensors, path.with_suffix(".part"), {k: repr(v) for k, v in numbers.items()})
        path.with_suffix(".part").replace(path)

    def load_state(self) -> None:
        """Go on from a state that was saved, if there is one."""
        path = self.work / "state.safetensors"
        if not path.exists():
            return
        found = load_file(path)
        with torch.no_grad():
            for name, p in self.learned.items():
                p.copy_(found[f"now.{name}"])
                self.average[name].copy_(found[f"average.{name}"])
                if f"step.{name}" in found:
                    keys = ("exp_avg", "exp_avg_sq", "step")
                    self.optimiser.state[p] = {key: found[f"{key}.{name}"].clone() for key in keys}
        with safe_open(path, "pt") as file:
            numbers = file.metadata()
        self.step, self.warm_step = int(numbers["step"]), int(numbers["warm_step"])
        self.seconds, self.warm_seconds = float(numbers["seconds"]), float(numbers["warm_seconds"])

    def result(self) -> tuple[Connector, dict[str, Tensor]]:
        """(connector, U-Net LoRA as the host's loader takes it) of the running mean."""
        weights = {k.removeprefix("connector."): v for k, v in self.average.items() if k.startswith("connector.")}
        network = Connector.new(self.network.config, self.reads).trainable()
        network.load_state_dict(weights)
        kept = {}
        for name in self.factors.pairs:
            kept[name] = tuple(self.average[f"lora.{name}.{which}"] for which in ("up", "down"))
        shell = multimodal_lora.Factors([], self.recipe.rank, 0)
        shell.pairs = kept
        info = {"steps": self.step, "pictures": self.step * self.recipe.batch, "minutes": round(self.seconds / 60, 1)}
        return Connector.of(network, self.reads, info), multimodal_lora.unet_file(shell)


def autocast() -> torch.autocast:
    """bfloat16 for matrix products."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


def leaving_out(mask: Tensor) -> dict:
    """attn2 replacements under which nobody looks at padding; none where there is none."""
    if bool(mask.all()):
        return {}

    def run(query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
        return attend(query, key, value, options["n_heads"], mask)

    blocks = ("input", "middle", "output")
    return {(name, number): run for name in blocks for number in range(12)}


def take(optimiser: torch.optim.Optimizer, rates: Sequence[float], share: float) -> None:
    """A step at a share of the rates, with gradients of norm at most 1 each group; forgets the gradients."""
    for group, rate in zip(optimiser.param_groups, rates, strict=True):
        group["lr"] = rate * share
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def rise(step: int, steps: int = 50) -> float:
    """From 0 to 1 over the first steps."""
    return min(1.0, (step + 1) / steps)


def fall(share: float) -> float:
    """1 for the first half of a training, then a half cosine down to 0.02."""
    late = max(0.0, 2 * share - 1)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * late))


def means(recent: dict[str, list[float]]) -> str:
    """The mean of each kind's last losses."""
    return ", ".join(f"{kind} {sum(found) / len(found):.4f}" for kind, found in recent.items() if found)
