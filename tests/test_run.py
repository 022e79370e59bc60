"""`run`: how long a program lives, and how it stops. Each test is a program of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import socket as stdlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

import uvsock
from conftest import Authority, open_descriptors, run_python, unused_port, without_slowness
from helpers import ignore

PRELUDE = """
import asyncio, os, signal, socket as stdlib, sys, time, uvsock
def ignore(*arguments): pass
def say(*words): print(*words, flush=True)
"""


def finished(program: str) -> str:
    """What a program printed until it ended by itself, with nothing on stderr."""
    return run_python("-c", PRELUDE + program)


@contextmanager
def program(text: str) -> Iterator[subprocess.Popen[str]]:
    """A running program that has printed its first line, which is in ``.first``."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PRELUDE + text],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        process.first = process.stdout.readline().strip()  # type: ignore[attr-defined]
        yield process
    finally:
        process.kill()
        process.communicate()


# ── Life time ──────────────────────────────────────────────────────────────────────────────────


def test_it_returns_what_main_returns_and_runs_on_uvloop() -> None:
    async def main() -> str:
        assert isinstance(asyncio.get_running_loop(), uvloop.Loop)
        return "result"

    assert uvsock.run(main()) == "result"


def test_what_main_raises_is_raised() -> None:
    closed: list[Any] = []

    async def main() -> None:
        table = {"data": ignore, "close": lambda socket, error: closed.append(error)}
        listener = await uvsock.listen(table, "127.0.0.1", 0)
        await uvsock.connect({"data": ignore}, "127.0.0.1", listener.port)
        raise LookupError("why")

    with pytest.raises(LookupError, match="why"):
        uvsock.run(main())
    assert closed == [None]  # in order, although main has failed


def test_it_goes_on_until_the_last_socket_and_listener_are_gone() -> None:
    assert finished("""
async def main():
    listener = await uvsock.listen({"data": lambda s, d: s.end(d)}, "127.0.0.1", 0)
    def opened(socket):
        say("open"); socket.write("x")
    def closed(socket, error):
        say("close"); listener.stop()
    table = {"open": opened, "data": ignore, "close": closed}
    await uvsock.connect(table, "127.0.0.1", listener.port)
    say("main is over")
    return 7
say(uvsock.run(main()))
""").split("\n") == ["open", "main is over", "close", "7", ""]


@pytest.mark.parametrize("what", ["listener", "socket", "both again"])
def test_unref_and_ref(what: str) -> None:
    """What is not referenced does not keep the program; what is referenced again does."""
    script = {
        "listener": "listener.unref(); listener.unref(); socket.end()",
        "socket": "socket.unref(); listener.stop(); [s.unref() for s in listener.sockets]",
        "both again": "socket.unref(); socket.ref(); socket.ref(); listener.unref(); socket.end()",
    }[what]
    assert (
        finished(f"""
async def main():
    listener = await uvsock.listen({{"data": ignore}}, "127.0.0.1", 0)
    socket = await uvsock.connect({{"data": ignore, "close": lambda s, e: say("closed", e)}},
                                  "127.0.0.1", listener.port)
    while not listener.connections:
        await asyncio.sleep(0.001)
    {script}
uvsock.run(main())
""")
        == "closed None\n"
    )


def test_an_unreferenced_listener_alone_ends_at_once() -> None:
    async def main() -> None:
        listener = await uvsock.listen({"data": ignore}, "127.0.0.1", 0)
        listener.unref()

    started = time.monotonic()
    uvsock.run(main())
    assert time.monotonic() - started < 2


def test_it_waits_for_a_connection_that_is_being_made() -> None:
    assert (
        finished("""
async def later(port):
    await uvsock.connect({"open": lambda s: (say("open"), s.end()), "data": ignore},
                         "127.0.0.1", port)
async def main():
    listener = await uvsock.listen({"data": ignore}, "127.0.0.1", 0)
    global task
    task = asyncio.get_running_loop().create_task(later(listener.port))
    await asyncio.sleep(0)
    listener.unref()
uvsock.run(main())
""")
        == "open\n"
    )


def test_async_close_handlers_are_finished() -> None:
    assert (
        finished("""
async def closed(socket, error):
    await asyncio.sleep(0.05)
    say("closed")
async def main():
    listener = await uvsock.listen({"data": ignore}, "127.0.0.1", 0)
    socket = await uvsock.connect({"data": ignore, "close": closed}, "127.0.0.1", listener.port)
    socket.end()
    listener.unref()
uvsock.run(main())
""")
        == "closed\n"
    )


def lifetime(*steps: str) -> float:
    """Seconds that a run takes whose first listener is treated thus, beside a second for 0.2 s."""

    async def main() -> None:
        listener = await uvsock.listen({"data": ignore}, "127.0.0.1", 0)
        for step in steps:
            getattr(listener, step)()
        other = await uvsock.listen({"data": ignore}, "127.0.0.1", 0)
        asyncio.get_running_loop().call_later(0.2, other.stop)

    started = time.monotonic()
    uvsock.run(main())
    return time.monotonic() - started


@pytest.mark.parametrize(
    "steps",
    [
        ("stop",),
        ("stop", "stop"),
        ("unref", "stop"),
        ("stop", "unref"),
        ("stop", "unref", "ref"),
        ("stop", "ref"),
        ("unref", "unref", "ref", "stop"),
        ("unref", "ref", "unref"),
    ],
)
def test_what_is_done_to_one_listener_does_not_count_for_another(steps: tuple[str, ...]) -> None:
    assert 0.19 < lifetime(*steps) < 3


def test_ref_and_unref_of_closed_sockets_count_nothing() -> None:
    async def main() -> None:
        listener = await uvsock.listen({"data": ignore}, "127.0.0.1", 0)
        for step in ("ref", "unref"):
            socket = await uvsock.connect({"data": ignore}, "127.0.0.1", listener.port)
            socket.terminate()
            await socket.wait_closed()
            getattr(socket, step)()
        asyncio.get_running_loop().call_later(0.2, listener.stop)

    started = time.monotonic()
    uvsock.run(main())
    assert 0.19 < time.monotonic() - started < 3


def test_a_connection_that_cannot_be_made_does_not_keep_it() -> None:
    told: list[str] = []

    async def main() -> Any:
        table = {"data": ignore, "connect_error": lambda s, error: told.append("refused")}
        task = asyncio.create_task(uvsock.connect(table, "127.0.0.1", unused_port()))
        task.add_done_callback(lambda task: task.exception())
        await asyncio.sleep(0)
        return task

    task = uvsock.run(main())
    assert told == ["refused"]
    assert isinstance(task.exception(), ConnectionRefusedError)


def test_tasks_go_on_while_a_listener_lives_and_are_cancelled_at_the_end() -> None:
    ticks: list[str] = []

    async def ticking(listener: uvsock.Listener) -> None:
        try:
            for _ in range(3):
                await asyncio.sleep(0.01)
                ticks.append("tick")
            listener.stop()
            await asyncio.sleep(60)
        finally:
            ticks.append("over")

    async def main() -> Any:
        listener = await uvsock.listen({"data": ignore}, "127.0.0.1", 0)
        return asyncio.create_task(ticking(listener))

    assert uvsock.run(main()).cancelled()
    assert ticks == ["tick", "tick", "tick", "over"]


def test_a_new_listener_made_in_a_close_handler_keeps_it_going() -> None:
    seen: list[str] = []

    async def renewed(port: int) -> None:
        listener = await uvsock.listen({"data": ignore}, "127.0.0.1", port)
        await asyncio.sleep(0.02)
        seen.append("renewed")
        listener.stop()

    async def main() -> None:
        async def closed(socket: uvsock.Socket[Any], error: BaseException | None) -> None:
            listener.stop()
            await renewed(listener.port or 0)

        listener = await uvsock.listen({"data": ignore, "close": closed}, "127.0.0.1", 0)
        (await uvsock.connect({"data": ignore}, "127.0.0.1", listener.port)).end()

    uvsock.run(main())
    assert seen == ["renewed"]


def test_it_leaves_no_descriptors_open() -> None:
    async def main() -> None:
        listener = await uvsock.listen({"data": ignore}, "127.0.0.1", 0)
        for _ in range(10):
            socket = await uvsock.connect({"data": ignore}, "127.0.0.1", listener.port)
            socket.unref()
        for socket in listener.sockets:
            socket.unref()
        listener.unref()

    before = open_descriptors()
    uvsock.run(main())
    assert open_descriptors() == before


def test_what_unreferenced_sockets_have_accepted_is_delivered_at_the_end() -> None:
    received: list[int] = []

    def receive(server: stdlib.socket) -> None:
        peer, _ = server.accept()
        with peer:
            total = 0
            while chunk := peer.recv(100_000):
                total += len(chunk)
                time.sleep(0.0005)
        received.append(total)

    async def main(port: int) -> None:
        socket = await uvsock.connect({"data": ignore}, "127.0.0.1", port, high_water_mark=1 << 24)
        assert socket.write(b"x" * 8_000_000) == 8_000_000
        socket.unref()

    with stdlib.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        thread = threading.Thread(target=receive, args=(server,))
        thread.start()
        uvsock.run(main(server.getsockname()[1]))
        thread.join(20)
    assert received == [8_000_000]


# ── Exceptions ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["SystemExit(3)", "KeyboardInterrupt()", "BaseException('b')"])
def test_what_main_raises_closes_the_sockets_in_order_first(kind: str) -> None:
    """`close` is called, then the exception goes on."""
    assert (
        finished(f"""
async def main():
    listener = await uvsock.listen({{"data": ignore}}, "127.0.0.1", 0)
    def closed(socket, error):
        say("close", error)
    await uvsock.connect({{"data": ignore, "close": closed}}, "127.0.0.1", listener.port)
    raise {kind}
try:
    uvsock.run(main())
except BaseException as error:
    say(repr(error))
""")
        == f"close None\n{kind}\n"
    )


def test_system_exit_in_main_is_the_exit_status() -> None:
    code = "async def main(): sys.exit(7)\nuvsock.run(main())"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", PRELUDE + code],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (result.returncode, result.stdout, without_slowness(result.stderr)) == (7, "", "")


def test_a_main_that_cancels_itself_is_cancelled() -> None:
    async def main() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        uvsock.run(main())


# ── Arguments ──────────────────────────────────────────────────────────────────────────────────


def test_what_is_no_coroutine_is_refused() -> None:
    async def main() -> None: ...

    for bad in (main, None, 5):
        with pytest.raises(TypeError, match="^main: "):
            uvsock.run(bad)  # type: ignore[arg-type]


def test_inside_a_loop_of_asyncios_it_is_refused_too() -> None:
    async def inner() -> None: ...

    async def main() -> None:
        with pytest.raises(RuntimeError, match="event loop is running"):
            uvsock.run(inner())

    asyncio.run(main())


def test_a_nested_run_is_refused_and_the_coroutine_closed() -> None:
    async def inner() -> None: ...

    async def main() -> None:
        coroutine = inner()
        with pytest.raises(RuntimeError, match="event loop is running"):
            uvsock.run(coroutine)
        assert coroutine.cr_frame is None

    uvsock.run(main())


def test_debug_mode() -> None:
    async def main() -> bool:
        return asyncio.get_running_loop().get_debug()

    assert uvsock.run(main(), debug=True) is True
    assert uvsock.run(main(), debug=False) is False


@pytest.mark.parametrize(("value", "expected"), [("1", "True"), ("", "False")])
def test_debug_none_is_what_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: str
) -> None:
    monkeypatch.setenv("PYTHONASYNCIODEBUG", value)
    monkeypatch.delenv("PYTHONDEVMODE", raising=False)
    text = """
async def main():
    say(asyncio.get_running_loop().get_debug())
uvsock.run(main())
"""
    assert finished(text) == f"{expected}\n"


def test_it_runs_in_a_thread_and_one_loop_after_another() -> None:
    async def main() -> int:
        async with await uvsock.listen({"data": ignore}, "127.0.0.1", 0) as listener:
            socket = await uvsock.connect({"data": ignore}, "127.0.0.1", listener.port)
            socket.end()
            await socket.wait_closed()
        return threading.get_ident()

    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(uvsock.run(main())))
    thread.start()
    thread.join(20)
    assert results
    assert uvsock.run(main()) == uvsock.run(main()) == threading.get_ident() != results[0]


# ── Signals ────────────────────────────────────────────────────────────────────────────────────

SERVER = """
PAYLOAD = b"p" * 3_000_000
def data(socket, data):
    socket.write(PAYLOAD)
    say("written")
async def main():
    listener = await uvsock.listen({"data": data, "close": lambda s, e: say("closed", e)},
                                   "127.0.0.1", 0, high_water_mark=1 << 22)
    say(listener.port)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_in_order(number: signal.Signals) -> None:
    """What was accepted is delivered, new connections are refused, the exit status is 0."""
    with program(SERVER + "uvsock.run(main())\nsay('over')") as process:
        port = int(process.first)  # type: ignore[attr-defined]
        assert process.stdout is not None
        with stdlib.create_connection(("127.0.0.1", port), 10) as client:
            client.sendall(b"go")
            assert process.stdout.readline() == "written\n"
            process.send_signal(number)
            received = 0
            while chunk := client.recv(100_000):
                received += len(chunk)
                time.sleep(0.001)
            assert received == 3_000_000
        out, err = process.communicate(timeout=10)
        assert out == "closed None\nover\n"
        assert without_slowness(err) == ""
        assert process.returncode == 0
        with pytest.raises(ConnectionRefusedError):
            stdlib.create_connection(("127.0.0.1", port), 10)


def test_a_signal_delivers_over_tls_too(tmp_path: Path, authority: Authority) -> None:
    for name in ("key", "cert"):
        (tmp_path / name).write_bytes(authority.server_options[name])
    text = SERVER.replace(
        "high_water_mark=1 << 22", "high_water_mark=1 << 22, tls={'key': KEY, 'cert': CERT}"
    )
    files = f"from pathlib import Path\nKEY, CERT = Path({str(tmp_path / 'key')!r}), "
    files += f"Path({str(tmp_path / 'cert')!r})\n"
    with program(files + text + "uvsock.run(main())\nsay('over')") as process:
        port = int(process.first)  # type: ignore[attr-defined]
        assert process.stdout is not None
        plain = stdlib.create_connection(("127.0.0.1", port), 10)
        with authority.client_context().wrap_socket(plain, server_hostname="localhost") as client:
            client.sendall(b"go")
            assert process.stdout.readline() == "written\n"
            process.send_signal(signal.SIGTERM)
            received = 0
            while chunk := client.recv(100_000):
                received += len(chunk)
            assert received == 3_000_000
        out, err = process.communicate(timeout=10)
    assert (out, err) == ("closed None\nover\n", "")


def test_new_connections_are_refused_from_the_first_signal_on() -> None:
    """While those that were made before still have their time."""
    with program(SERVER + "uvsock.run(main())") as process:
        port = int(process.first)  # type: ignore[attr-defined]
        assert process.stdout is not None
        with stdlib.create_connection(("127.0.0.1", port), 10) as client:
            client.sendall(b"go")
            assert process.stdout.readline() == "written\n"
            process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                try:
                    stdlib.create_connection(("127.0.0.1", port), 10).close()
                except OSError:
                    break
                time.sleep(0.01)
            else:
                pytest.fail("still accepts")
            assert process.poll() is None


def test_what_is_left_after_the_grace_time_is_terminated() -> None:
    text = "import uvsock._run\nuvsock._run._GRACE = 0.3\n" + SERVER
    with program(text + "uvsock.run(main())\nsay('over')") as process:
        port = int(process.first)  # type: ignore[attr-defined]
        assert process.stdout is not None
        with stdlib.create_connection(("127.0.0.1", port), 10) as client:
            client.sendall(b"go")  # and never reads
            assert process.stdout.readline() == "written\n"
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=4)
            assert 0.29 < time.monotonic() - started < 3
        assert (out, err) == ("closed None\nover\n", "")
        assert process.returncode == 0


def test_an_async_close_handler_that_never_returns_does_not_keep_it() -> None:
    text = """
import uvsock._run
uvsock._run._GRACE = uvsock._run._LAST_GRACE = 0.1
async def closed(socket, error):
    say("closing")
    await asyncio.sleep(60)
async def main():
    listener = await uvsock.listen({"data": ignore, "close": closed}, "127.0.0.1", 0)
    say(listener.port)
uvsock.run(main())
say("over")
"""
    with program(text) as process:
        port = int(process.first)  # type: ignore[attr-defined]
        with stdlib.create_connection(("127.0.0.1", port), 10) as client:
            process.send_signal(signal.SIGTERM)
            while client.recv(100):
                pass
        out, err = process.communicate(timeout=4)
    assert (out, err) == ("closing\nover\n", "")


def test_a_second_signal_terminates_at_once() -> None:
    with program(SERVER + "uvsock.run(main())\nsay('over')") as process:
        port = int(process.first)  # type: ignore[attr-defined]
        assert process.stdout is not None
        with stdlib.create_connection(("127.0.0.1", port), 10) as client:
            client.sendall(b"go")  # and never reads
            assert process.stdout.readline() == "written\n"
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            assert process.poll() is None
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=4)
            assert time.monotonic() - started < 3
        assert out == "closed None\nover\n"
        assert without_slowness(err) == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_main_runs_cancels_it(number: signal.Signals) -> None:
    text = """
async def main():
    say("running")
    try:
        await asyncio.sleep(60)
    finally:
        say("cleaned up")
try:
    say(uvsock.run(main()))
except KeyboardInterrupt:
    say("interrupted")
"""
    with program(text) as process:
        assert process.first == "running"  # type: ignore[attr-defined]
        process.send_signal(number)
        out, err = process.communicate(timeout=10)
    expected = "interrupted" if number == signal.SIGINT else "None"
    assert out == f"cleaned up\n{expected}\n"
    assert without_slowness(err) == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("outcome", ["returns", "raises"])
def test_a_main_that_is_cancelled_may_return_or_raise(number: signal.Signals, outcome: str) -> None:
    """Then that is what `run` does, as asyncio's own."""
    text = f"""
async def main():
    say("running")
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        {"return 'saved'" if outcome == "returns" else "raise LookupError('lost')"}
try:
    say(uvsock.run(main()))
except BaseException as error:
    say(repr(error))
"""
    with program(text) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=10)
    assert out == ("saved\n" if outcome == "returns" else "LookupError('lost')\n")
    assert without_slowness(err) == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_main_waits_for_a_connection(number: signal.Signals) -> None:
    text = """
async def main():
    with stdlib.create_server(("127.0.0.1", 0)) as server:
        asyncio.get_running_loop().call_soon(say, "running")
        await uvsock.connect({"data": ignore, "connect_error": lambda *a: say("error")},
                             "127.0.0.1", server.getsockname()[1], tls=True)
try:
    say(uvsock.run(main()))
except KeyboardInterrupt:
    say("interrupted")
"""
    with program(text) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=10)
    assert out == ("interrupted\n" if number == signal.SIGINT else "None\n")
    assert without_slowness(err) == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_main_that_takes_its_time_after_the_first(
    number: signal.Signals,
) -> None:
    """As the second Ctrl-C does in `asyncio.run`."""
    text = """
async def main():
    say("running")
    try:
        await asyncio.sleep(60)
    finally:
        say("cleaning up")
        await asyncio.sleep(60)
uvsock.run(main())
"""
    with program(text) as process:
        process.send_signal(number)
        assert process.stdout is not None
        assert process.stdout.readline() == "cleaning up\n"
        process.send_signal(number)
        process.communicate(timeout=10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_ignored_signal_stays_ignored(number: signal.Signals) -> None:
    """As `nohup` and shells do for programs in the background."""
    text = f"""
signal.signal({int(number)}, signal.SIG_IGN)
async def main():
    os.kill(os.getpid(), {int(number)})
    await asyncio.sleep(0.05)
    return "to the end"
say(uvsock.run(main()))
say(signal.getsignal({int(number)}) is signal.SIG_IGN)
"""
    assert finished(text) == "to the end\nTrue\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_loops_handler_that_main_adds_is_used(number: signal.Signals) -> None:
    text = f"""
async def main():
    loop = asyncio.get_running_loop()
    came = asyncio.Event()
    loop.add_signal_handler({int(number)}, came.set)
    os.kill(os.getpid(), {int(number)})
    await came.wait()
    await asyncio.sleep(0.02)
    return "to the end"
say(uvsock.run(main()))
"""
    assert finished(text) == "to the end\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_handler_that_main_installs_is_left_alone(number: signal.Signals) -> None:
    text = f"""
def mine(*arguments):
    say("mine")
async def main():
    signal.signal({int(number)}, mine)
    os.kill(os.getpid(), {int(number)})
    await asyncio.sleep(0.05)
    return "to the end"
say(uvsock.run(main()))
say(signal.getsignal({int(number)}) is mine)
"""
    assert finished(text) == "mine\nto the end\nTrue\n"


def test_signals_are_not_touched_in_a_thread_of_its_own() -> None:
    async def main() -> list[Any]:
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    results: list[Any] = []
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    thread = threading.Thread(target=lambda: results.append(uvsock.run(main())))
    thread.start()
    thread.join(20)
    assert results == [before]


def test_a_handler_of_the_programs_own_is_left_alone() -> None:
    text = """
came = []
def mine(*arguments):
    say("mine")
    came.append(arguments)
signal.signal(signal.SIGTERM, mine)
before = signal.getsignal(signal.SIGINT)
async def main():
    say("running")
    while not came:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.02)
    return "to the end"
say(uvsock.run(main()))
assert signal.getsignal(signal.SIGINT) is before
"""
    with program(text) as process:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=10)
    assert out == "mine\nto the end\n"
    assert without_slowness(err) == ""


def test_signals_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    async def main() -> None:
        assert signal.getsignal(signal.SIGTERM) != before[1]

    uvsock.run(main())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_it_is_used_under_asyncios_own_runner() -> None:
    async def main() -> int:
        async with await uvsock.listen({"data": lambda s, d: s.write(d)}, "127.0.0.1", 0) as server:
            socket = await uvsock.connect({"data": ignore}, "127.0.0.1", server.port)
            socket.write(b"x")
            while not socket.bytes_read:
                await asyncio.sleep(0.001)
            socket.end()
            await socket.wait_closed()
        return os.getpid()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()) == os.getpid()
