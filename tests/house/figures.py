"""Figures of a copy of the pack, to compare two: how long its files and functions are, what is written twice.

python tests/house/figures.py [FOLDER]
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

LINES, LETTERS = 6, 120  # from how much on a run of equal lines counts as written twice
POSITIONAL = 6
APART = ("import ", "from ", "#")  # lines that are not compared


def length_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Its lines without docstring and decorators."""
    first = function.body[0]
    told = first.end_lineno - first.lineno + 1 if ast.get_docstring(function) is not None else 0
    return function.end_lineno - function.lineno + 1 - told


def words_of(readme: str) -> int:
    """How many words a README has to be read, without its lists of nodes and templates, which are looked up in."""
    prose = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", readme, flags=re.DOTALL)
    return len(re.findall(r"[^\s|]*\w[^\s|]*", prose))


def runs(text: str) -> Iterator[tuple[str, ...]]:
    """Every run of lines that are compared, without their indentation."""
    stripped = [line.strip() for line in text.splitlines()]
    lines = [line for line in stripped if line and not line.startswith(APART)]
    for i in range(len(lines) - LINES + 1):
        run = tuple(lines[i : i + LINES])
        if sum(map(len, run)) > LETTERS:
            yield run


def twins(texts: dict[str, str]) -> set[tuple[str, ...]]:
    """Groups of files that share a run, or a file that has one twice."""
    places = defaultdict(list)
    for name, text in texts.items():
        for run in runs(text):
            places[run].append(name)
    return {tuple(sorted(set(found))) for found in places.values() if len(found) > 1}


def figures(folder: Path) -> dict[str, int | float | str]:
    """What is told of a copy of the pack."""
    texts = {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for name in ("nodes", "kernels")
        for path in sorted((folder / name).rglob("*.py"))
    }
    found = [node for text in texts.values() for node in ast.walk(ast.parse(text))]
    calls = [node for node in found if isinstance(node, ast.Call) and not ast.unparse(node.func).endswith("NodeOutput")]
    functions = [node for node in found if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    longest = max(texts, key=lambda name: len(texts[name].splitlines()))
    readme = (folder / "README.md").read_text(encoding="utf-8")
    return {
        "files": len(texts),
        "lines": sum(len(text.splitlines()) for text in texts.values()),
        "lines of the largest file": f"{len(texts[longest].splitlines())} ({longest})",
        "lines of a function, median": statistics.median(map(length_of, functions)),
        f"calls with more than {POSITIONAL} arguments by position": sum(len(each.args) > POSITIONAL for each in calls),
        f"places that share {LINES} lines or more": len(twins(texts)),
        "words of README": words_of(readme),
    }


if __name__ == "__main__":
    for name, value in figures(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parents[2])).items():
        print(f"{name}: {value}")
