"""The training of the pocket multimodal encoder (multimodal_pocket) on drawn scenes, in four lessons.

see    The vision-language model alone learns to see: what an animal and a place look like can be read off its tokens.
say    The connector alone learns to say what the text encoder would say, and of a picture what words would tell of it
       if captions had them: the coat, the collar, where the animal looks (Dictionary). No U-Net, no noise.
read   A LoRA on the U-Net alone learns to read those words, by the denoising loss. It does not need the connector.
draw   Both learn by the denoising loss, from what the connector does say.

The paper's encoder is trained by the last alone: its vision-language model has seen the world before, the U-Net's text
encoder has words for coats, and it takes pictures by the million. Here the first three lessons stand for that; by the
last alone, half an hour of it taught nothing but the coat's first colour.

Import pocket_host and call its import_host() before this module: it needs the host.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.multimodal_pocket import (
    CONNECTOR,
    LORA,
    VLM,
    Data,
    Dictionary,
    Lesson,
    OneVector,
    Recipe,
    lesson,
    write_trained,
)
from palimpsest.kernels.connector import ConnectorConfig, attend
from palimpsest.kernels.token_alignment import token_error
from palimpsest.nodes import training
from palimpsest.nodes.multimodal import files as multimodal_files
from palimpsest.nodes.multimodal.encoder import Connector, Reads
from palimpsest.nodes.multimodal.training.lora import unet_factors
from palimpsest.nodes.multimodal.vlm import Hidden, VisionLanguage
from pocket import autoencoder as autoencoding
from pocket import checkpoint, judge, text_encoder, world
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# What a lesson's prompts are: tokens a picture, or one vector a picture, or words alone.
SEE = {"16": 0.35, "64": 0.5, "256": 0.15}
SAY = {"16": 0.28, "64": 0.34, "256": 0.1, "pooled": 0.2, "words": 0.08}
READ = {"16": 0.5, "64": 0.15, "pooled": 0.25, "words": 0.1}
DRAW = {"16": 0.24, "64": 0.36, "256": 0.18, "pooled": 0.13, "words": 0.09}
KINDS = tuple(DRAW)
SPREAD, LEVELS = 0.9, (0.4, 14.0)  # of the noise: log-normal, within limits
ANIMAL = 5.0  # how much more an error within the animal counts
SHARES = {"see": 0.25, "say": 0.17, "read": 0.40, "draw": 0.18}  # of the time
ADAPTED = {"read": 0.45, "draw": 0.55}  # of the time where another U-Net is learned
APART = {"see": 1500, "say": 1000, "read": 500, "draw": 0}  # so that each trains on scenes in another order
OF_ANOTHER = 2500  # of a lesson that is none of these

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of AdamW

Tell = Callable[[str], None]


@dataclass
class Progress:
    """Steps and seconds of a lesson so far."""

    step: int = 0
    seconds: float = 0.0


class Trainer:
    """Vision-language model, connector and LoRA; `average` holds the running mean of all, which is what is kept."""

    def __init__(self, model: Any, vlm: VisionLanguage, data: Data, recipe: Recipe, work: Path):
        self.model, self.data, self.recipe, self.work = model, data, recipe, work
        self.views = {kind: OneVector.of(vlm) if kind == "pooled" else vlm for kind in KINDS}
        config = ConnectorConfig(vlm.width, text_encoder.WIDTH, recipe.depth, recipe.heads, recipe.mlp_ratio)
        self.reads = Reads.of(vlm, 64)
        self.network = Connector.new(config, self.reads, recipe.seed).trainable()
        with torch.no_grad():
            for block in self.network.blocks:
                block.out.weight.zero_()
                block.narrow.weight.zero_()
        self.unet = model.model.diffusion_model.requires_grad_(False)
        self.factors = unet_factors(model, recipe.rank, recipe.seed)
        self.sigmas = model.get_model_object("model_sampling").sigmas.float()
        self.seen = [name for name in world.ATTRIBUTES if name not in ("side", "place")]  # of an animal cut out
        torch.manual_seed(recipe.seed)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(vlm.width, len(world.ATTRIBUTES[name]) + 1) for name in (*self.seen, "place")}
        )
        self.learned = {f"vlm.{k}": p for k, p in vlm.model.named_parameters() if "perceiver" not in k}
        for parameter in self.learned.values():
            parameter.requires_grad_(True)
        self.learned |= {f"heads.{k}": p for k, p in self.heads.named_parameters()}
        self.learned |= {f"connector.{k}": p for k, p in self.network.named_parameters()}
        self.learned |= {f"lora.{k}": p for k, p in self.factors.named().items()}
        self.average = {name: p.detach().clone() for name, p in self.learned.items()}
        self.dictionary = Dictionary()
        self.progress = {name: Progress() for name in APART}
        self.losses: list[tuple[str, float]] = []
        self.optimiser: torch.optim.Optimizer | None = None  # of the lesson that is under way
        self.moments: dict[str, Tensor] = {}  # of a lesson that was cut off

    # ---- the four lessons

    def see(self, tell: Tell) -> None:
        """The vision-language model sees what is in its pictures: a linear map of its tokens tells it.

        The map's last output says how much a token is listened to (a softmax over the picture's tokens).
        """

        def loss(lesson_: Lesson) -> Tensor:
            with fast():
                hidden = self.views[lesson_.kind].hidden_states(lesson_.prompts, gradient=True)
            tokens, scenes, names = [], [], []
            for row, (layout, index) in enumerate(zip(hidden.layouts, lesson_.indices, strict=True)):
                asked = iter((self.seen, ["place"]))
                for span in layout:
                    if span.picture is not None:
                        tokens.append(hidden.states[row, span.start + 1 : span.end - 1].float())
                        scenes.append(self.data.scenes[index])
                        names.append(next(asked))
            answers, found = judge.labels(scenes), []
            for name, head in self.heads.items():
                truth = answers[name]
                shown = [i for i, asked in enumerate(names) if name in asked and truth[i] != judge.UNDEFINED]
                if shown:
                    told = torch.stack([listened(head(tokens[i])) for i in shown])
                    found.append(F.cross_entropy(told, truth[shown]))
            return sum(found) / len(found)

        recipe = self.recipe
        rates = {"vlm.": recipe.see_rate, "heads.": recipe.see_rate}
        self.learn("see", rates, SEE, recipe.see_batch, loss, tell)

    def say(self, tell: Tell) -> None:
        """The connector says what the text encoder says, and what it would say of coats."""
        if self.progress["say"].step == 0:
            self.solve()

        def loss(lesson_: Lesson) -> Tensor:
            hidden, target, counts = self.dictated(lesson_)
            with fast():
                context, _ = self.network(hidden.states.float(), hidden.mask)
            said, wanted = (tensor.flatten(0, 1)[None] for tensor in (context, target))  # one mean over all prompts
            return token_error(said, wanted, counts.flatten()[None])[0]

        recipe = self.recipe
        self.learn("say", {"connector.": recipe.say_rate}, SAY, recipe.say_batch, loss, tell)

    def read(self, tell: Tell) -> None:
        """The LoRA reads what a connector would say that made no mistake."""

        def loss(lesson_: Lesson) -> Tensor:
            hidden, target, _ = self.dictated(lesson_)
            return self.denoising(lesson_, target, hidden.mask)

        recipe = self.recipe
        self.learn("read", {"lora.": recipe.read_rate}, READ, recipe.batch, loss, tell)

    def draw(self, tell: Tell, kinds: dict[str, float] = DRAW) -> None:
        """Connector and LoRA draw together, from prompts of these kinds."""

        def loss(lesson_: Lesson) -> Tensor:
            hidden = self.views[lesson_.kind].hidden_states(lesson_.prompts)
            with fast():
                context, _ = self.network(hidden.states.float(), hidden.mask)
            return self.denoising(lesson_, context, hidden.mask)

        recipe = self.recipe
        rates = {"connector.": recipe.rate, "lora.": recipe.unet_rate}
        self.learn("draw", rates, kinds, recipe.batch, loss, tell)

    def learn(
        self, name: str, rates: dict[str, float], kinds: dict[str, float], batch: int,
        loss_of: Callable[[Lesson], Tensor], tell: Tell, save_every: float = 120.0,
    ) -> None:  # fmt: skip
        """A lesson, from where it stands to its end; the state is written now and then."""
        recipe, progress, recent = self.recipe, self.progress[name], {kind: [] for kind in KINDS}
        self.optimiser = self.adam(rates)
        chosen = {key for key in self.learned if key.startswith(tuple(rates))}
        saved = time.monotonic()
        with training.added_by(self.factors, self.unet):
            while True:
                began = time.monotonic()
                shares = ADAPTED if recipe.adapted else SHARES
                limit = recipe.steps or 60 * recipe.minutes * shares.get(name, 1.0)
                share = (progress.step if recipe.steps else progress.seconds) / limit
                if share >= 1:
                    break
                lesson_ = lesson(self.data, progress.step, recipe, APART.get(name, OF_ANOTHER), kinds, batch)
                loss = loss_of(lesson_)
                loss.backward()
                take(self.optimiser, list(rates.values()), rise(progress.step) * fall(share))
                keep = min(recipe.average, (1 + progress.step) / (10 + progress.step))
                torch._foreach_lerp_(
                    [self.average[key] for key in chosen], [self.learned[key].detach() for key in chosen], 1 - keep
                )
                recent[lesson_.kind] = [*recent[lesson_.kind][-29:], loss.item()]
                if name == "draw":
                    self.losses.append((lesson_.kind, loss.item()))
                progress.step += 1
                progress.seconds += time.monotonic() - began
                if progress.step % 50 == 0:
                    tell(f"{name}, step {progress.step}: {progress.seconds:.0f} s, {means(recent)}")
                if time.monotonic() - saved > save_every:
                    self.save_state()
                    saved = time.monotonic()
        with torch.no_grad():
            for key in chosen:
                self.learned[key].copy_(self.average[key])
        self.optimiser = None
        self.save_state()

    # ---- what they need

    def adam(self, rates: dict[str, float]) -> torch.optim.Optimizer:
        """An optimiser of what each rate's name begins with, at rate 0; it goes on where a saved one stopped."""
        groups = [{"params": [p for key, p in self.learned.items() if key.startswith(start)]} for start in rates]
        made = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        for name, p in self.learned.items():
            if f"step.{name}" in self.moments and name.startswith(tuple(rates)):
                made.state[p] = {key: self.moments[f"{key}.{name}"].clone() for key in MOMENTS}
        self.moments = {}
        return made

    def dictated(self, lesson_: Lesson) -> tuple[Hidden, Tensor, Tensor]:
        """Hidden states of a lesson's prompts, what should be said of them, and how much each token counts."""
        hidden = self.views[lesson_.kind].hidden_states(lesson_.prompts)
        return hidden, *self.dictionary.target(hidden, lesson_, self.data.scenes)

    def solve(self, lessons: int = 24) -> None:
        """The first layer in closed form: the linear map that comes closest to what should be said."""
        width = self.network.config.hidden_width + 1
        square, across = 1e-2 * torch.eye(width), torch.zeros(width, text_encoder.WIDTH)
        for step in range(lessons):
            hidden, target, counts = self.dictated(lesson(self.data, step, self.recipe, 2000, SAY))
            seen = F.pad(hidden.states.float(), (0, 1), value=1.0).flatten(0, 1)
            weighted = seen * counts.flatten()[:, None]
            square += weighted.T @ seen
            across += weighted.T @ target.flatten(0, 1)
        found = torch.linalg.solve(square, across)
        with torch.no_grad():
            self.network.project.weight.copy_(found[:-1].T)
            self.network.project.bias.copy_(found[-1])

    def denoising(self, lesson_: Lesson, context: Tensor, mask: Tensor, attn2: dict | None = None) -> Tensor:
        """(1 + sigma^2) |eps' - eps|^2, the error of x_0 in units of its preconditioned size; more within animals.

        attn2: what stands in the place of cross-attention, by block; by default what leaves the padding out.
        """
        clean = self.data.latents[lesson_.indices]
        chance = torch.Generator().manual_seed(lesson_.seed)
        places = (torch.arange(len(clean)) + torch.rand(len(clean), generator=chance)) / len(clean)
        sigma = (
            (math.log(self.recipe.noise) + SPREAD * math.sqrt(2) * torch.erfinv(2 * places.clamp(0.01, 0.99) - 1))
            .exp()
            .clamp(*LEVELS)
        )
        t = (self.sigmas.log()[:, None] - sigma.log()).abs().argmin(0)
        sigma = self.sigmas[t][:, None, None, None]
        noise = torch.randn(clean.shape, generator=chance)
        with fast():
            options = {"patches_replace": {"attn2": leaving_out(mask) if attn2 is None else attn2}}
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
            state = self.optimiser.state.get(p) if self.optimiser else None
            for key in MOMENTS if state else ():
                tensors[f"{key}.{name}"] = state[key].clone()
        numbers = {f"{name} {key}": repr(value) for name, p in self.progress.items() for key, value in vars(p).items()}
        path = self.work / "state.safetensors"
        save_file(tensors, path.with_suffix(".part"), numbers)
        path.with_suffix(".part").replace(path)

    def begin_with(self, folder: Path) -> None:
        """What an earlier training wrote for another U-Net: vision-language model, connector and LoRA."""
        seeing = load_file(folder / VLM / "model.safetensors")
        known = multimodal_files.load_connector(str(folder / CONNECTOR))
        connector = known.patcher.model.state_dict()
        lora = checkpoint.narrow_lora(load_file(folder / LORA))
        with torch.no_grad():
            for name, p in self.learned.items():
                if name.startswith("vlm."):
                    p.copy_(seeing["model." + name.removeprefix("vlm.")])
                elif name.startswith("connector."):
                    p.copy_(connector[name.removeprefix("connector.")])
            for name, (up, down) in self.factors.pairs.items():
                layer = "lora_unet_" + name.replace(".", "_")
                up.copy_(lora[f"{layer}.lora_up.weight"])
                down.copy_(lora[f"{layer}.lora_down.weight"])
            for name, p in self.learned.items():
                self.average[name].copy_(p)
        for name in self.progress.keys() - ADAPTED.keys():
            steps, minutes = (known.info.get(f"{name}, {key}", 0) for key in ("steps", "minutes"))
            self.progress[name] = Progress(steps, 60 * minutes)

    def load_state(self) -> None:
        """Go on from a state that was saved, if there is one."""
        path = self.work / "state.safetensors"
        if not path.exists():
            return
        found = load_file(path)
        with torch.no_grad():
            for name, p in self.learned.items():
                p.copy_(found.pop(f"now.{name}"))
                self.average[name].copy_(found.pop(f"average.{name}"))
        self.moments = found
        with safe_open(path, "pt") as file:
            numbers = file.metadata()
        for name, progress in self.progress.items():
            progress.step, progress.seconds = int(numbers[f"{name} step"]), float(numbers[f"{name} seconds"])

    def write(self, folder: Path) -> None:
        """What was learned, as a models folder (multimodal_pocket.write_trained); the running mean of it."""
        network = Connector.new(self.network.config, self.reads).trainable()
        network.load_state_dict(self.kept("connector."))
        shell = training.Factors([], self.recipe.rank, 0)
        shell.pairs = {name: tuple(self.average[f"lora.{name}.{part}"] for part in ("up", "down"))
                       for name in self.factors.pairs}  # fmt: skip
        info = {}
        for name, progress in self.progress.items():
            info |= {f"{name}, steps": progress.step, f"{name}, minutes": round(progress.seconds / 60, 1)}
        write_trained(folder, self.kept("vlm."), Connector.of(network, self.reads, info), training.unet_file(shell))

    def kept(self, start: str) -> dict[str, Tensor]:
        """The running mean of what begins so, without it."""
        return {name.removeprefix(start): value for name, value in self.average.items() if name.startswith(start)}


def listened(told: Tensor) -> Tensor:
    """(N, classes + 1) of a picture's tokens -> (classes,): their mean, weighted by the softmax of the last column."""
    return told[:, -1].softmax(0) @ told[:, :-1]


@contextmanager
def fast(cached: bool = True) -> Iterator[None]:
    """bfloat16 for matrix products where the processor has it, with the attention that is then faster backwards.

    cached: weights are kept in bfloat16 to the end of it, which is wrong where they change meanwhile.
    """
    here = autoencoding.has_bfloat16()
    plain = sdpa_kernel(SDPBackend.MATH) if here else nullcontext()
    with torch.autocast("cpu", torch.bfloat16, enabled=here, cache_enabled=cached), plain:
        yield


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
