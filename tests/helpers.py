"""Handlers and waiting, as tests of many files need them. Fixtures and their parts: conftest."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import uvsock

# Seconds. Less than the 30 that a socket lingers by default, which nothing may wait for unnoticed;
# more than a process may have to wait for its turn where tests run beside each other.
PATIENCE = 15.0


def ignore(socket: uvsock.Socket[Any], *arguments: Any) -> None:
    """A handler of any event that does nothing."""


def echo(socket: uvsock.Socket[Any], data: bytes) -> None:
    """A handler of ``data`` that sends it back."""
    socket.write(data)


async def until(condition: Callable[[], object], timeout: float = PATIENCE) -> None:
    """Return once the condition is true; TimeoutError after ``timeout`` seconds."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.002)


async def soon(awaitable: Awaitable[Any], timeout: float = PATIENCE) -> Any:
    """The awaitable's result, or TimeoutError: no test may hang."""
    return await asyncio.wait_for(awaitable, timeout)


async def stopped(listener: uvsock.Listener) -> None:
    """Stop the listener and close its connections; return once all are gone."""
    listener.stop(True)
    await soon(listener.wait_closed())
