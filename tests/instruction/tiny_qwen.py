"""A small random Qwen3-VL of the host's own classes: a CLIP that sees and writes, as Load CLIP gives it."""

from __future__ import annotations

import torch

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "deepstack_visual_indexes": [0], "num_heads": 2}


def clip(monkeypatch, seed: int = 0):
    """A comfy.sd.CLIP of a few hundred numbers a layer; the host's tables of sizes are put back with the test."""
    import comfy.sd
    import comfy.supported_models_base
    from comfy.text_encoders import qwen3vl

    kind = "qwen3vl_4b"
    config = qwen3vl.QWEN3VL_CONFIGS[kind]
    monkeypatch.setitem(qwen3vl.QWEN3VL_CONFIGS, kind, lambda **more: config(**more | TEXT))
    monkeypatch.setitem(qwen3vl.QWEN3VL_VISION, kind, VISION)
    torch.manual_seed(seed)
    target = comfy.supported_models_base.ClipTarget(
        qwen3vl.tokenizer(model_type=kind), qwen3vl.te(dtype_llama=torch.float32, model_type=kind)
    )
    made = comfy.sd.CLIP(target, parameters=1)
    with torch.no_grad():
        for name, parameter in made.cond_stage_model.named_parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.0
            parameter.copy_(torch.randn(parameter.shape) * scale + (scale == 0.0 and "bias" not in name))
    return made
