"""Framing: what is one frame, where frames are split, and what happens between two of them."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import ssl
import struct
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import uvsock
from conftest import Recorder, Wire
from helpers import soon, until
from uvsock import (
    Delimited,
    FixedSize,
    FrameError,
    Framer,
    FrameTooLargeError,
    LengthPrefixed,
    Lines,
    Netstring,
)
from uvsock._framing import FrameReader

BINARY_TYPES = {"bytes": bytes, "bytearray": bytearray, "memoryview": memoryview}
MIB = 1 << 20


class Tagged(Framer):
    """Frames of a tag, a length of two bytes and that many bytes: a framer in Python."""

    def __repr__(self) -> str:
        return f"Tagged(max_length={self.max_length})"

    def find(self, data: memoryview, searched: int = 0) -> tuple[int, int, int] | int | None:
        if len(data) < 3:
            return 3
        if data[0] != 0x54:
            raise FrameError(None, "a frame begins with T")
        size = 3 + int.from_bytes(data[1:3], "big")
        return size if len(data) < size else (3, size, size)

    def wrap(self, data: bytes) -> tuple[bytes, bytes]:
        return b"T" + len(data).to_bytes(2, "big"), b""


class Quoted(Framer):
    """Frames in quotes, found by a search: a framer in Python that says nothing of its needs."""

    def __repr__(self) -> str:
        return f"Quoted(max_length={self.max_length})"

    def find(self, data: memoryview, searched: int = 0) -> tuple[int, int, int] | int | None:
        for position in range(max(searched, 1), len(data)):
            if data[position] == 0x22:
                return 1, position, position + 1
        return None

    def wrap(self, data: bytes) -> tuple[bytes, bytes]:
        return b'"', b'"'


def collect(reader: FrameReader, *chunks: bytes, binary_type: Any = "bytes") -> list[bytes]:
    return [bytes(f) for chunk in chunks for f in reader.split(chunk, binary_type)]


def pieces(stream: bytes, size: int) -> list[bytes]:
    return [stream[i : i + size] for i in range(0, len(stream), size)]


# ── What a frame is ────────────────────────────────────────────────────────────────────────────

# A framer, what is received, the frames in it, and how many bytes are left over.
STREAMS: dict[str, tuple[Framer, bytes, list[bytes], int]] = {
    "lines": (Lines(), b"one\ntwo\r\n\n\r\n\r\r\nx\ry\nrest", [
        b"one", b"two", b"", b"", b"\r", b"x\ry",
    ], 4),
    "lines with ends": (Lines(keep_end=True), b"one\ntwo\r\n\n\r\nr", [
        b"one\n", b"two\r\n", b"\n", b"\r\n",
    ], 1),
    "delimited": (Delimited(b"\r\n\r\n"), b"a\r\nb\r\n\r\n\r\n\r\n\r\r\n\r\n\r\n", [
        b"a\r\nb", b"", b"\r",
    ], 2),
    "delimited with ends": (Delimited(b"--", keep_end=True), b"a--b---c--", [
        b"a--", b"b--", b"-c--",
    ], 0),
    "delimited by one byte": (Delimited(b"\0"), b"a\0\0bc\0", [b"a", b"", b"bc"], 0),
    "4 bytes": (LengthPrefixed(), b"\0\0\0\3abc\0\0\0\0\0\0\0\1d\0\0\0\2e", [b"abc", b"", b"d"], 5),
    "1 byte": (LengthPrefixed(1), b"\3abc\0\1d\2e", [b"abc", b"", b"d"], 2),
    "2 bytes, little": (LengthPrefixed(2, "little"), b"\3\0abc\0\0\1\0d\1", [b"abc", b"", b"d"], 1),
    "8 bytes, little": (LengthPrefixed(8, "little"), struct.pack("<Q", 1) + b"a", [b"a"], 0),
    "8 bytes, with prefix": (
        LengthPrefixed(8, include_prefix=True),
        struct.pack(">Q1sQ", 1, b"a", 0)[:9] + bytes(8),
        [struct.pack(">Q", 1) + b"a", bytes(8)],
        0,
    ),
    "counts itself": (
        LengthPrefixed(2, length_includes_prefix=True),
        b"\0\5abc\0\2\0\3d\0",
        [b"abc", b"", b"d"],
        1,
    ),
    "counts itself, with prefix": (
        LengthPrefixed(2, include_prefix=True, length_includes_prefix=True),
        b"\0\5abc\0\2",
        [b"\0\5abc", b"\0\2"],
        0,
    ),
    "varint": (
        LengthPrefixed("varint"),
        b"\3abc\0\x81\0d" + b"\xac\x02" + b"x" * 300 + b"\x80",
        [b"abc", b"", b"d", b"x" * 300],
        1,
    ),
    "varint, counts itself": (
        LengthPrefixed("varint", length_includes_prefix=True),
        b"\4abc\1" + b"\x82\x01" + b"x" * 128,
        [b"abc", b"", b"x" * 128],
        0,
    ),
    "fixed": (FixedSize(3), b"abcdefgh", [b"abc", b"def"], 2),
    "netstring": (Netstring(), b"3:abc,0:,12:hello world!,4:ab", [
        b"abc", b"", b"hello world!",
    ], 4),
    "Python, by length": (Tagged(), b"T\0\3abcT\0\0T\0\2x", [b"abc", b""], 4),
    "Python, by search": (Quoted(), b'"abc""""d', [b"abc", b""], 2),
}  # fmt: skip
CASES = pytest.mark.parametrize(
    ("framer", "stream", "frames", "left"), STREAMS.values(), ids=STREAMS.keys()
)


@pytest.mark.parametrize("binary_type", BINARY_TYPES)
@CASES
def test_frames_of_one_chunk(
    framer: Framer, stream: bytes, frames: list[bytes], left: int, binary_type: Any
) -> None:
    reader = FrameReader(framer)
    found = reader.split(stream, binary_type)
    assert {type(frame) for frame in found} == {BINARY_TYPES[binary_type]}
    assert [bytes(frame) for frame in found] == frames
    assert len(reader) == left


@CASES
def test_split_at_every_boundary(
    framer: Framer, stream: bytes, frames: list[bytes], left: int
) -> None:
    for binary_type in BINARY_TYPES:
        for size in range(1, min(len(stream), 40)):
            reader = FrameReader(framer)
            assert collect(reader, *pieces(stream, size), binary_type=binary_type) == frames
            assert len(reader) == left
        for first in range(len(stream) + 1):
            for second in range(first, min(len(stream), first + 6) + 1):
                parts = stream[:first], stream[first:second], stream[second:]
                reader = FrameReader(framer)
                assert collect(reader, *parts, binary_type=binary_type) == frames
                assert len(reader) == left


@CASES
def test_find_says_the_same_as_the_reader(
    framer: Framer, stream: bytes, frames: list[bytes], left: int
) -> None:
    found = []
    rest = stream
    while rest and isinstance(answer := framer.find(memoryview(rest)), tuple):
        start, stop, size = answer
        found.append(rest[start:stop])
        # Each byte less is not enough, and no more than that is asked for.
        for n in range(1, size):
            need = framer.find(memoryview(rest[:n]))
            assert need is None or (isinstance(need, int) and n < need <= size)
        rest = rest[size:]
    assert found == frames
    assert len(rest) == left


@CASES
def test_wrapped_frames_are_found_again(
    framer: Framer, stream: bytes, frames: list[bytes], left: int
) -> None:
    if getattr(framer, "keep_end", False) or getattr(framer, "include_prefix", False):
        pytest.skip("what is delivered is more than was written")
    frames = [frame for frame in frames if not frame.endswith(b"\r")]
    wire = b"".join(b"".join((*framer.wrap(frame)[:1], frame, framer.wrap(frame)[1]))
                    for frame in frames)  # fmt: skip
    reader = FrameReader(framer)
    assert collect(reader, wire) == frames
    assert len(reader) == 0


# ── Against a model ────────────────────────────────────────────────────────────────────────────

FRAMERS = [
    Lines(),
    Delimited(b"\r\n\r\n"),
    Delimited(b"aab"),
    *(LengthPrefixed(size, order) for size in (1, 2, 4, 8) for order in ("big", "little")),  # type: ignore[arg-type]
    *(LengthPrefixed(size, length_includes_prefix=True) for size in (1, 2, 4, 8, "varint")),  # type: ignore[arg-type]
    LengthPrefixed("varint"),
    Netstring(),
    Tagged(),
    Quoted(),
]
CONTENT = st.one_of(
    st.binary(max_size=20),
    st.sampled_from([b"", b"\r", b"a", b"aa", b"\r\n", b"\r\n\r", b"aaa"]),
    st.integers(100, 253).map(lambda n: b"x" * n),
    st.integers(400, 3000).map(lambda n: b"y" * n),
)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("framer", FRAMERS, ids=repr)
def test_any_frames_in_any_chunks(framer: Framer) -> None:
    @settings(max_examples=150, deadline=None, database=None)
    @given(
        contents=st.lists(CONTENT, max_size=12),
        sizes=st.lists(st.integers(0, 60) | st.integers(0, 5000), min_size=1, max_size=30),
        binary_type=st.sampled_from([*BINARY_TYPES]),
        keep=st.booleans(),
        rest=st.integers(0, 10),
    )
    def check(
        contents: list[bytes], sizes: list[int], binary_type: Any, keep: bool, rest: int
    ) -> None:
        stream, frames = b"", []
        last = 0
        for content in contents:
            if isinstance(framer, Lines) and content.endswith(b"\r"):
                continue
            if isinstance(framer, Quoted) and b'"' in content:
                continue
            try:
                before, behind = framer.wrap(content)
            except ValueError:
                continue  # it holds the delimiter, or is too long for the prefix
            stream += before + content + behind
            frames.append(content)
            last = len(before) + len(content) + len(behind)
        unfinished = 0
        if 0 < rest < last:  # the last one does not come to its end
            unfinished = last - rest
            stream = stream[:-rest]
            frames.pop()
        reader = FrameReader(framer)
        found: list[Any] = []
        position = 0
        for number in itertools.count():
            if position >= len(stream):
                break
            size = max(sizes[number % len(sizes)], 1 if number > 100 else 0)
            chunk = reader.split(stream[position : position + size], binary_type)
            found += chunk if keep else [bytes(frame) for frame in chunk]
            position += size
        assert [bytes(frame) for frame in found] == frames
        assert len(reader) == unfinished

    check()


@pytest.mark.timeout(240)
def test_changing_framers_on_the_way() -> None:
    """Each frame names the framing of the next one: what is behind it goes to the new framer."""
    names: dict[bytes, Framer] = {
        b"lines": Lines(),
        b"delimited": Delimited(b"\r\n.\r\n"),
        b"prefixed": LengthPrefixed(2, "little"),
        b"varint": LengthPrefixed("varint"),
        b"netstring": Netstring(),
        b"tagged": Tagged(),
    }

    async def talk(order: list[bytes], sizes: list[int]) -> None:
        stream, framer = b"", names[b"lines"]
        for name in order:
            before, behind = framer.wrap(name)
            stream += before + name + behind
            framer = names[name]
        received: list[bytes] = []

        def data(socket: uvsock.Socket[Any], frame: bytes) -> None:
            received.append(frame)
            socket.set_framing(names[frame])

        async with await uvsock.listen({"data": data}, "127.0.0.1", 0, framing=Lines()) as server:
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            position, number = 0, 0
            while position < len(stream):
                size = sizes[number % len(sizes)]
                writer.write(stream[position : position + size])
                await asyncio.sleep(0)
                position, number = position + size, number + 1
            await until(lambda: len(received) == len(order))
            writer.close()
            await writer.wait_closed()
        assert received == order

    @settings(max_examples=25, deadline=None, database=None)
    @given(
        order=st.lists(st.sampled_from([*names]), min_size=1, max_size=30),
        sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    )
    def check(order: list[bytes], sizes: list[int]) -> None:
        uvsock.run(talk(order, sizes))

    check()


# ── Work and memory ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("framer", "stream"),
    [
        (Lines(max_length=MIB), b"x" * MIB + b"\n"),
        (Delimited(b"\r\n\r\n", max_length=MIB), b"\r" * MIB + b"\r\n\r\n"),
        (LengthPrefixed(max_length=MIB), struct.pack(">I", MIB) + b"x" * MIB),
        (Netstring(max_length=MIB), b"%d:" % MIB + b"x" * MIB + b","),
    ],
    ids=["lines", "delimited", "prefixed", "netstring"],
)
def test_one_byte_at_a_time_stays_linear(framer: Framer, stream: bytes) -> None:
    reader = FrameReader(framer)
    started = time.process_time()
    frames = [frame for byte in pieces(stream, 1) for frame in reader.split(byte)]
    # About half a second; half an hour if each byte searched or moved all those before it.
    assert time.process_time() - started < 10
    assert [len(frame) for frame in frames] == [MIB]


class Counting(Framer):
    looks: int = 0

    def find(self, data: memoryview, searched: int = 0) -> tuple[int, int, int] | int | None:
        Counting.looks += 1
        return 1000 if len(data) < 1000 else (0, 1000, 1000)


def test_a_framer_that_says_its_need_is_not_asked_before() -> None:
    Counting.looks = 0
    assert len(collect(FrameReader(Counting()), *pieces(bytes(3000), 1))) == 3
    assert Counting.looks == 6


def test_what_is_searched_is_remembered() -> None:
    seen: list[tuple[int, int]] = []

    class Remembering(Quoted):
        def find(self, data: memoryview, searched: int = 0) -> Any:
            seen.append((len(data), searched))
            return super().find(data, searched)

    assert collect(FrameReader(Remembering()), b'"a', b"b", b'c""') == [b"abc"]
    assert seen == [(2, 0), (3, 2), (6, 3), (1, 0)]


def test_an_announced_length_takes_no_memory() -> None:
    tracemalloc.start()
    try:
        reader = FrameReader(LengthPrefixed(8, max_length=1 << 40))
        assert reader.split(struct.pack(">Q", 1 << 39) + b"x") == []
        assert tracemalloc.get_traced_memory()[1] < 2 * MIB
    finally:
        tracemalloc.stop()


# A frame that comes in pieces is copied once, to be in one piece, and once more for an object of
# its own. Memory for one more copy, or for half of one, would be seen.
COPIES = {"memoryview": 1, "bytes": 2, "bytearray": 2}


@pytest.mark.parametrize(("binary_type", "copies"), COPIES.items())
def test_a_large_frame_takes_the_memory_of_its_copies(binary_type: Any, copies: int) -> None:
    parts = pieces(struct.pack(">I", MIB) + bytes(MIB), 65536)
    reader = FrameReader(LengthPrefixed())
    tracemalloc.start()
    try:
        frames = [frame for part in parts for frame in reader.split(part, binary_type)]
        assert [len(frame) for frame in frames] == [MIB]
        assert tracemalloc.get_traced_memory()[1] < copies * MIB + MIB // 4
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("binary_type", "copies"), COPIES.items())
async def test_a_large_frame_from_a_socket_takes_the_memory_of_its_copies(
    tcp_wire: Wire, binary_type: Any, copies: int
) -> None:
    stream = struct.pack(">I", MIB) + bytes(MIB)
    sizes: list[int] = []
    peaks: list[int] = []

    def data(socket: uvsock.Socket[Any], frame: bytes) -> None:
        sizes.append(len(frame))
        peaks.append(tracemalloc.get_traced_memory()[1])

    options = {"framing": LengthPrefixed(), "binary_type": binary_type}
    async with await tcp_wire.listen({"data": data}, **options) as listener:
        with tcp_wire.dial(listener) as sock:
            tracemalloc.start()
            try:
                await soon(asyncio.to_thread(sock.sendall, stream))
                await until(lambda: sizes)
            finally:
                tracemalloc.stop()
    assert sizes == [MIB]
    # And the chunk that was read last, which is borrowed memory for a memoryview.
    assert peaks[0] < copies * MIB + MIB // 2


@pytest.mark.parametrize("framer", [Lines(), LengthPrefixed(1)], ids=repr)
def test_a_small_rest_keeps_little_memory(framer: Framer) -> None:
    stream = (b"\x13" + b"x" * 18 + b"\n") * 20_000 + b"\x13yy"
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        reader = FrameReader(framer)
        assert len(collect(reader, stream[:7], stream[7:])) == 20_000
        assert len(reader) == 3
        assert tracemalloc.get_traced_memory()[0] - before < 16_384
    finally:
        tracemalloc.stop()


def test_a_frame_that_is_the_chunk_is_not_copied() -> None:
    chunk = b"x" * 1000
    (frame,) = FrameReader(FixedSize(1000)).split(chunk)
    assert frame is chunk
    (frame,) = FrameReader(None).split(chunk)
    assert frame is chunk


def test_views_of_kept_frames_never_change() -> None:
    reader = FrameReader(Lines())
    kept: list[Any] = []
    expected: list[bytes] = []
    for number in range(300):
        line = b"%d" % number * (number % 7 + 1)
        for part in pieces(line + b"\n" + b"q" * (number % 3) + b"\n", number % 5 + 1):
            kept += reader.split(part, "memoryview")
        expected += [line, b"q" * (number % 3)]
    assert [bytes(view) for view in kept] == expected


# ── Limits, and what is no frame ───────────────────────────────────────────────────────────────

LIMITED: list[tuple[Framer, bytes, bytes]] = [
    # With a frame of 10 bytes, and with one of 11.
    (Lines(max_length=10), b"x" * 10 + b"\r\n", b"x" * 11 + b"\n"),
    (Lines(keep_end=True, max_length=10), b"x" * 10 + b"\n", b"x" * 11 + b"\r\n"),
    (Delimited(b"<>", max_length=10), b"x" * 10 + b"<>", b"x" * 11 + b"<>"),
    (LengthPrefixed(max_length=10), b"\0\0\0\x0a" + b"x" * 10, b"\0\0\0\x0b"),
    (LengthPrefixed(8, max_length=10), bytes(7) + b"\x0a" + b"x" * 10, b"\xff" * 8),
    (LengthPrefixed(1, length_includes_prefix=True, include_prefix=True, max_length=10),
     b"\x0b" + b"x" * 10, b"\x0c"),
    (LengthPrefixed("varint", max_length=10), b"\x0a" + b"x" * 10, b"\x0b"),
    (Netstring(max_length=10), b"10:" + b"x" * 10 + b",", b"11"),
    (Tagged(max_length=10), b"T\0\7" + b"x" * 7, b"T\0\x08"),
    (Quoted(max_length=10), b'"' + b"x" * 8 + b'"', b'"' + b"x" * 10),
]  # fmt: skip


@pytest.mark.parametrize(
    ("framer", "longest", "longer"), LIMITED, ids=[repr(c[0]) for c in LIMITED]
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_max_length(framer: Framer, longest: bytes, longer: bytes, size: int) -> None:
    assert framer.max_length == 10
    reader = FrameReader(framer)
    assert len(collect(reader, *pieces(longest, size))) == 1
    with pytest.raises(FrameTooLargeError, match=r"max_length \(10 bytes\)"):
        collect(reader, *pieces(longer, size))


@pytest.mark.parametrize("framer", [Lines(max_length=10), Delimited(b"\r\n", max_length=10),
                                    Quoted(max_length=10)], ids=repr)  # fmt: skip
def test_max_length_without_an_end_in_sight(framer: Framer) -> None:
    reader = FrameReader(framer)
    with pytest.raises(FrameTooLargeError):
        for _ in range(13):
            reader.split(b"x")
    assert len(reader) <= 13


@pytest.mark.parametrize(
    ("framer", "stream"),
    [
        (LengthPrefixed("varint"), b"\x80" * 9 + b"\x02"),
        (LengthPrefixed("varint"), b"\xff" * 10),
        (LengthPrefixed(2, length_includes_prefix=True), b"\0\1"),
        (Netstring(), b"05:hello,"),
        (Netstring(), b":,"),
        (Netstring(), b"-1:,"),
        (Netstring(), b"5hello,"),
        (Netstring(), b"5:hello;"),
        (Tagged(), b"X\0\0"),
    ],
)
@pytest.mark.parametrize("size", [1, 100])
def test_no_frame(framer: Framer, stream: bytes, size: int) -> None:
    with pytest.raises(FrameError) as caught:
        collect(FrameReader(framer), *pieces(stream, size))
    assert not isinstance(caught.value, FrameTooLargeError)


@pytest.mark.parametrize("answer", [
    (0, 1, 0), (0, 5, 3), (2, 1, 3), (-1, 1, 1), (0, 1, 100), (0, 1), "no",
    (0, 1, 1 << 70), 1 << 70,
])  # fmt: skip
def test_a_framer_that_answers_nonsense(answer: Any) -> None:
    class Wrong(Framer):
        def find(self, data: memoryview, searched: int = 0) -> Any:
            return answer

    with pytest.raises((ValueError, TypeError, OverflowError)):
        FrameReader(Wrong()).split(b"abcd")


def test_a_framer_that_says_nothing() -> None:
    class Silent(Framer):
        def __init__(self) -> None:  # without calling the one of Framer
            pass

    assert Silent().max_length == 65536
    for framer in (Silent(), Framer()):
        with pytest.raises(NotImplementedError, match="has no find"):
            framer.find(memoryview(b"x"))
        with pytest.raises(NotImplementedError, match="has no wrap"):
            framer.wrap(b"x")


@pytest.mark.parametrize(
    ("framer", "data"),
    [
        (Lines(), b"a\nb"),
        (Delimited(b"\r\n"), b"a\r\nb"),
        (Delimited(b"\r\n\r\n"), b"a\r\n"),
        (Delimited(b"aa"), b"a"),
        (Delimited(b"abab"), b"xab"),
        (LengthPrefixed(1), b"x" * 256),
        (LengthPrefixed(1, length_includes_prefix=True), b"x" * 255),
        (LengthPrefixed(2), b"x" * 65536),
        (FixedSize(3), b"ab"),
    ],
)
def test_frames_that_cannot_be_written(framer: Framer, data: bytes) -> None:
    with pytest.raises(ValueError, match="^data: must"):
        framer.wrap(data)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Lines(1), TypeError, "keep_end: must be True or False"),
        (lambda: Lines(max_length=0), ValueError, "max_length: must be"),
        (lambda: Lines(max_length=1 << 70), ValueError, "max_length: must be"),
        (lambda: Lines(max_length="1"), TypeError, "max_length: must be"),
        (lambda: Delimited(), TypeError, "argument"),
        (lambda: Delimited("x"), TypeError, "delimiter: must be a bytes-like object, not str"),
        (lambda: Delimited(b""), ValueError, "delimiter: must be at least one byte"),
        (lambda: LengthPrefixed(3), ValueError, "size: must be 1, 2, 4, 8 or 'varint'"),
        (lambda: LengthPrefixed(True), TypeError, "size: must be"),
        (lambda: LengthPrefixed("long"), ValueError, "size: must be"),
        (lambda: LengthPrefixed(4, "middle"), ValueError, "byteorder: must be 'big' or 'little'"),
        (lambda: LengthPrefixed(include_prefix=1), TypeError, "include_prefix: must be"),
        (lambda: LengthPrefixed(length_includes_prefix=0), TypeError, "length_includes_prefix"),
        (lambda: FixedSize(0), ValueError, "size: must be"),
        (lambda: FixedSize(1.5), TypeError, "size: must be"),
        (lambda: Netstring(max_length=-1), ValueError, "max_length: must be"),
        (lambda: Framer(max_length=None), TypeError, "max_length: must be"),
    ],
)
def test_wrong_arguments(make: Callable[[], Framer], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    "framer",
    [
        Lines(True, 5),
        Delimited(b"--", max_length=7),
        LengthPrefixed("varint", "little", True, 9, True),
        FixedSize(3),
        Netstring(11),
    ],
    ids=repr,
)
def test_shown_as_it_is_made(framer: Framer) -> None:
    assert repr(eval(repr(framer))) == repr(framer)
    with pytest.raises(AttributeError):
        framer.max_length = 3  # type: ignore[misc]


@pytest.mark.parametrize("wrong", [Lines, "lines", b"\n", 4, True, ()])
def test_framing_that_is_none(wrong: Any) -> None:
    for call in (uvsock.listen, uvsock.connect):
        with pytest.raises(TypeError, match="^framing: must be a Framer, such as Lines"):
            call({"data": print}, "localhost", 1, framing=wrong)


# ── On a socket ────────────────────────────────────────────────────────────────────────────────


def echo(socket: uvsock.Socket[Any], frame: bytes) -> None:
    assert socket.write_frame(frame) > 0


@pytest.mark.parametrize("binary_type", BINARY_TYPES)
@pytest.mark.parametrize(
    "framer",
    [Lines(), Delimited(b"\r\n\r\n"), LengthPrefixed(), LengthPrefixed("varint"), Netstring(),
     Tagged()],
    ids=repr,
)  # fmt: skip
async def test_echo(wire: Wire, framer: Framer, binary_type: Any) -> None:
    frames = [b"", b"one", b"x" * 5000, b"", b"y" * 60_000, *(b"%d" % n for n in range(200))]
    types: set[type] = set()
    received: list[bytes] = []

    def data(socket: uvsock.Socket[Any], frame: bytes) -> None:
        types.add(type(frame))
        echo(socket, frame)

    def opened(socket: uvsock.Socket[Any]) -> None:
        for frame in frames:
            assert socket.write_frame(frame) > len(frame)

    client = {"open": opened, "data": lambda socket, frame: received.append(bytes(frame))}
    async with await wire.listen({"data": data}, framing=framer, binary_type=binary_type,
                                 high_water_mark=MIB) as server:  # fmt: skip
        socket = await wire.connect(
            server, client, framing=framer, binary_type=binary_type, high_water_mark=MIB
        )
        assert socket.framing is framer
        await until(lambda: len(received) >= len(frames))
        socket.close()
        await soon(socket.wait_closed())
    assert received == frames
    assert types == {BINARY_TYPES[binary_type]}


@pytest.mark.parametrize("binary_type", BINARY_TYPES)
async def test_huge_frames_between_small_ones(wire: Wire, binary_type: Any) -> None:
    sizes = [3, 4 * MIB, 0, MIB + 1, 5]
    received: list[int] = []

    def data(socket: uvsock.Socket[Any], frame: bytes) -> None:
        received.append(len(frame))
        assert bytes(frame) == b"z" * len(frame)
        if len(received) == len(sizes):
            socket.end()

    async with await wire.listen({"data": data}, framing=LengthPrefixed(),
                                 binary_type=binary_type) as server:  # fmt: skip
        reader, writer = await wire.streams(server)
        for size in sizes:
            writer.write(struct.pack(">I", size) + b"z" * size)
        assert await soon(reader.read(), 20) == b""
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    assert received == sizes


async def test_replies_to_frames_of_one_chunk_leave_in_one_send(plain_wire: Wire) -> None:
    chunks: list[bytes] = []
    async with await plain_wire.listen({"data": echo}, framing=Lines()) as server:
        socket = await plain_wire.connect(server, {"data": lambda s, d: chunks.append(d)})
        socket.write(b"".join(b"%d\n" % n for n in range(50)))
        await until(lambda: chunks)
        await asyncio.sleep(0.02)
        assert chunks == [b"".join(b"%d\n" % n for n in range(50))]
        socket.close()
        await soon(socket.wait_closed())


@pytest.mark.parametrize("binary_type", BINARY_TYPES)
async def test_end_inside_a_frame(wire: Wire, binary_type: Any) -> None:
    seen: list[Any] = []
    table = {
        "data": lambda socket, frame: seen.append((bytes(frame), socket.unframed)),
        "end": lambda socket: seen.append(socket.unframed),
        "close": lambda socket, error: seen.append((socket.unframed, error)),
    }
    async with await wire.listen(table, framing=Lines(), binary_type=binary_type) as server:
        socket = await wire.connect(server, {"data": print})
        socket.end(b"one\ntwo\nunfinished")
        await until(lambda: len(seen) == 4)
    assert seen == [(b"one", 14), (b"two", 10), 10, (10, None)]


async def test_end_between_frames(wire: Wire) -> None:
    left: list[int] = []
    table = {"data": echo, "end": lambda socket: left.append(socket.unframed)}
    async with await wire.listen(table, framing=Lines()) as server:
        reader, writer = await wire.streams(server)
        writer.write(b"one\n")
        if wire.encrypted:
            assert await reader.readline() == b"one\n"
            writer.close()
        else:
            writer.write_eof()
            assert await soon(reader.read()) == b"one\n"
            writer.close()
        await until(lambda: left)
    assert left == [0]


async def test_frame_too_large(wire: Wire) -> None:
    recorder = Recorder(
        data=lambda socket, frame: socket.write_frame(frame),
        error=lambda socket, error: socket.write("too long\n"),
    )
    async with await wire.listen(recorder.table(), framing=Lines(max_length=10)) as server:
        reader, writer = await wire.streams(server)
        writer.write(b"short\n" + b"x" * 11 + b"\nnever\n")
        # What the handlers wrote still arrives.
        assert await soon(reader.read()) == b"short\ntoo long\n"
        writer.close()
        await until(lambda: "close" in recorder.events)
    assert recorder.received == b"short"
    assert [type(error) for error in recorder.errors] == [FrameTooLargeError]
    assert "max_length (10 bytes)" in str(recorder.errors[0])
    assert recorder.events[-2:] == ["error", "close"]
    assert "end" not in recorder.events


async def test_frame_too_large_without_an_error_handler(
    wire: Wire, loop_errors: list[dict[str, Any]]
) -> None:
    async with await wire.listen({"data": echo}, framing=Lines(max_length=10)) as server:
        reader, writer = await wire.streams(server)
        writer.write(b"x" * 20)
        assert await soon(reader.read()) == b""
        writer.close()
    (context,) = loop_errors
    assert isinstance(context["exception"], FrameTooLargeError)
    assert context["handler"] is None
    assert "framer" in context["message"]


async def test_an_async_error_handler_can_still_reply(wire: Wire) -> None:
    async def error(socket: uvsock.Socket[Any], error: Exception) -> None:
        await asyncio.sleep(0.01)
        socket.write("too long\n")

    async with await wire.listen(
        {"data": echo, "error": error}, framing=Lines(max_length=10)
    ) as server:
        reader, writer = await wire.streams(server)
        writer.write(b"x" * 20 + b"\nnever\n")
        assert await soon(reader.read()) == b"too long\n"
        writer.close()


@pytest.mark.parametrize(
    "digits", ["46116860184273879040", "93" + "0" * 17, "13835058055282163712", "9" * 40]
)
def test_the_length_of_a_netstring_does_not_overflow(digits: str) -> None:
    with pytest.raises(FrameTooLargeError):
        Netstring(max_length=2**62).find(f"{digits}:x,".encode())


@pytest.mark.parametrize("framer", [Lines(), Delimited(b"\r\n"), FixedSize(2)], ids=repr)
@pytest.mark.parametrize("searched", [-1, 4, 10**12, 10**30])
def test_find_looks_at_nothing_outside_the_data(framer: Framer, searched: int) -> None:
    with pytest.raises(ValueError, match="^searched: must be"):
        framer.find(b"abc", searched)


async def test_a_framer_that_raises(wire: Wire) -> None:
    class Broken(Framer):
        def find(self, data: memoryview, searched: int = 0) -> Any:
            raise ZeroDivisionError

    recorder = Recorder()
    async with await wire.listen(recorder.table(), framing=Broken()) as server:
        reader, writer = await wire.streams(server)
        writer.write(b"x")
        assert await soon(reader.read()) == b""
        writer.close()
        await until(lambda: "close" in recorder.events)
    assert [type(error) for error in recorder.errors] == [ZeroDivisionError]


# ── Between two frames ─────────────────────────────────────────────────────────────────────────

SIX = b"".join(b"%d\n" % n for n in range(6))


async def frames_with(
    wire: Wire, data: Callable[[uvsock.Socket[Any], bytes], Any], *, binary_type: Any = "bytes",
    stop: int = 6, **others: Any,
) -> list[bytes]:  # fmt: skip
    """The frames that a handler is called with, until the socket is closed."""
    received: list[bytes] = []
    closed = asyncio.get_running_loop().create_future()

    def handle(socket: uvsock.Socket[Any], frame: bytes) -> Any:
        received.append(bytes(frame))
        return data(socket, frame)

    async def handle_async(socket: uvsock.Socket[Any], frame: bytes) -> None:
        await handle(socket, frame)

    table = {
        "data": handle_async if inspect.iscoroutinefunction(data) else handle,
        "close": lambda socket, error: closed.set_result(None),
        **others,
    }
    async with await wire.listen(table, framing=Lines(), binary_type=binary_type) as server:
        socket = await wire.connect(server, {"data": lambda s, d: None})
        socket.end(SIX)
        await soon(closed)
        await soon(socket.wait_closed())
    return received


ALL = [b"%d" % n for n in range(6)]


@pytest.mark.parametrize("binary_type", BINARY_TYPES)
async def test_pause_after_each_frame(wire: Wire, binary_type: Any) -> None:
    loop = asyncio.get_running_loop()
    ended: list[int] = []

    def data(socket: uvsock.Socket[Any], frame: bytes) -> None:
        socket.pause()
        loop.call_later(0.005, socket.resume)

    received = await frames_with(
        wire, data, binary_type=binary_type, end=lambda socket: ended.append(socket.unframed)
    )
    assert received == ALL
    assert ended == [0]


@pytest.mark.parametrize("binary_type", BINARY_TYPES)
async def test_async_handlers_one_after_another(wire: Wire, binary_type: Any) -> None:
    running = 0
    shown: list[bytes] = []

    async def data(socket: uvsock.Socket[Any], frame: bytes) -> None:
        nonlocal running
        running += 1
        assert running == 1
        await asyncio.sleep(0.002)
        shown.append(bytes(frame))
        running -= 1

    assert await frames_with(wire, data, binary_type=binary_type) == ALL
    assert shown == ALL


@pytest.mark.parametrize("way", ["close", "terminate", "end", "read"])
async def test_closed_between_frames(wire: Wire, way: str) -> None:
    def data(socket: uvsock.Socket[Any], frame: bytes) -> None:
        if frame == b"2":
            if way == "read":
                socket.shutdown(read=True)
            else:
                getattr(socket, way)()

    received = await frames_with(wire, data)
    assert received == (ALL if way == "end" else ALL[:3])


async def test_reloaded_between_frames(wire: Wire) -> None:
    later: list[bytes] = []

    def data(socket: uvsock.Socket[Any], frame: bytes) -> None:
        if frame == b"2":
            socket.reload({
                "data": lambda socket, frame: later.append(frame),
                "close": lambda socket, error: closed.set(),
            })  # fmt: skip

    closed = asyncio.Event()
    async with await wire.listen({"data": data}, framing=Lines()) as server:
        socket = await wire.connect(server, {"data": print})
        socket.end(SIX)
        await soon(closed.wait())
        await soon(socket.wait_closed())
    assert later == ALL[3:]


async def test_a_handler_that_raises_between_frames(wire: Wire) -> None:
    errors: list[Exception] = []

    def data(socket: uvsock.Socket[Any], frame: bytes) -> None:
        if frame == b"2":
            raise ZeroDivisionError

    received = await frames_with(wire, data, error=lambda socket, error: errors.append(error))
    assert received == ALL
    assert [type(error) for error in errors] == [ZeroDivisionError]


@pytest.mark.parametrize("binary_type", BINARY_TYPES)
@pytest.mark.parametrize(
    ("framer", "sent"),
    [
        (Lines(max_length=40), b"a\n" + b"x" * 100),
        (Delimited(b"\r\n", max_length=40), b"a\r\n" + b"x" * 100),
        (LengthPrefixed(1, max_length=40), b"\1a\x60"),
        (LengthPrefixed("varint"), b"\1a" + b"\xff" * 11),
        (Netstring(), b"1:a,9x"),
    ],
    ids=lambda value: repr(value)[:24],
)
async def test_a_bad_frame_behind_one_whose_handler_raises(
    wire: Wire, framer: Framer, sent: bytes, binary_type: Any
) -> None:
    """Each error is told once, and the connection is closed."""
    errors: list[Exception] = []
    closed = asyncio.get_running_loop().create_future()

    def data(socket: uvsock.Socket[Any], frame: Any) -> None:
        raise ZeroDivisionError

    def error(socket: uvsock.Socket[Any], error: Exception) -> None:
        errors.append(error)
        assert len(errors) < 10

    table = {"data": data, "error": error, "close": lambda *_: closed.set_result(None)}
    async with await wire.listen(table, framing=framer, binary_type=binary_type) as server:
        socket = await wire.connect(server, {"data": lambda s, d: None})
        socket.write(sent)
        await soon(closed)
        await soon(socket.wait_closed())
    assert len(errors) == 2
    assert isinstance(errors[0], ZeroDivisionError)
    assert isinstance(errors[1], FrameError)


async def test_framing_taken_away_between_frames(wire: Wire) -> None:
    def data(socket: uvsock.Socket[Any], frame: bytes) -> None:
        if frame == b"2":
            socket.set_framing()
            assert socket.framing is None
            with pytest.raises(RuntimeError, match="no framing"):
                socket.write_frame(b"x")

    assert b"".join(await frames_with(wire, data)) == b"012" + b"3\n4\n5\n"


async def test_framing_set_while_paused(wire: Wire) -> None:
    """What is held of an unfinished frame goes to the new framer too."""
    received: list[bytes] = []
    async with await wire.listen(
        {"data": lambda socket, frame: received.append(frame)}, framing=Lines()
    ) as server:
        _, writer = await wire.streams(server)
        writer.write(b"one;two;thr")
        await until(lambda: server.stats.bytes_read == 11)
        (socket,) = server.sockets
        assert socket.unframed == 11
        socket.set_framing(Delimited(b";"))
        assert received == []  # not before this returns
        await until(lambda: len(received) == 2)
        writer.write(b"ee;")
        await until(lambda: len(received) == 3)
        with pytest.raises(TypeError, match="^framing: must be"):
            socket.set_framing(Lines)  # type: ignore[arg-type]
        socket.set_framing(None)
        writer.write(b"raw")
        await until(lambda: len(received) == 4)
        writer.close()
        await until(lambda: not server.connections)
        socket.set_framing(Lines())  # of no use any more, and no error
    assert received == [b"one", b"two", b"three", b"raw"]


async def test_framing_set_from_the_beginning(wire: Wire) -> None:
    received: list[bytes] = []
    table = {
        "open": lambda socket: socket.set_framing(FixedSize(2)),
        "data": lambda socket, frame: received.append(frame),
    }
    async with await wire.listen(table) as server:
        socket = await wire.connect(server, {"data": print})
        socket.end(b"aabbc")
        await soon(socket.wait_closed())
    assert received == [b"aa", b"bb"]


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_views_are_released_after_each_frame(wire: Wire, asynchronous: bool) -> None:
    views: list[memoryview] = []
    slices: list[memoryview] = []

    def look(socket: uvsock.Socket[Any], frame: Any) -> None:
        for view in views[:-1]:
            with pytest.raises(ValueError, match="released"):
                len(view)
        views.append(frame)
        slices.append(frame[:1])

    async def wait(socket: uvsock.Socket[Any], frame: Any) -> None:
        look(socket, frame)
        await asyncio.sleep(0)
        assert bytes(frame) == ALL[len(views) - 1]

    received = await frames_with(wire, wait if asynchronous else look, binary_type="memoryview")
    assert received == ALL
    assert [bytes(view) for view in slices] == ALL


async def test_a_view_is_good_until_the_error_of_its_handler_was_told(wire: Wire) -> None:
    views: list[memoryview] = []
    told: list[bytes] = []

    def data(socket: uvsock.Socket[Any], frame: Any) -> None:
        views.append(frame)
        raise ZeroDivisionError

    def error(socket: uvsock.Socket[Any], error: Exception) -> None:
        told.append(bytes(views[-1]))

    received = await frames_with(wire, data, error=error, binary_type="memoryview")
    assert received == told == ALL
    for view in views:
        with pytest.raises(ValueError, match="released"):
            len(view)


async def test_tls_starts_behind_a_frame(plain_wire: Wire) -> None:
    """What a framer holds already of the TLS session is taken by the upgrade itself."""
    options = plain_wire.authority.server_options
    received: list[bytes] = []

    def data(socket: uvsock.Socket[Any], frame: bytes) -> None:
        received.append(frame)
        if frame == b"STARTTLS":
            socket.write_frame("go")
            socket.upgrade_tls(options)
            assert socket.framing is None
            socket.set_framing(LengthPrefixed(1))

    context = plain_wire.authority.client_context()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    session = context.wrap_bio(incoming, outgoing, server_hostname="uvsock.test")
    with contextlib.suppress(ssl.SSLWantReadError):
        session.do_handshake()
    async with await plain_wire.listen({"data": data}, framing=Lines()) as server:
        reader, writer = await plain_wire.streams(server)
        # The command and the beginning of the handshake in one segment.
        writer.write(b"hello\nSTARTTLS\n" + outgoing.read())
        assert await soon(reader.readline()) == b"go\n"
        while True:
            try:
                session.do_handshake()
                break
            except ssl.SSLWantReadError:
                incoming.write(await soon(reader.read(65536)))
        session.write(b"\3one\3two")
        writer.write(outgoing.read())
        await until(lambda: len(received) == 4)
        writer.close()
    assert received == [b"hello", b"STARTTLS", b"one", b"two"]


# ── Writing ────────────────────────────────────────────────────────────────────────────────────


async def test_write_frame_takes_what_write_takes(wire: Wire) -> None:
    def opened(socket: uvsock.Socket[Any]) -> None:
        assert socket.write_frame("é") == 3
        assert socket.write_frame(bytearray(b"ab")) == 3
        assert socket.write_frame(memoryview(b"cd")) == 3
        assert socket.write_frame(b"") == 1
        for wrong in (None, 1, ["x"]):
            with pytest.raises(TypeError, match="^data: must be"):
                socket.write_frame(wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="contiguous"):
            socket.write_frame(memoryview(b"abcd")[::2])
        with pytest.raises(ValueError, match="line feed"):
            socket.write_frame(b"a\nb")
        assert socket.bytes_written == 10
        socket.end()
        assert socket.write_frame(b"x") == -1

    async with await wire.listen({"open": opened, "data": print}, framing=Lines()) as server:
        reader, writer = await wire.streams(server)
        assert await soon(reader.read()) == "é\nab\ncd\n\n".encode()
        writer.close()


async def test_no_framing_to_write_with(wire: Wire) -> None:
    async with await wire.listen({"data": print}) as server:
        socket = await wire.connect(server, {"data": print})
        assert socket.framing is None
        assert socket.unframed == 0
        with pytest.raises(RuntimeError, match="no framing"):
            socket.write_frame(b"x")
        socket.close()
        await soon(socket.wait_closed())


@pytest.mark.parametrize("cork", [True, False])
@pytest.mark.parametrize("size", [5000, 300_000])
async def test_back_pressure_never_tears_a_frame(wire: Wire, size: int, cork: bool) -> None:
    total = 40
    sent = refused = 0

    def fill(socket: uvsock.Socket[Any]) -> None:
        nonlocal sent, refused
        while sent < total:
            taken = socket.write_frame(bytes([sent]) * size)
            if taken == 0:
                refused += 1
                return
            assert taken == size + 4
            assert socket.writable_length <= max(20_000, size + 4)
            sent += 1
        socket.end()

    async with await wire.listen(
        {"open": fill, "drain": fill, "data": print},
        framing=LengthPrefixed(), high_water_mark=20_000, cork=cork,
    ) as server:  # fmt: skip
        received = await wire.receive_all(server)
    frames = collect(FrameReader(LengthPrefixed()), received)
    assert [frame == bytes([n]) * size for n, frame in enumerate(frames)] == [True] * total
    assert refused or size < 100_000


@pytest.mark.parametrize("cork", [True, False])
async def test_frames_written_outside_handlers(wire: Wire, cork: bool) -> None:
    received = bytearray()
    async with await wire.listen({"data": lambda socket, data: received.extend(data)}) as server:
        socket = await wire.connect(server, {"data": print}, framing=Netstring(), cork=cork)
        for size in (0, 3, 100, 40_000):
            assert socket.write_frame(b"x" * size) > 0
        with socket.cork():
            socket.write_frame(b"corked")
        await until(lambda: received.endswith(b"6:corked,"))
        socket.close()
        await soon(socket.wait_closed())
    assert collect(FrameReader(Netstring()), bytes(received))[-1] == b"corked"


async def test_a_closed_socket_keeps_nothing(wire: Wire) -> None:
    async with await wire.listen({"data": echo}, framing=Lines(max_length=MIB)) as server:
        _, writer = await wire.streams(server)
        writer.write(b"x" * 1000)
        await until(lambda: server.stats.bytes_read == 1000)
        (socket,) = server.sockets
        assert socket.unframed == 1000
        socket.terminate()
        await soon(socket.wait_closed())
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    assert socket.write_frame(b"x") == -1
