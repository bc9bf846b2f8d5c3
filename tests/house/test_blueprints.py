"""The shipped blueprints are those that tests/graphs/blueprints.py describes."""

from __future__ import annotations

import json

from graphs.blueprints import BLUEPRINTS
from make_blueprints import SUBGRAPHS


def test_a_blueprint_holds_what_its_description_gives():
    assert sorted(path.stem for path in SUBGRAPHS.glob("*.json")) == sorted(BLUEPRINTS)
    for name, describe in BLUEPRINTS.items():
        told = describe()
        saved = json.loads((SUBGRAPHS / f"{name}.json").read_text(encoding="utf-8"))
        (subgraph,), (node,) = saved["definitions"]["subgraphs"], saved["nodes"]
        assert node["type"] == subgraph["id"]
        assert [each["name"] for each in subgraph["inputs"]] == list(told["inputs"])
        assert [each["name"] for each in subgraph["outputs"]] == ["image"]
        assert sorted(each["type"] for each in subgraph["nodes"]) == sorted(n["type"] for n in told["nodes"].values())
        assert all(each["linkIds"] for each in [*subgraph["inputs"], *subgraph["outputs"]])
        assert saved["extra"]["BlueprintDescription"] == told["description"]
