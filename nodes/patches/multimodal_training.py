"""Training a multimodal connector, and LoRAs beside it, through the host's U-Net: MUMU, arXiv:2406.18790, section 5.

Every draw depends on the seed, the step and the row alone: a training that was interrupted goes on as if it had not
been, and processes that share a batch learn what one process learns from all of it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...kernels.reference.connector import ConnectorConfig, ConnectorNetwork
from ...kernels.reference.ddim import ddim_step
from ...kernels.reference.denoising_loss import noise_loss, spread_levels, velocity_loss
from . import host, interleaved_dataset, inversion, multimodal_lora, recompute, tuning_runtime
from .interleaved import Picture, Prompt
from .interleaved_dataset import STAGES, Dataset
from .multimodal import POOLED_WIDTH, Connector, MultimodalEncoder, Reads, build, context_width, join
from .vision_language import IMAGE, Hidden, VisionLanguage, with_lora

TECHNIQUE = "Train Multimodal Encoder"
NAME = "palimpsest_multimodal_training"
CLIP_NORM, WEIGHT_DECAY = 1.0, 1e-2
READ_AHEAD = 32  # steps whose pictures and prompts are encoded before the U-Net is loaded for them
NAN_STEPS = 3  # steps in a row that may fail before the training stops; their gradients are never applied
SAMPLES, SAMPLE_STEPS, SAMPLE_GUIDANCE = 4, 20, 6.0  # 6 is the paper's guidance, without a negative prompt
ZEROS, LEARNED, CLIP_TEXT = "zeros", "learned", "CLIP text"


@dataclass(frozen=True)
class TrainSettings:
    """How an encoder is trained; see PalimpsestTrainMultimodal for what each does. tokens 0: as the stage says."""

    stage: str = next(iter(STAGES))
    steps: int = 1000
    batch: int = 4
    accumulate: int = 1
    tokens: int = 0
    connector_rate: float = 1e-5
    train_language: bool = False
    language_rate: float = 3e-6
    train_unet: bool = False
    unet_rate: float = 5e-6
    rank: int = 8
    pooled: str = ZEROS
    drop_share: float = 0.1
    warmup: int = 100
    depth: int = 16
    again: bool = True
    seed: int = 0
    preview_every: int = 100
    save_every: int = 500


# ---- what a step is made of ---------------------------------------------------------------------------------------


def chance_of(*parts: Any) -> torch.Generator:
    """A generator on the CPU for this very place of a training: seed, step, row."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True, eq=False)
class Lesson:
    """Pictures of one size with a prompt, a place in the schedule (0 noise to 1 clean) and a noise each.

    records: their numbers in the dataset; hidden: what the language model makes of the prompts, if it was asked before.
    """

    records: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    shares: Tensor
    noise: tuple[torch.Generator, ...]
    hidden: Hidden | None = None


@dataclass(frozen=True, eq=False)
class Lessons:
    """The lessons of a training, each by its number. sizes: of every record that the stage can be trained on."""

    dataset: Dataset
    settings: TrainSettings
    tokens: int
    sizes: dict[int, tuple[int, int]]
    rank: int = 0
    world: int = 1
    drawn: dict[int, list[list[int]]] = field(default_factory=dict, repr=False)

    @property
    def per_epoch(self) -> int:
        """Batches in which every picture comes once."""
        counts = Counter(self.sizes.values())
        return sum(math.ceil(count / self.settings.batch) for count in counts.values())

    def epoch(self, number: int) -> list[list[int]]:
        """Batches of pictures of one size; each picture comes once, those that fill up a batch twice."""
        if number not in self.drawn:
            self.drawn.clear()
            self.drawn[number] = self.shuffled(number)
        return self.drawn[number]

    def shuffled(self, number: int) -> list[list[int]]:
        """An epoch's batches, in an order of its own."""
        batches = []
        for size in sorted(set(self.sizes.values())):
            here = [record for record, other in self.sizes.items() if other == size]
            order = torch.randperm(len(here), generator=chance_of(self.settings.seed, "order", number, size)).tolist()
            count = math.ceil(len(here) / self.settings.batch) * self.settings.batch
            rows = [here[order[i % len(order)]] for i in range(count)]
            batches += [rows[i : i + self.settings.batch] for i in range(0, count, self.settings.batch)]
        if len(set(self.sizes.values())) == 1:
            return batches
        return [
            batches[i] for i in torch.randperm(len(batches), generator=chance_of(self.settings.seed, "mix", number))
        ]

    def of_step(self, step: int) -> Iterator[Lesson]:
        """This process's lessons of a step: `accumulate` of them."""
        for part in range(self.settings.accumulate):
            yield self.lesson(step, (part * self.world + self.rank))

    def lesson(self, step: int, place: int) -> Lesson:
        """The lesson at a place of a step's whole batch."""
        settings, together = self.settings, self.settings.accumulate * self.world
        epoch, number = divmod(step * together + place, self.per_epoch)
        records = tuple(self.epoch(epoch)[number])
        rows = torch.arange(place * settings.batch, (place + 1) * settings.batch)
        chances = [chance_of(settings.seed, "row", step, int(row)) for row in rows]
        draws = torch.stack([torch.rand((), generator=chance) for chance in chances])
        return Lesson(
            records,
            tuple(self.prompt(record, chance) for record, chance in zip(records, chances, strict=True)),
            spread_levels(draws, rows, settings.batch * together),
            tuple(chances),
        )

    def prompt(self, record: int, chance: torch.Generator) -> Prompt:
        """A prompt for a picture, or now and then none, so that guidance has something to lead away from."""
        dropped = float(torch.rand((), generator=chance)) < self.settings.drop_share
        drawn = self.dataset.draw(record, STAGES[self.settings.stage], self.tokens, chance)
        return () if dropped else drawn


def spoken(prompt: Prompt) -> str:
    """The words of a prompt, its pictures left out."""
    return " ".join("".join(part for part in prompt if isinstance(part, str)).split())


# ---- what the host calls ------------------------------------------------------------------------------------------


@dataclass
class ReadTokens:
    """CALC_COND_BATCH wrapper: the model reads `context` (B, L, C) and `pooled` (B, P), with a gradient.

    The host itself makes of them what its model takes. there (B, L): False at tokens that only fill up a row.
    """

    context: Tensor | None = None
    pooled: Tensor | None = None
    there: Tensor | None = None

    def __call__(self, executor: Any, model: Any, conds: list, x: Tensor, *args: Any) -> list[Tensor]:
        entry = conds[0][0]
        made = model.extra_conds(
            cross_attn=self.context, pooled_output=self.pooled, noise=x, device=x.device, prompt_type="positive",
            width=x.shape[3] * 8, height=x.shape[2] * 8,
        )  # fmt: skip
        cond = entry | {"model_conds": entry["model_conds"] | made, "uuid": uuid.uuid4()}
        return executor(model, [[cond], *conds[1:]], x, *args)


@dataclass(frozen=True, eq=False)
class LeaveOutFilling:
    """attn2 replacement: tokens that only fill up a row are not looked at."""

    reader: ReadTokens
    previous: Any

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
        there = self.reader.there
        if there is None:
            return host.run_attention(options, self.previous, query, key, value)
        added = key.shape[1] - there.shape[1]  # what another node puts behind the prompt
        mask = F.pad(there, (0, added), value=True)[:, None, None]
        return host.run_attention(options, self.previous, query, key, value, mask)


# ---- one process, or one of several -------------------------------------------------------------------------------


@dataclass
class Process:
    """The only process of a training. A launcher for several GPUs replaces its methods."""

    rank: int = 0
    world: int = 1

    def prepare(self, network: ConnectorNetwork, optimise: Callable) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The network as it is to be used from now on, and an optimiser that `optimise` makes of its parameters."""
        return network, optimise(network.parameters())

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss, added to those that are there."""
        loss.backward()

    def average(self, tensors: Sequence[Tensor]) -> None:
        """The mean over all processes, in place, of tensors that `prepare` does not know."""

    def clip(self, parameters: Sequence[Tensor]) -> Tensor:
        """Bring the norm of the gradients to at most CLIP_NORM; returns what it was."""
        return nn.utils.clip_grad_norm_(parameters, CLIP_NORM)

    def apply(self, optimiser: Any, norm: Tensor) -> None:
        """A step of an optimiser, which does nothing where the gradients' norm is no number.

        Fused optimisers look at a flag on the device, so that nobody waits for it here.
        """
        if optimiser.defaults.get("fused"):
            optimiser.found_inf = (~torch.isfinite(norm)).float()
            optimiser.step()
        elif math.isfinite(float(norm)):
            optimiser.step()

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor that may be spread over the processes."""
        return tensor

    def part(self, tensor: Tensor, like: Tensor) -> Tensor:
        """This process's part of a tensor, spread as `like` is."""
        return tensor.to(like)

    def weights(self, network: nn.Module) -> dict[str, Tensor]:
        """All weights of the network on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}


# ---- what is given back -------------------------------------------------------------------------------------------


@dataclass
class History:
    """What a training was like. points: (step, place in the schedule, loss) of every picture; before: earlier steps."""

    losses: list[float] = field(default_factory=list)
    points: list[tuple[int, float, float]] = field(default_factory=list)
    before: int = 0
    bad: int = 0
    stopped: str = ""

    @property
    def steps(self) -> int:
        """Steps, with those of the trainings that this one goes on from."""
        return self.before + len(self.losses)

    def recent(self) -> float:
        """Mean loss of the last tenth of the steps."""
        last = [loss for loss in self.losses[-max(1, len(self.losses) // 10) :] if math.isfinite(loss)]
        return sum(last) / max(1, len(last))


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What was learned so far: the connector, LoRA files (empty where none is trained), and all to go on from."""

    connector: Connector
    unet_lora: dict[str, Tensor]
    language_lora: dict[str, Tensor]
    state: dict[str, Tensor]
    info: dict


@dataclass(frozen=True, eq=False)
class Trained:
    """A snapshot at the end of a training, the encoder with it, how it went, and what it draws."""

    snapshot: Snapshot
    encoder: MultimodalEncoder
    history: History
    samples: Tensor


# ---- the training -------------------------------------------------------------------------------------------------


class Again:
    """A block's forward whose activations are made again when the gradient comes."""

    def __init__(self, forward: Callable):
        self.forward = forward

    def __call__(self, *args: Any) -> Tensor:
        return checkpoint(self.forward, *args, use_reentrant=False) if torch.is_grad_enabled() else self.forward(*args)


def loss_of(model: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The loss that a MODEL was trained with. Raises ValueError for other models than diffusion in eps or v."""
    import comfy.model_sampling as kinds

    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, kinds.EPS) or not hasattr(sampling, "sigmas"):
        raise ValueError(
            f"{TECHNIQUE} trains with eps- and v-prediction models, the connected one is sampled by "
            f"{type(sampling).__name__}: load an SD 1.x, SD 2.x or SDXL checkpoint."
        )
    return velocity_loss if isinstance(sampling, kinds.V_PREDICTION) else noise_loss


def stage_tokens(vlm: VisionLanguage, settings: TrainSettings) -> int:
    """Tokens a picture. Raises ValueError for a number that the model cannot show."""
    if settings.tokens == 0 and vlm.perceiver:
        return vlm.default_tokens()
    wanted = settings.tokens or STAGES[settings.stage].tokens
    vlm.side(wanted)
    return wanted


def starting_connector(model: Any, encoder: MultimodalEncoder, tokens: int, settings: TrainSettings) -> Connector:
    """The encoder's connector, or a new one. Raises ValueError for one that this model cannot read."""
    width, connector = context_width(model), encoder.connector
    if connector is None:
        heads = max(1, width // 64)
        pooled = POOLED_WIDTH if settings.pooled == LEARNED else 0
        config = ConnectorConfig(encoder.vlm.width, width, settings.depth, heads, pooled_width=pooled)
        return Connector.new(config, Reads.of(encoder.vlm, tokens), settings.seed)
    if connector.config.context_width != width:
        raise ValueError(
            f"the encoder's connector makes tokens of {connector.config.context_width} channels, this model reads "
            f"{width}: load a model of its family, or an encoder without a connector."
        )
    if settings.pooled == LEARNED and not connector.config.pooled_width:
        raise ValueError(
            "the encoder's connector has no pooled output to learn: set pooled_output to zeros, or begin a new "
            "connector."
        )
    return connector


class Fit:
    """A host sampler function that trains. Every call of it takes the steps that `ahead` has prepared."""

    def __init__(
        self, model: Any, vae: Any, encoder: MultimodalEncoder, dataset: Dataset, settings: TrainSettings,
        clip: Any = None, state: dict[str, Tensor] | None = None, process: Process | None = None,
        show: Callable[[int, Tensor | None], None] = lambda step, latent: None,
        tell: Callable[[str], None] = lambda text: None,
    ):  # fmt: skip
        self.settings, self.process, self.show, self.tell = settings, process or Process(), show, tell
        self.host_model, self.vae, self.vlm, self.clip = host.single_device(model), vae, encoder.vlm, clip
        self.error = loss_of(model)
        self.sigmas = model.get_model_object("model_sampling").sigmas.detach().float().cpu().clone()
        self.tokens = stage_tokens(self.vlm, settings)
        stage = STAGES[settings.stage]
        sizes = {i: tuple(n // 8 for n in dataset.records[i].size) for i in dataset.fitting(stage)}
        self.lessons = Lessons(dataset, settings, self.tokens, sizes, self.process.rank, self.process.world)
        connector = starting_connector(model, encoder, self.tokens, settings)
        self.reads, self.before = Reads.of(self.vlm, self.tokens), connector.info
        self.config, self.network = connector.config, connector.trainable()
        self.unet = multimodal_lora.unet_factors(model, settings.rank, settings.seed) if settings.train_unet else None
        self.language = None
        if settings.train_language:
            self.language = multimodal_lora.language_factors(self.vlm.model, settings.rank, settings.seed + 1)
        self.history, self.reader, self.late = History(), ReadTokens(), tuning_runtime.LateReader()
        self.waiting: list[tuple[int, Tensor]] = []
        self.latents: dict[int, Tensor] = {}
        self.pooled_texts: dict[str, Tensor] = {}
        self.samples: list[Tensor] = []
        self.kept_state, self.ready = state, False

    # ---- before the U-Net is loaded

    def start(self) -> None:
        """Put what is trained on the device, and go on from an earlier state."""
        import comfy.model_management

        device = comfy.model_management.get_torch_device()
        network = self.network.to(device)
        parts = [("unet", self.unet, self.settings.unet_rate), ("language", self.language, self.settings.language_rate)]
        self.loras = [(name, factors, rate) for name, factors, rate in parts if factors is not None]
        for _, factors, _ in self.loras:
            factors.to(device)
        if self.kept_state is not None:
            self.restore_weights(network, self.kept_state)
        if self.settings.again:
            for block in network.blocks:
                block.forward = Again(block.forward)
        fused = device.type in ("cpu", "cuda")
        adam = {"weight_decay": WEIGHT_DECAY, "fused": fused}
        self.names = [name for name, _ in network.named_parameters()]
        optimise = partial(torch.optim.AdamW, lr=self.settings.connector_rate, **adam)
        self.network, optimiser = self.process.prepare(network, optimise)
        self.optimisers = [("network", optimiser, self.settings.connector_rate)]
        for name, factors, rate in self.loras:
            found = torch.optim.AdamW(list(factors.named().values()), rate, **adam)
            self.optimisers.append((name, found, rate))
        if self.kept_state is not None:
            self.restore_moments(self.kept_state)
        self.kept_state, self.ready, self.device = None, True, device
        stage, records = STAGES[self.settings.stage], list(self.lessons.sizes)
        chosen = records[:: max(1, len(records) // SAMPLES)][:SAMPLES]
        self.shown = [
            (i, self.lessons.dataset.draw(i, stage, self.tokens, chance_of(self.settings.seed, "sample", i)))
            for i in chosen
        ]
        self.shown_hidden = None if self.language else [self.asked(((), prompt)) for _, prompt in self.shown]

    def asked(self, prompts: Sequence[Prompt]) -> Hidden:
        """What the language model makes of prompts; kept on the CPU."""
        with torch.no_grad():
            hidden = self.vlm.hidden_states(prompts)
        return Hidden(hidden.states.cpu().clone(), hidden.mask.cpu().clone(), hidden.layouts)

    def asked_with_gradient(self, prompts: Sequence[Prompt]) -> Hidden:
        """What the language model makes of prompts under its LoRA, with a gradient; its eye has none."""
        vlm, model = self.vlm, self.vlm.model
        read = [vlm.tokenised(prompt) for prompt in prompts]
        length = max(len(ids) for ids, _ in read)
        vlm.load(len(prompts) * length)
        multimodal_lora.make_ordinary(model)
        device, pad = vlm.patcher.load_device, vlm.tokenizer.pad_token_id
        pad = vlm.first_token() if pad is None else pad
        ids = torch.tensor([row + [pad] * (length - len(row)) for row, _ in read], device=device)
        mask = torch.tensor([[i < len(row) for i in range(length)] for row, _ in read], device=device)
        embedded = model.get_input_embeddings()(ids).to(vlm.dtype)
        image = mask & (ids == vlm.tokenizer.convert_tokens_to_ids(IMAGE))
        pictures = [(span.picture, span.side) for _, spans in read for span in spans if span.picture]
        if pictures:
            embedded = embedded.detach().masked_scatter(image[..., None], torch.cat(vlm.look(pictures)).to(embedded))
        if not embedded.requires_grad:  # so that gradient checkpointing has something to follow
            embedded = embedded.detach().requires_grad_(torch.is_grad_enabled())
        states = model.text_model(inputs_embeds=embedded, attention_mask=mask.long(), use_cache=False).last_hidden_state
        return Hidden(states, mask, tuple(tuple(spans) for _, spans in read))

    def latent(self, record: int) -> Tensor:
        """A picture's latent (C, h, w) in the model's own scale, on the CPU; encoded once."""
        if record not in self.latents:
            with torch.no_grad():
                encoded = self.vae.encode(self.lessons.dataset.picture(record)[None])
                self.latents[record] = self.host_model.model.process_latent_in(encoded.float().cpu())[0].clone()
        return self.latents[record]

    def pooled_text(self, prompt: Prompt) -> Tensor:
        """CLIP's pooled output of a prompt's words, (1, P) on the CPU."""
        text = spoken(prompt)
        if text not in self.pooled_texts:
            with torch.no_grad():
                pooled = self.clip.encode_from_tokens(self.clip.tokenize(text), return_pooled=True)[1]
            self.pooled_texts[text] = torch.zeros(1, POOLED_WIDTH) if pooled is None else pooled.float().cpu().clone()
        return self.pooled_texts[text]

    def ahead(self, steps: Sequence[int]) -> list[list[Lesson]]:
        """The lessons of some steps, with everything encoded that other models than the U-Net encode."""
        import comfy.model_management

        prepared = []
        for step in steps:
            comfy.model_management.throw_exception_if_processing_interrupted()
            found = []
            for lesson in self.lessons.of_step(step):
                for record in lesson.records:
                    self.latent(record)
                if self.settings.pooled == CLIP_TEXT:
                    for prompt in lesson.prompts:
                        self.pooled_text(prompt)
                hidden = None if self.language else self.asked(lesson.prompts)
                found.append(Lesson(lesson.records, lesson.prompts, lesson.shares, lesson.noise, hidden))
            prepared.append(found)
        return prepared

    # ---- while the U-Net is loaded

    def run(self) -> None:
        """All steps, a few at a time: in between, the host may exchange the U-Net for the other models."""
        from comfy.patcher_extension import WrappersMP

        model, settings = self.host_model, self.settings
        self.start()
        first, last = self.history.before, self.history.before + settings.steps
        language = self.vlm.model
        with (
            multimodal_lora.acting(language, self.language),
            multimodal_lora.run_again(language, bool(self.language) and settings.again),
        ):
            for begin in range(first, last, READ_AHEAD):
                self.prepared = list(enumerate(self.ahead(range(begin, min(begin + READ_AHEAD, last))), begin))
                if begin + READ_AHEAD >= last:
                    for _, prompt in self.shown if settings.pooled == CLIP_TEXT else ():
                        self.pooled_text(prompt)
                patched, _ = tuning_runtime.prepare(model, host.AttentionLayer("input", 0, 0, 0), False)
                patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, NAME, self.reader)
                self.together = not has_replacement(patched, "attn2")
                if self.together:
                    layers = host.cross_attention_layers(patched, TECHNIQUE)
                    host.replace_attention(patched, "attn2", layers, lambda p: LeaveOutFilling(self.reader, p))
                if self.unet is not None:
                    multimodal_lora.add_to_unet(patched, self.unet)
                if settings.again:
                    recompute.install(patched)
                if settings.pooled == LEARNED:
                    aliases = tuning_runtime.AliasWeights(embedding_weights(model))
                    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, NAME, aliases)
                record = self.prepared[0][1][0].records[0]
                start = self.latent(record)[None].repeat(settings.batch, 1, 1, 1)
                nothing = {"pooled_output": torch.zeros(1, POOLED_WIDTH)}
                positive = [[torch.zeros(1, 1, self.config.context_width), nothing]]
                levels = torch.tensor([float(self.sigmas[-1]), 0.0])
                inversion.sample(patched, self, start, levels, positive, None, 1.0)
                if self.history.stopped:
                    break

    def __call__(
        self, model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool = False, **_
    ) -> Tensor:
        """x gives the device and is returned unchanged."""
        import comfy.model_management

        self.model, self.arguments, self.device = model, extra_args or {}, x.device
        last = self.history.before + self.settings.steps - 1
        for step, lessons in self.prepared:
            comfy.model_management.throw_exception_if_processing_interrupted()
            self.step(step, lessons)
            every = self.settings.preview_every
            drawn = self.drawn(0) if every and (step + 1) % every == 0 else None
            self.show(step - self.history.before, drawn)
            if self.history.stopped:
                return x
            if self.settings.save_every and (step + 1) % self.settings.save_every == 0 and step != last:
                self.read_losses(True)
                self.save(self.snapshot())
            if step == last:
                self.read_losses(True)
                self.samples = [self.drawn(i) for i in range(len(self.shown))]
        return x

    save: Callable[[Snapshot], None] = staticmethod(lambda snapshot: None)

    def read(self, hidden: Hidden, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor, Tensor]:
        """(context (B, L, C), which tokens are there (B, L), pooled (B, P)) of hidden states, with a gradient."""
        there = hidden.mask.to(self.device)
        context, learned = self.network(hidden.states.to(self.device, torch.float32), there)
        return context, there, POOLING[self.settings.pooled](self, learned, prompts)

    def predict(self, x: Tensor, sigma: Tensor, context: Tensor, there: Tensor, pooled: Tensor) -> Tensor:
        """The model's x_0 of noised pictures (B, C, H, W) at sigma (B,), without guidance.

        Rows of other lengths go in one call, their filling left out; where another node replaces the cross-attention,
        which may not know a mask, each goes by itself.
        """
        reader = self.reader
        if self.together or bool(there.all()):
            reader.context, reader.pooled = context, pooled
            reader.there = None if bool(there.all()) else there
            return self.model(x, sigma, **self.arguments)
        reader.there, found = None, []
        for row, count in enumerate(there.sum(1).tolist()):
            reader.context, reader.pooled = context[row : row + 1, :count], pooled[row : row + 1]
            found.append(self.model(x[row : row + 1], sigma[row : row + 1], **self.arguments))
        return torch.cat(found)

    def losses(self, lesson: Lesson) -> Tensor:
        """The loss of each picture of a lesson, (B,)."""
        clean = torch.stack([self.latent(record) for record in lesson.records])
        noise = torch.stack([torch.randn(c.shape, generator=g) for c, g in zip(clean, lesson.noise, strict=True)])
        clean, noise = clean.to(self.device), noise.to(self.device)
        place = ((1.0 - lesson.shares) * len(self.sigmas)).long().clamp(0, len(self.sigmas) - 1)
        sigma = self.sigmas[place].to(self.device)
        hidden = lesson.hidden if lesson.hidden is not None else self.asked_with_gradient(lesson.prompts)
        context, there, pooled = self.read(hidden, lesson.prompts)
        denoised = self.predict(clean + sigma[:, None, None, None] * noise, sigma, context, there, pooled)
        return self.error(denoised, clean, sigma)

    def step(self, step: int, lessons: Sequence[Lesson]) -> None:
        """One step of the optimisers over all lessons of it. A gradient that is no number changes nothing."""
        for _, optimiser, rate in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
            for group in optimiser.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / max(self.settings.warmup, 1))
        found = []
        for lesson in lessons:
            losses = self.losses(lesson)
            # By the number of elements and back: half-precision gradients within the U-Net stay clear of underflow.
            scale = math.prod(self.latent(lesson.records[0]).shape)
            self.process.backward(losses.mean() * (scale / len(lessons)))
            found.append(losses.detach())
        for name, optimiser, _ in self.optimisers:
            learned = [t for group in optimiser.param_groups for t in group["params"] if t.grad is not None]
            for tensor in learned:
                tensor.grad.div_(scale)
            if name != "network":
                self.process.average([tensor.grad for tensor in learned])
            self.process.apply(optimiser, self.process.clip(learned))
        self.waiting.append((step, torch.cat([lesson.shares for lesson in lessons])))
        self.note(self.late.read(torch.cat(found)))

    def read_losses(self, now: bool) -> None:
        """Take in what is still on its way from the device."""
        if now and self.late.waiting is not None:
            copy, event = self.late.waiting
            self.late.waiting = None
            event.synchronize()
            self.note(copy)

    def note(self, losses: Tensor | None) -> None:
        """Write down the losses of a step that have arrived. Stops the training where they stay no numbers."""
        if losses is None:
            return
        step, shares = self.waiting.pop(0)
        loss, history = float(losses.mean()), self.history
        history.bad = 0 if math.isfinite(loss) else history.bad + 1
        history.losses.append(loss)
        history.points += zip(itertools.repeat(step), shares.tolist(), losses.tolist(), strict=False)
        self.tell(f"step {step + 1} of {history.before + self.settings.steps}, loss {history.recent():.4f}")
        if history.bad >= NAN_STEPS:
            if not any(map(math.isfinite, history.losses)):
                raise ValueError(
                    "the model returns NaN for these pictures: run it in another precision (start ComfyUI with "
                    "--bf16-unet or --fp32-unet), or look at the pictures of the dataset."
                )
            history.stopped = f"the loss was no number for {NAN_STEPS} steps: the weights before them are kept"

    @torch.no_grad()
    def drawn(self, number: int) -> Tensor:
        """The picture that the model draws for one of the shown prompts by now, (1, C, h, w) in its own scale: DDIM."""
        record, prompt = self.shown[number]
        hidden = self.shown_hidden[number] if self.shown_hidden else self.asked_with_gradient(((), prompt))
        context, there, pooled = self.read(hidden, ((), prompt))
        places = torch.linspace(len(self.sigmas) - 1, 0, SAMPLE_STEPS).round().long()
        levels = [*self.sigmas[places].tolist(), 0.0]
        shape = (1, *self.latent(record).shape)
        x = torch.randn(shape, generator=chance_of(self.settings.seed, "noise", number)).to(self.device)
        x = x * math.sqrt(1.0 + levels[0] ** 2)
        counts = there.sum(1).tolist()
        rows = [
            (context[i : i + 1, :count], there[i : i + 1, :count], pooled[i : i + 1]) for i, count in enumerate(counts)
        ]
        for sigma, sigma_next in itertools.pairwise(levels):
            level = x.new_full((1,), sigma)
            null, full = (self.predict(x, level, *row) for row in rows)
            x = ddim_step(x, null + SAMPLE_GUIDANCE * (full - null), sigma, sigma_next)
        return x.float().cpu()

    # ---- what was learned

    def snapshot(self) -> Snapshot:
        """Everything that was learned up to now."""
        weights = self.process.weights(self.network)
        network = build(self.config)
        network.load_state_dict(weights)
        info = {
            "steps": self.history.steps,
            "stage": self.settings.stage,
            "tokens": self.tokens,
            "loss": self.history.recent(),
            "pooled": self.settings.pooled,
            "rates": [rate for _, _, rate in self.optimisers],
            "rank": self.settings.rank if self.loras else 0,
            "seed": self.settings.seed,
            "dataset": self.lessons.dataset.folder.name,
            "earlier": {name: value for name, value in self.before.items() if name != "earlier"},
        }
        state = {f"network.{name}": tensor for name, tensor in weights.items()}
        for name, factors, _ in self.loras:
            state |= {f"{name}.{key}": tensor.detach().cpu().clone() for key, tensor in factors.named().items()}
        state["steps"] = torch.tensor(self.history.steps)
        return Snapshot(
            Connector.of(network, self.reads, info),
            multimodal_lora.unet_file(self.unet) if self.unet else {},
            multimodal_lora.language_file(self.language) if self.language else {},
            state | self.moments(),
            info | {"config": asdict(self.config)},
        )

    def keys(self, name: str) -> list[str]:
        """The names of what one of the optimisers changes, in its order."""
        factors = {part: found for part, found, _ in self.loras}
        return [f"{name}.{key}" for key in (factors[name].named() if name in factors else self.names)]

    def moments(self) -> dict[str, Tensor]:
        """The state of every optimiser, by the name of what it changes."""
        found = {}
        for name, optimiser, _ in self.optimisers:
            parameters = [t for group in optimiser.param_groups for t in group["params"]]
            for key, tensor in zip(self.keys(name), parameters, strict=True):
                state = optimiser.state.get(tensor, {})
                kept = {word: self.process.whole(value.detach()).cpu().clone() for word, value in state.items()}
                found |= {f"{key}|{word}": value for word, value in kept.items()}
        return found

    def restore_weights(self, network: nn.Module, state: dict[str, Tensor]) -> None:
        """Go on from these weights. Raises ValueError where they are another training's."""
        here = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
        for name, factors, _ in self.loras:
            here |= {f"{name}.{key}": tensor for key, tensor in factors.named().items()}
        odd = [name for name, tensor in here.items() if name not in state or state[name].shape != tensor.shape]
        left = [n for n in state if "|" not in n and n != "steps" and n not in here]
        if odd or left:
            raise ValueError(
                f"the training to go on with is another one ({len(odd) + len(left)} of its tensors differ, "
                f"{(odd or left)[0]} for one): choose the same LoRAs, rank and encoder that it began with, or (new)."
            )
        with torch.no_grad():
            for name, tensor in here.items():
                tensor.copy_(state[name])
        self.history.before = int(state["steps"])

    def restore_moments(self, state: dict[str, Tensor]) -> None:
        """Go on with the optimisers' state."""
        for name, optimiser, _ in self.optimisers:
            parameters = [t for group in optimiser.param_groups for t in group["params"]]
            for key, tensor in zip(self.keys(name), parameters, strict=True):
                words = [word for word in ("step", "exp_avg", "exp_avg_sq") if f"{key}|{word}" in state]
                kept = {word: state[f"{key}|{word}"].clone() for word in words}
                if kept:
                    optimiser.state[tensor] = {
                        word: value if word == "step" else self.process.part(value, tensor)
                        for word, value in kept.items()
                    }
                    if optimiser.defaults.get("fused"):
                        optimiser.state[tensor]["step"] = kept["step"].to(tensor.device)


def no_pooled(fit: Fit, learned: Tensor | None, prompts: Sequence[Prompt]) -> Tensor:
    """Zeros, (B, 1280): the paper removes the encoder that this came from."""
    return torch.zeros(len(prompts), POOLED_WIDTH, device=fit.device)


def learned_pooled(fit: Fit, learned: Tensor | None, prompts: Sequence[Prompt]) -> Tensor:
    """What the connector makes, (B, 1280), with a gradient."""
    return learned


def text_pooled(fit: Fit, learned: Tensor | None, prompts: Sequence[Prompt]) -> Tensor:
    """CLIP's, of the prompts' words, (B, 1280)."""
    return torch.cat([fit.pooled_text(prompt) for prompt in prompts]).to(fit.device)


POOLING: dict[str, Callable[[Fit, Tensor | None, Sequence[Prompt]], Tensor]] = {
    ZEROS: no_pooled,
    LEARNED: learned_pooled,
    CLIP_TEXT: text_pooled,
}


def embedding_weights(model: Any) -> list[str]:
    """The U-Net's weights that a gradient into the pooled output touches, and that none into the tokens does."""
    names = [name for name, _ in model.model.diffusion_model.named_parameters()]
    return [name for name in names if name.startswith(("label_emb.", "time_embed."))]


def has_replacement(patched: Any, name: str) -> bool:
    """Whether another node replaces the attention `name` anywhere in a MODEL."""
    slots = patched.model_options.get("transformer_options", {}).get("patches_replace", {})
    return bool(slots.get(name))


def train(
    model: Any,
    vae: Any,
    encoder: MultimodalEncoder,
    dataset: Dataset,
    settings: TrainSettings,
    clip: Any = None,
    state: dict[str, Tensor] | None = None,
    show: Callable[[int, Tensor | None], None] = lambda step, latent: None,
    tell: Callable[[str], None] = lambda text: None,
    save: Callable[[Snapshot], None] = lambda snapshot: None,
    process: Process | None = None,
) -> Trained:
    """Train the connector of an encoder, and LoRAs by choice, on a dataset of interleaved prompts.

    The loss and its gradient run through the host's guider and U-Net, so that LoRA and patches of other nodes act. The
    model, the vision-language model and the encoder's connector are left as they were. state: of a Snapshot, to go on
    from. save is given what was learned every save_every steps, at the end, and when the training is cancelled or
    fails. Raises ValueError for unusable inputs and for a model that returns NaN.
    """
    host.require_unet(model, TECHNIQUE)
    if settings.pooled == CLIP_TEXT and clip is None:
        raise ValueError("pooled_output 'CLIP text' needs a text encoder: connect clip, or choose 'zeros'.")
    with torch.inference_mode(False):
        fit = Fit(model, vae, encoder, dataset, settings, clip, state, process, show, tell)
        fit.save = save
        try:
            fit.run()
        finally:
            fit.read_losses(True)
            if fit.ready and any(map(math.isfinite, fit.history.losses)):
                snapshot = fit.snapshot()
                save(snapshot)
        return result(fit, snapshot)


def result(fit: Fit, snapshot: Snapshot) -> Trained:
    """What has been learned, as sockets carry it."""
    vlm = fit.vlm
    if snapshot.language_lora:
        vlm = with_lora(vlm, snapshot.language_lora, 1.0, "the trained LoRA")
    rows = []
    for (record, prompt), latent in zip(fit.shown, fit.samples, strict=False):
        with torch.no_grad():
            picture = fit.vae.decode(fit.host_model.model.process_latent_out(latent))
        pictures = [part for part in prompt if isinstance(part, Picture)]
        cells = [
            *((interleaved_dataset.to_image(each.pixels), each.name) for each in pictures),
            (interleaved_dataset.to_image(picture.reshape(-1, *picture.shape[-3:])[0].float()), "drawn"),
            (interleaved_dataset.to_image(fit.lessons.dataset.picture(record)), "the dataset's"),
        ]
        text = "".join(part if isinstance(part, str) else f"<{part.name}>" for part in prompt)
        rows.append(interleaved_dataset.Row(tuple(cells), text))
    return Trained(snapshot, join(vlm, snapshot.connector), fit.history, interleaved_dataset.sheet(rows))


def describe(trained: Trained) -> str:
    """What was trained and how it went, in one line."""
    info, history = trained.snapshot.info, trained.history
    first = history.losses[: max(1, len(history.losses) // 10)]
    parts = [
        f"{len(history.losses)} steps ({history.steps} in all), loss {sum(first) / len(first):.4f} at first, "
        f"{history.recent():.4f} at last",
        f"stage {info['stage']}, {info['tokens']} tokens a picture, pooled output {info['pooled']}",
        f"connector {trained.snapshot.connector.parameters / 1e6:.1f} M",
    ]
    for name, lora in (("U-Net", trained.snapshot.unet_lora), ("language", trained.snapshot.language_lora)):
        if lora:
            parts.append(f"{name} LoRA rank {info['rank']}, {sum(t.numel() for t in lora.values()) / 1e6:.2f} M")
    return "; ".join([*parts, *([history.stopped] if history.stopped else [])])
