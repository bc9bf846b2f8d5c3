"""The border of every node: what is refused in a sentence, what is made fit, and that no node can forget it."""

import asyncio
import math

import pytest
import tiny_models
import torch
from comfy_api.latest import io
from harness import invert, prompts, tune
from palimpsest.nodes import border, host
from palimpsest.nodes.attention_map.nodes import FindWords, ReadAttentionMap
from palimpsest.nodes.contextdiff.nodes import ContextSampler, TrainContextAdapter
from palimpsest.nodes.edit_report.nodes import EditReport
from palimpsest.nodes.extension import Palimpsest, register_folders
from palimpsest.nodes.feature_blend.nodes import FeatureBlend, TuneFeatureBlend
from palimpsest.nodes.inversion.nodes import Invert
from palimpsest.nodes.keep_outside.nodes import KeepOutside
from palimpsest.nodes.kv.nodes import ApplyKV, TuneKV
from palimpsest.nodes.words.words import ChosenWords

register_folders()
NODES = asyncio.run(Palimpsest().get_node_list())
NAN, INF = math.nan, math.inf
NUMBERS = [
    (node.GET_SCHEMA().node_id, socket)
    for node in NODES
    for socket in node.define_schema().inputs
    if isinstance(socket, io.Int.Input | io.Float.Input)
]
CHECKED = [node for node in NODES if node.validate_inputs.__func__ is not io.ComfyNode.validate_inputs.__func__]

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(scope="module")
def model():
    return tiny_models.unet()


@pytest.fixture(scope="module")
def walked(model):
    """A trajectory of three steps."""
    with torch.inference_mode():
        return invert(model, steps=3)[0]


def limited(start, end, seed=1):
    """A prompt as ConditioningSetTimestepRange gives it."""
    return [[text, extra | {"start_percent": start, "end_percent": end}] for text, extra in tiny_models.prompt(seed)]


def refused(node, message, **values):
    with pytest.raises(ValueError, match=message):
        tiny_models.execute(node, **values)


# ---- no node can forget it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.GET_SCHEMA().node_id)
def test_the_host_is_given_every_node_with_its_border(node):
    plain = next(base for base in node.__mro__[1:] if "execute" in base.__dict__)
    assert node.execute.__func__ is not plain.execute.__func__
    assert node.execute.__func__.__wrapped__ is plain.execute.__func__
    assert node.GET_SCHEMA().node_id == plain.define_schema().node_id


@pytest.mark.parametrize(("node", "socket"), NUMBERS, ids=lambda value: getattr(value, "id", value))
@pytest.mark.parametrize("value", [NAN, INF, -INF, "NaN", None, 10.0**30])
def test_no_number_is_none_or_out_of_bounds(node, socket, value):
    with pytest.raises(ValueError, match=rf"^{socket.id} is "):
        border.number(value, socket.id, socket)


def test_nan_in_a_widget_is_refused_where_it_gave_black_pictures(model, walked):
    usual = {"model": model, "positive": prompts()[0]}
    walk = usual | {"latent": tiny_models.latent(), "negative": prompts()[1]}
    refused(Invert, "guidance is nan: give it a number from 0 to 30", **walk, guidance=NAN)
    refused(Invert, "reconstruction_guidance is nan", **walk, reconstruction_guidance=NAN)
    refused(FeatureBlend, "alpha_inside is nan", **usual, trajectory=walked, alpha_inside=NAN)
    refused(ApplyKV, "strength is nan", model=model, kv=walked, strength=NAN)
    refused(ContextSampler, "strength is nan", context_adapter=object(), strength=NAN)


def test_a_linked_choice_that_is_none_is_refused_with_the_choices(model, walked):
    given = {"model": model, "trajectory": walked, "positive": prompts()[0], "negative": prompts()[1]}
    refused(TuneKV, "layers is 'sideways': choose one of 'decoder, encoder", **given, layers="sideways")


@pytest.mark.parametrize("node", CHECKED, ids=lambda node: node.GET_SCHEMA().node_id)
def test_what_is_missing_or_linked_is_left_to_the_host(node):
    """The host gives validate_inputs the values that a graph has: not what it forgot, nor what comes by a link."""
    assert node.validate_inputs() is True


# ---- pictures, masks, latents ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        (torch.rand(2, 8, 8, 3), (2, 8, 8, 3)),
        (torch.rand(2, 8, 8, 4), (2, 8, 8, 4)),
        (torch.rand(2, 8, 8, 1), (2, 8, 8, 3)),
        (torch.rand(2, 8, 8, 2), (2, 8, 8, 4)),
        (torch.rand(8, 8, 3), (1, 8, 8, 3)),
        (torch.randint(0, 256, (1, 8, 8, 3), dtype=torch.uint8), (1, 8, 8, 3)),
    ],
)
def test_pictures_are_made_fit(given, shape):
    found = border.picture(given, "image")
    assert tuple(found.shape) == shape
    assert found.is_floating_point()
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_grey_stays_grey_and_keeps_its_alpha():
    given = torch.rand(1, 4, 4, 2)
    found = border.picture(given, "image")
    assert torch.equal(found[..., :3], given[..., :1].expand(-1, -1, -1, 3))
    assert torch.equal(found[..., 3], given[..., 1])


def test_what_fits_is_the_same_tensor():
    image, mask = torch.rand(1, 8, 8, 3), torch.rand(1, 8, 8)
    assert border.picture(image, "image") is image
    assert border.mask(mask, "mask") is mask


@pytest.mark.parametrize(
    ("check", "given", "message"),
    [
        (border.picture, torch.rand(8, 8), "image has 2 dimensions"),
        (border.picture, torch.rand(1, 1, 8, 8, 3), "image has 5 dimensions"),
        (border.picture, torch.rand(1, 8, 8, 5), "image has 5 channels"),
        (border.picture, torch.rand(1, 0, 0, 3), "image is empty"),
        (border.picture, torch.full((1, 8, 8, 3), NAN), "image holds NaN"),
        (border.picture, [1], r"image is \[1\]"),
        (border.mask, torch.rand(8), "image has 1 dimensions"),
        (border.mask, torch.rand(1, 2, 8, 8), "image has the shape"),
        (border.mask, torch.full((1, 8, 8), INF), "image holds NaN or infinite"),
        (border.latent, {}, "image holds no samples"),
        (border.latent, {"samples": None}, "image holds no samples"),
        (border.latent, {"samples": torch.rand(1, 4, 2, 2)}, r"2 x 2 \(16 x 16 pixels\)"),
        (border.latent, {"samples": torch.rand(1, 4, 8, 8) * NAN}, "image holds NaN"),
        (border.sigmas, torch.tensor([1.0, NAN]), "image holds NaN"),
        (border.sigmas, torch.tensor([1.0, -1.0]), "goes down to -1"),
        (border.conditioning, [], "image holds no prompt"),
        (border.conditioning, [[torch.rand(1, 0, 24), {}]], "image is empty"),
        (border.conditioning, [[torch.rand(1, 7, 24) * NAN, {}]], "image holds NaN"),
        (border.conditioning, [[torch.rand(1, 7, 24), {"strength": NAN}]], "image has a strength with NaN"),
        (border.conditioning, ["a cat"], "which is no prompt"),
        (border.boxes, [{"x": NAN, "y": 0, "width": 1, "height": 1}], "a box whose x is nan"),
        (border.boxes, [[None]], "image holds None, which is no box"),
    ],
)
def test_what_cannot_be_made_fit_is_refused(check, given, message):
    with pytest.raises(ValueError, match=message):
        check(given, "image")


def test_masks_are_made_fit():
    for given in (torch.ones(8, 8), torch.ones(1, 1, 8, 8), torch.ones(1, 8, 8, 1), torch.ones(1, 8, 8).bool()):
        assert torch.equal(border.mask(given, "mask"), torch.ones(1, 8, 8))
    assert float(border.mask(torch.full((1, 2, 2), 255, dtype=torch.uint8), "mask").max()) == 1.0


def test_texts_that_cannot_be_encoded_are_refused():
    prompt = io.String.Input("text", dynamic_prompts=True)
    other = io.String.Input("lines")
    with pytest.raises(ValueError, match="holds half a character"):
        border.text("a \ud800 cat", "text", other)
    with pytest.raises(ValueError, match="text has 100000 letters, at most 10000"):
        border.text("x" * 100_000, "text", prompt)
    with pytest.raises(ValueError, match="more than 100 brackets"):
        border.text("(" * 101 + "cat" + ")" * 101, "text", prompt)
    assert border.text("x" * 100_000, "lines", other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_is_told_in_every_precision(dtype):
    largest = torch.full((5,), torch.finfo(dtype).max, dtype=dtype)
    assert host.is_finite(largest)
    assert host.is_finite(torch.cat([largest, -largest]))
    for value in (NAN, INF, -INF):
        assert not host.is_finite(torch.cat([largest, torch.tensor([value], dtype=dtype)]))


def test_grey_pictures_are_measured_and_composited():
    source, edited = tiny_models.picture(1)[..., :1], tiny_models.picture(1, seed=1)
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:48, 16:48] = 1
    assert "PSNR" in tiny_models.execute(EditReport, source=source, edited=edited)[0]
    kept = tiny_models.execute(KeepOutside, source=source, edited=edited, mask=mask)[0]
    assert torch.equal(kept[:, :8], source[:, :8].expand(-1, -1, -1, 3))


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_a_prompt_that_is_not_active_at_a_level_is_refused_by_name(model, walked):
    usual, given = prompts(), {"model": model, "trajectory": walked}
    both = {"positive": limited(0.0, 0.5), "negative": usual[1]}
    message = "positive acts in a part of the sampling only"
    refused(TuneKV, message, **given, **both, inner_steps=1)
    refused(Invert, message, model=model, latent=tiny_models.latent(), **both)
    refused(TuneFeatureBlend, "target_positive acts in a part", **given, positive=usual[0], negative=usual[1],
            target_positive=limited(0.5, 1.0))  # fmt: skip
    refused(FeatureBlend, "the source's prompt acts in a part", **given, positive=limited(0.0, 0.5), alpha_inside=0.5)
    tokens = ChosenWords(("cat",), ((1,),), usual[0][0][0])
    refused(FindWords, message, **given, tokens=tokens, positive=limited(0.0, 0.1))
    refused(TuneKV, "negative acts in a part", **given, positive=usual[0], negative=limited(0.5, 1.0), inner_steps=1)


def test_prompts_that_take_turns_serve(model, walked):
    turns = [*limited(0.0, 0.4), *limited(0.4, 1.0, seed=4)]  # at 0.5 both would act at one of three levels
    kv = tune(model, walked, positive=turns, inner_steps=1, layers="middle")[0]
    assert torch.isfinite(kv.scalars).all()
    report = tiny_models.execute(FeatureBlend, model=model, trajectory=walked, positive=turns, alpha_inside=0.5)[1]
    assert "source cached" in report


def test_a_prompt_within_the_blended_span_serves(model, walked):
    given = {"model": model, "trajectory": walked, "alpha_inside": 0.5, "end_percent": 0.3}
    assert "blends" in tiny_models.execute(FeatureBlend, positive=limited(0.0, 0.6), **given)[1]


def test_a_prompt_of_another_width_is_refused_before_anything_runs(model, walked):
    wide = [[torch.randn(1, 7, 48), {}]]
    given = {"model": model, "trajectory": walked, "negative": prompts()[1]}
    message = "has 48 channels, this model reads prompts of 24"
    refused(Invert, f"positive {message}", model=model, latent=tiny_models.latent(), positive=wide)
    refused(TuneKV, f"positive {message}", **given, positive=wide)
    refused(TuneFeatureBlend, f"target_positive {message}", **given, positive=prompts()[0], target_positive=wide)
    refused(TrainContextAdapter, f"positive {message}", model=model, latent=tiny_models.latent(), positive=wide)


def test_sdxl_wants_a_pooled_output(walked):
    given = {"model": tiny_models.unet("sdxl"), "latent": tiny_models.latent()}
    refused(Invert, "SDXL reads a pooled output of 1280 channels", **given, positive=tiny_models.prompt(1))


def test_an_area_outside_of_the_picture_is_refused(model):
    outside = [[text, {"area": (4, 4, 0, 20)}] for text, _ in tiny_models.prompt(1)]
    refused(Invert, "begins at 160, 0, outside of a picture of 64 x 64", model=model, latent=tiny_models.latent(),
            positive=outside)  # fmt: skip


# ---- models ---------------------------------------------------------------------------------------------------------


def test_a_trajectory_of_another_text_width_or_input_is_refused(model, monkeypatch):
    monkeypatch.setitem(tiny_models.FAMILIES, "wide", ("SD15", "BaseModel", tiny_models.SD15 | {"context_dim": 48}))
    wide = tiny_models.unet("wide")
    text = [[torch.randn(1, 7, 48), {}]]
    walked = invert(wide, positive=text, negative=text, steps=2)[0]
    usual = {"positive": prompts()[0], "negative": prompts()[1]}
    for other in (model, tiny_models.unet("sd15-inpaint")):
        refused(TuneKV, "recorded with another model architecture", model=other, trajectory=walked, **usual)


def test_what_was_saved_before_text_width_counted_still_fits(model):
    other = tiny_models.unet("sdxl")
    older = host.model.fingerprint(host.model.layout(model))
    assert older != host.layout_fingerprint(model)
    assert host.same_layout(model, older)
    assert host.same_layout(model, host.layout_fingerprint(model))
    assert not host.same_layout(other, older)


# ---- what comes out -------------------------------------------------------------------------------------------------


def test_a_model_that_returns_nan_ends_in_a_sentence_and_no_report(model):
    broken = model.clone()
    broken.set_model_unet_function_wrapper(
        lambda apply, given: apply(given["input"], given["timestep"], **given["c"]) * NAN
    )
    refused(Invert, "trajectory came out with NaN", model=broken, latent=tiny_models.latent(), positive=prompts()[0])


def test_large_objects_are_looked_at_once(model, monkeypatch, walked):
    border.object_of_ours(walked, "trajectory")
    monkeypatch.setattr(host, "is_finite", lambda tensor: pytest.fail("looked at again"))
    assert border.object_of_ours(walked, "trajectory") is walked


def test_a_latent_without_samples_is_refused_by_the_reader():
    refused(ReadAttentionMap, "samples holds no samples", record=object(), samples={})


def test_a_picture_far_beyond_white_is_refused():
    with pytest.raises(ValueError, match="image has values beyond 100000, a picture goes from 0 to 1"):
        border.picture(torch.full((1, 8, 8, 3), 1e30), "image")
    bright = torch.full((1, 8, 8, 3), 60000.0)
    assert border.picture(bright, "image") is bright


def test_an_optional_list_of_nothing_is_not_connected():
    boxes = io.Custom("BOUNDING_BOX").Input("boxes", optional=True)
    assert border.looked_at([None], "boxes", boxes, listed=True) is None
    assert border.looked_at([[]], "boxes", boxes, listed=True) == [[]]
