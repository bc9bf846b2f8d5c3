"""Write the marked tables of documents anew from the benchmarks' files.

python dev.py make tables
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import tables

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "docs" / "results.md",)


def main() -> None:
    """Every document of ours that has tables."""
    for path in DOCUMENTS:
        path.write_text(tables.filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
