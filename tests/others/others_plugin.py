"""The pytest plugin that runs a suite on another loop, without a change to the suite.

It is loaded by its bare name (-p), with its folder on the path, because most suites have a package
called `tests` themselves. What to do comes as the name of a JSON file: --others.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Of one test. Less than the minute of the loops' own tests, several of which hang on uvloop.
PATIENCE = 20.0
Loop = asyncio.AbstractEventLoop


class TimedOut(SystemExit):
    """uvloop swallows what a signal handler raises, but for this and KeyboardInterrupt."""


def loop_factory(name: str) -> Callable[[], Loop]:
    if name == "asyncio":
        return asyncio.SelectorEventLoop
    if name == "uvloop":
        import uvloop

        return uvloop.Loop
    import uvsock

    factory: Callable[[], Loop] = uvsock.Loop
    return factory


def short(nodeid: str) -> str:
    """Without folders: those of a test of the interpreter's own differ from machine to machine."""
    file, separator, test = nodeid.partition("::")
    return file.rpartition("/")[2] + separator + test


def matches(pattern: str, test: str) -> bool:
    """A pattern is a test, or, with `*` at its end, how tests begin."""
    return test.startswith(pattern[:-1]) if pattern.endswith("*") else test == pattern


class Others:
    def __init__(self, task: dict[str, Any]) -> None:
        self.suite: str = task["suite"]
        self.own = task["loop"] == "asyncio"
        self.new_loop = loop_factory(task["loop"])
        self.only: list[str] = task["only"]
        self.left_out: list[str] = task["left_out"]
        self.report = Path(task["report"]).open("w", buffering=1)  # noqa: SIM115
        self.make_loops(self.new_loop)
        getattr(self, f"prepare_{self.suite}", lambda: None)()

    @staticmethod
    def make_loops(factory: Callable[[], Loop]) -> None:
        """asyncio.new_event_loop(), asyncio.run() and asyncio.Runner() come to this all.

        The class of the policy, because suites set the default one, which makes it anew.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            policy: Any = type(asyncio.get_event_loop_policy())
        policy.new_event_loop = lambda policy: factory()

    def say(self, **what: object) -> None:
        # At once: what a crash leaves tells where it was.
        self.report.write(json.dumps(what) + "\n")

    # --- what a suite needs beyond the policy -------------------------------------------------

    def prepare_cpython(self) -> None:
        from test import support

        # Tests that fail on uvloop wait for as long as these.
        support.SHORT_TIMEOUT = 4.0
        support.LONG_TIMEOUT = 5.0
        if self.own:
            return

        def closeable() -> Loop:
            loop: Any = self.new_loop()
            # What test_utils.TestCase.close_loop() reads; no loop of uvloop has it.
            loop._default_executor = None
            return loop  # type: ignore[no-any-return]

        self.make_loops(closeable)

    def prepare_cpython_streams(self) -> None:
        import asyncio.streams

        import uvsock

        self.prepare_cpython()
        for name in (
            "StreamReader",
            "StreamWriter",
            "open_connection",
            "open_unix_connection",
            "start_server",
            "start_unix_server",
        ):
            for module in (asyncio, asyncio.streams):
                setattr(module, name, getattr(uvsock, name))

    def prepare_uvicorn(self) -> None:
        import uvicorn.loops.asyncio as module

        module.asyncio_loop_factory = lambda use_subprocess=False: self.new_loop

    def prepare_uvloop(self) -> None:
        from uvloop import _testbase

        _testbase.UVTestCase.new_loop = lambda case: self.new_loop()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            policy = asyncio.DefaultEventLoopPolicy
        _testbase.UVTestCase.new_policy = lambda case: policy()

    def prepare_aiofastnet(self) -> None:
        # Its tests then call the loop's methods, not its own functions.
        os.environ["NO_AIOFN"] = "1"

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        chosen, dropped = [], []
        for item in items:
            test = short(item.nodeid)
            pattern = next((each for each in self.left_out if matches(each, test)), None)
            if self.only and not any(matches(each, test) for each in self.only):
                dropped.append(item)
            elif pattern is not None:
                self.say(test=test, outcome="left out", reason=pattern)
                dropped.append(item)
            else:
                chosen.append(item)
        items[:] = chosen
        config.hook.pytest_deselected(items=dropped)
        if self.suite == "cpython" and not self.own:
            # These name the loop that they are for; the policy has no say there.
            for case in {item.cls for item in items if isinstance(item, pytest.Function)}:
                for method in ("create_event_loop", "new_loop"):
                    if hasattr(case, method):
                        setattr(case, method, lambda case: asyncio.new_event_loop())

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        """By pytest's own -k, or above."""
        for item in items:
            self.say(test=short(item.nodeid), outcome="not chosen", reason="")

    # --- a test -------------------------------------------------------------------------------

    def timed(self) -> Iterator[None]:
        def expired(*_: object) -> None:
            raise TimedOut(f"not done in {PATIENCE:.0f} s")

        before = signal.signal(signal.SIGALRM, expired)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    pytest_runtest_setup = pytest.hookimpl(wrapper=True)(timed)
    pytest_runtest_call = pytest.hookimpl(wrapper=True)(timed)
    pytest_runtest_teardown = pytest.hookimpl(wrapper=True)(timed)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.say(test=short(nodeid), outcome="started", reason="")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        reason = ""
        if report.skipped:
            # Of a skip (file, line, reason); a failure that the suite expects has a trace.
            skip = report.longrepr
            xfail = f"marked as a failure: {getattr(report, 'wasxfail', '')}"
            reason = skip[2] if isinstance(skip, tuple) else xfail
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = crash.message if crash is not None else report.longreprtext
            reason = said.strip().splitlines()[0] if said.strip() else "no message"
        self.say(
            test=short(report.nodeid),
            outcome=report.outcome,
            reason=reason.removeprefix("Skipped: "),
        )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--others", metavar="FILE", help="what to run, as JSON")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before the suite's conftest.py, which may make a loop."""
    task = json.loads(Path(early_config.known_args_namespace.others).read_text())
    early_config.pluginmanager.register(Others(task))
