"""MGIE's edit head as a training changes it, with the tokens [IMG0..7] that a language model says for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.edit_head import EditHeadConfig, EditMapper
from .. import host, instruction, training
from .examples import Example
from .settings import TECHNIQUE, InstructionSettings

HEADS = 4  # of attention, in a new head: MGIE's
FEED_FORWARD = 4  # of a new head, so many times its width: MGIE's
QUERIES = 77  # tokens of SD 1.5's prompts


class LearningHead:
    """What is trained (training.Learning): the head's weights and, with learns_rows, the rows of [IMG0..7].

    embeddings (8, D): what the head adds to the states where the rows do not learn. kept: rows that were learned
    before and stay. new: its weights are random.
    """

    new = False

    def __init__(
        self,
        network: EditMapper,
        embeddings: Tensor,
        rows: tuple[Tensor, Tensor] | None,
        kept: instruction.ImageRows | None = None,
    ):
        self.kept = kept
        self.network = network.requires_grad_(True)
        self.embeddings = embeddings
        self.tokens = {} if rows is None else dict(zip(("given", "said"), map(wanting_gradient, rows), strict=True))

    @classmethod
    def of(cls, head: instruction.EditHead, model: Any, settings: InstructionSettings) -> LearningHead:
        """The head of a socket, copied, or a new one, for a MODEL. Raises ValueError for one it has no prompts for."""
        require_readable(model)
        language, width = head.model.loaded(), host.text_width(model)
        language.require_images()
        rows = instruction.own_rows(language)
        with torch.inference_mode(False):
            if head.network is None:
                made = new_network(language.config.text_config.hidden_size, width, settings)
            else:
                made = EditMapper(head.network.config, torch.nn)
                made.load_state_dict({name: tensor.clone() for name, tensor in head.network.state_dict().items()})
            if made.config.context != width:
                raise ValueError(
                    f"the edit head makes prompts of {made.config.context} channels, this model reads {width}: connect "
                    "the model that it belongs to."
                )
            embeddings = rows[0] if head.embeddings is None else head.embeddings
            found = cls(made, embeddings.clone(), rows if settings.image_tokens else None, language.rows)
            found.new = head.network is None
            return found

    @property
    def learns_rows(self) -> bool:
        """Whether the tokens learn."""
        return bool(self.tokens)

    @property
    def rows(self) -> instruction.ImageRows | None:
        """The rows as they are by now; None where they are the language model's own."""
        return instruction.ImageRows(**self.tokens) if self.tokens else self.kept

    @property
    def added(self) -> Tensor:
        """(8, D): what the head adds to the states."""
        return self.tokens["given"] if self.tokens else self.embeddings

    def to(self, device: Any) -> None:
        """Bring network and rows to a device, before an optimiser knows them."""
        self.network.to(device)
        self.embeddings = self.embeddings.to(device)
        self.tokens = {name: wanting_gradient(tensor.to(device)) for name, tensor in self.tokens.items()}

    def named(self) -> dict[str, Tensor]:
        """The head's weights, and the rows of the tokens where they learn."""
        return {f"network.{name}": tensor for name, tensor in self.network.named_parameters()} | self.tokens

    def parameters(self) -> list[Tensor]:
        """All of `named`."""
        return list(self.named().values())

    def prompts(self, states: Tensor) -> Tensor:
        """(B, 77, context) of states (B, 8, D); of zeros the prompt of no text."""
        return self.network(states, self.added)

    def content(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """A file's tensors and header."""
        return instruction.head_content(self.network, self.added, self.rows)

    def on(self, head: instruction.EditHead, name: str) -> instruction.EditHead:
        """The EDIT_HEAD that the file gives, bit for bit, on the language model of the one that was trained."""
        tensors, _ = self.content()
        return instruction.from_content(tensors, self.network.config.heads, name).on(head, name)


def wanting_gradient(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(True)


def new_network(hidden: int, context: int, settings: InstructionSettings) -> EditMapper:
    """An edit head of random weights, by the seed. Raises ValueError for a width that its attention cannot split."""
    width = settings.head_width
    if width % HEADS:
        raise ValueError(f"head_width is {width}, it must be a multiple of {HEADS}: its attention has {HEADS} heads.")
    own = {"heads": HEADS, "layers": settings.head_layers, "feed_forward": FEED_FORWARD * width, "queries": QUERIES}
    config = EditHeadConfig(hidden=hidden, width=width, context=context, **own)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.generator_at(settings.seed, "edit head").initial_seed())
        return EditMapper(config, torch.nn)


def require_readable(model: Any) -> None:
    """Raise ValueError for a MODEL that reads more than 77 tokens of a text."""
    if host.reads_pooled(model):
        raise ValueError(
            f"{TECHNIQUE}: an edit head makes no pooled output, which this model reads (SDXL): take an SD 1.5 model, "
            "or disconnect edit_head."
        )


# ------------------------------------------------------------------------------------------------------- what it reads


@dataclass(eq=False)
class HeadReader:
    """What a head makes of examples, by the states of its language model.

    known: states (8, D) by example, of a language model of which nothing learns; heard: those of the running batch,
    with a gradient into the rows.
    """

    head: LearningHead
    language: instruction.MgieModel
    known: dict[Example, Tensor] = field(default_factory=dict)
    heard: dict[Example, Tensor] = field(default_factory=dict)

    def remember(self, examples: Sequence[Example]) -> None:
        """Bring the language model to the device; where nothing of it learns, read the states once and for all."""
        longest = max(len(self.language.tokens(f"{each.told.prompt} {each.told.text}")) for each in examples)
        self.language.load(longest + len(self.language.images))
        for example in [] if self.head.learns_rows else dict.fromkeys(examples):
            host.stop_if_cancelled()
            with torch.no_grad():
                self.known[example] = instruction.hear(self.language, example.told)[0].cpu()

    def hear(self, examples: Sequence[Example]) -> Tensor:
        """(B,): the cross-entropy of their texts, 0 where the rows do not learn; their states are at hand then."""
        if not self.head.learns_rows:
            return torch.zeros(len(examples))
        model = replace(self.language, rows=self.head.rows)
        found = [instruction.hear(model, example.told) for example in examples]
        self.heard = dict(zip(examples, (states for states, _ in found), strict=True))
        return torch.stack([loss for _, loss in found])

    def states(self, example: Example) -> Tensor:
        """(8, D)."""
        if self.head.learns_rows and example not in self.heard:
            with torch.no_grad():
                self.hear([example])
        return self.heard[example] if self.head.learns_rows else self.known[example]

    def batch(self, examples: Sequence[Example], told: Sequence[bool], device: Any) -> tuple[Tensor, None]:
        """(prompts (B, 77, context), None); of those that are not told their text the prompt of none."""
        none = torch.zeros_like(self.head.added)
        states = [self.states(example) if tell else none for example, tell in zip(examples, told, strict=True)]
        return self.head.prompts(torch.stack([each.to(device) for each in states])), None
