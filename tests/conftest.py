"""Fixtures for all tests, in three tiers that follow the files:

    maths    tests/*/test_maths*.py, tests/house/test_{house,form}.py, tests/pocket_tests  torch only
    host     every other test file        ComfyUI's modules, or a running ComfyUI (`server`, `client`)
    browser  tests/browser                a running ComfyUI, Chromium and Node.js

The pack is loaded by path as `palimpsest`, as the host loads packs, and its root never goes on sys.path: the pack's
`nodes` would hide the host's module of that name. For the same reason the test folders have no __init__.py.
`python dev.py test` sets the variables COMFYUI_PATH, PALIMPSEST_MODELS, PALIMPSEST_CHROMIUM, PALIMPSEST_NODE_PATH.
"""

from __future__ import annotations

import functools
import os
import sys
from collections import Counter
from pathlib import Path

import host_log
import prepared
import pytest
import run_host
from workshop.places import MODELS, TIERS, Problem
from workshop.serving import start_host

TESTS = Path(__file__).resolve().parent
LONG = ("browser", "fuzz")  # folders whose few tests take minutes
ROOT = TESTS.parent
NO_HOST = "needs ComfyUI: run `python dev.py test`, or set COMFYUI_PATH to a ComfyUI folder"


prepared.load_pack()


# -------------------------------------------------------------------------------------------------------- the tiers


def tier_of(path: Path) -> str:
    """The tier of a test file, by its folder and name."""
    parts = path.relative_to(TESTS).parts if path.is_relative_to(TESTS) else ()
    if parts and parts[0] == "browser":
        return "browser"
    alone = (
        parts[:1] == ("pocket_tests",)
        or path.name.startswith("test_maths")
        or path.name in ("test_house.py", "test_form.py")
    )
    return "maths" if alone or not parts else "host"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Files of the host tier import the host when they are collected: not where only other tiers are wanted."""
    tiers = os.environ.get("PALIMPSEST_TIERS", "host").split()
    is_host_file = collection_path.name.startswith("test_") and tier_of(collection_path) == "host"
    return True if is_host_file and "host" not in tiers else None


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]):
    """Mark each test by its file, or as a host test where it asks for the host, unless it has a mark already."""
    for item in items:
        if any(item.get_closest_marker(tier) for tier in TIERS):
            continue
        tier = tier_of(item.path)
        asks_for_host = {"server", "client", "comfy_host_path"} & set(getattr(item, "fixturenames", ()))
        item.add_marker("host" if tier == "maths" and asks_for_host else tier)
    yield
    leave_out_what_the_browser_runs(config, items)
    longest_first(items)


def longest_first(items: list[pytest.Item]) -> None:
    """Files that take minutes before the others, and those before small ones: else one process ends alone."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.parent.name not in LONG, -tests[item.path], str(item.path)))


def leave_out_what_the_browser_runs(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A workflow that is queued from a browser, with the same checks, is not queued headless as well."""
    if not os.environ.get("PALIMPSEST_CHROMIUM"):
        return
    given = [(item, getattr(item, "callspec", None)) for item in items]
    in_browser = [spec.params for item, spec in given if item.path.parent.name == "browser" and spec]
    from_browser = {params["workflow"].stem for params in in_browser if "workflow" in params}
    twice = [i for i, spec in given if i.get_closest_marker("runs_in_browser") and spec.params["name"] in from_browser]
    config.hook.pytest_deselected(items=twice)
    items[:] = [item for item in items if item not in twice]


class ModuleWithoutHost(pytest.Module):
    """Stands for a test file that imports the host where there is none: skipped with the reason."""

    def collect(self):
        pytest.skip(NO_HOST, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector):
    """Files of the host tier may import the host's modules at their top."""
    if tier_of(module_path) != "host":
        return None
    if not os.environ.get("COMFYUI_PATH"):
        return ModuleWithoutHost.from_parent(parent, path=module_path)
    import_host()
    return None


# --------------------------------------------------------------------------------------------------------- the host


def import_host() -> Path:
    """Make ComfyUI's modules importable in this process, on the CPU. Returns its folder.

    Attention is PyTorch's, as the host chooses on GPUs; the servers of the tests have what it chooses on a CPU.
    """
    comfy = Path(os.environ["COMFYUI_PATH"]).absolute()
    if str(comfy) not in sys.path:
        run_host.declare_missing_operators()
        sys.path.insert(0, str(comfy))
        from comfy.cli_args import args

        args.cpu = args.use_pytorch_cross_attention = True
    return comfy


@pytest.fixture(scope="session")
def comfy_host_path() -> Path:
    """The ComfyUI folder; its modules can be imported from here on."""
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip(NO_HOST)
    return import_host()


@pytest.fixture(autouse=True)
def _host_modules(request: pytest.FixtureRequest) -> None:
    """Every test of the host tier can import the host."""
    if request.node.get_closest_marker("host"):
        request.getfixturevalue("comfy_host_path")


@pytest.fixture
def inference():
    """Nothing in the test keeps a graph for gradients, as in the host's own nodes."""
    import torch

    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def models():
    """Tiny random transformers: a family's, of tiny_transformers.FAMILIES, is made when it is asked for."""
    import tiny_transformers

    return functools.cache(tiny_transformers.model)


@pytest.fixture(scope="session")
def pocket_checkpoint(comfy_host_path: Path) -> Path:
    """The pocket model's file."""
    file = Path(os.environ.get("PALIMPSEST_MODELS", MODELS)) / "checkpoints" / "palimpsest_pocket.safetensors"
    if not file.is_file():
        pytest.skip("needs the pocket model: run `python dev.py setup`")
    return file


@pytest.fixture(scope="session")
def pocket_vae(pocket_checkpoint: Path):
    """The pocket model's VAE, by the host's loader."""
    import comfy.sd
    import torch

    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(pocket_checkpoint), output_clip=False, output_model=False)[2]


@pytest.fixture(scope="session")
def pocket_edit(pocket_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pocket checkpoint as an InstructPix2Pix model of 8 channels that ignores the picture: a file's path."""
    from pocket import checkpoint

    edit = tmp_path_factory.mktemp("checkpoints") / "palimpsest_pocket_edit.safetensors"
    checkpoint.build_edit(pocket_checkpoint, edit)
    return edit


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory):
    """A real ComfyUI with the pack, the pocket model and the example pictures, started once. Gives a serving.Host."""
    comfy = os.environ.get("COMFYUI_PATH")
    if not comfy:
        pytest.skip(NO_HOST)
    models, base = os.environ.get("PALIMPSEST_MODELS", MODELS), tmp_path_factory.mktemp("base")
    import_host()
    from text_control import teaching, writing

    writing.pocket_control(base / "models" / "palimpsest_text_control" / "palimpsest_pocket.safetensors")
    teaching.write(base / "input" / "palimpsest_texts" / "palimpsest_pocket", teaching.RECORDS[:1], size=(128, 128))
    try:
        host = start_host(sys.executable, comfy, base, models=models)
    except Problem as problem:
        pytest.fail(str(problem), pytrace=False)
    with host:
        yield host


@pytest.fixture(scope="session")
def client(server):
    """An api.ApiClient for `server`."""
    from api import ApiClient

    return ApiClient(server.url)


@pytest.fixture(autouse=True)
def _host_logs_no_error(request: pytest.FixtureRequest):
    """A test fails where the host wrote ERROR into a line of its log since the last test, even if its run went well."""
    log = request.getfixturevalue("server").log_path if "server" in request.fixturenames else None
    yield
    errors = host_log.errors(host_log.new_lines(log)) if log else []
    if errors and not request.node.get_closest_marker("expects_error"):
        pytest.fail("the host's log holds\n" + "\n".join(errors[:20]), pytrace=False)
