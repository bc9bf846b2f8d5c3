"""Load MGIE: transformers' own classes read alike, the edit head, the U-Net's names; folders that are not allowed."""

import comfy.sd
import comfy.utils
import pytest
import tiny_mgie
import tiny_models
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from palimpsest.nodes.cross_attention.nodes import CrossAttentionMask
from palimpsest.nodes.instruction import loading, nodes, unet
from palimpsest.nodes.instruction.folder import MgieFolder
from palimpsest.nodes.instruction.llava import load_mgie
from palimpsest.nodes.words import ChosenWords
from safetensors.torch import load_file, save_file
from tiny_models import execute

pytestmark = pytest.mark.usefixtures("inference")
QUESTION = "what will this image be like if 'make it winter'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_mgie.write(tmp_path_factory.mktemp("mgie") / "mgie")


@pytest.fixture(scope="module")
def model(folder):
    return load_mgie(MgieFolder(folder), "float32")


def head_of(folder):
    """An EDIT_HEAD as Load MGIE gives it."""
    trained = loading.head_in(MgieFolder(folder))
    when_asked = loading.WhenAsked(MgieFolder(folder), "float32")
    return loading.EditHead("mgie", trained.network, trained.embeddings, when_asked)


def in_transformers(ids: list[int], pixels: torch.Tensor) -> torch.Tensor:
    """(L, D): the last states of transformers' own classes, joined by hand, of tokens with one picture."""
    made, vision, projector, language, *_ = tiny_mgie.parts()
    patch = made.convert_tokens_to_ids("<im_patch>")
    given = torch.tensor([ids])
    seen = vision(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    embedded = language.get_input_embeddings()(given).clone()
    embedded[given == patch] = projector(seen)[0]
    return language(inputs_embeds=embedded, output_hidden_states=True).hidden_states[-1][0]


# ------------------------------------------------------------------------------------------------- the language model


def test_it_writes_what_transformers_classes_write(model):
    from transformers import NoRepeatNGramLogitsProcessor

    picture, heard = tiny_models.picture(1, 40, 60)[0], []
    read, text, tokens, said = model.write(picture, QUESTION, 12, lambda text, tokens: heard.append(tokens))
    ids = model.tokens(model.prompt(QUESTION))
    assert ids.count(model.token("<im_patch>")) == 16
    assert model.prompt(QUESTION).endswith(f"USER: {QUESTION}\n<im_start><im_patch><im_end> ASSISTANT:")
    block, lm_head, written = NoRepeatNGramLogitsProcessor(3), tiny_mgie.parts()[3].lm_head, []
    while len(written) < 12 and 2 not in written:
        logits = lm_head(in_transformers(ids + written, read.pixels)[-1:])
        written.append(int(block(torch.tensor([ids + written]), logits).argmax()))
    assert model.tokenizer.decode(written) == text
    assert heard == list(range(1, tokens + 1))
    assert not said
    want = in_transformers(ids + written, read.pixels)[len(ids) + tokens - 10 :][:8]  # not said: the last eight but one
    torch.testing.assert_close(read.states, want, rtol=1e-4, atol=1e-4)


def test_an_edited_text_is_read_by_the_same_model(model):
    read, *_ = model.write(tiny_models.picture(1, 40, 60)[0], QUESTION, 12, lambda text, tokens: None)
    again = model.read(read, "a cat in the snow")
    ids = model.tokens(f"{read.prompt} a cat in the snow") + [model.token(f"[IMG{i}]") for i in range(8)]
    torch.testing.assert_close(again.states, in_transformers(ids, read.pixels)[-9:-1], rtol=1e-4, atol=1e-4)


def test_a_picture_is_cut_as_clip_cuts_it(model):
    from transformers import CLIPImageProcessor

    picture = tiny_models.picture(1, 37, 90)[0]
    size = {"crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 28}}
    want = CLIPImageProcessor(**size, do_rescale=False)(
        picture.numpy(), return_tensors="pt", input_data_format="channels_last"
    )
    assert (model.pixels(picture) - want["pixel_values"]).abs().max() < 0.1  # Pillow's filter rounds to bytes


def test_what_is_merged_and_what_lies_over_it_are_one(folder, tmp_path):
    merged = load_mgie(MgieFolder(tiny_mgie.write(tmp_path / "merged", merged=True)), "float32").llava.state_dict()
    laid = load_mgie(MgieFolder(folder), "float32").llava.state_dict()
    assert all(torch.equal(laid[name], tensor) for name, tensor in merged.items())


# -------------------------------------------------------------------------------------------------------- the nodes


def test_from_picture_to_prompt(folder):
    head, picture = head_of(folder), tiny_models.picture(2, 40, 60)
    assert head.model.model is None  # not read until it is asked
    text, read, report = execute(nodes.ExpressInstruction, image=picture, mgie=head, max_tokens=12)
    assert len(read.readings) == 2
    assert text.splitlines() == [reading.text for reading in read.readings]
    assert "it did not say [IMG0]" in report
    assert "the square in the middle of 60 x 40 pixels" in report
    positive, without, negative, said = execute(
        nodes.EditInstruction, route="edit head", edit_head=read, expressed=text
    )
    assert positive[0][0].shape == (2, 77, 768)
    assert positive[0][1]["pooled_output"].shape == (2, 768)
    states = torch.stack([reading.states for reading in read.readings])
    assert torch.equal(positive[0][0], head.network(states, head.embeddings))
    assert torch.equal(without[0][0], head.network(torch.zeros(1, 8, 32), head.embeddings))
    assert torch.equal(negative[0][0], without[0][0])
    assert "anew" not in said
    assert torch.equal(execute(nodes.EditInstruction, route="edit head", edit_head=read)[0][0][0], positive[0][0])
    edited, *_, said = execute(nodes.EditInstruction, route="edit head", edit_head=read, text="a cat in the snow")
    assert "2 of 2 anew" in said
    assert not torch.equal(edited[0][0], positive[0][0])


def test_chosen_words_refuse_the_edit_heads_prompt(folder):
    _, read, _ = execute(nodes.ExpressInstruction, image=tiny_models.picture(), mgie=head_of(folder), max_tokens=12)
    positive, without, *_ = execute(nodes.EditInstruction, route="edit head", edit_head=read)
    positive, without = ([[each[0][0][..., :24], each[0][1]]] for each in (positive, without))
    words, mask = ChosenWords(("cat",), ((1,),), positive[0][0]), torch.ones(1, 8, 8)
    mask[..., :4] = 0
    run = {"positive": positive, "negative": without, "seed": 0, "steps": 2, "cfg": 3.0}
    for tokens in (None, words):
        model = execute(CrossAttentionMask, model=tiny_models.unet(), mask=mask, tokens=tokens)[0]
        if tokens is None:
            sample(model, **run)
            continue
        with pytest.raises(
            ValueError, match="of the edit head of Edit Instruction is sampled, whose tokens are no words"
        ):
            sample(model, **run)


def sample(model, *, positive, negative, seed, steps, cfg):
    import comfy.sample

    latent = tiny_models.latent()["samples"]
    noise = comfy.sample.prepare_noise(latent, seed)
    where = (steps, cfg, "euler", "normal", positive, negative, latent)
    return comfy.sample.sample(model, noise, *where, disable_pbar=True, seed=seed)


# -------------------------------------------------------------------------------------------------------- the U-Net


def full_size() -> tuple[dict, dict]:
    """(tensors in the names of checkpoints, the host's table from diffusers' names) of SD 1.5's U-Net, 8 channels."""
    layout = tiny_models.SD15_FULL | tiny_models.INSTRUCT
    network = UNetModel(**layout, dtype=torch.float16, device="meta", operations=comfy.ops.disable_weight_init)
    return network.state_dict(), comfy.utils.unet_to_diffusers(dict(layout))


def test_every_tensor_of_sd15_gets_its_name_back():
    state, table = full_size()
    diffusers = {name: state[own] for name, own in table.items() if own in state}
    assert len(diffusers) == len(state) == 686
    renamed = unet.renamed(diffusers, "unet")
    assert renamed.keys() == state.keys()
    assert all(renamed[name].shape == state[name].shape for name in state)
    assert unet.renamed(state, "unet") == state
    with pytest.raises(ValueError, match="'odd', which is no tensor of a U-Net"):
        unet.renamed(diffusers | {"odd": torch.zeros(1)}, "unet")


def test_sdxl_gets_its_names_back():
    layout = dict(tiny_models.SDXL_DEEP, dtype=torch.float16, device="meta")
    state = UNetModel(**layout, operations=comfy.ops.disable_weight_init).state_dict()
    table = comfy.utils.unet_to_diffusers(dict(tiny_models.SDXL_DEEP))
    other = "class_embedding."  # another name for what SDXL calls add_embedding
    diffusers = {k: state[own] for k, own in table.items() if own in state and not k.startswith(other)}
    assert unet.renamed(diffusers, "unet").keys() == {table[name] for name in diffusers}


def test_a_folders_unet_is_the_hosts_instruct_pix2pix(pocket_edit, tmp_path, monkeypatch):
    """The pocket model of 8 channels, written in diffusers' names, which the host's own loader refuses."""
    whole = load_file(pocket_edit)
    own = {k.removeprefix(unet.CHECKPOINT): t for k, t in whole.items() if k.startswith(unet.CHECKPOINT)}
    config = comfy.sd.load_diffusion_model_state_dict(dict(own)).model.model_config.unet_config
    table = comfy.utils.unet_to_diffusers({**config, "transformer_depth": [*config["transformer_depth"]]})
    diffusers = {name: own[key] for name, key in table.items() if key in own}
    assert len(diffusers) == len(own)
    assert comfy.sd.load_diffusion_model_state_dict(dict(diffusers)) is None
    made = tiny_mgie.write(tmp_path / "mgie", unet=diffusers)
    monkeypatch.setattr(loading.MGIE.__class__, "path", lambda self, name: made)
    model, head, report = execute(nodes.LoadMGIE, folder="mgie")
    assert type(model.model).__name__ == "SD15_instructpix2pix"
    state = model.model.diffusion_model.state_dict()
    assert all(torch.equal(state[name].to(tensor), tensor) for name, tensor in own.items())
    again, given = model.cached_patcher_init  # by which the host loads a model that learns
    state = again(*given, disable_dynamic=True).model.diffusion_model.state_dict()
    assert all(torch.equal(state[name].to(tensor), tensor) for name, tensor in own.items())
    assert head.network.config.queries == 77
    assert "8 channels" in report
    assert "edit head: 0.0 M numbers, 77 tokens of 768 channels" in report
    save_file(
        {k: (t[:, :4].contiguous() if k == unet.FIRST else t) for k, t in diffusers.items()}, made / "unet.safetensors"
    )
    with pytest.raises(ValueError, match="given no picture"):
        execute(nodes.LoadMGIE, folder="mgie")


def test_a_folder_without_unet_or_head_says_so_to_who_wants_one(tmp_path, monkeypatch):
    made = tiny_mgie.write(tmp_path / "llava", trained=False)
    monkeypatch.setattr(loading.MGIE.__class__, "path", lambda self, name: made)
    blocked, head, report = execute(nodes.LoadMGIE, folder="llava")
    assert "has no unet.safetensors" in blocked.message
    assert "edit head: none" in report
    text, _, said = execute(nodes.ExpressInstruction, image=tiny_models.picture(), mgie=head, max_tokens=12)
    assert text
    assert "[IMG0]" not in said
    with pytest.raises(ValueError, match="llava has no edit head"):
        execute(nodes.EditInstruction, route="edit head", edit_head=head, text="a cat")


# ----------------------------------------------------------------------------------------------------- what is refused


def broken(tmp_path, name: str, change) -> str:
    """What is said of a folder in which something was changed."""
    made = tiny_mgie.write(tmp_path / "bad")
    change(made)
    with pytest.raises(ValueError) as error:
        folder = MgieFolder(made)
        loading.head_in(folder)
        load_mgie(folder, "float32")
    return str(error.value)


def rewritten(name: str, change):
    """A change of a .safetensors file's tensors."""

    def apply(folder):
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return apply


CASES = {
    "no model": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors"),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "a format that can run code"),
    "other kind": (lambda f: (f / "config.json").write_text('{"model_type": "clip"}'), "is of type 'clip', and llava"),
    "code": (
        lambda f: (f / "config.json").write_text('{"model_type": "llava", "auto_map": {"AutoModel": "x.py"}}'),
        "asks to run program code",
    ),
    "no tower": (lambda f: (f / "vision.safetensors").unlink(), "is incomplete"),
    "cut off": (lambda f: (f / "vision.safetensors").write_bytes(b"abc"), "is cut off or damaged"),
    "link": (lambda f: relinked(f / "vision.safetensors"), "is a link out of its folder"),
    "head's tensor": (rewritten("mllm.safetensors", lambda t: t.pop("edit_head.query")), "its edit head is not whole"),
    "head's NaN": (
        rewritten("mllm.safetensors", lambda t: t["edit_head.query"].fill_(float("nan"))),
        "its edit head is not finite",
    ),
    "layer": (rewritten("model.safetensors", lambda t: t.pop("model.norm.weight")), "model.norm.weight for one"),
    "heads": (lambda f: said(f, edit_head_heads="many"), "edit_head_heads 'many'"),
    "large": (lambda f: said(f, text_config=tiny_mgie.TEXT | {"model_type": "llama", "intermediate_size": 1 << 19}),
              "more weights than"),
}  # fmt: skip


def relinked(path):
    outside = path.parent.parent / "outside.safetensors"
    path.rename(outside)
    path.symlink_to(outside)


def said(folder, **changes):
    import json

    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", CASES)
def test_a_folder_that_is_not_allowed_is_named_with_a_way_out(tmp_path, name):
    change, match = CASES[name]
    message = broken(tmp_path, name, change)
    assert match in message
    assert ": " in message
