"""Fuzz target: any stream to a socket with framing, whose handlers do what they like.

Events come in order, `close` last and once, and nothing is lost or invented as long as no handler
ends the connection or changes its framing.

python tests/fuzz/sockets.py tests/fuzz/corpus/sockets -max_total_time=60
"""

from __future__ import annotations

import asyncio
import contextlib
import socket as stdlib
import tempfile
from typing import Any

import harness
import uvloop

import uvsock

# What a handler does with a frame. Those after the first line end the connection, or change what
# its frames are.
NEUTRAL = ["nothing", "write", "pause", "reload", "raise"]
ACTIONS = [*NEUTRAL * 2, "end", "close", "terminate", "unframed", "framing"]
PATIENCE = 10.0
Socket = uvsock.Socket[Any]


class Mistake(Exception):
    pass


class Session:
    """The handlers of one connection, and what they have seen."""

    def __init__(self, choices: harness.Choices) -> None:
        self.actions = [choices.among(ACTIONS) for _ in range(8)]
        self.taken: set[str] = set()
        self.frames: list[bytes] = []
        self.events: list[str] = []
        self.errors: list[Exception] = []
        self.left = 0
        self.closed = asyncio.get_running_loop().create_future()

    @property
    def table(self) -> dict[str, Any]:
        names = ("open", "data", "end", "error", "close")
        return {name: getattr(self, name) for name in names}

    def happened(self, event: str) -> None:
        assert self.events[-1:] != ["close"], self.events
        assert not self.events or event != "open", self.events
        assert event != "data" or "end" not in self.events, self.events
        self.events.append(event)

    def open(self, socket: Socket) -> None:
        self.happened("open")

    def data(self, socket: Socket, data: Any) -> Any:
        self.happened("data")
        self.frames.append(bytes(data))
        action = self.actions[len(self.frames) % len(self.actions)]
        self.taken.add(action)
        match action:
            case "write":
                assert socket.write(b"answer") == (-1 if "end" in self.taken else 6)
            case "pause":
                socket.pause()
                asyncio.get_running_loop().call_soon(socket.resume)
            case "reload":
                socket.reload(self.asynchronous)
            case "raise":
                raise Mistake
            case "end":
                socket.end("over")
            case "close":
                socket.close()
            case "terminate":
                socket.terminate()
            case "unframed":
                socket.set_framing(None)
            case "framing":
                socket.set_framing(uvsock.Lines(max_length=harness.LIMIT))

    @property
    def asynchronous(self) -> dict[str, Any]:
        async def data(socket: Socket, data: Any) -> None:
            self.data(socket, data)
            await asyncio.sleep(0)

        return self.table | {"data": data}

    def end(self, socket: Socket) -> None:
        self.happened("end")
        self.left = socket.unframed

    def error(self, socket: Socket, error: Exception) -> None:
        self.happened("error")
        self.errors.append(error)

    def close(self, socket: Socket, error: Exception | None) -> None:
        self.happened("close")
        self.closed.set_result(None)


async def talk(data: bytes) -> None:
    choices = harness.Choices(data)
    framer, model = choices.among(harness.FRAMERS)
    session = Session(choices)
    sizes = [choices.number() % 64 for _ in range(3)]
    options = {"binary_type": choices.among(["bytes", "bytearray", "memoryview"])}
    stream = choices.rest()
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    with tempfile.TemporaryDirectory(prefix="uvs") as directory:
        listener = await uvsock.listen(
            session.table, unix=f"{directory}/s", framing=framer, **options
        )
        with stdlib.socket(stdlib.AF_UNIX) as peer:
            peer.connect(f"{directory}/s")
            peer.settimeout(PATIENCE)
            for chunk in harness.cut_up(stream, sizes):
                try:
                    peer.sendall(chunk)
                except OSError:
                    break  # closed by the other side
                await asyncio.sleep(0)
            with contextlib.suppress(OSError):  # closed by the other side
                peer.shutdown(stdlib.SHUT_WR)
            await asyncio.wait_for(session.closed, PATIENCE)
        listener.stop(True)
        await asyncio.wait_for(listener.wait_closed(), PATIENCE)
    assert not reported, reported
    assert session.events[0] == "open", session.events
    assert session.events[-1] == "close", session.events
    assert session.events.count("end") <= 1, session.events
    for error in session.errors:
        assert isinstance(error, (Mistake, uvsock.FrameError)), error
        if isinstance(error, uvsock.FrameTooLargeError):
            assert f"max_length ({harness.LIMIT} bytes)" in str(error)
    if session.taken <= set(NEUTRAL):
        frames, end = model(stream)
        assert session.frames == frames, (framer, session.frames, frames)
        failures = [error for error in session.errors if isinstance(error, uvsock.FrameError)]
        if isinstance(end, int):
            assert (session.left, failures) == (end, []), (framer, session.left, end, failures)
        else:
            assert [type(failure) for failure in failures] == [end], (framer, failures, end)


def target(data: bytes) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(talk(data))


if __name__ == "__main__":
    harness.main(target)
