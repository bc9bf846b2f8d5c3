"""LoRAs of a few pictures beside the host's own trainer, on concepts that the pocket model has never seen.

    python dev.py bench lora_training                              all rows of the ink style, the paper's recipe
    python dev.py bench lora_training --rate 5                     at the host's rate, five times the paper's
    python dev.py bench lora_training --concept fox --pictures 12
    python dev.py bench lora_training --concept zigzag --pictures 12
    python dev.py bench lora_training --rows host unet             some rows; rows that are there are not run again
    python dev.py bench lora_training --rate 5 --epochs 4 --curve 0 --trainings 3 --rows host style    how far seeds go
    python dev.py bench lora_training --rate 5 --rows style --figure-14 style    and the review paper's figure 14
    python dev.py bench lora_training --pictures 3 --epochs 1 --repeats 1 --drawn 2 --rows unet    a try

Every row trains for the same number of steps on the same pictures and draws the captions of held-out scenes, which tell
content only, with the host's dpmpp_2m, karras. A row's numbers are written as soon as it ends, so that a run that was
stopped goes on where it ended; another recipe starts anew.

distance: mean W1 of colours (Lab) and of steps between neighbouring pixels to the held-out drawings, in Lab units; of a
coat inside it alone
shown: share of pictures that are nearer, by the same distance, to the held-out drawing than to its scene without the
concept
followed: what the captions tell, as the pocket judge reads it (of drawings in ink it reads less: see the first row)
learned by heart: PSNR to the nearest training picture, less that of the held-out drawings; above 0 is memory
"+-": the deviation of the distance over trainings from other seeds, where there are several
curve: the distance after each file on the way; peak: of the process, so of the largest row that ran in it
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import folder_paths
import torch
from benchmarks import pocket_host
from benchmarks.scenes import contact_sheet, defaults, summarised
from lora_training.concepts import CONCEPTS, Lesson
from palimpsest.kernels.lora import CONSTANT, DEBIASED, PICTURE
from palimpsest.nodes.lora import files
from palimpsest.nodes.lora.nodes import TrainLoRA
from palimpsest.nodes.lora.settings import PAPER, STYLE
from PIL import Image
from pocket import judge as judging
from pocket import metrics

import nodes as host_nodes

GUIDANCE, DRAW_STEPS, SEED, SIZE = 5.0, 20, 7100, 128
NO_RECIPE = "rows", "output", "threads", "figure_14"
FIGURE_14 = ["cat, park"] * 25, 30  # prompts, steps
READ = ("species", "pose", "side", "place")  # what the judge is asked of pictures in another style
COLUMNS = {
    "distance": "distance", "distance +-": "+-", "shown": "shown", "followed": "followed", "heart": "learned by heart",
    "seconds": "processor s a step", "peak": "peak MB",
}  # fmt: skip


# ---- what is measured


def distance(drawn: torch.Tensor, wanted: torch.Tensor, inside: torch.Tensor | None = None) -> float:
    """Mean over L, a, b and the gradient of L of W1 between the values of two sets of pictures (N, H, W, 3).

    inside: bool (N, H, W), the pixels that are compared; None: all.
    """
    shares = torch.linspace(0.005, 0.995, 200)
    a, b = (torch.stack([torch.quantile(values, shares) for values in statistics(p, inside)]) for p in (drawn, wanted))
    return float((a - b).abs().mean())


def statistics(pictures: torch.Tensor, inside: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Values of the pixels: L, a, b, and how far L moves to the next pixel. At most a million each."""
    colours = metrics.lab(pictures)
    edges = (colours[:, 1:, :-1, 0] - colours[:, :-1, :-1, 0]).hypot(colours[:, :-1, 1:, 0] - colours[:, :-1, :-1, 0])
    every = [*colours.unbind(-1), edges]
    if inside is not None:
        every = [values[inside[:, : values.shape[1], : values.shape[2]]] for values in every]
    return [values.flatten()[:: max(1, values.numel() // 1_000_000)] for values in every]


def nearest(pictures: torch.Tensor, taught: torch.Tensor) -> float:
    """Mean PSNR of each picture to the training picture that is most like it, in dB."""
    return float(torch.stack([metrics.psnr(p.expand_as(taught), taught).max() for p in pictures]).clamp(max=60).mean())


def shown(drawn: torch.Tensor, lesson: Lesson) -> float:
    """The share of pictures that are nearer to their scene with the concept than to it without."""
    return nearer(drawn, lesson.held_out, lesson.without, lesson.inside)


def nearer(drawn: torch.Tensor, new: torch.Tensor, old: torch.Tensor, inside: torch.Tensor | None = None) -> float:
    """The share of pictures (N, H, W, 3) that are nearer to their new one than to their old one; inside: as above."""
    where = [None] * len(drawn) if inside is None else inside.split(1)
    each = zip(drawn.split(1), new.split(1), old.split(1), where, strict=True)
    return sum(distance(p, a, w) < distance(p, b, w) for p, a, b, w in each) / len(drawn)


def few_distance(drawn: torch.Tensor, lesson: Lesson) -> float:
    """Of the first scenes' pictures: to all held-out drawings, or inside these scenes' coats to their own drawings."""
    if lesson.inside is None:
        return distance(drawn, lesson.held_out)
    return distance(drawn, lesson.held_out[: len(drawn)], lesson.inside[: len(drawn)])


def measured(drawn: torch.Tensor, lesson: Lesson, judge: Any) -> dict[str, float]:
    told = metrics.attribute_success(judge, drawn, lesson.scenes)
    return {
        "distance": distance(drawn, lesson.held_out, lesson.inside),
        "shown": shown(drawn, lesson),
        "followed": sum(told[name] for name in READ) / len(READ),
        "heart": nearest(drawn, lesson.taught) - nearest(lesson.held_out, lesson.taught),
    }


# ---- the ways

Way = Callable[["Pocket", Lesson], tuple[Any, Any, list[Path]]]


@dataclass(frozen=True)
class Pocket:
    """The pocket model and what a row needs of the recipe."""

    model: Any
    clip: Any
    vae: Any
    options: argparse.Namespace
    folder: Path
    output: Path
    seed: int = 0

    def sheet(self, name: str) -> Path:
        """The file of a contact sheet."""
        return self.output / f"lora_{self.options.concept}_{name}.png"

    def draw(self, model: Any, clip: Any, prompts: list[str], lesson: Lesson, steps: int = DRAW_STEPS) -> torch.Tensor:
        """Pictures (N, H, W, 3) by the host's own KSampler; each prompt has its seed."""
        found, (negative,) = [], host_nodes.CLIPTextEncode().encode(clip, "")
        start = torch.zeros(1, 4, SIZE // 8, SIZE // 8)
        for number, prompt in enumerate(prompts):
            (positive,) = host_nodes.CLIPTextEncode().encode(clip, prompt)
            if lesson.redrawn < 1:
                start = self.vae.encode(lesson.without[number : number + 1])
            (latent,) = host_nodes.KSampler().sample(
                model, SEED + number, steps, GUIDANCE, "dpmpp_2m", "karras", positive, negative,
                {"samples": start}, denoise=lesson.redrawn,
            )  # fmt: skip
            found.append(self.vae.decode(latent["samples"]).clamp(0, 1))
        return torch.cat(found)

    def teach(self, lesson: Lesson, style: str = "", **changes: Any) -> tuple[Any, Any, list[Path]]:
        """Our node by the paper's recipe: (model, clip, files on the way and the last)."""
        options = self.options
        recipe = {
            "preset": PAPER, "resolution": SIZE, "rank": 16, "alpha": 8.0, "preview_every": 0, "keep_state": "none",
            "checkpointing": False, "filename": "bench", "seed": self.seed,
        }  # fmt: skip
        given = defaults(TrainLoRA) | recipe | changes
        if (options.epochs, options.repeats, options.rate) != (20, 5, 1.0):  # a preset would win over them
            scaled = {"learning_rate": 1e-4 * options.rate, "text_rate": 1e-5 * options.rate}
            own = {"preset": "as set below", "epochs": options.epochs, "repeats": options.repeats}
            given |= own | scaled | {"save_every": max(1, options.epochs // 10)} | changes
        captions = [f"{caption}, {style}" if style else caption for caption in lesson.captions]
        lists = {"images": [lesson.taught], "captions": captions}
        single = {"model": self.model, "clip": self.clip, "vae": self.vae} | given
        before = set(self.folder.glob("*.safetensors"))
        node = TrainLoRA.execute(**{name: [value] for name, value in single.items() if name not in lists}, **lists)
        written = sorted(set(self.folder.glob("*.safetensors")) - before, key=lambda path: path.stat().st_mtime)
        return node.args[0], node.args[1], written

    def teach_by_host(self, lesson: Lesson) -> tuple[Any, Any, list[Path]]:
        """The host's TrainLoraNode at its own values, for as many steps."""
        import comfy.model_patcher
        from comfy_extras import nodes_train

        steps = len(lesson.captions) * self.options.repeats * self.options.epochs
        encoded = [host_nodes.CLIPTextEncode().encode(self.clip, caption)[0] for caption in lesson.captions]
        latents = [{"samples": self.vae.encode(picture[None])} for picture in lesson.taught]
        chosen = {
            "batch_size": 1, "steps": steps, "grad_accumulation_steps": 1, "learning_rate": 5e-4, "rank": 16,
            "optimizer": "AdamW", "loss_function": "MSE", "seed": self.seed, "training_dtype": "fp32",
            "lora_dtype": "fp32", "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": False,
            "checkpoint_depth": 1, "offloading": False, "existing_lora": "[None]", "bucket_mode": False,
            "bypass_mode": False,
        }  # fmt: skip

        whole = self.model.clone()
        if not self.options.full_width:  # the node trains in a second model, which the host loads from the checkpoint
            weights = pocket_host.TESTS / "pocket" / "weights" / "unet.safetensors"

            def again(disable_dynamic: bool = True) -> Any:
                fresh = pocket_host.narrow_model(self.model, weights)
                return comfy.model_patcher.ModelPatcher(fresh.model, fresh.load_device, fresh.offload_device)

            whole.cached_patcher_init = (again, ())
        torch.manual_seed(self.seed)  # its own seed does not seed it
        known = {entry.id for entry in nodes_train.TrainLoraNode.define_schema().inputs}
        listed = {name: [value] for name, value in chosen.items() if name in known}
        with torch.inference_mode(False):
            node = nodes_train.TrainLoraNode.execute(model=[whole], latents=latents, positive=encoded, **listed)
        (patched,) = nodes_train.LoraModelLoader.execute(self.model, node.args[0], 1.0).args
        return patched, self.clip, []

    def loaded(self, file: Path) -> tuple[Any, Any]:
        """The model and clip with a file that was written on the way."""
        import comfy.sd
        import comfy.utils

        content = comfy.utils.load_torch_file(str(file), safe_load=True)
        return comfy.sd.load_lora_for_models(self.model, self.clip, content, 1.0, 1.0)


def unet_alone(style: bool = False, **changes: Any) -> Way:
    """Our node with the text encoder left as it is, which is most of a step's cost here."""

    def teach(pocket: Pocket, lesson: Lesson) -> tuple[Any, Any, list[Path]]:
        return pocket.teach(lesson, lesson.style if style else "", text_rate=0.0, preset="as set below", **changes)

    return teach


STEADY = {"convolutions": True, "schedule": CONSTANT}
WAYS: dict[str, tuple[str, Way]] = {
    "prompt": ("prompt only, the style told", lambda pocket, _: (pocket.model, pocket.clip, [])),
    "host": ("the host's Train LoRA", Pocket.teach_by_host),
    "unet": ("U-Net only", unet_alone()),
    "conv": ("the same, convolutions too", unet_alone(convolutions=True)),
    "dropped": ("convolutions too, one caption in ten empty", unet_alone(convolutions=True, caption_dropout=0.1)),
    "offset": ("convolutions too, noise offset 0.1", unet_alone(convolutions=True, noise_offset=0.1)),
    "picture": ("convolutions too, loss on the picture, constant rate", unet_alone(loss_weight=PICTURE, **STEADY)),
    "biases": ("loss on the picture, norms and biases", unet_alone(loss_weight=PICTURE, biases=True, **STEADY)),
    "style": (
        "preset style",
        lambda pocket, lesson: pocket.teach(lesson, text_rate=0.0, preset=STYLE),
    ),
    "debiased": (
        "convolutions too, debiased, noise offset 0.1, alpha 16, constant rate",
        unet_alone(loss_weight=DEBIASED, noise_offset=0.1, alpha=16.0, **STEADY),
    ),
    "annealed": (
        "the same, along a cosine",
        unet_alone(loss_weight=DEBIASED, noise_offset=0.1, alpha=16.0, convolutions=True),
    ),
    "words": ("U-Net only, style told in the captions", unet_alone(style=True)),
    "snr": ("U-Net only, Min-SNR 5", unet_alone(min_snr_gamma=5.0)),
    "rank4": ("U-Net only, rank 4", unet_alone(rank=4, alpha=2.0)),
    "rank32": ("U-Net only, rank 32", unet_alone(rank=32, alpha=16.0)),
    "both": ("U-Net and text encoder", lambda pocket, lesson: pocket.teach(lesson)),
}


def over_trainings(several: list[dict]) -> dict:
    """The numbers of one training, or the means of several, which have no curve."""
    if len(several) == 1:
        return several[0]
    return summarised([{key: value for key, value in one.items() if key != "curve"} for one in several], ["distance"])


def row(pocket: Pocket, lesson: Lesson, name: str, judge: Any) -> tuple[dict, torch.Tensor]:
    """(numbers, pictures) of one training."""
    began = time.process_time()
    with torch.inference_mode():
        model, clip, written = WAYS[name][1](pocket, lesson)
    seconds = time.process_time() - began
    steps = len(lesson.captions) * pocket.options.repeats * pocket.options.epochs
    told = [f"{prompt}, {lesson.style}" if name in ("prompt", "words") else prompt for prompt in lesson.asked]
    with torch.inference_mode():
        drawn = pocket.draw(model, clip, told, lesson)
        found = measured(drawn, lesson, judge)
        few = told[: pocket.options.curve]
        found["curve"] = {
            file.stem: few_distance(pocket.draw(*pocket.loaded(file), few, lesson), lesson) for file in written if few
        }
        if pocket.options.figure_14 == name and pocket.seed == 0:
            sheet_of_fives(pocket.draw(model, clip, FIGURE_14[0], lesson, FIGURE_14[1]), pocket.sheet("figure_14"))
    found["seconds"] = 0.0 if name == "prompt" else seconds / steps
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return found, drawn


# ---- the run


def table(found: dict[str, dict]) -> str:
    """A markdown table; the first row has no training."""
    columns = {key: head for key, head in COLUMNS.items() if any(key in numbers for numbers in found.values())}
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, numbers in found.items():
        cells = (f"{numbers[key]:.2f}" if key in numbers else "-" for key in columns)
        lines.append(f"| {WAYS[name][0] if name in WAYS else name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def joined(sheets: list[Path], path: Path) -> None:
    """The first row of the ways' sheets, one below the other."""
    opened = [Image.open(sheet).convert("RGB") for sheet in sheets]
    whole = Image.new("RGB", (opened[0].width, len(opened) * SIZE), "white")
    for number, sheet in enumerate(opened):
        whole.paste(sheet.crop((0, 0, sheet.width, SIZE)), (0, number * SIZE))
    whole.save(path)


def sheet_of_fives(drawn: torch.Tensor, path: Path) -> None:
    """Pictures (25, H, W, 3) in a square, and nothing else."""
    square = drawn.unflatten(0, (5, 5)).movedim(2, 1).flatten(0, 1).flatten(1, 2)
    Image.fromarray((square * 255).round().byte().numpy()).save(path)


def in_folder(folder: Path) -> Path:
    """Let LoRAs and states go to a folder of the run."""
    for kind in ("loras", files.STATES.folder):
        (folder / kind).mkdir()
        folder_paths.folder_names_and_paths[kind] = ([str(folder / kind)], {".safetensors"})
    return folder / "loras"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py bench lora_training", description=__doc__.splitlines()[0])
    parser.add_argument("--concept", choices=CONCEPTS, default="ink")
    parser.add_argument("--pictures", type=int, default=35)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--trainings", type=int, default=1, help="of each row, from as many seeds")
    parser.add_argument("--rate", type=float, default=1.0, help="times the paper's learning rates")
    parser.add_argument("--drawn", type=int, default=25, help="held-out captions")
    parser.add_argument("--curve", type=int, default=4, help="captions drawn after each file on the way; 0: none")
    parser.add_argument("--rows", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--figure-14", choices=WAYS, metavar="ROW", help="and this row's 25 pictures of a few words")
    parser.add_argument("--full-width", action="store_true", help="the checkpoint's own U-Net, four times slower")
    options, output = pocket_host.parse(parser)
    recipe = {name: value for name, value in vars(options).items() if name not in NO_RECIPE}
    path = output / f"lora_{options.concept}.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = kept.get("rows", {}) if kept.get("recipe") == recipe else {}
    lesson = Lesson.of(CONCEPTS[options.concept], options.pictures, options.drawn)
    judge = judging.load()
    with torch.inference_mode():
        model, clip, vae = pocket_host.load_pocket(not options.full_width)
        ideal = torch.cat([vae.decode(vae.encode(picture[None])).clamp(0, 1) for picture in lesson.held_out])
        found["the drawings, through the autoencoder"] = measured(ideal, lesson, judge)
        if lesson.inside is not None:
            plain = torch.cat([vae.decode(vae.encode(picture[None])).clamp(0, 1) for picture in lesson.without])
            found["the same scenes without it, through the autoencoder"] = measured(plain, lesson, judge)
    with tempfile.TemporaryDirectory() as folder:
        pocket = Pocket(model, clip, vae, options, in_folder(Path(folder)), output)
        for name in (name for name in options.rows if name not in found):
            runs = [row(replace(pocket, seed=seed), lesson, name, judge) for seed in range(options.trainings)]
            found[name], drawn = over_trainings([numbers for numbers, _ in runs]), runs[0][1]
            path.write_text(json.dumps({"recipe": recipe, "rows": found}, indent=2) + "\n", encoding="utf-8")
            fives = {
                f"{WAYS[name][0]} {i // 5 + 1}": drawn[i : i + 5] for i in range(0, len(drawn) - len(drawn) % 5, 5)
            }
            contact_sheet(fives or {WAYS[name][0]: drawn}, pocket.sheet(name))
            print(name, {key: value for key, value in found[name].items() if key != "curve"}, flush=True)
    sheets = [output / f"lora_{options.concept}_{name}.png" for name in WAYS if name in found]
    if there := [sheet for sheet in sheets if sheet.is_file()]:
        joined(there, output / f"lora_{options.concept}.png")
    ordered = [*(name for name in found if name not in WAYS), *(name for name in WAYS if name in found)]
    print(f"\n{table({name: found[name] for name in ordered})}")
