"""The pocket transformer's files: trained weights, for the loaders of diffusion models, text encoders and VAEs.

    python tests/pocket/flow_files.py --out models

A FLUX.1 layout without pooled vector (transformer.build), whose text is CLIP-L's, the pocket's own text encoder alone,
and an autoencoder of 16 channels in TAESD's layout.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

if __package__:
    from . import checkpoint, text_encoder
else:  # run as a program: its own folder is on the path
    import checkpoint
    import text_encoder

TRANSFORMER, AUTOENCODER = "transformer.safetensors", "autoencoder16.safetensors"
LATENT_SCALE, LATENT_SHIFT = 0.3611, 0.1159  # the host gives a FLUX.1 model (latent - shift) scale
FILES = {
    "diffusion_models": "palimpsest_pocket_flux.safetensors",
    "text_encoders": "palimpsest_pocket_clip.safetensors",
    "vae": "palimpsest_pocket_vae16.safetensors",
}


def vae_state_dict(autoencoder: dict[str, Tensor], *, latent_mean: float, latent_std: float) -> dict[str, Tensor]:
    """The autoencoder under the host's names, float16.

    The transformer was trained on (z - mean) / std of the encoder's z; the host gives it
    scale (z / vae_scale + vae_shift - shift). The two are equal with vae_scale = scale std and
    vae_shift = shift - mean / std / scale.
    """
    state = {name: value.half().contiguous() for name, value in autoencoder.items()}
    state["vae_scale"] = torch.tensor(LATENT_SCALE * latent_std)
    state["vae_shift"] = torch.tensor(LATENT_SHIFT - latent_mean / latent_std / LATENT_SCALE)
    return state


def write(folder: Path, weights: Path = checkpoint.WEIGHTS) -> list[Path]:
    """The three files, in the folders of the host's models. Raises PocketError."""
    prefix = "cond_stage_model.transformer."
    text = {name.removeprefix(prefix): value for name, value in text_encoder.checkpoint_state_dict().items()}
    transformer, settings = checkpoint.load_weights(weights / TRANSFORMER)
    autoencoder, _ = checkpoint.load_weights(weights / AUTOENCODER)
    latents = {name: float(settings[name]) for name in ("latent_mean", "latent_std")}
    made = {"diffusion_models": transformer, "text_encoders": text, "vae": vae_state_dict(autoencoder, **latents)}
    written = []
    for kind, state in made.items():
        written.append(folder / kind / FILES[kind])
        written[-1].parent.mkdir(parents=True, exist_ok=True)
        save_file(state, written[-1])
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a models folder in ComfyUI's layout")
    parser.add_argument("--weights", type=Path, default=checkpoint.WEIGHTS, help="folder of the trained weights")
    options = parser.parse_args()
    try:
        written = write(options.out, options.weights)
    except checkpoint.PocketError as error:
        print(error, file=sys.stderr)
        return 1
    for path in written:
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
