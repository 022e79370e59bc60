"""Runs servers and loads, and reads what a server has cost.

The server has one processor, the load another. All servers of a workload are alive while it is
measured, and take turns: A B C, C B A, ... A change of the machine's speed then meets all of them.
"""

from __future__ import annotations

import csv
import json
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from benchmarks import app_load, peers
from benchmarks.peers import Missing, Peer
from benchmarks.workloads import IDLE_POINTS, MIB, Workload

# For a server to start, and for a load to say that it is ready or done beyond its own seconds.
PATIENCE = 60.0
# Connections that are open before the first reading of an idle workload: what a server takes once,
# and not for each connection, is taken then.
FIRST = 200
# Per second, of a server that has answered none yet.
FIRST_REQUESTS = 10_000
STRACE = shutil.which("strace")


class Failed(Exception):
    """A server or the load did not do its work. The text is for the table."""


def processors() -> tuple[int, int]:
    """That of the server and that of the load."""
    here = sorted(os.sched_getaffinity(0))
    return here[0], here[-1]


def allow_many_files() -> None:
    """Raises the number of descriptors as far as it goes; the servers and loads inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Process:
    """A program that reads lines and answers with lines."""

    def __init__(self, command: list[str], processor: int, log: Path) -> None:
        self.log = log
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                # For all threads that it starts.
                preexec_fn=lambda: os.sched_setaffinity(0, {processor}),
                cwd=peers.HERE.parent,
            )

    def line(self, patience: float = PATIENCE) -> Any:
        """The next line, read as JSON. Each is written at once, so none is ever in part."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], patience)
        text = self.process.stdout.readline() if ready else b""
        if not text:
            raise self.failure("ended" if ready else "no answer")
        try:
            return json.loads(text)
        except ValueError:
            raise self.failure(f"not an answer: {text!r}") from None

    def say(self, text: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(text.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self.failure("ended") from None

    def failure(self, what: str) -> Failed:
        """With the last that it said on standard error."""
        said = self.log.read_text(errors="replace").strip().splitlines()
        return Failed(f"{what}: {said[-1] if said else 'nothing said'}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Ends when its standard input does; is killed if it does not."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self.process.stdout:
            try:
                self.process.stdin.close()
                self.process.wait(5)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                self.process.kill()
                self.process.wait()


class Server(Process):
    def __init__(self, command: list[str], processor: int, log: Path) -> None:
        super().__init__(command, processor, log)
        try:
            self.port = int(self.line())
        except BaseException:
            self.__exit__()
            raise

    def seconds(self) -> float:
        """Processor time of all its threads, user and system: clock_getcpuclockid(3)."""
        return time.clock_gettime((~self.process.pid << 3) | 2)

    def collect(self) -> dict[str, float]:
        self.say("collect")
        answer: dict[str, float] = self.line()
        return answer

    def memory(self, what: str) -> int:
        """``Rss`` now, or ``VmHWM``, the most since `forget_peak`. Bytes."""
        file = "smaps_rollup" if what == "Rss" else "status"
        text = Path(f"/proc/{self.process.pid}/{file}").read_text()
        found = re.search(rf"^{what}:\s+(\d+) kB", text, re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1024

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")


class Bench:
    """What all workloads of a run share."""

    def __init__(self, directory: Path, *, rounds: int, seconds: float, quick: bool) -> None:
        self.directory = directory
        self.rounds = rounds
        self.seconds = seconds
        self.quick = quick
        self.processors = processors()
        self.load, self.no_tls = peers.load()
        # Requests per second that a server, by its port, has answered: how many to ask for next.
        self._requests: dict[int, float] = {}

    def run(self, workload: Workload, participants: list[Peer]) -> dict[str, Any]:
        """The results of each peer. Raises Missing if the workload cannot be run here."""
        certificate = None
        for name in workload.needs:
            peers.require(name)
        if workload.tls:
            if self.no_tls is not None:
                raise Missing(self.no_tls)
            certificate = peers.certificate(str(self.directory))
        if workload.mode == "redis":
            peers.redis("redis-benchmark")
        participants = [peer for peer in participants if peer.takes_part(workload)]
        measure = {"idle": self._idle, "scaling": self._scaling}.get(workload.kind, self._rounds)
        return measure(workload, participants, certificate)

    def _server(self, peer: Peer, workload: Workload, certificate: str | None) -> Server:
        command = peer.server(workload, certificate)
        return Server(command, self.processors[0], self.directory / f"{peer.name}.log")

    def _options(self, workload: Workload, **changes: float) -> dict[str, float]:
        options = {**workload.options, "gate": 1, "tls": int(workload.tls), **changes}
        if self.processors[0] == self.processors[1]:
            options.pop("spin", None)  # it would take the server's time
        if "bytes" in options:
            options["bytes"] = min(options["bytes"], changes.get("bytes", options["bytes"]))
            if self.quick:
                options["bytes"] = min(options["bytes"], 128 * MIB)
        else:
            options.setdefault("seconds", self.seconds)
        return options

    def _load(self, mode: str, server: Server, options: dict[str, float]) -> Process:
        words = [f"{name}={value:.15g}" for name, value in options.items()]
        apps = [sys.executable, "-m", "benchmarks.app_load"]
        program = apps if mode in app_load.MODES else [str(self.load)]
        command = [*program, mode, str(server.port), *words]
        return Process(command, self.processors[1], self.directory / "load.log")

    def _once(
        self, workload: Workload, server: Server, *, trace: bool = False, **changes: float
    ) -> dict[str, Any]:
        """One load from beginning to end."""
        if workload.mode == "redis":
            return self._redis(workload, server, trace=trace, **changes)
        with self._load(workload.mode, server, self._options(workload, **changes)) as load:
            load.line()
            if workload.kind == "memory":
                server.forget_peak()
                memory = server.memory("Rss")
            calls: dict[str, int] = {}
            with self._tracing(server, calls) if trace else ExitStack():
                before = server.seconds()
                load.say("go")
                result: dict[str, Any] = load.line(self.seconds + PATIENCE)
                result["cpu"] = server.seconds() - before
            if workload.kind == "memory":
                result["peak"] = server.memory("VmHWM") - memory
        result["calls"] = calls
        if not result["messages"]:
            raise Failed("no message came back")
        return result

    def _redis(
        self, workload: Workload, server: Server, *, trace: bool = False, **changes: float
    ) -> dict[str, Any]:
        """The same by redis-benchmark, which counts requests: as many as may take the time."""
        seconds = changes.get("seconds", self.seconds)
        count = max(int(self._requests.get(server.port, FIRST_REQUESTS) * seconds), 1000)
        options = {"c": "connections", "P": "depth", "d": "size"}
        words = [w for o, name in options.items() for w in (f"-{o}", workload.options[name])]
        command = [peers.redis("redis-benchmark"), "-p", server.port, "-n", count, *words]
        calls: dict[str, int] = {}
        with self._tracing(server, calls) if trace else ExitStack():
            before = server.seconds()
            done = subprocess.run(
                [str(word) for word in (*command, "-t", "set", "--csv")],
                capture_output=True,
                text=True,
                timeout=self.seconds + PATIENCE,
                preexec_fn=lambda: os.sched_setaffinity(0, {self.processors[1]}),
            )
            cpu = server.seconds() - before
        if done.returncode:
            raise Failed(f"redis-benchmark: {(done.stderr or done.stdout).strip()}")
        (row,) = csv.DictReader(done.stdout.splitlines())
        if not trace:
            self._requests[server.port] = float(row["rps"])
        found = {"messages": count, "cpu": cpu, "seconds": count / float(row["rps"])}
        latencies = {name: float(row[f"{name}_latency_ms"]) * 1e3 for name in ("p50", "p99")}
        return {**found, **latencies, "p999": None, "calls": calls}

    @contextmanager
    def _tracing(self, server: Server, calls: dict[str, int]) -> Iterator[None]:
        """Counts the server's system calls of this block."""
        output = self.directory / "strace.txt"
        assert STRACE is not None
        tracer = subprocess.Popen(
            [STRACE, "-c", "-f", "-p", str(server.process.pid), "-o", str(output)],
            stderr=subprocess.PIPE,
        )
        assert tracer.stderr is not None
        with tracer.stderr:
            # It says "Process 123 attached" when it counts.
            said = tracer.stderr.readline()
            try:
                if b"attached" not in said:
                    raise Failed(said.decode().strip())
                yield
            finally:
                if tracer.poll() is None:
                    tracer.send_signal(signal.SIGINT)
                tracer.stderr.read()
                tracer.wait()
        row = re.compile(r"\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)")
        for line in output.read_text().splitlines():
            found = row.fullmatch(line)
            if found and found[2] != "total":
                calls[found[2]] = int(found[1])

    @contextmanager
    def _servers(
        self,
        workload: Workload,
        participants: list[Peer],
        certificate: str | None,
        results: dict[str, Any],
    ) -> Iterator[dict[str, Server]]:
        """One per peer, all alive, and warm: compilers at run time have done their work."""
        with ExitStack() as stack:
            servers: dict[str, Server] = {}
            for peer in participants:
                with self._failing(results, peer.name):
                    server = stack.enter_context(self._server(peer, workload, certificate))
                    self._once(workload, server, seconds=0.1, bytes=8 * MIB)
                    servers[peer.name] = server
            yield servers

    def _turns(self, results: dict[str, Any], servers: dict[str, Server]) -> Iterator[str]:
        """The names in the order of their turns, without those that have failed."""
        for turn in range(self.rounds):
            for name in list(servers)[:: -1 if turn % 2 else 1]:
                if "error" not in results[name]:
                    yield name

    @contextmanager
    def _failing(self, results: dict[str, Any], name: str) -> Iterator[None]:
        """A peer that fails has its error instead of figures; the others go on."""
        try:
            yield
        except (Failed, OSError) as error:
            print(f"  {name}: {error}", file=sys.stderr)
            results[name] = {"error": str(error)}

    def _rounds(
        self, workload: Workload, participants: list[Peer], certificate: str | None
    ) -> dict[str, Any]:
        results: dict[str, Any] = {peer.name: {} for peer in participants}
        with self._servers(workload, participants, certificate, results) as servers:
            for name in self._turns(results, servers):
                with self._failing(results, name):
                    self._add(results[name], self._once(workload, servers[name]))
            for name in servers if STRACE else ():
                if "error" not in results[name]:
                    try:
                        results[name] |= self._calls(workload, servers[name])
                    except (Failed, OSError) as error:
                        # The figures stand: this may be a machine where nothing can be traced.
                        print(f"  {name}, system calls: {error}", file=sys.stderr)
        return results

    def _calls(self, workload: Workload, server: Server) -> dict[str, Any]:
        """How many system calls a message takes."""
        once = self._once(workload, server, trace=True, seconds=0.2, bytes=MIB)
        each = {call: n / once["messages"] for call, n in once["calls"].items()}
        shown = {call: round(n, 4) for call, n in each.items() if n >= 0.005}
        return {
            "syscalls": round(sum(each.values()), 4),
            "syscalls_by_name": dict(sorted(shown.items(), key=lambda item: -item[1])),
        }

    @staticmethod
    def _add(result: dict[str, Any], once: dict[str, Any]) -> None:
        """Appends the figures of one round. Microseconds, messages per second, bytes."""
        messages = once["messages"]
        figures = {
            "cpu": once["cpu"] / messages * 1e6,
            "rate": messages / once["seconds"],
            **{name: once[name] for name in ("p50", "p99", "p999") if once[name] is not None},
            **{name: once[name] for name in ("peak",) if name in once},
        }
        if "resumed" in once:
            figures["resumed"] = once["resumed"] / messages
        for name, value in figures.items():
            result.setdefault(name, []).append(float(f"{value:.6g}"))

    def _idle(
        self, workload: Workload, participants: list[Peer], certificate: str | None
    ) -> dict[str, Any]:
        results: dict[str, Any] = {peer.name: {} for peer in participants}
        count = workload.options["connections"]
        for _ in range(1 if self.quick else min(self.rounds, 3)):
            for peer in participants:
                if "error" in results[peer.name]:
                    continue
                with self._failing(results, peer.name):
                    self._idle_once(workload, peer, certificate, count, results[peer.name])
        return results

    def _idle_once(
        self,
        workload: Workload,
        peer: Peer,
        certificate: str | None,
        count: float,
        result: dict[str, Any],
    ) -> None:
        with self._server(peer, workload, certificate) as server, ExitStack() as stack:
            readings = []
            for connections in (FIRST, count):
                options = self._options(workload, connections=connections)
                stack.enter_context(load := self._load("hold", server, options))
                load.line()
                collected = server.collect()
                readings.append((server.memory("Rss"), collected))
            (memory, _), (more, collected) = readings
            result.setdefault("bytes", []).append(round((more - memory) / count))
            if "gc_objects" in collected:
                objects = (collected["gc_objects"] - readings[0][1]["gc_objects"]) / count
                result.setdefault("gc_objects", []).append(round(objects, 2))
                result.setdefault("gc_ms", []).append(round(collected["gc_seconds"] * 1e3, 2))

    def _scaling(
        self, workload: Workload, participants: list[Peer], certificate: str | None
    ) -> dict[str, Any]:
        results: dict[str, Any] = {peer.name: {} for peer in participants}
        with (
            self._servers(workload, participants, certificate, results) as servers,
            ExitStack() as stack,
        ):
            held = 0
            for idle in IDLE_POINTS:
                # Ten thousand connections to each server at once would be too many descriptors
                # for one load; each load holds those of one server.
                for name, server in servers.items() if idle > held else ():
                    with self._failing(results, name):
                        options = self._options(workload, connections=idle - held)
                        load = stack.enter_context(self._load("hold", server, options))
                        load.line()
                held = idle
                for name in self._turns(results, servers):
                    with self._failing(results, name):
                        once = self._once(workload, servers[name])
                        figure = float(f"{once['cpu'] / once['messages'] * 1e6:.6g}")
                        beside = results[name].setdefault("cpu_beside", {})
                        beside.setdefault(str(idle), []).append(figure)
        return results
