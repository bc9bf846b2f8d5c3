"""Rules of the house, each checked on all shipped files at once: imports, safety, portability."""

from __future__ import annotations

import ast
import fnmatch
import importlib.util
import json
import re
import subprocess
import sys
import tomllib

import pytest
from house.sources import (
    JSONS,
    KERNELS,
    NODES,
    PYTHON,
    ROOT,
    SCRIPTS,
    below,
    calls,
    check,
    imports,
    in_lines,
    is_inside,
    lines_of,
    place,
    top,
    tree_of,
)
from PIL import Image

HOST_MODULES = {
    "app", "comfy", "comfy_api", "comfy_api_nodes", "comfy_config", "comfy_execution", "comfy_extras", "execution",
    "folder_paths", "latent_preview", "node_helpers", "nodes", "protocol", "server", "utils",
}  # fmt: skip
HOST_REQUIRES = {
    "PIL", "aiohttp", "alembic", "av", "blake3", "comfy_aimdo", "comfy_kitchen", "einops", "filelock", "numpy",
    "psutil", "requests", "safetensors", "scipy", "sentencepiece", "simpleeval", "sqlalchemy", "tokenizers", "torch",
    "torchaudio", "torchsde", "torchvision", "tqdm", "transformers", "yaml", "yarl",
}  # fmt: skip
FORBIDDEN_MODULES = {
    "asyncio", "cloudpickle", "ctypes", "dill", "ftplib", "http", "joblib", "marshal", "pickle", "requests", "runpy",
    "shelve", "smtplib", "socket", "ssl", "subprocess", "telnetlib", "urllib", "webbrowser", "websocket", "xmlrpc",
    "aiohttp", "httpx", "urllib3", "huggingface_hub",
}  # fmt: skip
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {
    ("torch", "load"), ("torch.hub", "load"), ("os", "system"), ("os", "popen"), ("importlib", "import_module"),
    ("torch", "autocast"), ("torch.serialization", "load"),
}  # fmt: skip
RAW_LAYERS = {"Linear", "Conv1d", "Conv2d", "Conv3d", "LayerNorm", "GroupNorm", "Embedding"}

TRITON = below(KERNELS / "triton")
EXTENSION = NODES / "extension.py"


# ------------------------------------------------------------------------------------------------------ the imports


def imported(is_wrong, *, top_level: bool = False):
    """Finds the imports of a file that are wrong."""

    def find(path):
        for module, line in imports(path, top_level=top_level):
            if is_wrong(module):
                yield line, f"imports {module}"

    return find


def test_kernels_import_neither_nodes_nor_the_host():
    wrong = imported(lambda module: is_inside(module, ".nodes") or top(module) in HOST_MODULES)
    check(below(KERNELS), wrong)


def test_fast_versions_are_imported_late():
    """triton is there only beside CUDA on Linux: only kernels/triton may import it, and is itself imported lazily."""
    wrong = imported(lambda name: top(name) == "triton" or is_inside(name, ".kernels.triton"), top_level=True)
    check([path for path in PYTHON if path not in TRITON], wrong)


def test_top_level_imports_are_what_the_host_requires():
    known = sys.stdlib_module_names | HOST_REQUIRES | HOST_MODULES
    for paths, more in ((TRITON, {"triton"}), ([path for path in PYTHON if path not in TRITON], set())):
        wrong = imported(lambda name, ok=known | more: not (name.startswith(".") or top(name) in ok), top_level=True)
        check(paths, wrong)


def test_the_entry_module_imports_no_host_at_its_top():
    found = [module for module, _ in imports(ROOT / "__init__.py", top_level=True) if top(module) in HOST_MODULES]
    assert found == []


def test_the_entry_module_offers_only_the_new_entry_point():
    """A module that also has NODE_CLASS_MAPPINGS never reaches comfy_entrypoint."""
    text = (ROOT / "__init__.py").read_text(encoding="utf-8")
    assert "comfy_entrypoint" in text
    assert "NODE_CLASS_MAPPINGS" not in text


# ----------------------------------------------------------------------------------------------------------- safety


def test_no_module_that_runs_code_or_reaches_the_network():
    check(PYTHON, imported(lambda module: top(module) in FORBIDDEN_MODULES))


def test_no_call_that_runs_text_or_unpickles():
    def find(path):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
                yield node.lineno, f"calls {node.func.id}"
            if isinstance(node, ast.Attribute) and (ast.unparse(node.value), node.attr) in FORBIDDEN_ATTRIBUTES:
                yield node.lineno, f"uses {ast.unparse(node)}"

    check(PYTHON, find)


def test_modules_are_found_by_their_place_only_where_techniques_are_collected():
    named = imported(lambda module: top(module) in ("importlib", "pkgutil"))
    check([path for path in PYTHON if path != EXTENSION], named)


def test_scripts_keep_clear_of_what_scanners_and_readers_fear():
    rules = {
        r"\beval\s*\(|new\s+Function\s*\(": "runs text",
        r"\.(bind|connect|send)\(": "is taken for network use by the registry's scanner",
        r"\.(innerHTML|outerHTML)\b|insertAdjacentHTML|document\.write": "puts text into the page as HTML",
        r"\b(window|globalThis)\.\w+\s*=[^=]": "writes a global",
        r"https?://(?!www\.w3\.org/)": "names a remote address",
    }
    check(SCRIPTS, in_lines({re.compile(pattern): why for pattern, why in rules.items()}))


# ------------------------------------------------------------------------------------------------------ portability


def test_source_is_readable_on_every_windows():
    def find(path):
        for number, line in enumerate(lines_of(path), 1):
            if line != line.encode("cp1252", "replace").decode("cp1252"):
                yield number, f"is not cp1252: {line.strip()!a}"

    check(PYTHON, find)


def test_no_fixed_device():
    rule = {re.compile(r"\.cuda\(|\.to\(\s*['\"]cuda"): "ask the host's device"}
    check(PYTHON, in_lines(rule))


def test_layers_come_from_the_host():
    """comfy.ops layers are cast, offloaded and quantised by the host; torch.nn's are not."""
    raw = {f"{module}.{layer}" for module in ("nn", "torch.nn") for layer in RAW_LAYERS}

    def find(path):
        yield from ((n.lineno, ast.unparse(n.func)) for n in calls(path) if ast.unparse(n.func) in raw)

    check(PYTHON, find)


# ----------------------------------------------------------------------------------------------------------- papers


def test_json_files_parse():
    for path in JSONS:
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise AssertionError(f"{place(path)}: {error}") from error


def test_workflows_have_a_thumbnail():
    """The template browser asks for the same name in .jpg."""
    workflows = sorted((ROOT / "workflows").glob("*.json"))
    assert workflows
    assert [place(path) for path in workflows if not path.with_suffix(".jpg").is_file()] == []


def test_versions_and_licence_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    version = project["project"]["version"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == version
    assert (ROOT / project["project"]["license"]["file"]).is_file()
    assert project["project"]["dependencies"] == []


def left_out(path: str) -> bool:
    """Whether the registry's archive leaves a file out, by the few forms of pattern in .comfyignore."""
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    parts = path.split("/")
    return any(
        any(fnmatch.fnmatch(part, pattern.strip("/")) for part in (parts[:1] if pattern.startswith("/") else parts))
        for pattern in patterns
    )


def test_the_archive_has_what_the_readme_links_to():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert any(link.endswith(".jpg") for link in linked)
    assert [link for link in linked if left_out(link) or not (ROOT / link).is_file()] == []
    assert left_out("tests/pocket/weights/0.bin")
    assert left_out("dev.py")
    assert not left_out("nodes/extension.py")


LARGEST = 130_000  # bytes of a file that ships
LARGER = {
    "nodes/exact_text/weights/pp_ocrv3_recogniser.safetensors": 5_500_000,  # what Read Text reads with
    "locales/en/nodeDefs.json": 160_000,
    "locales/zh/nodeDefs.json": 160_000,
}


def test_what_ships_is_small():
    tops = [path for path in ROOT.iterdir() if not left_out(path.name)]
    for path in (path for folder in tops for path in (folder.rglob("*") if folder.is_dir() else [folder])):
        name = path.relative_to(ROOT).as_posix()
        if path.is_file() and not left_out(name):
            assert path.stat().st_size <= LARGER.get(name, LARGEST), name


def test_the_registry_shows_an_icon_and_a_banner():
    """Limits of the registry: an icon of at most 400 x 400, a banner of 21 : 9."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    home = project["project"]["urls"]["Repository"].replace("github.com", "raw.githubusercontent.com")
    sizes = []
    for name in ("Icon", "Banner"):
        url = project["tool"]["comfy"][name]
        assert url.startswith(f"{home}/main/"), "the repository's own file"
        path = url.removeprefix(f"{home}/main/")
        assert not left_out(path)
        with Image.open(ROOT / path) as picture:
            sizes.append(picture.size)
        assert (ROOT / path).stat().st_size < 100_000
    (side, height), (wide, high) = sizes
    assert side == height <= 400
    assert 9 * wide == 21 * high


def test_no_folder_of_the_tests_hides_a_module_of_the_host():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    assert [name for name in HOST_MODULES & folders if (ROOT / "tests" / name / "__init__.py").exists()] == []


def test_ruff():
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed")
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
