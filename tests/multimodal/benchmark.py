"""Pictures as words on the pocket model: a connector trained on crops of drawn scenes, asked for animals it never saw.

    python dev.py bench multimodal --trained tests/pocket/models    table, JSON and contact sheet of the shipped weights
    python dev.py bench multimodal                                  train others first: 110 minutes
    python dev.py bench multimodal --minutes 5 --count 8            some of it
    python dev.py bench multimodal --by-node 2500 6000 300          by the lessons of Train Multimodal Encoder alone
    python dev.py bench multimodal --ablation copies                something else in place of the table: ABLATIONS

A tiny vision-language model of Idefics2's layout, a connector and a LoRA on the U-Net learn from drawn scenes, each
with a prompt that holds the animal cut out of that very picture (and, one time in three, an edge of it in place of the
words for the place). multimodal_pocket has the model, the scenes and the prompts, multimodal_learning the training.

Measured on held-out animals: one is cut out of its picture and asked for by "a <image1> dog sitting on the left in the
park", with another pose, another side and another place than it was cut from. No colour is told. So everything the
picture must give (colour, coat, collar) comes from one picture and everything else from words, or, in the row of two
pictures, the place from a second picture of another animal: compositions that no training prompt held. The rows
without a picture are told the colour, too. All rows of a scene begin with the same noise; Multimodal Prompt makes the
conditioning, the host's KSampler samples.

words: share of species, pose, side and place that the judge reads off the picture. colour: of the coat. identity:
metrics.identity against the drawn answer, 1 where the animal is the same and 0.40 for a stranger of the same caption.
hidden and palette are its parts: the judge's probability of what no caption tells (pattern, second colour, collar,
facing, socks, tail tip), and the colours within the animal as distributions. pattern, second colour, collar, facing:
share of single answers that are right.
texture: scenes.texture_similarity. The last row is the drawn answer itself through the autoencoder: the best there is.
Above it, a connector's tokens as they should be, which shows what the U-Net has learned to read of them; and the second
table shows what the connector's own say: the share of animals whose colour, collar, ... is the nearest to their mean.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import textwrap
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.sd
import numpy as np
import torch
from benchmarks import multimodal_by_node as by_node
from benchmarks import multimodal_pocket as learning
from benchmarks import pocket_host
from benchmarks.multimodal_learning import KINDS, Trainer
from benchmarks.scenes import another, defaults, drawn, mean, texture_similarity
from palimpsest.nodes.multimodal import files as multimodal_files
from palimpsest.nodes.multimodal.encoder import MultimodalEncoder, join
from palimpsest.nodes.multimodal.interleaved import cut_out, squared
from palimpsest.nodes.multimodal.nodes import MultimodalPrompt
from palimpsest.nodes.multimodal.training.saying import Speaker
from palimpsest.nodes.multimodal.vlm import load_vlm
from PIL import Image, ImageDraw, ImageFont
from pocket import judge as judging
from pocket import metrics, world
from rivals.benchmark import table, without_nan
from safetensors.torch import load_file

import nodes as host_nodes

TOLD = ("species", "pose", "side", "place")
COLUMNS = {
    "words": "words", "colour": "colour", "identity": "identity", "hidden": "hidden", "palette": "palette",
    "pattern": "pattern", "second": "second colour", "collar": "collar", "facing": "facing", "texture": "texture",
    "tokens": "tokens",
}  # fmt: skip
SAID = {"colour": "colour", "pattern": "pattern", "second": "second colour", "collar": "collar", "facing": "facing",
        "socks": "socks", "tailtip": "tail tip"}  # fmt: skip
FIRST, STEPS, GUIDANCE = 32, 10, 3.0
SHOWN = 10  # scenes of the contact sheet
ABLATIONS = {  # modules that say what they do
    "copies": "multimodal.copies", "findings": "multimodal.findings", "rival": "multimodal.rival",
}  # fmt: skip


# ---- the model and what is trained for it ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pocket:
    """The pocket model, plain and with the trained LoRA, its judge, and the trained encoder."""

    plain: Any
    model: Any
    clip: Any
    vae: Any
    judge: Any
    encoder: MultimodalEncoder
    dictionary: learning.Dictionary | by_node.Phrases


def train(options: argparse.Namespace, work: Path, model: Any, vae: Any) -> dict[str, Any]:
    """Write vision-language model, connector and LoRA into a folder, or go on with what was begun there."""
    recipe = learning.Recipe(
        minutes=options.minutes, steps=options.steps, scenes=options.scenes, seed=options.seed,
        adapted=bool(options.adapt),
    )  # fmt: skip
    began = time.process_time()
    vlm = load_vlm(learning.write_vlm(work / learning.UNTRAINED), "float32")
    data = learning.Data.draw(model, vae, recipe.scenes, work / "scenes.safetensors")
    trainer = Trainer(model, vlm, data, recipe, work)
    if options.adapt:
        trainer.begin_with(options.adapt)
    trainer.load_state()
    known = () if options.adapt else (trainer.see, trainer.say)
    for lesson in (*known, trainer.read, trainer.draw):
        lesson(lambda text: print(text, flush=True))
    trainer.write(work)
    steps = {name: vars(progress) for name, progress in trainer.progress.items()}
    return {**vars(recipe), "processor seconds": time.process_time() - began, "taken": steps,
            "losses": thinned(trainer.losses)}  # fmt: skip


def train_by_node(options: argparse.Namespace, work: Path, model: Any, clip: Any, vae: Any) -> dict[str, Any]:
    """The same by the node's lessons."""
    began, parts = time.process_time(), {"model": model, "clip": clip, "vae": vae}

    def tell(text: str) -> None:
        print(f"{time.process_time() - began:.0f} s: {text}", flush=True)

    with torch.inference_mode():  # as a node is run
        taken = by_node.train(tuple(options.by_node), options.scenes, options.seed, work, tell=tell, **parts)
    return taken | {"processor seconds": time.process_time() - began}


def thinned(losses: list[tuple[str, float]], parts: int = 12) -> dict[str, list[float]]:
    """The mean loss of each kind over twelve parts of a training."""
    found = {}
    for kind in KINDS:
        values = [loss for name, loss in losses if name == kind]
        found[kind] = [float(part.mean()) for part in np.array_split(values, parts) if len(part)]
    return found


def load(work: Path, model: Any, clip: Any, vae: Any) -> Pocket:
    """The pocket model with what was trained."""
    vlm = load_vlm(work / learning.VLM, "float32")
    encoder = join(vlm, multimodal_files.load_connector(str(work / learning.CONNECTOR)))
    trained, _ = comfy.sd.load_lora_for_models(model, None, load_file(work / learning.LORA), 1.0, 0.0)
    return Pocket(model, trained, clip, vae, judging.load(), encoder, learning.Dictionary())


# ---- what is asked --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Question:
    """A held-out animal, the scene it is asked for in, and a picture of another animal at that place."""

    source: world.Scene
    answer: world.Scene
    elsewhere: world.Scene
    picture: torch.Tensor  # of the source, (1, 128, 128, 3)
    mask: torch.Tensor  # (1, 128, 128)
    place: torch.Tensor  # the edge of the picture of `elsewhere`
    seed: int


BACKGROUND = ("place", "horizon", "prop", "prop_s", "bgtint")


def questions(first: int, count: int) -> list[Question]:
    """Held-out animals in another pose, on the other side, at another place: that of the scene after them."""
    scenes = world.held_out_scenes(first + count + 20)[first:]
    found = []
    for i, source in enumerate(scenes[:count]):
        elsewhere = next(scene for scene in scenes[i + 1 :] if scene.place != source.place)
        side = "left" if source.side == "right" else "right"
        changes = {name: getattr(elsewhere, name) for name in BACKGROUND}
        answer = world.edit(source, pose=another(source, "pose", i), side=side, **changes)
        (picture, other), masks = drawn([source, elsewhere])
        place = learning.edge(other, elsewhere)[None]
        found.append(Question(source, answer, elsewhere, picture[None], masks[:1], place, first + i))
    return found


Conditioned = tuple[Any, list, list, int]  # model, positive, negative, tokens


def by_text(pocket: Pocket, question: Question) -> Conditioned:
    """The pocket model as it is, with its text encoder and the whole caption."""
    positive, negative = (
        [[pocket.clip.encode_from_tokens(pocket.clip.tokenize(text)), {}]]
        for text in (world.caption(question.answer), "")
    )
    return pocket.plain, positive, negative, positive[0][0].shape[1]


@dataclass(frozen=True)
class ByPicture:
    """Multimodal Prompt with so many tokens a picture. two: the place by a picture; pooled: one vector a picture."""

    tokens: int
    two: bool = False
    pooled: bool = False

    def __call__(self, pocket: Pocket, question: Question) -> Conditioned:
        """The animal cut out of its picture, asked for by words or by words and a second picture."""
        before, behind = learning.told(question.answer, place=not self.two)
        images = {"image1": question.picture} | ({"image2": question.place} if self.two else {})
        text = f"{before} <image1> {behind}" + (" <image2>" if self.two else "")
        return prompted(pocket, text, images, {"mask1": question.mask}, self.tokens, self.pooled)

    def said(self, pocket: Pocket, question: Question) -> dict[str, bool]:
        """Whether the connector's tokens of the animal say its colour and traits (Dictionary.heard)."""
        encoder = in_one_vector(pocket.encoder) if self.pooled else pocket.encoder
        hidden = encoder.hidden_states([prompt_of(question, self.tokens)])
        span = hidden.layouts[0][1]
        context, _ = encoder.require_connector()(hidden.states)
        return pocket.dictionary.heard(context[0, span.start + 1 : span.end - 1], question.source)


def prompt_of(question: Question, tokens: int) -> tuple:
    """The animal cut out of its picture, and the words of the answer, without its colour."""
    animal = cut_out(question.picture[0], question.mask, "image1", True)
    before, behind = learning.told(question.answer)
    return f"{before} ", learning.Picture(animal, tokens), f" {behind}"


def by_dictionary(pocket: Pocket, question: Question) -> Conditioned:
    """What a connector of 64 tokens a picture should say, without its mistakes: what the U-Net has learned to read."""
    model, _, negative, _ = ByPicture(64)(pocket, question)
    lesson = learning.Lesson("64", [0], [prompt_of(question, 64)], [world.caption(question.answer)], seed=0)
    hidden = pocket.encoder.hidden_states(lesson.prompts)
    target, _ = pocket.dictionary.target(hidden, lesson, [question.answer])
    return model, [[target, {}]], negative, target.shape[1]


def in_one_vector(encoder: MultimodalEncoder) -> MultimodalEncoder:
    """The same encoder, whose pictures are one vector each."""
    return replace(encoder, vlm=learning.OneVector.of(encoder.vlm))


def by_words(pocket: Pocket, question: Question) -> Conditioned:
    """Multimodal Prompt without a picture: the whole caption."""
    return prompted(pocket, " ".join(learning.told(question.answer, colour=True)), {}, {}, 64, False)


def prompted(
    pocket: Pocket, text: str, images: dict, masks: dict, tokens: int, pooled: bool = False, **more: Any
) -> Conditioned:
    """What Multimodal Prompt gives at its defaults but for `more`."""
    encoder = pocket.encoder
    if pooled:
        encoder = in_one_vector(encoder)
    chosen = defaults(MultimodalPrompt) | {
        "text": text, "images": images, "masks": masks, "tokens_per_picture": str(tokens),
    } | more  # fmt: skip
    model, positive, negative, *_ = MultimodalPrompt.execute(pocket.model, encoder, **chosen).args
    return model, positive, negative, positive[0][0].shape[1]


METHODS: dict[str, Callable[[Pocket, Question], Conditioned]] = {
    "words alone, the pocket model as it is": by_text,
    "words alone, trained": by_words,
    "picture as one pooled vector": ByPicture(256, pooled=True),
    "16 tokens a picture": ByPicture(16),
    "64 tokens a picture": ByPicture(64),
    "256 tokens a picture": ByPicture(256),
    "two pictures, 64 tokens each": ByPicture(64, two=True),
    "64 tokens that say all of it": by_dictionary,
}
CEILING = "the drawn answer through the autoencoder"


# ---- drawing and measuring ------------------------------------------------------------------------------------------


def draw(
    pocket: Pocket, question: Question, conditioned: Conditioned, steps: int = STEPS, guidance: float = GUIDANCE
) -> torch.Tensor:
    """A picture (1, 128, 128, 3) by the host's KSampler."""
    model, positive, negative, _ = conditioned
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    sampled = host_nodes.KSampler().sample(
        model, question.seed, steps, guidance, "ddim", "normal", positive, negative, latent
    )[0]  # fmt: skip
    return pocket.vae.decode(sampled["samples"]).clamp(0, 1)


def as_asked(options: argparse.Namespace) -> dict[str, Any]:
    """How `draw` samples where options say so."""
    return {"steps": options.steps_sampled, "guidance": options.guidance}


def scores(pocket: Pocket, pictures: torch.Tensor, asked: list[Question]) -> dict[str, float]:
    """Everything measured of the pictures of a method; see the top of this file."""
    answers = [question.answer for question in asked]
    ideals, masks = drawn(answers)
    read = metrics.attribute_success(pocket.judge, pictures, answers)
    same = metrics.identity(pocket.judge, pictures, answers)
    return {
        "words": sum(read[name] for name in TOLD) / len(TOLD),
        **{name: read[name] for name in (*TOLD, "colour")},
        "identity": mean(same["score"]),
        **{name: mean(same[name]) for name in ("hidden", "palette", "pattern", "second", "collar", "facing", "socks",
                                               "tailtip")},
        "texture": mean(texture_similarity(pocket.judge, pictures, ideals, masks)),
    }  # fmt: skip


def measure(
    pocket: Pocket, options: argparse.Namespace, asked: list[Question]
) -> tuple[dict[str, dict], dict[str, torch.Tensor]]:
    """(numbers, pictures) of every method."""
    rows, shown = {}, {}
    for name in options.methods or METHODS:
        began, found, tokens = time.process_time(), [], []
        for question in asked:
            conditioned = METHODS[name](pocket, question)
            tokens.append(conditioned[-1])
            found.append(draw(pocket, question, conditioned, **as_asked(options)))
        pictures = torch.cat(found)
        rows[name] = scores(pocket, pictures, asked) | {"tokens": sum(tokens) / len(tokens)}
        if isinstance(METHODS[name], ByPicture):
            rows[name]["said"] = shares(METHODS[name].said(pocket, question) for question in asked)
        rows[name]["seconds"] = (time.process_time() - began) / len(asked)
        shown[name] = pictures[:SHOWN]
        print(name, {k: v if isinstance(v, dict) else round(v, 3) for k, v in rows[name].items()}, flush=True)
    ideals, _ = drawn([question.answer for question in asked])
    through = torch.cat([pocket.vae.decode(pocket.vae.encode(part)) for part in ideals.split(8)]).clamp(0, 1)
    rows[CEILING] = scores(pocket, through, asked) | {"tokens": torch.nan, "seconds": torch.nan}
    some = asked[:SHOWN]
    asked_by = {"<image1>": torch.cat([shown_as(cut_out(q.picture[0], q.mask, "image1", True)) for q in some]),
                "<image2>, in the row of two pictures": torch.cat([shown_as(q.place[0]) for q in some])}  # fmt: skip
    return rows, {**asked_by, **shown, CEILING: through[:SHOWN]}


def shares(answers: Iterable[dict[str, bool]]) -> dict[str, float]:
    """How often each was right, of those that were asked for it."""
    found: dict[str, list[bool]] = {}
    for answer in answers:
        for name, right in answer.items():
            found.setdefault(name, []).append(right)
    return {name: sum(right) / len(right) for name, right in found.items()}


def shown_as(picture: torch.Tensor) -> torch.Tensor:
    """A picture (H, W, 3) as the encoder is shown it, (1, 128, 128, 3)."""
    return (squared(picture, 128).movedim(1, -1) + 1) / 2


def contact_sheet(rows: dict[str, torch.Tensor], asked: list[Question], path: Path) -> None:
    """A row of pictures for each entry, under what each scene was asked by."""
    left, size, head, font = 190, 112, 58, ImageFont.load_default(12)
    count = len(next(iter(rows.values())))
    sheet = Image.new("RGB", (left + count * size, head + len(rows) * size), "white")
    pen = ImageDraw.Draw(sheet)
    for column, question in enumerate(asked[:count]):
        answer = question.answer
        lines = (
            "a <image1>",
            f"{answer.species} {answer.pose}",
            f"on the {answer.side}",
            world.PLACE_PHRASES[answer.place],
        )
        pen.multiline_text((left + column * size + 4, 0), "\n".join(lines), fill="black", font=font, spacing=1)
    for r, (name, pictures) in enumerate(rows.items()):
        label = textwrap.fill(name, 26)
        pen.multiline_text((6, head + r * size + size // 2 - 14), label, fill="black", font=font)
        for column, image in enumerate((pictures * 255).round().byte().numpy()):
            small = Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS)
            sheet.paste(small, (left + column * size, head + r * size))
    sheet.save(path, quality=90)


def setting(options: argparse.Namespace, pocket: Pocket) -> dict[str, Any]:
    """What the numbers were measured on."""
    from comfyui_version import __version__ as comfyui

    left_out = ("output", "trained", "adapt", "work",
                "minutes", "steps", "scenes", "seed")  # these four are the training's  # fmt: skip
    return {
        **{name: value for name, value in vars(options).items() if name not in left_out},
        "connector": pocket.encoder.require_connector().info,
        "connector's weights": pocket.encoder.require_connector().parameters,
        "machine": platform.machine(), "torch": torch.__version__, "ComfyUI": comfyui,
        "Python": platform.python_version(),
    }  # fmt: skip


def written(output: Path, name: str, text: str, numbers: dict[str, Any]) -> None:
    """Print a table, and write it and all numbers."""
    print("\n" + text)
    (output / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    (output / f"{name}.json").write_text(json.dumps(without_nan(numbers), indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parse, train, measure, print, write output/bench."""
    parser = argparse.ArgumentParser(prog="python dev.py bench multimodal", description=__doc__.splitlines()[0])
    begun = parser.add_mutually_exclusive_group()
    begun.add_argument(
        "--trained",
        type=learning.trained_folder,
        metavar="FOLDER",
        help="measure it, train nothing: tests/pocket/models, or --work of an earlier run",
    )
    begun.add_argument(
        "--by-node",
        type=int,
        nargs=3,
        metavar=("ALIGN", "READ", "DRAW"),
        help="train by the node's lessons alone, of so many steps; goes on where it stopped",
    )
    begun.add_argument(
        "--adapt",
        type=learning.trained_folder,
        metavar="FOLDER",
        help="train on from what was trained for another U-Net",
    )
    parser.add_argument("--work", metavar="FOLDER", help="for the training, which goes on where it stopped")
    parser.add_argument("--minutes", type=float, default=110.0, help="of training")
    parser.add_argument("--steps", type=int, default=0, help="of each of the four trainings, instead of minutes")
    parser.add_argument("--scenes", type=int, default=4096, help="drawn scenes that are trained on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=FIRST, help="held-out scenes from here on")
    parser.add_argument("--count", type=int, default=32, help="held-out animals that are asked for")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--steps-sampled", type=int, default=STEPS)
    parser.add_argument("--methods", choices=METHODS, nargs="+", help="some of the rows")
    parser.add_argument("--ablation", choices=ABLATIONS, help="this in place of the table")
    parser.add_argument("--arms", nargs="+", help="some of the trainings of an ablation")
    parser.add_argument("--clip-vision", metavar="FILE", help="of an ablation: CLIP in place of the judge's features")
    options, output = pocket_host.parse(parser, threads=1)
    if options.ablation:
        importlib.import_module(ABLATIONS[options.ablation]).run(options, output)
        return
    work = Path(options.trained or options.work or output / "multimodal_training")
    trained = {}
    if not options.trained:
        model, clip, vae = pocket_host.load_pocket()
        trained = (
            train_by_node(options, work, model, clip, vae) if options.by_node else train(options, work, model, vae)
        )
    with torch.inference_mode():
        pocket = load(work, *pocket_host.load_pocket(narrow=False))  # as users load it
        if (work / by_node.STATE).exists():
            pocket = replace(pocket, dictionary=by_node.Phrases(Speaker(pocket.plain, pocket.clip), pocket.encoder.vlm))
        asked = questions(options.first, options.count)
        rows, shown = measure(pocket, options, asked)
    text = table(COLUMNS, rows, lambda column: 0 if column == "tokens" else 2)
    said = {name: row["said"] for name, row in rows.items() if "said" in row}
    if said:
        text += "\n\nWhat the tokens of a picture say:\n\n" + table(SAID, said, lambda column: 2)
    written(output, "multimodal", text, setting(options, pocket) | {"training": trained, "rows": rows})
    contact_sheet(shown, asked, output / "multimodal.jpg")
