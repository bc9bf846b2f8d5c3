"""A small random MGIE folder: transformers' own classes of CLIP and Llama, an edit head, in the help page's layout.

Import it late: it needs transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

WORDS = """
a an the and of in on at his her with dog cat man woman snow sand park sitting standing running red blue green black
white style animated picture image is what will this be like if make it winter alternative user assistant chat between
curious artificial intelligence gives helpful detailed polite answers to questions summarize following paragraph words
"""
SPECIAL = ["<unk>", "<s>", "</s>", "<im_patch>", "<im_start>", "<im_end>"]
IMAGES = [f"[IMG{i}]" for i in range(8)]  # behind all others, as MGIE adds them
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 7, "projection_dim": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip
HEAD = {"hidden": 32, "width": 16, "heads": 4, "layers": 2, "feed_forward": 24, "queries": 77, "context": 768}


def tokenizer():
    """A tokenizer of whole words and letters that begins every text with <s>, as Llama's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyzACUSERTINM0123456789.,:!?<>{}='-"
    pieces = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *WORDS.split()]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **ends)
    made.add_special_tokens({"additional_special_tokens": [*SPECIAL[3:], *IMAGES]})
    return made


def random(network: torch.nn.Module) -> torch.nn.Module:
    """Weights that keep activations near 1."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return network.eval()


def parts(seed: int = 0):
    """(tokenizer, vision tower, projector, language model, edit head, embeddings) of random weights."""
    import transformers
    from palimpsest.kernels.edit_head import EditHeadConfig, EditMapper

    torch.manual_seed(seed)
    made = tokenizer()
    language = transformers.LlamaConfig(vocab_size=len(made), pad_token_id=0, bos_token_id=1, eos_token_id=2, **TEXT)
    vision = transformers.CLIPVisionConfig(**VISION)
    networks = (
        transformers.CLIPVisionModel(vision),
        torch.nn.Linear(VISION["hidden_size"], TEXT["hidden_size"]),
        transformers.LlamaForCausalLM(language),
        EditMapper(EditHeadConfig(**HEAD), torch.nn),
    )
    return made, *map(random, networks), torch.randn(8, TEXT["hidden_size"]) * 0.2


def write(folder: Path, seed: int = 0, *, unet: dict | None = None, trained: bool = True, merged: bool = False) -> Path:
    """Write a folder as Load MGIE reads it; unet: its tensors; trained: with what MGIE trained, in a file of its own
    over a base of fewer tokens, or (merged) in the model's. Returns the folder."""
    made, vision, projector, language, head, embeddings = parts(seed)
    folder.mkdir(parents=True, exist_ok=True)
    made.save_pretrained(folder)
    config = {"model_type": "llava", "text_config": language.config.to_dict(), "vision_config": vision.config.to_dict()}
    (folder / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
    own = {f"model.mm_projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    own |= language.state_dict()
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    learned = {name: own[name].clone() for name in tables}
    if not merged:
        own |= {name: own[name][: len(made) - 8] for name in tables}  # LLaVA's, without [IMG0..7]
    save_file({name: tensor.contiguous() for name, tensor in own.items()}, folder / "model.safetensors")
    tower = {name.removeprefix("vision_model."): tensor.contiguous() for name, tensor in vision.state_dict().items()}
    save_file({f"vision_model.{name}": tensor for name, tensor in tower.items()}, folder / "vision.safetensors")
    if trained:
        learned = {} if merged else learned
        learned |= {f"edit_head.{name}": tensor for name, tensor in head.state_dict().items()} | {"emb": embeddings}
        save_file({name: t.contiguous() for name, t in learned.items()}, folder / "mllm.safetensors")
    if unet is not None:
        save_file({name: tensor.contiguous() for name, tensor in unet.items()}, folder / "unet.safetensors")
    return folder
