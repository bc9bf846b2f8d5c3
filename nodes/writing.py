"""Files come into being whole or not at all; what a killed process left of them goes after a day."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .names import UNFINISHED, unfinished

HELD, DAY = "held_by_palimpsest", 24 * 3600.0
EARLIER = re.compile(r"tmp[a-z0-9_]{8}\.part|\.tmp\w{6}")  # what earlier versions wrote to, in folders of ours
NO_ROOM = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
NO_RIGHT = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def whole(path: Path, *, over: bool = False) -> Iterator[Path]:
    """Within, a place to write to, in a folder of this process alone; at the end it becomes `path`, safe on the disk.

    It has the rights of any new file (the umask's). over: it may take the place of a file that is there. Raises
    FileExistsError where one is, or where another process is writing it; nothing is left behind in any case.
    """
    folder, handle = unfinished(path), None
    folder.mkdir()  # by one process only
    try:
        handle = os.open(folder / HELD, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        lock(handle)
        if not over and os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "there is a file of this name", str(path))
        made = folder / "whole"
        yield made
        sync(made)
        with contextlib.suppress(OSError):  # a disk without such rights
            os.chmod(made, stat.S_IMODE(os.fstat(handle).st_mode))
        os.replace(made, path)
        sync(path.parent)
    finally:
        if handle is not None:
            os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a folder where there is none. Raises OSError, NotADirectoryError where something else lies there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None


def sync(path: Path) -> None:
    """Have a file's content, or the names in a folder, on the disk and not in its cache. Folders where that exists."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # a file system without it
            raise
    finally:
        os.close(handle)


def lock(handle: int) -> bool:
    """Hold an open file until it is closed, or its process ends; False where another one does, or nobody can."""
    try:
        try:
            import fcntl
        except ImportError:
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def try_to_write(paths: Iterable[Path]) -> None:
    """Begin every file and give it up again, so that no work is done for what cannot be written. Raises OSError.

    Folders that were made for it are gone again.
    """
    for path in paths:
        made = [folder for folder in path.parents if not os.path.lexists(folder)]
        try:
            make_folder(path.parent)
            with contextlib.suppress(GivenUp, FileExistsError), whole(path):  # a name that is taken gets a number
                raise GivenUp
        except OSError as error:
            raise not_written(path, error, "choose another name") from error
        finally:
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()


class GivenUp(Exception):
    """A file is not to be, after all."""


def not_written(path: Path, error: Exception, room: str) -> OSError:
    """The error for a file that could not be written, with the way out; room: what else saves room."""
    code = getattr(error, "errno", None)
    named = re.search(r"os error (\d+)", str(error))  # as safetensors words it
    if code is None and named:
        code = int(named[1])
    if code in NO_ROOM:
        way_out = f"make room on its disk, or {room}"
    elif code in NO_RIGHT:
        way_out = f"make {path.parent} writable"
    elif code == errno.ENAMETOOLONG:
        way_out = "choose a shorter name"
    else:
        way_out = f"look at {path.parent}"
    reason = os.strerror(code) if code is not None else str(error)
    return OSError(f"{path.name} cannot be written ({reason.rstrip('.')}): {way_out}.")


# ---- what a killed process left -------------------------------------------------------------------------------------


def clear_leftovers(root: Path) -> None:
    """Remove what was never finished in a folder of models, where it is older than a day and no process holds it."""
    ours = root.name.startswith("palimpsest_")
    for place, folders, files in os.walk(root):
        for name in [name for name in folders if name.endswith(UNFINISHED)]:
            folders.remove(name)
            folder = Path(place, name)
            if is_leftover(folder):
                shutil.rmtree(folder, ignore_errors=True)
        for name in files:
            if ours and EARLIER.fullmatch(name) and old([Path(place, name)]):
                with contextlib.suppress(OSError):
                    os.remove(Path(place, name))


def is_leftover(folder: Path) -> bool:
    """Whether a folder is one of `whole`, a day old and held by nobody."""
    try:
        content = list(folder.iterdir())
        mark = folder / HELD
        if not old([folder, *content]) or (content and mark not in content):
            return False
        if not content:
            return True
        handle = os.open(mark, os.O_RDWR)
    except OSError:
        return False
    try:
        return lock(handle)
    finally:
        os.close(handle)


def old(paths: Iterable[Path]) -> bool:
    """Whether all of them were last changed more than a day ago."""
    try:
        return time.time() - max(path.lstat().st_mtime for path in paths) > DAY
    except OSError:
        return False
