"""A rival of pictures as words: a pooled picture with an attention of its own, as IP-Adapter has it.

    python dev.py bench multimodal --ablation rival --minutes 30 --work FOLDER     goes on where it stopped
    python dev.py bench multimodal --ablation rival --steps 2 --scenes 8 --count 2 --work FOLDER    a try

The table's row of one pooled vector is the mean of a picture's tokens, one token of the prompt: it stands in line with
the words, and one softmax is over all. IP-Adapter (arXiv:2308.06721, section 3.2) leaves the prompt to the text encoder
and the U-Net frozen, and adds a cross-attention beside every one there is:

    Z = Attention(Q, K(text), V(text)) + strength Attention(Q, K'(image), V'(image))
    image = LayerNorm(Linear(pooled)), 4 tokens; K', V' begin as K, V and are trained with the Linear

Words and picture so do not compete, and the strength is chosen when sampling. pooled: the mean of the tokens of the
same vision-language model that the table's rows have (IP-Adapter takes CLIP's embedding); words as the table's prompts
have them, without the colour, by the pocket model's own text encoder; the picture is dropped one time in ten.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks import multimodal_pocket as learning
from benchmarks import pocket_host
from benchmarks.multimodal_learning import Progress, Trainer, fast
from multimodal import benchmark as bench
from multimodal.copies import SHIPPED, load
from palimpsest.kernels.connector import attend
from palimpsest.nodes import host
from palimpsest.nodes.multimodal.vlm import load_vlm
from pocket import text_encoder
from rivals.benchmark import table
from safetensors.torch import load_file
from torch import Tensor, nn

IMAGE_TOKENS, TOKENS = 4, 64
KINDS = {"pooled": 0.9, "words": 0.1}
STRENGTHS = (1.0, 0.6)
LESSON = "adapt"


class Adapter(nn.Module):
    """A pooled picture (B, C) to a few tokens (B, 4, D), and keys and values for them in each cross-attention."""

    def __init__(self, width: int, unet: nn.Module, count: int = IMAGE_TOKENS):
        super().__init__()
        parts = {key: part.attn2 for key, part in host.transformer_parts(unet).items()}
        context = next(iter(parts.values())).to_k.in_features
        self.count = count
        self.project, self.norm = nn.Linear(width, count * context), nn.LayerNorm(context)
        self.keys, self.values = (
            nn.ModuleDict({named(key): copied(getattr(part, name)) for key, part in parts.items()})
            for name in ("to_k", "to_v")
        )

    def forward(self, pooled: Tensor) -> Tensor:
        return self.norm(self.project(pooled).unflatten(-1, (self.count, -1)))

    def beside(self, tokens: Tensor, strength: float = 1.0, nothing: Tensor | None = None) -> dict:
        """What stands in the place of cross-attention, by block. nothing: the tokens of rows without the prompt."""
        run = Beside(self, tokens, strength, nothing)
        return {(name, number): run for name in ("input", "middle", "output") for number in range(12)}


def named(key: tuple[str, int, int]) -> str:
    """The name of a layer that can stand in a ModuleDict."""
    return "_".join(map(str, key))


def copied(linear: nn.Module) -> nn.Linear:
    """A trainable linear map without bias that begins as another."""
    made = nn.Linear(linear.in_features, linear.out_features, bias=False)
    with torch.no_grad():
        made.weight.copy_(linear.weight)
    return made


@dataclass(frozen=True, eq=False)
class Beside:
    """attn2 replacement: Attention(Q, K, V) + strength Attention(Q, K'(image), V'(image))."""

    adapter: Adapter
    tokens: Tensor  # (B, 4, D), or of one row for all
    strength: float
    nothing: Tensor | None  # (1, 4, D)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
        heads, layer = options["n_heads"], named((*options["block"], options["block_index"]))
        image = self.of(options, len(query))
        own = attend(query, self.adapter.keys[layer](image), self.adapter.values[layer](image), heads)
        return attend(query, key, value, heads) + self.strength * own

    def of(self, options: dict, rows: int) -> Tensor:
        """The image tokens of each row of a model call."""
        if self.nothing is None or "cond_or_uncond" not in options:
            return self.tokens.expand(rows, -1, -1)
        kinds = options["cond_or_uncond"]
        parts = [self.nothing if kind else self.tokens for kind in kinds]
        return torch.cat([part.expand(rows // len(kinds), -1, -1) for part in parts])


# ---- the training ---------------------------------------------------------------------------------------------------


class RivalTrainer(Trainer):
    """A Trainer with one lesson more, which trains an Adapter alone."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        seeing = load_file(SHIPPED / learning.VLM / "model.safetensors")
        with torch.no_grad():
            for name, p in self.learned.items():
                if name.startswith("vlm."):
                    p.copy_(seeing["model." + name.removeprefix("vlm.")])
        torch.manual_seed(self.recipe.seed)
        self.adapter = Adapter(self.network.config.hidden_width, self.unet)
        self.learned = {f"adapter.{name}": p for name, p in self.adapter.named_parameters()}
        self.average = {name: p.detach().clone() for name, p in self.learned.items()}
        self.progress = {LESSON: Progress()}
        self.encoder = text_encoder.Encoder()

    def adapt(self, tell: Any) -> None:
        def loss(lesson_: learning.Lesson) -> Tensor:
            with torch.no_grad():
                hidden = self.views["pooled"].hidden_states(lesson_.prompts)
                context = self.encoder([words_of(prompt) for prompt in lesson_.prompts])
            with fast():
                tokens = self.adapter(pooled_of(hidden))
            return self.denoising(lesson_, context, torch.ones(1, dtype=torch.bool), self.adapter.beside(tokens))

        self.learn(LESSON, {"adapter.": self.recipe.read_rate}, KINDS, self.recipe.batch, loss, tell)


def words_of(prompt: tuple) -> str:
    """The words of a prompt, without its pictures."""
    return " ".join(" ".join(part for part in prompt if isinstance(part, str)).split())


def pooled_of(hidden: Any) -> Tensor:
    """The vector of each prompt's first picture, (B, C); zeros where it has none, as IP-Adapter drops pictures."""
    rows = []
    for states, layout in zip(hidden.states, hidden.layouts, strict=True):
        span = next((span for span in layout if span.picture is not None), None)
        rows.append(torch.zeros_like(states[0]) if span is None else states[span.start + 1 : span.end - 1].mean(0))
    return torch.stack(rows).float()


def train(options: argparse.Namespace, work: Path, model: Any, vae: Any) -> RivalTrainer:
    """Train an adapter in a folder, or go on with it; its running mean is what is kept."""
    recipe = learning.Recipe(
        minutes=options.minutes, steps=options.steps, scenes=options.scenes, by_picture=0.0, seed=options.seed
    )
    vlm = load_vlm(SHIPPED / learning.VLM, "float32")
    trainer = RivalTrainer(model, vlm, learning.Data.draw(model, vae, recipe.scenes, work / "scenes.safetensors"),
                           recipe, work)  # fmt: skip
    trainer.load_state()
    trainer.adapt(lambda text: print(text, flush=True))
    return trainer


# ---- the rows -------------------------------------------------------------------------------------------------------


def ask(pocket: bench.Pocket, adapter: Adapter, question: bench.Question, strength: float) -> bench.Conditioned:
    """A held-out animal by its pooled picture beside the words, on the pocket model as it is."""
    prompt = bench.prompt_of(question, TOKENS)
    hidden = bench.in_one_vector(pocket.encoder).hidden_states([prompt])
    tokens, nothing = (adapter(pooled) for pooled in (pooled_of(hidden), torch.zeros(1, hidden.states.shape[-1])))
    model = pocket.plain.clone()
    for (name, number), run in adapter.beside(tokens, strength, nothing).items():
        model.set_model_attn2_replace(run, name, number)
    positive, negative = (
        [[pocket.clip.encode_from_tokens(pocket.clip.tokenize(text)), {}]] for text in (words_of(prompt), "")
    )
    return model, positive, negative, positive[0][0].shape[1] + IMAGE_TOKENS


def run(options: argparse.Namespace, output: Path) -> None:
    """Train, measure beside the table's row of a pooled vector, print, write."""
    work, parts = Path(options.work or output / "multimodal_rival"), pocket_host.load_pocket()
    trainer, asked = train(options, work, parts[0], parts[2]), bench.questions(options.first, options.count)
    rows, shown = {}, {}
    with torch.inference_mode():
        pocket = load(SHIPPED, *parts)
        ways = {"the picture as one pooled vector": lambda q: bench.ByPicture(256, pooled=True)(pocket, q)}
        for strength in STRENGTHS:
            ways[f"beside the words, strength {strength:g}"] = lambda q, s=strength: ask(pocket, trainer.adapter, q, s)
        how = bench.as_asked(options)
        for name, way in ways.items():
            conditioned = [way(question) for question in asked]
            pairs = zip(asked, conditioned, strict=True)
            pictures = torch.cat([bench.draw(pocket, *pair, **how) for pair in pairs])
            rows[name] = bench.scores(pocket, pictures, asked) | {"tokens": conditioned[0][-1]}
            shown[name] = pictures[: bench.SHOWN]
            print(name, {key: round(value, 3) for key, value in rows[name].items()}, flush=True)
    text = table(bench.COLUMNS, rows, lambda column: 0 if column == "tokens" else 2)
    taken = vars(trainer.progress[LESSON])
    bench.written(output, "multimodal_rival", text, bench.setting(options, pocket) | {"training": taken, "rows": rows})
    bench.contact_sheet(shown, asked, output / "multimodal_rival.jpg")
