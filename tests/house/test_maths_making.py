"""dev.py make: what a target is made from."""

from pathlib import Path

import making


def test_a_target_is_made_from_what_its_script_imports_directly_or_not():
    files = {path.relative_to(making.ROOT).as_posix() for path in making.closure(["kv.pictures"])}
    assert {"tests/kv/pictures.py", "tests/make_pictures.py", "tests/pocket/world.py", "nodes/kv/nodes.py"} <= files
    assert "nodes/host/model.py" in files
    assert not any("/test_" in name for name in files)


def test_what_collects_the_techniques_is_made_from_all_of_them():
    files = {path.relative_to(making.ROOT).as_posix() for path in making.closure(["palimpsest.nodes.extension"])}
    assert {"nodes/kv/nodes.py", "nodes/video/attention.py", "kernels/video_attention.py"} <= files
    files = {path.relative_to(making.ROOT).as_posix() for path in making.closure(["make_workflows"])}
    assert {"tests/kv/graph.py", "tests/graphs/parts.py", "tests/graphs/shelf.py"} <= files


def test_a_key_follows_its_inputs(tmp_path, monkeypatch):
    monkeypatch.setattr(making, "TESTS", tmp_path / "tests")
    monkeypatch.setattr(making, "ROOT", tmp_path)
    for function in (making.found, making.tree_of):
        function.cache_clear()
    files = {"tests/one.py": "import two\n", "tests/two.py": "import os\n", "tests/three.py": "", "data/a.txt": "a"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    target = making.Target((("one",),), ("out",), ("data",))

    def key_with(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        making.tree_of.cache_clear()
        return making.key_of(target)

    key = making.key_of(target)
    assert key_with("tests/three.py", "x = 1") == key
    assert key_with("tests/two.py", "x = 1") != key
    assert key_with("tests/two.py", "import os\n") == key
    assert key_with("data/a.txt", "b") != key
    making.found.cache_clear()
    making.tree_of.cache_clear()


def test_what_takes_long_was_made_and_says_from_what():
    """That it is of the very code that is here is asked before a release: any change of code outdates pictures."""
    assert {name for name, target in making.TARGETS.items() if not target.cheap} == set(making.made_before())
    release = (making.ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
    assert release.index("tests/making.py --check") < release.index("publish-node-action")


def test_every_target_has_scripts_and_writes_into_the_tree():
    for target in making.TARGETS.values():
        assert target.scripts
        for module, *_ in target.scripts:
            assert making.found(module), module
        assert all((making.ROOT / Path(output)).exists() for output in target.outputs)
