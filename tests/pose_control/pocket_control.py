"""The pocket's pose ControlNet: the host's own class, half as wide as its checkpoint asks for, packed, and as a file.

    python tests/pose_control/pocket_control.py --out models/controlnet/palimpsest_pocket_pose.safetensors

It is a copy of the first half of the U-Net that a skeleton's features are added to. Stored is what a training changed:
the layers that read the skeleton, the zero convolutions, and low-rank changes of the copied convolutions.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a program
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from pocket import checkpoint, text_encoder, train
from torch import Tensor, nn
from torch.nn.utils import parametrize

WEIGHTS = Path(__file__).parent / "weights" / "pocket.safetensors"
OWN = ("input_hint_block.", "zero_convs.", "middle_block_out.")  # what the U-Net has not
COPIED = ("time_embed.", "input_blocks.", "middle_block.")
SAME_WIDTH = tuple(f"input_hint_block.{i}." for i in range(0, 14, 2))  # they are as wide in every ControlNet
HINT_OUT = "input_hint_block.14."
TEMPERATE = 320  # sinusoids that the time embedding of the full layout reads; the narrow one reads as many
RANK = 32


class LowRank(nn.Module):
    """Parametrization of a convolution: W + up down, up (out, rank) zeros at first, down (rank, in * h * w)."""

    def __init__(self, weight: Tensor, rank: int = RANK):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(len(weight), rank))
        self.down = nn.Parameter(torch.randn(rank, weight[0].numel()) / weight[0].numel() ** 0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight."""
        return weight + (self.up @ self.down).view_as(weight)


def build(width: int = train.WIDTH) -> nn.Module:
    """The host's ControlNet for the pocket's U-Net, its weights not filled; narrow as train.build_unet is."""
    train.import_host()
    import comfy.cldm.cldm
    import comfy.ops

    network = comfy.cldm.cldm.ControlNet(
        image_size=32, in_channels=4, hint_channels=3, model_channels=width, channel_mult=[1, 1],
        num_res_blocks=[1, 1], transformer_depth=[1, 1], transformer_depth_middle=1, num_heads=8,
        context_dim=text_encoder.WIDTH, use_spatial_transformer=True, legacy=False, dtype=torch.float32, device="cpu",
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    if width != TEMPERATE:
        network.model_channels = TEMPERATE
        network.time_embed[0] = comfy.ops.disable_weight_init.Linear(TEMPERATE, 4 * width)
    return network


def changed_convolutions(network: nn.Module) -> dict[str, nn.Module]:
    """The copied 3 x 3 convolutions after the first, which training changes."""
    return {
        name: module
        for name, module in network.named_modules()
        if name.startswith(("input_blocks.", "middle_block.")) and name != "input_blocks.0.0"
        if getattr(module, "kernel_size", None) == (3, 3)
    }


def begun(unet: dict[str, Tensor], seed: int) -> nn.Module:
    """The ControlNet as a training starts: a copy of the U-Net, low-rank changes and zero convolutions at 0.

    The layers that read the skeleton start larger than torch's own, or sticks fade through eight of them.
    """
    network = build()
    torch.manual_seed(seed)
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and name.startswith(OWN):
            nn.init.zeros_(module.bias)
            nn.init.zeros_(module.weight)
            if name.startswith("input_hint_block."):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                module.weight.data *= 0.3 if name + "." == HINT_OUT else 1.15  # SiLU passes on less than ReLU
    own = {name: value for name, value in network.state_dict().items() if name.startswith(OWN)}
    network.load_state_dict(copied(unet) | own)
    network.requires_grad_(False)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(OWN))
    for module in changed_convolutions(network).values():
        parametrize.register_parametrization(module, "weight", LowRank(module.weight))
    return network


def copied(unet: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the ControlNet has of a U-Net."""
    return {name: value.float() for name, value in unet.items() if name.startswith(COPIED)}


def save(path: Path, trained: dict[str, Tensor], told: dict[str, str]) -> None:
    """Store what was trained in 8 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    train.save_weights(path, checkpoint.pack(trained), told)


def load(path: Path = WEIGHTS) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(weights of the narrow ControlNet in float32, what the file says of itself)."""
    trained, told = checkpoint.load_weights(path)
    unet, _ = checkpoint.load_weights(checkpoint.WEIGHTS / checkpoint.UNET)
    state = copied(unet) | {name: value.float() for name, value in trained.items() if name.startswith(OWN)}
    part = ".parametrizations.weight.0."
    for name in [name for name in trained if name.endswith(part + "up")]:
        module = name.removesuffix(part + "up")
        change = trained[name].float() @ trained[f"{module}{part}down"].float()
        state[module + ".weight"] = state[module + ".weight"] + change.view_as(state[module + ".weight"])
    return state, told


def widen(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The ControlNet of the full width that says the same: as checkpoint.widen, but most of the hint block stays."""
    same = {name: value.float() for name, value in state.items() if name.startswith(SAME_WIDTH)}
    last = {name: v.float().repeat_interleave(2, 0) for name, v in state.items() if name.startswith(HINT_OUT)}
    rest = {name: value for name, value in state.items() if name not in same and name not in last}
    return checkpoint.widen(rest) | same | last


def narrow(path: Path = WEIGHTS) -> Any:
    """CONTROL_NET for the narrow U-Net of the benchmarks."""
    network = build()
    network.load_state_dict(load(path)[0])
    return hosted(network)


def hosted(network: nn.Module) -> Any:
    """A ControlNet of the host's around a network."""
    import comfy.controlnet
    import comfy.model_management

    device = comfy.model_management.get_torch_device()
    return comfy.controlnet.ControlNet(network.eval().requires_grad_(False), load_device=device)


def write_full(out: Path, path: Path = WEIGHTS) -> None:
    """The ControlNet for the pocket's checkpoint, as the host's loader takes it, float16."""
    from safetensors.torch import save_file

    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in widen(load(path)[0]).items()}, out, {"format": "pt"})
    out.chmod(0o644)  # the writer makes files that only their owner can read


def main() -> int:
    """Write the file for the pocket's checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors to write")
    out = parser.parse_args().out
    write_full(out)
    print(f"{out}  {out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
