"""Rules of the house, checked on the shipped files themselves: imports, safety, portability, layout of the code."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = [ROOT / "__init__.py", *sorted((ROOT / "nodes").rglob("*.py")), *sorted((ROOT / "kernels").rglob("*.py"))]
SCRIPTS = [path for end in ("*.js", "*.mjs") for path in sorted((ROOT / "web").rglob(end))]
JSONS = [path for folder in ("locales", "workflows", "subgraphs") for path in sorted((ROOT / folder).rglob("*.json"))]
KERNELS = [path for path in PYTHON if path.is_relative_to(ROOT / "kernels")]

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


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def each(paths: list[Path]):
    return pytest.mark.parametrize("path", paths, ids=name_of)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path, *, top_level: bool = False) -> Iterator[tuple[str, int]]:
    """Modules that a file imports, with the line. Our own are named from the pack's root: ".kernels.ddim"."""
    tree = tree_of(path)
    for node in statements_at_import(tree) if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = PurePosixPath(path.relative_to(ROOT).as_posix()).parts[: -node.level]
                base = ".".join(["", *package, *filter(None, [node.module])])
            yield base, node.lineno
            # `from .. import kernels` names a module in the list of names
            yield from ((f"{base}.{alias.name}" if base else f".{alias.name}", node.lineno) for alias in node.names)


def statements_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Everything that runs when the module is imported: not the bodies of functions, not `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from statements_at_import(child)


def is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def top(module: str) -> str:
    return module.partition(".")[0]


# ------------------------------------------------------------------------------------------------------ the imports


@each(KERNELS)
def test_kernels_import_neither_nodes_nor_the_host(path):
    for module, line in imports(path):
        assert not is_inside(module, ".nodes"), f"{name_of(path)}:{line} imports {module}"
        assert top(module) not in HOST_MODULES, f"{name_of(path)}:{line} imports the host's {module}"


@each([path for path in PYTHON if path.is_relative_to(ROOT / "nodes" / "patches")])
def test_patches_import_only_patches_and_kernels_of_the_pack(path):
    for module, line in imports(path):
        ours = module.startswith(".") and module.strip(".") not in {"", "nodes"}
        allowed = is_inside(module, ".nodes.patches") or is_inside(module, ".kernels")
        assert not ours or allowed, f"{name_of(path)}:{line} imports {module}"


@each([path for path in PYTHON if not path.is_relative_to(ROOT / "kernels" / "triton")])
def test_fast_versions_are_imported_late(path):
    """triton is there only beside CUDA on Linux: only kernels/triton may import it, and is itself imported lazily."""
    for module, line in imports(path, top_level=True):
        late = top(module) == "triton" or is_inside(module, ".kernels.triton")
        assert not late, f"{name_of(path)}:{line} imports {module} at its top"


@each(PYTHON)
def test_top_level_imports_are_what_the_host_requires(path):
    known = sys.stdlib_module_names | HOST_REQUIRES | HOST_MODULES
    if path.is_relative_to(ROOT / "kernels" / "triton"):
        known |= {"triton"}
    for module, line in imports(path, top_level=True):
        assert module.startswith(".") or top(module) in known, f"{name_of(path)}:{line} needs {module}: import it late"


def test_the_entry_module_imports_no_host_at_its_top():
    found = [module for module, _ in imports(ROOT / "__init__.py", top_level=True) if top(module) in HOST_MODULES]
    assert found == []


def test_the_entry_module_offers_only_the_new_entry_point():
    """A module that also has NODE_CLASS_MAPPINGS never reaches comfy_entrypoint."""
    text = (ROOT / "__init__.py").read_text(encoding="utf-8")
    assert "comfy_entrypoint" in text
    assert "NODE_CLASS_MAPPINGS" not in text


# ----------------------------------------------------------------------------------------------------------- safety


@each(PYTHON)
def test_no_module_that_runs_code_or_reaches_the_network(path):
    for module, line in imports(path):
        assert top(module) not in FORBIDDEN_MODULES, f"{name_of(path)}:{line} imports {module}"


@each(PYTHON)
def test_no_call_that_runs_text_or_unpickles(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"{name_of(path)}:{node.lineno} calls {node.func.id}"
        if isinstance(node, ast.Attribute):
            pair = (ast.unparse(node.value), node.attr)
            assert pair not in FORBIDDEN_ATTRIBUTES, f"{name_of(path)}:{node.lineno} uses {'.'.join(pair)}"


@each(SCRIPTS)
def test_scripts_keep_clear_of_what_scanners_and_readers_fear(path):
    text = path.read_text(encoding="utf-8")
    rules = {
        r"\beval\s*\(|new\s+Function\s*\(": "runs text",
        r"\.(bind|connect|send)\(": "is taken for network use by the registry's scanner",
        r"\.(innerHTML|outerHTML)\b|insertAdjacentHTML|document\.write": "puts text into the page as HTML",
        r"\b(window|globalThis)\.\w+\s*=[^=]": "writes a global",
        r"https?://(?!www\.w3\.org/)": "names a remote address",
    }
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, why in rules.items():
            assert not re.search(pattern, line), f"{name_of(path)}:{number} {why}: {line.strip()}"


# ------------------------------------------------------------------------------------------------------ portability


@each(PYTHON)
def test_source_is_readable_on_every_windows(path):
    path.read_text(encoding="utf-8").encode("cp1252")


@each(PYTHON)
def test_no_fixed_device(path):
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        assert not re.search(r"\.cuda\(|\.to\(\s*['\"]cuda", line), f"{name_of(path)}:{number}: ask the host's device"


@each(PYTHON)
def test_layers_come_from_the_host(path):
    """comfy.ops layers are cast, offloaded and quantised by the host; torch.nn's are not."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in RAW_LAYERS:
            module = ast.unparse(node.func.value)
            assert module not in {"nn", "torch.nn"}, f"{name_of(path)}:{node.lineno} {module}.{node.func.attr}"


# ---------------------------------------------------------------------------------------------------------- papers


@each(JSONS)
def test_json_files_parse(path):
    json.loads(path.read_text(encoding="utf-8"))


@each(sorted((ROOT / "workflows").glob("*.json")))
def test_workflows_have_a_thumbnail(path):
    assert path.with_suffix(".jpg").is_file(), f"{name_of(path)}: the template browser asks for the same name in .jpg"


def test_versions_and_licence_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    version = project["project"]["version"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == version
    assert (ROOT / project["project"]["license"]["file"]).is_file()
    assert project["project"]["dependencies"] == []


def test_no_folder_of_the_tests_hides_a_module_of_the_host():
    for name in HOST_MODULES & {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}:
        assert not (ROOT / "tests" / name / "__init__.py").exists(), f"tests/{name}/__init__.py would hide {name}"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["check", "format"])
def test_ruff(command):
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed")
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
