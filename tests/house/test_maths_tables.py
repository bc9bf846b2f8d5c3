"""The tables of documents: written from the benchmarks' files, by one command."""

import json
from dataclasses import replace

import making
import pytest
import refreshing
from benchmarks import tables
from make_tables import DOCUMENTS
from PIL import Image

COLUMNS = (
    tables.Column("edited", (("scores", "a"), ("scores", "b"))),
    tables.Column("error", (("costs",),), 1, tables.least, " dB"),
)
ROWS = {"plain": "plain", "ours": "ours", "ideal": tables.BEYOND}


@pytest.fixture
def results(tmp_path):
    rows = {"plain": {"scores": {"a": 1, "b": 0.254}, "costs": 2.04}, "ours": {"scores": {"a": 0.5}, "costs": 1.0}}
    content = {"rows": rows, "bounds": {"ideal": {"a": 1.0, "b": 1.0}}}
    (tmp_path / "some.json").write_text(json.dumps(content))
    return tmp_path


def test_a_table_by_hand(results):
    table = tables.Table("some.json", ("rows",), ROWS, COLUMNS, "method", bounds=("bounds",))
    assert list(table.lines(results)) == [
        "| method | edited | error |",
        "|---|---|---|",
        "| plain | 1.00 / 0.25 | 2.0 dB |",
        "| ours | 0.50 / - | **1.0** dB |",
        f"| {tables.BEYOND} | 1.00 / 1.00 |  |",
    ]


def test_kinds_that_have_no_such_row_stay_empty_and_each_number_has_its_digits(tmp_path):
    content = {"steps": 20, "pose": {"plain": {"a": 0.5, "dB": 17.46}}, "place": {"masked": {"a": 1.0, "dB": 19.36}}}
    (tmp_path / "some.json").write_text(json.dumps(content))
    columns = [tables.Column(kind, ((kind, "a"), (kind, "dB")), (2, 1), unit=" dB") for kind in ("pose", "place")]
    table = tables.Table("some.json", (), {"plain": "plain", "masked": "by a mask"}, tuple(columns), turned=True)
    assert list(table.lines(tmp_path))[2:] == ["| plain | 0.50 / 17.5 dB |  |", "| by a mask |  | 1.00 / 19.4 dB |"]
    with pytest.raises(KeyError, match="gone"):
        list(replace(table, rows={"gone": "gone"}).lines(tmp_path))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_show_what_was_saved(path):
    text = path.read_text(encoding="utf-8")
    assert tables.filled(text) == text, "python dev.py make tables"
    assert {match["name"] for match in tables.BLOCK.finditer(text)} == {*tables.TABLES}


def test_every_table_is_measured_by_a_step_of_refresh():
    brought = {place for step in refreshing.STEPS.values() for _, place in step.files}
    assert {f"{refreshing.RESULTS}/{table.source}" for table in tables.TABLES.values()} <= brought
    assert all((making.ROOT / place).is_file() for place in brought)


def test_a_step_is_done_until_what_it_is_made_from_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(refreshing, "NOTES", tmp_path)
    assert not refreshing.is_done("kv")
    (tmp_path / "kv.json").write_text(json.dumps({"key": refreshing.STEPS["kv"].key()}))
    assert refreshing.is_done("kv")
    monkeypatch.setattr(making, "POCKET", ("README.md",))
    assert not refreshing.is_done("kv")


def test_the_sweeps_plots_become_one_sheet(tmp_path, monkeypatch):
    monkeypatch.setattr(refreshing, "NOTES", tmp_path)
    monkeypatch.setattr(refreshing, "ROOT", tmp_path)
    sheet = tmp_path / refreshing.RESULTS / "sweeps.png"
    sheet.parent.mkdir(parents=True)
    for i, (step, name) in enumerate(refreshing.SWEEPS):
        assert not sheet.exists()
        (tmp_path / step).mkdir(exist_ok=True)
        Image.new("RGB", (4, 3), (50 * i, 0, 0)).save(tmp_path / step / f"kv_{name}.png")
        refreshing.join_sweeps()
    made = Image.open(sheet)
    assert made.size == (8, 6)
    assert [made.getpixel(at)[0] for at in ((0, 0), (4, 0), (0, 3), (4, 3))] == [0, 50, 100, 150]
