"""The pocket's InstructPix2Pix checkpoint for the host's loader: the pocket's, with the U-Net that was taught to edit.

    python tests/instruction/edit_checkpoint.py --of models/checkpoints/palimpsest_pocket.safetensors --out ...

The U-Net is `bench instruction_training`'s, of 8 channels and half the width; autoencoder and text encoder are the
pocket's own. The latents that both U-Nets know have one mean and one deviation.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a program
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from pocket import checkpoint
from safetensors.torch import load_file, save_file

UNET = Path(__file__).parent / "models" / "unet_edit.safetensors"
PREFIX = "model.diffusion_model."


def write(pocket: Path, out: Path, unet: Path = UNET) -> None:
    """The checkpoint `pocket` with another U-Net, float16."""
    narrow, _ = checkpoint.load_weights(unet)
    wide = {f"{PREFIX}{name}": value.half() for name, value in checkpoint.widen(narrow).items()}
    others = {name: value for name, value in load_file(pocket).items() if not name.startswith(PREFIX)}
    part = out.with_name(f"{out.name}.part")
    save_file(others | wide, part, {"format": "pt"})
    part.chmod(0o644)  # the writer makes files that only their owner can read
    part.replace(out)


def main() -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", type=Path, required=True, help="the pocket's checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors to write")
    options = parser.parse_args()
    write(options.of, options.out)
    print(f"{options.out}  {options.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
