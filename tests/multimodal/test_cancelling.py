"""Work of others in one call is stopped by a cancelled run: operations of torch, files piece by piece."""

import comfy.model_management
import pytest
import torch
from palimpsest.nodes.host.cancelling import Cancellable, CancellableFile
from palimpsest.nodes.multimodal.dataset import lists
from palimpsest.nodes.multimodal.interleaved import Picture

INTERRUPT = comfy.model_management.InterruptProcessingException

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def cancel_at(monkeypatch):
    """cancel_at(n): the host's n-th answer is that the run is cancelled. Gives the list of questions."""
    asked = []

    def at(count):
        asked.clear()

        def stop():
            asked.append(1)
            if len(asked) >= count:
                raise INTERRUPT

        monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", stop)
        return asked

    return at


def test_every_operation_asks_and_gives_what_it_gave(cancel_at):
    x = torch.rand(4, 4)
    wanted = (x @ x + 1).relu()
    asked = cancel_at(1000)
    with Cancellable():
        found = (x @ x + 1).relu()
    assert torch.equal(found, wanted)
    assert len(asked) == 3
    cancel_at(2)
    with pytest.raises(INTERRUPT), Cancellable():
        (x @ x + 1).relu()


def test_a_file_asks_for_every_piece(tmp_path, cancel_at):
    asked = cancel_at(1000)
    with CancellableFile(tmp_path / "a", "w") as file:
        file.write(b"ab")
        file.write(b"c")
    with CancellableFile(tmp_path / "a") as file:
        assert (file.read(2), file.read()) == (b"ab", b"c")
    assert len(asked) == 4


def test_the_language_model_stops_when_cancelled(loaded, cancel_at):
    vlm = loaded("smolvlm")
    prompt = ("a ", Picture(torch.rand(30, 50, 3), 4), " dog")
    wanted = vlm.hidden_states([prompt]).states
    asked = cancel_at(10**9)
    assert torch.equal(vlm.hidden_states([prompt]).states, wanted)
    half = len(asked) // 2
    cancel_at(half)
    with pytest.raises(INTERRUPT):
        vlm.hidden_states([prompt])
    cancel_at(10**9)
    assert torch.equal(vlm.hidden_states([prompt]).states, wanted)


def test_looking_through_many_pictures_stops_when_cancelled(cancel_at):
    cancel_at(8)
    with pytest.raises(INTERRUPT):
        lists.one_by_one([torch.rand(100, 8, 8, 3)])
