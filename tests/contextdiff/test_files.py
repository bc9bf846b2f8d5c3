"""The files of context adapters: whole or not there, given back as they were, and what is refused."""

import json
from dataclasses import asdict

import pytest
import tiny_models
import torch
from contextdiff.acting import use_folder
from palimpsest.nodes import files as storage
from palimpsest.nodes import headers
from palimpsest.nodes.contextdiff import files as context_files
from palimpsest.nodes.contextdiff.adapter import ContextAdapter, describe
from palimpsest.nodes.contextdiff.network import AdapterConfig, build, closed, initialise
from palimpsest.nodes.contextdiff.nodes import LoadContextAdapter, SaveContextAdapter
from safetensors.torch import load_file, save_file

TEXT = tiny_models.SD15["context_dim"]


def config(**changes):
    return AdapterConfig("SD15", 4, TEXT, **({"width": 32, "depth": 2, "heads": 4} | changes))


def network(**changes):
    """A network whose layers that start at zero are random."""
    made, generator = build(config(**changes)), torch.Generator().manual_seed(0)
    initialise(made, 0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if closed(name.removesuffix(".weight")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return made


def latents():
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def texts():
    return torch.randn(3, 7, TEXT, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty models/palimpsest_context."""
    return use_folder(monkeypatch, tmp_path)


def save(adapter, **settings):
    return tiny_models.execute(SaveContextAdapter, context_adapter=adapter, **settings)[0]


@pytest.mark.parametrize("video", [False, True])
def test_what_is_saved_comes_back(folder, video):
    made = ContextAdapter.of(network(video=video), {"formula": "paper", "steps": 200, "loss": 0.25})
    name = save(made)
    assert name in context_files.SHELF.listed()
    again, report = tiny_models.execute(LoadContextAdapter, file=name)
    assert (again.config, again.info) == (made.config, made.info)
    assert torch.equal(again(latents(), texts(), 0.5), made(latents(), texts(), 0.5))
    assert all(word in report for word in ("SD15 latents", f"{TEXT} channels", "steps 200", "loss 0.25"))
    assert "untrained" in describe(ContextAdapter.new(config()))


def test_float16_is_half_the_file(folder):
    made = ContextAdapter.of(network())
    full, half = (folder / save(made, filename="x", precision=p) for p in ("float32", "float16"))
    assert half.stat().st_size < 0.6 * full.stat().st_size
    again = context_files.load_adapter(str(half))
    torch.testing.assert_close(again(latents(), texts(), 0.5), made(latents(), texts(), 0.5), rtol=0.05, atol=0.02)


def test_no_file_is_replaced_and_no_name_leaves_the_folder(folder):
    made = ContextAdapter.new(config())
    assert [save(made, filename="../a b/c:d"), save(made, filename="../a b/c:d")] == [
        "a b/cd_00001.safetensors", "a b/cd_00002.safetensors",
    ]  # fmt: skip
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == context_files.SHELF.listed()
    with pytest.raises(ValueError, match="no letters or digits"):
        save(made, filename="../..")


def test_a_failed_save_leaves_no_file(folder, monkeypatch):
    def fail(tensors, path, metadata):
        raise OSError("disk full")

    monkeypatch.setattr(storage, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(ContextAdapter.new(config()))
    assert [path.name for path in folder.iterdir()] == ["put_context_adapters_here"]


def test_a_full_disk_is_told_before(folder, monkeypatch):
    usage = storage.shutil.disk_usage(".")
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"disk has 0 MB free.*float16"):
        save(ContextAdapter.new(config()))


def test_a_file_is_read_again_only_when_it_changed(folder):
    import os

    name = save(ContextAdapter.new(config()))
    first = LoadContextAdapter.fingerprint_inputs(name)
    assert LoadContextAdapter.fingerprint_inputs(file=name, clip_vision=None) == first  # as the host names sockets
    os.utime(folder / name, (1, 1))
    assert LoadContextAdapter.fingerprint_inputs(name) != first
    assert "missing" in LoadContextAdapter.fingerprint_inputs("gone.safetensors")


def damaged(folder, change, header=None):
    """A saved adapter with other tensors or another header."""
    path = folder / save(ContextAdapter.of(network()))
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        found = dict(file.metadata())
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=found | (header or {}))
    return str(path)


def changed_config(**changes):
    """A header whose config has other values."""
    return {"config": json.dumps(asdict(config()) | changes)}


def nothing(tensors):
    pass


@pytest.mark.parametrize(
    ("change", "header", "message"),
    [
        (nothing, {"format": "other"}, "not a context adapter"),
        (nothing, {"version": "99"}, "update Palimpsest"),
        (nothing, {"config": "{}"}, "damaged"),
        (nothing, {"config": "not json"}, "damaged"),
        (nothing, {"config": json.dumps({"latent_format": "SD15", "latent_channels": 4, "text_width": 24,
                                         "width": 64})}, "do not fit its layout"),
        (nothing, {"config": json.dumps({"latent_format": "SD15", "latent_channels": 4, "text_width": 24,
                                         "width": 10**9})}, "must be from 1 to 4096"),
        (nothing, changed_config(width="64"), "config's width should be a whole number, it is '64'"),
        (nothing, changed_config(width=None), "config's width should be a whole number, it is None"),
        (nothing, changed_config(depth=2.5), "config's depth should be a whole number, it is 2.5"),
        (nothing, changed_config(depth=True), "config's depth should be a whole number, it is True"),
        (nothing, changed_config(heads=0), "heads must be from 1 to 64, it is 0"),
        (nothing, changed_config(video="no"), "config's video should be true or false, it is 'no'"),
        (nothing, changed_config(latent_format=["SD15"]), "config's latent_format should be a text"),
        (nothing, changed_config(evil=1), "config has 'evil'"),
        (nothing, {"config": "[]"}, "its config should be a record"),
        (nothing, {"config": '{"latent_format": "SD15"}'}, "config lacks 'latent_channels'"),
        (nothing, {"config": "[" * 100_000}, "its config"),
        (nothing, {"info": "[]"}, "its info should be a record"),
        (nothing, {"info": '{"steps": "many"}'}, "info's steps should be a whole number, it is 'many'"),
        (nothing, {"info": '{"steps": -1}'}, "info's steps should be from 0"),
        (nothing, {"info": '{"formula": "none of ours"}'}, "its formula is 'none of ours', there are paper"),
        (nothing, {"info": '{"formula": 5}'}, "info's formula should be a text"),
        (lambda t: t.pop("out.weight"), {}, "out.weight"),
        (lambda t: t.update(more=torch.zeros(1)), {}, "more"),
        (lambda t: t["out.weight"].fill_(float("nan")), {}, "NaN"),
        (lambda t: t.update({"out.weight": t["out.weight"].half()}), {}, "one type of number"),
        (lambda t: t.update({k: v.int() for k, v in t.items()}), {}, "one type of number"),
        (lambda t: t.update({k: v.double() for k, v in t.items()}), {}, "one type of number"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_with_the_reason(folder, change, header, message):
    path = damaged(folder, change, header)
    with pytest.raises(ValueError, match=message):
        context_files.load_adapter(path)


def test_a_cut_off_or_foreign_file_is_refused(folder):
    path = folder / save(ContextAdapter.new(config()))
    whole = path.read_bytes()
    for piece in (whole[: len(whole) // 2], whole[:5], b"", b"something else entirely"):
        path.write_bytes(piece)
        with pytest.raises(ValueError, match="cut off or damaged"):
            context_files.load_adapter(str(path))


def test_only_safetensors_files_are_listed(folder):
    for name in ("a.safetensors", "b.pt", "c.safetensors.part"):
        (folder / name).write_bytes(b"")
    assert context_files.SHELF.listed() == ["a.safetensors"]


def test_shapes_are_compared_before_any_tensor_is_read(folder, monkeypatch):
    path = damaged(folder, nothing, changed_config(width=64))
    monkeypatch.setattr(headers.Tensors, "__getitem__", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match="do not fit its layout"):
        context_files.load_adapter(path)


def test_a_report_of_endless_values_is_short(folder):
    path = damaged(folder, nothing, {"info": json.dumps({"x" * 999: "y" * 9999, "loss": 0.25})})
    report = tiny_models.execute(LoadContextAdapter, file=path.rsplit("/", 1)[1])[1]
    assert len(report) < 500 and "loss 0.25" in report
