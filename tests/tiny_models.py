"""Small random models of the host's own classes: every architecture and prediction type, in a second, without files."""

from __future__ import annotations

import torch

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


def unet(family: str = "sd15", prediction: str = "EPS", zsnr: bool = False, seed: int = 0, dtype=torch.float32):
    """A ModelPatcher around a random U-Net: family "sd15" or "sdxl", prediction "EPS" or "V_PREDICTION"."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    torch.manual_seed(seed)
    config_class, model_class, layout = {
        "sd15": (comfy.supported_models.SD15, comfy.model_base.BaseModel, SD15),
        "sdxl": (comfy.supported_models.SDXL, comfy.model_base.SDXL, SDXL),
    }[family]
    config = config_class(dict(layout))
    config.unet_config = dict(layout, dtype=dtype)
    if zsnr:
        config.sampling_settings = {"zsnr": True}
    kind = comfy.model_base.ModelType[prediction]
    with torch.inference_mode():  # as the host's loaders do
        model = model_class(config, model_type=kind, device="cpu")
        for parameter in model.diffusion_model.parameters():
            scale = 0.3 / max(parameter[0].numel(), 1) ** 0.5 if parameter.ndim > 1 else 0.02
            parameter.copy_(torch.randn_like(parameter) * scale + (parameter.ndim == 1))
        for name, parameter in model.diffusion_model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
        model.diffusion_model.out[2].weight.mul_(
            0.05 if prediction == "EPS" else 0.5
        )  # a gentle network, so that few steps integrate it well
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu)


def prompt(seed: int = 0, tokens: int = 7, family: str = "sd15") -> list:
    """A CONDITIONING of random tokens, with pooled output for SDXL."""
    generator = torch.Generator().manual_seed(seed)
    extra = {"pooled_output": torch.randn(1, 1280, generator=generator)} if family == "sdxl" else {}
    return [[torch.randn(1, tokens, SD15["context_dim"], generator=generator), extra]]


def latent(pictures: int = 1, height: int = 8, width: int = 8, seed: int = 0) -> dict:
    """A LATENT of smooth random pictures."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(pictures, 4, 3, 3, generator=generator)
    return {"samples": torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic") * 4}
