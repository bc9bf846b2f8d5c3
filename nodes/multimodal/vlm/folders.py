"""Folders of models as transformers writes them: what is read of one, and what transformers is given of it.

Allowed is what is listed here: .safetensors and the files of a tokenizer, regular ones that the folder itself names,
with links followed as the host does in its folders of models (caches of the hub are made of links); of the
configuration what its classes know, in sizes that the weights can have. None of a folder's code is run, nothing is
downloaded, and which attention computes it is for transformers and the host to say.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...foreign import object_of, parts_of, regular_file
from ...quoting import quoted
from .reading import COPY_AGAIN, OFFLINE, Refused, reading

DESCRIPTIONS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_SHARDS = 1000  # files of weights; the largest published models have some hundred

LAYERS = re.compile(r"(layers?|depths?|blocks|levels|stages)$")  # names of numbers that say how much is built
MOST_LAYERS = 200  # of one kind; the largest language model of these families has 80, any that is published 126
MOST_NUMBER = 1 << 20  # of anything else, tokens it knows or reads at once for one
QUANTISED = ("quantization_config", "compression_config")
HOSTS_TO_SAY = {  # what configurations may hold and the loader decides, not the folder
    "args", "kwargs", "self", "architectures", "attn_implementation", "backbone", "backbone_kwargs",
    "chunk_size_feed_forward", "dtype", "id2label", "label2id", "num_labels", "output_attentions",
    "output_hidden_states", "per_layer_config", "problem_type", "pruned_heads", "return_dict", "torch_dtype",
    "transformers_version", "use_pretrained_backbone", "use_timm_backbone",
}  # fmt: skip
KNOWN_BY_ALL = {  # what classes take beside their declared names
    "model_type", "out_features", "out_indices", "partial_rotary_factor", "rope_parameters", "rope_scaling",
    "rope_theta",
}  # fmt: skip

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
MOST_TOKENIZER_BYTES = 1 << 26  # of one file; the largest vocabularies, of 256,000 tokens, take 33 MB
TOKENIZER_NAMES = re.compile(  # of tokenizer_config.json; no names of files, which may lie anywhere
    r"\w+_tokens?|add_prefix_space|added_tokens_decoder|additional_special_tokens|backend|clean_up_tokenization_spaces|"
    r"do_basic_tokenize|do_lower_case|errors|extra_special_tokens|legacy|model_max_length|padding_side|"
    r"sp_model_kwargs|split_special_tokens|strip_accents|tokenize_chinese_chars|tokenizer_class|truncation_side"
)


# ------------------------------------------------------------------------------------------------------ what lies there


def name_of(folder: Path) -> str:
    """What a folder is called; in a cache of the Hugging Face hub (.../snapshots/...) the model's own name."""
    where = folder.resolve()
    cache = where.parent.parent.name
    if where.parent.name == "snapshots" and cache.startswith("models--"):
        return cache.removeprefix("models--").replace("--", "/")
    return folder.name


def read_json(folder: Path, name: str) -> dict:
    """A JSON file of a model folder; empty where there is none. Raises ValueError for one that is damaged."""
    return object_of(folder / name, COPY_AGAIN) if lies_there(folder / name) else {}


def lies_there(path: Path) -> bool:
    """Whether anything of this name lies there, also a link that leads nowhere."""
    return path.is_symlink() or path.exists()


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights. Raises ValueError where there are none, and for an index that names others."""
    name = name_of(folder)
    if lies_there(folder / WEIGHTS):
        return [regular_file(folder / WEIGHTS)]
    if lies_there(folder / INDEX):
        named = read_json(folder, INDEX).get("weight_map")
        files = sorted({str(file) for file in named.values()}) if isinstance(named, dict) else []
        odd = [file for file in files if not re.fullmatch(r"[\w.-]+\.safetensors", file)]
        if not files or odd or len(files) > MOST_SHARDS:
            what = f"{quoted(odd[0])}, which is no .safetensors of the folder" if odd else f"{len(files)} files"
            raise ValueError(f"the index of {name} ({INDEX}) names {what}: {COPY_AGAIN}.")
        return [regular_file(folder / file) for file in files]
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
    if pickled:
        raise ValueError(
            f"{name} has its weights in {pickled[0][:60]}, a format that can run code when it is read, and only "
            ".safetensors are: take the model in that format."
        )
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        raise ValueError(f"{name} has {quoted(others[0])} and neither {WEIGHTS} nor {INDEX}: {COPY_AGAIN}.")
    raise ValueError(f"{name} has no weights in it (no .safetensors in it): copy the model's weights there, too.")


def allowed_weights(folder: Path, instead: str) -> list[Path]:
    """The files of a folder's weights. Raises ValueError as weight_files, for code of its own, and for an adapter.

    instead: the model to take in place of one that brings code.
    """
    refuse_code(folder, DESCRIPTIONS[:1], instead)
    files = weight_files(folder)
    refuse_code(folder, DESCRIPTIONS[1:], instead)
    if lies_there(folder / "adapter_config.json"):
        raise ValueError(
            f"{name_of(folder)} has an adapter_config.json, so it is a LoRA of another model: put the model itself "
            "there without that file, and the LoRA in models/loras."
        )
    return files


def refuse_code(folder: Path, files: Sequence[str], instead: str) -> None:
    """Raise ValueError where one of some files asks for code of the folder's own."""
    for file in files:
        if any("auto_map" in each for each in objects_in(read_json(folder, file))):
            raise ValueError(
                f"{name_of(folder)} asks to run program code of its own ({file} has an 'auto_map'), which is never "
                f"done here: take {instead}."
            )


def objects_in(value: Any) -> Iterator[dict]:
    """Every object in what JSON says, the outermost first."""
    if isinstance(value, dict):
        yield value
    for part in parts_of(value):
        yield from objects_in(part)


# ------------------------------------------------------------------------------------------------- its configuration


def configuration(folder: Path, kind: str, parts: Mapping[str, tuple[str, ...]]) -> Any:
    """transformers' configuration of a folder of a kind, of what its classes know and the folder may say.

    parts: the kinds that those of its parts may be of which transformers does not know of itself. Raises ValueError
    for quantised weights, for another kind of part, and for numbers that no such model has.
    """
    name, said = name_of(folder), read_json(folder, "config.json")
    for each in objects_in(said):
        if any(each.get(key) is not None for key in QUANTISED):
            raise ValueError(
                f"{name} has quantised weights (config.json has a 'quantization_config'), which are not read here: "
                "take the model as it was published, in bfloat16 or float16."
            )
    for part, kinds in parts.items():
        inner = said.get(part)
        other = inner.get("model_type", kinds[0]) if isinstance(inner, dict) else kinds[0]
        if other not in kinds:
            raise ValueError(
                f"the {part} of {name} is of type {quoted(other)}, and read are {', '.join(kinds)}: {COPY_AGAIN}."
            )
    require_sizes(said, name)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    own = CONFIG_MAPPING[kind]
    inner = [part for part in getattr(own, "sub_configs", {}).values() if getattr(part, "model_type", "")]
    inner += [CONFIG_MAPPING[each] for kinds in parts.values() for each in kinds if each in CONFIG_MAPPING]
    with reading(name):
        return own.from_dict(kept(said, frozenset().union(*map(declared, [own, *inner])) | {"model_type"}))


def declared(config: Any) -> frozenset[str]:
    """What a class of configurations takes, and may take of a folder."""
    names = {*inspect.signature(config.__init__).parameters, *getattr(config, "attribute_map", {}), *KNOWN_BY_ALL}
    return frozenset(name for name in names if not name.startswith("_")) - HOSTS_TO_SAY


def kept(said: dict, names: frozenset[str]) -> dict:
    """What a configuration and its parts say under some names."""
    return {
        key: kept(value, names) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in said.items()
        if key in names
    }


def require_sizes(said: Mapping[str, Any], name: str) -> None:
    """Raise ValueError for numbers that no model of these kinds has: before anything is built of them."""
    for each in objects_in(said):
        for key, value in each.items():
            for number in value if isinstance(value, list) else [value]:
                most = MOST_LAYERS if LAYERS.search(key) else MOST_NUMBER
                if type(number) is int and "theta" not in key and not -1 <= number <= most:
                    raise ValueError(
                        f"config.json of {name} has {quoted(key)} {quoted(number)}, from -1 to {most} are built: "
                        f"{COPY_AGAIN}."
                    )
                if type(number) is float and not math.isfinite(number):
                    raise ValueError(f"config.json of {name} has {quoted(key)} {number}, no number: {COPY_AGAIN}.")


# ------------------------------------------------------------------------------------------------------ its tokenizer


@contextmanager
def clean_folder() -> Iterator[str]:
    """An empty folder among the host's temporary files, gone at the end."""
    import folder_paths

    temporary = folder_paths.get_temp_directory()
    os.makedirs(temporary, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=temporary) as made:
        yield made


def read_tokenizer(folder: Path, config: Any) -> Any:
    """The tokenizer of a folder, made of the files and names that are allowed, and of nothing else of the folder."""
    import transformers

    said = {k: v for k, v in read_json(folder, "tokenizer_config.json").items() if TOKENIZER_NAMES.fullmatch(k)}
    with clean_folder() as clean, reading(name_of(folder)):
        for file in TOKENIZER_FILES:
            if lies_there(folder / file):
                copy_small(regular_file(folder / file), Path(clean, file))
        for file, content in (("tokenizer_config.json", said), ("config.json", {"model_type": config.model_type})):
            Path(clean, file).write_text(json.dumps(content), encoding="utf-8")
        return transformers.AutoTokenizer.from_pretrained(clean, config=config, **OFFLINE)


def copy_small(source: Path, target: Path) -> None:
    """Copy a file of a tokenizer. Raises ValueError for one that is larger than any."""
    if source.stat().st_size > MOST_TOKENIZER_BYTES:
        raise Refused(
            f"{source.name} has more than {MOST_TOKENIZER_BYTES} bytes, which no tokenizer has: {COPY_AGAIN}."
        )
    shutil.copyfile(source, target)
