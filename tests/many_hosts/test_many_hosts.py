"""One graph over many pictures on two hosts of which one is killed, and what the recipe refuses."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from typing import ClassVar

import pytest
from PIL import Image
from recipes import many_hosts
from workshop.serving import start_host

PICTURES, KILLED_AFTER = 24, 6
GRAPH = {
    "load": {"class_type": "LoadImage", "inputs": {"image": "$IMAGE"}},
    "invert": {"class_type": "ImageInvert", "inputs": {"image": ["load", 0]}},
    "report": {"class_type": "PalimpsestEditReport", "inputs": {"source": ["load", 0], "edited": ["invert", 0]}},
    "numbers": {"class_type": "PreviewAny", "inputs": {"source": ["report", 2]}},
    "save": {"class_type": "SaveImage", "inputs": {"images": ["invert", 0], "filename_prefix": "$KEY"}},
}


@pytest.fixture
def folder(tmp_path):
    """24 small pictures, the graph's file, and the command line without hosts."""
    (tmp_path / "pictures").mkdir()
    chance = random.Random(0)
    for i in range(PICTURES):
        colour = tuple(chance.randrange(256) for _ in range(3))
        Image.new("RGB", (64, 48), colour).save(tmp_path / "pictures" / f"p{i:02}.png")
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    return tmp_path


def command(folder, hosts):
    """The recipe's command line."""
    given = ["--graph", folder / "graph.json", "--pictures", folder / "pictures", "--out", folder / "out"]
    return [*map(str, given), "--hosts", *hosts]


def lines(folder):
    """What report.jsonl holds."""
    return [json.loads(line) for line in (folder / "out" / "report.jsonl").read_text().splitlines()]


@pytest.fixture
def two_hosts(tmp_path_factory):
    """Two hosts with the pack and no models."""
    comfy = os.environ.get("COMFYUI_PATH")
    if not comfy:
        pytest.skip("needs ComfyUI: set COMFYUI_PATH")
    hosts = []
    try:
        for name in ("one", "two"):
            base = tmp_path_factory.mktemp(name)
            hosts.append(start_host(sys.executable, comfy, base, models=None, examples=False))
        yield hosts
    finally:
        for host in hosts:
            host.stop()


@pytest.mark.host
def test_a_killed_host_gives_its_pictures_back_and_each_is_done_once(folder, two_hosts, monkeypatch, capsys):
    distributed = pytest.importorskip("distributed", reason="needs Dask: pip install distributed")
    kept, (left, killed) = many_hosts.keep, (host.url for host in two_hosts)

    def keep(*told):
        kept(*told)
        if len(lines(folder)) >= KILLED_AFTER and killed in {line["host"] for line in lines(folder)}:
            two_hosts[1].process.kill()  # in the midst of its next one

    monkeypatch.setattr(many_hosts, "keep", keep)
    tally = many_hosts.main(command(folder, [host.url for host in two_hosts]))
    assert (tally.done, tally.failed, tally.silent) == (PICTURES, {}, [killed])
    assert 1 <= tally.given_back <= many_hosts.IN_FLIGHT
    found = lines(folder)
    assert Counter(line["picture"] for line in found) == Counter({f"p{i:02}.png": 1 for i in range(PICTURES)})
    assert {line["host"] for line in found} == {left, killed}
    assert {path.name for path in (folder / "out").iterdir()} == {"report.jsonl", *(line["file"] for line in found)}
    for line in found:  # each is its own picture's
        source, edited = (Image.open(folder / p) for p in (f"pictures/{line['picture']}", f"out/{line['file']}"))
        assert edited.getpixel((5, 5)) == pytest.approx([255 - c for c in source.getpixel((5, 5))], abs=1)
        assert isinstance(line["reports"]["numbers PreviewAny"], dict)
    assert "24/24, " in capsys.readouterr().out

    dates = {path: path.stat().st_mtime_ns for path in (folder / "out").iterdir()}
    assert many_hosts.main(command(folder, [left])).done == 0  # the second run repeats nothing
    assert dates == {path: path.stat().st_mtime_ns for path in (folder / "out").iterdir()}

    missing = next(iter((folder / "out").glob("p03-*")))  # and does what is missing, here by a cluster's workers
    missing.unlink()
    local = {"processes": True, "n_workers": 1, "dashboard_address": "127.0.0.1:0"}
    with distributed.LocalCluster(**local) as cluster:
        arguments = [*command(folder, [left]), "--scheduler", cluster.scheduler_address]
        ran = subprocess.run([sys.executable, many_hosts.__file__, *arguments], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "23 pictures are there, 1 to do" in ran.stdout
    assert missing.is_file()
    assert sys.modules["api"].__file__ == str(many_hosts.API)  # what workers are given leaves this process alone


def test_without_the_package_the_sentence_names_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SystemExit, match="pip install distributed"):
        many_hosts.main(command(folder, ["http://127.0.0.1:9"]))


def test_where_no_host_answers_every_picture_is_named(folder):
    pytest.importorskip("distributed", reason="needs Dask: pip install distributed")
    with pytest.raises(SystemExit, match=r"p23\.png: no host was left"):
        many_hosts.main(command(folder, ["http://127.0.0.1:9"]))
    assert not list((folder / "out").iterdir())


class Dying(http.server.BaseHTTPRequestHandler):
    """Answers as a host does, up to the request whose path begins with `last`: there it goes away, or half-way."""

    ANSWERS: ClassVar = {
        "/upload/image": {"name": "k.png", "subfolder": "many_hosts"},
        "/prompt": {"prompt_id": "1"},
        "/history": {"1": {"status": {"status_str": "success"}, "outputs": {"save": {"images": [
            {"filename": "k.png", "subfolder": "", "type": "output"}]}}}},
    }  # fmt: skip
    last, half_way = "", False

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def do_GET(self):
        dies = self.path.startswith(self.last)
        answer = json.dumps(next((found for at, found in self.ANSWERS.items() if self.path.startswith(at)), None))
        if not dies or self.half_way:
            self.send_response(500 if dies else 200)
            self.send_header("Content-Length", str(len(answer) + 100 * dies))
            self.end_headers()
            self.wfile.write(answer.encode())
        if dies:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
            self.connection.close()

    def log_message(self, *_):
        pass

    def finish(self):
        with contextlib.suppress(OSError, ValueError):
            super().finish()


@pytest.mark.parametrize("half_way", [False, True])
@pytest.mark.parametrize("last", ["/upload/image", "/prompt", "/history", "/view"])
def test_whenever_a_host_goes_away_its_picture_can_be_given_to_another(last, half_way):
    handler = type("Handler", (Dying,), {"last": last, "half_way": half_way})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        found = many_hosts.edit(url, ("0123456789abcdef", ".png", b"picture"), GRAPH, "save", timeout=10)
        server.shutdown()
    assert found["error"] == many_hosts.NO_ANSWER, found
    assert f"no answer from {url}" in found["details"]


@pytest.mark.parametrize(("stand_in", "told"), [("$KEY", "in 0 nodes"), ("$IMAGE", "nowhere")])
def test_a_graph_that_is_not_prepared_is_refused(folder, stand_in, told):
    (folder / "graph.json").write_text(json.dumps(GRAPH).replace(stand_in, "fixed"))
    with pytest.raises(SystemExit, match=told):
        many_hosts.main(command(folder, ["http://127.0.0.1:9"]))


def test_the_key_is_the_pictures_and_the_graphs(folder):
    other = {**GRAPH, "invert": {"class_type": "ImageBlur", "inputs": {"image": ["load", 0]}}}
    assert many_hosts.key_of(b"a", GRAPH) == many_hosts.key_of(b"a", dict(reversed(GRAPH.items())))
    assert len({many_hosts.key_of(*of) for of in ((b"a", GRAPH), (b"b", GRAPH), (b"a", other))}) == 3


def test_stand_ins_keep_their_kind():
    stand_ins = {"$IMAGE": "a.png", "$KEY": "k", "$SEED": 7}
    found = many_hosts.put_in({"a": ["$SEED", "x/$KEY"], "b": {"c": "$IMAGE", "d": 1.5}}, stand_ins)
    assert found == {"a": [7, "x/k"], "b": {"c": "a.png", "d": 1.5}}
