"""python dev.py fuzz [--cases N] [--seed N] [--match TEXT]: bad values into every input of every node, one at a time.

Every answer must be a finite result, the host's own validation or a sentence of ours; never another error, a result
that is not finite, or more than ten seconds. A graph that uses many nodes gives the same bits before and after.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from . import graphs, running


def reference(made: graphs.Graphs, tick: int) -> dict:
    """A graph of many nodes, none of it cached: inverted, tuned, applied, blended."""
    walk = [f"walk{tick}", 0]
    model = ["sd15", 0]
    prompts = {"positive": graphs.LINKS["positive"], "negative": graphs.LINKS["negative"]}
    more = {
        f"latent{tick}": graphs.step("FuzzThing", name="latent", tick=tick),
        walk[0]: graphs.step(
            "PalimpsestInvert",
            **made.defaults("PalimpsestInvert") | graphs.WALK | {"latent": [f"latent{tick}", 0]},
        ),
        f"kv{tick}": graphs.step(
            "PalimpsestTuneKV",
            **made.defaults("PalimpsestTuneKV")
            | {"model": model, "trajectory": walk, **prompts, "inner_steps": 1, "layers": "middle"},
        ),
        f"patched{tick}": graphs.step(
            "PalimpsestApplyKV", **made.defaults("PalimpsestApplyKV") | {"model": model, "kv": [f"kv{tick}", 0]}
        ),
    }
    changes = {"model": [f"patched{tick}", 0], "trajectory": walk}
    return made.build("FeatureBlend", changes, more)


def same(a: dict, b: dict) -> bool:
    """Whether two runs gave the same bits."""
    return all(torch.equal(a[name]["samples"], b[name]["samples"]) for name in a if isinstance(a[name], dict))


class Fuzz:
    """Cases in one host; faults: (case, what came of it)."""

    def __init__(self, base: Path):
        self.base, self.runner = base, running.Runner()
        self.runner.keep_files()
        self.made = graphs.Graphs(running.info_of(self.runner.classes))
        for node, what in (("SaveKV", "kv"), ("SaveBlendWeights", "weights"), ("SaveContextAdapter", "adapter")):
            self.expect_fine(self.made.build(node, {"filename": "kept"}), f"{node} of {what}")
        self.made = graphs.Graphs(running.info_of(self.runner.classes))  # the loaders list the files now
        self.first = self.expect_fine(reference(self.made, 0), "the reference graph")
        self.kept = running.contents(base)
        self.reads = running.Reads([base])
        self.faults: list[tuple[str, running.Outcome]] = []
        self.counts: Counter[str] = Counter()

    def expect_fine(self, graph: dict, what: str) -> dict:
        """What a good graph gives. Raises RuntimeError where it does not run."""
        found = self.runner.run(graph, limit=120.0)
        if found.kind not in (running.FINE, running.SLOW):
            raise RuntimeError(f"{what} failed: {found.said}\n{''.join(found.frames)}")
        return found.seen

    def cases(self, seed: int, match: str = "") -> list[graphs.Case]:
        """All of them, or those whose name has a text: every input has its first turn before any has its second."""
        chance, turns = random.Random(seed), {}
        for case in self.made.cases():
            if match in str(case):
                turns.setdefault((case.node, case.input), []).append(case)
        queues = list(turns.values())
        for queue in queues:
            chance.shuffle(queue)
        chance.shuffle(queues)
        return [case for turn in itertools.zip_longest(*queues) for case in turn if case is not None]

    def run(self, cases: list[graphs.Case], tell=lambda text: None, every: int = 100) -> None:
        """Every case, and after so many of them the reference graph."""
        for number, case in enumerate(cases, 1):
            self.reads.watching = True
            found = self.runner.run(case.graph)
            self.reads.watching = False
            self.counts[found.kind] += 1
            if found.is_fault:
                self.note(str(case), found)
                tell(f"{found.kind:10} {found.seconds:5.1f} s  {case}: {found.said[:150]}")
            if number % every == 0 or number == len(cases):
                self.compare(number, str(case))
        self.look_at_files()

    def note(self, what: str, outcome: running.Outcome) -> None:
        self.faults.append((what, outcome))

    def compare(self, number: int, after: str) -> None:
        """The reference graph gives what it gave at first."""
        seen = self.expect_fine(reference(self.made, number), f"the reference graph after {after}")
        if not same(self.first, seen):
            self.note(after, running.Outcome("CHANGED", "the reference graph gives other bits after it"))

    def look_at_files(self) -> None:
        """No file that was there before is another, and none was read from elsewhere."""
        now = running.contents(self.base)
        for path, content in self.kept.items():
            if now.get(path) != content:
                self.note(path, running.Outcome("LOST", "a file that was there before is gone or another"))
        for path in sorted(set(self.reads.outside)):
            self.note(path, running.Outcome("OUTSIDE", "a file outside of the host's folders was opened"))

    def cancel(self, count: int, seed: int) -> list[tuple[str, float]]:
        """(node, seconds that it went on for) of long work that is cancelled at random moments."""
        chance, found = random.Random(seed), []
        for number in range(count):
            node = list(graphs.LONG)[number % len(graphs.LONG)]
            outcome = self.runner.run(self.made.build(node, graphs.LONG[node]), limit=chance.uniform(0.05, 2.0))
            found.append((node, outcome.went_on))
            if outcome.kind != running.STOPPED or outcome.went_on > running.SOON:
                self.note(f"{node} cancelled", replace(outcome, kind=running.SLOW))
        return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="dev.py fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--match", default="", help="only cases whose name has this text")
    parser.add_argument("--cancels", type=int, default=50)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, running.own_folders(Path(folder)), running.quiet():
        began, fuzz = time.monotonic(), Fuzz(Path(folder))
        cases = fuzz.cases(chosen.seed, chosen.match)[: chosen.cases]
        print(f"{len(cases)} cases; ready after {time.monotonic() - began:.0f} s", flush=True)
        fuzz.run(cases, lambda text: print(text, flush=True))
        slowest = max(fuzz.cancel(chosen.cancels, chosen.seed), key=lambda found: found[1], default=("nothing", 0.0))
        print(f"{chosen.cancels} cancelled; the slowest, {slowest[0]}, went on for {slowest[1]:.2f} s")
        for what, outcome in fuzz.faults:
            print(f"{outcome.kind}: {what}: {outcome.said[:300]}")
            print("".join(outcome.frames[-2:]))
        print(f"{dict(fuzz.counts)}; {len(fuzz.faults)} faults; {time.monotonic() - began:.0f} s")
    return 1 if fuzz.faults else 0
