"""Running a program until nothing is left that could still happen, as Bun does."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from uvsock._listener import LAST_GRACE
from uvsock._stream import LoopState, state_of
from uvsock.dropin.loop import new_event_loop

_T = TypeVar("_T")

# Seconds that sockets have to deliver what they accepted, after a signal or an error.
_GRACE = 5.0


def run(main: Coroutine[Any, Any, _T], *, debug: bool | None = None) -> _T | None:
    """Run a coroutine on a new ``Loop``, then go on while a referenced listener or socket lives.

    SIGINT and SIGTERM stop in order: listeners stop, sockets close and have 5 seconds to deliver
    what they accepted; a second signal terminates them at once. A handler that the program has
    installed for one of them is left alone.

    Args:
        main: the coroutine.
        debug: asyncio's debug mode; None for what the environment says.

    Returns:
        What ``main`` returned; None if SIGTERM ended it first.

    Raises:
        TypeError: ``main`` is no coroutine.
        RuntimeError: called while a loop runs in this thread.
        KeyboardInterrupt: SIGINT came before ``main`` had returned.
        BaseException: what ``main`` raised, or a handler if it was a ``SystemExit`` or
            ``KeyboardInterrupt``.
    """
    if not asyncio.iscoroutine(main):
        raise TypeError(f"main: must be a coroutine, not {type(main).__name__}")
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        main.close()
        raise RuntimeError("uvsock.run() cannot be called while an event loop is running")
    numbers = _free_signals()
    with asyncio.Runner(debug=debug, loop_factory=new_event_loop) as runner:
        return runner.run(_live(main, numbers))


def _free_signals() -> list[signal.Signals]:
    """The signals that the program has no handler of its own for."""
    if threading.current_thread() is not threading.main_thread():
        return []
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    return [number for number, default in defaults.items() if signal.getsignal(number) == default]


class _Signals:
    """What has come in, and a Future for each of the first two."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.first: asyncio.Future[signal.Signals] = loop.create_future()
        self.second: asyncio.Future[signal.Signals] = loop.create_future()
        self._installed: dict[signal.Signals, object] = {}

    def came(self, number: signal.Signals) -> None:
        if signal.getsignal(number) is not self._installed[number]:
            return  # the program has a handler of its own by now
        for future in (self.first, self.second):
            if not future.done():
                future.set_result(number)
                return

    @contextmanager
    def watched(
        self, loop: asyncio.AbstractEventLoop, numbers: list[signal.Signals]
    ) -> Iterator[None]:
        for number in numbers:
            loop.add_signal_handler(number, self.came, number)
            self._installed[number] = signal.getsignal(number)
        try:
            yield
        finally:
            for number in numbers:
                current = signal.getsignal(number)
                loop.remove_signal_handler(number)
                if current is not self._installed[number]:
                    signal.signal(number, current)


async def _live(main: Coroutine[Any, Any, _T], numbers: list[signal.Signals]) -> _T | None:
    loop = asyncio.get_running_loop()
    state = state_of(loop)
    signals = _Signals(loop)
    with signals.watched(loop, numbers):
        task = loop.create_task(main)
        try:
            await _first_of(task, signals.first)
            interrupted = not task.done()
            if interrupted:
                task.cancel()
                await _first_of(task, signals.second)
            if interrupted and (task.cancelled() or not task.done()):
                result = None
            else:
                result = task.result()
                interrupted = False
            while state.held and not signals.first.done():
                await _first_of(state.idle(), signals.first)
        finally:
            if not task.done():
                task.cancel()
            elif not task.cancelled():
                task.exception()  # a SystemExit has left the loop by itself: nobody looks at it
            # What is left when nothing is referenced is closed in order as well.
            await _stop(state, signals)
        if interrupted and signals.first.result() == signal.SIGINT:
            raise KeyboardInterrupt
        return result


async def _stop(state: LoopState, signals: _Signals) -> None:
    """Stop the listeners, close the sockets, and terminate what is left after a while."""
    for listener in list(state.listeners):
        listener.stop(True)
    if not state.groups:
        return
    for socket in _sockets(state):
        socket.close()
    await _emptied(state, _GRACE, signals)
    for socket in _sockets(state):
        socket.terminate()
    await _emptied(state, LAST_GRACE, signals)


def _sockets(state: LoopState) -> list[Any]:
    return [socket for group in state.groups for socket in group.sockets]


async def _emptied(state: LoopState, seconds: float, signals: _Signals) -> None:
    """Wait until no group has live sockets, for a while, or until a second signal."""
    groups = [group.when_empty() for group in state.groups]
    if not groups:
        return
    emptied = asyncio.get_running_loop().create_task(asyncio.wait(groups))
    await _first_of(emptied, signals.second, timeout=seconds)
    emptied.cancel()


async def _first_of(*futures: asyncio.Future[Any], timeout: float | None = None) -> None:
    await asyncio.wait(futures, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
