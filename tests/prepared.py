"""A process in which the pack, the host and the test modules can be imported, and scripts that run in it.

    python tests/prepared.py kv.benchmark --scenes 4        main() of tests/kv/benchmark.py

The pack is loaded by path as `palimpsest`, as the host loads packs, and its root never goes on sys.path: the pack's
`nodes` would hide the host's module of that name. For the same reason the test folders have no __init__.py.
`python dev.py bench X`, `draw X` and `make` run scripts this way, with COMFYUI_PATH set.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent


def load_module(name: str, path: Path, *, package: bool = False) -> ModuleType:
    """Import a file under a chosen name, once."""
    if name not in sys.modules:
        folders = [str(path.parent)] if package else None
        spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folders)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def load_pack() -> ModuleType:
    """The pack as `palimpsest`; the test modules become importable (`import api`, `from pocket import world`)."""
    sys.path[:] = [*(entry for entry in sys.path if entry != str(TESTS)), str(TESTS)]  # last: it hides nothing
    return load_module("palimpsest", ROOT / "__init__.py", package=True)


def main() -> None:
    """Run main() of the named module with the arguments behind it."""
    name, *arguments = sys.argv[1:]
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (TESTS, ROOT)]
    load_pack()
    from pocket import train

    train.import_host()
    sys.argv = [name, *arguments]
    sys.exit(importlib.import_module(name).main())


if __name__ == "__main__":
    main()
