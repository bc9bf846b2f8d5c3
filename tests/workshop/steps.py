"""Steps of a set-up: told with their time, done once for the same inputs, one process at a time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
import time
from pathlib import Path

from .places import DEV, ROOT, Problem


@contextlib.contextmanager
def step(text: str):
    """Say what is being done, then how long it took."""
    print(f"  {text} ... ", end="", flush=True)
    start = time.monotonic()
    try:
        yield
    except BaseException:
        print("stopped", flush=True)
        raise
    print(f"{time.monotonic() - start:.1f} s", flush=True)


def digest(*parts: str | Path) -> str:
    """One hash over strings and over the names and contents of files and folders."""
    total = hashlib.sha256()
    for part in parts:
        if not isinstance(part, Path):
            total.update(f"{part}\0".encode())
            continue
        files = sorted(part.rglob("*")) if part.is_dir() else [part]
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                total.update(f"{file.name}\0{sha256(file)}\0".encode())
    return total.hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_done(stamp: Path, key: str) -> bool:
    """Whether `stamp`, written last by a step, says that the step was done with these inputs."""
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == key


def mark_done(stamp: Path, key: str) -> None:
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(key, encoding="utf-8")


def last_lines(path: Path, count: int = 15) -> str:
    if not path.is_file():
        return "(no log)"
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])


def run_logged(command: list, log_name: str, *, cwd: Path = ROOT) -> None:
    """Run a set-up command with its output in .dev/logs; a failure becomes a Problem that gives the likely cause."""
    log = DEV / "logs" / f"{log_name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PYTHONUTF8": "1"}
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise Problem(f"{likely_cause(log.read_text(encoding='utf-8', errors='replace'))} (log: {log})")


def likely_cause(output: str) -> str:
    """The sentence for the failure of a set-up command, read from what it printed."""
    no_network = (
        "NewConnectionError|ConnectTimeoutError|ProxyError|NameResolutionError|Max retries exceeded|EAI_AGAIN|ENOTFOUND"
        "|Temporary failure|Network is unreachable|No route to host|getaddrinfo failed|Failed to establish"
    )
    if re.search("No space left on device|ENOSPC|not enough space", output):
        return "The disk is full: free some space and run the same command again"
    if re.search(no_network, output):
        return "The network cannot be reached: check the connection or proxy settings and run the same command again"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search("error", line, re.IGNORECASE)]
    return f"A set-up command failed: {(errors or lines or ['no output'])[-1]}"


@contextlib.contextmanager
def only_one():
    """Let one set-up work in .dev at a time. The system drops the lock when a process ends, however it ends."""
    DEV.mkdir(exist_ok=True)
    with (DEV / "lock").open("a") as file:
        if not try_lock(file):
            print("  waiting for another dev.py to finish its set-up", flush=True)
            while not try_lock(file):
                time.sleep(0.5)
        yield


def try_lock(file) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
