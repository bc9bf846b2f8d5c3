"""The models that people load in parts: which published files, on which nodes, at which values of the host's templates.

A family is data; `loaders`, `halves` and `drawing` make nodes of it, with keys that the graphs link to: `clip`, `vae`,
what `model_of` says, `left` and `right`, `decode`.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphs.parts import WIDE, decode, encode, save, save_clip, text

HUB = "https://huggingface.co/"


@dataclass(frozen=True)
class Family:
    """Published files, by their paths on the hub, and values for a picture from noise.

    clip: the type of its text encoder. empty: the node of its empty latent, of width x height and so many frames (0: a
    picture). shift: the node that shifts its noise levels, and how far. negative: None where cfg 1 looks at none.
    """

    model: str
    encoders: tuple[str, ...]
    vae: str
    clip: str
    steps: int
    cfg: float
    sampler: str = "euler"
    width: int = 1024
    height: int = 1024
    frames: int = 0
    empty: str = "EmptySD3LatentImage"
    shift: tuple[str, float] | None = None
    negative: str | None = ""


def split_files(repository: str) -> str:
    return f"{repository}/resolve/main/split_files"


Z_IMAGE_FILES, QWEN_FILES = split_files("Comfy-Org/z_image_turbo"), split_files("Comfy-Org/Qwen-Image_ComfyUI")
ANIMA_FILES = split_files("circlestone-labs/Anima")
WAN_FILES = split_files("Comfy-Org/Wan_2.1_ComfyUI_repackaged")
Z_IMAGE_TURBO = Family(
    model=f"{Z_IMAGE_FILES}/diffusion_models/z_image_turbo_bf16.safetensors",
    encoders=(f"{Z_IMAGE_FILES}/text_encoders/qwen_3_4b.safetensors",),
    vae=f"{Z_IMAGE_FILES}/vae/ae.safetensors",
    clip="lumina2", shift=("ModelSamplingAuraFlow", 3.0),
    steps=8, cfg=1.0, sampler="res_multistep", negative=None,
)  # fmt: skip
Z_IMAGE = Family(
    model=f"{split_files('Comfy-Org/z_image')}/diffusion_models/z_image_bf16.safetensors",
    encoders=Z_IMAGE_TURBO.encoders, vae=Z_IMAGE_TURBO.vae,
    clip="lumina2", shift=("ModelSamplingAuraFlow", 3.0),
    steps=30, cfg=5.0,
)  # fmt: skip
FLUX_1 = Family(
    model="Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors",
    encoders=tuple(
        f"comfyanonymous/flux_text_encoders/resolve/main/{name}.safetensors" for name in ("clip_l", "t5xxl_fp16")
    ),
    vae=f"{split_files('Comfy-Org/Lumina_Image_2.0_Repackaged')}/vae/ae.safetensors",
    clip="flux",
    steps=20, cfg=1.0, negative=None,
)  # fmt: skip
FLUX_2_KLEIN = Family(
    model=f"{split_files('Comfy-Org/flux2-klein')}/diffusion_models/flux-2-klein-base-4b.safetensors",
    encoders=(f"{split_files('Comfy-Org/flux2-klein')}/text_encoders/qwen_3_4b.safetensors",),
    vae=f"{split_files('Comfy-Org/flux2-dev')}/vae/flux2-vae.safetensors",
    clip="flux2", empty="EmptyFlux2LatentImage",
    steps=20, cfg=5.0,
)  # fmt: skip
QWEN_IMAGE = Family(
    model=f"{QWEN_FILES}/diffusion_models/qwen_image_2512_fp8_e4m3fn.safetensors",
    encoders=(f"{QWEN_FILES}/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors",),
    vae=f"{QWEN_FILES}/vae/qwen_image_vae.safetensors",
    clip="qwen_image", shift=("ModelSamplingAuraFlow", 3.1),
    steps=50, cfg=4.0, width=1664, height=928,
)  # fmt: skip
ANIMA = Family(
    model=f"{ANIMA_FILES}/diffusion_models/anima-base-v1.0.safetensors",
    encoders=(f"{ANIMA_FILES}/text_encoders/qwen_3_06b_base.safetensors",),
    vae=f"{ANIMA_FILES}/vae/qwen_image_vae.safetensors",
    clip="stable_diffusion", empty="EmptyLatentImage",
    steps=30, cfg=4.0, negative="worst quality, low quality, blurry, jpeg artifacts",
)  # fmt: skip
WAN_VIDEO = Family(
    model=f"{WAN_FILES}/diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors?download=true",
    encoders=(f"{WAN_FILES}/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors?download=true",),
    vae=f"{WAN_FILES}/vae/wan_2.1_vae.safetensors?download=true",
    clip="wan", empty="EmptyHunyuanLatentVideo", shift=("ModelSamplingSD3", 8.0),
    steps=30, cfg=6.0, sampler="uni_pc", width=832, height=480, frames=33,
    negative="blurry, overexposed, low quality, standing still, subtitles",
)  # fmt: skip
SD_35 = "Comfy-Org/stable-diffusion-3.5-fp8/resolve/main/sd3.5_large_fp8_scaled.safetensors?download=true"


def published(path: str, directory: str) -> dict:
    """A file as the editor offers it for download, into a folder of models/."""
    return {"name": path.rpartition("/")[2].partition("?")[0], "url": HUB + path, "directory": directory}


def files_of(family: Family) -> list[dict]:
    """All that a family's loaders load."""
    return [
        published(family.model, "diffusion_models"),
        *(published(encoder, "text_encoders") for encoder in family.encoders),
        published(family.vae, "vae"),
    ]


def loader(kind: str, *files: dict, height: int = 110, **widgets) -> dict:
    return {"type": kind, "size": [WIDE, height], "widgets": widgets, "models": list(files)}


def loaders(family: Family) -> dict[str, dict]:
    """The model's files, and its shift."""
    unet, *encoders, vae = files_of(family)
    names = [encoder["name"] for encoder in encoders]
    if len(encoders) == 1:
        clip = loader("CLIPLoader", *encoders, clip_name=names[0], type=family.clip)
    else:
        clip = loader("DualCLIPLoader", *encoders, height=130,
                      clip_name1=names[0], clip_name2=names[1], type=family.clip)  # fmt: skip
    found = {
        "unet": loader("UNETLoader", unet, unet_name=unet["name"]),
        "clip": clip,
        "vae": loader("VAELoader", vae, vae_name=vae["name"]),
    }
    if family.shift:
        kind, shift = family.shift
        found["shift"] = {"type": kind, "size": [WIDE, 60], "widgets": {"shift": shift},
                          "inputs": {"model": "unet.MODEL"}}  # fmt: skip
    return found


def model_of(family: Family) -> str:
    """The output of `loaders` that is sampled with."""
    return "shift.MODEL" if family.shift else "unet.MODEL"


def clip_text(title: str, value: str) -> dict:
    return text(title, value, clip="clip.CLIP")


def encoded(image: str = "image.IMAGE") -> dict:
    return encode(image, "vae.VAE")


def decoded(latent: str) -> dict:
    return decode(latent, "vae.VAE")


def halves(family: Family) -> dict[str, dict]:
    """A mask that is white on the left, and its inverse."""
    width, height = family.width, family.height
    return {
        "whole": {"type": "SolidMask", "title": "Everything", "size": [WIDE, 110],
                  "widgets": {"value": 0.0, "width": width, "height": height}},
        "white": {"type": "SolidMask", "title": "Half of it", "size": [WIDE, 110],
                  "widgets": {"value": 1.0, "width": width // 2, "height": height}},
        "left": {"type": "MaskComposite", "title": "The left half", "size": [WIDE, 150],
                 "widgets": {"x": 0, "y": 0, "operation": "add"},
                 "inputs": {"destination": "whole.MASK", "source": "white.MASK"}},
        "right": {"type": "InvertMask", "title": "The right half", "size": [WIDE, 40],
                  "inputs": {"mask": "left.MASK"}},
    }  # fmt: skip


# ---- from noise to the picture --------------------------------------------------------------------------------------


def drawing(family: Family, model: str, positive: str) -> list[dict[str, dict]]:
    """Columns of nodes, at the host's own values."""
    if family.empty == "EmptyFlux2LatentImage":
        return drawn_by_levels(family, model, positive)
    negative = "zero.CONDITIONING" if family.negative is None else "negative.CONDITIONING"
    sample = {"type": "KSampler", "size": [WIDE, 270],
              "widgets": {"seed": 0, "control_after_generate": "fixed", "steps": family.steps, "cfg": family.cfg,
                          "sampler_name": family.sampler, "scheduler": "simple", "denoise": 1.0},
              "inputs": {"model": model, "positive": positive, "negative": negative,
                         "latent_image": "empty.LATENT"}}  # fmt: skip
    clip = save_clip("The clip", 330, fps=16.0, lossless=False)
    shown = {"decode": decoded("sample.LATENT"), "save": clip if family.frames else save("The picture")}
    return [{"empty": empty_latent(family), **without(family, positive), "sample": sample, **shown}]


def drawn_by_levels(family: Family, model: str, positive: str) -> list[dict[str, dict]]:
    """By noise levels that follow from the picture's size, as FLUX.2 has them."""
    noise = {"type": "RandomNoise", "size": [WIDE, 90],
             "widgets": {"noise_seed": 0, "control_after_generate": "fixed"}}  # fmt: skip
    sigmas = {"type": "Flux2Scheduler", "size": [WIDE, 110],
              "widgets": {"steps": family.steps, "width": family.width, "height": family.height}}  # fmt: skip
    guided = guided_sampling(model, positive, family.cfg, "noise.NOISE", "empty.LATENT")
    return [
        {"empty": empty_latent(family), **without(family, positive), "noise": noise, "sigmas": sigmas},
        {**guided, "decode": decoded("sample.output")},
        {"save": save("The picture")},
    ]


def guided_sampling(model: str, positive: str, cfg: float, noise: str, latent: str) -> dict[str, dict]:
    """SamplerCustomAdvanced by the host's euler; `sigmas` and `negative` are other nodes of the graph."""
    return {
        "guider": {"type": "CFGGuider", "size": [WIDE, 110], "widgets": {"cfg": cfg},
                   "inputs": {"model": model, "positive": positive, "negative": "negative.CONDITIONING"}},
        "euler": {"type": "KSamplerSelect", "size": [WIDE, 60], "widgets": {"sampler_name": "euler"}},
        "sample": {"type": "SamplerCustomAdvanced", "size": [WIDE, 140],
                   "inputs": {"noise": noise, "guider": "guider.GUIDER", "sampler": "euler.SAMPLER",
                              "sigmas": "sigmas.SIGMAS", "latent_image": latent}},
    }  # fmt: skip


def empty_latent(family: Family) -> dict:
    frames = {"length": family.frames} if family.frames else {}
    return {"type": family.empty, "size": [WIDE, 110],
            "widgets": {"width": family.width, "height": family.height, **frames, "batch_size": 1}}  # fmt: skip


def without(family: Family, positive: str) -> dict[str, dict]:
    """The negative prompt; models that were distilled get zeros of the positive one's size."""
    if family.negative is None:
        return {"zero": {"type": "ConditioningZeroOut", "size": [WIDE, 40], "inputs": {"conditioning": positive}}}
    return {"negative": clip_text("Negative prompt", family.negative)}


# ---- from a photo's own noise ---------------------------------------------------------------------------------------


def both_ways(model: str, steps: int, scheduler: str = "simple") -> dict:
    """The noise levels that a photo is inverted and its edit is sampled on."""
    return {"type": "BasicScheduler", "title": "Steps, of both ways", "size": [WIDE, 120],
            "widgets": {"scheduler": scheduler, "steps": steps, "denoise": 1.0},
            "inputs": {"model": model}}  # fmt: skip


def inverted(model: str, sigmas: str = "sigmas.SIGMAS", **widgets) -> dict:
    return {"type": "PalimpsestInvert", "size": [WIDE, 330], **({"widgets": widgets} if widgets else {}),
            "inputs": {"model": model, "latent": "encode.LATENT", "positive": "source.CONDITIONING",
                       "sigmas": sigmas}}  # fmt: skip
