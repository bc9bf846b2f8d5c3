"""The form of the code, checked on all shipped files at once: who imports whom, how long, how plainly."""

from __future__ import annotations

import ast
import itertools
import re
import statistics
from collections import Counter

from house.figures import words_of
from house.sources import (
    APART,
    KERNELS,
    NODES,
    ROOT,
    TECHNIQUES,
    below,
    calls,
    check,
    docstrings,
    exists,
    functions,
    imports,
    is_inside,
    lines_of,
    tree_of,
)

CODE = [*below(NODES), *below(KERNELS)]
LONGEST_FILE, MEDIAN_FUNCTION, POSITIONAL, TWINS, COLUMNS = 400, 10, 6, 3, 120
SHARED = {  # modules of nodes/ for all techniques
    "border", "colours", "examples", "files", "foreign", "headers", "inputs", "names", "picture_files", "plots",
    "quoting", "said", "saving", "settings", "sockets", "writing",
}  # fmt: skip
RITUALS = re.compile(r"(?i)inputs, their ranges and what each does|patch a clone of the model|^how many\.$")


# ------------------------------------------------------------------------------------------------- who imports whom


def techniques_in(path) -> list[tuple[int, str, str]]:
    """(line, technique, module) of a file's imports from techniques' packages."""
    found = ((line, module.split("."), module) for module, line in imports(path) if module.startswith(".nodes."))
    return [(line, parts[2], module) for line, parts, module in found if parts[2] in TECHNIQUES]


def test_what_all_share_imports_no_technique():
    """nodes/host, nodes/training and the shared modules lie below the techniques."""
    paths = [*below(NODES / "host"), *below(NODES / "training"), *(NODES / f"{name}.py" for name in sorted(SHARED))]

    def find(path):
        yield from ((line, f"imports {module}") for line, _, module in techniques_in(path))

    check([path for path in paths if path.is_file()], find)


def test_the_host_imports_nothing_of_the_pack_but_kernels():
    def find(path):
        for module, line in imports(path):
            ours = module.startswith(".") and exists(module) and module not in {".nodes", "."}
            if ours and not (is_inside(module, ".nodes.host") or is_inside(module, ".kernels")):
                yield line, f"imports {module}"

    check(below(NODES / "host"), find)


def test_a_technique_reaches_another_only_through_its_front():
    def find(path):
        own = path.relative_to(NODES).parts[0]
        for line, technique, module in techniques_in(path):
            if technique != own and module.count(".") > 2 and exists(module):
                yield line, f"imports {module}: only nodes.{technique} itself"

    check([path for name in TECHNIQUES for path in below(NODES / name)], find)


def test_a_front_does_not_import_its_nodes():
    """What another technique reads costs no schemas, and two techniques may read each other."""

    def find(path):
        own = f".nodes.{path.parent.name}.nodes"
        yield from ((line, f"imports {module}") for module, line in imports(path) if is_inside(module, own))

    check([front for name in TECHNIQUES if (front := NODES / name / "__init__.py").is_file()], find)


def test_a_technique_imports_only_what_is_below_it():
    allowed = {*APART, *SHARED, *TECHNIQUES}

    def find(path):
        for module, line in imports(path):
            parts = module.split(".")
            if parts[:2] == ["", "nodes"] and len(parts) > 2 and exists(module) and parts[2] not in allowed:
                yield line, f"imports {module}"

    check([path for name in TECHNIQUES for path in below(NODES / name)], find)


# ------------------------------------------------------------------------------------------------------- how plainly


def test_no_call_with_many_positional_arguments():
    """They are passed by name. A node's outputs (NodeOutput) have no names."""

    def find(path):
        for call in calls(path):
            name = ast.unparse(call.func)
            if len(call.args) > POSITIONAL and not name.endswith("NodeOutput"):
                yield call.lineno, f"passes {len(call.args)} arguments to {name} by position"

    check(below(NODES), find)


def test_no_call_is_kept_from_the_formatter():
    """Tables may be laid out by hand; a call that needs it has too many arguments."""
    kept = re.compile(r"#\s*fmt:\s*skip")

    def find(path):
        for statement in ast.walk(tree_of(path)):
            called = getattr(statement, "value", getattr(statement, "exc", None))
            if isinstance(statement, ast.stmt) and isinstance(called, ast.Call):
                name = ast.unparse(called.func)
                if kept.search(lines_of(path)[statement.end_lineno - 1]) and name != "frozenset":
                    yield statement.lineno, f"{name}(...) has fmt: skip"

    check(CODE, find)


def test_the_hosts_call_of_a_model_is_written_out_once():
    """APPLY_MODEL's eight arguments stand in host/call.py alone."""

    def find(path):
        for function in functions(path):
            names = {argument.arg for argument in [*function.args.args, *function.args.kwonlyargs]}
            if {"c_concat", "c_crossattn"} <= names:
                yield function.lineno, f"{function.name} has APPLY_MODEL's arguments"

    check([path for path in CODE if path != NODES / "host" / "call.py"], find)


def test_no_docstring_is_a_ritual():
    """A sentence that stands at three functions tells nothing about any."""
    texts = Counter(text for path in CODE for _, text in docstrings(path))

    def find(path):
        for node, text in docstrings(path):
            if texts[text] >= TWINS or RITUALS.search(text):
                yield node.lineno, text.splitlines()[0]

    check(CODE, find)


def test_no_text_is_broken_into_fragments():
    """Two pieces of a string that stand on lines of their own and fit on one."""
    piece = re.compile(r'^(\s*)(f?)"([^"\\]*)",?$')

    def find(path):
        lines = lines_of(path)
        for number, (line, following) in enumerate(itertools.pairwise(lines), 1):
            first, second = piece.match(line), piece.match(following)
            if first and second and not line.endswith(",") and first[1] == second[1]:
                together = len(line) + len(second[3]) + following.endswith(",")
                if together + (second[2] > first[2]) <= COLUMNS and not first[3].endswith("\\n"):
                    yield number, f"is broken before {second[3][:30]!r}"

    check(CODE, find)


# --------------------------------------------------------------------------------------------------------- how long


def test_no_file_is_long():
    files = [*CODE, *(path for end in ("*.js", "*.mjs", "*.css", "*.md") for path in (ROOT / "web").rglob(end))]

    def find(path):
        if len(lines_of(path)) > LONGEST_FILE:
            yield len(lines_of(path)), "lines"

    check(files, find)


def length_of(function) -> int:
    """Lines of a function without its docstring and decorators."""
    first = function.body[0]
    has_docstring = ast.get_docstring(function) is not None
    told = first.end_lineno - first.lineno + 1 if has_docstring else 0
    return function.end_lineno - function.lineno + 1 - told


def test_half_of_the_functions_are_short():
    assert statistics.median(length_of(each) for path in CODE for each in functions(path)) <= MEDIAN_FUNCTION


def test_the_readme_is_read_in_minutes():
    words = words_of((ROOT / "README.md").read_text(encoding="utf-8"))
    assert words <= 450, f"{words} words"


def test_contributing_names_the_files_of_a_technique():
    """Its list, read for a technique that is there, names files that are there; it counts them right."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    steps = text.partition("## Add a technique")[2].partition("By hand that is")[0]
    new = set(re.findall(r"`([\w/]*(?:warm_attention|PalimpsestWarmAttention)[\w/]*\.(?:py|md))`", steps))
    there = [
        ROOT / re.sub("WarmAttention", "KeepOutside", path.replace("warm_attention", "keep_outside")) for path in new
    ]
    assert [path for path in there if not path.is_file()] == []
    existing = re.findall(r"`([\w/.]+)` \((?:an|the other) existing file\)", steps)
    assert [path for path in existing if not (ROOT / path).is_file()] == []
    assert (len(new), len(existing)) == (8, 2), (new, existing)
    assert "By hand that is eight new files and two existing ones" in text
