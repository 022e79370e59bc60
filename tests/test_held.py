"""What waits for the kernel: large ``bytes`` by reference, everything in order."""

from __future__ import annotations

import asyncio
import contextlib
import socket as stdlib
import sys
import tracemalloc
from collections.abc import AsyncIterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import uvsock
from conftest import SERVER_NAME, Authority, Recorder, Wire
from helpers import PATIENCE, ignore, stopped, until

LOOPS = {"uvsock": uvsock.new_event_loop}

BLOCK = bytes(range(250)) * 400


@contextlib.asynccontextmanager
async def pair(
    authority: Authority, kind: str, buffer: int = 0
) -> AsyncIterator[tuple[asyncio.Transport, asyncio.StreamReader]]:
    """A transport, with so small a send buffer, and a peer that reads little ahead."""
    ends = stdlib.socketpair() if kind == "unix" else tcp_pair()
    if buffer:
        ends[0].setsockopt(stdlib.SOL_SOCKET, stdlib.SO_SNDBUF, buffer)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1000)
    encrypted = kind == "tls"
    async with asyncio.timeout(PATIENCE):
        (transport, _), (peer, _) = await asyncio.gather(
            loop.connect_accepted_socket(
                asyncio.Protocol, ends[0], ssl=authority.server_context() if encrypted else None
            ),
            loop.create_connection(
                lambda: asyncio.StreamReaderProtocol(reader),
                sock=ends[1],
                ssl=authority.client_context() if encrypted else None,
                server_hostname=SERVER_NAME if encrypted else None,
            ),
        )
    try:
        yield transport, reader
    finally:
        transport.abort()
        peer.abort()


def tcp_pair() -> tuple[stdlib.socket, stdlib.socket]:
    with stdlib.create_server(("127.0.0.1", 0)) as server:
        client = stdlib.create_connection(server.getsockname())
        return server.accept()[0], client


@pytest.mark.parametrize("kind", ["tcp", "tls"])
async def test_one_object_written_often_is_in_memory_once(authority: Authority, kind: str) -> None:
    """1 GB of writes of one object of 100 kB, to a peer that reads nothing meanwhile."""
    times = 10_000
    async with pair(authority, kind) as (transport, reader):
        tracemalloc.start()
        try:
            for _ in range(times):
                transport.write(BLOCK)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert transport.get_write_buffer_size() > 900_000_000
        assert peak < 40_000_000
        async with asyncio.timeout(4 * PATIENCE):
            for _ in range(times):
                assert await reader.readexactly(len(BLOCK)) == BLOCK
        assert transport.get_write_buffer_size() == 0


KINDS = [bytes, bytearray, lambda data: memoryview(bytearray(data))]
# Around what is copied (16 KiB), what is encrypted at once (64 KiB) and the parts of one send (64).
SIZES = st.one_of(
    st.sampled_from([1, 16_383, 16_384, 16_385, 65_535, 65_536, 65_537, 200_000]),
    st.integers(1, 40_000),
)
WRITES = st.lists(
    st.tuples(SIZES, st.integers(0, len(KINDS) - 1), st.integers(1, 70)), min_size=1, max_size=6
)


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@pytest.mark.parametrize("kind", ["tcp", "unix", "tls"])
@given(writes=WRITES, paced=st.booleans())
def test_writes_of_all_sizes_arrive_in_order(
    authority: Authority, kind: str, writes: list[tuple[int, int, int]], paced: bool
) -> None:
    async def main() -> None:
        expected = bytearray()
        async with pair(authority, kind, 4096) as (transport, reader):
            for number, (size, of, times) in enumerate(writes):
                data = bytes([number]) + BLOCK * (size // len(BLOCK)) + BLOCK[: size % len(BLOCK)]
                for _ in range(times if size < 40_000 else 1):
                    transport.write(KINDS[of](data))
                    expected += data
                if paced:
                    await asyncio.sleep(0)
            async with asyncio.timeout(PATIENCE):
                assert await reader.readexactly(len(expected)) == expected
            assert transport.get_write_buffer_size() == 0

    with asyncio.Runner(loop_factory=uvsock.new_event_loop) as runner:
        runner.run(main())


@pytest.mark.parametrize("kind", ["tcp", "unix", "tls"])
async def test_a_buffer_may_change_after_the_write(authority: Authority, kind: str) -> None:
    async with pair(authority, kind, 4096) as (transport, reader):
        transport.write(BLOCK)
        for number in range(3):
            changing = bytearray(b"before" * 10_000)
            transport.write(memoryview(changing) if number else changing)
            changing[:] = b"behind" * 10_000
        async with asyncio.timeout(PATIENCE):
            assert await reader.readexactly(len(BLOCK)) == BLOCK
            assert await reader.readexactly(180_000) == b"before" * 30_000


@pytest.mark.parametrize("kind", ["tcp", "unix", "tls"])
async def test_what_waits_is_dropped_at_once(authority: Authority, kind: str) -> None:
    """And each of the references before, once that part has left."""
    block = bytes(100_000)
    before = sys.getrefcount(block)
    async with pair(authority, kind, 4096) as (transport, reader):
        for _ in range(20):
            transport.write(block)
        assert sys.getrefcount(block) >= before + 18
        async with asyncio.timeout(PATIENCE):
            await reader.readexactly(1_000_000)
        assert before < sys.getrefcount(block) <= before + 12
        transport.abort()
        assert sys.getrefcount(block) == before


async def test_parts_and_frames_wait_by_reference(wire: Wire) -> None:
    """`offset` and `length`, and what framing puts around."""
    block, whole = BLOCK[:-1] + b"!", Recorder()
    before = sys.getrefcount(block)
    listener = await wire.listen(Recorder().table(), high_water_mark=10_000_000)
    server = await wire.listen(
        whole.table(), framing=uvsock.LengthPrefixed(), high_water_mark=10_000_000
    )
    try:
        plain = await wire.connect(listener, {"data": ignore}, high_water_mark=10_000_000)
        framed = await wire.connect(
            server, {"data": ignore}, framing=uvsock.LengthPrefixed(), high_water_mark=10_000_000
        )
        await until(lambda: whole.sockets)
        whole.socket.pause()
        with plain.cork(), framed.cork():
            for number in range(80):
                plain.write(block, number, 50_000)
                framed.write_frame(block)
            held = sys.getrefcount(block) - before
            assert held > 20
        whole.socket.resume()
        await until(lambda: len(whole.received) == 80 * len(block))
        assert whole.received == block * 80
        await until(lambda: plain.writable_length == 0)
    finally:
        await stopped(listener)
        await stopped(server)
    assert sys.getrefcount(block) == before
