"""KV Inversion on held-out drawn scenes: how exact the reconstruction is, and what each way of editing keeps.

    python dev.py bench kv                                  the table, JSON and contact sheet of the README
    python dev.py bench kv --sweep start_percent            one setting over its range: a table and a plot

Every scene is inverted once and tuned once; each edit then samples from the same noise with the edit's caption. The
ideal edit is known, so edits are scored by the pocket judge and the identity measure (tests/pocket/README.md).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import pocket_host
import torch

pocket_host.import_host()
from palimpsest.nodes import kv_inversion as kv_nodes  # noqa: E402
from palimpsest.nodes.inversion import Invert  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from pocket import judge as judging  # noqa: E402
from pocket import metrics, world  # noqa: E402

import nodes as host_nodes  # noqa: E402 (the host is importable from here on)

NUMBERS = {
    "followed": "prompt followed", "pose": "pose", "identity": "identity", "facing": "facing", "pattern": "pattern",
    "second": "2nd colour", "collar": "collar", "background": "background dB", "ideal": "PSNR to ideal",
}  # fmt: skip
SWEEPS = {
    "start_percent": (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8),
    "look_ahead": (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0),
    "source_guidance": (1.0, 2.0, 3.0, 4.0, 6.0, 8.0),
    "strength": (0.25, 0.5, 0.75, 1.0),
    "guidance": (1.0, 2.0, 3.0, 4.0, 5.0, 7.5),
    "inner_steps": (0, 2, 5, 10, 20),
    "learning_rate": (0.01, 0.03, 0.1, 0.3),
    "placement": ("decoder", "encoder", "middle", "all"),
}
TUNING = ("guidance", "inner_steps", "learning_rate", "placement")


class Scenes:
    """Held-out scenes, each with one pose edit, inverted once; a batch in every call."""

    def __init__(self, first: int, count: int, steps: int, narrow: bool):
        self.steps = steps
        self.sources = world.held_out_scenes(first + count)[first:]
        poses = world.ATTRIBUTES["pose"]
        shifted = [poses[(poses.index(s.pose) + 1 + i % 4) % len(poses)] for i, s in enumerate(self.sources)]
        self.targets = [world.edit(s, pose=p) for s, p in zip(self.sources, shifted, strict=True)]
        self.pictures, self.masks = drawn(self.sources)
        self.ideals, self.ideal_masks = drawn(self.targets)
        self.model, self.clip, self.vae = pocket_host.load_pocket(narrow)
        self.judge = judging.load()
        self.was, self.becomes = self.encode(self.sources), self.encode(self.targets)
        self.nothing = self.encode([None] * count)
        self.latent = {"samples": self.vae.encode(self.pictures)}
        self.trajectory, self.noise, *_ = Invert.execute(
            self.model, self.latent, self.was, steps, 1.0, "normal", "next noise level", 0.0
        ).args

    def encode(self, scenes: list) -> list:
        """Captions as one CONDITIONING of the batch; None is the empty prompt."""
        texts = ["" if scene is None else world.caption(scene) for scene in scenes]
        return [[torch.cat([self.clip.encode_from_tokens(self.clip.tokenize(text)) for text in texts]), {}]]

    def tune(self, **settings) -> tuple:
        """(kv, reconstructed pictures, seconds) at the node's defaults except `settings`."""
        chosen = defaults(kv_nodes.TuneKV) | settings
        began = time.monotonic()
        kv, latent, _ = kv_nodes.TuneKV.execute(
            self.model, self.trajectory, self.was, negative=self.nothing, **chosen
        ).args
        return kv, self.decode(latent["samples"]), time.monotonic() - began

    def sample(self, model, prompt: list, guidance: float) -> torch.Tensor:
        """Pictures from the inverted noise, by the host's own KSampler Advanced."""
        latent = host_nodes.KSamplerAdvanced().sample(
            model, "disable", 0, self.steps, guidance, "euler", "normal", prompt, self.nothing, self.noise, 0, 10000,
            "disable",
        )[0]  # fmt: skip
        return self.decode(latent["samples"])

    def edit(self, kv, guidance: float, **settings) -> torch.Tensor:
        """Edited pictures with the embeddings, at the node's defaults except `settings`."""
        chosen = defaults(kv_nodes.ApplyKV) | settings
        return self.sample(kv_nodes.ApplyKV.execute(self.model, kv, **chosen).args[0], self.becomes, guidance)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Latents to pictures (B, H, W, 3) in 0..1."""
        return torch.cat([self.vae.decode(latent[i : i + 1]) for i in range(len(latent))]).clamp(0, 1)

    def reconstruction(self, pictures: torch.Tensor) -> float:
        """Mean PSNR in dB against the drawn sources."""
        return metrics.psnr(pictures, self.pictures).mean().item()

    def scores(self, pictures: torch.Tensor) -> dict[str, float]:
        """NUMBERS of edited pictures, means over the scenes."""
        told = metrics.attribute_success(self.judge, pictures, self.targets)
        same = {k: v.nanmean().item() for k, v in metrics.identity(self.judge, pictures, self.targets).items()}
        background = 1 - torch.maximum(self.masks, self.ideal_masks)
        captioned = [told[name] for name in world.CAPTIONED]
        return {
            "followed": sum(captioned) / len(captioned),
            "pose": told["pose"],
            "identity": same["score"],
            **{name: same[name] for name in ("facing", "pattern", "second", "collar")},
            "background": metrics.psnr(pictures, self.pictures, background).clamp(max=60).mean().item(),
            "ideal": metrics.psnr(pictures, self.ideals).mean().item(),
        }


def drawn(scenes: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (B, H, W, 3) in 0..1 and animal masks (B, H, W)."""
    pictures, masks = zip(*(world.render(scene, with_mask=True) for scene in scenes), strict=True)
    return torch.from_numpy(np.stack(pictures)).float() / 255, torch.from_numpy(np.stack(masks)).float()


def defaults(node) -> dict:
    """A node's widget values as a new graph has them."""
    chosen = {}
    for entry in node.define_schema().inputs:
        options = getattr(entry, "options", None)
        if getattr(entry, "default", None) is not None or options:
            chosen[entry.id] = entry.default if entry.default is not None else options[0]
    return chosen


def compare(scenes: Scenes, guidance: float, tuning: dict) -> tuple[dict, dict]:
    """The README's table: reconstructions, then edits. Returns (numbers, pictures by row)."""
    ceiling = scenes.decode(scenes.latent["samples"])
    plain = scenes.sample(scenes.model, scenes.was, guidance)
    kv, tuned, seconds = scenes.tune(guidance=guidance, **tuning)
    untuned, _, _ = scenes.tune(guidance=guidance, **tuning | {"inner_steps": 0})
    rows = {
        "ideal edit through the autoencoder": scenes.decode(scenes.vae.encode(scenes.ideals)),
        "source, not edited": ceiling,
        "prompt swapped": scenes.sample(scenes.model, scenes.becomes, guidance),
        "KV Inversion, defaults": scenes.edit(kv, guidance),
    }
    for name, (embeddings, settings) in {
        "recompute (Algorithm 1)": (kv, {"mode": "recompute", "source_guidance": 1.0}),
        "paper preset": (kv, {"preset": kv_nodes.PAPER}),
        "frozen": (kv, {"mode": "frozen", "source_guidance": 1.0}),
        "extend, no source guidance": (kv, {"source_guidance": 1.0}),
        "source's K, V without tuning": (untuned, {"source_guidance": 1.0, "start_percent": 0.1}),
    }.items():
        rows[name] = scenes.edit(embeddings, guidance, **settings)
    numbers = {
        "reconstruction": {
            "autoencoder alone": scenes.reconstruction(ceiling),
            "DDIM": scenes.reconstruction(plain),
            "tuned": scenes.reconstruction(tuned),
        },
        "edits": {name: scenes.scores(pictures) for name, pictures in rows.items()},
        "tuning seconds a picture": seconds / len(scenes.sources),
        "iterations": kv.info["iterations"],
        "MB a picture": kv.bytes / 1e6 / kv.pictures,
    }
    return numbers, {"source": scenes.pictures, "ideal": scenes.ideals, "DDIM": plain, "tuned": tuned} | rows


def sweep(scenes: Scenes, name: str, guidance: float) -> dict:
    """One setting over its range: {value: scores and reconstruction}."""
    kv = None
    found = {}
    for value in SWEEPS[name]:
        strength = value if name == "guidance" else guidance
        if name in TUNING or kv is None:
            kv, tuned, _ = scenes.tune(**({"guidance": guidance} | ({name: value} if name in TUNING else {})))
        pictures = scenes.edit(kv, strength, **({} if name in TUNING else {name: value}))
        found[str(value)] = scenes.scores(pictures) | {"reconstruction": scenes.reconstruction(tuned)}
        print(f"{name} {value}: " + ", ".join(f"{k} {v:.2f}" for k, v in found[str(value)].items()), flush=True)
    return found


def edits_table(edits: dict[str, dict[str, float]]) -> str:
    """A markdown table of scores."""
    lines = ["| | " + " | ".join(NUMBERS.values()) + " |", "|---" * (len(NUMBERS) + 1) + "|"]
    for name, scores in edits.items():
        cells = (f"{scores[k]:.1f}" if k in ("background", "ideal") else f"{scores[k]:.2f}" for k in NUMBERS)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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


def plot(found: dict[str, dict[str, float]], name: str, path: Path) -> None:
    """Lines of the scores in 0..1 over the setting's values."""
    curves = {
        "pose": "#d62728",
        "followed": "#ff7f0e",
        "identity": "#1f77b4",
        "pattern": "#2ca02c",
        "facing": "#9467bd",
    }
    width, height, edge = 560, 320, 46
    image = Image.new("RGB", (width + 120, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    values = list(found)
    xs = [edge + i * (width - 2 * edge) / max(len(values) - 1, 1) for i in range(len(values))]

    def y(score: float) -> float:
        return height - edge - score * (height - 2 * edge)

    for mark in (0, 0.25, 0.5, 0.75, 1):
        draw.line([(edge, y(mark)), (width - edge, y(mark))], fill="#dddddd")
        draw.text((8, y(mark) - 8), f"{mark:.2f}", fill="black", font=font)
    for x, value in zip(xs, values, strict=True):
        draw.text((x - 10, height - edge + 8), value, fill="black", font=font)
    draw.text((width // 2 - 40, height - 22), name, fill="black", font=font)
    for i, (curve, colour) in enumerate(curves.items()):
        points = [(x, y(found[v][curve])) for x, v in zip(xs, values, strict=True)]
        draw.line(points, fill=colour, width=2)
        draw.text((width - edge + 12, edge + 20 * i), curve, fill=colour, font=font)
    image.save(path)


def main() -> None:
    """Parse, run, print, write output/bench."""
    parser = argparse.ArgumentParser(prog="python dev.py bench kv", description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=32, help="the defaults were chosen on scenes 0 to 7")
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=defaults(kv_nodes.TuneKV)["guidance"])
    parser.add_argument("--placement", default=defaults(kv_nodes.TuneKV)["placement"])
    parser.add_argument("--inner-steps", type=int, default=defaults(kv_nodes.TuneKV)["inner_steps"])
    parser.add_argument("--sweep", choices=SWEEPS, nargs="*", default=[])
    parser.add_argument("--full-width", action="store_true", help="the checkpoint's own U-Net, four times slower")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", default="output/bench")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        scenes = Scenes(options.first, options.scenes, options.steps, not options.full_width)
        if not options.sweep:
            tuning = {"placement": options.placement, "inner_steps": options.inner_steps}
            numbers, rows = compare(scenes, options.guidance, tuning)
            contact_sheet(rows, output / "kv.png")
            numbers |= {
                "first scene": options.first,
                "scenes": options.scenes,
                "steps": options.steps,
                "guidance": options.guidance,
            }
            numbers |= {
                "torch": torch.__version__,
                "machine": platform.machine(),
                "device": str(scenes.model.load_device),
            }
            (output / "kv.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
            reconstruction = ", ".join(f"{k} {v:.2f} dB" for k, v in numbers["reconstruction"].items())
            print(f"reconstruction at guidance {options.guidance:g}: {reconstruction}")
            print(f"tuning {numbers['tuning seconds a picture']:.0f} s, {numbers['MB a picture']:.1f} MB a picture\n")
            print(edits_table(numbers["edits"]))
        for name in options.sweep:
            found = sweep(scenes, name, options.guidance)
            plot(found, name, output / f"kv_{name}.png")
            (output / f"kv_{name}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
