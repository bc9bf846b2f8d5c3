"""How well the pocket model draws what captions say: samples through the host's KSampler, judged.

python dev.py bench pocket --images 64
python dev.py bench pocket --family flux        the pocket transformer
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from benchmarks import pocket_host
from benchmarks.flow_scenes import SCHEDULER, load_flow
from PIL import Image

import nodes as host_nodes
from pocket import checkpoint, metrics, world
from pocket import judge as judging


def main() -> None:
    """Sample, judge, print one table row, save a contact sheet."""
    parser = argparse.ArgumentParser(prog="python dev.py bench pocket", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--sampler", help="default: ddim, of the transformer euler")
    parser.add_argument("--family", choices=("unet", "flux"), default="unet")
    parser.add_argument("--full-width", action="store_true", help="the checkpoint's own U-Net, four times slower")
    parser.add_argument("--weights", type=Path, default=checkpoint.WEIGHTS, help="folder of the narrow U-Net")
    parser.add_argument("--signs", action="store_true", help="captions that tell of a sign")
    parser.add_argument("--output", default="output/bench")
    options = parser.parse_args()
    flux = options.family == "flux"
    sampler, scheduler = options.sampler or ("euler" if flux else "ddim"), SCHEDULER if flux else "normal"
    scenes = (world.held_out_signs if options.signs else world.held_out_scenes)(options.images, seed=123)
    with torch.inference_mode():
        model, clip, vae = load_flow() if flux else pocket_host.load_pocket(not options.full_width, options.weights)
        judge, pictures = judging.load(), []
        for first in range(0, len(scenes), 16):
            batch = scenes[first : first + 16]
            texts = [clip.encode_from_tokens(clip.tokenize(world.caption(scene))) for scene in batch]
            nothing = [[clip.encode_from_tokens(clip.tokenize("")), {}]]
            empty = {"samples": torch.zeros(len(batch), vae.latent_channels, 16, 16)}
            (latent,) = host_nodes.KSampler().sample(
                model, first, options.steps, options.guidance, sampler, scheduler, [[torch.cat(texts), {}]], nothing,
                empty, 1.0,
            )  # fmt: skip
            pictures += [vae.decode(one[None])[0] for one in latent["samples"]]
        images = torch.stack(pictures).clamp(0, 1)
        found = metrics.attribute_success(judge, images, scenes)
    print("| samples | " + " | ".join(found) + " |")
    print(
        f"| {options.images}, guidance {options.guidance:g} | " + " | ".join(f"{v:.3f}" for v in found.values()) + " |"
    )
    tiles = (images[: len(images) // 8 * 8] * 255).round().byte().numpy()
    rows = [np.concatenate(list(tiles[i : i + 8]), 1) for i in range(0, len(tiles), 8)]
    Path(options.output).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows, 0)).save(Path(options.output) / "pocket.png")
