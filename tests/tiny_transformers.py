"""Small random transformers of the host's own classes: every family whose attention we know, without files.

Sizes that the host's detection would not take for one of its families are given to its classes directly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

CPU = torch.device("cpu")
HEAD = 128  # channels of a head in all families but SD 3


@dataclass(frozen=True)
class Tiny:
    """A family: its name in comfy.supported_models and comfy.model_base, its network, and what such a model gets."""

    config: str
    kind: str
    network: str
    text: int
    pooled: int = 0
    channels: int = 16
    frames: bool = False
    side: tuple[int, int] = (12, 8)
    layout: Any = None


def flux(**given) -> dict:
    usual = {
        "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 48, "hidden_size": HEAD,
        "mlp_ratio": 2.0, "num_heads": 1, "depth": 2, "depth_single_blocks": 2, "axes_dim": [16, 56, 56],
        "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
    }  # fmt: skip
    return usual | given


FLUX2 = flux(
    in_channels=128, out_channels=128, vec_in_dim=None, axes_dim=[32] * 4, theta=2000, patch_size=1, qkv_bias=False,
    guidance_embed=False, txt_ids_dims=[3], global_modulation=True, mlp_silu_act=True, ops_bias=False,
    default_ref_method="index", ref_index_scale=10.0,
)  # fmt: skip
CHROMA = {
    "in_channels": 64, "out_channels": 64, "context_in_dim": 48, "hidden_size": HEAD, "mlp_ratio": 2.0, "num_heads": 1,
    "depth": 2, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True,
    "in_dim": 64, "out_dim": HEAD, "hidden_dim": 32, "n_layers": 1, "txt_ids_dims": [], "vec_in_dim": None,
}  # fmt: skip
SD3 = {
    "input_size": None, "patch_size": 2, "in_channels": 16, "out_channels": 16, "depth": 2, "adm_in_channels": 32,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 128}},
    "num_patches": 32 * 32, "pos_embed_max_size": 32, "qk_norm": "rms", "pos_embed_scaling_factor": None,
}  # fmt: skip
QWEN = {
    "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 2, "attention_head_dim": HEAD,
    "num_attention_heads": 1, "joint_attention_dim": 48,
}  # fmt: skip
LUMINA = {
    "patch_size": 2, "in_channels": 16, "dim": HEAD, "n_layers": 2, "n_refiner_layers": 2, "n_heads": 1,
    "n_kv_heads": 1, "qk_norm": True, "cap_feat_dim": 48, "axes_dims": [32, 48, 48], "axes_lens": [300, 512, 512],
    "ffn_dim_multiplier": 2.0, "multiple_of": 32,
}  # fmt: skip
Z_IMAGE = LUMINA | {
    "dim": 256, "n_heads": 2, "n_kv_heads": 2,
    "rope_theta": 256.0, "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
}  # fmt: skip

FAMILIES = {
    "flux": Tiny("Flux", "Flux", "flux.model.Flux", 48, 32, layout=flux()),
    "flux2": Tiny("Flux2", "Flux2", "flux.model.Flux", 48, 32, channels=128, side=(6, 4), layout=FLUX2),
    "chroma": Tiny("Chroma", "Chroma", "chroma.model.Chroma", 48, 32, layout=CHROMA),
    "sd3": Tiny("SD3", "SD3", "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper", 48, 32, layout=SD3),
    "sd35m": Tiny(
        "SD3", "SD3", "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper", 48, 32,
        layout=SD3 | {"x_block_self_attn_layers": [0]},
    ),
    "qwen": Tiny(
        "QwenImage", "QwenImage", "qwen_image.model.QwenImageTransformer2DModel", 48, frames=True, layout=QWEN
    ),
    "zimage": Tiny("ZImage", "Lumina2", "lumina.model.NextDiT", 48, layout=Z_IMAGE),
    "lumina2": Tiny("Lumina2", "Lumina2", "lumina.model.NextDiT", 48, layout=LUMINA),
}  # fmt: skip


WAN = {
    "model_type": "t2v", "in_dim": 16, "out_dim": 16, "dim": HEAD, "ffn_dim": 256, "freq_dim": 64, "text_dim": 48,
    "num_heads": 1, "num_layers": 2,
}  # fmt: skip
ANIMA = {
    "max_img_h": 64, "max_img_w": 64, "max_frames": 8, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": HEAD, "num_blocks": 2, "num_heads": 1, "mlp_ratio": 2.0,
    "crossattn_emb_channels": 48, "pos_emb_cls": "rope3d", "use_adaln_lora": True, "adaln_lora_dim": 32,
}  # fmt: skip
APART = {  # text and picture have attentions of their own
    "wan": Tiny("WAN21_T2V", "WAN21", "wan.model.WanModel", 48, frames=True, layout=WAN),
    "wan22": Tiny(
        "WAN22_T2V", "WAN22", "wan.model.WanModel", 48, channels=48, frames=True, side=(12, 8),
        layout=WAN | {"in_dim": 48, "out_dim": 48},
    ),
    "anima": Tiny("Anima", "Anima", "anima.model.Anima", 48, frames=True, layout=ANIMA),
}  # fmt: skip
EVERY = FAMILIES | APART
ADAPTER = {"source_dim": 48, "target_dim": 48, "model_dim": 64, "num_layers": 1, "num_heads": 1}


def network_of(tiny: Tiny) -> torch.nn.Module:
    """A family's network; that of Anima with a small text adapter in the place of its own, which has one size."""
    import importlib

    import comfy.ops

    module, _, name = f"comfy.ldm.{tiny.network}".rpartition(".")
    given = {"dtype": torch.float32, "device": CPU, "operations": comfy.ops.disable_weight_init}
    module = importlib.import_module(module)
    if tiny.kind != "Anima":
        return getattr(module, name)(**tiny.layout, **given)
    network = module.Anima(**tiny.layout, **given | {"device": torch.device("meta")})
    network.llm_adapter = module.LLMAdapter(**ADAPTER, **given)
    network = network.to_empty(device=CPU)
    network.llm_adapter.rotary_emb = module.RotaryEmbedding(ADAPTER["model_dim"])
    network.build_pos_embed(device=CPU)
    return network


def tells_blocks() -> bool:
    """Whether the host tells the attention of Anima's blocks their number; there is an Anima at all."""
    try:
        import comfy.ldm.anima.model
    except ImportError:
        return False
    forward = comfy.ldm.anima.model.MiniTrainDIT._forward
    return "block_index" in forward.__code__.co_consts


def require_blocks(family: str) -> None:
    """Skip a test of a family whose attention this host does not tell its block."""
    if family == "anima" and not tells_blocks():
        pytest.skip("this ComfyUI does not tell Anima's attention which block it is in: 0.30 does")


def fill(network: torch.nn.Module, seed: int) -> None:
    """Random weights of a size that keeps activations near 1, and words strong enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.state_dict().items():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim >= 2:
            weight.copy_(noise / weight[0].numel() ** 0.5)
        elif "norm" in name or "scale" in name or name.split(".")[-2] in ("ln_q", "ln_k"):
            weight.copy_(1 + 0.1 * noise)
        else:
            weight.copy_(0.02 * noise)


def model(family: str, seed: int = 0, inference: bool = True):
    """A ModelPatcher around a small random transformer of a family of EVERY, as the host's loaders make it."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    tiny = EVERY[family]
    require_blocks(family)
    with torch.inference_mode(inference):
        network = network_of(tiny)
        config = getattr(comfy.supported_models, tiny.config)({"image_model": family, "dim": HEAD, "hidden_size": HEAD})
        config.unet_config = {"disable_unet_model_creation": True, "dtype": torch.float32, "in_channels": tiny.channels,
                              "out_channels": tiny.channels}  # fmt: skip
        made = getattr(comfy.model_base, tiny.kind)(config, device=CPU)
        fill(network, seed)
        made.diffusion_model = network
    return comfy.model_patcher.ModelPatcher(made.eval(), load_device=CPU, offload_device=CPU)


def controlnet(seed: int = 7):
    """A random ControlNet for FLUX, which reads a picture, as the host's loader makes it."""
    import comfy.controlnet
    import comfy.ldm.flux.controlnet
    import comfy.ops

    with torch.inference_mode():
        network = comfy.ldm.flux.controlnet.ControlNetFlux(
            **flux(), dtype=torch.float32, device=CPU, operations=comfy.ops.disable_weight_init
        )
        fill(network, seed)
    return comfy.controlnet.ControlNet(network.eval(), load_device=CPU, extra_conds=["y", "guidance"])


def prompt(family: str, seed: int, tokens: int = 9, **more: Any) -> list:
    """A CONDITIONING of random tokens, with a pooled output where the family, or an older host, asks for it."""
    tiny, generator = EVERY[family], torch.Generator().manual_seed(seed)
    text = torch.randn(1, tokens, tiny.text, generator=generator)
    extra = {"pooled_output": torch.randn(1, tiny.pooled, generator=generator)} if tiny.pooled else {}
    return [[text, extra | more]]


def latent(family: str, pictures: int = 1, side: tuple[int, int] | None = None, frames: int = 1) -> torch.Tensor:
    """An empty latent (B, C, H, W), of models for clips (B, C, frames, H, W)."""
    tiny = EVERY[family]
    return torch.zeros(pictures, tiny.channels, *((frames,) if tiny.frames else ()), *(side or tiny.side))


def sample(model: Any, positive: list, negative: list, empty: torch.Tensor, **settings: Any) -> torch.Tensor:
    """The host's own sampler on an empty latent, from a seed's noise or from `noise`."""
    import comfy.sample
    import comfy.samplers

    chosen = {"steps": 2, "cfg": 3.0, "seed": 1} | settings
    sampling = comfy.samplers.KSampler(model, chosen["steps"], CPU, "euler", "simple")
    noise = chosen["noise"] if "noise" in chosen else comfy.sample.prepare_noise(empty, chosen["seed"])
    given = {"cfg": chosen["cfg"], "latent_image": empty, "disable_pbar": True, "seed": chosen["seed"]}
    return sampling.sample(noise, positive, negative, **given)


def own_run(
    model: Any, family: str, pictures: int = 1, seed: int = 1, tokens: int = 9, frames: int = 1, **settings: Any
) -> tuple:
    """(the trajectory of the model's own run down, what it draws): the source's levels meet an edit's exactly."""
    from comfy.patcher_extension import WrappersMP
    from palimpsest.nodes import host

    found, given = [], {"steps": 3, "cfg": 1.0, "seed": seed} | settings

    def keep(executor, x, timestep, *args, **kwargs):
        found.append((float(timestep.flatten()[0]), x.clone()))
        return executor(x, timestep, *args, **kwargs)

    looked = model.clone()
    looked.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "keep", keep)
    positive = prompt(family, 1, tokens)
    out = sample(looked, positive, prompt(family, 2), latent(family, pictures, frames=frames), **given)
    latents = [x.squeeze(2) if x.ndim == 5 else x for _, x in found]
    clean = model.model.process_latent_in(out.clone())
    latents.append(clean.squeeze(2) if clean.ndim == 5 else clean)
    trajectory = host.Trajectory(
        sigmas=(*(sigma for sigma, _ in found), 0.0),
        latents=torch.stack(latents).float(),
        guidance=1.0,
        prompt=host.conditioning_fingerprint(positive),
        layout=host.layout_fingerprint(model),
        flow=True,
    )
    return trajectory, out
