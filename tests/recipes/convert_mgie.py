"""Convert MGIE's published weights to a folder that Load MGIE reads, once, outside of ComfyUI.

    python tests/recipes/convert_mgie.py --llava LLaVA-7B-v1 --vision clip-vit-large-patch14 \\
        --mllm mgie_7b/mllm.pt --unet mgie_7b/unet.pt --out ComfyUI/models/palimpsest_mgie/mgie_7b
    ... --llama llama-7b --llava-delta LLaVA-Lightning-7B-delta-v1-1        in the place of --llava: adds them first

Needs torch, safetensors and transformers (for tokenizers sentencepiece, too), and as much memory as one file of the
weights. Pickles are read as weights only (torch.load, weights_only=True): no code in them is run. The files that lie in
the folders given are read, nothing is downloaded.

**Licences.** MGIE's weights: CC-BY-NC 4.0, no commercial use; its code: Apple's sample licence. They are differences on
LLaVA (with LLaMA's terms). Whoever converts them answers for having all three.

What is written, in float16: config.json, the tokenizer with [IMG0] to [IMG7], model-*.safetensors with their index,
vision.safetensors, mllm.safetensors, unet.safetensors. LICENCE.txt says the above once more.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

IMAGES = [f"[IMG{i}]" for i in range(8)]
MARKS = ["<im_patch>", "<im_start>", "<im_end>"]
TEXT_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
    "rope_theta",
)  # fmt: skip
LICENCE = """MGIE (https://github.com/apple/ml-mgie): weights under CC-BY-NC 4.0, no commercial use; code under Apple's
sample code licence. They are differences on LLaVA's weights, which are differences on LLaMA's: those terms hold, too.
"""


def pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pt or .bin file, read as weights only."""
    found = torch.load(path, map_location="cpu", weights_only=True)
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def tensors_in(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of either kind."""
    return load_file(path) if path.suffix == ".safetensors" else pickled(path)


def weight_files(folder: Path) -> list[Path]:
    """The files of a model folder's weights. Exits with a sentence where there are none."""
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if found := sorted(folder.glob(pattern)):
            return found
    sys.exit(f"{folder} holds neither model*.safetensors nor pytorch_model*.bin: name the folder of a model.")


def half(tensor: Tensor) -> Tensor:
    """In float16, as one piece of memory of its own."""
    return (tensor.half() if tensor.is_floating_point() else tensor).contiguous().clone()


def added(base: Tensor, delta: Tensor) -> Tensor:
    """base + delta; where the delta has more rows (tokens that were added), the rest of it stands alone."""
    if base.shape == delta.shape:
        return base + delta
    grown = delta.clone()
    grown[tuple(slice(0, length) for length in base.shape)] += base
    return grown


def language_files(llava: Path | None, llama: Path | None, delta: Path | None) -> Iterator[dict[str, Tensor]]:
    """LLaVA's tensors, file by file: as they are, or LLaMA's with the difference added."""
    if llava:
        yield from map(tensors_in, weight_files(llava))
        return
    bases = weight_files(llama)
    for path in weight_files(delta):
        part = tensors_in(path)
        for base in bases:
            part |= {k: added(t.to(part[k].dtype), part[k]) for k, t in tensors_in(base).items() if k in part}
        yield part


def write_language(parts: Iterator[dict[str, Tensor]], out: Path) -> None:
    """model-*.safetensors with an index; LLaVA's copy of the vision tower is left out."""
    table, size = {}, 0
    for number, part in enumerate(parts, 1):
        kept = {k: half(t) for k, t in part.items() if "vision_tower" not in k and not k.endswith("inv_freq")}
        name = f"model-{number:05}.safetensors"
        save_file(kept, out / name, {"format": "pt"})
        table |= dict.fromkeys(kept, name)
        size += sum(tensor.numel() * 2 for tensor in kept.values())
        print(f"{name}: {len(kept)} tensors", flush=True)
    index = {"metadata": {"total_size": size}, "weight_map": table}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def write_vision(folder: Path, out: Path) -> dict:
    """vision.safetensors of a CLIP folder; gives its vision_config."""
    found = {}
    for path in weight_files(folder):
        found |= {k: half(t) for k, t in tensors_in(path).items() if k.startswith("vision_model.")}
    if not found:
        sys.exit(f"{folder} holds no vision_model.*: name a CLIP folder (clip-vit-large-patch14).")
    save_file({k: t for k, t in found.items() if not k.endswith("position_ids")}, out / "vision.safetensors")
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {**said.get("vision_config", said), "model_type": "clip_vision_model"}


def write_tokenizer(folder: Path, out: Path) -> int:
    """LLaVA's tokenizer with the tokens of pictures; gives how many tokens it has."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    known = tokenizer.get_vocab()
    for tokens in (MARKS, IMAGES):
        tokenizer.add_tokens([token for token in tokens if token not in known], special_tokens=True)
    tokenizer.save_pretrained(out)
    return len(tokenizer)


def write_config(llava: Path, vision: dict, tokens: int, out: Path) -> None:
    """config.json in transformers' LlavaConfig."""
    said = json.loads((llava / "config.json").read_text(encoding="utf-8"))
    text = {key: said[key] for key in TEXT_KEYS if said.get(key) is not None}
    text |= {"model_type": "llama", "vocab_size": tokens}
    config = {"model_type": "llava", "text_config": text, "vision_config": vision}
    (out / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def write_trained(mllm: Path, out: Path) -> None:
    """mllm.safetensors: the token table, the language head, the edit head and the embeddings of [IMG0..7]."""
    wanted = re.compile(r"model\.embed_tokens\.weight|lm_head\.weight|model\.mm_projector\..*|edit_head\..*|emb")
    found = {name: half(tensor) for name, tensor in pickled(mllm).items() if wanted.fullmatch(name)}
    lacking = sorted({"emb", "edit_head.query", "lm_head.weight"} - found.keys())
    if lacking:
        sys.exit(f"{mllm} holds no {lacking[0]}: name MGIE's mllm.pt.")
    save_file(found, out / "mllm.safetensors")
    print(f"mllm.safetensors: {len(found)} tensors", flush=True)


def write_unet(unet: Path, out: Path) -> None:
    """unet.safetensors in diffusers' names, as they are."""
    found = {name.removeprefix("unet."): half(tensor) for name, tensor in pickled(unet).items()}
    channels = found["conv_in.weight"].shape[1] if "conv_in.weight" in found else 0
    if channels != 8:
        sys.exit(
            f"{unet} has a first convolution of {channels} channels, InstructPix2Pix's has 8: name MGIE's unet.pt."
        )
    save_file(found, out / "unet.safetensors")
    print(f"unet.safetensors: {len(found)} tensors", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llava", type=Path, help="folder of a LLaVA that was merged already")
    parser.add_argument("--llama", type=Path, help="folder of LLaMA-7B in transformers' form")
    parser.add_argument("--llava-delta", type=Path, help="folder of LLaVA's difference to it")
    parser.add_argument("--vision", type=Path, required=True, help="folder of CLIP ViT-L/14")
    parser.add_argument("--mllm", type=Path, help="MGIE's mllm.pt")
    parser.add_argument("--unet", type=Path, help="MGIE's unet.pt")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    given = parser.parse_args()
    if bool(given.llava) == bool(given.llama and given.llava_delta):
        parser.error("name --llava, or both --llama and --llava-delta")
    given.out.mkdir(parents=True, exist_ok=True)
    described = given.llava or given.llava_delta
    (given.out / "LICENCE.txt").write_text(LICENCE, encoding="utf-8")
    write_config(described, write_vision(given.vision, given.out), write_tokenizer(described, given.out), given.out)
    write_language(language_files(given.llava, given.llama, given.llava_delta), given.out)
    if given.mllm:
        write_trained(given.mllm, given.out)
    if given.unet:
        write_unet(given.unet, given.out)


if __name__ == "__main__":
    main()
