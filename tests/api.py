"""A small client for ComfyUI's HTTP API, standard library only. The tests and the demo use it.

client = ApiClient("http://127.0.0.1:8188")
name = client.upload_image("dog.png")
entry = client.queue(prompt)            # a graph in API format: {"1": {"class_type": ..., "inputs": {...}}, ...}
pictures = client.images(entry, "9")    # the files that node 9 wrote
"""

from __future__ import annotations

import http.client
import json
import mimetypes
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from typing import Any

POLL_SECONDS = (0.05, 0.5)  # first and longest wait between two looks at the history


class ApiError(RuntimeError):
    """The host refused, failed or did not answer. The message says which node and why; `details` is its reply."""

    def __init__(self, message: str, details: Any = None):
        super().__init__(message)
        self.details = details


class PromptRejected(ApiError):
    """The host's validation refused the graph before anything ran."""


class NoAnswer(ApiError):
    """The host cannot be reached, went away, or did not end a run in time."""


class ExecutionFailed(ApiError):
    """A node raised while the graph ran."""


class Interrupted(ApiError):
    """The run was cancelled."""


class ApiClient:
    """One host. Every call raises ApiError, with the host's own words, unless it succeeds."""

    def __init__(self, url: str, *, timeout: float = 60):
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.client_id = uuid.uuid4().hex
        self._direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy

    def get(self, path: str, **query: str) -> bytes:
        return self._send(urllib.request.Request(self._address(path, query)))

    def get_json(self, path: str, **query: str) -> Any:
        return json.loads(self.get(path, **query))

    def post_json(self, path: str, value: Any) -> Any:
        """POST a value as JSON; returns the JSON reply, or None where the host sends an empty one."""
        headers = {"Content-Type": "application/json"}
        reply = self._send(urllib.request.Request(self._address(path), json.dumps(value).encode(), headers))
        return json.loads(reply) if reply else None

    def object_info(self, node_id: str | None = None) -> dict:
        """The definition of one node, or of all of them by id."""
        if node_id is None:
            return self.get_json("/object_info")
        info = self.get_json(f"/object_info/{urllib.parse.quote(node_id)}")
        if node_id not in info:
            raise ApiError(f"the host has no node {node_id}")
        return info[node_id]

    def set_setting(self, name: str, value: Any) -> None:
        """Set one of the graph editor's settings for the default user."""
        self.post_json(f"/api/settings/{urllib.parse.quote(name)}", value)

    def upload_image(self, path: str | Path, *, name: str | None = None, subfolder: str = "") -> str:
        """Put a picture into the host's input folder, over one of the same name; returns what LoadImage takes."""
        path = Path(path)
        return self.upload_image_bytes(path.read_bytes(), name or path.name, subfolder=subfolder)

    def upload_image_bytes(self, data: bytes, name: str, *, subfolder: str = "") -> str:
        fields = {"overwrite": "true", "type": "input", "subfolder": subfolder}
        body, content_type = _multipart(fields, name, data)
        request = urllib.request.Request(self._address("/upload/image"), body, {"Content-Type": content_type})
        reply = json.loads(self._send(request))
        return f"{reply['subfolder']}/{reply['name']}" if reply.get("subfolder") else reply["name"]

    def submit(self, prompt: dict, *, targets: list[str] | None = None) -> str:
        """Queue a graph in API format and return its id at once. `targets` runs only what these nodes need."""
        body: dict[str, Any] = {"prompt": prompt, "client_id": self.client_id}
        if targets is not None:
            body["partial_execution_targets"] = targets
        try:
            return self.post_json("/prompt", body)["prompt_id"]
        except NoAnswer:
            raise
        except ApiError as error:
            raise PromptRejected(_rejection(error), error.details) from None

    def wait(self, prompt_id: str, *, timeout: float = 600) -> dict:
        """Wait for a queued graph to end and return its history entry: {"outputs": {node id: ...}, "status": ...}."""
        deadline = time.monotonic() + timeout
        pause, longest = POLL_SECONDS
        while time.monotonic() < deadline:
            entry = self.get_json(f"/history/{prompt_id}").get(prompt_id)
            if entry and entry.get("status", {}).get("status_str"):
                _raise_if_failed(entry)
                return entry
            time.sleep(pause)
            pause = min(longest, pause * 1.3)
        raise NoAnswer(f"the run {prompt_id} did not end within {timeout:.0f} s")

    def queue(self, prompt: dict, *, timeout: float = 600, targets: list[str] | None = None) -> dict:
        """Run a graph in API format to its end and return its history entry."""
        return self.wait(self.submit(prompt, targets=targets), timeout=timeout)

    def interrupt(self) -> None:
        """Cancel what runs now."""
        self._send(urllib.request.Request(self._address("/interrupt"), b"", method="POST"))

    def free(self) -> None:
        """Ask the host to unload its models and forget cached results."""
        self.post_json("/free", {"unload_models": True, "free_memory": True})

    def view(self, filename: str, *, subfolder: str = "", type: str = "output") -> bytes:
        """The bytes of one file of the host's output, temp or input folder."""
        return self.get("/view", filename=filename, subfolder=subfolder, type=type)

    def images(self, entry: dict, node_id: str | int) -> list[bytes]:
        """The picture files that a node of a finished run reported."""
        reported = entry["outputs"].get(str(node_id), {}).get("images", [])
        return [self.view(item["filename"], subfolder=item["subfolder"], type=item["type"]) for item in reported]

    def _address(self, path: str, query: dict[str, str] | None = None) -> str:
        return self.url + path + (f"?{urllib.parse.urlencode(query)}" if query else "")

    def _send(self, request: urllib.request.Request) -> bytes:
        try:
            return self._answer(request)
        except (OSError, http.client.HTTPException) as error:  # the latter: it went away within its answer
            raise NoAnswer(f"no answer from {self.url}: {getattr(error, 'reason', error)}") from None

    def _answer(self, request: urllib.request.Request) -> bytes:
        try:
            with self._direct.open(request, timeout=self.timeout) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")
            where = f"{request.get_method()} {urllib.parse.urlparse(request.full_url).path}"
            raise ApiError(f"{where} gave status {error.code}: {text[:500]}", _json_or_text(text)) from None


def _multipart(fields: dict[str, str], filename: str, data: bytes) -> tuple[bytes, str]:
    """A multipart/form-data body with one file named `image`, and its content type."""
    boundary = uuid.uuid4().hex
    kind = mimetypes.guess_type(filename)[0] or "application/octet-stream"
    parts = [f'--{boundary}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items()]
    quoted = filename.replace('"', "%22")
    parts.append(
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{quoted}"\r\n'
        f"Content-Type: {kind}\r\n\r\n"
    )
    body = "".join(parts).encode() + data + f"\r\n--{boundary}--\r\n".encode()
    return body, f"multipart/form-data; boundary={boundary}"


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _rejection(error: ApiError) -> str:
    """The host's validation errors, one line per node."""
    reply = error.details
    if not isinstance(reply, dict):
        return str(error)
    lines = []
    for node_id, found in (reply.get("node_errors") or {}).items():
        told = "; ".join(
            f"{e['message']}: {e['details']}" if e.get("details") else e["message"] for e in found["errors"]
        )
        lines.append(f"node {node_id} ({found.get('class_type')}): {told}")
    top = reply.get("error") or {}
    message = top.get("message", "") if isinstance(top, dict) else str(top)
    details = top.get("details", "") if isinstance(top, dict) and not lines else ""
    return "\n".join([" ".join(filter(None, [f"the host refused the graph: {message}", details])), *lines])


def _raise_if_failed(entry: dict) -> None:
    status = entry["status"]
    if status["status_str"] == "success":
        return
    for kind, data in status.get("messages", []):
        if kind == "execution_interrupted":
            raise Interrupted(f"the run was interrupted in node {data.get('node_id')}", data)
        if kind == "execution_error":
            node = f"node {data.get('node_id')} ({data.get('node_type')})"
            message = f"{node}: {data.get('exception_type')}: {str(data.get('exception_message')).strip()}"
            raise ExecutionFailed(message, data)
    raise ExecutionFailed(f"the run ended with status {status['status_str']}", status)
