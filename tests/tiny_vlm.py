"""Small random vision-language models in folders as transformers writes them: real classes of config, model, processor.

Their tokenizer is built here of a few hundred words, with the special tokens of the family. Import it late: it needs
transformers.
"""

from __future__ import annotations

from pathlib import Path

import torch

TEXTS = """
a an and the of in on at his her with dog cat man woman snow sand park sitting standing running red blue green black
white style animated picture image is blurry bad
"""
SPECIAL = {
    "idefics2": ["<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"],
    "idefics3": ["<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"],
}
SPECIAL["smolvlm"] = SPECIAL["idefics3"]
SPECIAL["qwen2_5_vl"] = ["<unk>", "<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
SPECIAL["qwen3_vl"] = SPECIAL["qwen2_5_vl"]
KINDS = list(SPECIAL)
QWENS = ("qwen2_5_vl", "qwen3_vl")
IMAGE = dict.fromkeys(QWENS, "<|image_pad|>")
VISION_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 7,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
}
LATENTS = 5  # of Idefics2's perceiver


def tokenizer(kind: str):
    """A tokenizer of whole words and letters; Idefics2's begins every text with <s>, as Mistral's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:!?<>{}=-'"
    pieces = [*SPECIAL[kind], *letters, *(f"##{letter}" for letter in letters), *TEXTS.split()]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "idefics2":
        first = ("<s>", vocabulary["<s>"])
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[first])
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    if kind in QWENS:
        ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **ends)
    made.add_special_tokens({"additional_special_tokens": SPECIAL[kind][3:]})
    return made


def config(kind: str, tokenizer):
    """A configuration of the family's own class."""
    import transformers

    text = TEXT | {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    image = tokenizer.convert_tokens_to_ids(IMAGE.get(kind, "<image>"))
    common = {"image_token_id": image, "vision_config": dict(VISION_TOWER)}
    if kind == "idefics2":
        perceiver = {
            "hidden_size": TEXT["hidden_size"],
            "resampler_n_latents": LATENTS,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
        }
        mistral = text | {"model_type": "mistral", "sliding_window": None}
        return transformers.Idefics2Config(text_config=mistral, perceiver_config=perceiver, **common)
    if kind == "qwen2_5_vl":
        vision_tower = {
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 7, "window_size": 28,
            "fullatt_block_indexes": [1], "out_hidden_size": TEXT["hidden_size"],
        }  # fmt: skip
        turns = {"type": "mrope", "mrope_section": [2, 1, 1]}
        return transformers.Qwen2_5_VLConfig(
            text_config=text | {"rope_scaling": turns}, vision_config=vision_tower, image_token_id=image
        )
    if kind == "qwen3_vl":
        vision_tower = {
            "depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 7,
            "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1], "out_hidden_size": TEXT["hidden_size"],
        }  # fmt: skip
        turns = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
        return transformers.Qwen3VLConfig(
            text_config=text | {"rope_scaling": turns, "head_dim": 8}, vision_config=vision_tower, image_token_id=image
        )
    family = transformers.Idefics3Config if kind == "idefics3" else transformers.SmolVLMConfig
    return family(text_config=text | {"model_type": "llama"}, scale_factor=2, pad_token_id=0, **common)


def write(folder: Path, kind: str = "idefics2", seed: int = 0) -> Path:
    """Write a random model with its language head, tokenizer and image processor into a folder; returns the folder."""
    import transformers

    made = tokenizer(kind)
    torch.manual_seed(seed)
    classes = {
        "idefics2": "Idefics2",
        "idefics3": "Idefics3",
        "smolvlm": "SmolVLM",
        "qwen2_5_vl": "Qwen2_5_VL",
        "qwen3_vl": "Qwen3VL",
    }
    model = getattr(transformers, f"{classes[kind]}ForConditionalGeneration")(config(kind, made))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    folder.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(folder, safe_serialization=True)
    made.save_pretrained(folder)
    if kind == "idefics2":
        images = transformers.Idefics2ImageProcessor(do_image_splitting=False)
        transformers.Idefics2Processor(images, made, image_seq_len=LATENTS).save_pretrained(folder)
    return folder


def connector(vlm, tokens: int = 16, width: int = 24, pooled: int = 0, seed: int = 0):
    """A small connector of a model, with random weights, also of its pooled output if it has one."""
    from palimpsest.kernels.connector import ConnectorConfig
    from palimpsest.nodes.multimodal.encoder import Connector, Reads

    config = ConnectorConfig(vlm.width, width, depth=2, heads=4, pooled_width=pooled)
    made = Connector.new(config, Reads.of(vlm, tokens), seed)
    if pooled:
        made.patcher.model.pooled.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return made
