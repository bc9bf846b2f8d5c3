"""Virtual environments with torch, the host's requirements and the tools of the tests."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from .places import DEV, ROOT, Problem
from .steps import digest, is_done, mark_done, run_logged, step

DISK_NEEDED = 6 * 10**9  # bytes; the CUDA build of torch is the largest part
TORCH = "torch==2.13.0"
TORCH_COMPANIONS = ("torchvision==0.28.0", "torchaudio==2.11.0")  # by --no-deps: their pins name other torch builds
TOOLS = ("requests", "pytest", "pytest-xdist", "ruff", "distributed")


def make_venv(venv: Path) -> Path:
    """Create a virtual environment with pip unless a working one is there. Returns its Python."""
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp, key = venv / ".stamps" / "created", digest(str(venv))
    if is_done(stamp, key) and python.exists():
        return python
    if not python.exists() or subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode:
        check_can_create_venv()
        with step(f"creating {venv.relative_to(ROOT)} with Python {sys.version.split()[0]}"):
            run_logged([sys.executable, "-m", "venv", "--clear", venv], "venv")
    mark_done(stamp, key)
    return python


def check_can_create_venv() -> None:
    for name in ("venv", "ensurepip"):
        if importlib.util.find_spec(name) is None:
            raise Problem(f"This Python has no '{name}' module: install it (Debian, Ubuntu: apt install python3-venv)")
    free = shutil.disk_usage(ROOT).free
    if free < DISK_NEEDED:
        raise Problem(
            f"Too little disk space for the set-up: {free / 1e9:.1f} GB are free at {ROOT}, "
            f"{DISK_NEEDED / 1e9:.0f} GB are needed; free some and run the same command again"
        )


def install_packages(venv: Path, comfy: Path) -> None:
    """torch, its two companions, then the rest of the host's requirements and the tools of the tests."""
    note = " (PyPI's Linux build carries CUDA, also where there is no NVIDIA card)" if sys.platform == "linux" else ""
    pip_install(venv, "torch", f"installing {TORCH}{note}", [TORCH])
    pip_install(venv, "torch-companions", "installing torchvision, torchaudio", ["--no-deps", *TORCH_COMPANIONS])
    repair_torchaudio(venv)
    lines = (comfy / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if not re.match(r"(torch|torchvision|torchaudio)\b", line)]
    requirements = venv / "host-requirements.txt"
    requirements.write_text("\n".join([*wanted, *TOOLS, ""]), encoding="utf-8")
    pip_install(venv, "host", "installing the host's requirements, pytest and ruff", ["-r", requirements])


def pip_install(venv: Path, name: str, text: str, arguments: list) -> None:
    """Install packages into our own environment, once for the same arguments and requirement files."""
    stamp, key = venv / ".stamps" / name, digest(*arguments)
    if not is_done(stamp, key):
        with step(text):
            install(venv_python(venv), arguments, name)
        mark_done(stamp, key)


def install(python: Path, arguments: list, name: str) -> None:
    """By uv where it is on the path; else, or where it fails (it does not read pip's settings), by pip."""
    if uv := shutil.which("uv"):
        with contextlib.suppress(Problem):
            return run_logged([uv, "pip", "install", "--python", python, *arguments], f"uv-{name}")
    return run_logged([python, "-m", "pip", "install", *arguments], f"pip-{name}")


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def repair_torchaudio(venv: Path) -> None:
    """Beside a torch without CUDA, PyPI's torchaudio imports only without its compiled CUDA libraries.

    The host uses only its Python part, so they are deleted, and only in our own environment.
    """
    stamp, key = venv / ".stamps" / "torchaudio", digest(TORCH, *TORCH_COMPANIONS)
    if is_done(stamp, key):
        return
    question = "import torch, importlib.util as u; print(torch.version.cuda, u.find_spec('torchaudio').origin, sep='|')"
    cuda, origin = ask(venv_python(venv), question).split("|")
    if cuda == "None":
        for library in (Path(origin).parent / "lib").glob("*.so"):
            library.unlink()
    mark_done(stamp, key)


def ask(python: Path, code: str) -> str:
    """Run a line of code in another Python and return the last line it prints."""
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise Problem(f"{python} cannot run torch: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return done.stdout.strip().splitlines()[-1]


def has_accelerator(python: Path) -> bool:
    """Whether torch finds a GPU or the like; asked once per Python, as importing torch takes seconds."""
    answer = DEV / f"accelerator-{digest(str(python), TORCH)[:8]}"
    if not answer.is_file():
        DEV.mkdir(exist_ok=True)
        mark_done(answer, ask(python, "import torch; print(torch.accelerator.is_available())"))
    return answer.read_text(encoding="utf-8") == "True"
