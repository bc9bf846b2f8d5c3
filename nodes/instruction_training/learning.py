"""What of a model learns instructions: low-rank factors and the first convolution, or every weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import feature_blend, lora, training
from ..host import widening
from ..training.optimisers import Learning
from .blending import Alphas
from .head import LearningHead
from .settings import HEAD_ALONE, LORA, TECHNIQUE, WHOLE, InstructionSettings

FIRST = "input_blocks.0.0"  # the convolution that reads the picture
FIRST_IN_FILES = "lora_unet_conv_in.diff"  # as the host's LoRA loaders know a whole change of it
PREFIX = "diffusion_model."


@dataclass(frozen=True, eq=False)
class Parts:
    """What is trained. names: kohya's of the layers with factors; none where every weight is trained.

    factors: "unet"; "first" where the picture's channels are blank and a LoRA alone would leave them so; "blend" where
    Feature Blend's weights learn beside; "head" where an edit head does, or alone.
    """

    factors: dict[str, Learning]
    names: dict[str, str]

    @classmethod
    def of(cls, model: Any, settings: InstructionSettings, head: LearningHead | None = None) -> Parts:
        """Those of a MODEL with picture channels, and the edit head that learns beside. Raises ValueError for none."""
        if settings.method == HEAD_ALONE and head is None:
            raise ValueError(f"method '{HEAD_ALONE}' trains an edit head: connect edit_head (Load MGIE).")
        with torch.inference_mode(False):  # so that they can have a gradient
            made = {LORA: cls.lora_of, WHOLE: cls.whole_of, HEAD_ALONE: cls.none_of}[settings.method](model, settings)
            if head is not None:
                made.factors["head"] = head
            if settings.blend_layers.strip():
                present = feature_blend.feature_layers(model, TECHNIQUE)
                layers = feature_blend.chosen(settings.blend_layers.strip(), present)
                made.factors["blend"] = Alphas([layer for layer in layers if layer.key != ("input", 1)])
        return made

    @classmethod
    def none_of(cls, model: Any, settings: InstructionSettings) -> Parts:
        """None of its own."""
        return cls({}, {})

    @classmethod
    def whole_of(cls, model: Any, settings: InstructionSettings) -> Parts:
        """Every weight."""
        return cls({"unet": training.Changes(shapes_of(model.model.diffusion_model))}, {})

    @classmethod
    def lora_of(cls, model: Any, settings: InstructionSettings) -> Parts:
        """Factors of layers, and the first convolution where it has not learned to see the picture yet."""
        network, found = model.model.diffusion_model, {}
        names = lora.unet_layers(model, settings.convolutions)
        if widening.is_blank(model):
            names.pop(FIRST, None)
            found["first"] = training.Changes.of(network, [f"{FIRST}.weight"])
        layers = training.weighted_layers(network, names)
        return cls({"unet": training.Factors(layers, settings.rank, settings.seed, settings.alpha), **found}, names)

    @property
    def is_lora(self) -> bool:
        """Whether the file is a LoRA."""
        return bool(self.names)

    @property
    def blend(self) -> Alphas | None:
        """Feature Blend's weights, where they learn beside."""
        return self.factors.get("blend")

    @property
    def head(self) -> LearningHead | None:
        """The edit head, where it learns."""
        return self.factors.get("head")

    @property
    def has_unet(self) -> bool:
        """Whether anything of the model itself learns."""
        return "unet" in self.factors

    @property
    def numbers(self) -> int:
        """How many numbers are trained."""
        return sum(tensor.numel() for found in self.factors.values() for tensor in found.parameters())

    def act_in(self, patched: Any) -> None:
        """Let them act in a clone."""
        for found in self.factors.values():
            if isinstance(found, training.Changes):
                training.changes_act_in_unet(patched, found)
            elif isinstance(found, training.Factors):
                training.act_in_unet(patched, found)

    # ---- what comes of them

    def lora(self) -> dict[str, Tensor]:
        """A LoRA as kohya's programs and the host's loaders read it, in half precision."""
        found = self.factors["unet"].file(self.names.__getitem__)
        found = {key: tensor if key.endswith(".alpha") else tensor.half() for key, tensor in found.items()}
        if "first" in self.factors:
            found[FIRST_IN_FILES] = self.factors["first"].learned()[f"{FIRST}.weight"].half()
        return found

    def on(self, model: Any) -> Any:
        """The MODEL with them on, by the host's own patches."""
        import comfy.sd

        if not self.has_unet:
            return model.clone()
        if self.is_lora:
            return comfy.sd.load_lora_for_models(model, None, self.lora(), 1.0, 0.0)[0]
        changed = model.clone()
        learned = self.factors["unet"].learned()
        changed.add_patches({f"{PREFIX}{name}": ("diff", (change,)) for name, change in learned.items()})
        return changed


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every weight that the host lets a wrapper change, by name."""
    return {
        f"{name}.{key}": tuple(parameter.shape)
        for name, module in network.named_modules()
        if hasattr(module, "weight_function")
        for key, parameter in module.named_parameters(recurse=False)
    }


def unet_file(model: Any) -> dict[str, Tensor]:
    """A MODEL's U-Net with its patches in it, as the host's loaders and Save Model name its weights."""
    import comfy.lora

    found = {}
    for name, weight in widening.original_weights(model).items():
        patches = model.patches.get(name)
        if patches:
            wide = weight.detach().to("cpu", torch.float32, copy=True)
            weight = comfy.lora.calculate_weight(patches, wide, name).to(weight.dtype)
        found[name.removeprefix(PREFIX)] = saved(weight)
    return model.model.state_dict_for_saving(found)


def saved(weight: Tensor) -> Tensor:
    """A weight as files hold it: half precision, or bfloat16 where the model has that."""
    plain = weight.detach().cpu()
    return plain.half() if plain.dtype == torch.float32 else plain.clone()
