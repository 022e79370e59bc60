"""Fixtures for pytest with pytest-asyncio: ``pytest_plugins = ["uvsock.testing.plugin"]``.

They close what a test leaves open. The tests' loop has to be uvloop's.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Protocol

import pytest
import pytest_asyncio

from uvsock._listener import Listener
from uvsock._socket import Socket
from uvsock._types import HandlersLike
from uvsock.testing._certificates import Certificates
from uvsock.testing._faults import FaultProxy, Faults
from uvsock.testing._pair import pair


class MakePair(Protocol):
    """The type of the fixture ``uvsock_pair``."""

    def __call__(
        self,
        handlers_a: HandlersLike,
        handlers_b: HandlersLike,
        *,
        tls: bool | Certificates = False,
        unix: bool = False,
        **options: Any,
    ) -> Awaitable[tuple[Socket[Any], Socket[Any]]]:
        """Call ``uvsock.testing.pair``."""


class MakeProxy(Protocol):
    """The type of the fixture ``uvsock_fault_proxy``."""

    def __call__(
        self,
        target: Listener | tuple[str, int] | str,
        *,
        to_server: Faults | None = None,
        to_client: Faults | None = None,
    ) -> Awaitable[FaultProxy]:
        """Make a ``uvsock.testing.FaultProxy`` that listens."""


@pytest.fixture(scope="session")
def uvsock_certificates() -> Certificates:
    """``uvsock.testing.Certificates``, the same for all tests of a run."""
    return Certificates()


@pytest_asyncio.fixture
async def uvsock_pair() -> AsyncIterator[MakePair]:
    """``uvsock.testing.pair``; what it made is terminated when the test ends."""
    made: list[Socket[Any]] = []

    async def make(handlers_a: Any, handlers_b: Any, **options: Any) -> tuple[Any, Any]:
        both = await pair(handlers_a, handlers_b, **options)
        made.extend(both)
        return both

    yield make
    for socket in made:
        socket.terminate()
    for socket in made:
        await socket.wait_closed()


@pytest_asyncio.fixture
async def uvsock_fault_proxy() -> AsyncIterator[MakeProxy]:
    """``uvsock.testing.FaultProxy``, awaited; it is stopped when the test ends."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(target: Any, **faults: Any) -> FaultProxy:
            return await stack.enter_async_context(FaultProxy(target, **faults))

        yield make
