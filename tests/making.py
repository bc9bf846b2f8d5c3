"""Make what is generated: texts, workflows, pictures. Says what changed, and is quick where nothing did.

    python dev.py make                      everything whose inputs changed
    python dev.py make locales workflows    some of it
    python dev.py make --force pictures     whatever its inputs
    python dev.py make --check              only say what is out of step

tests/data/made.json keeps, for each target, a hash of what it was made from: the files that its script imports,
directly or not, and some data. Tables show what the benchmarks saved; to measure anew takes hours (`dev.py refresh`).
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
MADE = TESTS / "data" / "made.json"
POCKET = ("tests/pocket/weights", "tests/pocket/models")


@dataclass(frozen=True)
class Target:
    """Scripts (names of modules in tests/, with arguments), what they read besides their imports, what they write."""

    scripts: tuple[tuple[str, ...], ...]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    kind: str = ""

    @property
    def cheap(self) -> bool:
        """Made in seconds: always done, never looked up."""
        return self.kind == "texts"


def drawing(folder: str) -> Target:
    """The pictures of a technique's help pages."""
    scripts = tuple((f"{folder}.{path.stem}",) for path in sorted((TESTS / folder).glob("pictures*.py")))
    return Target(scripts, ("web/docs",), POCKET, "pictures")


WORKFLOWS = ("workflows", "tests/data/api")
EXAMPLES = "tests/data/input"
TEXTS = ("locales/en", "tests/data/object_info.json")
TARGETS = {
    "locales": Target((("make_locales",),), ("locales/en",), kind="texts"),
    "object_info": Target((("make_object_info",),), ("tests/data/object_info.json",), kind="texts"),
    "tables": Target((("make_tables",),), ("docs",), kind="texts"),
    "readme": Target((("make_readme",),), ("README.md",), kind="texts"),
    "examples": Target((("make_pictures", "example"),), (EXAMPLES,)),
    "logo": Target((("make_logo",),), ("docs",)),
    "workflows": Target((("make_workflows",),), WORKFLOWS, ("tests/browser", *TEXTS)),
    "blueprints": Target((("make_blueprints",),), ("subgraphs",), ("tests/browser", *TEXTS)),
    **{f"pictures/{path.parent.name}": drawing(path.parent.name) for path in sorted(TESTS.glob("*/pictures.py"))},
    "demo": Target((("make_pictures", "docs"),), ("web/docs",), (*POCKET, EXAMPLES, "nodes", "kernels")),
    "thumbnails": Target(
        (("make_thumbnails",),), ("workflows",), (*POCKET, EXAMPLES, "tests/data/api", "nodes", "kernels")
    ),
}


# ----------------------------------------------------------------------------------------------- what a target is of


def imported(path: Path) -> Iterator[Path]:
    """Files of ours that a file imports, anywhere in it; two import what they find in every technique's folder."""
    finds = {ROOT / "nodes" / "extension.py": "*/nodes.py", TESTS / "make_workflows.py": "*/graph.py"}
    yield from path.parent.glob(finds[path]) if path in finds else ()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from found(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.parents[node.level - 1].relative_to(ROOT)
                base = ".".join(["palimpsest", *package.parts, *filter(None, [node.module])])
            for alias in node.names:
                yield from found(f"{base}.{alias.name}")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def found(module: str) -> tuple[Path, ...]:
    """The files that `import module` runs; () for modules that are not ours."""
    first, *rest = module.split(".")
    here = ROOT if first == "palimpsest" else TESTS
    files = []
    for name in rest if first == "palimpsest" else [first, *rest]:
        here = here / name
        file = here.with_suffix(".py") if here.with_suffix(".py").is_file() else here / "__init__.py"
        files += [file] if file.is_file() else []
    return tuple(files)


def closure(modules: list[str]) -> set[Path]:
    """The files that these modules need, directly or not."""
    known, new = set(), {path for module in modules for path in found(module)}
    while new:
        known |= new
        new = {path for file in new for path in imported(file)} - known
    return known


def files_in(names: tuple[str, ...]) -> set[Path]:
    paths = [ROOT / name for name in names]
    inside = {file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()}
    return {file for file in inside if "__pycache__" not in file.parts}


def key_of(target: Target) -> str:
    """A hash of all that a target is made from."""
    files = closure([name for name, *_ in target.scripts]) | files_in(target.inputs)
    return hashlib.sha256(json.dumps([target.scripts, sorted(hashes(files).items())]).encode()).hexdigest()[:32]


def hashes(files: set[Path]) -> dict[str, str]:
    return {file.relative_to(ROOT).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# ------------------------------------------------------------------------------------------------------------- making


def made_before() -> dict[str, str]:
    return json.loads(MADE.read_text(encoding="utf-8")) if MADE.is_file() else {}


def out_of_step() -> list[str]:
    """Targets whose inputs are not those that they were last made from."""
    made = made_before()
    return [name for name, target in TARGETS.items() if not target.cheap and made.get(name) != key_of(target)]


def make(name: str, target: Target, arguments: list[str]) -> list[str]:
    """Run a target's scripts; the files that changed."""
    before = hashes(files_in(target.outputs))
    if name == "demo":
        subprocess.run([sys.executable, str(ROOT / "dev.py"), "demo", "--inner-steps", "10"], check=True)
    for script in target.scripts:
        command = [sys.executable, str(TESTS / "prepared.py"), *script, *arguments]
        done = subprocess.run(command, capture_output=not arguments, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: {' '.join(script)} failed\n{(done.stdout or '') + (done.stderr or '')}"[-4000:])
    after = hashes(files_in(target.outputs))
    return sorted(file for file in {*before, *after} if before.get(file) != after.get(file))


def chosen(names: list[str]) -> dict[str, Target]:
    """The targets of these names, or of a kind (pictures); all of them without names."""
    known = {*TARGETS, *(target.kind for target in TARGETS.values() if target.kind)}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"There is no target {unknown[0]}: choose of {', '.join(sorted(known))}")
    return {name: target for name, target in TARGETS.items() if not names or {name, target.kind} & set(names)}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python dev.py make", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", help=", ".join(TARGETS))
    parser.add_argument("--force", action="store_true", help="also where nothing changed")
    parser.add_argument("--break", dest="breaking", action="store_true", help="object_info: whatever it breaks")
    parser.add_argument("--check", action="store_true", help="make nothing; exit code 1 where something is out of step")
    options = parser.parse_args()
    if options.check:
        print("\n".join(out_of_step()) or "everything is made from what is here")
        return 1 if out_of_step() else 0
    for name, target in chosen(options.targets).items():
        key = key_of(target)
        if not (target.cheap or options.force) and made_before().get(name) == key:
            print(f"{name}: made from the same inputs", flush=True)
            continue
        print(f"{name} ...", flush=True)
        began = time.monotonic()
        changed = make(name, target, ["--break"] if options.breaking and name == "object_info" else [])
        if not target.cheap:
            keys = made_before() | {name: key_of(target)}
            MADE.write_text(json.dumps(dict(sorted(keys.items())), indent=2) + "\n", encoding="utf-8")
        told = "\n  ".join([f"{len(changed)} files changed", *changed]) if changed else "nothing changed"
        print(f"{name}: {time.monotonic() - began:.0f} s, {told}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
