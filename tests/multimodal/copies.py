"""What crops of the very picture teach a multimodal encoder, and what crops of another picture of the same animal do.

    python dev.py bench multimodal --ablation copies --steps 400 --work FOLDER     goes on where it stopped
    python dev.py bench multimodal --ablation copies --steps 2 --scenes 8 --count 2 --work FOLDER    a try

MUMU is trained on crops of the picture that is drawn, boxes with what is around the subject in them, and finds (section
7, figure 12) that models without data augmentation had the best multimodal CLIP score, "but they had a tendency to
copy-paste inputs directly into the generation". Here three trainings of the last lesson begin with the shipped weights
and take as many steps over the same scenes in the same order; chance (noise, empty prompts) is each one's own. What
differs is the picture in the prompt:

same      the box around the animal, of the very picture that is drawn
varied    the same under the paper's augmentation (vary_share of Build Multimodal Dataset: 0.2)
another   the box around the same animal in another picture, in another pose, place and background

Asked as in the table, of held-out animals in another pose, at another side and place than in the picture shown, once by
the box with its background, once without it ("at test time, we typically use segmented objects"). words, pose, side,
place: followed. crop's pose, crop's place: the judge reads what the picture shown has in place of what was asked.
pasted: PSNR in dB of the shown animal's pixels to the picture drawn, where they fit best (also mirrored), less the same
of the drawn answer: 0 where the shown animal was drawn anew as well as can be, above 0 where it was pasted. score:
multimodal_score of boxes, by the judge's features in place of CLIP's, or by the host's CLIP_VISION (--clip-vision).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sd
import numpy as np
import torch
from benchmarks import multimodal_pocket as learning
from benchmarks import pocket_host
from benchmarks.multimodal_learning import Trainer
from benchmarks.scenes import drawn, mean
from multimodal import benchmark as bench
from palimpsest.kernels.conditioning_pictures import varied
from palimpsest.kernels.edit_metrics import multimodal_score
from palimpsest.nodes.multimodal.interleaved import cut_out, squared
from palimpsest.nodes.multimodal.vlm import load_vlm
from pocket import checkpoint, metrics, world
from rivals.benchmark import table
from safetensors.torch import load_file
from torch import Tensor

SHIPPED = Path(__file__).resolve().parent.parent / "pocket" / "models"
KINDS = {"64": 0.9, "words": 0.1}
STEPS, TOKENS, VARIED = 400, 64, 0.2
COLUMNS = {
    "words": "words", "pose": "pose", "place": "place", "crop's pose": "crop's pose", "crop's place": "crop's place",
    "identity": "identity", "pasted": "pasted, dB", "score": "multimodal score",
}  # fmt: skip


# ---- what a prompt shows --------------------------------------------------------------------------------------------


class SameCrop(learning.Data):
    """Prompts show the box around the animal, of the very picture that is drawn."""

    def shown(self, index: int, rng: np.random.Generator) -> Tensor:
        return boxed(self.pictures[index], self.masks[index])


class VariedCrop(SameCrop):
    """The same, one in five varied as the paper varies them."""

    def shown(self, index: int, rng: np.random.Generator) -> Tensor:
        crop = super().shown(index, rng)
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        return varied(crop, generator) if rng.random() < VARIED else crop


class AnotherPicture(learning.Data):
    """Prompts show the box around the same animal in another picture."""

    def shown(self, index: int, rng: np.random.Generator) -> Tensor:
        (picture,), (mask,) = learning.painted([elsewhere(self.scenes[index], rng)])
        return boxed(picture, mask)


ARMS: dict[str, type[learning.Data]] = {"same": SameCrop, "another": AnotherPicture, "varied": VariedCrop}


def boxed(picture: Tensor, mask: Tensor) -> Tensor:
    """The box around an animal, of a picture (H, W, 3) and its mask (H, W) in bytes: (h, w, 3) in 0..1."""
    return cut_out(picture.float() / 255, mask[None].float() / 255, "image1", False)


def elsewhere(scene: world.Scene, rng: np.random.Generator) -> world.Scene:
    """The same animal in another pose, at a side and place of another scene."""
    other = world.sample_scene(rng)
    poses = [pose for pose in world.POSES if pose != scene.pose]
    changes = {name: getattr(other, name) for name in (*bench.BACKGROUND, "side", "dx", "dy")}
    return world.edit(scene, pose=poses[int(rng.integers(len(poses)))], **changes)


# ---- the trainings --------------------------------------------------------------------------------------------------


def train(arm: str, options: argparse.Namespace, work: Path, model: Any, vae: Any) -> dict[str, Any]:
    """Train an arm in its own folder, or go on with it."""
    folder = work / arm
    recipe = learning.Recipe(
        minutes=options.minutes, steps=options.steps, scenes=options.scenes, adapted=True, by_picture=0.0,
        seed=options.seed,
    )  # fmt: skip
    began = time.process_time()
    vlm = load_vlm(learning.write_vlm(folder / learning.UNTRAINED), "float32")
    data = ARMS[arm].draw(model, vae, recipe.scenes, work / "scenes.safetensors")
    trainer = Trainer(model, vlm, data, recipe, folder)
    trainer.begin_with(SHIPPED)
    trainer.load_state()
    trainer.draw(lambda text: print(f"{arm}: {text}", flush=True), KINDS)
    trainer.write(folder)
    return {"steps": trainer.progress["draw"].step, "processor seconds": time.process_time() - began,
            "losses": bench.thinned(trainer.losses)}  # fmt: skip


def load(folder: Path, model: Any, clip: Any, vae: Any) -> bench.Pocket:
    """What a folder holds, on the narrow U-Net, which is the same function at a quarter of the cost."""
    pocket = bench.load(folder, model, clip, vae)
    lora = checkpoint.narrow_lora(load_file(folder / learning.LORA))
    return replace(pocket, model=comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0])


# ---- what is measured -----------------------------------------------------------------------------------------------


def pasted(pictures: Tensor, shown: Tensor, masks: Tensor) -> Tensor:
    """PSNR (B,) in dB of an animal's pixels at the place of a picture where they fit best, as they are or mirrored.

    pictures, shown (B, H, W, 3) in 0..1, masks (B, H, W) of the animals in `shown`. The mean squared error at a
    displacement d is (sum m x_d^2 - 2 sum m x_d c + sum m c^2) / (3 sum m), all within the picture.
    """
    found = []
    for picture, source, mask in zip(pictures, shown, masks, strict=True):
        rows, columns = ((mask >= 0.5).any(axis).nonzero()[:, 0] for axis in (1, 0))
        box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
        m, c, x = mask[box].double(), source[box].double(), picture.double().movedim(-1, 0)
        errors = [fit(x, *each) for each in ((m, c), (m.flip(1), c.flip(1)))]
        found.append(-10 * torch.log10(min(errors).clamp(min=1e-10)))
    return torch.stack(found)


def fit(picture: Tensor, mask: Tensor, crop: Tensor) -> Tensor:
    """The least mean squared error of a crop (h, w, 3) within its mask over all places of a picture (3, H, W)."""
    squares = correlated(picture.square(), mask.expand(3, *mask.shape))
    across = correlated(picture, mask * crop.movedim(-1, 0))
    own = (mask[..., None] * crop.square()).sum()
    return ((squares - 2 * across + own) / (3 * mask.sum())).min()


def correlated(picture: Tensor, part: Tensor) -> Tensor:
    """sum picture(y + d) part(y) over channels and y, at every d that keeps part (C, h, w) within picture (C, H, W)."""
    size, (height, width) = picture.shape[1:], part.shape[1:]
    spectrum = torch.fft.rfft2(picture) * torch.fft.rfft2(part, s=size).conj()
    return torch.fft.irfft2(spectrum.sum(0), s=size)[: size[0] - height + 1, : size[1] - width + 1]


def judged(judge: Any) -> Callable[[list[Tensor]], Tensor]:
    """An embedding (n, 256) of pictures by what the judge makes of their parts, in place of CLIP's."""

    @torch.no_grad()
    def embed(crops: list[Tensor]) -> Tensor:
        kept = []
        hook = judge.parts.register_forward_hook(lambda module, given, made: kept.append(made))
        try:
            judge((torch.cat([squared(crop, 128) for crop in crops]) + 1) / 2)
        finally:
            hook.remove()
        return kept[0]

    return embed


def by_clip_vision(file: str) -> Callable[[list[Tensor]], Tensor]:
    """An embedding of pictures by a CLIP_VISION of the host."""
    import comfy.clip_vision

    vision = comfy.clip_vision.load(file)

    @torch.no_grad()
    def embed(crops: list[Tensor]) -> Tensor:
        shown = [(squared(crop, 224).movedim(1, -1) + 1) / 2 for crop in crops]
        return torch.cat([vision.encode_image(picture)["image_embeds"] for picture in shown]).float().cpu()

    return embed


def object_in(picture: Tensor, mask: Tensor) -> Tensor | None:
    """The box around what the judge finds in a picture (H, W, 3); None where it finds no animal."""
    return cut_out(picture, mask[None], "the animal", False) if bool((mask >= 0.5).any()) else None


def similarity(embed: Callable, pictures: Tensor, masks: Tensor, given: list[Tensor]) -> float:
    """The multimodal score of pictures whose prompts showed one object each."""
    parts = [object_in(*pair) for pair in zip(pictures, metrics.to_mask(masks, pictures), strict=True)]
    drawn_objects = embed([crop if part is None else part for part, crop in zip(parts, given, strict=True)])
    there = torch.tensor([part is not None for part in parts])
    return float(multimodal_score(embed(given), drawn_objects * there[:, None]))


def scores(judge: Any, embed: Callable, pictures: Tensor, asked: list[bench.Question]) -> dict[str, float]:
    """Everything measured of an arm's pictures; see the top of this file."""
    answers, sources = [q.answer for q in asked], [q.source for q in asked]
    shown, masks = torch.cat([q.picture for q in asked]), torch.cat([q.mask for q in asked])
    ideals, _ = drawn(answers)
    told = metrics.attribute_success(judge, pictures, answers)
    crops = metrics.attribute_success(judge, pictures, sources)
    given = [cut_out(q.picture[0], q.mask, "image1", False) for q in asked]
    found = bench.judging.ask(judge, pictures)["mask"]
    return {
        "words": sum(told[name] for name in bench.TOLD) / len(bench.TOLD),
        **{name: told[name] for name in bench.TOLD},
        **{f"crop's {name}": crops[name] for name in ("pose", "side", "place")},
        "identity": mean(metrics.identity(judge, pictures, answers)["score"]),
        "pasted": mean(pasted(pictures, shown, masks) - pasted(ideals, shown, masks)),
        "score": similarity(embed, pictures, found, given),
    }


def ask(pocket: bench.Pocket, question: bench.Question, kept: bool) -> bench.Conditioned:
    """A held-out animal by the box around it, with its background or without."""
    before, behind = learning.told(question.answer)
    chosen = {"background": "kept" if kept else "removed"}
    images, masks = {"image1": question.picture}, {"mask1": question.mask}
    return bench.prompted(pocket, f"{before} <image1> {behind}", images, masks, TOKENS, False, **chosen)


def run(options: argparse.Namespace, output: Path) -> None:
    """Train what is not trained yet, measure, print, write."""
    work = Path(options.work or output / "multimodal_copies")
    options.steps = options.steps or STEPS
    parts, asked = pocket_host.load_pocket(), bench.questions(options.first, options.count)
    trained = {arm: train(arm, options, work, parts[0], parts[2]) for arm in options.arms or ARMS}
    rows, shown = {}, {"shown": torch.cat([bench.shown_as(q.picture[0]) for q in asked[: bench.SHOWN]])}
    with torch.inference_mode():
        for arm, folder in {"as shipped": SHIPPED, **{arm: work / arm for arm in trained}}.items():
            pocket = load(folder, *parts)
            embed = by_clip_vision(options.clip_vision) if options.clip_vision else judged(pocket.judge)
            for kept in (True, False):
                name = f"{arm}, background {'kept' if kept else 'removed'}"
                pictures = torch.cat(
                    [bench.draw(pocket, q, ask(pocket, q, kept), **bench.as_asked(options)) for q in asked]
                )
                rows[name], shown[name] = scores(pocket.judge, embed, pictures, asked), pictures[: bench.SHOWN]
                print(name, {key: round(value, 3) for key, value in rows[name].items()}, flush=True)
        rows[bench.CEILING] = through(pocket, embed, asked, [q.answer for q in asked])
        rows["the picture shown itself, through the autoencoder"] = through(
            pocket, embed, asked, [q.source for q in asked]
        )
    bench.written(output, "multimodal_copies", table(COLUMNS, rows, lambda column: 1 if column == "pasted" else 2),
                  bench.setting(options, pocket) | {"training": trained, "rows": rows})  # fmt: skip
    bench.contact_sheet(shown, asked, output / "multimodal_copies.jpg")


def through(pocket: bench.Pocket, embed: Callable, asked: list[bench.Question], scenes: list) -> dict[str, float]:
    """The numbers of drawn pictures that went through the autoencoder: the best and the worst there are."""
    ideals, _ = drawn(scenes)
    pictures = torch.cat([pocket.vae.decode(pocket.vae.encode(part)) for part in ideals.split(8)]).clamp(0, 1)
    return scores(pocket.judge, embed, pictures, asked)
