"""One graph over a folder of pictures, on as many ComfyUI hosts as there are.

    pip install distributed
    python tests/recipes/many_hosts.py --graph graph.json --pictures photos --out edited \\
        --hosts http://gpu1:8188 http://gpu2:8188
    ... --scheduler tcp://node:8786        a Dask cluster that runs; else threads of this process wait for the hosts

The graph is in API format (editor: File, Export (API)). In it "$IMAGE" stands for the picture's name (LoadImage),
"$KEY" for its key (the prefix of the SaveImage whose picture is wanted), "$SEED" for a number that the key gives.

A picture's key is a hash of its bytes and the graph. It is done when `<name>-<key>.png` is in --out; that file is
renamed into place, never half written. So a second run does what is missing and repeats nothing, and another graph
starts anew. `report.jsonl` has one line for every finished picture: its key, host, seconds, and what report nodes told;
where that is JSON (an Edit Report's *numbers* in a Preview as Text), its numbers. Were two lines to have one key, the
last counts.

Every host has one graph at work and one queued. A host that does not answer gets nothing more in this run, and its
pictures go to the others; a picture with which LOSSES hosts went silent is given up, so that it cannot take them all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

API = Path(__file__).resolve().parent.parent / "api.py"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
IN_FLIGHT = 2  # graphs a host has at a time: one at work, one queued
LOSSES = 3  # hosts that may go silent with a picture
NO_ANSWER = "no answer"


@dataclass
class Job:
    """A picture to be done, and how often a host went silent with it."""

    picture: Path
    key: str
    target: Path
    losses: int = 0


@dataclass
class Tally:
    """What became of the pictures."""

    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)
    given_back: int = 0


# ------------------------------------------------------------------------------------------------------------ pictures


def key_of(picture: bytes, graph: dict) -> str:
    """A hash of a picture's bytes and the graph."""
    return hashlib.sha256(picture + b"\0" + json.dumps(graph, sort_keys=True).encode()).hexdigest()[:16]


def put_in(value: Any, stand_ins: dict[str, Any]) -> Any:
    """A graph with "$IMAGE", "$KEY", "$SEED" replaced; a text may hold "$KEY" among other words."""
    if isinstance(value, dict):
        return {name: put_in(inner, stand_ins) for name, inner in value.items()}
    if isinstance(value, list):
        return [put_in(inner, stand_ins) for inner in value]
    if isinstance(value, str):
        return stand_ins[value] if value in stand_ins else value.replace("$KEY", stand_ins["$KEY"])
    return value


def kept_node(graph: dict) -> str:
    """The id of the node that writes the wanted picture. Exits with a sentence where the graph is not prepared."""
    texts = {node: [v for v in body["inputs"].values() if isinstance(v, str)] for node, body in graph.items()}
    writers = [node for node, found in texts.items() if any("$KEY" in text for text in found)]
    if len(writers) != 1:
        sys.exit(f'The graph has "$KEY" in {len(writers)} nodes: put it into the prefix of one SaveImage.')
    if not any("$IMAGE" in found for found in texts.values()):
        sys.exit('The graph has "$IMAGE" nowhere: put it into the LoadImage that takes the picture.')
    return writers[0]


def jobs_of(folder: Path, out: Path, graph: dict) -> tuple[list[Job], int]:
    """(jobs that are not done, number of those that are). The same bytes under the same name are one job."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        sys.exit(f"{folder} holds no picture ({', '.join(SUFFIXES)}).")
    found = {}
    for file in files:
        key = key_of(file.read_bytes(), graph)
        target = out / f"{file.stem}-{key}.png"
        found[target] = Job(file, key, target)
    missing = [job for job in found.values() if not job.target.exists()]
    return missing, len(found) - len(missing)


# --------------------------------------------------------------------------------------------------------- at one host


def edit(url: str, job: tuple[str, str, bytes], graph: dict, node: str, timeout: float) -> dict:
    """One picture through the graph on one host; never raises, so that nothing is tried again behind the client's back.

    job: (key, suffix, bytes). Gives "picture" (bytes), "reports" and "seconds"; or "error", which is NO_ANSWER or the
    host's words, and "details".
    """
    from api import ApiClient, ApiError, NoAnswer

    key, suffix, picture = job
    client, began = ApiClient(url), time.monotonic()
    try:
        image = client.upload_image_bytes(picture, f"{key}{suffix}", subfolder="many_hosts")
        stand_ins = {"$IMAGE": image, "$KEY": key, "$SEED": int(key[:12], 16)}
        entry = client.queue(put_in(graph, stand_ins), timeout=timeout)
        pictures = client.images(entry, node)
    except NoAnswer as error:
        return {"error": NO_ANSWER, "details": str(error)}
    except ApiError as error:
        return {"error": "refused", "details": str(error)}
    if len(pictures) != 1 or not pictures[0].startswith(b"\x89PNG"):
        return {"error": "refused", "details": f"node {node} gave {len(pictures)} pictures: it must save one PNG"}
    return {
        "picture": pictures[0],
        "reports": reports(entry, graph),
        "seconds": round(time.monotonic() - began, 2),
    }


def reports(entry: dict, graph: dict) -> dict[str, Any]:
    """What nodes told as text, by "id class"; JSON as what it says."""
    told = {}
    for node, shown in entry["outputs"].items():
        texts = [as_json(text) for text in shown.get("text") or ()]
        if texts:
            told[f"{node} {graph[node]['class_type']}"] = texts[0] if len(texts) == 1 else texts
    return told


def as_json(text: str) -> Any:
    """What a text says, where it is JSON."""
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return text


# ----------------------------------------------------------------------------------------------------------- all hosts


def connect(scheduler: str | None, slots: int) -> Any:
    """A Dask client. Exits with a sentence that names the package where it is missing."""
    try:
        from distributed import Client
        from distributed.diagnostics.plugin import UploadFile
    except ImportError:
        sys.exit("many_hosts.py needs Dask: pip install distributed")
    if scheduler is None:
        here = dict.fromkeys(("dashboard_address", "worker_dashboard_address"), "127.0.0.1:0")
        return Client(processes=False, n_workers=1, threads_per_worker=slots, **here)
    client = Client(scheduler)
    client.register_plugin(UploadFile(str(API)))  # workers alone: upload_file gives it to the scheduler's process too
    return client


class Hand:
    """Gives pictures to hosts that answer, and takes them back from those that do not."""

    def __init__(self, client: Any, hosts: list[str], graph: dict, timeout: float):
        self.client, self.hosts, self.graph = client, list(dict.fromkeys(hosts)), graph
        self.node, self.timeout, self.tally = kept_node(graph), timeout, Tally()

    def run(self, jobs: list[Job]) -> Iterator[tuple[Job, str, dict]]:
        """(job, host, what `edit` gave) of every picture that is finished or failed, as they come."""
        from distributed import as_completed

        waiting, going, at = deque(jobs), as_completed(), {}
        self.fill(waiting, going, at)
        for future in going:
            job, url = at.pop(future.key)
            found = future.result()
            if found.get("error") == NO_ANSWER:
                found = self.lost(job, url, found)
            if found is None:
                waiting.append(job)
            else:
                yield job, url, found
            self.fill(waiting, going, at)
        for job in waiting:
            self.tally.failed[job.picture.name] = "no host was left"

    def fill(self, waiting: deque, going: Any, at: dict) -> None:
        """Give every host that answers as much as it may have, the first graph of all before the second of any."""
        for level in range(IN_FLIGHT):
            for url in self.hosts:
                busy = sum(host == url for _, host in at.values())
                if busy > level or not waiting:
                    continue
                job = waiting.popleft()
                sent = job.key, job.picture.suffix.lower(), job.picture.read_bytes()
                timeout = IN_FLIGHT * self.timeout  # it waits while the host makes the one before
                future = self.client.submit(
                    edit, url, sent, graph=self.graph, node=self.node, timeout=timeout, pure=False, retries=0
                )
                at[future.key] = job, url
                going.add(future)

    def lost(self, job: Job, url: str, found: dict) -> dict | None:
        """A host went silent: it gets nothing more. None where the job is to be given to another."""
        if url in self.hosts:
            self.hosts.remove(url)
            self.tally.silent.append(url)
        job.losses += 1
        if job.losses >= LOSSES:
            return {"error": "given up", "details": f"{job.losses} hosts went silent with it; {found['details']}"}
        self.tally.given_back += 1
        return None


def keep(job: Job, url: str, found: dict, report: Path) -> None:
    """The picture's line, then the picture by renaming: what is there is whole, and has its line."""
    part = job.target.with_suffix(".part")
    part.write_bytes(found["picture"])
    line = {"picture": job.picture.name, "key": job.key, "file": job.target.name, "host": url}
    line |= {"seconds": found["seconds"], "reports": found["reports"]}
    with report.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    part.replace(job.target)


def progress(tally: Tally, wanted: int, began: float) -> str:
    """Where the run stands: how many, how fast, how long still."""
    ready = tally.done + len(tally.failed)
    pace = (time.monotonic() - began) / max(ready, 1)
    return f"{ready}/{wanted}, {pace:.2f} s a picture, {pace * (wanted - ready):.0f} s to go"


def process(client: Any, jobs: list[Job], options: argparse.Namespace, graph: dict) -> Tally:
    """Do what is not done; prints a line for every picture."""
    hand, began = Hand(client, options.hosts, graph, options.timeout), time.monotonic()
    for job, url, found in hand.run(jobs):
        if "error" in found:
            hand.tally.failed[job.picture.name] = found["details"]
        else:
            keep(job, url, found, options.out / "report.jsonl")
            hand.tally.done += 1
        told = found.get("details") or f"{found['seconds']} s on {url}"
        print(f"{progress(hand.tally, len(jobs), began)}: {job.picture.name}: {told}", flush=True)
    return hand.tally


def main(given: list[str] | None = None) -> Tally:
    """Parse, run, say what became of the pictures. Ends with status 1 where some are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hosts", nargs="+", required=True)
    parser.add_argument("--scheduler", help="address of a Dask scheduler")
    parser.add_argument(
        "--timeout", type=float, default=600, help="seconds after which a graph's host counts as silent"
    )
    options = parser.parse_args(given)
    graph = json.loads(options.graph.read_text(encoding="utf-8"))
    options.out.mkdir(parents=True, exist_ok=True)
    kept_node(graph)
    jobs, there = jobs_of(options.pictures, options.out, graph)
    print(f"{there} pictures are there, {len(jobs)} to do", flush=True)
    if not jobs:
        return Tally()
    with connect(options.scheduler, IN_FLIGHT * len(options.hosts)) as client:
        tally = process(client, jobs, options, graph)
    for url in tally.silent:
        print(f"{url} went silent")
    print(f"{tally.done} done, {tally.given_back} given back, {len(tally.failed)} failed")
    if tally.failed:
        sys.exit("\n".join(f"{name}: {why}" for name, why in tally.failed.items()))
    return tally


if __name__ == "__main__":
    main()
