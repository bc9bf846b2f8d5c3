"""Small random files in the layout of flow-matching models, for the loaders of diffusion models, text encoders, VAEs.

    python tests/pocket/flow_files.py --out models

A FLUX.1 layout without pooled vector (one block of each kind, 128 wide), whose text is CLIP-L's, the pocket's own text
encoder alone, and an autoencoder of 16 channels in TAESD's layout. They draw nothing to look at: workflows of such
models run with them in the tests.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

if __package__:
    from . import autoencoder, text_encoder
else:  # run as a program: its own folder is on the path
    import autoencoder
    import text_encoder

WIDTH, CHANNELS, PATCH = 128, 16, 2
FILES = {
    "diffusion_models": "palimpsest_pocket_flux.safetensors",
    "text_encoders": "palimpsest_pocket_clip.safetensors",
    "vae": "palimpsest_pocket_vae16.safetensors",
}


def flux_shapes() -> dict[str, tuple[int, ...]]:
    """Every weight of the transformer by its name in published files; linear layers have a bias as well."""
    tokens, c = CHANNELS * PATCH * PATCH, WIDTH
    linear = {
        "img_in": (c, tokens),
        "txt_in": (c, text_encoder.WIDTH),
        "time_in.in_layer": (c, 256),
        "time_in.out_layer": (c, c),
        "single_blocks.0.linear1": (7 * c, c),
        "single_blocks.0.linear2": (c, 5 * c),
        "single_blocks.0.modulation.lin": (3 * c, c),
        "final_layer.linear": (tokens, c),
        "final_layer.adaLN_modulation.1": (2 * c, c),
    }
    for side in ("img", "txt"):
        linear |= {
            f"double_blocks.0.{side}_mod.lin": (6 * c, c),
            f"double_blocks.0.{side}_attn.qkv": (3 * c, c),
            f"double_blocks.0.{side}_attn.proj": (c, c),
            f"double_blocks.0.{side}_mlp.0": (4 * c, c),
            f"double_blocks.0.{side}_mlp.2": (c, 4 * c),
        }
    shapes = {f"{name}.weight": shape for name, shape in linear.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    for place in ("double_blocks.0.img_attn", "double_blocks.0.txt_attn", "single_blocks.0"):
        shapes |= {f"{place}.norm.{kind}_norm.scale": (c,) for kind in ("query", "key")}
    return shapes


def flux_state_dict(seed: int = 0) -> dict[str, Tensor]:
    """Random weights that keep activations near 1, in float16."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, shape in sorted(flux_shapes().items()):
        spread = shape[-1] ** -0.5 if len(shape) > 1 else 0.02
        noise = torch.randn(shape, generator=generator) * spread
        state[name] = (1 + noise if name.endswith("scale") else noise).half()
    return state


def vae_state_dict(seed: int = 0) -> dict[str, Tensor]:
    """An untrained autoencoder of 16 channels."""
    model = autoencoder.Autoencoder(CHANNELS)
    model.initialise(seed)
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    return state | {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}


def write(folder: Path) -> list[Path]:
    """The three files, in the folders of the host's models."""
    prefix = "cond_stage_model.transformer."
    text = {name.removeprefix(prefix): value for name, value in text_encoder.checkpoint_state_dict().items()}
    made = {"diffusion_models": flux_state_dict(), "text_encoders": text, "vae": vae_state_dict()}
    written = []
    for kind, state in made.items():
        written.append(folder / kind / FILES[kind])
        written[-1].parent.mkdir(parents=True, exist_ok=True)
        save_file(state, written[-1])
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a models folder in ComfyUI's layout")
    for path in write(parser.parse_args().out):
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
