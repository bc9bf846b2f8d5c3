"""Load Multimodal Encoder and Multimodal Prompt in the host: what they load, make, and refuse."""

import os

import comfy.samplers
import pytest
import tiny_models
import tiny_vlm
import torch
from palimpsest.nodes.multimodal import files as multimodal_files
from palimpsest.nodes.multimodal import interleaved, loading, nodes, prompting
from palimpsest.nodes.multimodal.encoder import join
from palimpsest.nodes.multimodal.nodes import LoadMultimodalEncoder, MultimodalPrompt
from safetensors.torch import save_file

WIDTH = tiny_models.SD15["context_dim"]

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(scope="module")
def encoder(loaded):
    return join(loaded(), tiny_vlm.connector(loaded()))


def picture(height=30, width=50, seed=0):
    return tiny_models.picture(1, height, width, seed)


def prompt(encoder, text="a <image1> dog", pictures=1, **settings):
    """(model, positive, negative, report, seen)."""
    images = {f"image{i + 1}": picture(seed=i) for i in range(pictures)}
    inputs = {"model": tiny_models.unet(), "multimodal_encoder": encoder, "text": text, "images": images}
    return tiny_models.execute(MultimodalPrompt, **inputs | settings)


def load_node(**settings):
    return tiny_models.execute(LoadMultimodalEncoder, **{"folder": "idefics2", "connector": "none"} | settings)


def test_the_loader_loads_what_belongs_together(encoder_folders, loaded):
    path = multimodal_files.new_path("kept")
    multimodal_files.save_connector(tiny_vlm.connector(loaded(perceiver=True), tokens=5), path)
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


def test_a_lora_of_the_vision_language_model_acts_and_one_of_another_model_is_refused(encoder_folders):
    layer = "text_model.layers.0.self_attn.q_proj"
    files = {
        "pack": f"{layer}.lora_",
        "peft": f"base_model.model.{layer}.lora_",
        "peft-head": f"base_model.model.model.{layer}.lora_",
    }
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)
    for name, key in files.items():
        save_file({key + "A.weight": down, key + "B.weight": up}, encoder_folders / "loras" / f"{name}.safetensors")
    save_file({"lora_unet_x.lora_up.weight": up}, encoder_folders / "loras" / "unet.safetensors")
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
    _, positive, negative, report, _ = prompt(encoder)
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
    model, positive, negative, *_ = prompt(encoder, model=plain)
    assert torch.equal(sample(model, positive, negative), sample(plain, positive, negative))


def test_a_written_negative_prompt_counts_as_its_own_tokens(encoder):
    """Whatever it was repeated to: as if it were sampled alone, at its own length."""
    model, positive, negative, report, _ = prompt(encoder, negative_text="bad blurry picture")
    assert "negative 4 tokens, both brought to 21" in report
    short = [[negative[0][0][:, :4], negative[0][1]]]
    wanted = sample(tiny_models.unet(), positive, short)
    torch.testing.assert_close(sample(model, positive, negative), wanted, rtol=1e-5, atol=1e-4)


def test_sdxl_samples(loaded):
    unet = tiny_models.unet("sdxl")
    made = join(loaded(), tiny_vlm.connector(loaded(), pooled=1280))
    model, positive, negative, *_ = prompt(made, model=unet)
    assert torch.isfinite(sample(model, positive, negative)).all()


def test_pooled_output_is_as_chosen(loaded):
    class Clip:
        def tokenize(self, text):
            return text

        def encode_from_tokens(self, tokens, return_pooled):
            return None, torch.full((1, 1280), float(len(tokens)))

    plain, learned = (
        join(loaded(), tiny_vlm.connector(loaded())),
        join(loaded(), tiny_vlm.connector(loaded(), pooled=1280)),
    )

    def pooled(made, **settings):
        _, positive, negative, *_ = prompt(made, **settings)
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
    _, positive, _, report, _ = prompt(encoder, "<image1> <image2, tokens=4>", 2, tokens_per_picture="64")
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


def test_plain_names_of_growing_inputs_are_those_with_dots(encoder):
    """As programs write them that do not know the editor's names: image1 for images.image1, mask1 for masks.mask1."""
    mask = torch.zeros(1, 30, 50)
    mask[:, 5:20, 10:30] = 1.0
    wanted = prompt(encoder, masks={"mask1": mask})[1][0][0]
    assert torch.equal(prompt(encoder, images=None, image1=picture(), mask1=mask)[1][0][0], wanted)
    with pytest.raises(ValueError, match=r"image1 and images.image1 are both connected"):
        prompt(encoder, image1=picture())
    with pytest.raises(ValueError, match="'image11' is no input: they are image1 to image10"):
        prompt(encoder, image11=picture())
    with pytest.raises(TypeError, match=r"this node has no input 'images.foo', it has text, .*take it out"):
        prompt(encoder, **{"images.foo": picture()})


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_pictures_and_those_with_transparency_are_prompted(encoder, channels):
    image = picture()[..., :1].repeat(1, 1, 1, channels)
    wanted = prompt(encoder, images={"image1": image[..., :1].repeat(1, 1, 1, 3)})[1][0][0]
    assert torch.equal(prompt(encoder, images={"image1": image})[1][0][0], wanted)


def test_a_model_of_another_width_is_refused(loaded):
    made = join(loaded(), tiny_vlm.connector(loaded(), width=32))
    with pytest.raises(ValueError, match=r"tokens of 32 channels .*, this model reads 24"):
        prompt(made)


def test_without_a_connector_it_says_where_to_get_one(loaded):
    with pytest.raises(ValueError, match="has no connector to the U-Net"):
        prompt(join(loaded(), None))


def test_inputs_are_left_as_they_were(encoder):
    image, unet = picture(), tiny_models.unet()
    before, options = image.clone(), repr(unet.model_options)
    prompt(encoder, model=unet, images={"image1": image})
    assert torch.equal(image, before)
    assert repr(unet.model_options) == options


def test_a_connector_written_anew_is_read_again(encoder_folders, loaded):
    path = multimodal_files.new_path("rewritten")
    multimodal_files.save_connector(tiny_vlm.connector(loaded()), path)
    chosen = {"folder": "idefics2", "connector": path.name, "lora": "none", "dtype": "auto"}
    first = LoadMultimodalEncoder.fingerprint_inputs(**chosen)
    assert LoadMultimodalEncoder.fingerprint_inputs(**chosen) == first
    os.utime(path, (1, 1))
    assert LoadMultimodalEncoder.fingerprint_inputs(**chosen) != first


# ---- settings by name


def caught(monkeypatch, module, name):
    """The arguments that a node gives to a function; it stops there."""
    found = []

    def catch(*arguments):
        found.extend(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, name, catch)
    return found


def test_every_widget_of_the_loader_arrives_under_its_name(monkeypatch):
    chosen = {
        "folder": "a",
        "connector": "b",
        "perceiver": "kept",
        "dtype": "float16",
        "lora": "c",
        "lora_strength": 0.5,
    }
    found = caught(monkeypatch, nodes, "load_encoder")
    with pytest.raises(KeyboardInterrupt):
        LoadMultimodalEncoder.execute(**chosen)
    assert found[0].named() == chosen
    assert {socket.id for socket in LoadMultimodalEncoder.define_schema().inputs} == set(chosen)


def test_every_widget_of_the_prompt_arrives_under_its_name(monkeypatch):
    chosen = {
        "text": "a",
        "negative_text": "b",
        "tokens_per_picture": "64",
        "background": "kept",
        "pooled_output": "zeros",
    }
    sockets = {"model": 1, "multimodal_encoder": 2, "images": {"image1": 3}, "masks": {"mask1": 4}, "clip": 5}
    found = caught(monkeypatch, prompting, "prompt")
    with pytest.raises(KeyboardInterrupt):
        MultimodalPrompt.execute(**sockets, **chosen)
    *given, settings, clip = found
    assert [*given, clip] == list(sockets.values())
    assert settings.named() == chosen
    assert {socket.id for socket in MultimodalPrompt.define_schema().inputs} == chosen.keys() | sockets.keys()


@pytest.mark.parametrize(
    ("chosen", "trained", "kept"),
    [
        ("as trained", None, False),
        ("as trained", False, False),
        ("as trained", True, True),
        ("bypassed", True, False),
        ("kept", None, True),
    ],
)
def test_the_perceiver_is_as_chosen_or_as_trained(loaded, chosen, trained, kept):
    connector = None if trained is None else tiny_vlm.connector(loaded(perceiver=trained), 5 if trained else 16)
    assert loading.EncoderSettings("idefics2", perceiver=chosen).keeps_perceiver(connector) is kept
