"""What a training of a multimodal encoder changes: the connector, LoRA factors, and an optimiser for each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.connector import ConnectorConfig, ConnectorNetwork
from ....kernels.lora import rate_share
from ...host.checkpointing import checkpointed
from ...training import adamw, clip_gradients, divide_gradients, unet_file
from ..encoder import POOLED_WIDTH, Connector, MultimodalEncoder, Reads, build, context_width
from .course import ALIGN, LEARNERS, READ
from .lora import language_factors, language_file, unet_factors
from .settings import LEARNED, TrainSettings

# ---- one process, or one of several ---------------------------------------------------------------------------------


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
        """Limit the norm of the gradients; returns what it was."""
        return clip_gradients(parameters)

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


# ---- the connector --------------------------------------------------------------------------------------------------


def starting_connector(model: Any, encoder: MultimodalEncoder, tokens: int, settings: TrainSettings) -> Connector:
    """The encoder's connector, or a new one. Raises ValueError for one that this model cannot read."""
    width, connector = context_width(model), encoder.connector
    if connector is None:
        heads = max(1, width // 64)
        pooled = POOLED_WIDTH if settings.pooled_output == LEARNED else 0
        config = ConnectorConfig(encoder.vlm.width, width, settings.depth, heads, pooled_width=pooled)
        return Connector.new(config, Reads.of(encoder.vlm, tokens), settings.seed)
    if connector.config.context_width != width:
        raise ValueError(
            f"the encoder's connector makes tokens of {connector.config.context_width} channels, this model reads "
            f"{width}: load a model of its family, or an encoder without a connector."
        )
    if settings.pooled_output == LEARNED and not connector.config.pooled_width:
        raise ValueError(
            "the encoder's connector has no pooled output to learn: set pooled_output to zeros, or begin a new "
            "connector."
        )
    return connector


def require_course(settings: TrainSettings, state: dict[str, Tensor] | None) -> None:
    """Raise ValueError for lessons that cannot be taken, or are others than those of the training that goes on."""
    if settings.read_steps and not settings.train_unet:
        raise ValueError(
            f"read_steps is {settings.read_steps}: that lesson trains the U-Net's LoRA alone, and train_unet is off: "
            "switch it on, or set read_steps to 0."
        )
    here = [settings.align_steps, settings.read_steps]
    there = here if state is None else state.get("lessons", torch.zeros(2)).int().tolist()
    if here != there:
        raise ValueError(
            f"the training to go on with began with align_steps {there[0]} and read_steps {there[1]}, here they are "
            f"{here[0]} and {here[1]}: set them as they were (preset as well), or choose (new)."
        )


# ---- all that learns ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What was learned so far: the connector, LoRA files (empty where none is trained), and all to go on from."""

    connector: Connector
    unet_lora: dict[str, Tensor]
    language_lora: dict[str, Tensor]
    state: dict[str, Tensor]
    info: dict


class Learner:
    """A connector and, by choice, LoRA factors of the U-Net and of the language model, each with its own AdamW."""

    def __init__(
        self,
        model: Any,
        encoder: MultimodalEncoder,
        tokens: int,
        settings: TrainSettings,
        process: Process,
        state: dict[str, Tensor] | None = None,
    ):
        self.settings, self.process, self.state, self.course = settings, process, state, settings.course
        require_course(settings, state)
        connector = starting_connector(model, encoder, tokens, settings)
        self.reads, self.earlier = Reads.of(encoder.vlm, tokens), connector.info
        self.config, self.network = connector.config, connector.trainable()
        rank, seed = settings.lora_rank, settings.seed
        self.unet = unet_factors(model, rank, seed) if settings.train_unet else None
        self.language = language_factors(encoder.vlm.model, rank, seed + 1) if settings.train_language else None
        parts = [("unet", self.unet, settings.unet_rate), ("language", self.language, settings.language_rate)]
        self.loras = [(name, factors, rate) for name, factors, rate in parts if factors is not None]
        self.learning: tuple[str, ...] = ()  # the parts that the present lesson changes
        self.anew = 0  # the step at which optimisers without an earlier state began

    def start(self, device: torch.device) -> int:
        """Put everything on the device, and go on from an earlier state; returns the steps before this training."""
        network, state = self.network.to(device), self.state
        for _, factors, _ in self.loras:
            factors.to(device)
        if state is not None:
            self.restore_weights(network, state)
        if self.settings.checkpointing:
            for block in network.blocks:
                block.forward = checkpointed(block.forward)
        self.names = [name for name, _ in network.named_parameters()]
        rate = self.settings.connector_rate
        self.network, optimiser = self.process.prepare(network, partial(adamw, rate=rate, device=device))
        learned = [(name, adamw(factors.parameters(), rate, device), rate) for name, factors, rate in self.loras]
        self.optimisers = [("network", optimiser, rate), *learned]
        begun = 0 if state is None else int(state["steps"])
        if state is not None:
            self.restore_moments(state)
            self.anew = int(state.get("anew", 0)) if any("|" in name for name in state) else begun
        self.state = None
        return begun

    # ---- a step

    def begin(self, step: int, end: int) -> None:
        """Forget the gradients of the step before, and set this step's learning rates, in a training up to `end`.

        A lesson begins with new optimisers, as it has another loss, and with its own warm-up; so does a training that
        goes on without AdamW's moments.
        """
        lesson, first = self.course.lesson(step), max(self.course.begin(step), self.anew)
        self.learning = LEARNERS[lesson]
        special = {"network": self.settings.align_rate} if lesson == ALIGN else {}
        special |= {"unet": self.settings.read_rate} if lesson == READ else {}
        share = self.share(step - first, self.course.behind(step, end) - first)
        for name, optimiser, rate in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
            if step == first:
                optimiser.state.clear()
            for group in optimiser.param_groups:
                group["lr"] = special.get(name, rate) * share

    def share(self, step: int, steps: int) -> float:
        """The share of the learning rates in step 0 .. steps - 1 of a lesson: a rise, then what the schedule says."""
        warmup = self.settings.warmup
        fall = rate_share(max(0, step - warmup), steps - warmup, schedule=self.settings.schedule)
        return min(1.0, (step + 1) / max(warmup, 1)) * fall

    def finish(self, scale: float) -> None:
        """Learn from the gradients, divided by `scale`; one that is no number changes nothing."""
        for name, optimiser, _ in self.optimisers:
            if name not in self.learning:
                continue
            learned = [t for group in optimiser.param_groups for t in group["params"] if t.grad is not None]
            divide_gradients(learned, scale)
            if name != "network":
                self.process.average([tensor.grad for tensor in learned])
            self.process.apply(optimiser, self.process.clip(learned))

    # ---- what was learned

    def sizes(self) -> dict[str, int]:
        """Bytes of the files that will be written, by part; to be asked before the start."""
        found = {"connector": 4 * sum(p.numel() for p in self.network.parameters())}
        found |= {name: 4 * sum(t.numel() for t in factors.parameters()) for name, factors, _ in self.loras}
        return found | {"state": (3 if self.settings.keep_moments else 1) * sum(found.values())}

    def snapshot(self, info: dict) -> Snapshot:
        """Everything that was learned up to now, described by `info`, of which "steps" is needed to go on."""
        weights = self.process.weights(self.network)
        network = build(self.config)
        network.load_state_dict(weights)
        info = info | {
            "rates": [rate for _, _, rate in self.optimisers],
            "rank": self.settings.lora_rank if self.loras else 0,
            "earlier": {name: value for name, value in self.earlier.items() if name != "earlier"},
        }
        state = {f"network.{name}": tensor for name, tensor in weights.items()}
        for name, factors, _ in self.loras:
            state |= {f"{name}.{key}": tensor.detach().cpu().clone() for key, tensor in factors.named().items()}
        state["steps"] = torch.tensor(info["steps"])
        if self.anew:
            state["anew"] = torch.tensor(self.anew)
        if self.course.before_drawing:
            state["lessons"] = torch.tensor([self.course.align, self.course.read])
        return Snapshot(
            Connector.of(network, self.reads, info),
            unet_file(self.unet) if self.unet else {},
            language_file(self.language) if self.language else {},
            state | (self.moments() if self.settings.keep_moments else {}),
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
        left = [n for n in state if "|" not in n and n not in ("steps", "anew", "lessons", *here)]
        if odd or left:
            raise ValueError(
                f"the training to go on with is another one ({len(odd) + len(left)} of its tensors differ, "
                f"{(odd or left)[0]} for one): choose the same LoRAs, rank and encoder that it began with, or (new)."
            )
        with torch.no_grad():
            for name, tensor in here.items():
                tensor.copy_(state[name])

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
