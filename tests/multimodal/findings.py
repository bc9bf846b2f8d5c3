"""MUMU's findings 2, 3 and 4 in small: pictures that never met, looks for another subject, a fine-tune merged with it.

    python dev.py bench multimodal --ablation findings                         all three, the shipped weights
    python dev.py bench multimodal --ablation findings --arms 2 3 --count 8    some of it

2  "Despite being only trained on crops from the same image, MUMU learns to compose inputs from different images." The
   animal of one picture and the place of another, which is how no training prompt was made, beside both of one picture.
3  "MUMU can perform some style transfer though it is not perfect." The looks of a picture's animal for another species:
   "a <picture of a cat> dog". species: the word's. coat, second, pattern, collar: the picture's.
4  "The MUMU LoRA appears to compose with the stylistic fine-tunes." The pocket model fine-tuned to ink on paper by
   Train LoRA's preset *style*, with MUMU's LoRA merged in, beside either alone. ink: the mean distance of colours and
   steps between pixels to the answers drawn in ink (lora_training.benchmark.distance), which falls as the style comes.
   shown: the share of pictures that are nearer, by the same distance, to their answer in ink than to the plain one.

Everything else as in the table: held-out animals, 64 tokens a picture, the host's KSampler.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sd
import numpy as np
import torch
from benchmarks import multimodal_pocket as learning
from benchmarks import pocket_host
from benchmarks.scenes import another, drawn, mean
from lora_training import benchmark as fine_tuning
from lora_training import ink
from multimodal import benchmark as bench
from multimodal.copies import SHIPPED, load
from palimpsest.nodes.lora.settings import STYLE
from pocket import checkpoint, metrics, world
from rivals.benchmark import table
from safetensors.torch import load_file
from torch import Tensor

TOKENS = 64
INK = argparse.Namespace(pictures=35, repeats=5, epochs=4, rate=5.0)  # 700 steps, as the benchmark of LoRAs has them
COLUMNS = {
    "words": "words", "species": "species", "place": "place", "colour": "coat", "second": "second colour",
    "pattern": "pattern", "collar": "collar", "identity": "identity", "ink": "ink", "shown": "shown",
}  # fmt: skip

Rows = tuple[dict[str, dict[str, float]], dict[str, Tensor]]


def scores(judge: Any, pictures: Tensor, answers: list[world.Scene]) -> dict[str, float]:
    """What of the answers the judge reads off pictures."""
    told = metrics.attribute_success(judge, pictures, answers)
    same = metrics.identity(judge, pictures, answers)
    return {
        "words": sum(told[name] for name in bench.TOLD) / len(bench.TOLD),
        **{name: told[name] for name in (*bench.TOLD, "colour")},
        "identity": mean(same["score"]),
        **{name: mean(same[name]) for name in ("pattern", "second", "collar")},
    }


def rows_of(
    pocket: bench.Pocket, asked: dict[str, list[bench.Question]], ask: Callable, options: argparse.Namespace
) -> Rows:
    """(numbers, pictures) of questions by the name of a row; ask(row, question) is what is sampled."""
    numbers, shown = {}, {}
    for name, questions in asked.items():
        pictures = torch.cat([bench.draw(pocket, q, ask(name, q), **bench.as_asked(options)) for q in questions])
        numbers[name] = scores(pocket.judge, pictures, [q.answer for q in questions])
        shown[name] = pictures
        print(name, {key: round(value, 3) for key, value in numbers[name].items()}, flush=True)
    return numbers, shown


# ---- the findings ---------------------------------------------------------------------------------------------------


def harmonised(pocket: bench.Pocket, asked: list[bench.Question], options: argparse.Namespace) -> Rows:
    """Finding 2: two pictures of one scene, and of two."""
    own = [at_home(question) for question in asked]
    return rows_of(
        pocket,
        {"animal and place of one picture": own, "animal and place of two pictures": asked},
        lambda name, question: bench.ByPicture(TOKENS, two=True)(pocket, question),
        options,
    )


def at_home(question: bench.Question) -> bench.Question:
    """The same animal in another pose on the other side, at the place of its own picture."""
    stays = {name: getattr(question.source, name) for name in bench.BACKGROUND}
    (picture,), _ = drawn([question.source])
    place = learning.edge(picture, question.source)[None]
    return replace(question, answer=world.edit(question.answer, **stays), place=place)


def styled(pocket: bench.Pocket, asked: list[bench.Question], options: argparse.Namespace) -> Rows:
    """Finding 3: the looks of a picture's animal for its own species, and for another."""
    others = [
        replace(q, answer=world.edit(q.answer, species=another(q.source, "species", i))) for i, q in enumerate(asked)
    ]
    return rows_of(
        pocket,
        {"looks for the same species": asked, "looks for another species": others},
        lambda name, question: bench.ByPicture(TOKENS)(pocket, question),
        options,
    )


def merged(pocket: bench.Pocket, asked: list[bench.Question], options: argparse.Namespace) -> Rows:
    """Finding 4: a fine-tune by words, MUMU's LoRA alone, and both in one model."""
    tuned = fine_tuned(pocket)
    lora = checkpoint.narrow_lora(load_file(SHIPPED / learning.LORA))
    both, _ = comfy.sd.load_lora_for_models(tuned, None, lora, 1.0, 0.0)
    ways = {
        "fine-tune alone, colour told": lambda q: bench.by_text(replace(pocket, plain=tuned), q),
        "MUMU alone": lambda q: bench.ByPicture(TOKENS)(pocket, q),
        "MUMU merged into the fine-tune": lambda q: bench.ByPicture(TOKENS)(replace(pocket, model=both), q),
    }
    numbers, shown = rows_of(pocket, dict.fromkeys(ways, asked), lambda name, question: ways[name](question), options)
    answers = [q.answer for q in asked]
    wanted = torch.from_numpy(np.stack([ink.in_ink(world.render(answer)) for answer in answers])).float() / 255
    plain = drawn(answers)[0]
    for name, pictures in (("the answers", plain), ("the answers in ink", wanted)):
        through = pocket.vae.decode(pocket.vae.encode(pictures)).clamp(0, 1)
        shown[f"{name}, through the autoencoder"] = through
        numbers[f"{name}, through the autoencoder"] = scores(pocket.judge, through, answers)
    for name, pictures in shown.items():
        nearer = fine_tuning.nearer(pictures, wanted, plain)
        numbers[name] |= {"ink": fine_tuning.distance(pictures, wanted), "shown": nearer}
    return numbers, shown


def fine_tuned(pocket: bench.Pocket) -> Any:
    """The pocket model that draws ink on paper: a LoRA on its U-Net by Train LoRA."""
    lesson = fine_tuning.Lesson.of(fine_tuning.CONCEPTS["ink"], INK.pictures, 1)
    with tempfile.TemporaryDirectory() as name:
        folder = fine_tuning.in_folder(Path(name))
        teacher = fine_tuning.Pocket(pocket.plain, pocket.clip, pocket.vae, INK, folder, output=folder)
        return teacher.teach(lesson, text_rate=0.0, preset=STYLE)[0]


FINDINGS = {"2": harmonised, "3": styled, "4": merged}


def run(options: argparse.Namespace, output: Path) -> None:
    """Measure, print, write."""
    asked, numbers, shown = bench.questions(options.first, options.count), {}, {}
    with torch.inference_mode():
        pocket = load(SHIPPED, *pocket_host.load_pocket())
        for number in options.arms or FINDINGS:
            found, pictures = FINDINGS[number](pocket, asked, options)
            numbers |= {f"{number}: {name}": row for name, row in found.items()}
            shown |= {f"{number}: {name}": each[: bench.SHOWN] for name, each in pictures.items()}
    for row in numbers.values():
        row |= {name: row.get(name, torch.nan) for name in ("ink", "shown")}
    text = table(COLUMNS, numbers, lambda column: 1 if column == "ink" else 2)
    bench.written(output, "multimodal_findings", text, bench.setting(options, pocket) | {"rows": numbers})
    bench.contact_sheet(shown, asked, output / "multimodal_findings.jpg")
