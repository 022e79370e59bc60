"""Handlers and waiting, as tests of many files need them. Fixtures and their parts: conftest."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import uvsock


def ignore(socket: uvsock.Socket[Any], *arguments: Any) -> None:
    """A handler of any event that does nothing."""


def echo(socket: uvsock.Socket[Any], data: bytes) -> None:
    """A handler of ``data`` that sends it back."""
    socket.write(data)


async def until(condition: Callable[[], object], timeout: float = 5.0) -> None:
    """Return once the condition is true; TimeoutError after ``timeout`` seconds."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.002)


async def soon(awaitable: Awaitable[Any], timeout: float = 5.0) -> Any:
    """The awaitable's result, or TimeoutError: no test may hang."""
    return await asyncio.wait_for(awaitable, timeout)


async def stopped(listener: uvsock.Listener) -> None:
    """Stop the listener and close its connections; return once all are gone."""
    listener.stop(True)
    await soon(listener.wait_closed())
