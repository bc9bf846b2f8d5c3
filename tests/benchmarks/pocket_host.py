"""The pocket model inside the host's own classes, in this process, for benchmarks that call the nodes directly.

The narrow U-Net is the same function as the checkpoint's (test_checkpoint.py shows it), and Adam walks the same way on
it (doubled channels get equal gradients), at a quarter of the cost.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent


def parse(parser: argparse.ArgumentParser, threads: int | None = None) -> tuple[argparse.Namespace, Path]:
    """(options, output folder), with --threads and --output, which take effect. threads: as torch has it by default."""
    import torch

    parser.add_argument("--threads", type=int, default=threads or torch.get_num_threads())
    parser.add_argument("--output", default="output/bench")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    return options, output


def load_pocket(narrow: bool = True, weights: Path = TESTS / "pocket" / "weights") -> tuple[Any, Any, Any]:
    """(model, clip, vae) of the pocket checkpoint by the host's loader; `narrow` swaps in the 160-channel U-Net."""
    import folder_paths

    import nodes as host_nodes

    models = Path(os.environ.get("PALIMPSEST_MODELS", ROOT / ".dev" / "models"))
    folder_paths.add_model_folder_path("checkpoints", str(models / "checkpoints"))
    model, clip, vae = host_nodes.CheckpointLoaderSimple().load_checkpoint("palimpsest_pocket.safetensors")
    return (narrow_model(model, weights / "unet.safetensors") if narrow else model), clip, vae


def narrow_model(model: Any, path: Path) -> Any:
    """A ModelPatcher like `model` around the 160-channel U-Net of the file."""
    import comfy.model_patcher
    import torch
    from pocket import checkpoint
    from pocket.train import build_unet

    network, (state, _) = build_unet(), checkpoint.load_weights(path)
    network.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    network.dtype = torch.float32
    base = type(model.model)(model.model.model_config, model.model.model_type, device="cpu")
    base.diffusion_model = network.eval().requires_grad_(False)
    return comfy.model_patcher.CoreModelPatcher(base, model.load_device, model.offload_device)
