"""A chat server: what one writes, all others read. Lines of text, so netcat is a client.

python chat_server.py --port 7000
nc 127.0.0.1 7000
"""

from __future__ import annotations

import argparse
from pathlib import Path

import uvsock

# Bytes of a line.
MAX_LINE = 1024
HELP = "/nick NAME, /who, /quit\n"


class Person:
    """Who a connection is."""

    count = 0

    def __init__(self) -> None:
        Person.count += 1
        self.name = f"guest{Person.count}"


Client = uvsock.Socket[Person]


class Room:
    """The handlers of all connections, and who is there."""

    def __init__(self) -> None:
        self.people: dict[str, Client] = {}

    def open(self, socket: Client) -> None:
        self.people[socket.data.name] = socket
        self.tell(socket, f"* you are {socket.data.name}; {HELP}")
        self.tell_others(socket, f"* {socket.data.name} is here\n")

    def data(self, socket: Client, data: bytes) -> None:
        # Control characters would reach the terminals of all others.
        line = "".join(c for c in data.decode(errors="replace") if c.isprintable()).strip()
        word, _, rest = line.partition(" ")
        if word == "/nick":
            self.rename(socket, rest)
        elif word == "/who":
            self.tell(socket, f"* {', '.join(sorted(self.people))}\n")
        elif word == "/quit":
            self.dismiss(socket, "* bye\n")
        elif word.startswith("/"):
            self.tell(socket, f"* {HELP}")
        elif line:
            self.tell_others(socket, f"{socket.data.name}: {line}\n")

    def error(self, socket: Client, error: Exception) -> None:
        if not isinstance(error, uvsock.FrameTooLargeError):
            raise error
        self.dismiss(socket, f"* a line has at most {MAX_LINE} bytes\n")

    def close(self, socket: Client, error: OSError | None) -> None:
        self.leave(socket)

    def rename(self, socket: Client, name: str) -> None:
        if not name.isidentifier() or len(name) > 20:
            self.tell(socket, "* a name has at most 20 letters and digits\n")
        elif name in self.people or name.startswith("guest"):
            self.tell(socket, f"* {name} is somebody else\n")
        else:
            before = socket.data.name
            self.people[name] = self.people.pop(before)
            socket.data.name = name
            self.tell(socket, f"* you are {name}\n")
            self.tell_others(socket, f"* {before} is {name} now\n")

    def dismiss(self, socket: Client, text: str) -> None:
        self.leave(socket)  # `close` comes when the text has arrived, which may take a while
        socket.end(text)
        socket.close()

    def leave(self, socket: Client) -> None:
        if self.people.pop(socket.data.name, None) is not None:
            self.tell_others(socket, f"* {socket.data.name} has left\n")

    def tell_others(self, socket: Client, text: str) -> None:
        for other in list(self.people.values()):
            if other is not socket:
                self.tell(other, text)

    def tell(self, socket: Client, text: str) -> None:
        message = text.encode()
        if 0 <= socket.write(message) < len(message):
            socket.terminate()  # reads too slowly: its lines are not kept for it


async def main(arguments: argparse.Namespace) -> None:
    tls = None
    if arguments.tls_cert is not None:
        tls = uvsock.TLS(cert=arguments.tls_cert, key=arguments.tls_key)
    listener = await uvsock.listen(
        Room(),
        arguments.host,
        arguments.port,
        tls=tls,
        data_factory=Person,
        framing=uvsock.Lines(max_length=MAX_LINE),
    )
    print(f"listening on {listener.hostname} port {listener.port}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A chat server for netcat.")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    parser.add_argument("--port", type=int, default=7000, help="0 for a free one, default: 7000")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="private key, PEM")
    uvsock.run(main(parser.parse_args()))
