"""Folders of models that somebody else wrote: only what is allowed is read, and every cause is named."""

import json
import os
import shutil
import time

import comfy.model_management
import pytest
import tiny_detector
import tiny_vlm
import torch
from palimpsest.nodes import files as storage
from palimpsest.nodes.multimodal.dataset import open_detection
from palimpsest.nodes.multimodal.vlm import FAMILIES, folders, load_vlm, reading
from safetensors.torch import load_file, save_file

INTERRUPT = comfy.model_management.InterruptProcessingException

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of a vision-language model and one of a detector, to be copied."""
    root = tmp_path_factory.mktemp("foreign")
    return {"vlm": tiny_vlm.write(root / "vlm", "smolvlm"), "detector": tiny_detector.write(root / "detector")}


READERS = {"vlm": lambda folder: load_vlm(folder, "float32"), "detector": open_detection.load_detector}


def read(models, tmp_path, change, kind="vlm"):
    """A copy of a folder after a change to it, read."""
    folder = shutil.copytree(models[kind], tmp_path / "there" / "foreign")
    change(folder)
    return READERS[kind](folder)


def edited(file="config.json", part=None, **values):
    """A change to some values of a JSON file."""

    def change(folder):
        path = folder / file
        said = json.loads(path.read_text()) if path.exists() else {}
        (said if part is None else said[part]).update(values)
        path.write_text(json.dumps(said))

    return change


def written(file, text):
    """A change that puts a text into a file."""
    return lambda folder: (folder / file).write_text(text)


def in_shards(folder, name="model-00001-of-00001.safetensors"):
    """The weights behind an index that names them so."""
    weights = load_file(folder / "model.safetensors")
    target = folder / name
    (folder / "model.safetensors").rename(target)
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def as_pipe(file):
    """A change that puts a pipe in a file's place, which would hang whoever opens it."""

    def change(folder):
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)

    return change


# ---- what is refused, by what stands in the folder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edited(model_type=["a"]), r"of type \['a'\]"),
        (edited(model_type={"a": 1}), "of type {'a': 1}"),
        (edited(model_type=5), "of type 5"),
        (written("config.json", "[" * 200_000), "config.json is damaged .it is nested deeper than 16 levels"),
        (written("config.json", "[]"), r"holds no object in braces but \[\]"),
        (written("config.json", " " * (1 << 24) + "{}"), "more than 16777216 bytes"),
        (written("config.json", '{"model_type": NaN}'), "NaN is no number"),
        (written("tokenizer_config.json", "5"), "holds no object in braces but 5"),
        (edited("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}), "program code of its own"),
        (edited(part="text_config", auto_map={"AutoConfig": "evil.Y"}), "program code of its own"),
        (edited("processor_config.json", auto_map={"AutoProcessor": "evil.P"}), "program code of its own"),
        (edited(part="text_config", model_type="evil"), "text_config .*of type 'evil', and read are llama, mistral"),
        (edited(part="text_config", model_type=[]), r"text_config .* is of type \[\]"),
        (edited(quantization_config={"quant_method": "bitsandbytes"}), "quantised weights.*as it was published"),
        (edited(part="text_config", quantization_config={"a": 1}), "quantised weights"),
        (edited("adapter_config.json", base_model_name_or_path="/etc", peft_type="LORA"), "a LoRA of another model"),
        (edited(part="text_config", num_hidden_layers=10**6), "'num_hidden_layers' 1000000, from -1 to 200"),
        (edited(part="vision_config", num_hidden_layers=10**6), "'num_hidden_layers' 1000000, from -1 to 200"),
        (edited(part="text_config", hidden_size=-4), "'hidden_size' -4, from -1"),
        (edited(part="text_config", vocab_size=10**11), "'vocab_size' 100000000000, from -1 to 1048576"),
        (edited(part="text_config", vocab_size=10**6), "more weights than its .* MB of .safetensors can hold"),
        (edited(part="text_config", hidden_size=10**5, intermediate_size=10**5), "more weights than"),
        (edited(part="vision_config", image_size=10**6), "more weights than"),
        (edited(part="text_config", hidden_size="<script>"), "cannot be read: transformers"),
        (edited(part="vision_config", image_size=[56, 56]), r"image_size \[56, 56\], a whole number"),
        (edited(part="text_config", hidden_size=True), "cannot be read|whole number"),
        (edited(part="text_config", max_position_embeddings=0), "max_position_embeddings 0, a whole number"),
        (edited("tokenizer_config.json", tokenizer_class=[1]), "cannot be read: transformers"),
        (written("tokenizer.json", "{}"), "cannot be read: transformers"),
        (written("tokenizer.json", "[" * 200_000), "cannot be read: "),
        (lambda f: (f / "tokenizer.json").open("wb").truncate(1 << 27), "more than 67108864 bytes"),
        (lambda f: torch.save({"a": 1}, f / "model.safetensors"), "cut off or damaged.*Copy the model's folder again"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-500]),
            "cut off or damaged",
        ),
        (as_pipe("model.safetensors"), "is a pipe or a device"),
        (as_pipe("config.json"), "is a pipe or a device"),
        (as_pipe("tokenizer.json"), "is a pipe or a device"),
        (as_pipe("processor_config.json"), "is a pipe or a device"),
        (lambda f: (f / "tokenizer.model").mkdir(), "is a folder"),
        (lambda f: (f / "merges.txt").symlink_to("nowhere"), "cannot be opened .No such file"),
        (lambda f: (f / "vocab.txt").symlink_to("vocab.txt"), "cannot be opened"),
        (lambda f: in_shards(f, "../../outside.safetensors"), "names '../../outside.safetensors', which is no"),
        (lambda f: (in_shards(f), (f / "model-00001-of-00001.safetensors").unlink()), "00001.safetensors' cannot be"),
        (lambda f: (in_shards(f), edited("model.safetensors.index.json", weight_map=[1])(f)), "names 0 files"),
        (lambda f: (f / "model.safetensors").rename(f / "x.safetensors"), "neither model.safetensors nor"),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_said_in_a_sentence(models, tmp_path, change, says):
    began = time.monotonic()
    with pytest.raises(ValueError, match=says) as told:
        read(models, tmp_path, change)
    assert len(str(told.value)) < 800
    assert time.monotonic() - began < 20  # a million layers took longer, and pipes for ever


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edited(model_type=["a"]), r"of type \['a'\]"),
        (edited("tokenizer_config.json", auto_map={"AutoTokenizer": "evil.T"}), "program code of its own"),
        (edited(part="backbone_config", model_type="timm_backbone"), "of type 'timm_backbone', and read are swin"),
        (edited(part="text_config", model_type="llama"), "of type 'llama', and read are bert"),
        (edited(decoder_layers=10**6), "'decoder_layers' 1000000, from -1 to 200"),
        (edited(part="backbone_config", depths=[1, 1, 10**6, 1]), "'depths' 1000000, from -1 to 200"),
        (edited(num_queries=10**6), "more weights than"),
        (edited("preprocessor_config.json", size={"shortest_edge": 10**9}), r"has the size \[1000000000, 1333\]"),
        (edited("preprocessor_config.json", size={"shortest_edge": "96"}), r"has the size \['96', 1333\]"),
        (edited("preprocessor_config.json", image_mean=[0.5]), r"has the colours \[0.5\]"),
        (edited("preprocessor_config.json", image_std=[0, 0.5, 0.5]), "has an image_std of 0"),
        (lambda f: in_shards(f, "../x.safetensors"), "names '../x.safetensors'"),
        (as_pipe("preprocessor_config.json"), "is a pipe or a device"),
    ],
)
def test_a_detectors_folder_is_read_by_the_same_rules(models, tmp_path, change, says):
    with pytest.raises(ValueError, match=says):
        read(models, tmp_path, change, "detector")


def test_a_detector_without_some_of_its_weights_is_refused_and_not_made_up(models, tmp_path):
    def change(folder):
        weights = load_file(folder / "model.safetensors")
        del weights["model.text_projection.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ValueError, match=r"incomplete, 1 of its weights.*text_projection"):
        read(models, tmp_path, change, "detector")


# ---- what a folder may not decide


@pytest.mark.parametrize(
    "change",
    [
        edited(_attn_implementation="evil/kernel", attn_implementation="flash_attention_2"),
        edited(part="text_config", _attn_implementation="evil/kernel", attn_implementation="evil/kernel"),
        edited(torch_dtype="float64", output_attentions=True, return_dict=False, pruned_heads={"0": [1]}, x=1),
        edited(part="text_config", use_return_dict=False, output_hidden_states=True, per_layer_config={"0": {}}),
        edited("tokenizer_config.json", tokenizer_file="/etc/passwd", vocab_file="/dev/zero", name_or_path="a/b"),
        edited("tokenizer_config.json", chat_template="{{ ''.__class__.__mro__ }}"),
        edited("generation_config.json", auto_map={"a": "b"}),
        in_shards,
    ],
)
def test_what_the_loader_decides_is_not_read_from_the_folder(models, tmp_path, change):
    plain, other = READERS["vlm"](models["vlm"]), read(models, tmp_path, change)
    wanted, found = (each.hidden_states([("a red dog",)]).states for each in (plain, other))
    assert torch.equal(found, wanted)


def test_no_code_of_a_folder_runs(models, tmp_path):
    def change(folder):
        for name in ("evil", "modeling_smolvlm", "configuration_smolvlm"):
            (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")

    read(models, tmp_path, change)
    with pytest.raises(ValueError, match="program code"):
        edited(auto_map={"AutoModel": "evil.X", "AutoConfig": "evil.Y"})(tmp_path / "there" / "foreign")
        READERS["vlm"](tmp_path / "there" / "foreign")
    assert not (tmp_path / "ran").exists()


# ---- what published folders say

IDEFICS2 = {  # as its authors published it; what is not named is as the classes have it
    "architectures": ["Idefics2ForConditionalGeneration"], "image_token_id": 32001, "model_type": "idefics2",
    "perceiver_config": {
        "chunk_size_feed_forward": 0, "hidden_act": "silu", "max_length": 20, "model_type": "idefics2",
        "num_key_value_heads": 4, "resampler_depth": 3, "resampler_head_dim": 96, "resampler_n_heads": 16,
        "resampler_n_latents": 64,
    },
    "text_config": {
        "max_position_embeddings": 32768, "model_type": "mistral", "pad_token_id": 0, "rms_norm_eps": 1e-5,
        "sliding_window": None, "torch_dtype": "bfloat16", "vocab_size": 32003,
    },
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "vision_config": {
        "hidden_size": 1152, "image_size": 980, "intermediate_size": 4304, "model_type": "idefics2",
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14,
    },
}  # fmt: skip
QWEN = {  # a flat one: the language model's values stand outside
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_size": 2048,
    "intermediate_size": 11008, "max_position_embeddings": 128000, "max_window_layers": 70,
    "model_type": "qwen2_5_vl", "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "vocab_size": 151936, "vision_token_id": 151654,
    "vision_config": {
        "depth": 32, "fullatt_block_indexes": [7, 15, 23, 31], "hidden_size": 1280, "in_chans": 3,
        "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "tokens_per_second": 2, "window_size": 112,
    },
}  # fmt: skip
READ_BY_NONE = {"architectures", "torch_dtype", "chunk_size_feed_forward", "max_length", "vision_token_id", "in_chans"}


@pytest.mark.parametrize("said", [IDEFICS2, QWEN], ids=["idefics2", "qwen2_5_vl"])
def test_a_published_configuration_is_kept_and_its_model_measured(tmp_path, said):
    """Every value that the classes read is what transformers' own reading makes of it; weights are counted alike."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    (tmp_path / "config.json").write_text(json.dumps(said))
    kind = said["model_type"]
    ours, theirs = folders.configuration(tmp_path, kind, FAMILIES[kind].parts), CONFIG_MAPPING[kind].from_dict(said)
    for part in ("", "text_config", "vision_config", "perceiver_config"):
        if part in said or part in ("", "text_config"):
            mine, other = ((getattr(each, part) if part else each).to_dict() for each in (ours, theirs))
            names = other.keys() - READ_BY_NONE - {"dtype", "_name_or_path", "text_config", "vision_config"}
            assert {k: mine[k] for k in names} == {k: other[k] for k in names}
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(theirs)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    with reading.Measured("published", numbers) as measured:
        transformers.AutoModel.from_config(ours)
    assert 0 <= measured.left < numbers * 0.01 + reading.SLACK
    with pytest.raises(reading.Refused, match="more weights than"), reading.Measured("published", numbers // 2):
        transformers.AutoModel.from_config(ours)


# ---- links


@pytest.mark.parametrize("kind", ["vlm", "detector"])
def test_a_snapshot_in_a_cache_of_the_hub_is_read_through_its_links(models, tmp_path, kind):
    cache = tmp_path / "models--maker--small"
    snapshot = cache / "snapshots" / "0123abc"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(models[kind].iterdir())):
        shutil.copyfile(file, cache / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    loaded = READERS[kind](snapshot)
    assert loaded.name == "maker/small"


@pytest.mark.parametrize("kind", ["vlm", "detector"])
def test_files_that_are_linked_from_another_disk_are_read(models, tmp_path, kind):
    (tmp_path / "linked").mkdir()
    for file in models[kind].iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    assert READERS[kind](tmp_path / "linked").name == "linked"


def test_a_cache_of_the_hub_is_listed_beside_the_others(models, tmp_path, monkeypatch):
    import folder_paths

    folders = storage.ModelFolders("palimpsest_some", "models", "model folder", "put one there")
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {"palimpsest_some": ([str(tmp_path)], set())})
    for name in ("small", "maker/small", "models--maker--small/snapshots/0123abc"):
        shutil.copytree(models["vlm"], tmp_path / name)
    assert sorted(folders.found()) == ["maker/small", "models--maker--small/snapshots/0123abc", "small"]


# ---- the cause is named


@pytest.mark.parametrize(
    ("error", "says", "blames_the_folder"),
    [
        (ImportError("`flash_attn` is not installed\nmore"), "a Python package is missing here", False),
        (PermissionError(13, "Permission denied"), "Permission denied. Let ComfyUI read the folder", False),
        (OSError(28, "No space left on device"), "make room where the disk is full", False),
        (KeyError("smolvlm"), "update transformers", False),
        (ValueError("x" * 5000), "transformers .* says: x{300}\\. ", False),
        (RecursionError("maximum recursion depth"), "nested too deep", True),
    ],
)
def test_an_error_of_transformers_is_told_with_its_cause(error, says, blames_the_folder):
    with pytest.raises(ValueError, match=says) as told, reading.reading("small"):
        raise error
    assert ("opy the model's folder again" in str(told.value)) is blames_the_folder


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError, INTERRUPT])
def test_memory_and_cancelling_are_the_hosts_to_report(kind):
    with pytest.raises(kind), reading.reading("small"):
        raise kind


@pytest.mark.parametrize("kind", ["vlm", "detector"])
def test_a_cancelled_run_stops_while_a_folder_is_read(models, kind, monkeypatch):
    asked = []

    def stop():
        asked.append(1)
        if len(asked) > 50:
            raise INTERRUPT

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(INTERRUPT):
        READERS[kind](models[kind])
    assert len(asked) == 51
