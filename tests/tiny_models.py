"""Small random models of the host's own classes: every architecture and prediction type, in a second, without files."""

from __future__ import annotations

import torch
from pocket import settings

SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
    "channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1, "use_linear_in_transformer": False, "context_dim": 24, "adm_in_channels": None,
    "use_spatial_transformer": True, "legacy": False, "num_heads": 4, "num_head_channels": -1, "use_checkpoint": False,
    "use_temporal_attention": False,
}  # fmt: skip
SDXL = SD15 | {
    "channel_mult": [1, 2], "transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 2, 2],
    "transformer_depth_middle": 2, "use_linear_in_transformer": True, "adm_in_channels": 2816,
    "num_classes": "sequential", "num_heads": -1, "num_head_channels": 16,
}  # fmt: skip
SDXL_DEEP = SDXL | {  # SDXL's own block structure, 70 self-attention layers, with a tenth of its channels
    "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10,
}  # fmt: skip
SD15_FULL = SD15 | {  # the sizes of the published checkpoints, for the meta device
    "model_channels": 320, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1] * 9 + [0] * 3,
    "context_dim": 768, "num_heads": 8,
}  # fmt: skip
SDXL_FULL = SDXL_DEEP | {"model_channels": 320, "context_dim": 2048, "num_head_channels": 64}
INPAINT, INSTRUCT = {"in_channels": 9}, {"in_channels": 8}  # + mask and masked picture; + the picture to change

# family -> (class of comfy.supported_models, class of comfy.model_base, layout)
FAMILIES = {
    "sd15": ("SD15", "BaseModel", SD15),
    "sd15-inpaint": ("SD15", "BaseModel", SD15 | INPAINT),
    "sd15-instruct": ("SD15_instructpix2pix", "SD15_instructpix2pix", SD15 | INSTRUCT),
    "sd15-full": ("SD15", "BaseModel", SD15_FULL),
    "sdxl": ("SDXL", "SDXL", SDXL),
    "sdxl-deep": ("SDXL", "SDXL", SDXL_DEEP),
    "sdxl-inpaint": ("SDXL", "SDXL", SDXL | INPAINT),
    "sdxl-instruct": ("SDXL_instructpix2pix", "SDXL_instructpix2pix", SDXL | INSTRUCT),
    "sdxl-full": ("SDXL", "SDXL", SDXL_FULL),
}
FAMILIES |= {f"{family}_edit": FAMILIES[f"{family}-instruct"] for family in ("sd15", "sdxl")}  # as people call them
CPU = torch.device("cpu")


def network(family: str, prediction: str = "EPS", zsnr: bool = False, dtype=torch.float32, device="cpu"):
    """The host's own model object of a family, with weights as they were allocated."""
    import comfy.model_base
    import comfy.supported_models

    config_name, model_name, layout = FAMILIES[family]
    config = getattr(comfy.supported_models, config_name)(dict(layout))
    config.unet_config = dict(layout, dtype=dtype)
    if zsnr:
        config.sampling_settings = {"zsnr": True}
    kind = comfy.model_base.ModelType[prediction]
    model = getattr(comfy.model_base, model_name)(config, model_type=kind, device=device)
    if config.inpaint_model():
        model.set_inpaint()
    return model.eval()


def fill(module: torch.nn.Module) -> None:
    """Random weights of a size that keeps activations near 1; no bias."""
    for name, parameter in module.named_parameters():
        scale = 0.3 / max(parameter[0].numel(), 1) ** 0.5 if parameter.ndim > 1 else 0.02
        parameter.copy_(torch.randn_like(parameter) * scale + (parameter.ndim == 1))
        if name.endswith("bias"):
            parameter.zero_()


def unet(family: str = "sd15", prediction: str = "EPS", zsnr: bool = False, seed: int = 0, dtype=torch.float32):
    """A ModelPatcher around a random U-Net: a family of FAMILIES, prediction "EPS" or "V_PREDICTION"."""
    import comfy.model_patcher

    torch.manual_seed(seed)
    with torch.inference_mode():  # as the host's loaders do
        model = network(family, prediction, zsnr, dtype)
        fill(model.diffusion_model)
        model.diffusion_model.out[2].weight.mul_(
            0.05 if prediction == "EPS" else 0.5
        )  # a gentle network, so that few steps integrate it well
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def unet_without_weights(family: str):
    """A ModelPatcher around a U-Net on the meta device: layers and shapes of the real size, no memory."""
    import comfy.model_patcher

    meta = torch.device("meta")
    model = network(family, dtype=torch.float16, device=meta)
    return comfy.model_patcher.ModelPatcher(model, load_device=meta, offload_device=meta)


def prompt(seed: int = 0, tokens: int = 7, family: str = "sd15") -> list:
    """A CONDITIONING of random tokens, with pooled output for SDXL."""
    generator = torch.Generator().manual_seed(seed)
    sdxl = family.startswith("sdxl")
    extra = {"pooled_output": torch.randn(1, 1280, generator=generator)} if sdxl else {}
    return [[torch.randn(1, tokens, SD15["context_dim"], generator=generator), extra]]


def latent(pictures: int = 1, height: int = 8, width: int = 8, seed: int = 0) -> dict:
    """A LATENT of smooth random pictures."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(pictures, 4, 3, 3, generator=generator)
    return {"samples": torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic") * 4}


def picture(pictures: int = 1, height: int = 64, width: int = 64, seed: int = 0) -> torch.Tensor:
    """An IMAGE of smooth random colours."""
    coarse = torch.rand(pictures, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear").movedim(1, -1)


class AveragingVAE:
    """Stands for a VAE where a node wants one: a latent is the picture's colours, averaged over 8 x 8 pixels."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """IMAGE (B, H, W, 3) -> (B, 4, H/8, W/8), the fourth channel being the brightness."""
        colours = torch.nn.functional.avg_pool2d(pixels[..., :3].movedim(-1, 1), 8) * 8 - 4
        return torch.cat([colours, colours.mean(1, keepdim=True)], 1)


def controlnet(family: str = "sd15", seed: int = 7):
    """A random ControlNet for the U-Net of a family, as the host's loader makes it."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    torch.manual_seed(seed)
    unused = ("out_channels", "transformer_depth_output", "use_temporal_attention")
    layout = {k: v for k, v in FAMILIES[family][2].items() if k not in unused}
    with torch.inference_mode():
        model = comfy.cldm.cldm.ControlNet(
            **layout, hint_channels=3, dtype=torch.float32, device=CPU, operations=comfy.ops.disable_weight_init
        )
        fill(model)
    return comfy.controlnet.ControlNet(model.eval(), load_device=CPU)


def lora(model, seed: int = 5, rank: int = 2) -> dict:
    """The content of a LoRA file for the attention of every block of a model."""
    generator = torch.Generator().manual_seed(seed)
    content = {}
    for name, weight in model.model.diffusion_model.named_parameters():
        if ".to_" in name and weight.ndim == 2:
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            out_features, in_features = weight.shape
            content[f"{key}.lora_up.weight"] = torch.randn(out_features, rank, generator=generator) / rank
            content[f"{key}.lora_down.weight"] = torch.randn(rank, in_features, generator=generator) / in_features**0.5
            content[f"{key}.alpha"] = torch.tensor(float(rank))
    return content


def execute(node, **values) -> tuple:
    """Run a node of the host's old or new kind, with the values of pocket.settings for what is not given: its outputs.

    One of ours runs behind its border, as the host is given it. What neither says is left out, as a graph of the API
    may: the node's settings have its defaults.
    """
    if not hasattr(node, "define_schema"):
        return getattr(node(), node.FUNCTION)(**values)
    if node.__module__.startswith("palimpsest."):
        from palimpsest.nodes.border import guarded

        node = guarded(node)
    for socket in node.define_schema().inputs:
        default = getattr(socket, "default", None)
        if default is None and getattr(socket, "options", None):
            default = socket.options[0]
        if default is not None and not socket.optional:
            values.setdefault(socket.id, default)
    outputs = node.execute(**settings.of(node) | values)
    return tuple(getattr(outputs, "args", outputs))
