"""Words that act in one region: the nodes for regions beside the host's own ways, on held-out drawn scenes.

    python dev.py bench cross_attention                                      tables, JSON and contact sheet
    python dev.py bench cross_attention --scenes 4 --methods prompt both     some of it
    python dev.py bench cross_attention --family flux                        on the pocket transformer

Edits by words and a mask. colour: the coat gets another colour, the mask is white on the animal, the words are the new
colour. place: the scene gets another place, the mask is white on all but the animal, the words are the new place. two
(only where it is asked for): both at once, each with its words and its mask.
Every picture is sampled by itself from its inverted noise (its caption, guidance 1), with the same sampler, steps and
guidance; only the host's inpainting starts from random noise, as it is used. The nodes run at their defaults.
--family flux: the same on the pocket transformer, inverted by Uni-Inv, with a phrase for each region among the ways.
Phrases say the edited thing by itself ("a blue cat"), the prompt beside them leaves it out ("a cat sitting ...").

outside: where the mask is all black, against the source; the autoencoder alone sets the bound in the last row but one.
inside: PSNR to the ideal edit where the mask is white. identity: metrics.identity, the animal's looks that no caption
tells. leakage: share of the chosen words' attention outside the mask, all layers and steps, as Attention Map records
it. Seconds are the processor's and include the recording. Passes are rows through the U-Net, those for features of the
original included, the inversion (one a step) left out. The second table shows the same pictures after Keep Outside, at
its defaults except a feather of 2 pixels, which is to these pictures what 8 is to one of 512.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks import pocket_host
from benchmarks.flow_scenes import FlowScenes
from benchmarks.scenes import Edit, Scenes, another, contact_sheet, defaults, drawn, mean
from comfy.patcher_extension import WrappersMP
from palimpsest.nodes.attention_map.nodes import AttentionMap, ReadAttentionMap
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask, RegionPhrase
from palimpsest.nodes.feature_blend.nodes import FeatureBlend
from palimpsest.nodes.keep_outside.nodes import KeepOutside
from palimpsest.nodes.words.nodes import SelectWords
from pocket import metrics, world
from rivals.benchmark import PassCount, setting, table, without_nan

import nodes as host_nodes

KINDS, TWO = ("colour", "place"), "two"
BEFORE = {
    "attribute": "edited", "followed": "prompt followed", "identity": "identity", "outside": "outside dB",
    "outside ssim": "outside SSIM", "inside": "inside dB", "ideal": "PSNR to ideal", "leakage": "leakage",
    "seconds": "s", "passes": "passes",
}  # fmt: skip
AFTER = {
    "attribute": "edited", "followed": "prompt followed", "identity": "identity", "inside": "inside dB",
    "ideal": "PSNR to ideal", "difference": "largest difference outside", "seconds": "s",
}  # fmt: skip
DIGITS = {"outside": 1, "inside": 1, "ideal": 1, "seconds": 2, "passes": 0, "outside ssim": 3, "leakage": 3}
SHOWN = 5  # scenes of each kind on the contact sheet
FEATHER = 2
FINISHED = "both"  # the method whose finished pictures are on the sheet
IDEAL, UNEDITED = "ideal edit through the autoencoder", "source, not edited"


@dataclass(frozen=True)
class Region:
    """Words for one part of a picture: mask (1, H, W), white there; the words within the whole prompt, as phrase too.

    prompt: the new caption as far as this part is concerned.
    """

    mask: torch.Tensor
    words: Any
    phrase: str
    prompt: list


@dataclass(frozen=True)
class Case:
    """One edit of one scene, ready for a sampler: its regions, and their masks together as `mask`.

    without: the new caption, less what the regions' phrases say.
    """

    scenes: Scenes
    guidance: float
    trajectory: Any
    noise: dict
    found: Any
    latent: dict
    mask: torch.Tensor
    regions: list[Region]
    was: list
    now: list
    without: list
    preset: str

    def sample(self, model: Any, positive: list, latent: dict | None = None, seed: int | None = None) -> dict:
        """A LATENT from the inverted noise, or with a seed from `latent` and random noise."""
        scenes, nothing = self.scenes, self.scenes.empty
        samples = scenes.sampled(model, positive, nothing, self.guidance, latent or self.noise, self.found, seed)
        return {"samples": samples}


# --------------------------------------------------------------------------------------------------------- the methods


def prompt_only(case: Case, model: Any) -> dict:
    """The new prompt from the same noise."""
    return case.sample(model, case.now)


def conditioning_mask(case: Case, model: Any) -> dict:
    """The host's Conditioning (Set Mask): the new prompt inside, the old one outside."""
    limit, combine = host_nodes.ConditioningSetMask().append, host_nodes.ConditioningCombine().combine
    parts = [limit(region.prompt, region.mask, "default", 1.0)[0] for region in case.regions]
    if not (case.mask == 1).all():
        parts.append(limit(case.was, 1 - case.mask, "default", 1.0)[0])
    return case.sample(model, functools.reduce(lambda all_, part: combine(all_, part)[0], parts))


def noise_mask(case: Case, model: Any) -> dict:
    """The host's Set Latent Noise Mask: inpainting from random noise."""
    masked = host_nodes.SetLatentNoiseMask().set_mask(case.latent, case.mask)[0]
    return case.sample(model, case.now, masked, seed=1)


def attention_mask(case: Case, model: Any, **changes: Any) -> dict:
    """Cross-Attention Mask on the chosen words."""
    return case.sample(masked(case, model, **changes), case.now)


def phrases(case: Case, model: Any, **changes: Any) -> dict:
    """Phrase in Region for every region."""
    return case.sample(*phrased(case, model, **changes))


def feature_blend(case: Case, model: Any, preset: str | None = None) -> dict:
    """Feature Blend; the preset "PFB-Diff" is the authors' for this kind of edit."""
    return case.sample(blended(case, model, preset), case.now)


def both(case: Case, model: Any) -> dict:
    """Feature Blend, whose recording samples the source's prompt without the words, then Cross-Attention Mask."""
    return case.sample(masked(case, blended(case, model)), case.now)


def masked(case: Case, model: Any, **changes: Any) -> Any:
    """The model in which the chosen words act inside their masks only."""
    chosen = defaults(CrossAttentionMask) | changes
    for region in case.regions:
        model = CrossAttentionMask.execute(model, region.mask, tokens=region.words, **chosen).args[0]
    return model


def phrased(case: Case, model: Any, **changes: Any) -> tuple[Any, list]:
    """(model, prompt) in which every region has its phrase."""
    chosen, prompt = defaults(RegionPhrase) | changes, case.without
    for region in case.regions:
        said = chosen | {"phrase": region.phrase}
        model, prompt = RegionPhrase.execute(model, case.scenes.clip, prompt, region.mask, **said).args
    return model, prompt


def blended(case: Case, model: Any, preset: str | None = None) -> Any:
    """The model that blends the original's features outside the mask."""
    chosen = defaults(FeatureBlend) | ({"preset": case.preset if preset == "PFB-Diff" else preset} if preset else {})
    return FeatureBlend.execute(model, case.trajectory, case.was, mask=case.mask, **chosen).args[0]


def phrases_blended(case: Case, model: Any) -> dict:
    """Feature Blend, then Phrase in Region."""
    return case.sample(*phrased(case, blended(case, model)))


METHODS: dict[str, tuple[str, Callable[[Case, Any], dict]]] = {
    "prompt": ("prompt only", prompt_only),
    "set-mask": ("host: Conditioning (Set Mask)", conditioning_mask),
    "inpaint": ("host: Set Latent Noise Mask", noise_mask),
    "words": ("Cross-Attention Mask", attention_mask),
    "words-renormalised": (
        "Cross-Attention Mask, renormalised",
        partial(attention_mask, mode="after softmax, renormalised"),
    ),
    "blend": ("Feature Blend", feature_blend),
    "blend-pfb": ("Feature Blend, PFB-Diff", partial(feature_blend, preset="PFB-Diff")),
    "blend-paper": ("Feature Blend, paper", partial(feature_blend, preset="paper")),
    "both": ("Cross-Attention Mask + Feature Blend", both),
}
FLUX = {
    "prompt": METHODS["prompt"],
    "set-mask": METHODS["set-mask"],
    "inpaint": METHODS["inpaint"],
    "words": METHODS["words"],
    "words-hidden": ("Cross-Attention Mask, hidden from text", partial(attention_mask, hide_from_text=True)),
    "phrase": ("Phrase in Region", phrases),
    "phrase-alone": ("Phrase in Region, prompt_inside 0", partial(phrases, prompt_inside=0.0)),
    "blend": METHODS["blend"],
    "both": METHODS["both"],
    "phrase-blend": ("Phrase in Region + Feature Blend", phrases_blended),
}
FAMILIES = {"unet": METHODS, "flux": FLUX}
NAMES = {"unet": "regions", "flux": "regions_flux"}  # of what is written


# ----------------------------------------------------------------------------------------------------------- measuring


def edit_of(scenes: Scenes, kind: str) -> Edit:
    """Every scene with another colour, another place, or both."""
    if kind != TWO:
        return scenes.edit(kind)
    targets = [
        world.edit(scene, **{each: another(scene, each, i) for each in KINDS}) for i, scene in enumerate(scenes.sources)
    ]
    return Edit(kind, targets, *drawn(targets), scenes.encode(targets))


def cases(scenes: Scenes, edit: Edit, guidance: float) -> list[Case]:
    """Every scene's edit by itself: words are found in the prompt of one picture, not in a batch of prompts."""
    found, kinds = [], KINDS if edit.kind == TWO else [edit.kind]
    for i, (source, target) in enumerate(zip(scenes.sources, edit.targets, strict=True)):
        caption, regions = world.caption(target), []
        without = caption
        for kind in kinds:
            words = target.colour if kind == "colour" else world.PLACE_PHRASES[target.place]
            chosen, now, _ = SelectWords.execute(scenes.clip, caption, words).args
            phrase = f"a {words} {target.species}" if kind == "colour" else f"a {target.species} {words}"
            only = now if edit.kind == kind else scenes.encode([world.edit(source, **{kind: getattr(target, kind)})])
            regions.append(Region(region(scenes, kind)[i : i + 1], chosen, phrase, only))
            without = without.replace(f" {words}", "", 1)
        was, latent = scenes.encode([source]), {"samples": scenes.latent["samples"][i : i + 1]}
        inverted, mask = scenes.inverted(latent, was), region(scenes, edit.kind)[i : i + 1]
        preset = "PFB-Diff background" if edit.kind == "place" else "PFB-Diff object"
        prompts = was, now, scenes.encode_texts([without])
        found.append(Case(scenes, guidance, *inverted, latent, mask, regions, *prompts, preset))
    return found


def region(scenes: Scenes, kind: str) -> torch.Tensor:
    """Where an edit of this kind is wanted, (B, H, W): the animal, all but the animal, or everywhere."""
    return {"colour": scenes.masks, "place": 1 - scenes.masks, TWO: torch.ones_like(scenes.masks)}[kind]


def draw(case: Case, key: str, method: Callable, model: Any) -> tuple[torch.Tensor, float]:
    """A method's latent, and the leakage of the first region's words as Attention Map records it.

    The leakage is nan where the words are not sampled as they were chosen, within the whole prompt.
    """
    first = case.regions[0]
    if key.startswith("phrase") or (key == "set-mask" and len(case.regions) > 1):
        return method(case, model)["samples"], torch.nan
    watched, record = AttentionMap.execute(model, first.words, **defaults(AttentionMap)).args
    latent = method(case, watched)
    reading = defaults(ReadAttentionMap) | {"start_percent": 0.0, "label": False}
    leakage = ReadAttentionMap.execute(record, samples=latent, mask=first.mask, **reading).args[3]
    return latent["samples"], leakage


def measure(
    scenes: Scenes, count: PassCount, key: str, method: Callable, edit: Edit, ready: list[Case]
) -> tuple[dict, dict]:
    """One method over all scenes of an edit: (numbers before and after the finisher, pictures before and after)."""
    seconds = clock(scenes)
    rows, began = count.rows, seconds()
    latents, leakage = zip(*(draw(case, key, method, scenes.model) for case in ready), strict=True)
    costs = {
        "seconds": (seconds() - began) / len(ready),
        "passes": (count.rows - rows) / len(ready),
        "leakage": sum(leakage) / len(leakage),
    }
    pictures = scenes.decode(torch.cat(latents))
    numbers = {"before": scores(scenes, pictures, edit) | costs}
    finished, numbers["after"] = finish(scenes, pictures, edit)
    return numbers, {"before": pictures, "after": finished}


def clock(scenes: Scenes) -> Callable[[], float]:
    """Processor seconds of this process, which other programs do not lengthen; on an accelerator the wall's."""
    return time.process_time if scenes.model.load_device.type == "cpu" else time.monotonic


def finish(scenes: Scenes, pictures: torch.Tensor, edit: Edit) -> tuple[torch.Tensor, dict[str, float]]:
    """The pictures after Keep Outside, and their numbers. Raises RuntimeError if anything moved outside."""
    seconds = clock(scenes)
    began = seconds()
    finished, weights, _, difference = KeepOutside.execute(
        scenes.pictures, pictures, region(scenes, edit.kind), **defaults(KeepOutside) | {"feather": FEATHER}
    ).args
    spent = (seconds() - began) / len(pictures)
    if not torch.equal(finished[weights == 0], scenes.pictures[weights == 0]):
        raise RuntimeError("Keep Outside let a pixel outside the mask move")
    return finished, scores(scenes, finished, edit) | {"difference": difference, "seconds": spent}


def scores(scenes: Scenes, pictures: torch.Tensor, edit: Edit) -> dict[str, float]:
    """What is measured of pictures, means over the scenes; see the top of this file."""
    told = metrics.attribute_success(scenes.judge, pictures, edit.targets)
    wanted = region(scenes, edit.kind)
    return {
        "attribute": mean(torch.tensor([told[kind] for kind in (KINDS if edit.kind == TWO else [edit.kind])])),
        "followed": sum(told[name] for name in world.CAPTIONED) / len(world.CAPTIONED),
        "identity": mean(metrics.identity(scenes.judge, pictures, edit.targets)["score"]),
        "outside": mean(metrics.psnr(pictures, scenes.pictures, (wanted == 0).float()).clamp(max=99)),
        "outside ssim": mean(metrics.ssim(pictures, scenes.pictures, 1 - wanted)),
        "inside": mean(metrics.psnr(pictures, edit.pictures, wanted)),
        "ideal": mean(metrics.psnr(pictures, edit.pictures)),
    }


# ----------------------------------------------------------------------------------------------------------- reporting


def tables(found: dict[str, dict], kinds: list[str]) -> str:
    """Two markdown tables for each kind of edit."""
    text = []
    for kind in kinds:
        for title, part, columns in (("", "before", BEFORE), (", after Keep Outside", "after", AFTER)):
            rows = {name: entry[kind][part] for name, entry in found.items() if part in entry[kind]}
            rows = {name: dict.fromkeys(columns, math.nan) | row for name, row in rows.items()}
            text += [f"### {kind}{title}", "", table(columns, rows, lambda column: DIGITS.get(column, 2)), ""]
    return "\n".join(text)


def sheet_rows(scenes: Scenes, edits: list[Edit], drawn: dict[str, dict[str, dict]]) -> dict[str, torch.Tensor]:
    """Rows of the contact sheet: the first scenes of every kind side by side."""
    rows = {"source": {edit.kind: scenes.pictures for edit in edits}}
    rows |= {"ideal edit": {edit.kind: edit.pictures for edit in edits}}
    rows |= {name: {kind: shown["before"] for kind, shown in by_kind.items()} for name, by_kind in drawn.items()}
    last = drawn.get(METHODS[FINISHED][0])
    rows |= {"both + Keep Outside": {kind: shown["after"] for kind, shown in last.items()}} if last else {}
    return {name: torch.cat([pictures[edit.kind][:SHOWN] for edit in edits]) for name, pictures in rows.items()}


def compare(scenes: Scenes, count: PassCount, methods: dict, kinds: list[str], guidance: float, output: Path) -> dict:
    """Measure every method on every kind of edit, print and save the tables and the sheet; returns the numbers.

    output: of the files, without their endings.
    """
    edits = [edit_of(scenes, kind) for kind in kinds]
    ready = {edit.kind: cases(scenes, edit, guidance) for edit in edits}
    ready[kinds[0]][0].sample(scenes.model, ready[kinds[0]][0].now)  # loads the model, so that no method pays for it
    found: dict[str, dict] = {name: {} for name, _ in methods.values()}
    drawn: dict[str, dict] = {name: {} for name, _ in methods.values()}
    for key, (name, method) in methods.items():
        for edit in edits:
            found[name][edit.kind], drawn[name][edit.kind] = measure(scenes, count, key, method, edit, ready[edit.kind])
            print(f"{name}, {edit.kind}: {found[name][edit.kind]}", flush=True)
    for edit in edits:
        through = {IDEAL: scenes.decode(scenes.vae.encode(edit.pictures))}
        through[UNEDITED] = scenes.decode(scenes.latent["samples"])
        for name, pictures in through.items():
            after = finish(scenes, pictures, edit)[1]
            found.setdefault(name, {})[edit.kind] = {"before": scores(scenes, pictures, edit), "after": after}
    text = tables(found, kinds)
    print("\n" + text)
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    contact_sheet(sheet_rows(scenes, edits, drawn), output.with_suffix(".jpg"))
    return {"rows": found}


def main() -> None:
    """Parse, run, print, write output/bench."""
    parser = argparse.ArgumentParser(prog="python dev.py bench cross_attention", description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=32, help="no default was chosen on scenes from here on")
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--edits", choices=(*KINDS, TWO), nargs="+", default=list(KINDS))
    parser.add_argument("--family", choices=FAMILIES, default="unet")
    parser.add_argument("--methods", choices=sorted({*METHODS, *FLUX}), nargs="+", help="default: all of the family")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--full-width", action="store_true", help="the checkpoint's own U-Net, four times slower")
    options, output = pocket_host.parse(parser)
    known, written = FAMILIES[options.family], output / NAMES[options.family]
    methods = {key: known[key] for key in known if key in (options.methods or known)}
    with torch.inference_mode():
        kind_of = FlowScenes if options.family == "flux" else Scenes
        scenes = kind_of(options.first, options.scenes, options.steps, not options.full_width)
        scenes.empty = scenes.encode([None])
        count = PassCount()
        scenes.model = scenes.model.clone()
        scenes.model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "benchmark_regions", count)
        kinds = [kind for kind in (*KINDS, TWO) if kind in options.edits]
        numbers = setting(options, scenes) | compare(scenes, count, methods, kinds, options.guidance, written)
        text = json.dumps(without_nan(numbers), indent=2) + "\n"
        written.with_suffix(".json").write_text(text, encoding="utf-8")
