"""Vision-language models in the host: which folders are read, and what is made of words and pictures."""

import json
import shutil

import comfy.model_management
import pytest
import tiny_models
import tiny_vlm
import torch
from palimpsest.nodes.multimodal import files as multimodal_files
from palimpsest.nodes.multimodal import interleaved
from palimpsest.nodes.multimodal.interleaved import Picture
from palimpsest.nodes.multimodal.vlm import FAMILIES, VisionLanguage, load_vlm
from safetensors.torch import load_file, save_file

SIDE = {"idefics2": 28, "idefics3": 56, "smolvlm": 56, "qwen2_5_vl": 56, "qwen3_vl": 56}  # pixels of 16 tokens

HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # as Qwen3-VL's own processor normalises

pytestmark = pytest.mark.usefixtures("inference")


def picture(height=30, width=50, seed=0):
    return tiny_models.picture(1, height, width, seed)


# ---- folders


def copy_with(encoder_folders, tmp_path, name, change):
    """A copy of a model folder after a change to it."""
    folder = shutil.copytree(encoder_folders / "models" / "idefics2", tmp_path / name)
    change(folder)
    return folder


def set_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def to_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def drop_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.connector.modality_projection.gate_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: set_config(f, auto_map={"AutoModel": "code.Model"}), "program code of its own"),
        (
            lambda f: set_config(f, model_type="llama"),
            "type 'llama'.*Idefics2, Idefics3, SmolVLM, Qwen2.5-VL and Qwen3-VL",
        ),
        (to_pickle, "pytorch_model.bin, a format that can run code"),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
        (drop_a_weight, "incomplete, 1 of its weights.*gate_proj"),
        (lambda f: (f / "model.safetensors").write_bytes(b"broken"), "cannot be read"),
        (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "cannot be read|does not know"),
    ],
)
def test_a_folder_that_is_no_such_model_is_refused(encoder_folders, tmp_path, change, says):
    folder = copy_with(encoder_folders, tmp_path, "odd", change)
    with pytest.raises(ValueError, match=says):
        load_vlm(folder, "float32")


def test_folders_are_listed_by_name_also_one_deeper(encoder_folders):
    tiny_vlm.write(encoder_folders / "models" / "maker" / "small", "smolvlm")
    assert multimodal_files.encoder_folders() == [
        "idefics2", "idefics3", "maker/small", "qwen2_5_vl", "qwen3_vl", "smolvlm"
    ]  # fmt: skip
    assert multimodal_files.ENCODERS.path("maker/small") == encoder_folders / "models" / "maker" / "small"
    with pytest.raises(ValueError, match=r"has no model folder '../idefics2'"):
        multimodal_files.ENCODERS.path("../idefics2")


def test_the_weights_are_the_folders_own(encoder_folders, loaded):
    saved = load_file(encoder_folders / "models" / "idefics2" / "model.safetensors")
    loaded = loaded().patcher.model.state_dict()
    assert {key for key in saved if key != "lm_head.weight"} == set(loaded)
    assert all(torch.equal(loaded[key], saved[key]) for key in loaded)


def test_qwens_published_layout_of_weights_is_read(encoder_folders, loaded, tmp_path):
    """Its authors' files name the eye visual.*, the language model model.*."""
    folder = shutil.copytree(encoder_folders / "models" / "qwen2_5_vl", tmp_path / "published")
    weights = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    assert {"visual.patch_embed.proj.weight", "model.embed_tokens.weight"} <= weights.keys()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    found = load_vlm(folder, "float32").patcher.model.state_dict()
    wanted = loaded("qwen2_5_vl").patcher.model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_transformers_that_does_not_read_a_family_is_named_with_the_one_that_does(encoder_folders, monkeypatch):
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    class Older(dict):
        """Of the release before."""

    older = Older({kind: CONFIG_MAPPING[kind] for kind in ("qwen2_5_vl", "idefics2")})
    monkeypatch.setattr("transformers.models.auto.configuration_auto.CONFIG_MAPPING", older)
    monkeypatch.setattr(transformers, "__version__", "4.56.2")
    with pytest.raises(ValueError, match=r"Qwen3-VL needs transformers 4\.57 or later, here is 4\.56\.2: update it"):
        load_vlm(encoder_folders / "models" / "qwen3_vl", "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_chosen(encoder_folders, dtype):
    vlm = load_vlm(encoder_folders / "models" / "smolvlm", dtype)
    states = vlm.hidden_states([("a ", Picture(picture()[0], 4), " dog")]).states
    assert vlm.dtype is states.dtype is getattr(torch, dtype)
    assert torch.isfinite(states).all()


# ---- hidden states


def stock(encoder_folders, kind, ids, pixels, perceiver=True):
    """The last hidden states of transformers' own model and forward, from its own loader."""
    import transformers

    model = transformers.AutoModel.from_pretrained(encoder_folders / "models" / kind).float()
    if not perceiver:

        class Past(torch.nn.Module):
            def forward(self, context, attention_mask):
                return context

        model.connector.perceiver_resampler = Past()
    ones = torch.ones(1, *pixels.shape[-2:], dtype=torch.bool)[None]
    found = model(input_ids=torch.tensor([ids]), pixel_values=pixels[None], pixel_attention_mask=ones, use_cache=False)
    return found.last_hidden_state


@pytest.mark.parametrize(
    ("kind", "perceiver", "tokens"),
    [("idefics2", False, 16), ("idefics2", True, 5), ("idefics3", False, 16), ("smolvlm", False, 4)],
)
def test_hidden_states_are_those_of_transformers_own_forward(encoder_folders, loaded, kind, perceiver, tokens):
    vlm = loaded(kind, perceiver)
    shown = Picture(picture()[0], tokens)
    ids, _ = vlm.tokenised(("a ", shown, " dog"))
    pixels = interleaved.squared(shown.pixels, vlm.side(tokens))
    if kind == "idefics2" and not perceiver:
        wanted = stock(encoder_folders, kind, ids, pixels, perceiver=False)
    else:
        wanted = stock(encoder_folders, kind, ids, pixels)
    found = vlm.hidden_states([("a ", shown, " dog")])
    torch.testing.assert_close(found.states, wanted, rtol=1e-4, atol=1e-5)
    assert found.mask.all()


@pytest.mark.parametrize("sides", [(4, 2), (2,), ()])
@pytest.mark.parametrize(("kind", "normalised"), [("qwen2_5_vl", {}), ("qwen3_vl", HALVES)])
def test_qwens_hidden_states_are_those_of_its_own_processor_and_forward(
    encoder_folders, loaded, kind, normalised, sides
):
    """Pictures of several sizes among words, in 4 x 4 and 2 x 2 tokens, normalised and cut up by transformers."""
    import inspect

    import transformers

    vlm = loaded(kind)
    shown = [Picture(picture(seed=i)[0], side**2) for i, side in enumerate(sides)]
    parts = [part for each in shown for part in ("a ", each, " dog")]
    ids, _ = vlm.tokenised((*parts, " in the snow"))
    model = transformers.AutoModel.from_pretrained(encoder_folders / "models" / kind).float()
    given = {"input_ids": torch.tensor([ids])}
    if shown:
        squares = [interleaved.squared(each.pixels, vlm.side(each.tokens))[0] / 2 + 0.5 for each in shown]
        processor = transformers.Qwen2VLImageProcessor(patch_size=7, min_pixels=1, do_rescale=False, **normalised)
        given |= dict(processor(squares, return_tensors="pt", input_data_format="channels_first"))
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        given["mm_token_type_ids"] = (given["input_ids"] == model.config.image_token_id).int()
    found = vlm.hidden_states([(*parts, " in the snow")])
    wanted = model(**given, use_cache=False).last_hidden_state
    torch.testing.assert_close(found.states, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", tiny_vlm.KINDS)
def test_a_layout_names_every_token(loaded, kind):
    vlm = loaded(kind)
    shown = [Picture(picture()[0], 16, name="image1"), Picture(picture(seed=1)[0], 4, name="image2")]
    ids, spans = vlm.tokenised(("a ", shown[0], " dog ", shown[1], " style"))
    assert [span.start for span in spans[1:]] == [span.end for span in spans[:-1]]
    assert (spans[0].start, spans[-1].end) == (0, len(ids))
    image = vlm.tokenizer.convert_tokens_to_ids(vlm.family.image)
    counts = [ids[span.start : span.end].count(image) for span in spans]
    assert [count for count in counts if count] == [16, 4]
    assert [span.picture for span in spans if span.picture] == shown
    assert spans[1].side == SIDE[kind]


@pytest.mark.parametrize("kind", ["idefics2", *tiny_vlm.QWENS])
def test_prompts_in_one_batch_are_those_one_by_one(loaded, kind):
    vlm, shown = loaded(kind), Picture(picture()[0], 16)
    prompts = [("a ", shown, " dog"), ("a red cat sitting",), (), ("a ", Picture(picture(seed=2)[0], 4), " man")]
    together = vlm.hidden_states(prompts)
    for row, each in enumerate(prompts):
        alone = vlm.hidden_states([each]).states
        length = alone.shape[1]
        assert together.mask[row].sum() == length
        assert together.mask[row, :length].all()
        torch.testing.assert_close(together.states[row : row + 1, :length], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", tiny_vlm.KINDS)
def test_an_empty_prompt_is_one_token(loaded, kind):
    assert loaded(kind).hidden_states([()]).states.shape[:2] == (1, 1)


def test_two_pictures_are_told_apart_by_place(loaded):
    vlm = loaded()
    a, b = Picture(picture()[0], 16), Picture(picture(seed=1)[0], 16)
    one, other = (vlm.hidden_states([("a ", *pair, " dog")]).states for pair in ((a, b), (b, a)))
    assert (one[:, 3:19] - other[:, 3:19]).norm() > 0.1 * one[:, 3:19].norm()


@pytest.mark.parametrize(
    ("kind", "perceiver", "tokens", "says"),
    [
        ("idefics2", False, 15, "a square number of tokens from 1 to 64, 15 are wanted: take 16"),
        ("idefics2", False, 1296, "1296 are wanted: take 64"),
        ("idefics2", True, 16, "by 5 tokens through its perceiver, 16 are wanted"),
        ("smolvlm", False, 64, "from 1 to 16, 64 are wanted: take 16"),
    ],
)
def test_a_number_of_tokens_that_cannot_be_is_refused(loaded, kind, perceiver, tokens, says):
    with pytest.raises(ValueError, match=says):
        loaded(kind, perceiver).tokenised((Picture(picture()[0], tokens),))


def test_the_papers_sizes_are_idefics2s():
    """252 px and 504 px for 324 and 1296 tokens (patch 14)."""
    sides = {}
    for tokens in (324, 576, 1024, 1296):
        vlm = object.__new__(VisionLanguage)

        class Eye:
            image_size, patch_size = 980, 14

        class Config:
            vision_config = Eye

        class Holder:
            model = type("Model", (), {"model": type("Inner", (), {"config": Config})})

        fields = {"name": "x", "family": FAMILIES["idefics2"], "patcher": Holder, "perceiver": False}
        for name, value in fields.items():
            object.__setattr__(vlm, name, value)
        sides[tokens] = vlm.side(tokens)
    assert sides == {324: 252, 576: 336, 1024: 448, 1296: 504}


def test_too_many_tokens_are_refused(loaded):
    pictures = tuple(Picture(picture()[0], 64, name=f"image{i + 1}") for i in range(3))
    with pytest.raises(ValueError, match=r"reads 160 at once \(pictures: image1 64, image2 64, image3 64\)"):
        loaded().tokenised(pictures)


def test_the_host_loads_and_offloads_the_model(loaded):
    vlm = loaded("smolvlm")
    vlm.hidden_states([("a dog",)])
    assert any(loaded.model is vlm.patcher for loaded in comfy.model_management.current_loaded_models)
    comfy.model_management.unload_all_models()
    assert not any(loaded.model is vlm.patcher for loaded in comfy.model_management.current_loaded_models)
    assert torch.isfinite(vlm.hidden_states([("a dog",)]).states).all()


def test_large_layers_are_the_hosts_own(loaded):
    small = {
        id(p) for m in loaded().model.modules() if not hasattr(m, "comfy_cast_weights") for p in m.parameters(False)
    }
    layers = [m for m in loaded().model.modules() if type(m) is torch.nn.Linear]
    assert layers == []
    assert len(small) < len(list(loaded().model.parameters()))
