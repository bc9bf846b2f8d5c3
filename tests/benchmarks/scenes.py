"""Held-out drawn scenes, inverted by the pack's own node, their edits, and what is measured of edited pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import pocket_host
from palimpsest.nodes.inversion.nodes import Invert
from palimpsest.nodes.kv import nodes as kv_nodes
from PIL import Image, ImageDraw, ImageFont
from pocket import judge as judging
from pocket import metrics, settings, world

import nodes as host_nodes

KINDS = ("pose", "colour", "place", "species")
VISIBLE = 100  # least distance of coat and second colour in RGB, so that an edit of the coat hides no pattern


@dataclass(frozen=True)
class Edit:
    """One kind of edit of all scenes: the scenes it should lead to, drawn, and their captions as CONDITIONING."""

    kind: str
    targets: list[world.Scene]
    pictures: torch.Tensor
    masks: torch.Tensor
    prompt: list


class Scenes:
    """Held-out scenes, inverted once; a batch in every call."""

    family = "unet"

    def __init__(self, first: int, count: int, steps: int, narrow: bool):
        self.steps = steps
        self.sources = world.held_out_scenes(first + count)[first:]
        self.pictures, self.masks = drawn(self.sources)
        self.model, self.clip, self.vae = self.load(narrow)
        self.judge = judging.load()
        self.was, self.nothing = self.encode(self.sources), self.encode([None] * count)
        self.latent = {"samples": self.vae.encode(self.pictures)}
        self.invert()

    def load(self, narrow: bool) -> tuple[Any, Any, Any]:
        """(model, clip, vae) that draw."""
        return pocket_host.load_pocket(narrow)

    def invert(self) -> None:
        """Inversion with the sources' captions at guidance 1: `trajectory`, `noise` and what samples from it."""
        self.trajectory, self.noise, self.found = self.inverted(self.latent, self.was)

    def inverted(self, latent: dict, prompt: list, **settings: Any) -> tuple[Any, dict, Any]:
        """(trajectory, noise, the same as NOISE) of a latent by Invert Picture; DDIM here."""
        chosen = defaults(Invert) | {"steps": self.steps, "reconstruction_guidance": 0.0} | settings
        trajectory, noise, _, _, found = Invert.execute(self.model, latent, prompt, **chosen).args
        return trajectory, noise, found

    def edit(self, kind: str) -> Edit:
        """Every scene with another value of the attribute `kind`, in turn."""
        targets = [world.edit(scene, **{kind: another(scene, kind, i)}) for i, scene in enumerate(self.sources)]
        return Edit(kind, targets, *drawn(targets), self.encode(targets))

    def encode(self, scenes: list) -> list:
        """Captions as one CONDITIONING of the batch, the scenes beside it; None is the empty prompt."""
        texts = ["" if scene is None else world.caption(scene) for scene in scenes]
        ((tensor, extra),) = self.encode_texts(texts)
        return [[tensor, extra | {"scenes": scenes}]]

    def encode_texts(self, texts: list[str]) -> list:
        """Texts as one CONDITIONING of the batch, "token_ids" beside it."""
        tokens = [self.clip.tokenize(text) for text in texts]
        ids = [[int(token) for token, *_ in next(iter(found.values()))[0]] for found in tokens]
        return [[torch.cat([self.clip.encode_from_tokens(found) for found in tokens]), {"token_ids": ids}]]

    def tune(self, **settings) -> tuple:
        """(kv, reconstructed pictures, seconds) at the node's defaults except `settings`."""
        chosen = defaults(kv_nodes.TuneKV) | settings
        began = time.monotonic()
        kv, latent, _ = kv_nodes.TuneKV.execute(
            self.model, self.trajectory, self.was, negative=self.nothing, **chosen
        ).args
        return kv, self.decode(latent["samples"]), time.monotonic() - began

    def with_kv(self, kv, **settings):
        """The model with tuned keys and values, at the node's defaults except `settings`."""
        return kv_nodes.ApplyKV.execute(self.model, kv, **defaults(kv_nodes.ApplyKV) | settings).args[0]

    def sample(self, model, prompt: list, guidance: float, negative: list | None = None) -> torch.Tensor:
        """A latent from the inverted noise."""
        return self.sampled(model, prompt, negative or self.nothing, guidance, self.noise, self.found)

    def sampled(
        self, model, positive: list, negative: list, guidance: float, latent: dict, found: Any = None,
        seed: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """A latent by the host's KSampler Advanced: from `latent`, which is inverted noise, or with a seed's noise."""
        return host_nodes.KSamplerAdvanced().sample(
            model, "disable" if seed is None else "enable", seed or 0, self.steps, guidance, "euler", "normal",
            positive, negative, latent, 0, 10000, "disable",
        )[0]["samples"]  # fmt: skip

    def draw(self, model, prompt: list, guidance: float) -> torch.Tensor:
        """Pictures from the inverted noise."""
        return self.decode(self.sample(model, prompt, guidance))

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Latents to pictures (B, H, W, 3) in 0..1."""
        return torch.cat([self.vae.decode(latent[i : i + 1]) for i in range(len(latent))]).clamp(0, 1)

    def reconstruction(self, pictures: torch.Tensor) -> float:
        """Mean PSNR in dB against the drawn sources."""
        return metrics.psnr(pictures, self.pictures).mean().item()

    def scores(self, pictures: torch.Tensor, edit: Edit) -> dict[str, float]:
        """Everything measured of edited pictures, means over the scenes; nan where it has no meaning.

        followed: share of what the captions tell that the judge reads off the picture; `attribute`: of the one edited.
        identity and its parts: metrics.identity. texture: texture_similarity. background: outside of source's and
        ideal's animal, against the source; it has no meaning where the place is edited. inside: PSNR to the ideal
        within the ideal's animal. ideal: PSNR to the ideal picture.
        """
        told = metrics.attribute_success(self.judge, pictures, edit.targets)
        same = metrics.identity(self.judge, pictures, edit.targets)
        background = 1 - torch.maximum(self.masks, edit.masks)
        stays = torch.nan if edit.kind == "place" else 1.0
        return {
            "followed": sum(told[name] for name in world.CAPTIONED) / len(world.CAPTIONED),
            "attribute": told[edit.kind],
            "pose": told["pose"],
            "identity": mean(same["score"]),
            **{name: mean(same[name]) for name in ("facing", "pattern", "second", "collar")},
            "texture": mean(texture_similarity(self.judge, pictures, edit.pictures, edit.masks)),
            "background": mean(metrics.psnr(pictures, self.pictures, background).clamp(max=60)) * stays,
            "background ssim": mean(metrics.ssim(pictures, self.pictures, background)) * stays,
            "inside": mean(metrics.psnr(pictures, edit.pictures, edit.masks)),
            "ideal": mean(metrics.psnr(pictures, edit.pictures)),
        }


def another(scene: world.Scene, kind: str, shift: int) -> object:
    """A value of the attribute that the scene does not have; scenes in a row get different ones.

    A new coat colour is one on which the animal's second colour still shows.
    """
    values = world.ATTRIBUTES[kind]
    values = [values[(values.index(getattr(scene, kind)) + i) % len(values)] for i in range(1, len(values))]
    if kind == "colour":
        second = world.SECOND_RGB[scene.second]
        values = [value for value in values if math.dist(world.COAT_RGB[value], second) > VISIBLE]
    return values[shift % len(values)]


def mean(values: torch.Tensor) -> float:
    """Mean over the pictures that have a value."""
    return values.nanmean().item()


def summarised(several: list[dict[str, float]], spread: Sequence[str]) -> dict[str, float]:
    """Means of rows of numbers, and the deviation of some of them as "NAME +-"."""
    numbers = {key: sum(one[key] for one in several) / len(several) for key in several[0]}
    return numbers | {f"{key} +-": float(np.std([one[key] for one in several])) for key in spread}


def drawn(scenes: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (B, H, W, 3) in 0..1 and animal masks (B, H, W)."""
    pictures, masks = zip(*(world.render(scene, with_mask=True) for scene in scenes), strict=True)
    return torch.from_numpy(np.stack(pictures)).float() / 255, torch.from_numpy(np.stack(masks)).float()


def defaults(node) -> dict:
    """A node's widget values for the pocket model."""
    return settings.widgets(node)


def texture_similarity(judge, pictures, ideals, ideal_masks, size: int = 7, directions: int = 48) -> torch.Tensor:
    """How alike the local structure of two animals is, wherever it lies; (B,) in 0..1.

    Patches of size x size pixels in Lab that lie within the animal (its outline would outweigh its coat), less the
    animal's mean colour (that is the palette's business), projected on fixed random directions u. With W1 the distance
    of the projections' distributions,

        1 - mean_u W1(a_u, b_u) / mean_u (E|a_u| + E|b_u|)

    is 1 for equal distributions and, by the triangle inequality over a flat animal, never below 0. The edited
    pictures' masks are the judge's, as in metrics.identity. An animal without such a patch scores 0.

    On 32 held-out pose edits drawn and taken through the autoencoder: the ideal 0.91, displaced 0.91, another pattern
    0.85, a stranger with the same caption 0.80, no pattern 0.70; AUC of ideals against these three 0.88, 0.93, 0.99.
    """
    probes = torch.randn(directions, 3 * size * size, generator=torch.Generator().manual_seed(0))
    masks = metrics.to_mask(judging.ask(judge, pictures)["mask"], pictures), metrics.to_mask(ideal_masks, ideals)
    scores = []
    for a, b, mask_a, mask_b in zip(pictures, ideals, *masks, strict=True):
        found = [projected_patches(*pair, probes, size) for pair in ((a, mask_a), (b, mask_b))]
        if not all(len(patches) for patches in found):
            scores.append(torch.tensor(0.0))
            continue
        a_u, b_u = (torch.quantile(patches, torch.linspace(0.005, 0.995, 100), dim=0) for patches in found)
        scores.append(1 - (a_u - b_u).abs().mean() / (a_u.abs().mean() + b_u.abs().mean()))
    return torch.stack(scores)


def projected_patches(picture, mask, probes: torch.Tensor, size: int) -> torch.Tensor:
    """One picture (H, W, 3) with its mask (H, W) -> projections (N, directions) of the patches within the mask."""
    mask, picture = mask > 0.5, metrics.lab(picture)
    picture = picture - picture[mask].mean(0)
    within = mask.unfold(0, size, 1).unfold(1, size, 1).all(-1).all(-1)
    return picture.unfold(0, size, 1).unfold(1, size, 1)[within].flatten(1) @ probes.T  # (H', W', 3, size, size)


def contact_sheet(rows: dict[str, torch.Tensor], path: Path) -> None:
    """One row of pictures per entry, labelled."""
    font, left = ImageFont.load_default(14), 230
    size = next(iter(rows.values())).shape[1]
    count = len(next(iter(rows.values())))
    sheet = Image.new("RGB", (left + count * size, len(rows) * size), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (name, pictures) in enumerate(rows.items()):
        draw.text((6, r * size + size // 2 - 8), name, fill="black", font=font)
        for c, image in enumerate((pictures * 255).round().byte().numpy()):
            sheet.paste(Image.fromarray(image), (left + c * size, r * size))
    sheet.save(path)
