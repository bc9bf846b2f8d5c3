"""The shipped files as the tests of the house read them: parsed once, imports by name, failures as file:line."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
NODES, KERNELS = ROOT / "nodes", ROOT / "kernels"
PYTHON = [ROOT / "__init__.py", *sorted(NODES.rglob("*.py")), *sorted(KERNELS.rglob("*.py"))]
SCRIPTS = [path for end in ("*.js", "*.mjs") for path in sorted((ROOT / "web").rglob(end))]
JSONS = [path for folder in ("locales", "workflows", "subgraphs") for path in sorted((ROOT / folder).rglob("*.json"))]
APART = {"host", "training"}  # packages of nodes/ that are no technique
TECHNIQUES = sorted(path.parent.name for path in NODES.glob("*/nodes.py"))


@cache
def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def below(folder: Path) -> list[Path]:
    """Our modules in a folder."""
    return [path for path in PYTHON if path.is_relative_to(folder)]


def place(path: Path, line: int | None = None) -> str:
    """Where an offence stands: nodes/kv/nodes.py:12."""
    name = path.relative_to(ROOT).as_posix()
    return name if line is None else f"{name}:{line}"


def check(paths: list[Path], find: Callable[[Path], Iterator[tuple[int, str]]]) -> None:
    """Fail with everything that `find` finds, (line, what is wrong), in all files."""
    found = [f"{place(path, line)} {what}" for path in paths for line, what in find(path)]
    assert not found, "\n".join([f"{len(found)} found", *found])


def in_lines(rules: dict) -> Callable[[Path], Iterator[tuple[int, str]]]:
    """Lines that match a pattern, and why they should not: {compiled pattern: reason}."""

    def find(path: Path) -> Iterator[tuple[int, str]]:
        for number, line in enumerate(lines_of(path), 1):
            yield from ((number, f"{why}: {line.strip()}") for pattern, why in rules.items() if pattern.search(line))

    return find


# ------------------------------------------------------------------------------------------------------ the imports


def imports(path: Path, *, top_level: bool = False) -> Iterator[tuple[str, int]]:
    """Modules that a file imports, with the line. Our own are named from the pack's root: ".kernels.ddim"."""
    tree = tree_of(path)
    for node in statements_at_import(tree) if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = PurePosixPath(place(path)).parts[: -node.level]
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


def exists(module: str) -> bool:
    """Whether a name such as ".nodes.kv.attention" is a module, and not something that a module holds."""
    path = ROOT.joinpath(*module.strip(".").split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


# ---------------------------------------------------------------------------------------------------------- the code


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def calls(path: Path) -> Iterator[ast.Call]:
    yield from (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call))


def docstrings(path: Path) -> Iterator[tuple[ast.AST, str]]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for node in ast.walk(tree_of(path)):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield node, text
