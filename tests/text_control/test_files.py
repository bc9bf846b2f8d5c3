"""Load AnyText: the published names, what each kind of file has, and what is refused."""

import json

import folder_paths
import pytest
import tiny_models
import torch
from palimpsest.nodes.exact_text import shipped_recogniser
from palimpsest.nodes.headers import Header, Tensors
from palimpsest.nodes.text_control import files, keeping, names
from palimpsest.nodes.text_control.control import Layout, TextControl, build
from palimpsest.nodes.text_control.nodes import LoadAnyText
from safetensors.torch import save_file
from text_control import writing

TINY = Layout.of(tiny_models.unet())


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """A folder of the test, in which published files have the tiny models' size."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, files.CONTROLS.folder, ([str(tmp_path)], {".safetensors"}))
    for other in files.FOLDERS[1:]:
        (tmp_path / other).mkdir()
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, other, ([str(tmp_path / other)], {".safetensors", ".ckpt"})
        )
    monkeypatch.setattr(files, "PUBLISHED", TINY)
    folder_paths.filename_list_cache.clear()
    return tmp_path


def saved(folder, tensors, name="anytext.safetensors", **header):
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / name, metadata=header or None)
    return name


def load(file, **given):
    return tiny_models.execute(LoadAnyText, file=file, **given)


# ---- the names of the published files


class OnlyNames:
    """An open safetensors file without numbers."""

    def __init__(self, shapes):
        self.shapes = shapes

    def keys(self):
        return self.shapes

    def get_slice(self, name):
        shape = self.shapes[name]
        return type("Slice", (), {"get_shape": lambda _: shape, "get_dtype": lambda _: "F32"})()

    def get_tensor(self, name):
        return torch.empty(self.shapes[name], device="meta")


def resnet(name, inputs, outputs):
    """Shapes of a residual block by LDM's names."""
    found = {"in_layers.0": (inputs,), "in_layers.2": (outputs, inputs, 3, 3), "emb_layers.1": (outputs, 1280)}
    found |= {"out_layers.0": (outputs,), "out_layers.3": (outputs, outputs, 3, 3)}
    found |= {"skip_connection": (outputs, inputs, 1, 1)} if inputs != outputs else {}
    return {f"{name}.{key}": shape for key, shape in found.items()}


def transformer(name, width):
    """Shapes of a spatial transformer with one block, with those that have no bias apart."""
    block = f"{name}.transformer_blocks.0"
    found = {
        f"{name}.norm": (width,),
        f"{name}.proj_in": (width, width, 1, 1),
        f"{name}.proj_out": (width, width, 1, 1),
    }
    found |= {f"{block}.norm{i}": (width,) for i in (1, 2, 3)}
    found |= {f"{block}.ff.net.0.proj": (8 * width, width), f"{block}.ff.net.2": (width, 4 * width)}
    bare = {}
    for attention, inputs in (("attn1", width), ("attn2", 768)):
        bare |= {
            f"{block}.{attention}.{k}": (width, n) for k, n in (("to_q", width), ("to_k", inputs), ("to_v", inputs))
        }
        found[f"{block}.{attention}.to_out.0"] = (width, width)
    return found, bare


def of_sd15():
    """Every weight of the control of anytext_v1.1, with its shape, as SD 1.5's and the authors' code make it."""
    plain, bare = {"time_embed.0": (1280, 320), "time_embed.2": (1280, 1280), "input_blocks.0.0": (320, 4, 3, 3)}, {}
    inputs, number = 320, 0
    channels = [320]
    for level, outputs in enumerate((320, 640, 1280, 1280)):
        for _ in range(2):
            number += 1
            plain |= resnet(f"input_blocks.{number}.0", inputs, outputs)
            inputs = outputs
            if level < 3:
                more, without = transformer(f"input_blocks.{number}.1", outputs)
                plain, bare = plain | more, bare | without
            channels.append(outputs)
        if level < 3:
            number += 1
            plain[f"input_blocks.{number}.0.op"] = (outputs, outputs, 3, 3)
            channels.append(outputs)
    more, without = transformer("middle_block.1", 1280)
    bare |= without
    plain |= more | resnet("middle_block.0", 1280, 1280) | resnet("middle_block.2", 1280, 1280)
    plain |= {f"zero_convs.{i}.0": (c, c, 1, 1) for i, c in enumerate(channels)} | {
        "middle_block_out.0": (1280, 1280, 1, 1)
    }
    sizes = (1, 8, 8, 16, 16, 32, 32, 96, 96, 256)
    plain |= {f"glyph_block.{2 * i}": (sizes[i + 1], sizes[i], 3, 3) for i in range(9)}
    sizes = (1, 8, 8, 16, 16, 32, 32, 64)
    plain |= {f"position_block.{2 * i}": (sizes[i + 1], sizes[i], 3, 3) for i in range(7)}
    plain["fuse_block"] = (320, 324, 3, 3)
    found = {f"{name}.weight": shape for name, shape in (plain | bare).items()}
    return found | {f"{name}.bias": shape[:1] for name, shape in plain.items()}


def test_the_published_control_is_taken_whole(monkeypatch):
    monkeypatch.setattr(files, "PUBLISHED", Layout())
    shapes = {f"control_model.{name}": shape for name, shape in of_sd15().items()}
    assert len(shapes) == 358
    found = files.control_in(Tensors(OnlyNames(shapes)), Layout())
    assert len(found) == 358
    assert found.keys() == build(Layout(), torch.float32, "meta").state_dict().keys()
    assert {names.published_name(name) for name in found} == shapes.keys()


def test_its_diffusers_conversion_is_the_same_control():
    theirs = {}
    for name, ours in names.diffusers_names(vars(Layout()), 12).items():
        theirs[name] = ours
    shapes = of_sd15()
    by_ours = {ours: name for name, ours in theirs.items()}
    blocks = ("glyph_block", "position_block", "fuse_block")
    given = {
        (f"controlnet_cond_embedding.{name}" if name.startswith(blocks) else by_ours[name]): shape
        for name, shape in shapes.items()
    }
    assert "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_out.0.bias" in given
    assert "controlnet_down_blocks.11.weight" in given and "controlnet_mid_block.bias" in given
    found = files.control_in(Tensors(OnlyNames(given)), Layout())
    assert found.keys() == build(Layout(), torch.float32, "meta").state_dict().keys()
    assert all(found[names.control_name(name)].shape == shape for name, shape in shapes.items())


def theirs_of_reader():
    """PaddleOCR2Pytorch's name of each weight of PP-OCRv3's recogniser, and this pack's."""
    layers = [("backbone.conv1", "stem", "_conv", "_batch_norm")]
    for i in range(13):
        layers += [
            (f"backbone.block_list.{i}._{part}_conv", f"blocks.{i}.{ours}", "_conv", "_batch_norm")
            for part, ours in (("depthwise", "depth"), ("pointwise", "mix"))
        ]
    neck = {"conv1": "narrow", "conv2": "to_columns", "conv3": "from_columns", "conv4": "join", "conv1x1": "last"}
    layers += [(f"neck.encoder.{part}", ours, "conv", "norm") for part, ours in neck.items()]
    found, ends = {}, ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    for theirs, ours, conv, norm in layers:
        found[f"{theirs}.{conv}.weight"] = f"{ours}.conv.weight"
        found |= {f"{theirs}.{norm}.{end}": f"{ours}.norm.{end}" for end in ends}
    rest = {"neck.encoder.norm": "norm", "head.fc": "head"}
    for i in (11, 12):
        rest |= {
            f"backbone.block_list.{i}._se.conv{n}": f"blocks.{i}.weights.{w}"
            for n, w in ((1, "squeeze"), (2, "excite"))
        }
    parts = {"norm1": "norm_attention", "norm2": "norm_mlp", "mixer.qkv": "qkv", "mixer.proj": "out"}
    for i in (0, 1):
        for part, ours in (parts | {"mlp.fc1": "widen", "mlp.fc2": "narrow"}).items():
            rest[f"neck.encoder.svtr_block.{i}.{part}"] = f"columns.{i}.{ours}"
    return found | {f"{t}.{end}": f"{o}.{end}" for t, o in rest.items() for end in ("weight", "bias")}


def test_every_weight_of_the_recogniser_has_a_name_there():
    known = theirs_of_reader()
    assert {names.reader_name(name) for name in known} == set(known.values()) == set(shipped_recogniser().state_dict())
    assert all(names.reader_name(theirs) == ours for theirs, ours in known.items())
    with pytest.raises(ValueError, match="which PP-OCRv3's has not"):
        names.reader_name("backbone.lstm.weight")


# ---- what comes out


def test_a_checkpoint_is_split_into_its_parts(folder):
    reader = {
        f"text_predictor.{theirs}": shipped_recogniser().state_dict()[ours].half()
        + (0 if "running" in theirs else 0.01)
        for theirs, ours in theirs_of_reader().items()
        if "tracked" not in theirs
    }
    content = writing.published(TINY, reader=reader)
    with torch.inference_mode():
        control, embedder, report = load(saved(folder, content))
    assert isinstance(control, TextControl)
    weights = control.control_model.state_dict()
    theirs = content["control_model.glyph_block.4.weight"]
    assert torch.equal(
        weights["input_hint_block.glyph_block.4.weight"], theirs.to(weights["time_embed.0.weight"].dtype)
    )
    assert embedder.width == TINY.context_dim and embedder.projection.keys() == {"weight", "bias"}
    assert not torch.equal(embedder.recogniser.head.weight, shipped_recogniser().head.weight)
    assert "its own recogniser" in report and "embeddings by Linear," in report
    strips = writing.lines().strips
    wanted = embedder.recogniser.features(torch.zeros(1, 3, 48, 320)).flatten(1)
    assert embedder.embed(strips).shape == (1, TINY.context_dim) and wanted.shape == (1, files.NECK)


def test_a_linear_map_alone_is_not_normalised(folder):
    """The published v1.1 has no LayerNorm, what the authors' later code trains has."""
    plain = load(saved(folder, writing.published(TINY), "a.safetensors"))[1]
    content = writing.published(TINY, projection="proj.0.")
    content |= {"embedding_manager.proj.1.weight": torch.ones(24), "embedding_manager.proj.1.bias": torch.zeros(24)}
    normed = load(saved(folder, content, "b.safetensors"))[1]
    strips = writing.lines().strips
    found, wanted = normed.embed(strips), torch.nn.functional.layer_norm(plain.embed(strips), (24,))
    torch.testing.assert_close(found, wanted)
    assert plain.recogniser is shipped_recogniser()


def test_embeddings_from_another_file(folder):
    content = writing.published(TINY)
    control = saved(folder, {k: t for k, t in content.items() if k.startswith("control_model.")}, "control.safetensors")
    alone = {k.rsplit(".", 1)[1]: t for k, t in content.items() if k.startswith("embedding_manager.")}
    projection = saved(folder, alone, "proj.safetensors")
    with pytest.raises(ValueError, match="has no embeddings of letters"):
        load(control)
    with pytest.raises(ValueError, match="has no control"):
        load(projection)
    _, embedder, report = load(control, embeddings=projection)
    assert torch.equal(embedder.projection["weight"], content["embedding_manager.proj.weight"].float())
    assert "proj.safetensors" in report


def test_what_is_saved_comes_back(folder):
    network = writing.network()
    projection = {"weight": torch.randn(24, files.NECK), "bias": torch.randn(24)}
    projection |= {"norm_weight": torch.ones(24), "norm_bias": torch.zeros(24)}
    content = keeping.content(network.state_dict(), projection, shipped_recogniser())
    path = folder / "mine.safetensors"
    files.CONTROLS.write(path, content, keeping.header_of(network.layout, {"steps": 3}))
    parts = files.read(str(path))
    assert parts.layout == network.layout and parts.info == {"steps": 3}
    control = files.control_of(parts)
    for name, weight in control.control_model.state_dict().items():
        assert torch.equal(weight.float(), network.state_dict()[name].half().float())
    assert torch.equal(parts.projection["weight"], projection["weight"].half().float())


def test_only_what_may_hold_one_is_listed(folder):
    for name in ("checkpoints/anytext_v1.1.ckpt", "checkpoints/dreams.safetensors", "controlnet/AnyText.safetensors"):
        (folder / name).touch()
    (folder / "mine.safetensors").touch()
    folder_paths.filename_list_cache.clear()
    wanted = {"checkpoints/anytext_v1.1.ckpt", "controlnet/AnyText.safetensors"}
    assert wanted | {"mine.safetensors"} <= set(files.listed())
    assert not any("dreams" in name and name.startswith("checkpoints") for name in files.listed()[1:])


# ---- what is refused


def changed(content, **changes):
    return {k: t for k, t in (content | changes).items() if t is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control_model.fuse_block_za.weight": torch.ones(1)}, "it is AnyText2"),
        ({"embedding_manager.style_proj.0.weight": torch.ones(1)}, "Take AnyText v1.1"),
        ({"control_model.zero_convs.0.0.weight": None}, "its control lacks 1 of"),
        ({"control_model.fuse_block.weight": torch.ones(32, 4, 3, 3)}, "32 x 324 x 3 x 3 is wanted"),
        ({"control_model.fuse_block.bias": torch.full((32,), float("nan"))}, "fuse_block.bias holds NaN"),
        ({"embedding_manager.proj.weight": torch.ones(24, 99)}, f"24 x {files.NECK} is wanted"),
        ({"embedding_manager.proj.bias": torch.ones(24, dtype=torch.int64)}, "holds I64 numbers"),
        ({"text_predictor.head.fc.weight": torch.ones(97, 64)}, "its recogniser lacks"),
    ],
)
def test_odd_checkpoints_are_named(folder, changes, message):
    file = saved(folder, changed(writing.published(TINY), **changes))
    with pytest.raises(ValueError, match=message) as error:
        load(file)
    assert str(error.value).startswith("anytext.safetensors cannot be used")


def test_other_files_are_named(folder):
    (folder / "checkpoints" / "anytext_v1.1.ckpt").write_bytes(b"\x80\x02")
    with pytest.raises(ValueError, match=r"anytext_to_safetensors.py anytext_v1.1.ckpt"):
        load("checkpoints/anytext_v1.1.ckpt")
    with pytest.raises(ValueError, match="another kind of file"):
        load(saved(folder, {"lora_unet_x.alpha": torch.ones(1)}, "lora.safetensors"))
    (folder / "cut.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match="cut off or damaged"):
        load("cut.safetensors")
    for name in ("checkpoints/../../x.safetensors", "vae/x.safetensors", "none.safetensors"):
        with pytest.raises(ValueError, match="there is no file"):
            files.path_of(name)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"model_channels": 10**9}, "model_channels"),
        ({"channel_mult": []}, "channel_mult"),
        ({"num_res_blocks": [1, "a"]}, "num_res_blocks"),
        ({"heads": 3}, "layout"),
    ],
)
def test_a_header_that_lies_is_refused_before_anything_is_built(layout, message):
    good = keeping.header_of(TINY, {})
    header = Header(good | {"layout": json.dumps(json.loads(good["layout"]) | layout)})
    with pytest.raises(ValueError, match=message):
        files.layout_of(header)
