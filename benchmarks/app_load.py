"""The load of programs that others have written: ``MODE PORT [name=value ...]``, as load.c has it.

http          wrk asks for ``/`` over ``connections`` connections, for ``seconds``
websocket     one message of 125 B in flight on each of ``connections`` connections
redis_client  a Redis server; the client, which is what is measured, is told over ``PORT`` to use it

``{"ready": N}`` is printed when the load may begin, which it does on a line of standard input.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import uvloop

HOST = "127.0.0.1"
# With a mask of zeros, which changes nothing. The longest message whose length is one byte.
MESSAGE = b"\x82\xfd\x00\x00\x00\x00" + bytes(125)
ANSWER = 2 + 125
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: benchmark\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
LATENCIES = {"p50": 50, "p99": 99, "p999": 99.9}


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def begin(connections: int) -> None:
    say(ready=connections)
    sys.stdin.readline()


def result(messages: int, seconds: float, latencies: list[float] | None = None) -> None:
    """Of latencies in seconds."""
    found = sorted(latencies or ())
    at = {
        name: found[min(len(found) - 1, int(len(found) * part / 100))] * 1e6 if found else None
        for name, part in LATENCIES.items()
    }
    say(messages=messages, seconds=seconds, **at)


# --- http -------------------------------------------------------------------------------------


def http(port: int, connections: int, seconds: float, tls: bool) -> None:
    begin(connections)
    # It counts whole seconds.
    words = [
        f"-d{math.ceil(seconds)}s",
        "-t1",
        f"-c{connections}",
        f"http{'s' * tls}://{HOST}:{port}/",
    ]
    done = subprocess.run(["wrk", *words], capture_output=True, text=True)
    found = re.search(r"(\d+) requests in ([\d.]+)s", done.stdout)
    failed = re.search(r"Non-2xx.*|Socket errors.*", done.stdout)
    if found is None or failed is not None:
        raise SystemExit(failed[0] if failed else f"wrk: {(done.stdout + done.stderr).strip()}")
    result(int(found[1]), float(found[2]))


# --- websocket --------------------------------------------------------------------------------


class Client(asyncio.Protocol):
    def __init__(self) -> None:
        self.upgraded = asyncio.get_running_loop().create_future()
        self.head = b""
        self.latencies: list[float] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(UPGRADE)

    def start(self, until: float) -> None:
        self.until = until
        self.done = asyncio.get_running_loop().create_future()
        self.send()

    def send(self) -> None:
        self.missing = ANSWER
        self.sent = time.perf_counter()
        self.transport.write(MESSAGE)

    def data_received(self, data: bytes) -> None:
        if not self.upgraded.done():
            self.head += data
            if self.head.endswith(b"\r\n\r\n"):
                if self.head.startswith(b"HTTP/1.1 101 "):
                    self.upgraded.set_result(None)
                else:
                    self.upgraded.set_exception(ConnectionError(repr(self.head)))
            return
        self.missing -= len(data)
        if not self.missing:
            now = time.perf_counter()
            self.latencies.append(now - self.sent)
            if now < self.until:
                self.send()
            else:
                self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        for each in (self.upgraded, getattr(self, "done", self.upgraded)):
            if not each.done():
                each.set_exception(error or ConnectionError("the server has closed a connection"))


async def websocket(port: int, connections: int, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    clients = [(await loop.create_connection(Client, HOST, port))[1] for _ in range(connections)]
    await asyncio.gather(*(client.upgraded for client in clients))
    begin(connections)
    started = time.perf_counter()
    for client in clients:
        client.start(started + seconds)
    await asyncio.gather(*(client.done for client in clients))
    taken = time.perf_counter() - started
    latencies = [each for client in clients for each in client.latencies]
    result(len(latencies), taken, latencies)


# --- redis ------------------------------------------------------------------------------------


@contextmanager
def redis_server(directory: Path) -> Iterator[Path]:
    """The path of its socket."""
    path = directory / "redis.sock"
    words = ["--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(directory)]
    server = subprocess.Popen(["redis-server", *words], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while not path.exists():
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("redis-server does not start")
            time.sleep(0.01)
        yield path
    finally:
        server.terminate()
        server.wait()


def redis(port: int, connections: int, seconds: float) -> None:
    with (
        tempfile.TemporaryDirectory() as directory,
        redis_server(Path(directory)) as path,
        socket.create_connection((HOST, port)) as client,
        client.makefile("rw") as lines,
    ):
        order = {"path": str(path), "tasks": connections, "seconds": seconds}
        for change in ({"seconds": 0.0}, {}):  # the first opens the connections
            if not change:
                begin(connections)
            lines.write(json.dumps(order | change) + "\n")
            lines.flush()
            answer = lines.readline()
        if not answer:
            raise SystemExit("the client has ended")
        done = json.loads(answer)
        result(done["messages"], done["seconds"])


MODES = ("http", "websocket", "redis_client")


def main(words: list[str]) -> None:
    mode, port, *pairs = words
    options = {name: float(value) for name, _, value in (pair.partition("=") for pair in pairs)}
    where = int(port), int(options["connections"]), options["seconds"]
    if mode == "http":
        http(*where, tls=bool(options["tls"]))
    elif mode == "websocket":
        uvloop.run(websocket(*where))
    else:
        redis(*where)
    sys.stdout.flush()
    # As load.c: what is open stays so until it is told to end.
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
