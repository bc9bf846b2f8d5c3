"""The demo: edit one picture in a running ComfyUI over its HTTP API, and lay the results side by side.

`python dev.py demo` starts the host and calls this. Without options it edits a drawn scene in three ways, with what the
model has recorded of it once; the ideal edits are known, so the edits can be scored. With --image, --checkpoint,
--source-prompt and --prompt it edits your own picture. Values that are not given are the pocket model's with its
checkpoint, and the nodes' defaults with yours. With --family flux the drawn scene is edited by the pocket transformer.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from api import ApiClient, ApiError
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pocket import judge as judging
from pocket import metrics, world
from pocket import settings as pocket_settings
from pocket.flow_files import FILES

TESTS = Path(__file__).resolve().parent
POCKET = "palimpsest_pocket.safetensors"
EXAMPLE = {"seed": 77, "number": 98}  # held out, with a clear coat and collar
EDITS = {"action": {"pose": "sitting"}, "species": {"species": "dog"}, "place": {"place": "park"}}
OWN = "edit"  # of your picture
OF_MODELS = {  # the nodes' defaults, which the sampler's values follow
    "steps": 50, "guidance": 7.5, "learning_rate": 0.01, "source_guidance": 3.0, "start_percent": 0.1,
}  # fmt: skip
COLUMNS = {"source": "source", "prompt_swap": "new prompt alone", "kv": "KV Inversion", "ideal": "ideal edit (drawn)"}
GAP, LABEL = 8, 28  # pixels


@dataclass(frozen=True)
class Edit:
    """A prompt for the source's scene as it should become.

    mask: a picture file of the host, white where the source may be looked at; without one that is everywhere.
    """

    prompt: str
    mask: str | None = None
    ideal: world.Scene | None = None


def node(kind: str, **inputs) -> dict:
    """A node of an API-format graph."""
    return {"class_type": kind, "inputs": inputs}


class UNet:
    """Nodes that load a checkpoint and sample from inverted noise."""

    model, clip, vae = ["checkpoint", 0], ["checkpoint", 1], ["checkpoint", 2]

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.loaders = {"checkpoint": node("CheckpointLoaderSimple", ckpt_name=options.checkpoint)}
        self.schedule = {"scheduler": "normal"}

    def sampled(self, name: str, model: list, positive: list) -> dict:
        """The nodes that draw `name`."""
        return {name: node(
            "KSamplerAdvanced", model=model, positive=positive, negative=["nothing", 0], latent_image=["invert", 1],
            add_noise="disable", noise_seed=0, steps=self.options.steps, cfg=self.options.guidance,
            sampler_name="euler", scheduler="normal", start_at_step=0, end_at_step=10000,
            return_with_leftover_noise="disable",
        )}  # fmt: skip


class Flux:
    """The same of the pocket transformer, whose flow the sampler's own nodes draw."""

    model, clip, vae = ["transformer", 0], ["text encoder", 0], ["autoencoder", 0]

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.loaders = {
            "transformer": node("UNETLoader", unet_name=FILES["diffusion_models"], weight_dtype="default"),
            "text encoder": node("CLIPLoader", clip_name=FILES["text_encoders"], type="stable_diffusion"),
            "autoencoder": node("VAELoader", vae_name=FILES["vae"]),
            "levels": node("BasicScheduler", model=self.model, scheduler="simple", steps=options.steps, denoise=1.0),
            "euler": node("KSamplerSelect", sampler_name="euler"),
        }
        self.schedule = {"scheduler": "simple", "sigmas": ["levels", 0]}

    def sampled(self, name: str, model: list, positive: list) -> dict:
        """The nodes that draw `name`."""
        guider = node("CFGGuider", model=model, positive=positive, negative=["nothing", 0], cfg=self.options.guidance)
        return {f"guider of {name}": guider, name: node(
            "SamplerCustomAdvanced", noise=["invert", 4], guider=[f"guider of {name}", 0], sampler=["euler", 0],
            sigmas=["levels", 0], latent_image=["encode", 0],
        )}  # fmt: skip


FAMILIES = {"unet": UNet, "flux": Flux}


def graph(image: str, source_prompt: str, edits: dict[str, Edit], options: argparse.Namespace) -> dict:
    """All edits as one API-format graph. Keys of SaveImage nodes: ceiling, ddim, tuned, "prompt_swap X" and "kv X"."""
    family = FAMILIES[options.family](options)
    nodes = family.loaders | {
        "image": node("LoadImage", image=image),
        "encode": node("VAEEncode", pixels=["image", 0], vae=family.vae),
        "was": node("CLIPTextEncode", clip=family.clip, text=source_prompt),
        "nothing": node("CLIPTextEncode", clip=family.clip, text=""),
        "invert": node(
            "PalimpsestInvert", model=family.model, latent=["encode", 0], positive=["was", 0],
            negative=["nothing", 0], vae=family.vae, steps=options.steps, guidance=1.0, **family.schedule,
            predict_at="next noise level", reconstruction_guidance=1.0,
        ),
        "tune": node(
            "PalimpsestTuneKV", model=family.model, trajectory=["invert", 0], positive=["was", 0],
            negative=["nothing", 0], vae=family.vae, preset="as set below", guidance=options.guidance,
            tune_with="with guidance", layers=options.layers, start_percent=0.0, inner_steps=options.inner_steps,
            learning_rate=options.learning_rate, tolerance=1e-5, warm_start=True, keep_source=True,
        ),
        "keep": node("PalimpsestSaveKV", kv=["tune", 0], filename="demo"),
        "invert report": node("PreviewAny", source=["invert", 3]),
        "tune report": node("PreviewAny", source=["tune", 2]),
    } | family.sampled("sample ddim", family.model, ["was", 0])  # fmt: skip
    latents = {"ceiling": ["encode", 0], "ddim": ["sample ddim", 0]}
    if options.inner_steps:
        latents["tuned"] = ["tune", 1]
    for name, edit in edits.items():
        nodes[f"becomes {name}"] = node("CLIPTextEncode", clip=family.clip, text=edit.prompt)
        nodes[f"apply {name}"] = applied = node(
            "PalimpsestApplyKV", model=family.model, kv=["tune", 0], preset="as set below", mode=options.mode,
            strength=options.strength, source_guidance=options.source_guidance, start_percent=options.start_percent,
            end_percent=1.0, layers="all", look_ahead=0.0,
        )  # fmt: skip
        if edit.mask:
            nodes[f"mask {name}"] = node("LoadImageMask", image=edit.mask, channel="red")
            applied["inputs"]["source_mask"] = [f"mask {name}", 0]
        for way, model in (("prompt_swap", family.model), ("kv", [f"apply {name}", 0])):
            nodes |= family.sampled(f"sample {way} {name}", model, [f"becomes {name}", 0])
            latents[f"{way} {name}"] = [f"sample {way} {name}", 0]
    for name, latent in latents.items():
        nodes[f"decode {name}"] = node("VAEDecode", samples=latent, vae=family.vae)
        nodes[name] = node("SaveImage", images=[f"decode {name}", 0], filename_prefix=f"palimpsest_demo/{name}")
    return nodes


def picture(data: bytes) -> np.ndarray:
    """A file's pixels, uint8 (H, W, 3)."""
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def fitted(path: str, longest: int) -> Image.Image:
    """Your picture, upright, at most `longest` pixels on its longer side, cut to multiples of 8."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    width, height = (side // 8 * 8 for side in image.size)
    if not width or not height:
        raise ApiError(f"{path} is {image.width} x {image.height} pixels: give a picture of at least 64 x 64")
    return image.crop((0, 0, width, height))


def same_size(image: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The centre of an image in another's size: VAE Encode crops to multiples of 8 pixels, around the middle."""
    top, left = ((a - b) // 2 for a, b in zip(image.shape, like.shape, strict=True) if a != 3)
    return image[top : top + like.shape[0], left : left + like.shape[1]]


def measured(pictures: dict[str, np.ndarray], edits: dict[str, Edit]) -> dict:
    """PSNR of the reconstructions against the source; and, where ideal edits are known, scores of the edits."""
    source = same_size(pictures["source"], pictures["ceiling"])
    numbers = {
        f"{name} PSNR dB": round(float(metrics.psnr(pictures[name], source)), 2)
        for name in ("ceiling", "ddim", "tuned")
        if name in pictures
    }
    known = {name: edit.ideal for name, edit in edits.items() if edit.ideal}
    judge = judging.load() if known else None
    for name, ideal in known.items():
        for way in ("prompt_swap", "kv"):
            image = torch.from_numpy(pictures[f"{way} {name}"])[None]
            right = metrics.attribute_success(judge, image, [ideal], ("species", "colour", "pose", "side", "place"))
            followed = sum(float(v) for v in right.values()) / len(right)
            identity = float(metrics.identity(judge, image, [ideal])["score"])
            numbers[f"{name}, {COLUMNS[way]}"] = f"prompt followed {followed:.2f}, identity {identity:.2f}"
    return numbers


def contact_sheet(pictures: dict[str, np.ndarray], edits: dict[str, Edit], scale: int) -> Image.Image:
    """A row for each edit under its prompt: the source, the new prompt alone, KV Inversion and the ideal edit."""
    columns = [name for name in COLUMNS if name != "ideal" or f"ideal {next(iter(edits))}" in pictures]
    height, width = (n * scale for n in pictures["ceiling"].shape[:2])
    size = ((width + GAP) * len(columns) + GAP, (height + LABEL + GAP) * len(edits) + LABEL)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for i, column in enumerate(columns):
        left = GAP + i * (width + GAP)
        draw.text((left, 6), COLUMNS[column], fill="black", font=font)
        for row, (name, edit) in enumerate(edits.items()):
            top = LABEL + row * (height + LABEL + GAP)
            image = Image.fromarray(pictures[column if column == "source" else f"{column} {name}"])
            sheet.paste(image.resize((width, height), Image.Resampling.LANCZOS), (left, top))
            if not i:
                draw.text((left, top + height + 4), edit.prompt, fill="black", font=font)
    return sheet


def drawn_example(client: ApiClient, output: Path) -> tuple[Path, str, dict[str, Edit]]:
    """(file of the example, its caption, EDITS of it). A new place may only look at the animal."""
    scene = world.held_out_scenes(EXAMPLE["number"] + 1, EXAMPLE["seed"])[-1]
    picture, mask = world.render(scene, with_mask=True)
    source, animal = output / "source.png", output / "animal.png"
    Image.fromarray(picture).save(source)
    Image.fromarray((mask * 255).astype(np.uint8)).convert("RGB").save(animal)
    uploaded, edits = client.upload_image(animal), {}
    for name, changes in EDITS.items():
        ideal = world.edit(scene, **changes)
        edits[name] = Edit(world.caption(ideal), uploaded if name == "place" else None, ideal)
    return source, world.caption(scene), edits


def run(options: argparse.Namespace) -> dict:
    """Upload, queue, wait, write the pictures, the sheet and report.json. Returns the report."""
    client, output = ApiClient(options.url), Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    if options.image is None:
        source_file, source_prompt, edits = drawn_example(client, output)
    elif not (options.source_prompt and options.prompt):
        raise ApiError("--image also needs --source-prompt (the picture as it is) and --prompt (as it should become)")
    else:
        source_file, source_prompt = output / "source.png", options.source_prompt
        fitted(options.image, options.size).save(source_file)
        edits = {OWN: Edit(options.prompt)}
    print(f'source "{source_prompt}"\n' + "\n".join(f'edit   "{edit.prompt}"' for edit in edits.values()), flush=True)
    began = time.monotonic()
    nodes = graph(client.upload_image(source_file), source_prompt, edits, options)
    entry = client.queue(nodes, timeout=3600)
    seconds = time.monotonic() - began
    saved = [name for name, node in nodes.items() if node["class_type"] == "SaveImage"]
    pictures = {name: picture(client.images(entry, name)[0]) for name in saved}
    pictures |= {f"ideal {name}": world.render(edit.ideal) for name, edit in edits.items() if edit.ideal}
    for name, image in pictures.items():
        Image.fromarray(image).save(output / f"{name.replace(' ', '_')}.png")
    pictures["source"] = picture(Path(source_file).read_bytes())
    texts = {name: entry["outputs"][f"{name} report"]["text"][0] for name in ("invert", "tune")}
    prompts = {"source prompt": source_prompt, **{f"{name} prompt": edit.prompt for name, edit in edits.items()}}
    report = {"seconds": round(seconds, 1), **prompts, **texts, **measured(pictures, edits)}
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    contact_sheet(pictures, edits, max(1, 384 // pictures["ceiling"].shape[1])).save(output / "sheet.png")
    return report


def with_values_of_the_model(options: argparse.Namespace) -> argparse.Namespace:
    """Options with the values that were not given."""
    values = OF_MODELS if options.checkpoint != POCKET else values_of_the_pocket()
    given = {name: value for name, value in vars(options).items() if value is not None}
    return argparse.Namespace(**vars(options) | values | given)


def values_of_the_pocket() -> dict:
    """OF_MODELS for the pocket model."""
    kinds = ("PalimpsestInvert", "PalimpsestTuneKV", "PalimpsestApplyKV")
    return {name: value for kind in kinds for name, value in pocket_settings.POCKET[kind].items()}


def main() -> int:
    """Parse, run, print a short table and where the sheet is."""
    parser = argparse.ArgumentParser(prog="python dev.py demo", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--url", required=True, help=argparse.SUPPRESS)
    add("--models-dir", help=argparse.SUPPRESS)
    add("--output", default="output/demo", help="folder for the pictures and report.json")
    add("--image", help="your own picture file")
    add("--size", type=int, default=768, help="your picture is scaled down to this many pixels on its longer side")
    add("--family", choices=FAMILIES, default="unet", help="flux: the pocket transformer, in place of a checkpoint")
    add("--checkpoint", default=POCKET, help="a checkpoint by the name the host lists")
    add("--source-prompt", help="what the picture shows")
    add("--prompt", help="what it should show")
    add("--steps", type=int, help="steps of inversion and sampling")
    add("--guidance", type=float, help="guidance of the edit")
    add("--inner-steps", type=int, default=0, help="learning iterations a step; 0 records only")
    add("--learning-rate", type=float, help="size of a learning step")
    add("--layers", default="decoder", help="which self-attention layers learn")
    add("--mode", default="extend", help="how the source acts on the edit")
    add("--source-guidance", type=float, help="how hard to insist on the source's look")
    add("--strength", type=float, default=1.0, help="how much of the source is used")
    add("--start-percent", type=float, help="when the source begins to act")
    options = with_values_of_the_model(parser.parse_args())
    try:
        report = run(options)
    except (ApiError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    for name, value in report.items():
        print(f"  {name:28} {value}")
    print(f"pictures: {Path(options.output) / 'sheet.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
