"""What is measured. This is data: what the load does, and what the server does."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fnmatch import fnmatch

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


@dataclass(frozen=True)
class Workload:
    """One table of the report.

    ``kind`` says what is measured: ``load`` the processor time per message while the load runs,
    ``memory`` that and the most memory the server took meanwhile, ``idle`` what an idle connection
    costs, ``scaling`` the processor time per message beside idle connections.
    """

    name: str
    title: str
    behaviour: str  # of the server: see benchmarks/servers
    mode: str  # of the load: see benchmarks/load.c; or "redis", for redis-benchmark
    options: dict[str, float] = field(default_factory=dict)  # of the load
    kind: str = "load"
    unit: str = "message"  # what the load calls a message
    tls: bool = False
    environment: tuple[str, ...] = ()  # of the server: "NAME=value"
    quick: bool = False  # part of --quick
    # The reads are large enough for borrowed memory to be worth its price.
    large: bool = False
    peers: tuple[str, ...] | None = None  # None: all but those that only some are for
    needs: tuple[str, ...] = ()  # packages and programs beside those of the peers


def _size(size: int) -> str:
    return f"{size // KIB} KiB" if size >= KIB else f"{size} B"


def _count(connections: int) -> str:
    return "1 connection" if connections == 1 else f"{connections:,} connections"


def _echo(size: int, connections: int, *, tls: bool = False, quick: bool = False) -> Workload:
    return Workload(
        f"{'tls_' * tls}echo-{size}-{connections}",
        f"{'TLS echo' if tls else 'Echo'}, {_size(size)}, {_count(connections)}",
        "echo",
        "echo",
        {"size": size, "connections": connections},
        tls=tls,
        quick=quick,
        large=size >= 16 * KIB,
    )


def _fan_out(connections: int, depth: int, *, quick: bool = False) -> Workload:
    return Workload(
        f"fan_out-{connections}-{depth}",
        f"Fan-out, 64 B to {_count(connections)}, {depth} in flight from each",
        "fan_out",
        "fan_out",
        {"size": 64, "connections": connections, "depth": depth},
        quick=quick,
    )


def _frames(behaviour: str, title: str, *, quick: bool = False) -> Workload:
    return Workload(
        behaviour,
        f"{title}, 64 B, 16 in flight, 50 connections",
        behaviour,
        "echo",
        {"size": 64, "depth": 16, "connections": 50},
        quick=quick,
        peers=(
            *("uvsock", "uvsock-compiled", "bun"),
            *("uvloop", "uvloop-joined", "uvloop-streams"),
        ),
    )


def _redis(depth: int, *, quick: bool = False) -> Workload:
    return Workload(
        f"redis-{depth}",
        f"Redis, SET of 64 B, {depth} in flight, 50 connections",
        "redis",
        "redis",
        {"connections": 50, "depth": depth, "size": 64},
        unit="request",
        quick=quick,
        peers=("uvsock", "uvloop", "uvloop-joined", "uvloop-streams", "bun", "redis-server"),
    )


def _bulk(direction: str, *, tls: bool = False, quick: bool = False) -> Workload:
    send = direction == "send"
    size = GIB // 4 if tls else GIB
    return Workload(
        f"{'tls_' * tls}bulk-{direction}",
        f"{'TLS bulk' if tls else 'Bulk'}, the server {direction}s "
        + ("256 MiB" if tls else "1 GiB"),
        direction,
        "download" if send else "upload",
        {"bytes": size, "size": 64 * KIB},
        unit="64 KiB",
        tls=tls,
        quick=quick,
        large=not send,
    )


STREAMS = ("uvsock-streams", "uvsock-loop-streams", "uvloop-streams", "asyncio-streams")


def _streams(method: str, depth: int, connections: int = 50, *, quick: bool = False) -> Workload:
    return Workload(
        f"streams_{method}-{depth}" + f"-{connections}" * (connections != 50),
        f"Streams, {method}, 64 B, {depth} in flight, {_count(connections)}",
        {"readline": "lines", "readexactly": "length_prefixed"}[method],
        "echo",
        {"size": 64, "depth": depth, "connections": connections},
        quick=quick,
        peers=STREAMS,
    )


# The same classes on uvloop's loop and on uvsock's.
DROP_IN = ("uvloop", "uvsock-protocol")


def _protocol(workload: Workload) -> Workload:
    return replace(
        workload,
        name=f"protocol_{workload.name}",
        title=f"{workload.title}; asyncio.Protocol",
        peers=DROP_IN,
        quick=False,
    )


def _app(
    name: str, title: str, mode: str, *needs: str, connections: int = 50, tls: bool = False
) -> Workload:
    """A program that others have written, on uvloop's loop and on uvsock's."""
    return Workload(
        f"apps-{name}{'_tls' * tls}" + f"-{connections}" * (connections != 50),
        f"{title}, {_count(connections)}" + " over TLS" * tls,
        name,
        mode,
        {"connections": connections},
        unit="request",
        tls=tls,
        peers=("uvloop-app", "uvsock-app"),
        needs=(name, *needs),
    )


ACTIVE = 50
SLOW_READER = Workload(
    "slow_reader",
    "Slow reader, 100 MB to a peer that takes 50 MB per second",
    "send",
    "download",
    {"bytes": 100e6, "rate": 50e6, "size": 64 * KIB},
    kind="memory",
    unit="64 KiB",
)
# Where connections come and go the load polls, as load.c says of `spin`.
CHURN = Workload(
    "churn",
    "Churn: connect, one byte each way, close; 50 at a time",
    "echo",
    "churn",
    {"connections": 50, "spin": 1},
    unit="connection",
    quick=True,
)
IDLE = Workload(
    "idle",
    "Idle, 10,000 connections",
    "echo",
    "hold",
    {"connections": 10000, "size": 64},
    kind="idle",
    quick=True,
)
SMALL_WRITES = Workload(
    "small_writes",
    "Small writes, five of 1 B per event, 50 connections",
    "small_writes",
    "echo",
    {"size": 1, "reply": 5, "connections": 50},
    quick=True,
)
# glibc moves the size from which it asks the kernel for each block, and where the heap of a server
# left it decides what uvloop's TLS takes. Here it is where glibc starts.
TLS_ECHO_OF_MAPPED_READS = replace(
    _echo(1024, 20, tls=True),
    name="tls_echo_mmap-1024-20",
    title="TLS echo, 1 KiB, 20 connections, glibc's threshold of mmap fixed",
    environment=("MALLOC_MMAP_THRESHOLD_=131072",),
)
WORKLOADS = (
    *(
        _echo(size, connections, quick=(size, connections) in {(1024, 50), (262144, 50)})
        for size in (64, 1024, 16384, 262144)
        for connections in (1, 50, 1000)
    ),
    Workload(
        "pipeline",
        "Pipeline, 64 B, 16 in flight, 50 connections",
        "echo",
        "echo",
        {"size": 64, "depth": 16, "connections": 50},
        quick=True,
    ),
    SMALL_WRITES,
    *(
        _fan_out(connections, depth, quick=(connections, depth) == (20, 8))
        for connections in (20, 200)
        for depth in (1, 8)
    ),
    *(
        _streams(method, depth, quick=method == "readline")
        for method in ("readline", "readexactly")
        for depth in (1, 16)
    ),
    _streams("readline", 1, connections=2),
    replace(
        CHURN,
        name="streams_churn",
        title="Streams, connect, one byte each way, close; 50 at a time",
        peers=STREAMS,
        quick=False,
    ),
    replace(
        CHURN,
        name="streams_churn-asleep",
        title="Streams, connect, one byte each way, close; 50 at a time, from a load that sleeps",
        options={"connections": 50},
        peers=STREAMS,
        quick=False,
    ),
    _frames("lines", "Lines", quick=True),
    _frames("length_prefixed", "Frames behind their length"),
    _redis(1),
    _redis(16, quick=True),
    _bulk("send"),
    _bulk("receive"),
    SLOW_READER,
    CHURN,
    _echo(1024, 20, tls=True, quick=True),
    TLS_ECHO_OF_MAPPED_READS,
    _echo(65536, 4, tls=True),
    _bulk("send", tls=True),
    _bulk("receive", tls=True),
    Workload(
        "tls_handshake-full",
        "TLS handshake, full, one byte each way, 20 at a time",
        "echo",
        "churn",
        {"connections": 20, "spin": 1},
        unit="connection",
        tls=True,
        quick=True,
    ),
    Workload(
        "tls_handshake-resumed",
        "TLS handshake, resumed, one byte each way, 20 at a time",
        "echo",
        "churn",
        {"connections": 20, "resume": 1, "spin": 1},
        unit="connection",
        tls=True,
    ),
    IDLE,
    Workload(
        "idle-tls",
        "Idle, 1,000 TLS connections",
        "echo",
        "hold",
        {"connections": 1000, "size": 64},
        kind="idle",
        tls=True,
    ),
    Workload(
        "scaling",
        f"Echo, 1 KiB, {ACTIVE} connections, beside idle ones",
        "echo",
        "echo",
        {"size": 1024, "connections": ACTIVE},
        kind="scaling",
        quick=True,
        peers=("c", "bun", "uvloop", "uvsock"),
    ),
    _protocol(_echo(1024, 50)),
    _protocol(SMALL_WRITES),
    _protocol(_echo(1024, 20, tls=True)),
    _protocol(TLS_ECHO_OF_MAPPED_READS),
    _protocol(SLOW_READER),
    _protocol(CHURN),
    _protocol(IDLE),
    _app("uvicorn", "uvicorn, httptools", "http", "httptools", "wrk", connections=2),
    _app("uvicorn", "uvicorn, httptools", "http", "httptools", "wrk"),
    _app("uvicorn", "uvicorn, httptools", "http", "httptools", "wrk", tls=True),
    _app("aiohttp", "aiohttp", "http", "wrk", connections=2),
    _app("aiohttp", "aiohttp", "http", "wrk"),
    _app("aiohttp", "aiohttp", "http", "wrk", tls=True),
    _app("websockets", "websockets, echo of 125 B", "websocket"),
    _app("redis", "redis, GET of 100 B by tasks of the client", "redis_client", "redis-server"),
)
# How many idle connections there are in the points of `scaling`.
IDLE_POINTS = (0, 10, 100, 1000, 10000)


def chosen(patterns: list[str], *, quick: bool) -> list[Workload]:
    """Those that a pattern names: by name, by what stands before the ``-``, or with ``*``."""
    for pattern in patterns:
        if not any(_matches(workload, pattern) for workload in WORKLOADS):
            names = ", ".join(workload.name for workload in WORKLOADS)
            raise SystemExit(f"--workload: {pattern!r} matches none of {names}")
    if not patterns:
        return [workload for workload in WORKLOADS if workload.quick or not quick]
    return [w for w in WORKLOADS if any(_matches(w, pattern) for pattern in patterns)]


def _matches(workload: Workload, pattern: str) -> bool:
    return workload.name.partition("-")[0] == pattern or fnmatch(workload.name, pattern)
