"""The command line: an echo server, a netcat, and the versions in use."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import signal
import ssl
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import uvsock

STDIN, STDOUT = 0, 1
READ_SIZE = 65536


def versions() -> str:
    return (
        f"uvsock {uvsock.__version__}\n"
        f"uvloop {version('uvloop')}\n"
        f"{platform.python_implementation()} {platform.python_version()}\n"
        f"{ssl.OPENSSL_VERSION}"
    )


def complain(message: object) -> None:
    print(f"uvsock: {message}", file=sys.stderr, flush=True)


def address(hostname: str, port: int) -> str:
    return f"[{hostname}]:{port}" if ":" in hostname else f"{hostname}:{port}"


class Echo:
    """Handlers that send back what arrives. ``socket.data`` is what the socket did not take yet."""

    def data(self, socket: uvsock.Socket[Any], data: bytes) -> None:
        sent = socket.write(data)
        if 0 <= sent < len(data):
            # Reading on would make the rest grow as fast as the peer sends.
            socket.data = memoryview(data)[sent:]
            socket.pause()

    def drain(self, socket: uvsock.Socket[Any]) -> None:
        sent = socket.write(socket.data)
        if 0 <= sent < len(socket.data):
            socket.data = socket.data[sent:]
        else:
            socket.data = None
            socket.resume()

    def handshake(
        self, socket: uvsock.Socket[Any], success: bool, error: BaseException | None
    ) -> None:
        if not success:
            complain(f"TLS handshake failed: {error}")

    def error(self, socket: uvsock.Socket[Any], error: BaseException) -> None:
        complain(error)
        socket.terminate()


async def echo(arguments: argparse.Namespace) -> int:
    tls = None
    if arguments.tls_cert is not None:
        tls = uvsock.TLS(cert=arguments.tls_cert, key=arguments.tls_key)
    try:
        if arguments.unix is not None:
            listener = await uvsock.listen(Echo(), unix=arguments.unix, tls=tls)
            where = arguments.unix
        else:
            listener = await uvsock.listen(Echo(), arguments.host, arguments.port, tls=tls)
            assert listener.hostname is not None
            assert listener.port is not None
            where = address(listener.hostname, listener.port)
    except (OSError, ValueError) as error:
        complain(error)
        return 1
    print(f"listening on {where}" + (" (TLS)" if tls is not None else ""), flush=True)
    return 0


async def blocking(call: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a blocking call.

    It is made in a thread of its own. A terminal's read cannot be interrupted: a thread of an
    executor would be waited for when the program ends, a daemon thread is not.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: Exception | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def work() -> None:
        result, failure = None, None
        try:
            result = call(*arguments)
        except Exception as error:
            failure = error
        # The loop is closed if the program ended before the call did.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=work, daemon=True).start()
    return await future


def write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


class Netcat:
    """Handlers that print what arrives and remember what went wrong."""

    def __init__(self) -> None:
        self.failure: Exception | None = None

    async def data(self, socket: uvsock.Socket[Any], data: bytes) -> None:
        # While this waits for a slow reader of the output, the socket does not read.
        await blocking(write_all, STDOUT, data)

    def end(self, socket: uvsock.Socket[Any]) -> None:
        if socket.truncated:
            self.failure = ConnectionError(
                "the peer ended without a TLS close_notify: data may be missing"
            )

    def error(self, socket: uvsock.Socket[Any], error: Exception) -> None:
        self.failure = error
        socket.terminate()

    def close(self, socket: uvsock.Socket[Any], error: OSError | None) -> None:
        self.failure = self.failure or error

    async def send_input(self, socket: uvsock.Socket[Any]) -> None:
        """Send standard input, then FIN. What the peer sends after that is still received."""
        while True:
            try:
                chunk = await blocking(os.read, STDIN, READ_SIZE)
            except OSError as error:
                self.error(socket, error)
                return
            if not chunk:
                socket.end()
                return
            try:
                await socket.send_all(chunk)
            except OSError:
                return  # `close` tells why, unless the peer has ended in order


async def connect(arguments: argparse.Namespace) -> int:
    tls: uvsock.TLS | bool | None = None
    if arguments.tls_ca is not None:
        tls = uvsock.TLS(ca=arguments.tls_ca)
    elif arguments.tls:
        tls = True
    netcat = Netcat()
    try:
        if arguments.unix is not None:
            socket = await uvsock.connect(netcat, unix=arguments.unix)
        else:
            socket = await uvsock.connect(netcat, arguments.hostname, arguments.port, tls=tls)
    except (OSError, ValueError) as error:
        complain(error)
        return 1
    sending = asyncio.create_task(netcat.send_input(socket))
    try:
        await socket.wait_closed()
    finally:
        sending.cancel()
    if netcat.failure is not None:
        complain(netcat.failure)
        return 1
    return 0


def port_number(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise ValueError
    return port


port_number.__name__ = "port number"  # argparse: "invalid port number value: '70000'"


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m uvsock",
        description=__doc__,
        # The default formatter would join the lines of --version.
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=versions())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    server = commands.add_parser("echo", help="run a server that sends back what it receives")
    server.set_defaults(run=echo)
    server.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    server.add_argument(
        "--port", type=port_number, help="port to listen on, 0 for a free one (default: 7000)"
    )
    server.add_argument("--unix", metavar="PATH", help="listen on a Unix socket instead")
    server.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="speak TLS with this certificate chain (PEM)"
    )
    server.add_argument("--tls-key", type=Path, metavar="FILE", help="and this private key (PEM)")

    client = commands.add_parser(
        "connect",
        help="connect standard input and output to a server",
        description="Send standard input to a server and print what it sends. The end of the "
        "input ends only this side of the connection; the command ends when the server does.",
    )
    client.set_defaults(run=connect)
    client.add_argument("hostname", nargs="?", metavar="HOST")
    client.add_argument("port", nargs="?", metavar="PORT", type=port_number)
    client.add_argument("--unix", metavar="PATH", help="connect to a Unix socket instead")
    client.add_argument("--tls", action="store_true", help="speak TLS and verify the server")
    client.add_argument(
        "--tls-ca",
        type=Path,
        metavar="FILE",
        help="trust these authorities (PEM) instead of the system's; implies --tls",
    )

    arguments = parser.parse_args(words)
    if arguments.run is echo:
        if arguments.unix is not None and (arguments.host or arguments.port is not None):
            server.error("--unix does not go with --host or --port")
        if (arguments.tls_cert is None) != (arguments.tls_key is None):
            server.error("--tls-cert and --tls-key go together")
        arguments.host = arguments.host or "127.0.0.1"
        arguments.port = 7000 if arguments.port is None else arguments.port
    elif arguments.unix is not None:
        if arguments.hostname is not None:
            client.error("--unix does not go with HOST and PORT")
        if arguments.tls or arguments.tls_ca is not None:
            client.error("--unix does not go with --tls: there is no host name to verify")
    elif arguments.port is None:
        client.error("give HOST and PORT, or --unix PATH")
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        words: the arguments, those of the process if ``None``.

    Returns:
        The exit status: 0, or 1 after an error that was printed; as shells do, 128 and the signal's
        number where one ended it before its end. Wrong arguments exit with 2.
    """
    arguments = parse(words)
    try:
        status: int | None = uvsock.run(arguments.run(arguments))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 128 + signal.SIGTERM if status is None else status


if __name__ == "__main__":
    sys.exit(main())
