"""What the tests of a program get from uvsock.testing, and from its fixtures."""

from __future__ import annotations

import ssl
from typing import Any, assert_type

import uvsock
from uvsock.testing import Certificates, FaultProxy, Faults, pair, shrink_buffers
from uvsock.testing.plugin import MakePair, MakeProxy


def received(socket: uvsock.Socket[Any], data: bytes) -> None: ...


async def pairs(uvsock_pair: MakePair) -> None:
    a, b = await pair({"data": received}, {"data": received}, tls=True, high_water_mark=1)
    assert_type(a, uvsock.Socket[Any])
    shrink_buffers(a, b)
    c, _ = await uvsock_pair({"data": received}, {"data": received}, unix=True)
    assert_type(c, uvsock.Socket[Any])
    await pair({"data": received})  # type: ignore[call-arg]
    await pair({"data": received}, {"data": received}, tls="yes")  # type: ignore[arg-type]
    shrink_buffers(1)  # type: ignore[arg-type]


async def faults(listener: uvsock.Listener, uvsock_fault_proxy: MakeProxy) -> None:
    slow = Faults(chunk_size=1, delay=0.1, reset_after=10, stall_after=5)
    async with FaultProxy(listener, to_server=slow) as proxy:
        assert_type(proxy, FaultProxy)
        assert_type(proxy.port, int | None)
        proxy.inject(to_client=slow)
        proxy.reset()
    assert_type(await uvsock_fault_proxy(("localhost", 1), to_client=slow), FaultProxy)
    FaultProxy(5)  # type: ignore[arg-type]
    Faults(1)  # type: ignore[call-arg]


def certificates(uvsock_certificates: Certificates) -> None:
    made = Certificates("example.test")
    assert_type(made.server, uvsock.TLS)
    assert_type(made.client_context(), ssl.SSLContext)
    assert_type(uvsock_certificates.ca, bytes)
