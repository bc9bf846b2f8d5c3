"""Make a .safetensors file of AnyText's pickled checkpoint, once, for Load AnyText.

    python tests/recipes/anytext_to_safetensors.py anytext_v1.1.ckpt [--out anytext_v1.1.safetensors]

It needs the packages torch and safetensors, and no ComfyUI: any Python that has them, such as ComfyUI's own. A pickled
file can run any program when it is opened; here torch reads numbers from it and nothing else (weights_only), and
refuses a file that holds more. Only what Load AnyText reads is kept (control, embeddings, recogniser), in half
precision: of the checkpoint's 5.7 GB some 0.7 GB remain. The file at ModelScope is
damo/cv_anytext_text_generation_editing, anytext_v1.1.ckpt.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

KEPT = ("control_model.", "embedding_manager.", "text_predictor.")


def kept_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights that Load AnyText reads. Raises SystemExit for a file without them, or that is more than weights."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the file leads to
        sys.exit(f"{path.name} was not read, for it is damaged or holds more than weights: {error}")
    found = found.get("state_dict", found) if isinstance(found, dict) else {}
    kept = {
        name: tensor
        for name, tensor in found.items()
        if isinstance(tensor, torch.Tensor) and name.startswith(KEPT) and tensor.is_floating_point()
    }
    if not any(name.startswith(KEPT[0]) for name in kept):
        sys.exit(f"{path.name} has no weight of a control_model: it is no AnyText checkpoint")
    return kept


def halved(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Half precision, each tensor with its own memory."""
    return {name: tensor.detach().half().clone().contiguous() for name, tensor in weights.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make a .safetensors file of AnyText's pickled checkpoint.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, help="default: the same name with .safetensors")
    given = parser.parse_args(arguments)
    out = given.out or given.checkpoint.with_suffix(".safetensors")
    if out.exists():
        sys.exit(f"{out} is there already: move it, or give another name with --out")
    weights = halved(kept_weights(given.checkpoint))
    save_file(weights, out, metadata={"source": given.checkpoint.name})
    print(
        f"{out}: {len(weights)} tensors, {out.stat().st_size / 1e6:.0f} MB; put it into models/palimpsest_text_control"
    )


if __name__ == "__main__":
    main()
