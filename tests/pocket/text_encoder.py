"""The pocket model's text encoder: CLIP-L's layout, filled from a seed, never trained.

A U-Net can learn to read any injective encoding of short captions, so 246 MB of weights come from one number. Layer 0
is a random attention layer that mixes the words; layers 1 to 11 add nothing (their last projections are zero), so the
host's "CLIP set last layer" works and the last hidden state equals the first layer's. Random matrices are Toeplitz
(each row is the one above, shifted), drawn from numpy's PCG64, so every platform builds the same ones.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH, VOCABULARY, LENGTH, HIDDEN, LAYERS, HEADS = 768, 49408, 77, 3072, 12, 12
END_OF_TEXT = 49407  # also pads
SEED = 2026
CHECKPOINT_PREFIX = "cond_stage_model.transformer.text_model."
FIRST_VALUES = (-0.7930, 0.2406, -1.8965, 1.3955)  # of the token table; tells a generator that draws other numbers


def toeplitz(rng: np.random.Generator, rows: int, columns: int, std: float) -> Tensor:
    """float16 (rows, columns) with M[i, j] = r[i + j], r ~ N(0, std^2): a view of rows + columns - 1 numbers."""
    numbers = (rng.standard_normal(rows + columns - 1) * std).astype(np.float16)
    return torch.from_numpy(numbers).as_strided((rows, columns), (1, 1))


def state_dict(seed: int = SEED) -> dict[str, Tensor]:
    """The encoder's tensors under the host's names, without prefix: float16 views of a few small buffers."""
    rng = np.random.Generator(np.random.PCG64(seed))
    state = {
        "embeddings.token_embedding.weight": toeplitz(rng, VOCABULARY, WIDTH, 1.0),
        "embeddings.position_embedding.weight": toeplitz(rng, LENGTH, WIDTH, 0.2),
        **_norm("final_layer_norm"),
    }
    for layer in range(LAYERS):
        prefix = f"encoder.layers.{layer}."
        state |= _norm(prefix + "layer_norm1") | _norm(prefix + "layer_norm2")
        for name, gain in (("q_proj", 0.9), ("k_proj", 0.9), ("v_proj", 1.0), ("out_proj", 1.0)):
            weight = toeplitz(rng, WIDTH, WIDTH, gain / WIDTH**0.5) if layer == 0 else _zeros(WIDTH, WIDTH)
            state[f"{prefix}self_attn.{name}.weight"] = weight
            state[f"{prefix}self_attn.{name}.bias"] = _zeros(WIDTH)
        state |= {prefix + "mlp.fc1.weight": _zeros(HIDDEN, WIDTH), prefix + "mlp.fc1.bias": _zeros(HIDDEN)}
        state |= {prefix + "mlp.fc2.weight": _zeros(WIDTH, HIDDEN), prefix + "mlp.fc2.bias": _zeros(WIDTH)}
    return state


def checkpoint_state_dict(seed: int = SEED) -> dict[str, Tensor]:
    """The dense tensors a checkpoint holds: 246 MB. Raises RuntimeError if the generator draws other numbers."""
    state = state_dict(seed)
    first = state["embeddings.token_embedding.weight"][0, : len(FIRST_VALUES)].float()
    if seed == SEED and not torch.allclose(first, torch.tensor(FIRST_VALUES), atol=1e-3):
        raise RuntimeError(
            f"text encoder: numpy {np.__version__} draws other numbers than the model was trained with; "
            "install the numpy version of requirements.txt"
        )
    return {CHECKPOINT_PREFIX + name: value.contiguous().clone() for name, value in state.items()}


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(1, dtype=torch.float16).expand(*shape)


def _norm(name: str) -> dict[str, Tensor]:
    return {name + ".weight": torch.ones(1, dtype=torch.float16).expand(WIDTH), name + ".bias": _zeros(WIDTH)}


class Encoder:
    """The same function as the host's CLIP over this state dict, without the layers that do nothing; for training.

    `tokenizer` is the folder of the host's SD1 tokenizer; by default that of the host at COMFYUI_PATH.
    """

    def __init__(self, seed: int = SEED, tokenizer: str | Path | None = None):
        from transformers import CLIPTokenizer

        folder = Path(tokenizer or Path(os.environ.get("COMFYUI_PATH", ".")) / "comfy" / "sd1_tokenizer")
        if not folder.is_dir():
            raise FileNotFoundError(f"text encoder: no tokenizer in {folder}; set COMFYUI_PATH to a ComfyUI folder")
        self.tokenizer = CLIPTokenizer.from_pretrained(str(folder))
        state = state_dict(seed)
        attention = "encoder.layers.0.self_attn."
        self.tokens = state["embeddings.token_embedding.weight"]
        self.positions = state["embeddings.position_embedding.weight"].float()
        self.q, self.k, self.v, self.out = (
            state[f"{attention}{name}.weight"].float().contiguous()
            for name in ("q_proj", "k_proj", "v_proj", "out_proj")
        )

    def token_ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text)["input_ids"][:LENGTH]
        return ids + [END_OF_TEXT] * (LENGTH - len(ids))

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """Texts -> float32 (B, 77, 768)."""
        x = self.tokens[torch.tensor([self.token_ids(text) for text in texts])].float() + self.positions
        normed = F.layer_norm(x, (WIDTH,))
        q, k, v = (
            (normed @ weight.T).unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)
            for weight in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return F.layer_norm(x + mixed @ self.out.T, (WIDTH,))
