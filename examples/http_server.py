"""An HTTP/1.1 server that greets: keep-alive, pipelining, bodies are read and dropped.

It parses with httptools (pip install httptools).

python http_server.py --port 8080
curl http://127.0.0.1:8080/
"""

from __future__ import annotations

import argparse
from http import HTTPStatus
from pathlib import Path

import httptools

import uvsock

# Bytes of a request without its body, and of its body.
MAX_HEAD = 64 * 1024
MAX_BODY = 16 * 1024 * 1024
# Seconds without any traffic.
IDLE = 60
HELLO = b"Hello, world!\n"


class Session:
    """A connection's parser, which calls the ``on_`` methods, and the replies it leads to."""

    def __init__(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self.replies = uvsock.BufferSink()
        self.over = False
        self.begin()

    def begin(self) -> None:
        self.url = b""
        self.head = 0
        self.body = 0
        self.expects = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"expect" and value.lower() == b"100-continue":
            self.expects = True

    def on_headers_complete(self) -> None:
        if self.expects:
            self.replies.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self.head -= len(body)
        self.body += len(body)

    def on_message_complete(self) -> None:
        method, keep_alive = self.parser.get_method(), self.parser.should_keep_alive()
        if method not in (b"GET", b"HEAD", b"POST"):
            status = HTTPStatus.METHOD_NOT_ALLOWED
        elif self.url.partition(b"?")[0] != b"/":
            status = HTTPStatus.NOT_FOUND
        else:
            status = HTTPStatus.OK
        self.reply(status, keep_alive=keep_alive, body=method != b"HEAD")
        self.begin()

    def reply(self, status: HTTPStatus, *, keep_alive: bool, body: bool = True) -> None:
        if self.over:
            return
        text = HELLO if status == HTTPStatus.OK else f"{status.phrase}\n".encode()
        connection = "keep-alive" if keep_alive else "close"
        self.replies.write(
            f"HTTP/1.1 {status.value} {status.phrase}\r\n"
            "Content-Type: text/plain\r\n"
            f"Content-Length: {len(text)}\r\n"
            f"Connection: {connection}\r\n\r\n"
        )
        if body:
            self.replies.write(text)
        self.over = not keep_alive

    def feed(self, data: bytes) -> None:
        self.head += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.over = True  # answered as HTTP/1.1; what follows may be another protocol
        except httptools.HttpParserError:
            self.reply(HTTPStatus.BAD_REQUEST, keep_alive=False)
        if self.head > MAX_HEAD:
            self.reply(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, keep_alive=False)
        elif self.body > MAX_BODY:
            self.reply(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, keep_alive=False)


Client = uvsock.Socket[Session]


def received(socket: Client, data: bytes) -> None:
    session = socket.data
    session.feed(data)
    if session.over:
        socket.end(session.replies.end())
        socket.close()
    else:
        go_on(socket)


def go_on(socket: Client) -> None:
    """Send replies. A client that does not take them is not read from."""
    session = socket.data
    if socket.ready_state != uvsock.ReadyState.ESTABLISHED:
        return
    session.replies.flush_to(socket)
    if len(session.replies):
        socket.pause()
    else:
        socket.resume()


HANDLERS = uvsock.Handlers(data=received, drain=go_on)


async def main(arguments: argparse.Namespace) -> None:
    tls = None
    if arguments.tls_cert is not None:
        tls = uvsock.TLS(
            cert=arguments.tls_cert, key=arguments.tls_key, alpn_protocols=["http/1.1"]
        )
    listener = await uvsock.listen(
        HANDLERS,
        arguments.host,
        arguments.port,
        tls=tls,
        data_factory=Session,
        idle_timeout=IDLE,
    )
    print(f"listening on {listener.hostname} port {listener.port}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="An HTTP/1.1 server that greets.")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    parser.add_argument("--port", type=int, default=8080, help="0 for a free one, default: 8080")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="private key, PEM")
    uvsock.run(main(parser.parse_args()))
