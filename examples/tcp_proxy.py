"""A TCP proxy: passes bytes both ways, under back-pressure, and each end of a stream by itself.

With a certificate it speaks TLS to its clients, with --target-tls to the target.

python tcp_proxy.py --port 9000 --target 127.0.0.1:8080
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import uvsock

# Seconds to connect to the target, and without any traffic.
CONNECT = 10
IDLE = 600


# Its `data` is a Side, or None for a client whose target is not connected yet.
Connection = uvsock.Socket[Any]


class Side:
    """What a socket knows: the one it passes bytes on to, and what that has not taken yet."""

    def __init__(self, peer: Connection) -> None:
        self.peer = peer
        self.rest = memoryview(b"")


class Proxy:
    """Handlers for both sides: those of a client's socket, and those of the target's."""

    def __init__(self, hostname: str, port: int, tls: uvsock.TLS | bool) -> None:
        self.hostname = hostname
        self.port = port
        self.tls = tls

    async def open(self, socket: Connection) -> None:
        if socket.listener is None:
            return  # the target's
        try:
            target = await uvsock.connect(
                self,
                self.hostname,
                self.port,
                tls=self.tls,
                data=Side(socket),
                timeout=CONNECT,
                idle_timeout=IDLE,
                allow_half_open=True,
            )
        except OSError as error:
            print(f"no connection for {socket.remote_address}: {error}", flush=True)
            socket.terminate()
            return
        # Nothing is read from the client before this returns, so nobody has looked for it.
        socket.data = Side(target)
        if socket.ready_state != uvsock.ReadyState.ESTABLISHED:
            target.terminate()

    def data(self, socket: Connection, data: bytes) -> None:
        self.pass_on(socket, memoryview(data))

    def pass_on(self, socket: Connection, data: memoryview) -> None:
        sent = socket.data.peer.write(data)
        if 0 <= sent < len(data):
            socket.data.rest = data[sent:]
            socket.pause()  # its `end` waits too
        else:
            socket.data.rest = memoryview(b"")
            socket.resume()

    def drain(self, socket: Connection) -> None:
        source = socket.data.peer
        self.pass_on(source, source.data.rest)

    def end(self, socket: Connection) -> None:
        socket.data.peer.end()

    def close(self, socket: Connection, error: OSError | None) -> None:
        if socket.data is None:
            return  # a client without a target
        if error is None:
            socket.data.peer.close()
        else:
            socket.data.peer.terminate()

    def error(self, socket: Connection, error: Exception) -> None:
        print(f"{socket.remote_address}: {error}", flush=True)
        socket.terminate()
        if socket.data is not None:
            socket.data.peer.terminate()


def address(text: str) -> tuple[str, int]:
    hostname, _, port = text.rpartition(":")
    return hostname.removeprefix("[").removesuffix("]"), int(port)


async def main(arguments: argparse.Namespace) -> None:
    tls = None
    if arguments.tls_cert is not None:
        tls = uvsock.TLS(cert=arguments.tls_cert, key=arguments.tls_key)
    target_tls: uvsock.TLS | bool = arguments.target_tls
    if arguments.target_ca is not None:
        target_tls = uvsock.TLS(ca=arguments.target_ca)
    hostname, port = arguments.target
    listener = await uvsock.listen(
        Proxy(hostname, port, target_tls),
        arguments.host,
        arguments.port,
        tls=tls,
        idle_timeout=IDLE,
        allow_half_open=True,
    )
    print(f"listening on {listener.hostname} port {listener.port}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A TCP and TLS proxy.")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    parser.add_argument("--port", type=int, default=9000, help="0 for a free one, default: 9000")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="private key, PEM")
    parser.add_argument("--target", type=address, required=True, metavar="HOST:PORT")
    parser.add_argument("--target-tls", action="store_true", help="speak TLS to the target")
    parser.add_argument("--target-ca", type=Path, metavar="FILE", help="and trust these, PEM")
    uvsock.run(main(parser.parse_args()))
