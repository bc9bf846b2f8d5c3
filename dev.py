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

The parts stand in tests/workshop, which tests import as well. They too need the standard library alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import webbrowser
from pathlib import Path
from xml.etree import ElementTree

sys.path.append(str(Path(__file__).absolute().parent / "tests"))  # last: it hides nothing

from workshop.browsers import Browser, prepare_browser
from workshop.environments import has_accelerator
from workshop.hosts import RELEASES, Place, set_up
from workshop.places import DEV, MODELS, POCKET, ROOT, TIERS, Problem
from workshop.serving import environment, open_host

OLDEST_PYTHON = (3, 11)
MOST_TEST_PROCESSES = 4  # each takes about 3 GB


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
    return threads, [*command, "-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"]


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
