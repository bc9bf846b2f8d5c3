"""Numbers on their way to and from a GPU, without waiting: with a stand-in for its streams where there is none."""

from types import SimpleNamespace

import pytest
import torch
from palimpsest.nodes.host import gradient, streaming
from palimpsest.nodes.host.gradient import LateReader
from palimpsest.nodes.host.streaming import PieceStream

GPU = SimpleNamespace(type="cuda")


@pytest.fixture
def log(monkeypatch):
    """What was asked of the stand-in, in order."""
    asked, running = [], ["compute"]

    class Stream:
        """A queue; `wait_event` and `record_event` are all that is asked of it."""

        def __init__(self, name):
            self.name, self.events = name, 0

        def wait_event(self, event):
            asked.append(f"{self.name} waits for {event}")

        def record_event(self):
            self.events += 1
            return f"{self.name} {self.events}"

        def __enter__(self):
            running.append(self.name)

        def __exit__(self, *_):
            running.pop()

    class Event:
        """Arrives when it is waited for."""

        def record(self):
            asked.append(f"event in {running[-1]}")

        def synchronize(self):
            asked.append("wait")

    compute = Stream("compute")
    cuda = SimpleNamespace(
        current_stream=lambda device: compute,
        Stream=lambda device: Stream("side"),
        stream=lambda side: side,
        Event=Event,
    )
    monkeypatch.setattr(streaming, "torch", SimpleNamespace(cuda=cuda))
    unpinned = lambda shape, dtype, pin_memory: torch.empty(shape, dtype=dtype)  # noqa: E731
    monkeypatch.setattr(gradient, "torch", SimpleNamespace(cuda=cuda, empty=unpinned))
    return SimpleNamespace(asked=asked, running=running)


class Piece:
    """A tensor of a step, and its copy on the GPU."""

    def __init__(self, name, log, on_gpu=False):
        self.name, self.log, self.on_gpu = name, log, on_gpu

    def to(self, device, non_blocking=False):
        assert device is GPU
        assert non_blocking
        self.log.asked.append(f"copy {self.name} in {self.log.running[-1]}")
        return Piece(self.name, self.log, True)

    def record_stream(self, stream):
        self.log.asked.append(f"{self.name} is used by {stream.name}")


def pieces(log, *names):
    return {name: Piece(name, log) for name in names}


# ---- the pieces of a step


def test_pieces_stay_where_they_are_on_a_cpu():
    stream, piece = PieceStream(), torch.ones(3)
    found = stream.fetch({"a": piece}, {"b": piece}, torch.device("cpu"))
    assert list(found) == ["a"]
    assert found["a"] is piece
    assert not stream.moved


def test_the_coming_pieces_are_copied_beside_and_only_the_wanted_waited_for(log):
    found = PieceStream().fetch(pieces(log, "a"), pieces(log, "b"), GPU)
    assert list(found) == ["a"]
    assert found["a"].on_gpu
    assert log.asked == ["copy a in side", "copy b in side", "compute waits for side 1", "a is used by compute"]
    assert log.running == ["compute"]


def test_what_came_ahead_is_not_copied_again_and_what_is_past_is_let_go(log):
    stream = PieceStream()
    stream.fetch(pieces(log, "a"), pieces(log, "b"), GPU)
    ahead = stream.moved["b"][0]
    log.asked.clear()
    found = stream.fetch(pieces(log, "b"), pieces(log, "c"), GPU)
    assert found["b"] is ahead
    assert set(stream.moved) == {"b", "c"}
    assert log.asked == ["copy c in side", "compute waits for side 2", "b is used by compute"]


def test_a_step_that_did_not_come_ahead_is_fetched_all_the_same(log):
    stream = PieceStream()
    stream.fetch(pieces(log, "a"), pieces(log, "b"), GPU)
    found = stream.fetch(pieces(log, "d", "a"), {}, GPU)
    assert [piece.name for piece in found.values()] == ["d", "a"]
    assert set(stream.moved) == {"a", "d"}
    assert log.asked[-5:] == [
        "copy d in side",
        "compute waits for side 3",
        "d is used by compute",
        "compute waits for side 1",
        "a is used by compute",
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pieces_travel_one_step_ahead():
    stream, device = PieceStream(), torch.device("cuda")
    pieces = {i: torch.full((1 << 20,), float(i)).half() for i in range(5)}
    for i in range(4):
        found = stream.fetch({i: pieces[i]}, {i + 1: pieces[i + 1]}, device)
        assert torch.equal(found[i].cpu(), pieces[i])
        assert set(stream.moved) == {i, i + 1}


# ---- losses


class Losses:
    """Two losses that claim to lie on a GPU."""

    device = GPU

    def __init__(self, *values):
        self.tensor = torch.tensor(values)
        self.shape, self.dtype = self.tensor.shape, self.tensor.dtype

    def detach(self):
        return self.tensor


def test_losses_are_read_at_once_on_a_cpu():
    assert LateReader().read(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]


def test_losses_arrive_one_call_late_from_a_gpu(log):
    reader = LateReader()
    assert reader.read(Losses(1.0, 2.0)) is None
    assert log.asked == ["event in compute"]  # nobody waits for what was only just begun
    assert reader.read(Losses(3.0, 4.0)).tolist() == [1.0, 2.0]
    assert log.asked == ["event in compute", "event in compute", "wait"]
    assert reader.read(Losses(5.0, 6.0)).tolist() == [3.0, 4.0]


def test_losses_that_change_afterwards_are_read_as_they_were(log):
    reader, losses = LateReader(), Losses(1.0, 2.0)
    reader.read(losses)
    losses.tensor.fill_(9.0)
    assert reader.read(losses).tolist() == [1.0, 2.0]


def test_the_last_losses_can_be_waited_for_and_come_once(log):
    reader = LateReader()
    assert reader.rest() is None
    reader.read(Losses(1.0, 2.0))
    assert reader.rest().tolist() == [1.0, 2.0]
    assert log.asked == ["event in compute", "wait"]
    assert reader.rest() is None
