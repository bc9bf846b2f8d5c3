"""A running ComfyUI with this pack alone, in a base directory of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from .base_folders import offer_models, prepare_base
from .browsers import Browser
from .environments import has_accelerator
from .hosts import Place
from .places import DEV, MODELS, POCKET, POCKET_EDIT, POCKET_POSE, ROOT, Problem
from .pocket_model import build_edit_model, build_pose_control
from .steps import last_lines, step


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
    if examples and (checkpoints / POCKET.name).is_file():
        if not (checkpoints / POCKET_EDIT).is_file():
            build_edit_model(python, checkpoints)
        if not (base / "models" / "controlnet" / POCKET_POSE).is_file():
            build_pose_control(python, base / "models")
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
