"""A language model of the pocket world in MGIE's layout: it sees a scene and says what an instruction makes of it.

Its parts are those of the pack's own Llava (CLIP's vision tower, one linear layer, Llama), its folder is one of Load
MGIE's. It is trained on scenes of the triples' training seed, each with a new instruction whenever it is shown, in two
lessons.

see   The vision tower and the linear layer alone: what a caption tells can be read off a picture's tokens.
say   Llama alone, by what those see: the caption of the ideal edit, then [IMG0] to [IMG7].

The whole opening of MGIE's conversation is one word of its tokenizer, so that a prompt is 90 tokens long.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from instruction_training import pocket_triples
from palimpsest.nodes.instruction import llava as mgie
from palimpsest.nodes.instruction.wording import QUESTION, asked
from pocket import judge, world
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

SIDE, PATCH = 64, 8  # pixels
VISION = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5, "num_attention_heads": 4, "image_size": SIDE,
    "patch_size": PATCH, "projection_dim": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 6, "max_position_embeddings": 256,
}  # fmt: skip
UNKNOWN, START, END = "<unk>", "<s>", "</s>"
MARKS = (mgie.PATCH, mgie.START, mgie.END)
WORDS_OF = 4000  # triples whose words are known: every template comes up in them many times
NAME = "palimpsest_pocket"  # of the folder


# ------------------------------------------------------------------------------------------------- words and networks


def tokenizer() -> Any:
    """Whole words of instructions, captions and MGIE's question; a text begins with <s>, as Llama's does."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    triples = [pocket_triples.triple(index) for index in range(WORDS_OF)]
    told = {text for each in triples for text in (each.instruction, each.expressed)}
    words = sorted(set(re.findall(r"\w+|[^\w\s]", " ".join([*told, QUESTION, "USER: ASSISTANT: {}"]))))
    vocabulary = {word: i for i, word in enumerate((UNKNOWN, START, END, *words))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 1)])
    ends = {"bos_token": START, "eos_token": END, "unk_token": UNKNOWN, "pad_token": UNKNOWN}
    made = PreTrainedTokenizerFast(tokenizer_object=core, **ends)
    made.add_tokens([AddedToken(mgie.SYSTEM, normalized=False)])
    made.add_special_tokens({"additional_special_tokens": [*MARKS, *mgie.IMAGES]})
    return made


def configuration(words: Any) -> Any:
    """transformers' LlavaConfig."""
    import transformers

    tokens = {"vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT, **tokens), vision_config=transformers.CLIPVisionConfig(**VISION)
    )


def write(folder: Path, network: mgie.Llava, words: Any, config: Any) -> Path:
    """Write the folder as Load MGIE reads it, in float16; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    words.save_pretrained(folder)
    said = {"model_type": "llava"}
    said |= {name: getattr(config, name).to_dict() for name in ("text_config", "vision_config")}
    (folder / "config.json").write_text(json.dumps(said, default=str, indent=1), encoding="utf-8")
    beginnings = {"projector.": "model.mm_projector.", "vision.": "vision_model.", "language.": ""}
    state = {}
    for name, tensor in network.state_dict().items():
        place, part = next((new, name.removeprefix(old)) for old, new in beginnings.items() if name.startswith(old))
        state[place + part.removeprefix("vision_model.")] = tensor.half().contiguous()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


# ------------------------------------------------------------------------------------------------------------- lessons


def pictures(work: Path, count: int) -> np.ndarray:
    """Scenes of the training triples as the vision tower is given them, before it normalises: uint8 (n, 3, 64, 64)."""
    path = work / f"seen_{count}.npy"
    if not path.exists():
        drawn = [as_seen(pocket_triples.triple(index).source) for index in range(count)]
        temporary = path.with_suffix(".part.npy")
        np.save(temporary, np.stack(drawn))
        os.replace(temporary, path)
    return np.load(path)


def as_seen(scene: world.Scene) -> np.ndarray:
    seen = mgie.centre_square(torch.from_numpy(world.render(scene)) / 255, SIDE)[0]
    return (seen * by_channel(mgie.CLIP_DEVIATION) + by_channel(mgie.CLIP_MEAN)).mul(255).round().byte().numpy()


def by_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values)[:, None, None]


def turned(scene: world.Scene) -> world.Scene:
    """What a mirror shows of a scene, as far as captions tell it."""
    return replace(scene, side=next(side for side in world.SIDES if side != scene.side), facing=-scene.facing)


def instructed(scene: world.Scene, rng: np.random.Generator) -> tuple[str, str]:
    """(instruction, the result in words) of a scene, as `pocket_triples.triple` draws them."""
    asks = pocket_triples.VAGUE if rng.random() < 0.5 else pocket_triples.PLAIN
    while True:
        found = asks[int(rng.integers(len(asks)))](scene, rng)
        if found is not None:
            return found[0], world.caption(world.edit(scene, **found[1]))


@dataclass(frozen=True)
class Lesson:
    """Share of the time, pictures a step, learning rate."""

    share: float
    batch: int
    rate: float


LESSONS = {"see": Lesson(0.5, 64, 1e-3), "say": Lesson(0.5, 32, 1.5e-3)}


class Learner:
    """The network with the heads of the first lesson; `average` is the running mean that is kept."""

    def __init__(self, work: Path, scenes: int, minutes: float, seed: int = 0):
        torch.manual_seed(seed)
        self.work, self.budget, self.words = work, 60 * minutes, tokenizer()
        self.config = configuration(self.words)
        self.model = mgie.MgieModel(NAME, self.config, None, self.words)
        self.scenes = [pocket_triples.triple(index).source for index in range(scenes)]
        self.seen = torch.from_numpy(pictures(work, scenes))
        self.network = mgie.Llava(self.config, torch.nn).train()
        self.heads = nn.ModuleDict({name: nn.Linear(TEXT["hidden_size"], len(values) + 1)
                                    for name, values in world.CAPTIONED.items()})  # fmt: skip
        self.parts = nn.ModuleDict({"network": self.network, "heads": self.heads})
        self.average = {name: tensor.detach().clone() for name, tensor in self.parts.named_parameters()}
        self.images = [self.model.token(name) for name in mgie.IMAGES]
        self.seconds, self.done, self.steps, self.optimiser = 0.0, 0, 0, None
        self.rng = np.random.default_rng([seed, 3])

    # ---- what is shown

    def batch(self, size: int) -> tuple[Tensor, list[world.Scene]]:
        """(pixels, scenes): half of them mirrored, all moved by up to two pixels."""
        index = self.rng.integers(0, len(self.scenes), size)
        pixels, scenes = self.seen[index].float() / 255, [self.scenes[i] for i in index]
        mirrored = self.rng.random(size) < 0.5
        pixels[mirrored] = pixels[mirrored].flip(-1)
        scenes = [turned(scene) if flip else scene for scene, flip in zip(scenes, mirrored, strict=True)]
        down, right = self.rng.integers(0, 5, 2)
        pixels = F.pad(pixels, (2, 2, 2, 2), mode="replicate")[..., down : down + SIDE, right : right + SIDE]
        return (pixels - by_channel(mgie.CLIP_MEAN)) / by_channel(mgie.CLIP_DEVIATION), scenes

    def told(self, scenes: list[world.Scene]) -> tuple[Tensor, Tensor, list[str]]:
        """(tokens, wanted, results in words) of conversations about scenes, (B, L); -100 but where the model speaks."""
        rows, wanted, texts = [], [], []
        for scene in scenes:
            instruction, text = instructed(scene, self.rng)
            prompt = self.model.tokens(self.model.prompt(asked(QUESTION, instruction)))
            answer = [*self.words(text, add_special_tokens=False)["input_ids"], *self.images, self.words.eos_token_id]
            texts.append(text)
            rows.append(torch.tensor(prompt + answer))
            wanted.append(torch.tensor([-100] * len(prompt) + answer))
        pad = torch.nn.utils.rnn.pad_sequence
        return pad(rows, batch_first=True), pad(wanted, batch_first=True, padding_value=-100), texts

    # ---- losses

    def see(self, size: int) -> Tensor:
        """Cross-entropy of what captions tell, read off the tokens: the last output of a head weighs them."""
        pixels, scenes = self.batch(size)
        tokens, truth, found = self.network.look(pixels), judge.labels(scenes), []
        for name, head in self.heads.items():
            said = head(tokens).float()
            weight = said[..., -1:].softmax(1)
            found.append(F.cross_entropy((said[..., :-1] * weight).sum(1), truth[name]))
        return sum(found) / len(found)

    def say(self, size: int) -> Tensor:
        """Cross-entropy of the answer's tokens."""
        pixels, scenes = self.batch(size)
        ids, wanted, _ = self.told(scenes)
        with torch.no_grad():
            seen = self.network.look(pixels).float()
        states, spoken = self.states(ids, seen=seen)[:, :-1], wanted[:, 1:] != -100
        return F.cross_entropy(self.network.language.lm_head(states[spoken]).float(), wanted[:, 1:][spoken])

    def states(self, ids: Tensor, pixels: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """(B, L, D): the language model's last states of tokens with a picture, or with what was seen of it."""
        seen = self.network.look(pixels).float() if seen is None else seen
        embedded = self.network.get_input_embeddings()(ids)
        embedded = embedded.masked_scatter((ids == self.model.token(mgie.PATCH))[..., None], seen.to(embedded.dtype))
        return self.network.language.model(inputs_embeds=embedded, use_cache=False).last_hidden_state

    # ---- learning

    def learn(self, tell: Callable[[str], None]) -> None:
        """The lessons that are left, each by its share of the processor's time."""
        for number, (name, lesson) in enumerate(LESSONS.items()):
            if self.done == number:
                self.take(name, lesson, tell)
                self.take_average()
                self.done, self.seconds, self.steps, self.optimiser = number + 1, 0.0, 0, None
                self.save()

    def take(self, name: str, lesson: Lesson, tell: Callable[[str], None]) -> None:
        budget, losses = lesson.share * self.budget, []
        optimiser = self.optimiser = self.optimiser or self.optimise(name)
        while self.seconds < budget:
            began = time.process_time()
            rate = min(1, (self.steps + 1) / 100) * 0.5 * (1 + math.cos(math.pi * self.seconds / budget))
            for group in optimiser.param_groups:
                group["lr"] = lesson.rate * max(rate, 0.01)
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                loss = getattr(self, name)(lesson.batch)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parts.parameters(), 1.0)
            optimiser.step()
            self.steps += 1
            with torch.no_grad():
                for key, parameter in self.parts.named_parameters():
                    self.average[key].lerp_(parameter, 1 - min(0.998, self.steps / (self.steps + 10)))
            losses.append(loss.item())
            self.seconds += time.process_time() - began
            if self.steps % 100 == 0:
                tell(f"{name} {self.steps}: {np.mean(losses[-100:]):.4f}, {self.seconds:.0f} of {budget:.0f} s")
                self.save()

    def optimise(self, name: str) -> torch.optim.Optimizer:
        said = [*self.network.language.parameters()]
        known = {id(parameter) for parameter in said}
        seen = [parameter for parameter in self.parts.parameters() if id(parameter) not in known]
        return torch.optim.AdamW(said if name == "say" else seen, weight_decay=0.01, betas=(0.9, 0.98))

    # ---- what is kept

    @property
    def state(self) -> Path:
        return self.work / "language_state.pt"

    def save(self) -> None:
        kept = {"parts": self.parts.state_dict(), "average": self.average, "done": self.done}
        kept |= {"seconds": self.seconds, "steps": self.steps}
        kept |= {"optimiser": self.optimiser.state_dict() if self.optimiser else None}
        temporary = self.state.with_suffix(".part")
        torch.save(kept, temporary)
        os.replace(temporary, self.state)

    def resume(self) -> None:
        """Go on where an earlier training stopped."""
        if not self.state.exists():
            return
        kept = torch.load(self.state, weights_only=True)
        self.parts.load_state_dict(kept["parts"])
        self.average, self.done = kept["average"], kept["done"]
        self.seconds, self.steps = kept["seconds"], kept["steps"]
        self.rng = np.random.default_rng([self.done, self.steps])  # other draws than before
        if kept["optimiser"]:
            self.optimiser = self.optimise(list(LESSONS)[self.done])
            self.optimiser.load_state_dict(kept["optimiser"])
        else:
            self.take_average()

    def take_average(self) -> None:
        """The mean weights become the network's."""
        with torch.no_grad():
            for name, parameter in self.parts.named_parameters():
                parameter.copy_(self.average[name])

    def write(self, folder: Path) -> Path:
        """The mean weights as a folder."""
        self.take_average()
        return write(folder, self.network, self.words, self.config)


def train(work: Path, minutes: float, scenes: int, resume: bool) -> Path:
    """Train for so many minutes of the processor and write the folder; returns it."""
    work.mkdir(parents=True, exist_ok=True)
    learner = Learner(work, scenes, minutes)
    if resume:
        learner.resume()
    learner.learn(lambda line: print(line, flush=True))
    return learner.write(work / NAME)
