"""Files on the disk: rights, kills, full and read-only disks, two processes, and what is left over."""

import contextlib
import errno
import os
import signal
import stat
import tempfile
import time
from pathlib import Path

import pytest
import torch
from palimpsest.nodes import files, writing
from palimpsest.nodes.names import unfinished
from safetensors.torch import load_file

resource = pytest.importorskip("resource", reason="kills and limits of files are POSIX's")

SHELF = files.Shelf(
    folder="palimpsest_things",
    format="palimpsest.thing",
    version=1,
    what=("a file of things", "Save Thing"),
    example="my thing",
    room="save fewer",
)
SMALL, LARGE = {"a": torch.arange(8.0)}, {"a": torch.zeros(1 << 20)}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty models/palimpsest_things."""
    import folder_paths

    folder = tmp_path / "palimpsest_things"
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, SHELF.folder, ([str(folder)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return folder


@contextlib.contextmanager
def open_folder():
    """A folder that anybody may enter, for those who are not root."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        yield Path(place)


@contextlib.contextmanager
def nobody():
    """Within, file rights are those of nobody, for root may write everywhere."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def in_a_child(act) -> int:
    """Run something in a process of its own; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(1)
    return child


def leave_unfinished(path: Path, age: float = 0.0) -> Path:
    """A process is killed in the middle of writing a file, some seconds ago."""

    def act() -> None:
        with writing.whole(path) as made:
            made.write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)

    _, status = os.waitpid(in_a_child(act), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    return made_older(unfinished(path), age)


def made_older(folder: Path, age: float) -> Path:
    """A folder and what is in it, as if changed some seconds ago."""
    for each in (*folder.iterdir(), folder):
        os.utime(each, (time.time() - age,) * 2)
    return folder


# ----------------------------------------------------------------------------------------------------------- the rights


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077, 0o000])
def test_a_file_has_the_rights_of_any_new_file(folder, mask):
    before = os.umask(mask)
    try:
        SHELF.write(SHELF.new_path("sub/cat"), SMALL, {})
    finally:
        os.umask(before)
    (found,) = folder.rglob("*.safetensors")
    assert stat.S_IMODE(found.stat().st_mode) == 0o666 & ~mask


def test_content_and_name_are_on_the_disk_before_it_is_said(folder, monkeypatch):
    synced, real = [], os.fsync

    def fsync(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}") if os.path.exists("/proc/self/fd") else "")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    SHELF.write(SHELF.new_path("cat"), SMALL, {})
    assert len(synced) == 2
    assert synced == ["", ""] or (synced[0].endswith("/whole") and synced[1] == str(folder))


def test_a_file_system_that_cannot_sync_is_no_error_and_a_broken_disk_is(folder, monkeypatch):
    def failing(code):
        def fsync(handle):
            raise OSError(code, os.strerror(code))

        return fsync

    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    SHELF.write(folder / "cat.safetensors", SMALL, {})
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match=r"dog.safetensors cannot be written \(Input/output error\): look at "):
        SHELF.write(folder / "dog.safetensors", SMALL, {})
    assert [path.name for path in folder.iterdir()] == ["cat.safetensors"]


# ------------------------------------------------------------------------------------------------------------ the kills


def test_a_kill_in_the_middle_leaves_no_file_and_its_rest_goes_after_a_day(folder):
    rest = leave_unfinished(folder / "cat_00001.safetensors", writing.DAY - 60)
    assert SHELF.listed() == []
    assert SHELF.new_path("cat").name == "cat_00002.safetensors"
    SHELF.write(SHELF.new_path("cat"), SMALL, {})
    assert rest.exists(), "another process may be writing it"
    made_older(rest, writing.DAY + 60)
    SHELF.write(SHELF.new_path("dog"), SMALL, {})
    assert sorted(path.name for path in folder.iterdir()) == ["cat_00002.safetensors", "dog_00001.safetensors"]


def test_what_a_living_process_holds_stays_however_old(folder):
    ready, path = os.pipe(), folder / "sub" / "cat.safetensors"
    path.parent.mkdir()

    def act() -> None:
        with writing.whole(path) as made:
            made.write_bytes(b"half of it")
            os.write(ready[1], b"!")
            time.sleep(60)

    child = in_a_child(act)
    try:
        os.read(ready[0], 1)
        rest = made_older(unfinished(path), 9 * writing.DAY)
        writing.clear_leftovers(folder)
        assert rest.exists()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    writing.clear_leftovers(folder)
    assert not rest.exists()


def test_leftovers_of_earlier_versions_go_and_what_others_left_stays(folder, tmp_path):
    mine = ["tmp0a_b9xyz.part", ".tmpAb3dEf"]
    others = ["model.safetensors.part", "tmp.part", "big.unfinished", "notes.txt"]
    elsewhere = tmp_path / "loras"
    elsewhere.mkdir()
    foreign = folder / "download.unfinished"
    foreign.mkdir()
    (foreign / "model").touch()
    for name in (*mine, *others):
        for place in (folder, elsewhere):
            (place / name).write_bytes(b"x")
            os.utime(place / name, (1, 1))
    made_older(foreign, 9 * writing.DAY)
    (folder / "tmp0a_b9new.part").touch()
    for place in (folder, elsewhere):
        writing.clear_leftovers(place)
    assert {path.name for path in folder.iterdir()} == {*others, "download.unfinished", "tmp0a_b9new.part"}
    assert {path.name for path in elsewhere.iterdir()} == {*mine, *others}


@pytest.mark.parametrize("moment", [0.0, 0.002, 0.01, 0.03])
def test_whenever_the_kill_comes_every_listed_file_is_whole(folder, moment):
    def act() -> None:
        while True:
            SHELF.write(SHELF.new_path("cat"), LARGE, {})

    child = in_a_child(act)
    time.sleep(0.05 + moment)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for name in SHELF.listed():
        assert torch.equal(load_file(folder / name)["a"], LARGE["a"])


# --------------------------------------------------------------------------------------------- full and read-only disks


def test_a_disk_that_fills_up_while_writing_is_a_sentence_and_leaves_nothing(folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"cat_00001.safetensors cannot be written \(File too large\): make room on "):
            SHELF.write(SHELF.new_path("cat"), LARGE, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(folder.iterdir())


def test_a_folder_that_nobody_may_write_to_is_told_before(monkeypatch):
    with open_folder() as place:
        paths = [place / "models" / "cat_00001.safetensors", place / "models" / "sub" / "cat_00001.safetensors"]
        paths[0].parent.mkdir(mode=0o555)
        for path in paths:
            with (
                nobody(),
                pytest.raises(OSError, match=r"cat_00001.\w+ cannot be written \(Permission denied\)"),
            ):
                writing.try_to_write([path])
        with nobody(), pytest.raises(OSError, match=r": make \S+models\S* writable\."):
            writing.try_to_write(paths)


def test_a_try_leaves_nothing_behind(tmp_path):
    writing.try_to_write([tmp_path / "new" / "deep" / "cat.safetensors", tmp_path / "cat.safetensors"])
    assert not list(tmp_path.iterdir())


def test_a_name_too_long_for_the_disk_and_a_file_for_a_folder_are_told_before(folder):
    with pytest.raises(OSError, match="choose a shorter name"):
        writing.try_to_write([folder / ("x" * 300)])
    (folder / "sub").touch()
    for attempt in (SHELF.try_new, lambda name: SHELF.write(folder / f"{name}.safetensors", SMALL, {})):
        with pytest.raises(OSError, match=r"\(Not a directory\): look at .*sub"):
            attempt("sub/cat")


@pytest.mark.parametrize("name", ["猫" * 75, "猫" * 78, "猫" * 80, "𠮷" * 80, "x" * 500, "猫" * 80 + "/" + "猫" * 80])
def test_every_name_that_is_taken_can_be_written(folder, name):
    SHELF.try_new(name)
    path = SHELF.new_path(name)
    for behind in ("", "_language"):
        SHELF.write(path.with_name(f"{path.stem}{behind}.safetensors"), SMALL, {})
    assert len(SHELF.listed()) == 2


# -------------------------------------------------------------------------------------------------------- two processes


def test_nothing_is_written_over_unless_it_is_asked_for(folder):
    path = folder / "cat.safetensors"
    SHELF.write(path, SMALL, {})
    with pytest.raises(FileExistsError):
        SHELF.write(path, LARGE, {})
    assert torch.equal(load_file(path)["a"], SMALL["a"])
    SHELF.write(path, LARGE, {}, over=True)
    assert torch.equal(load_file(path)["a"], LARGE["a"])
    assert [each.name for each in folder.iterdir()] == [path.name]


def test_a_shelf_the_host_was_not_told_of_can_be_written_to(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    SHELF.write(tmp_path / "new" / "cat.safetensors", SMALL, {})
    assert (tmp_path / "new" / "cat.safetensors").is_file()


def test_two_processes_that_save_at_once_never_take_the_same_number(folder):
    def act() -> None:
        for number in range(20):
            while True:
                with contextlib.suppress(FileExistsError):
                    SHELF.write(SHELF.new_path("cat"), {"a": torch.tensor([os.getpid(), number])}, {})
                    break
        os._exit(0)

    children = [in_a_child(act) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    found = {tuple(load_file(folder / name)["a"].tolist()) for name in SHELF.listed()}
    assert found == {(child, number) for child in children for number in range(20)}
