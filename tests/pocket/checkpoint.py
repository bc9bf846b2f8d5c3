"""Build the pocket model's checkpoint: a .safetensors in SD1.5's layout that the host's own loader takes.

    python tests/pocket/checkpoint.py --out models/checkpoints/pocket.safetensors
    python tests/pocket/checkpoint.py --edit-of models/checkpoints/pocket.safetensors --out ...     8-channel form
    python tests/pocket/checkpoint.py --hash          rewrite weights/SHA256SUMS after new weights were put there

The shipped weights are a U-Net of half the width the layout asks for and an autoencoder (TAESD's layout); `widen`
doubles the U-Net without changing its function, and the text encoder comes from its seed. A file that was built from
the same weights before is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

if __package__:
    from . import text_encoder
else:  # run as a program: its own folder is on the path
    import text_encoder

WEIGHTS = Path(__file__).parent / "weights"
UNET, AUTOENCODER, SUMS = "unet.safetensors", "autoencoder.safetensors", "SHA256SUMS"
FORMAT = 1  # counts changes of what this program builds from the same weights
RECIPE_KEY = "palimpsest_pocket_recipe"
SD15_LATENT_SCALE = 0.18215  # the host multiplies encoded latents by this


class PocketError(RuntimeError):
    """What went wrong and what to do about it, in one sentence."""


# ------------------------------------------------------------------------------------------------------- widening


def widen(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Double every channel of a U-Net without changing its function (Net2Wider with duplicated channels).

    With y' = [y1, y1, y2, y2, ...] for every feature: a weight's output rows are repeated, its input columns repeated
    and halved. GroupNorm and LayerNorm statistics, GEGLU halves and the number of attention heads stay; queries are
    divided by sqrt(2), for a head of twice the width has dot products twice as large and divides them by sqrt(2 d).
    Not doubled: latent channels, the text's 768 channels and the sinusoidal input of the time embedding.

    float16 or float32 in, float32 out.
    """
    wide = {}
    for name, value in state.items():
        value = value.float()
        if not name.startswith("out.2."):  # its outputs are the latent's channels
            value = value.repeat_interleave(2, 0)
        if value.ndim > 1 and not _reads_fixed_input(name):
            value = value.repeat_interleave(2, 1) / 2
        if name.endswith("to_q.weight"):
            value = value / 2**0.5
        wide[name] = value.contiguous()
    return wide


def widen_lora(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA of the narrow U-Net's attention as one of `widen`'s: its up down is what `widen` makes of the narrow one.

    Rows of up are repeated as rows of a weight are, columns of down as its columns; alpha and rank stay.
    """
    return _of_each_factor(
        state,
        up=lambda rows, query: rows.repeat_interleave(2, 0) / (2**0.5 if query else 1),
        down=lambda columns: columns.repeat_interleave(2, 1) / 2,
    )


def narrow_lora(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The LoRA of which `widen_lora` makes this one."""
    return _of_each_factor(
        state,
        up=lambda rows, query: rows[::2] * (2**0.5 if query else 1),
        down=lambda columns: columns[:, ::2] * 2,
    )


def _of_each_factor(
    state: dict[str, Tensor], up: Callable[[Tensor, bool], Tensor], down: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """`up` of a LoRA's up factors, told which are a query's, and `down` of those down factors that read features."""
    changed = {}
    for name, value in state.items():
        if name.endswith("lora_up.weight"):
            value = up(value, "to_q." in name)
        elif name.endswith("lora_down.weight") and not _reads_fixed_input(name.replace("attn2_to_", "attn2.to_")):
            value = down(value)
        changed[name] = value.contiguous()
    return changed


def with_picture_channels(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint whose U-Net is given a picture beside the latent, as InstructPix2Pix's: 8 channels instead of 4.

    The new columns of the first convolution are zeros, from which its training starts: it draws what it drew before,
    bit for bit, whatever the picture. The host takes it for an InstructPix2Pix model.
    """
    name = "model.diffusion_model.input_blocks.0.0.weight"
    return state | {name: torch.cat([state[name], torch.zeros_like(state[name])], 1)}


def _reads_fixed_input(name: str) -> bool:
    """Whether a layer's input is not a feature: the latent, the text, or the sinusoidal time embedding."""
    return name.startswith(("input_blocks.0.0.", "time_embed.0.")) or "attn2.to_k." in name or "attn2.to_v." in name


# -------------------------------------------------------------------------------------------------- 8-bit weights


def pack(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Store tensors of 2 or more dimensions as int8 with one float16 scale per output channel; others as float16.

    q = round(w / s), s = max |w| of the channel / 127. `name` becomes `name.int8` and `name.scale`.
    """
    packed = {}
    for name, value in state.items():
        if value.ndim < 2:
            packed[name] = value.half()
            continue
        rows = value.float().flatten(1)
        scale = (rows.abs().amax(1) / 127).clamp(min=6e-8).half()  # 6e-8: the smallest float16 above 0
        levels = (rows / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        packed[name + ".int8"], packed[name + ".scale"] = levels.view(value.shape), scale
    return packed


def unpack(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The float16 tensors that `pack` was given, to within half a level; tensors that are not packed pass through."""
    state = {}
    for name, value in packed.items():
        if name.endswith(".int8"):
            scale = packed[name.removesuffix(".int8") + ".scale"].float()
            wide = value.float() * scale.view(-1, *[1] * (value.ndim - 1))
            state[name.removesuffix(".int8")] = wide.half()
        elif not (name.endswith(".scale") and name.removesuffix(".scale") + ".int8" in packed):
            state[name] = value
    return state


# ------------------------------------------------------------------------------------------------------- checkpoint


def assemble(
    unet: dict[str, Tensor], autoencoder: dict[str, Tensor], *, latent_mean: float, latent_std: float
) -> dict[str, Tensor]:
    """The whole checkpoint, under the host's names, float16.

    The U-Net was trained on (z - mean) / std of the encoder's z; the host gives it 0.18215 (z / vae_scale + vae_shift).
    The two are equal with vae_scale = 0.18215 std and vae_shift = -mean / std / 0.18215.
    """
    state = {f"model.diffusion_model.{name}": value.half() for name, value in widen(unet).items()}
    state |= {f"first_stage_model.{name}": value.half().contiguous() for name, value in autoencoder.items()}
    state["first_stage_model.vae_scale"] = torch.tensor(SD15_LATENT_SCALE * latent_std)
    state["first_stage_model.vae_shift"] = torch.tensor(-latent_mean / latent_std / SD15_LATENT_SCALE)
    return state | text_encoder.checkpoint_state_dict()


def build(out: str | Path, weights: str | Path = WEIGHTS) -> bool:
    """Write the checkpoint to `out`; False if it was there already, built from these weights. Raises PocketError."""
    out, weights = Path(out), Path(weights)
    recipe = _recipe(weights)
    if recorded_recipe(out) == recipe:
        return False
    try:
        unet, settings = load_weights(weights / UNET)
        autoencoder, _ = load_weights(weights / AUTOENCODER)
        mean, std = float(settings["latent_mean"]), float(settings["latent_std"])
    except KeyError as error:
        raise PocketError(
            f"{weights / UNET} lacks {error} in its metadata; fetch the repository's weights again."
        ) from None
    state = assemble(unet, autoencoder, latent_mean=mean, latent_std=std)
    _save(state, out, {RECIPE_KEY: recipe, "format": "pt"})
    return True


def build_edit(pocket: str | Path, out: str | Path) -> None:
    """Write the form `with_picture_channels` of a checkpoint to `out`. Raises PocketError."""
    try:
        state = load_file(pocket)
    except (OSError, SafetensorError) as error:
        raise PocketError(f"{pocket} cannot be read ({error}); build the pocket checkpoint first.") from error
    _save(with_picture_channels(state), Path(out), {"format": "pt"})


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (unpacked if they were stored in 8 bits) and metadata of a .safetensors. Raises PocketError."""
    try:
        with safe_open(path, "pt") as file:
            return unpack({name: file.get_tensor(name) for name in file.keys()}), file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise PocketError(f"{path} cannot be read ({error}); fetch the repository's weights again.") from error


def recorded_recipe(path: Path) -> str | None:
    """The recipe a checkpoint was built by, or None where there is no whole checkpoint with one."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(RECIPE_KEY)
    except (OSError, SafetensorError):
        return None


def write_sums(weights: str | Path = WEIGHTS) -> str:
    """Rewrite SHA256SUMS for every .safetensors in the folder; returns its text."""
    weights = Path(weights)
    text = "".join(f"{_sha256(path)}  {path.name}\n" for path in sorted(weights.glob("*.safetensors")))
    (weights / SUMS).write_text(text, encoding="ascii")
    return text


def _recipe(weights: Path) -> str:
    """What a checkpoint depends on, after the weights' sums were checked."""
    sums = _read_sums(weights)
    for name in (UNET, AUTOENCODER):
        path = weights / name
        if not path.is_file():
            raise PocketError(f"{path} is missing; fetch the repository's weights again.")
        if name not in sums:
            raise PocketError(f"{weights / SUMS} has no line for {name}; run `checkpoint.py --hash` if it is new.")
        if _sha256(path) != sums[name]:
            raise PocketError(
                f"{path} does not match {SUMS}; fetch the repository's weights again, or run `checkpoint.py --hash` "
                "if you replaced them on purpose."
            )
    used = {name: sums[name] for name in (UNET, AUTOENCODER)}
    return json.dumps({"format": FORMAT, "text_encoder_seed": text_encoder.SEED, **used}, sort_keys=True)


def _read_sums(weights: Path) -> dict[str, str]:
    try:
        lines = (weights / SUMS).read_text(encoding="ascii").split("\n")
    except OSError:
        raise PocketError(f"{weights / SUMS} is missing; fetch the repository's weights again.") from None
    pairs = (line.split() for line in lines if line.strip())
    return {name: digest for digest, name in pairs}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _save(state: dict[str, Tensor], out: Path, metadata: dict[str, str]) -> None:
    """Write beside `out`, then rename: whoever looks finds the old file or the whole new one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(value.nbytes for value in state.values())
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise PocketError(
            f"{out.parent} has {free / 1e6:.0f} MB free, the checkpoint needs {needed / 1e6:.0f} MB; free some space."
        )
    temporary = out.with_name(f"{out.name}.{os.getpid()}.part")
    try:
        save_file(state, temporary, metadata)
        temporary.chmod(0o644)  # the writer makes files that only their owner can read
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        raise PocketError(f"{out} could not be written ({error}); free some space or choose another folder.") from error
    finally:
        temporary.unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the pocket model's checkpoint.")
    parser.add_argument("--out", type=Path, help="the .safetensors to write")
    parser.add_argument("--edit-of", type=Path, help="write that checkpoint as an InstructPix2Pix model of 8 channels")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the shipped weights")
    parser.add_argument("--hash", action="store_true", help="rewrite SHA256SUMS for the weights that are there")
    options = parser.parse_args()
    if not (options.out or options.hash):
        parser.error("say what to do: --out PATH or --hash")
    try:
        if options.hash:
            print(write_sums(options.weights), end="")
        if options.out and options.edit_of:
            build_edit(options.edit_of, options.out)
        elif options.out:
            built = build(options.out, options.weights)
            print(f"{options.out}: {'written' if built else 'up to date'} ({options.out.stat().st_size / 1e6:.1f} MB)")
    except PocketError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
