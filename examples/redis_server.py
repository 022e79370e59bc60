"""A key-value server that Redis clients accept: RESP2 and 3, pipelining, a few commands.

python redis_server.py --port 6379
redis-cli -p 6379 set greeting hello
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import uvsock

# Bytes of one request, and of one line in it.
MAX_REQUEST = 16 * 1024 * 1024
MAX_LINE = 64 * 1024
MAX_ARGUMENTS = 1024 * 1024
# Bytes of replies that wait for a client before its next requests do.
MAX_REPLIES = 256 * 1024
MANY = float("inf")

started = time.monotonic()
store: dict[bytes, bytes] = {}


class ProtocolError(Exception):
    """What a client has sent is no request; nothing after it can be understood."""


class CommandError(Exception):
    """A request that cannot be answered."""


# ── Requests ───────────────────────────────────────────────────────────────────────────────────


class Requests:
    """Bytes in, requests out: a list of arguments each."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.start = 0  # of what is not parsed yet
        self.arguments: list[bytes] = []
        self.missing = 0  # arguments of the request that has begun
        self.length = -1  # of the argument that comes next, once it is known
        self.size = 0

    def feed(self, data: bytes) -> None:
        del self.buffer[: self.start]
        self.start = 0
        self.buffer += data

    def next(self) -> list[bytes] | None:
        """The next request, None if it is not complete. Raises ProtocolError."""
        while True:
            if self.length >= 0:
                end = self.start + self.length
                if len(self.buffer) < end + 2:
                    return None
                if self.buffer[end : end + 2] != b"\r\n":
                    raise ProtocolError("a bulk string is longer than its length")
                self.arguments.append(bytes(self.buffer[self.start : end]))
                self.start = end + 2
                self.length = -1
                self.missing -= 1
                if self.missing == 0:
                    request, self.arguments = self.arguments, []
                    return request
                continue
            line = self.line()
            if line is None:
                return None
            if self.missing:
                if not line.startswith(b"$"):
                    raise ProtocolError("expected '$'")
                self.length = self.number(line, "invalid bulk length")
                self.size += self.length + len(line)
                if self.length < 0 or self.size > MAX_REQUEST:
                    raise ProtocolError("invalid bulk length")
            elif line.startswith(b"*"):
                self.missing = max(self.number(line, "invalid multibulk length"), 0)
                self.size = 0
                if self.missing > MAX_ARGUMENTS:
                    raise ProtocolError("invalid multibulk length")
            elif words := line.split():
                return words

    def line(self) -> bytes | None:
        end = self.buffer.find(b"\n", self.start, self.start + MAX_LINE)
        if end < 0:
            if len(self.buffer) - self.start >= MAX_LINE:
                raise ProtocolError("too big inline request")
            return None
        line = bytes(self.buffer[self.start : end])
        self.start = end + 1
        return line.removesuffix(b"\r")

    @staticmethod
    def number(line: bytes, complaint: str) -> int:
        digits = line[1:].removeprefix(b"-")
        # int() would also take spaces, underscores, and as many digits as come.
        if not digits.isdigit() or len(digits) > 18:
            raise ProtocolError(complaint)
        return int(line[1:])


# ── Replies ────────────────────────────────────────────────────────────────────────────────────

# A str is a status, such as OK.
Reply = str | bytes | int | None | list["Reply"] | dict[bytes, "Reply"]


def encode(reply: Reply, protocol: int) -> bytes:
    match reply:
        case str():
            return b"+%b\r\n" % reply.encode()
        case bytes():
            return b"$%d\r\n%b\r\n" % (len(reply), reply)
        case int():
            return b":%d\r\n" % reply
        case None:
            return b"_\r\n" if protocol == 3 else b"$-1\r\n"
        case list():
            return b"*%d\r\n" % len(reply) + b"".join(encode(item, protocol) for item in reply)
        case dict():
            items = [part for pair in reply.items() for part in pair]
            if protocol == 2:
                return encode(items, protocol)
            parts = b"".join(encode(item, protocol) for item in items)
            return b"%%%d\r\n" % len(reply) + parts


def error(text: str) -> bytes:
    return b"-" + text.replace("\r", " ").replace("\n", " ").encode() + b"\r\n"


# ── Commands ───────────────────────────────────────────────────────────────────────────────────

Command = Callable[[list[bytes]], Reply]
# By name: the least and the most arguments, and what answers them.
commands: dict[bytes, tuple[int, float, Command]] = {}


def command(name: str, least: int, most: float) -> Callable[[Command], Command]:
    def register(function: Command) -> Command:
        commands[name.encode()] = (least, most, function)
        return function

    return register


def answer(request: list[bytes]) -> Reply:
    """What a request is answered with. Raises CommandError."""
    name, *arguments = request
    least, most, function = commands.get(name.upper(), (0, 0, None))
    shown = name[:64].decode(errors="replace")
    if function is None:
        raise CommandError(f"ERR unknown command '{shown}'")
    if not least <= len(arguments) <= most:
        raise CommandError(f"ERR wrong number of arguments for '{shown.lower()}' command")
    return function(arguments)


@command("PING", 0, 1)
def ping(arguments: list[bytes]) -> Reply:
    return arguments[0] if arguments else "PONG"


@command("ECHO", 1, 1)
def echo(arguments: list[bytes]) -> Reply:
    return arguments[0]


@command("GET", 1, 1)
def get(arguments: list[bytes]) -> Reply:
    return store.get(arguments[0])


@command("SET", 2, 3)
def set_(arguments: list[bytes]) -> Reply:
    key, value, *options = arguments
    for option in options:
        if option.upper() not in (b"NX", b"XX"):
            raise CommandError("ERR syntax error")
        if (key in store) == (option.upper() == b"NX"):
            return None
    store[key] = value
    return "OK"


@command("DEL", 1, MANY)
def del_(arguments: list[bytes]) -> Reply:
    return sum(store.pop(key, None) is not None for key in arguments)


@command("EXISTS", 1, MANY)
def exists(arguments: list[bytes]) -> Reply:
    return sum(key in store for key in arguments)


@command("INCR", 1, 1)
def incr(arguments: list[bytes]) -> Reply:
    value = store.get(arguments[0], b"0")
    digits = value.removeprefix(b"-")
    if not digits.isdigit() or len(digits) > 18:
        raise CommandError("ERR value is not an integer or out of range")
    number = int(value) + 1
    store[arguments[0]] = b"%d" % number
    return number


@command("COMMAND", 0, MANY)
def command_(arguments: list[bytes]) -> Reply:
    if arguments and arguments[0].upper() == b"COUNT":
        return len(commands)
    return []  # redis-cli looks for help texts here


@command("CONFIG", 2, MANY)
def config(arguments: list[bytes]) -> Reply:
    if arguments[0].upper() != b"GET":
        raise CommandError("ERR only CONFIG GET is known")
    known = {b"save": b"", b"appendonly": b"no", b"maxmemory": b"0"}
    return {name: known[name] for name in arguments[1:] if name in known}


@command("INFO", 0, MANY)
def info(arguments: list[bytes]) -> Reply:
    lines = [
        "# Server",
        "redis_version:7.0.0",
        f"uvsock_version:{uvsock.__version__}",
        f"uptime_in_seconds:{int(time.monotonic() - started)}",
        "# Keyspace",
        f"db0:keys={len(store)},expires=0,avg_ttl=0",
    ]
    return "".join(f"{line}\r\n" for line in lines).encode()


@command("CLIENT", 1, MANY)
def client(arguments: list[bytes]) -> Reply:
    return "OK"  # SETNAME, SETINFO: clients say who they are


@command("SELECT", 1, 1)
def select(arguments: list[bytes]) -> Reply:
    if arguments[0] != b"0":
        raise CommandError("ERR DB index is out of range")
    return "OK"


@command("HELLO", 0, MANY)
def hello(arguments: list[bytes]) -> Reply:
    if arguments and arguments[0] not in (b"2", b"3"):
        raise CommandError("NOPROTO unsupported protocol version")
    if arguments[1:2] and arguments[1].upper() == b"AUTH":
        raise CommandError("ERR there are no users here")
    protocol = int(arguments[0]) if arguments else 2
    return {b"server": b"redis", b"version": b"7.0.0", b"proto": protocol, b"role": b"master"}


# ── Connections ────────────────────────────────────────────────────────────────────────────────


class Session:
    """A connection's requests, and the replies that its client has not taken yet."""

    def __init__(self) -> None:
        self.requests = Requests()
        self.replies = uvsock.BufferSink()
        self.protocol = 2  # of replies: RESP2 or RESP3
        self.over = False


Client = uvsock.Socket[Session]


def received(socket: Client, data: bytes) -> None:
    socket.data.requests.feed(data)
    go_on(socket)


def go_on(socket: Client) -> None:
    """Answer what has come. A client that does not take its replies is not read from."""
    session = socket.data
    if socket.ready_state != uvsock.ReadyState.ESTABLISHED:
        return
    if len(session.replies):
        session.replies.flush_to(socket)
    waiting = True
    while waiting and not len(session.replies):
        while waiting and len(session.replies) < MAX_REPLIES:
            waiting = answer_next(session)
        session.replies.flush_to(socket)
    if session.over:
        socket.end(session.replies.end())
        socket.close()
    elif len(session.replies):
        socket.pause()
    else:
        socket.resume()


def answer_next(session: Session) -> bool:
    """Answer one request. Returns whether another may follow."""
    try:
        request = session.requests.next()
    except ProtocolError as failure:
        session.replies.write(error(f"ERR Protocol error: {failure}"))
        session.over = True
        return False
    if request is None:
        return False
    name = request[0].upper()
    session.over = name == b"QUIT"
    try:
        reply = "OK" if session.over else answer(request)
    except CommandError as failure:
        session.replies.write(error(str(failure)))
    else:
        if name == b"HELLO" and len(request) > 1:
            session.protocol = int(request[1])
        session.replies.write(encode(reply, session.protocol))
    return not session.over


HANDLERS = uvsock.Handlers(data=received, drain=go_on)


async def main(arguments: argparse.Namespace) -> None:
    tls = None
    if arguments.tls_cert is not None:
        tls = uvsock.TLS(cert=arguments.tls_cert, key=arguments.tls_key)
    listener = await uvsock.listen(
        HANDLERS, arguments.host, arguments.port, tls=tls, data_factory=Session
    )
    print(f"listening on {listener.hostname} port {listener.port}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A key-value server for Redis clients.")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    parser.add_argument("--port", type=int, default=6379, help="0 for a free one, default: 6379")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="private key, PEM")
    uvsock.run(main(parser.parse_args()))
