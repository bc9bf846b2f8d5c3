"""Draw the pictures of Video Attention's and Attention Fusion's help pages: a drawn clip, edited by its prompt.

python dev.py draw video [NodeId ...]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import tiny_models
import torch
from benchmarks import pocket_host, walks
from make_pictures import GAP, GUIDANCE, LABEL, LETTERS, ROOT, STEPS, save
from palimpsest.kernels.edit_metrics import frame_change
from palimpsest.nodes.attention_fusion.nodes import AttentionFusion
from palimpsest.nodes.inversion.nodes import Invert
from palimpsest.nodes.video.nodes import VideoAttention
from PIL import Image, ImageDraw, ImageFont
from pocket import judge as judging
from pocket import metrics, world

import nodes as host_nodes

FRAMES, SHOWN, CELL = 5, (0, 2, 4), 168
NOTHING: Mapping[str, Any] = {}
DOG = world.Scene(
    species="dog", colour="brown", pose="standing", side="left", place="park", pattern="patch", second=0, phase=0.3,
    collar=4, socks=True, tailtip=True,
)  # fmt: skip


class Clip:
    """A drawn clip and its edit by prompt, on the pocket model."""

    def __init__(self, scene: world.Scene, **change: str):
        self.model, self.clip, self.vae = pocket_host.load_pocket(narrow=True)
        self.wanted = world.edit(scene, **change)
        self.pictures, self.ideal = (walks.clip(each, FRAMES)[0] for each in (scene, self.wanted))
        self.texts = world.caption(scene), world.caption(self.wanted)
        self.inverted: dict[str, tuple] = {}

    def encode(self, text: str) -> list:
        """CONDITIONING of a text."""
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def invert(self, **video: Any) -> tuple:
        """(model, trajectory, noise) of the clip, with Video Attention if `video` has settings."""
        if str(video) not in self.inverted:
            model, latent = self.model, {"samples": self.vae.encode(self.pictures)}
            if video:
                model = tiny_models.execute(VideoAttention, model=model, **video)[0]
            inputs = {
                "latent": latent,
                "positive": self.encode(self.texts[0]),
                "steps": STEPS,
                "reconstruction_guidance": 0.0,
            }
            self.inverted[str(video)] = model, *tiny_models.execute(Invert, model=model, **inputs)[:2]
        return self.inverted[str(video)]

    def edit(self, video: Mapping[str, Any] = NOTHING, fusion: Mapping[str, Any] = NOTHING) -> torch.Tensor:
        """The edited frames; by Video Attention and Attention Fusion where these have settings."""
        model, trajectory, noise = self.invert(**video)
        positive = self.encode(self.texts[1])
        if fusion:
            texts = {"source_text": self.texts[0], "edit_text": self.texts[1]}
            model, positive, _ = tiny_models.execute(
                AttentionFusion, model=model, trajectory=trajectory, clip=self.clip, **texts, **fusion
            )
        latent = host_nodes.KSamplerAdvanced().sample(
            model, "disable", 0, STEPS, GUIDANCE, "euler", "normal", positive, self.encode(""), noise, 0, 10000,
            "disable",
        )[0]["samples"]  # fmt: skip
        return torch.cat([self.vae.decode(latent[i : i + 1]) for i in range(FRAMES)]).clamp(0, 1)

    def numbers(self, frames: torch.Tensor, judge: judging.Judge) -> str:
        """What is measured of edited frames, against the ideal ones.

        flicker: mean change from frame to frame of the difference to the ideal clip.
        """
        told = metrics.attribute_success(judge, frames, [self.wanted] * FRAMES)["all"]
        return (
            f"prompt followed {told:.2f}, flicker {frame_change(frames - self.ideal):.4f}, "
            f"change {frame_change(frames) / frame_change(self.pictures):.2f}, "
            f"PSNR to ideal {metrics.psnr(frames, self.ideal).mean():.2f}"
        )


def sheet(rows: Mapping[str, torch.Tensor]) -> Image.Image:
    """Strips of the first, the middle and the last frame, one below the other, each under its text."""
    font, height = ImageFont.load_default(LETTERS), LABEL + CELL + GAP
    picture = Image.new("RGB", (len(SHOWN) * (CELL + GAP) - GAP, len(rows) * height - GAP), "white")
    draw = ImageDraw.Draw(picture)
    for r, (text, frames) in enumerate(rows.items()):
        draw.text((0, r * height + LABEL / 2), text, fill=(30, 30, 30), font=font, anchor="lm")
        for c, frame in enumerate((frames[list(SHOWN)] * 255).round().byte().numpy()):
            shown = Image.fromarray(frame).resize((CELL, CELL), Image.Resampling.LANCZOS)
            picture.paste(shown, (c * (CELL + GAP), r * height + LABEL))
    return picture


FRAMES_SEEN = {"look_at": "own, first and previous"}
UNTIL_HALF, UNTIL_LATE = {"self_attention_until": 0.5}, {"self_attention_until": 0.8, "cross_attention_until": 0.8}
# Help page: its picture's name, and the settings of Video Attention and Attention Fusion by what stands over a strip
PAGES: dict[str, tuple[str, dict[str, tuple]]] = {
    "PalimpsestVideoAttention": (
        "frames",
        {
            "brown to red, each frame alone": (),
            "own, first and previous frame": (FRAMES_SEEN,),
            "all frames": ({"look_at": "all"},),
        },
    ),
    "PalimpsestAttentionFusion": (
        "fusion",
        {
            "brown to red, new prompt alone": (),
            "fused until 0.5": (NOTHING, UNTIL_HALF),
            "fused until 0.8": (NOTHING, UNTIL_LATE),
            "until 0.8, and Video Attention": (FRAMES_SEEN, UNTIL_LATE),
        },
    ),
}


def main() -> None:
    """Write the pictures of the help pages, or of those that are named, and print what was measured."""
    judge = judging.load()
    with torch.inference_mode():
        clip = Clip(DOG, colour="red")
        for page in sys.argv[1:] or PAGES:
            name, ways = PAGES[page]
            strips = {text: clip.edit(*way) for text, way in ways.items()}
            for text, frames in strips.items():
                print(text, "-", clip.numbers(frames, judge))
            print(save(sheet({"the clip": clip.pictures, **strips}), ROOT / "web" / "docs" / page / f"{name}.jpg"))
