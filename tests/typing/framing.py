"""Framers, and what sockets do with them."""

from __future__ import annotations

from typing import Any, Literal, assert_type

import uvsock


class Tagged(uvsock.Framer):
    def find(self, data: memoryview, searched: int = 0) -> tuple[int, int, int] | int | None:
        return (0, 1, 1) if data[0] else None

    def wrap(self, data: bytes) -> tuple[bytes, bytes]:
        return b"T", b""


class Wrong(uvsock.Framer):
    def find(self, data: str, searched: int = 0) -> str:  # type: ignore[override]
        return data


def made(size: Literal[1, 2, 4, 8]) -> None:
    framers: list[uvsock.Framer] = [
        uvsock.Lines(True, max_length=100),
        uvsock.Delimited(b"\r\n"),
        uvsock.Delimited(memoryview(b"--"), keep_end=True),
        uvsock.LengthPrefixed(size, "little", include_prefix=True, length_includes_prefix=True),
        uvsock.LengthPrefixed("varint"),
        uvsock.FixedSize(16),
        uvsock.Netstring(),
        Tagged(max_length=100),
    ]
    assert_type(framers[0].max_length, int)
    assert_type(framers[0].find(memoryview(b"x")), tuple[int, int, int] | int | None)
    assert_type(framers[0].wrap(b"x"), tuple[bytes, bytes])
    uvsock.Delimited("text")  # type: ignore[arg-type]
    uvsock.LengthPrefixed(3)  # type: ignore[arg-type]
    uvsock.LengthPrefixed(2, "native")  # type: ignore[arg-type]


def received(socket: uvsock.Socket[Any], frame: bytes) -> None:
    assert_type(socket.write_frame(frame), int)
    assert_type(socket.write_frame("text"), int)
    assert_type(socket.unframed, int)
    assert_type(socket.framing, uvsock.Framer | None)
    socket.set_framing(uvsock.FixedSize(3))
    socket.set_framing(None)
    socket.set_framing("lines")  # type: ignore[arg-type]
    socket.write_frame(5)  # type: ignore[arg-type]


def failed(socket: uvsock.Socket[Any], error: Exception) -> None:
    if isinstance(error, uvsock.FrameTooLargeError):
        assert_type(error.errno, int | None)


async def connections() -> None:
    handlers = {"data": received, "error": failed}
    await uvsock.listen(handlers, "localhost", 0, framing=uvsock.Lines())
    await uvsock.connect(handlers, "localhost", 1, framing=Tagged())
    await uvsock.listen(handlers, "localhost", 0, framing=b"\n")  # type: ignore[arg-type]
