"""The Context-Aware Sampler with a trained adapter against plain DDIM, and clips edited by prompt, on drawn scenes.

    python dev.py bench contextdiff                               tables, JSON and contact sheet
    python dev.py bench contextdiff --parts pictures --guidance 3 some of it
    python dev.py bench contextdiff --sweep                       what else was tried, at one guidance
    python dev.py bench contextdiff --parts kinds                 the other kinds of adapters; see bench_kinds.py
    python dev.py bench contextdiff --parts convergence --clips 3 the paper's figure 11; see bench_convergence.py

Pictures (the paper's figure 10 in small): an adapter is trained by Train Context Adapter on drawn pictures with their
captions, of scenes that are not among those measured. Then every held-out caption is sampled from the same noise with
the host's plain DDIM and with the context-aware sampler, over guidance. attributes: share of what the captions tell
that the judge reads off the pictures; "all": of pictures with nothing wrong. distance: Frechet distance between the
pictures and drawn pictures of other held-out scenes (through the autoencoder, as every sample goes), of the judge's
last features on their first principal axes, as a share of their variance; that of drawn pictures of the measured
scenes is the floor.

Clips: drawn walk cycles of 8 frames, inverted with their caption and drawn by another colour, place or animal. A clip's
adapter is trained on that clip and its caption alone (one-shot, video form). s: of the processor; what a clip's three
edits share, adapters and inversions, is spread over them. edited, followed: as the judge reads them,
mean over frames. pairs: the paper's CLIP-temp, the mean cosine similarity of the features of all pairs of frames, by
the judge's features; features: of frames in a row only. flicker: how much a frame's error against the ideal edit's
frame changes to the next frame; 0 where only the animal's own motion is left. Pixels are in 0..1. "+-": the standard
deviation over clips. Tune-A-Video style: queries tuned on the clip (a LoRA, learned with the released code's noise,
which the adapter shifts by 0.018 of its output), frames look at the first and the one before, plain inversion and
sampling. FateZero style: frames look at the middle one in all but the finest layers, attention fused over [0.5 T, T].
"+ Attention Fusion" and "+ context adapter": ours without and with the adapter's path, up and down.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import comfy.samplers
import comfy.sd
import numpy as np
import torch
from benchmarks import pocket_host, walks
from benchmarks.scenes import another, defaults, drawn, summarised
from comfy_extras.nodes_custom_sampler import SamplerCustom
from contextdiff.bench_convergence import COLUMNS as COURSE_COLUMNS
from contextdiff.bench_convergence import bench_convergence, course
from contextdiff.bench_kinds import COLUMNS as KIND_COLUMNS
from contextdiff.bench_kinds import bench_kinds, by_text, draw
from palimpsest.nodes.attention_fusion.nodes import AttentionFusion
from palimpsest.nodes.contextdiff import files as context_files
from palimpsest.nodes.contextdiff.nodes import ContextSampler, TrainContextAdapter
from palimpsest.nodes.inversion.nodes import Invert
from palimpsest.nodes.video.nodes import VideoAttention
from PIL import Image, ImageDraw, ImageFont
from pocket import judge as judging
from pocket import metrics, world
from rivals.benchmark import table, without_nan
from safetensors.torch import load_file, save_file

TRAINING_SEED = 5  # scenes of this seed are trained on; the held-out ones have world.HELD_OUT_SEED
RECIPE = {"steps": 300, "learning_rate": 1e-3, "batch_size": 4, "validate_every": 0, "rescue_filename": ""}
ONE_SHOT = {
    "steps": 40,
    "learning_rate": 5e-4,
    "batch_size": 8,
    "validate_every": 0,
    "rescue_filename": "",
    "video": True,
}
VARIANTS = {"x0_hat": {"train_on": "x0_hat"}, "x0": {"train_on": "x0", "steps": 250}}
SWEEP = {  # name: (how the adapter is trained, strength)
    "x0_hat, strength 0.5": ({"train_on": "x0_hat"}, 0.5),
    "x0_hat, strength 2": ({"train_on": "x0_hat"}, 2.0),
    "x0, strength 0.5": ({"train_on": "x0"}, 0.5),
    "x0_hat, SNR limit 1": ({"train_on": "x0_hat", "min_snr_gamma": 1.0}, 1.0),
    "x0_hat, SNR limit 100": ({"train_on": "x0_hat", "min_snr_gamma": 100.0}, 1.0),
    "x0_hat, medium": ({"train_on": "x0_hat", "size": "medium"}, 1.0),
    "x0_hat, LoRA on to_q": ({"train_on": "x0_hat", "train_unet": "LoRA on to_q"}, 1.0),
}
REFERENCE = 192  # drawn pictures that the distance is measured to
AXES = 32  # principal axes of the Frechet distance
PICTURE_COLUMNS = {"all": "all right", "all +-": "+-", **{name: name for name in world.CAPTIONED}, "mean": "attributes",
                   "distance": "distance", "distance +-": "+-"}  # fmt: skip
CLIP_COLUMNS = {"edited": "edited", "followed": "prompt followed", "followed +-": "+-", "pairs": "CLIP-temp, all pairs",
                "pairs +-": "+-", "features": "features", "flicker": "flicker", "ideal": "PSNR to ideal",
                "ideal +-": "+-", "background": "background dB", "seconds": "s"}  # fmt: skip
TRADED = ("all", "distance")  # numbers of pictures whose deviation over seeds is told
SPREAD = ("followed", "pairs", "ideal")  # numbers whose deviation over clips is told
DIGITS = {
    "distance": 3,
    "features": 4,
    "pairs": 4,
    "pairs +-": 4,
    "ideal +-": 2,
    "flicker": 4,
    "ideal": 2,
    "background": 1,
    "seconds": 0,
}
PARTS = ("pictures", "clips", "kinds", "convergence")
CLIP_STEPS, CLIP_GUIDANCE, KINDS = 20, 3.0, ("colour", "place", "species")  # T = 20 as the paper
SHOWN = 8  # pictures in a row of the contact sheet
COLOURS = [(120, 120, 120), (66, 120, 190), (200, 80, 50), (70, 150, 80), (150, 90, 170)]


class Pocket:
    """The pocket model, its judge, and the host's sampling."""

    def __init__(self, narrow: bool):
        self.model, self.clip, self.vae = pocket_host.load_pocket(narrow)
        self.judge = judging.load()

    def encode(self, texts: list[str]) -> list:
        """Texts as one CONDITIONING, a row each."""
        return [[torch.cat([self.clip.encode_from_tokens(self.clip.tokenize(text)) for text in texts]), {}]]

    def latent(self, pictures: torch.Tensor) -> dict:
        """Pictures (B, H, W, 3) as a LATENT."""
        return {"samples": torch.cat([self.vae.encode(part) for part in pictures.split(16)])}

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) in 0..1."""
        return torch.cat([self.vae.decode(part) for part in latent.split(1)]).clamp(0, 1)

    def levels(self, steps: int) -> torch.Tensor:
        """The noise levels that every method samples on."""
        return comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), "normal", steps)

    def sample(
        self, sampler: Any, positive: list, guidance: float, levels: torch.Tensor, latent: dict,
        seed: int | None = None, model: Any = None,
    ) -> dict:  # fmt: skip
        """The host's SamplerCustom; seed None adds no noise."""
        return SamplerCustom.execute(
            model or self.model, seed is not None, seed or 0, guidance, positive, self.nothing, sampler, levels, latent
        ).args[0]

    @cached_property
    def nothing(self) -> list:
        """The empty prompt."""
        return self.encode([""])

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """What the judge's heads read, (B, 448)."""
        found = []
        hook = self.judge.heads["species"].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach()))
        judging.ask(self.judge, pictures)
        hook.remove()
        return torch.cat(found).double()


def plain_ddim() -> Any:
    """The host's own sampler."""
    return comfy.samplers.sampler_object("ddim")


def context_aware(adapter: Any, strength: float = 1.0) -> Any:
    """The Context-Aware Sampler at its defaults."""
    chosen = defaults(ContextSampler) | {"strength": strength}
    return ContextSampler.execute(context_adapter=adapter, **chosen).args[0]


def trained(pocket: Pocket, pictures: torch.Tensor, texts: list, model: Any = None, **recipe: Any) -> tuple:
    """(adapter, report, seconds of the processor, LoRA) of Train Context Adapter at its defaults except `recipe`.

    texts: captions, or a CONDITIONING.
    """
    prompt = pocket.encode(texts) if isinstance(texts[0], str) else texts
    began = time.process_time()
    adapter, _, report, lora = TrainContextAdapter.execute(
        model or pocket.model, pocket.latent(pictures), prompt,
        **defaults(TrainContextAdapter) | recipe,
    ).args  # fmt: skip
    return adapter, report, time.process_time() - began, lora


class Kept:
    """Numbers by what they are of, and pictures that are shown by their labels, for a run that was stopped to go on.

    The pictures lie beside the file of the numbers. numbers and pictures are written by `add`, and may be read.
    """

    def __init__(self, path: Path):
        self.path, self.pictures_path = path, path.with_suffix(".safetensors")
        self.numbers = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.pictures = load_file(self.pictures_path) if self.pictures_path.is_file() else {}

    def add(self, name: str, numbers: dict[str, Any], pictures: dict[str, torch.Tensor]) -> None:
        self.numbers[name] = numbers
        self.pictures |= {label: shown.clone() for label, shown in pictures.items()}  # some share their memory
        save_file(self.pictures, self.pictures_path)
        self.path.write_text(json.dumps(self.numbers, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ pictures


@dataclass(frozen=True)
class Reference:
    """Mean and covariance of drawn pictures' features on their first principal axes."""

    axes: torch.Tensor
    mean: torch.Tensor
    covariance: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> Reference:
        """From features (B, F)."""
        centred = features - features.mean(0)
        axes = torch.linalg.svd(centred, full_matrices=False)[2][:AXES].T
        return cls(axes, (features @ axes).mean(0), torch.cov((features @ axes).T))

    def distance(self, features: torch.Tensor) -> float:
        """|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) (arXiv:1706.08500, eq. 6), in units of the reference's variance."""
        projected = features @ self.axes
        mean, covariance = projected.mean(0), torch.cov(projected.T)
        root = torch.linalg.eigvals(self.covariance @ covariance).real.clamp(min=0).sqrt().sum()
        gap = (mean - self.mean).pow(2).sum()
        spread = self.covariance.trace()
        return float((gap + covariance.trace() + spread - 2 * root) / spread)


def picture_scores(pocket: Pocket, reference: Reference, pictures: torch.Tensor, scenes: list) -> dict[str, float]:
    """What is measured of pictures drawn by captions; see the top of this file."""
    told = metrics.attribute_success(pocket.judge, pictures, scenes)
    mean = sum(told[name] for name in world.CAPTIONED) / len(world.CAPTIONED)
    return told | {"mean": mean, "distance": reference.distance(pocket.features(pictures))}


def training_set(count: int) -> tuple[torch.Tensor, list[str]]:
    """Drawn pictures and captions that are not among the held-out ones."""
    scenes = [world.sample_scene(np.random.default_rng([TRAINING_SEED, i])) for i in range(count)]
    return drawn(scenes)[0], [world.caption(scene) for scene in scenes]


def kept_as(folder: str, recipe: str) -> Path:
    """The file of an adapter of this recipe."""
    return Path(folder) / f"{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.safetensors"


def remembered(folder: str, recipe: str) -> tuple | None:
    """What an earlier run trained by the same recipe, as `trained` returns it."""
    if not folder or not kept_as(folder, recipe).exists():
        return None
    adapter = context_files.load_adapter(str(kept_as(folder, recipe)))
    return adapter, adapter.info.pop("report"), adapter.info.pop("processor seconds"), {}


def remember(folder: str, recipe: str, found: tuple) -> None:
    """Keep an adapter for the next run; one that belongs to a LoRA is trained again."""
    adapter, report, seconds, lora = found
    if folder and not lora:
        Path(folder).mkdir(parents=True, exist_ok=True)
        told = replace(adapter, info=adapter.info | {"report": report, "processor seconds": seconds})
        context_files.save_adapter(told, kept_as(folder, recipe))


def bench_pictures(pocket: Pocket, options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Every sampler at every guidance: numbers, pictures of the contact sheet, how the adapters were trained.

    path: where the numbers of each seed are kept, so that a run that was stopped goes on.
    """
    scenes = world.held_out_scenes(options.first + options.count)[options.first :]
    others = world.held_out_scenes(1000 + REFERENCE)[1000:]
    through = pocket.decode(pocket.latent(drawn(others)[0])["samples"])
    reference = Reference.of(pocket.features(through))
    floor = pocket.decode(pocket.latent(drawn(scenes)[0])["samples"])
    pictures, texts = training_set(options.training)
    samplers, recipes, how, models = {"plain DDIM": plain_ddim()}, {}, {}, {}
    wanted = {name: (VARIANTS[name], 1.0) for name in options.variants} | (SWEEP if options.sweep else {})
    known: dict[str, tuple | None] = {}
    for name, (changes, strength) in wanted.items():
        recipe = RECIPE | changes | ({"steps": options.training_steps} if options.training_steps else {})
        key = json.dumps(recipe, sort_keys=True)
        if key not in known:
            known[key] = remembered(options.adapters, key)
            if known[key] is None:
                known[key] = trained(pocket, pictures, texts, **recipe)
                remember(options.adapters, key, known[key])
        adapter, report, seconds, lora = known[key]
        label = f"context-aware, {name}"
        samplers[label] = context_aware(adapter, strength)
        if lora:
            models[label] = comfy.sd.load_lora_for_models(pocket.model, None, lora, 1.0, 0.0)[0]
        recipes[label] = {"pictures": options.training, "strength": strength, **recipe}
        how[label] = {"report": report, "processor seconds": seconds, **recipes[label]}
        print(f"{label}: {report}, {seconds:.0f} s of the processor", flush=True)
    rows, shown, kept = {}, {}, Kept(path)
    for guidance in options.guidance:
        for name, sampler in samplers.items():
            each, label = [], f"{name}, guidance {guidance:g}"
            for seed in range(options.seeds):
                drawing = {"guidance": guidance, "steps": options.steps, "seed": 1000 * seed}
                key = f"{label}; {drawing}; {options.count} from {options.first}; {recipes.get(name, '')}"
                if key not in kept.numbers:
                    found = draw(pocket, sampler, scenes, by_text, model=models.get(name), **drawing)
                    first = {} if seed else {key: found[:SHOWN]}
                    kept.add(key, picture_scores(pocket, reference, found, scenes), first)
                each.append(kept.numbers[key])
                if key in kept.pictures:
                    shown[f"{name}\nguidance {guidance:g}"] = kept.pictures[key]
            rows[label] = summarised(each, TRADED)
            print(f"{label}: {rows[label]}", flush=True)
    rows["drawn pictures through the autoencoder"] = summarised(
        [picture_scores(pocket, reference, floor, scenes)], TRADED
    )
    return {"rows": rows, "training": how, "shown": shown}


# --------------------------------------------------------------------------------------------------------------- clips


@dataclass(frozen=True)
class Job:
    """One edit of one clip."""

    kind: str
    source: world.Scene
    target: world.Scene
    pictures: torch.Tensor
    ideal: torch.Tensor
    masks: torch.Tensor
    target_masks: torch.Tensor


def jobs(options: argparse.Namespace) -> list[Job]:
    """Walk cycles of held-out scenes in which the animal stands, each with another colour, place and animal."""
    standing = [s for s in world.held_out_scenes(400)[options.first :] if s.pose == "standing"][: options.clips]
    found = []
    for i, source in enumerate(standing):
        pictures, masks = walks.clip(source)
        for kind in KINDS:
            target = world.edit(source, **{kind: another(source, kind, i)})
            ideal, target_masks = walks.clip(target)
            found.append(Job(kind, source, target, pictures, ideal, masks, target_masks))
    return found


@dataclass
class ClipEditor:
    """One edit of one clip by the methods, each of which adds to the one before."""

    pocket: Pocket
    job: Job
    known: dict[tuple, tuple[Any, float]]  # by clip and name: what its edits share, and the seconds that it took
    seconds: float = 0.0  # of the processor: what shared things cost an edit beyond what they took of its time

    def shared(self, name: str, make: Callable[[], Any]) -> Any:
        """What all edits of the clip share, made once; each of them pays its part of the time."""
        key = self.job.source, name
        if key not in self.known:
            began = time.process_time()
            made = make()
            self.known[key] = made, time.process_time() - began
            self.seconds -= self.known[key][1]
        self.seconds += self.known[key][1] / len(KINDS)
        return self.known[key][0]

    @cached_property
    def latent(self) -> dict:
        return self.pocket.latent(self.job.pictures)

    @cached_property
    def texts(self) -> tuple[str, str]:
        """Captions of the source and of the edit."""
        return world.caption(self.job.source), world.caption(self.job.target)

    @cached_property
    def across(self) -> Any:
        """The model with Video Attention."""
        return VideoAttention.execute(self.pocket.model, **defaults(VideoAttention)).args[0]

    def prompt(self, text: str) -> list:
        return self.pocket.encode([text])

    def inverted(self, name: str, model: Any, adapter: Any = None) -> tuple[Any, dict]:
        """(trajectory, noise) by Invert Picture, on the adapter's path where there is one."""
        chosen = {"steps": CLIP_STEPS, "reconstruction_guidance": 0.0, "context_adapter": adapter}
        given = model, self.latent, self.prompt(self.texts[0])
        return self.shared(f"inversion, {name}", lambda: Invert.execute(*given, **defaults(Invert) | chosen).args[:2])

    def sampled(self, model: Any, positive: list, noise: dict, sampler: Any = None) -> torch.Tensor:
        levels = self.pocket.levels(CLIP_STEPS)
        sampler = sampler or plain_ddim()
        return self.pocket.sample(sampler, positive, CLIP_GUIDANCE, levels, noise, model=model)["samples"]

    def fused(self, trajectory: Any, model: Any = None) -> tuple[Any, list]:
        """(model, edit's prompt) with Attention Fusion after Video Attention."""
        chosen = defaults(AttentionFusion) | {"source_text": self.texts[0], "edit_text": self.texts[1]}
        return AttentionFusion.execute(model or self.across, trajectory, self.pocket.clip, **chosen).args[:2]

    def per_frame(self) -> torch.Tensor:
        """Invert, and draw the new prompt; every frame by itself."""
        return self.sampled(self.pocket.model, self.prompt(self.texts[1]), self.inverted("plain", self.pocket.model)[1])

    def attention(self) -> torch.Tensor:
        """The same, frames looking at one another."""
        return self.sampled(self.across, self.prompt(self.texts[1]), self.inverted("across", self.across)[1])

    def fusion(self) -> torch.Tensor:
        """And the source's attention fused."""
        trajectory, noise = self.inverted("across", self.across)
        return self.sampled(*self.fused(trajectory), noise)

    def tune_a_video(self) -> torch.Tensor:
        """Queries tuned on the clip, frames that look at the first and the previous one; no fusion."""
        across = self.looking_at("first and previous")
        *_, lora = self.learned("queries", across, train_unet="LoRA on to_q", formula="released code")
        tuned = comfy.sd.load_lora_for_models(across, None, lora, 1.0, 0.0)[0]
        return self.sampled(tuned, self.prompt(self.texts[1]), self.inverted("tuned", tuned)[1])

    def fatezero(self) -> torch.Tensor:
        """Frames that look at the middle one, attention fused."""
        across = self.looking_at("middle", layers="all but the finest")
        trajectory, noise = self.inverted("middle", across)
        return self.sampled(*self.fused(trajectory, across), noise)

    def looking_at(self, frames: str, **settings: Any) -> Any:
        """The model with another Video Attention."""
        chosen = defaults(VideoAttention) | {"look_at": frames} | settings
        return VideoAttention.execute(self.pocket.model, **chosen).args[0]

    def learned(self, name: str, model: Any, **changes: Any) -> tuple:
        """What Train Context Adapter gives for this clip."""

        def learn() -> tuple:
            found = trained(self.pocket, self.job.pictures, [self.texts[0]], model, **ONE_SHOT | changes)
            print(f"{name} of {self.texts[0]!r}: {found[1]}", flush=True)
            return found

        return self.shared(name, learn)

    def context(self) -> torch.Tensor:
        """And the context adapter, on whose path the source is recorded and the edit drawn."""
        adapter, *_ = self.learned("adapter", self.across)
        trajectory, noise = self.inverted("adapter", self.across, adapter)
        return self.sampled(*self.fused(trajectory), noise, context_aware(adapter))

    def context_alone(self) -> torch.Tensor:
        """Per frame, with the context adapter."""
        model = self.pocket.model
        adapter, *_ = self.learned("adapter, per frame", model)
        noise = self.inverted("adapter, per frame", model, adapter)[1]
        return self.sampled(model, self.prompt(self.texts[1]), noise, context_aware(adapter))


CLIP_METHODS: dict[str, Callable[[ClipEditor], torch.Tensor]] = {
    "per frame": ClipEditor.per_frame,
    "Tune-A-Video style": ClipEditor.tune_a_video,
    "FateZero style": ClipEditor.fatezero,
    "+ Video Attention": ClipEditor.attention,
    "+ Attention Fusion": ClipEditor.fusion,
    "+ context adapter": ClipEditor.context,
    "per frame, context adapter alone": ClipEditor.context_alone,
}


def all_pairs(features: torch.Tensor) -> float:
    """Mean cosine similarity of all pairs of frames, features (F, C): the paper's CLIP-temp (section 4.2)."""
    unit = torch.nn.functional.normalize(features, dim=-1)
    first, second = torch.triu_indices(len(unit), len(unit), 1)
    return float((unit @ unit.T)[first, second].mean())


def clip_scores(pocket: Pocket, frames: torch.Tensor, job: Job) -> dict[str, float]:
    """What is measured of an edited clip; see the top of this file."""
    told = metrics.attribute_success(pocket.judge, frames, [job.target] * len(frames))
    features = pocket.features(frames)
    error = frames - job.ideal
    outside = 1 - torch.maximum(job.masks, job.target_masks)
    return {
        "edited": told[job.kind],
        "followed": sum(told[name] for name in world.CAPTIONED) / len(world.CAPTIONED),
        "pairs": all_pairs(features),
        "features": float(torch.cosine_similarity(features[1:], features[:-1]).mean()),
        "flicker": float((error[1:] - error[:-1]).abs().mean()),
        "ideal": float(metrics.psnr(frames, job.ideal).mean()),
        "background": float(metrics.psnr(frames, job.pictures, outside).mean()) if job.kind == "colour" else math.nan,
    }


def edited_clips(pocket: Pocket, job: Job, known: dict[tuple, tuple]) -> Iterator[tuple[str, torch.Tensor, float]]:
    """(name, frames, seconds of the processor) of every method on one edit, the ideal edit first."""
    yield "ideal edit through the autoencoder", pocket.decode(pocket.latent(job.ideal)["samples"]), math.nan
    for name, method in CLIP_METHODS.items():
        began = time.process_time()
        editor = ClipEditor(pocket, job, known)
        frames = pocket.decode(method(editor))
        yield name, frames, time.process_time() - began + editor.seconds


def bench_clips(pocket: Pocket, options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Every method on every clip: mean numbers for each kind of edit, and one clip's frames.

    path: where the numbers of each edit are kept, so that a run that was stopped goes on; the frames of the clip that
    was drawn first lie beside it.
    """
    kept = Kept(path)
    found: dict[str, dict[str, list[dict]]] = {kind: {} for kind in KINDS}
    made: dict[tuple, tuple] = {}
    for number, job in enumerate(jobs(options)):
        name, clip = f"{options.first}, {number}, {job.kind}", f"clip {options.first}, {number // len(KINDS)}"
        if name not in kept.numbers:
            numbers, shown = {}, {}
            for method, frames, seconds in edited_clips(pocket, job, made):
                numbers[method] = clip_scores(pocket, frames, job) | {"seconds": seconds}
                print(f"clip {number}, {job.kind}, {method}: {numbers[method]}", flush=True)
                if all(label.startswith(f"{clip}\n") for label in kept.pictures):
                    shown[f"{clip}\nsource, {job.kind}"] = job.pictures
                    shown[f"{clip}\n{method}\n{job.kind}"] = frames
            kept.add(name, numbers, shown)
        for method, numbers in kept.numbers[name].items():
            found[job.kind].setdefault(method, []).append(numbers)
    rows = {kind: {name: summarised(several, SPREAD) for name, several in of.items()} for kind, of in found.items()}
    # a file sorts them by name
    found_frames = {label.partition("\n")[2]: frames for label, frames in kept.pictures.items()}
    labels = (label for kind in KINDS for label in (f"source, {kind}", *(f"{name}\n{kind}" for name in rows[kind])))
    return {"rows": rows, "shown": {label: found_frames[label] for label in labels if label in found_frames}}


# ----------------------------------------------------------------------------------------------------------- reporting


def trade_off(rows: dict[str, dict[str, float]]) -> dict[str, list]:
    """(distance, pictures that are all right, guidance) of each sampler: the paper's figure 10."""
    lines: dict[str, list] = {}
    for name, row in rows.items():
        sampler, _, guidance = name.rpartition(", guidance ")
        if sampler:
            lines.setdefault(sampler, []).append((row["distance"], row["all"], guidance))
    return lines


def curves(lines: dict[str, list], title: str, width: int, height: int = 300) -> Image.Image:
    """A line of dots (x, y, label) for each name."""
    xs, ys = ([point[i] for points in lines.values() for point in points] for i in (0, 1))
    sheet, font = Image.new("RGB", (width, height), "white"), ImageFont.load_default(13)
    pen, left, right, top, bottom = ImageDraw.Draw(sheet), 60, width - 260, 30, height - 40
    (x0, x1), (y0, y1) = ((min(v), max(v) if max(v) > min(v) else min(v) + 1) for v in (xs, ys))
    pen.rectangle((left, top, right, bottom), outline=(205, 205, 205))
    pen.text((left, 8), title, "black", font)
    for y in (y0, y1):
        pen.text((4, bottom - (y - y0) / (y1 - y0) * (bottom - top) - 8), f"{y:.3f}", "black", font)
    for x in (x0, x1):
        pen.text((left + (x - x0) / (x1 - x0) * (right - left) - 12, bottom + 6), f"{x:.2f}", "black", font)
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        spots = [
            (left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top))
            for x, y, _ in points
        ]
        if len(spots) > 1:
            pen.line(spots, fill=colour, width=2)
        for (x, y), (*_, guidance) in zip(spots, points, strict=True):
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
            pen.text((x + 5, y - 14), guidance, fill=colour, font=font)
        pen.text((right + 12, top + 18 * number), name, fill=colour, font=font)
    return sheet


def contact_sheet(shown: dict[str, torch.Tensor], plots: dict[str, dict[str, list]], path: Path) -> None:
    """Curves by their titles, and a row of pictures for each entry."""
    left, size, font = 230, 96, ImageFont.load_default(13)
    width = left + SHOWN * size
    drawn_plots = [curves(lines, title, width) for title, lines in plots.items()]
    head = sum(plot.height for plot in drawn_plots)
    sheet = Image.new("RGB", (width, head + len(shown) * size), "white")
    for number, plot in enumerate(drawn_plots):
        sheet.paste(plot, (0, number * plot.height))
    pen = ImageDraw.Draw(sheet)
    for r, (name, pictures) in enumerate(shown.items()):
        pen.multiline_text((6, head + r * size + size // 2 - 16), name, fill="black", font=font)
        for c, image in enumerate((pictures[:SHOWN] * 255).round().byte().numpy()):
            small = Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS)
            sheet.paste(small, (left + c * size, head + r * size))
    sheet.save(path, quality=88)


def setting(options: argparse.Namespace, pocket: Pocket) -> dict[str, Any]:
    """What the numbers were measured on."""
    from comfyui_version import __version__ as comfyui

    return {
        **{name: value for name, value in vars(options).items() if name != "output"},
        "recipe": RECIPE, "one-shot recipe": ONE_SHOT, "clip steps": CLIP_STEPS, "clip guidance": CLIP_GUIDANCE,
        "device": str(pocket.model.load_device), "machine": platform.machine(), "cores": os.cpu_count(),
        "torch": torch.__version__, "ComfyUI": comfyui, "Python": platform.python_version(),
    }  # fmt: skip


def main() -> None:
    """Parse, run, print, write output/bench."""
    parser = argparse.ArgumentParser(prog="python dev.py bench contextdiff", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=["pictures", "clips"])
    parser.add_argument("--first", type=int, default=32, help="held-out scenes from here on")
    parser.add_argument("--count", type=int, default=64, help="captions that are drawn")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.5, 3.0, 5.0, 9.0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=1, help="every caption is drawn from so many noises")
    parser.add_argument("--training", type=int, default=96, help="pictures that are trained on")
    parser.add_argument("--training-steps", type=int, help="instead of the recipe's")
    parser.add_argument("--adapters", default="", metavar="FOLDER", help="keep trained adapters, and use those kept")
    parser.add_argument("--variants", choices=VARIANTS, nargs="*", default=list(VARIANTS))
    parser.add_argument("--sweep", action="store_true", help="more adapters and strengths")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--full-width", action="store_true", help="the checkpoint's own U-Net, four times slower")
    options, output = pocket_host.parse(parser, threads=1)
    with torch.inference_mode():
        pocket = Pocket(not options.full_width)
        numbers, text, shown, plots = setting(options, pocket), [], {}, {}
        if "pictures" in options.parts:
            found = bench_pictures(pocket, options, output / "context_pictures_each.json")
            shown |= found.pop("shown")
            numbers["pictures"] = found
            plots["pictures with all attributes right, over the distance to drawn ones"] = trade_off(found["rows"])
            text += ["### pictures", "", table(PICTURE_COLUMNS, found["rows"], lambda c: DIGITS.get(c, 3)), ""]
        if "clips" in options.parts:
            found = bench_clips(pocket, options, output / "context_clips_each.json")
            shown |= found.pop("shown")
            numbers["clips"] = found["rows"]
            for kind, rows in found["rows"].items():
                text += [f"### clips, {kind}", "", table(CLIP_COLUMNS, rows, lambda c: DIGITS.get(c, 3)), ""]
        if "kinds" in options.parts:
            found = bench_kinds(pocket, options, output / "context_kinds_each.json")
            shown |= found.pop("shown")
            numbers["kinds"] = found
            text += ["### kinds", "", table(KIND_COLUMNS, found["rows"], lambda c: DIGITS.get(c, 3)), ""]
        if "convergence" in options.parts:
            found = bench_convergence(pocket, options, output / "context_convergence_each.json")
            shown |= found.pop("shown")
            numbers["convergence"] = found["rows"]
            plots["PSNR to the ideal edit in dB, over the steps of tuning"] = course(found["rows"])
            text += ["### convergence", "", table(COURSE_COLUMNS, found["rows"], lambda c: DIGITS.get(c, 3)), ""]
        print("\n" + "\n".join(text))
        (output / "context.md").write_text("\n".join(text), encoding="utf-8")
        (output / "context.json").write_text(json.dumps(without_nan(numbers), indent=2) + "\n", encoding="utf-8")
        contact_sheet(shown, plots, output / "context.jpg")
