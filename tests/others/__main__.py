"""Other people's tests, on uvsock's loop: `python -m tests.others --help`.

A suite comes from the package registry, or is the interpreter's own, when this runs. What fails is
compared with expected.toml, which has a reason for each test that may: one that fails and is not
in it is a failure, and so is one that is in it and passes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from others_plugin import matches  # noqa: E402
from suites import SUITES, Suite  # noqa: E402

BUILD = HERE.parent.parent / "build" / "others"
PYTHON = ".".join(map(str, sys.version_info[:2]))
LOOPS = ("uvsock", "uvloop", "asyncio")
# Seconds. A suite that takes longer hangs where no signal reaches it. On a machine with other work
# some take several minutes.
PATIENCE = 900


class Missing(Exception):
    """A suite is not to be had on this machine. The text says why."""


# --- getting a suite --------------------------------------------------------------------------


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"pip {' '.join(words)}:\n{done.stdout}")


def folder_of(suite: Suite) -> Path:
    """Where its tests are, fetched and unpacked if they are not yet."""
    if suite.archive is None:
        found = find_spec("test") and find_spec("test.test_asyncio")
        if found is None or found.origin is None:
            raise Missing(
                f"this Python has no tests of its own (Debian: libpython{PYTHON}-testsuite)"
            )
        return Path(found.origin).parent
    name, _, version = suite.archive.partition("==")
    version = version or importlib.metadata.version(name)
    folder = BUILD / f"{name}-{version}"
    if not folder.exists():
        archives = BUILD / "archives"
        pip(
            "download",
            "--no-deps",
            f"--no-binary={name}",
            f"--dest={archives}",
            f"{name}=={version}",
        )
        (archive,) = archives.glob(f"{name}-{version}.tar.gz")
        fresh = BUILD / f"{name}-{version}.{os.getpid()}"
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                # The first folder is the name and version.
                member.name = member.name.partition("/")[2]
                if member.name.partition("/")[0] in suite.unpacked:
                    tar.extract(member, fresh, filter="data")
        fresh.rename(folder)
    return folder


def packages_of(suite: Suite) -> Path:
    """A folder with what the suite needs beside what is installed."""
    folder = BUILD / f"packages-{suite.name}-{PYTHON}"
    listed = folder / "requirements.txt"
    wanted = "\n".join(suite.needs)
    if wanted and not (listed.exists() and listed.read_text() == wanted):
        shutil.rmtree(folder, ignore_errors=True)
        pip("install", f"--target={folder}", *suite.needs)
        listed.write_text(wanted)
    return folder


# --- running it -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One of expected.toml, if it is about this loop and this Python."""

    kind: str
    tests: tuple[str, ...]
    reason: str


def entries(suite: Suite, loop: str) -> Iterator[Entry]:
    """Its lists are `fails`, and `left_out` for what is not run at all."""
    listed: dict[str, Any] = tomllib.loads((HERE / "expected.toml").read_text()).get(suite.name, {})
    for kind, found in listed.items():
        for each in found:
            unknown = each.keys() - {"tests", "reason", "loops", "python"}
            if kind not in ("fails", "left_out") or unknown or not each["reason"]:
                raise SystemExit(f"expected.toml, {suite.name}.{kind}: {each}")
            if loop in each.get("loops", LOOPS) and PYTHON in each.get("python", [PYTHON]):
                yield Entry(kind, tuple(each["tests"]), each["reason"])


@dataclass
class Outcome:
    tests: dict[str, tuple[str, str]]  # what became of each, and why
    log: Path
    seconds: float
    status: int | None  # None: it had to be ended

    def of(self, kind: str) -> dict[str, str]:
        return {test: why for test, (what, why) in self.tests.items() if what == kind}


def run(suite: Suite, loop: str, listed: list[Entry], words: list[str]) -> Outcome:
    folder, packages = folder_of(suite), packages_of(suite)
    results = BUILD / "results"
    results.mkdir(parents=True, exist_ok=True)
    name = f"{suite.name}-{loop}-{PYTHON}"
    report, task, log = (results / f"{name}.{kind}" for kind in ("jsonl", "json", "txt"))
    report.unlink(missing_ok=True)
    left_out = [test for each in listed if each.kind == "left_out" for test in each.tests]
    about = {"suite": suite.name, "loop": loop, "only": suite.only, "left_out": left_out}
    task.write_text(json.dumps(about | {"report": str(report)}))
    command = [sys.executable, "-P", "-m", "pytest", "-p", "others_plugin", f"--others={task}"]
    command += ["-o", "addopts=", "-p", "no:cacheprovider", "-o", "timeout=0"]
    command += ["-q", "--tb=native", "--assert=plain", *suite.options, *words]
    # Without it pytest goes up from here until it finds a file of settings: ours.
    command += ["-c", suite.settings or os.devnull, "--rootdir", str(folder)]
    command += [str(folder / file) for file in suite.files]
    path = [str(HERE), str(packages), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, path)),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        status: int | None
        try:
            status = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            process.kill()
            process.wait()
    return Outcome(read(report), log, time.monotonic() - started, status)


def read(report: Path) -> dict[str, tuple[str, str]]:
    """What each test came to: a failure in any of its parts is one of the test."""
    rank = ("not chosen", "left out", "started", "skipped", "passed", "failed")
    tests: dict[str, tuple[str, str]] = {}
    for line in report.read_text().splitlines() if report.exists() else ():
        each = json.loads(line)
        before = tests.get(each["test"])
        if before is None or rank.index(each["outcome"]) > rank.index(before[0]):
            tests[each["test"]] = (each["outcome"], each["reason"])
    return tests


def problems(suite: Suite, outcome: Outcome, listed: list[Entry], *, whole: bool) -> Iterator[str]:
    """What is not as expected.toml says."""
    ran = {test: what for test, (what, _) in outcome.tests.items() if what in ("passed", "failed")}
    # 5: there was no test to run, which is what was asked for if it is written down.
    left_out = outcome.status == 5 and outcome.of("left out")
    # 1: tests failed. Python's own exit status after an exception is 1 as well.
    if not left_out and outcome.status != (1 if "failed" in ran.values() else 0):
        last = "".join(f", in {test}" for test in outcome.of("started"))
        how = "did not end" if outcome.status is None else f"ended with {outcome.status}"
        yield f"pytest {how}{last}"
    if not left_out and not ran:
        yield "no test was run"
    for file in suite.files if whole and ran else ():
        name = file.rpartition("/")[2]
        if not any(test.startswith(f"{name}::") for test in ran):
            yield f"no test of {name} was run"
    expected = [
        (pattern, each.reason) for each in listed if each.kind == "fails" for pattern in each.tests
    ]
    for test, why in outcome.of("failed").items():
        if not any(matches(pattern, test) for pattern, _ in expected):
            yield f"{test} failed: {why}"
    for pattern, reason in expected:
        found = {
            test: what
            for test, (what, _) in outcome.tests.items()
            if what != "not chosen" and matches(pattern, test)
        }
        for test, what in found.items():
            if what != "failed":
                yield f"{test} {what}, and is expected to fail: {reason}"
        if whole and not found:
            yield f"{pattern} is expected to fail, and is no test"
    used = set(outcome.of("left out").values())
    for each in listed:
        for pattern in each.tests if whole and each.kind == "left_out" else ():
            if pattern not in used:
                yield f"{pattern} is left out, and is no test"


def show(suite: Suite, loop: str, outcome: Outcome, listed: list[Entry]) -> None:
    count = Counter(what for what, _ in outcome.tests.values())
    counts = ", ".join(
        f"{count[what]} {what}"
        for what in ("passed", "failed", "skipped", "left out", "not chosen")
    )
    print(f"{suite.name} on {loop}, Python {PYTHON}: {counts} ({outcome.seconds:.0f} s)")
    reasons = {pattern: each.reason for each in listed for pattern in each.tests}
    not_run: dict[str, list[str]] = {}
    for test, why in outcome.of("skipped").items():
        not_run.setdefault(f"skipped by the suite: {why}", []).append(test)
    for test, pattern in outcome.of("left out").items():
        not_run.setdefault(f"left out: {reasons[pattern]}", []).append(test)
    # There are hundreds, so by class or file.
    others = Counter(test.rpartition("::")[0] for test in outcome.of("not chosen"))
    if others:
        groups = [f"{group} ({number})" for group, number in sorted(others.items())]
        not_run[f"not chosen: {suite.why or 'by the words given'}"] = groups
    for why, tests in not_run.items():
        print(f"  {why}", *tests, sep="\n    ")


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.others",
        description="Runs other people's tests on a loop. Other words are for pytest (-k, -x ...).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="suites:\n" + "\n".join(f"  {each.name:10} {each.about}" for each in SUITES),
    )
    parser.add_argument("--loop", choices=LOOPS, default="uvsock")
    parser.add_argument(
        "--suite", action="append", choices=[each.name for each in SUITES], help="may be repeated"
    )
    arguments, more = parser.parse_known_args(words)
    failed = False
    for suite in SUITES:
        if arguments.suite and suite.name not in arguments.suite:
            continue
        listed = list(entries(suite, arguments.loop))
        try:
            outcome = run(suite, arguments.loop, listed, more)
        except Missing as error:
            print(f"{suite.name} is left out: {error}")
            failed |= bool(os.environ.get("CI"))
            continue
        show(suite, arguments.loop, outcome, listed)
        found = list(problems(suite, outcome, listed, whole=not more))
        if found:
            failed = True
            print(f"  NOT AS EXPECTED (see {os.path.relpath(outcome.log)}):")
            print(*(f"    {each}" for each in found), sep="\n")
        sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
