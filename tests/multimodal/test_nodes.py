"""Multimodal prompts: folders of vision-language models, what they make of words and pictures, the two nodes."""

import json
import os

import comfy.model_management
import comfy.samplers
import folder_paths
import pytest
import tiny_models
import tiny_vlm
import torch
from palimpsest.kernels.connector import ConnectorConfig
from palimpsest.nodes.multimodal import encoder as multimodal
from palimpsest.nodes.multimodal import files as multimodal_files
from palimpsest.nodes.multimodal import interleaved
from palimpsest.nodes.multimodal.encoder import Connector, Reads, join
from palimpsest.nodes.multimodal.interleaved import Picture, Place, parse
from palimpsest.nodes.multimodal.nodes import LoadMultimodalEncoder, MultimodalPrompt
from palimpsest.nodes.multimodal.vlm import vision_language
from safetensors.torch import load_file, save_file

WIDTH = tiny_models.SD15["context_dim"]
KINDS = ["idefics2", "idefics3", "smolvlm", "qwen2_5_vl"]
SIDE = {"idefics2": 28, "idefics3": 56, "smolvlm": 56, "qwen2_5_vl": 56}  # pixels of 16 tokens


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folders of the three families, where the host looks for them."""
    root = tmp_path_factory.mktemp("encoders")
    with pytest.MonkeyPatch.context() as patch:
        known = dict(folder_paths.folder_names_and_paths)
        known["palimpsest_encoders"] = ([str(root / "models")], {".safetensors"})
        known["palimpsest_connectors"] = ([str(root / "connectors")], {".safetensors"})
        known["loras"] = ([str(root / "loras")], {".safetensors"})
        patch.setattr(folder_paths, "folder_names_and_paths", known)
        patch.setattr(folder_paths, "filename_list_cache", {})
        for name in ("connectors", "loras"):
            (root / name).mkdir()
        for kind in KINDS:
            tiny_vlm.write(root / "models" / kind, kind)
        yield root


@pytest.fixture(scope="module")
def vlms(models):
    """A loaded model by (kind, perceiver), read when first asked for."""
    read = {}

    def get(kind="idefics2", perceiver=False):
        if (kind, perceiver) not in read:
            read[kind, perceiver] = vision_language.load(models / "models" / kind, "float32", perceiver)
        return read[kind, perceiver]

    return get


def connector(vlm, tokens=16, width=WIDTH, pooled=0, seed=0):
    config = ConnectorConfig(vlm.width, width, depth=2, heads=4, pooled_width=pooled)
    made = Connector.new(config, Reads.of(vlm, tokens), seed)
    if pooled:
        made.patcher.model.pooled.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return made


@pytest.fixture(scope="module")
def encoder(vlms):
    return join(vlms(), connector(vlms()))


def picture(height=30, width=50, seed=0):
    return tiny_models.picture(1, height, width, seed)


def prompt(encoder, text="a <image1> dog", pictures=1, **settings):
    """(model, positive, negative, report)."""
    images = {f"image{i + 1}": picture(seed=i) for i in range(pictures)}
    inputs = {"model": tiny_models.unet(), "multimodal_encoder": encoder, "text": text, "images": images}
    return tiny_models.execute(MultimodalPrompt, **inputs | settings)


# ---- reading a text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a red dog", ("a red dog",)),
        ("", ()),
        ("a <image1> dog", ("a ", Place(1), " dog")),
        ("{image1}<image2>", (Place(1), Place(2))),
        ("<Image 1> and {picture_2}", (Place(1), " and ", Place(2))),
        ("<image1:0.5>", (Place(1, 0.5),)),
        ("<image1: -1.5, tokens = 64> x", (Place(1, -1.5, 64), " x")),
        ("<image2, tokens=16>", (Place(2, 1.0, 16),)),
        ("the dog of Picture 1 in the style of image 2", ("the dog of ", Place(1), " in the style of ", Place(2))),
        ("a <image1> picture 2", ("a ", Place(1), " picture 2")),
        ("an image of a dog", ("an image of a dog",)),
    ],
)
def test_a_text_is_taken_apart(text, parts):
    assert parse(text) == parts


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a <image> dog", "'<image>' names no picture"),
        ("a {picture} dog", "names no picture"),
        ("a <image1> <image one>", "'<image one>' names no picture"),
        ("<image1:much>", "cannot be read"),
        ("<image1:1, tokens=many>", "cannot be read"),
        ("<image1:9>", "must be from -4 to 4"),
        ("<image1:nan>", "must be from -4 to 4"),
    ],
)
def test_a_placeholder_that_cannot_be_read_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        parse(text)


def test_words_without_pictures():
    assert interleaved.words_only("a <image1> dog, {image2:0.5} style") == "a dog, style"


# ---- preparing a picture


def test_a_picture_is_padded_with_black_to_a_square_around_its_middle():
    square = interleaved.squared(torch.ones(2, 4, 3), 4)
    assert square.shape == (1, 3, 4, 4)
    assert torch.equal(square[0, 0], torch.tensor([[-1.0] * 4, [1.0] * 4, [1.0] * 4, [-1.0] * 4]))


def test_a_mask_cuts_out_and_removes_or_keeps_the_background():
    shown = torch.full((6, 8, 3), 0.5)
    mask = torch.zeros(1, 6, 8)
    mask[0, 1, 2] = mask[0, 3, 5] = 1.0
    cut = interleaved.cut_out(shown, mask, "image1", remove=True)
    assert cut.shape == (3, 4, 3)
    assert torch.count_nonzero(cut) == 6
    assert torch.equal(interleaved.cut_out(shown, mask, "image1", remove=False), shown[1:4, 2:6])


def test_a_mask_of_another_size_is_brought_to_the_picture():
    mask = torch.zeros(1, 3, 4)
    mask[0, :, 2:] = 1.0
    assert interleaved.cut_out(torch.rand(6, 8, 3), mask, "image1", remove=False).shape[0] == 6


# ---- folders


def copy_with(models, tmp_path, name, change):
    """A copy of a model folder after a change to it."""
    import shutil

    folder = shutil.copytree(models / "models" / "idefics2", tmp_path / name)
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
        (lambda f: set_config(f, model_type="llama"), "type 'llama'.*Idefics2, Idefics3, SmolVLM and Qwen2.5-VL"),
        (to_pickle, "pytorch_model.bin, a format that can run code"),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
        (drop_a_weight, "incomplete, 1 of its weights.*gate_proj"),
        (lambda f: (f / "model.safetensors").write_bytes(b"broken"), "cannot be read"),
        (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "cannot be read|does not know"),
    ],
)
def test_a_folder_that_is_no_such_model_is_refused(models, tmp_path, change, says):
    folder = copy_with(models, tmp_path, "odd", change)
    with pytest.raises(ValueError, match=says):
        vision_language.load(folder, "float32")


def test_folders_are_listed_by_name_also_one_deeper(models):
    tiny_vlm.write(models / "models" / "maker" / "small", "smolvlm")
    assert multimodal_files.folders() == ["idefics2", "idefics3", "maker/small", "qwen2_5_vl", "smolvlm"]
    assert multimodal_files.ENCODERS.path("maker/small") == models / "models" / "maker" / "small"
    with pytest.raises(ValueError, match=r"has no model folder '../idefics2'"):
        multimodal_files.ENCODERS.path("../idefics2")


def test_the_weights_are_the_folders_own(models, vlms):
    saved = load_file(models / "models" / "idefics2" / "model.safetensors")
    loaded = vlms().patcher.model.state_dict()
    assert {key for key in saved if key != "lm_head.weight"} == set(loaded)
    assert all(torch.equal(loaded[key], saved[key]) for key in loaded)


def test_qwens_published_layout_of_weights_is_read(models, vlms, tmp_path):
    """Its authors' files name the eye visual.*, the language model model.*."""
    import shutil

    folder = shutil.copytree(models / "models" / "qwen2_5_vl", tmp_path / "published")
    weights = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    assert {"visual.patch_embed.proj.weight", "model.embed_tokens.weight"} <= weights.keys()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    found = vision_language.load(folder, "float32").patcher.model.state_dict()
    wanted = vlms("qwen2_5_vl").patcher.model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_chosen(models, dtype):
    vlm = vision_language.load(models / "models" / "smolvlm", dtype)
    states = vlm.hidden_states([("a ", Picture(picture()[0], 4), " dog")]).states
    assert vlm.dtype is states.dtype is getattr(torch, dtype)
    assert torch.isfinite(states).all()


# ---- hidden states


def stock(models, kind, ids, pixels, perceiver=True):
    """The last hidden states of transformers' own model and forward, from its own loader."""
    import transformers

    model = transformers.AutoModel.from_pretrained(models / "models" / kind).float()
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
def test_hidden_states_are_those_of_transformers_own_forward(models, vlms, kind, perceiver, tokens):
    vlm = vlms(kind, perceiver)
    shown = Picture(picture()[0], tokens)
    ids, _ = vlm.tokenised(("a ", shown, " dog"))
    pixels = interleaved.squared(shown.pixels, vlm.side(tokens))
    if kind == "idefics2" and not perceiver:
        wanted = stock(models, kind, ids, pixels, perceiver=False)
    else:
        wanted = stock(models, kind, ids, pixels)
    found = vlm.hidden_states([("a ", shown, " dog")])
    torch.testing.assert_close(found.states, wanted, rtol=1e-4, atol=1e-5)
    assert found.mask.all()


@pytest.mark.parametrize("sides", [(4, 2), (2,), ()])
def test_qwens_hidden_states_are_those_of_its_own_processor_and_forward(models, vlms, sides):
    """Pictures of several sizes among words, in 4 x 4 and 2 x 2 tokens, normalised and cut up by transformers."""
    import inspect

    import transformers

    vlm = vlms("qwen2_5_vl")
    shown = [Picture(picture(seed=i)[0], side**2) for i, side in enumerate(sides)]
    parts = [part for each in shown for part in ("a ", each, " dog")]
    ids, _ = vlm.tokenised((*parts, " in the snow"))
    model = transformers.AutoModel.from_pretrained(models / "models" / "qwen2_5_vl").float()
    given = {"input_ids": torch.tensor([ids])}
    if shown:
        squares = [interleaved.squared(each.pixels, vlm.side(each.tokens))[0] / 2 + 0.5 for each in shown]
        processor = transformers.Qwen2VLImageProcessor(patch_size=7, min_pixels=1, do_rescale=False)
        given |= dict(processor(squares, return_tensors="pt", input_data_format="channels_first"))
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        given["mm_token_type_ids"] = (given["input_ids"] == model.config.image_token_id).int()
    found = vlm.hidden_states([(*parts, " in the snow")])
    wanted = model(**given, use_cache=False).last_hidden_state
    torch.testing.assert_close(found.states, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layout_names_every_token(vlms, kind):
    vlm = vlms(kind)
    shown = [Picture(picture()[0], 16, name="image1"), Picture(picture(seed=1)[0], 4, name="image2")]
    ids, spans = vlm.tokenised(("a ", shown[0], " dog ", shown[1], " style"))
    assert [span.start for span in spans[1:]] == [span.end for span in spans[:-1]]
    assert (spans[0].start, spans[-1].end) == (0, len(ids))
    image = vlm.tokenizer.convert_tokens_to_ids(vlm.family.image)
    counts = [ids[span.start : span.end].count(image) for span in spans]
    assert [count for count in counts if count] == [16, 4]
    assert [span.picture for span in spans if span.picture] == shown
    assert spans[1].side == SIDE[kind]


@pytest.mark.parametrize("kind", ["idefics2", "qwen2_5_vl"])
def test_prompts_in_one_batch_are_those_one_by_one(vlms, kind):
    vlm, shown = vlms(kind), Picture(picture()[0], 16)
    prompts = [("a ", shown, " dog"), ("a red cat sitting",), (), ("a ", Picture(picture(seed=2)[0], 4), " man")]
    together = vlm.hidden_states(prompts)
    for row, each in enumerate(prompts):
        alone = vlm.hidden_states([each]).states
        length = alone.shape[1]
        assert together.mask[row].sum() == length
        assert together.mask[row, :length].all()
        torch.testing.assert_close(together.states[row : row + 1, :length], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_prompt_is_one_token(vlms, kind):
    assert vlms(kind).hidden_states([()]).states.shape[:2] == (1, 1)


def test_two_pictures_are_told_apart_by_place(vlms):
    vlm = vlms()
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
def test_a_number_of_tokens_that_cannot_be_is_refused(vlms, kind, perceiver, tokens, says):
    with pytest.raises(ValueError, match=says):
        vlms(kind, perceiver).tokenised((Picture(picture()[0], tokens),))


def test_the_papers_sizes_are_idefics2s():
    """252 px and 504 px for 324 and 1296 tokens (patch 14)."""
    sides = {}
    for tokens in (324, 576, 1024, 1296):
        vlm = object.__new__(vision_language.VisionLanguage)

        class Eye:
            image_size, patch_size = 980, 14

        class Config:
            vision_config = Eye

        class Holder:
            model = type("Model", (), {"model": type("Inner", (), {"config": Config})})

        fields = {"name": "x", "family": vision_language.FAMILIES["idefics2"], "patcher": Holder, "perceiver": False}
        for name, value in fields.items():
            object.__setattr__(vlm, name, value)
        sides[tokens] = vlm.side(tokens)
    assert sides == {324: 252, 576: 336, 1024: 448, 1296: 504}


def test_too_many_tokens_are_refused(vlms):
    pictures = tuple(Picture(picture()[0], 64, name=f"image{i + 1}") for i in range(3))
    with pytest.raises(ValueError, match=r"reads 160 at once \(pictures: image1 64, image2 64, image3 64\)"):
        vlms().tokenised(pictures)


def test_the_host_loads_and_offloads_the_model(vlms):
    vlm = vlms("smolvlm")
    vlm.hidden_states([("a dog",)])
    assert any(loaded.model is vlm.patcher for loaded in comfy.model_management.current_loaded_models)
    comfy.model_management.unload_all_models()
    assert not any(loaded.model is vlm.patcher for loaded in comfy.model_management.current_loaded_models)
    assert torch.isfinite(vlm.hidden_states([("a dog",)]).states).all()


def test_large_layers_are_the_hosts_own(vlms):
    small = {id(p) for m in vlms().model.modules() if not hasattr(m, "comfy_cast_weights") for p in m.parameters(False)}
    layers = [m for m in vlms().model.modules() if type(m) is torch.nn.Linear]
    assert layers == []
    assert len(small) < len(list(vlms().model.parameters()))


# ---- connectors on disk


def test_a_connector_survives_its_file(models, vlms):
    made = connector(vlms(), pooled=1280)
    made = multimodal.Connector(made.config, made.reads, made.patcher, {"steps": 3, "loss": 0.25})
    path = multimodal_files.new_path("my dog")
    multimodal_files.save(made, path)
    again = multimodal_files.load(str(path))
    assert (again.config, again.reads, again.info) == (made.config, made.reads, made.info)
    states = vlms().hidden_states([("a dog",)]).states
    for one, same in zip(made(states), again(states), strict=True):
        assert torch.equal(one, same)
    assert path.name in multimodal_files.listed()


def test_a_foreign_and_a_damaged_file_are_refused(models, vlms, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"lora.safetensors is not a multimodal connector"):
        multimodal_files.load(str(tmp_path / "lora.safetensors"))
    path = tmp_path / "cut.safetensors"
    multimodal_files.save(connector(vlms()), path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cut off or damaged"):
        multimodal_files.load(str(path))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda tensors: tensors.pop("norm_out.weight"), "norm_out.weight for one"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "more for one"),
        (lambda tensors: tensors["project.weight"].fill_(torch.nan), "NaN"),
        (
            lambda tensors: tensors.update({"project.bias": torch.zeros(WIDTH, dtype=torch.float16)}),
            "one type of number",
        ),
    ],
)
def test_a_file_whose_tensors_do_not_fit_is_refused(vlms, tmp_path, spoil, says):
    made, path = connector(vlms()), tmp_path / "odd.safetensors"
    multimodal_files.save(made, path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match=says):
        multimodal_files.load(str(path))


def test_a_trainable_copy_is_apart_and_has_a_gradient(vlms):
    made = connector(vlms())
    states = vlms().hidden_states([("a dog",), ("a red cat sitting",)])
    with torch.inference_mode(False), torch.enable_grad():
        network = made.trainable()
        context, _ = network(states.states.float().clone(), states.mask.clone())
        context.square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
        with torch.no_grad():
            network.project.weight.zero_()
    assert torch.count_nonzero(made.patcher.model.project.weight) > 0


# ---- the nodes


def load_node(**settings):
    return tiny_models.execute(LoadMultimodalEncoder, **{"folder": "idefics2", "connector": "none"} | settings)


def test_the_loader_loads_what_belongs_together(models, vlms):
    path = multimodal_files.new_path("kept")
    multimodal_files.save(connector(vlms(perceiver=True), tokens=5), path)
    made, report = load_node(connector=path.name, dtype="float32")
    assert made.vlm.perceiver
    assert made.connector.reads.tokens == 5
    assert "perceiver kept" in report
    with pytest.raises(ValueError, match="perceiver kept, it is bypassed here"):
        load_node(connector=path.name, perceiver="bypassed")
    with pytest.raises(ValueError, match=r"trained on a model of layout 'idefics2 .*, smolvlm is 'smolvlm"):
        load_node(folder="smolvlm", connector=path.name)


def test_the_loader_says_what_to_do_without_a_folder():
    said = LoadMultimodalEncoder.validate_inputs(multimodal_files.NO_FOLDER)
    assert "put the folder of a vision-language model there" in said
    assert LoadMultimodalEncoder.validate_inputs("idefics2") is True


def test_a_lora_of_the_vision_language_model_acts_and_one_of_another_model_is_refused(models):
    layer = "text_model.layers.0.self_attn.q_proj"
    files = {
        "pack": f"{layer}.lora_",
        "peft": f"base_model.model.{layer}.lora_",
        "peft-head": f"base_model.model.model.{layer}.lora_",
    }
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)
    for name, key in files.items():
        save_file({key + "A.weight": down, key + "B.weight": up}, models / "loras" / f"{name}.safetensors")
    save_file({"lora_unet_x.lora_up.weight": up}, models / "loras" / "unet.safetensors")
    text = [("a red dog",)]
    plain = load_node(dtype="float32")[0].hidden_states(text).states
    found = [load_node(dtype="float32", lora=f"{name}.safetensors")[0].hidden_states(text).states for name in files]
    assert (found[0] - plain).norm() > 1e-3 * plain.norm()
    assert all(torch.equal(each, found[0]) for each in found)
    off = load_node(dtype="float32", lora="pack.safetensors", lora_strength=0.0)[0].hidden_states(text).states
    assert torch.equal(off, plain)
    with pytest.raises(ValueError, match=r"unet.safetensors fits no layer of idefics2"):
        load_node(lora="unet.safetensors")


def test_a_prompt_becomes_two_conditionings_of_one_length(encoder):
    _, positive, negative, report = prompt(encoder)
    (context, extra), (other, extra_too) = positive[0], negative[0]
    assert context.shape == other.shape == (1, 21, WIDTH)  # <s> a, 2 marks and 16 tokens, dog
    assert context.dtype is torch.float32
    assert extra["pooled_output"].shape == extra_too["pooled_output"].shape == (1, 1280)
    assert (other == other[:, :1]).all()
    assert "21 tokens of 160: text 2 | image1 18 (28 px) | text 1" in report
    assert "negative 1 tokens, both brought to 21" in report


def test_it_is_the_connectors_output(encoder):
    prompts = interleaved.fill({"text": "a <image1> dog"}, {1: picture()[0]})["text"]
    wanted = encoder.connector(encoder.hidden_states([interleaved.with_tokens(prompts, 16)]).states)[0]
    torch.testing.assert_close(prompt(encoder)[1][0][0], wanted)


def test_the_picture_is_seen(encoder):
    one = prompt(encoder)[1][0][0]
    other = prompt(encoder, images={"image1": picture(seed=7)})[1][0][0]
    assert (one - other)[:, 3:].norm() > 0.01 * one[:, 3:].norm()


def sample(model, positive, negative):
    sampling = comfy.samplers.KSampler(model, 3, torch.device("cpu"), "euler", "normal")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = {"cfg": 4.0, "latent_image": torch.zeros_like(noise), "disable_pbar": True, "seed": 1}
    return sampling.sample(noise, positive, negative, **settings)


def test_it_samples_the_same_with_and_without_the_returned_model(encoder):
    plain = tiny_models.unet()
    model, positive, negative, _ = prompt(encoder, model=plain)
    assert torch.equal(sample(model, positive, negative), sample(plain, positive, negative))


def test_a_written_negative_prompt_counts_as_its_own_tokens(encoder):
    """Whatever it was repeated to: as if it were sampled alone, at its own length."""
    model, positive, negative, report = prompt(encoder, negative_text="bad blurry picture")
    assert "negative 4 tokens, both brought to 21" in report
    short = [[negative[0][0][:, :4], negative[0][1]]]
    wanted = sample(tiny_models.unet(), positive, short)
    torch.testing.assert_close(sample(model, positive, negative), wanted, rtol=1e-5, atol=1e-4)


def test_sdxl_samples(vlms):
    unet = tiny_models.unet("sdxl")
    made = join(vlms(), connector(vlms(), pooled=1280))
    model, positive, negative, _ = prompt(made, model=unet)
    assert torch.isfinite(sample(model, positive, negative)).all()


def test_pooled_output_is_as_chosen(vlms):
    class Clip:
        def tokenize(self, text):
            return text

        def encode_from_tokens(self, tokens, return_pooled):
            return None, torch.full((1, 1280), float(len(tokens)))

    plain, learned = join(vlms(), connector(vlms())), join(vlms(), connector(vlms(), pooled=1280))

    def pooled(made, **settings):
        _, positive, negative, _ = prompt(made, **settings)
        return positive[0][1]["pooled_output"], negative[0][1]["pooled_output"]

    assert torch.count_nonzero(torch.cat(pooled(plain))) == 0
    positive, negative = pooled(plain, clip=Clip())
    assert (positive == len("a dog")).all()
    assert torch.count_nonzero(negative) == 0
    assert torch.count_nonzero(torch.cat(pooled(plain, clip=Clip(), pooled_output="zeros"))) == 0
    assert pooled(learned)[0].std() > 0.1
    assert torch.equal(pooled(learned)[0], pooled(learned, pooled_output="learned", clip=Clip())[0])
    with pytest.raises(ValueError, match="learned no pooled output"):
        pooled(plain, pooled_output="learned")
    with pytest.raises(ValueError, match="connect clip"):
        pooled(plain, pooled_output="CLIP text")


def test_a_weight_moves_only_the_pictures_tokens(encoder):
    full = prompt(encoder)[1][0][0]
    assert torch.equal(prompt(encoder, "a <image1:1> dog")[1][0][0], full)
    half, none = (prompt(encoder, f"a <image1:{weight}> dog")[1][0][0] for weight in (0.5, 0))
    neutral = encoder.connector(encoder.hidden_states([()]).states)[0]
    text = [0, 1, 20]
    assert torch.equal(half[:, text], full[:, text])
    torch.testing.assert_close(none[:, 2:20], neutral.expand(-1, 18, -1))
    torch.testing.assert_close(half[:, 2:20], (full + none)[:, 2:20] / 2)


def test_tokens_are_chosen_for_all_and_for_one(encoder):
    _, positive, _, report = prompt(encoder, "<image1> <image2, tokens=4>", 2, tokens_per_picture="64")
    assert "image1 66 (56 px) | image2 6 (14 px)" in report
    assert positive[0][0].shape[1] == 1 + 66 + 6


def test_a_mask_shows_the_subject_alone(encoder):
    mask = torch.zeros(1, 30, 50)
    mask[:, 5:20, 10:30] = 1.0
    inputs = {"masks": {"mask1": mask}}
    removed = prompt(encoder, **inputs)[1][0][0]
    kept = prompt(encoder, background="kept", **inputs)[1][0][0]
    cut = prompt(encoder, images={"image1": picture()[:, 5:20, 10:30]})[1][0][0]
    torch.testing.assert_close(kept, cut)
    torch.testing.assert_close(removed, cut)
    mask[:, 10:12, 15:20] = 0.0
    assert (prompt(encoder, **inputs)[1][0][0] - cut).norm() > 1e-4 * cut.norm()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"text": "a <image2> dog"}, "the text names <image2>, and image1 is connected"),
        ({"text": "a dog"}, "image1 is connected and no text names it"),
        ({"text": "a <image1> dog", "images": {}}, "no picture is connected"),
        ({"negative_text": "<image3>"}, "the negative_text names <image3>"),
        ({"images": {"image1": tiny_models.picture(3)}}, "image1 holds 3 pictures and stands for one"),
        ({"images": {"image1": torch.full((1, 8, 8, 3), torch.nan)}}, "NaN"),
        ({"masks": {"mask2": torch.ones(1, 8, 8)}}, "mask2 has no picture"),
        ({"masks": {"mask1": torch.zeros(1, 8, 8)}}, "the mask of image1 is empty"),
        ({"masks": {"mask1": torch.ones(2, 8, 8)}}, "holds 2 masks"),
        ({"tokens_per_picture": "1296"}, "1296 are wanted: take 64"),
        ({"text": "<image1> <image1> <image1>", "tokens_per_picture": "64"}, "reads 160 at once"),
        ({"text": "a <image1>,<fake>image</fake> <image1, tokens=many>"}, "cannot be read"),
    ],
)
def test_what_cannot_be_prompted_is_refused(encoder, settings, says):
    with pytest.raises(ValueError, match=says):
        prompt(encoder, **settings)


def test_a_model_of_another_width_is_refused(vlms):
    made = join(vlms(), connector(vlms(), width=32))
    with pytest.raises(ValueError, match=r"tokens of 32 channels .*, this model reads 24"):
        prompt(made)


def test_without_a_connector_it_says_where_to_get_one(vlms):
    with pytest.raises(ValueError, match="has no connector to the U-Net"):
        prompt(join(vlms(), None))


def test_inputs_are_left_as_they_were(encoder):
    image, unet = picture(), tiny_models.unet()
    before, options = image.clone(), repr(unet.model_options)
    prompt(encoder, model=unet, images={"image1": image})
    assert torch.equal(image, before)
    assert repr(unet.model_options) == options


def test_a_connector_written_anew_is_read_again(models, vlms):
    path = multimodal_files.new_path("rewritten")
    multimodal_files.save(connector(vlms()), path)
    chosen = {"folder": "idefics2", "connector": path.name, "lora": "none", "dtype": "auto"}
    first = LoadMultimodalEncoder.fingerprint_inputs(**chosen)
    assert LoadMultimodalEncoder.fingerprint_inputs(**chosen) == first
    os.utime(path, (1, 1))
    assert LoadMultimodalEncoder.fingerprint_inputs(**chosen) != first
