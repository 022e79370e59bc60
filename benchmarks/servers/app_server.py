"""Programs that others have written, on a loop: ``PROGRAM --loop LOOP [--tls FILE]``.

``redis`` is a client. What it is to do it is told over its port: see benchmarks/app_load.py.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.servers import control

BODY = b"Hello, world!"


async def hello(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
    """An ASGI application."""
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(BODY))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": BODY})


async def uvicorn(sock: socket.socket, tls: str | None) -> None:
    from uvicorn import Config, Server

    # The file holds the key and the certificate.
    config = Config(
        hello,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        ssl_keyfile=tls,
        ssl_certfile=tls,
    )
    await Server(config).serve(sockets=[sock])


async def aiohttp(sock: socket.socket, tls: str | None) -> None:
    from aiohttp import web

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=BODY, content_type="text/plain")

    app = web.Application()
    app.router.add_get("/", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.SockSite(runner, sock, ssl_context=control.context(tls)).start()
    await asyncio.Event().wait()


async def websockets(sock: socket.socket, tls: str | None) -> None:
    from websockets.asyncio.server import ServerConnection, serve
    from websockets.exceptions import ConnectionClosedError

    async def echo(connection: ServerConnection) -> None:
        # The load goes without a word.
        with contextlib.suppress(ConnectionClosedError):
            async for message in connection:
                await connection.send(message)

    async with serve(echo, sock=sock, ssl=control.context(tls), compression=None) as server:
        await server.serve_forever()


async def redis(sock: socket.socket, tls: str | None) -> None:
    from redis.asyncio import Redis

    async def ordered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client: Any = None
        while line := await reader.readline():
            order = json.loads(line)
            if client is None:
                client = Redis(unix_socket_path=order["path"], max_connections=order["tasks"])
                await client.set("key", bytes(100))
            started = time.perf_counter()

            async def ask(until: float = started + order["seconds"], client: Any = client) -> int:
                count = 0
                while not count or time.perf_counter() < until:
                    await client.get("key")
                    count += 1
                return count

            counts = await asyncio.gather(*(ask() for _ in range(order["tasks"])))
            seconds = time.perf_counter() - started
            writer.write(json.dumps({"messages": sum(counts), "seconds": seconds}).encode() + b"\n")
        if client is not None:
            await client.aclose()
        writer.close()

    async with await asyncio.start_server(ordered, sock=sock) as server:
        await server.serve_forever()


PROGRAMS = {program.__name__: program for program in (uvicorn, aiohttp, websockets, redis)}


async def main(arguments: argparse.Namespace) -> None:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    # Before anybody is told the port.
    sock.listen(1024)
    program = PROGRAMS[arguments.program](sock, arguments.tls)
    await asyncio.gather(program, control.serve(sock.getsockname()[1]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("--loop", choices=["uvloop", "uvsock"], required=True)
    parser.add_argument("--tls")
    given = parser.parse_args()
    module = __import__(given.loop)
    with asyncio.Runner(loop_factory=module.new_event_loop) as runner:
        runner.run(main(given))
