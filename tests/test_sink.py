"""`BufferSink`: what goes in, what comes out, and what happens while its memory is looked at."""

from __future__ import annotations

import array
import copy
import ctypes
import enum
import pickle
import random
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import uvsock
from conftest import Wire
from helpers import soon, until
from uvsock import BufferSink

KIB = 1 << 10
MIB = 1 << 20


def started(content: str | bytes = b"", **options: Any) -> BufferSink:
    """A sink with these options of `start` that holds this content."""
    sink = BufferSink()
    if options:
        sink.start(**options)
    sink.write(content)
    return sink


def check_same(found: Any, expected: bytes | bytearray) -> None:
    """Equal; without pytest's diff, which takes minutes for megabytes."""
    same = bytes(found) == expected
    assert same, f"{len(found)} bytes, not the {len(expected)} expected ones"


class Peer:
    """A socket that takes at most `room` bytes of each write; -1 for a closed one."""

    def __init__(self, room: int = sys.maxsize) -> None:
        self.room = room
        self.received = bytearray()
        self.sizes: list[int] = []
        self.views: list[memoryview] = []

    def write(self, data: memoryview) -> int:
        self.sizes.append(len(data))
        self.views.append(data)
        if self.room < 0:
            return -1
        taken = min(self.room, len(data))
        self.received += data[:taken]
        return taken


class Scripted:
    """A socket whose `write` is a function of the test's."""

    def __init__(self, write: Callable[[memoryview], Any]) -> None:
        self.write = write


def address(sink: BufferSink) -> int:
    """Where its content begins in memory."""
    # A Py_buffer, of which only the first field is read: the address.
    view = (ctypes.c_void_p * 32)()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(sink), ctypes.byref(view), 0)
    found = view[0]
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))
    return found or 0


@contextmanager
def traced() -> Iterator[Callable[[], tuple[int, int]]]:
    """Yields a function that gives the bytes allocated since now, and the most there were."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()

        def measure() -> tuple[int, int]:
            current, peak = tracemalloc.get_traced_memory()
            return current - before, peak - before

        yield measure
    finally:
        tracemalloc.stop()


# ── Writing ────────────────────────────────────────────────────────────────────────────────────


class Pair(ctypes.Structure):
    _fields_ = (("a", ctypes.c_uint32), ("b", ctypes.c_uint16))


@pytest.mark.parametrize(
    ("chunk", "expected"),
    [
        (b"bytes", b"bytes"),
        (b"", b""),
        ("", b""),
        ("ascii", b"ascii"),
        ("ü € 😀 \0", "ü € 😀 \0".encode()),
        (type("Text", (str,), {})("sub"), b"sub"),
        (type("Octets", (bytes,), {})(b"sub"), b"sub"),
        (bytearray(b"array"), b"array"),
        (memoryview(b"xviewx")[1:-1], b"view"),
        (memoryview(b"xview")[:0], b""),
        (memoryview(b"strided")[1:2:2], b"t"),  # one element has no gaps
        (memoryview(b"abcdef").cast("B", [2, 3]), b"abcdef"),
        (array.array("I", [1, 2, 3]), array.array("I", [1, 2, 3]).tobytes()),
        (memoryview(array.array("d", [0.5])), array.array("d", [0.5]).tobytes()),
        (Pair(1, 2), bytes(Pair(1, 2))),
        ((ctypes.c_uint16 * 3)(1, 2, 3), array.array("H", [1, 2, 3]).tobytes()),
        (started("a sink"), b"a sink"),
    ],
)
def test_write_takes_text_and_every_contiguous_buffer(chunk: Any, expected: bytes) -> None:
    sink = started("<")
    assert sink.write(chunk) == len(expected)
    assert len(sink) == 1 + len(expected)
    assert sink.end() == b"<" + expected


@pytest.mark.parametrize("chunk", [None, 5, 1.5, True, [65], (), {}, object(), bytes, "x".encode])
def test_write_refuses_what_is_neither_text_nor_a_buffer(chunk: Any) -> None:
    sink = started("kept")
    given = "None" if chunk is None else type(chunk).__name__
    expected = f"^chunk: must be str or a bytes-like object, not {given}$"
    with pytest.raises(TypeError, match=expected):
        sink.write(chunk)
    assert bytes(sink) == b"kept"


@pytest.mark.parametrize(
    "chunk", [memoryview(b"abcdef")[::2], memoryview(b"abcdef")[::-1],
              memoryview(array.array("I", range(4)))[::2]],
)  # fmt: skip
def test_write_refuses_a_buffer_with_gaps(chunk: memoryview) -> None:
    sink = started("kept")
    with pytest.raises(TypeError, match="^chunk: must be a C-contiguous buffer"):
        sink.write(chunk)
    assert bytes(sink) == b"kept"
    chunk.release()  # the failed write has let go of it


def test_write_passes_on_why_there_is_no_buffer() -> None:
    view = memoryview(b"x")
    view.release()
    sink = started("kept")
    with pytest.raises(ValueError, match="released"):
        sink.write(view)
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        sink.write("\ud800")
    assert bytes(sink) == b"kept"


def test_write_copies_and_lets_go_of_the_chunk() -> None:
    source = bytearray(b"before")
    sink = started()
    sink.write(source)
    source[:] = b"after"  # another length: it would fail under an export
    assert sink.end() == b"before"


def test_arguments_can_be_named() -> None:
    sink = BufferSink()
    sink.start(stream=True, high_water_mark=10, as_bytes=True)
    assert sink.write(chunk=b"x") == 1
    assert sink.flush_to(socket=Peer()) == 1


def test_many_growing_writes_stay_in_order() -> None:
    sink = started(high_water_mark=2)
    pieces = [bytes([n % 251]) * n for n in range(1000)]
    assert [sink.write(piece) for piece in pieces] == list(range(1000))
    check_same(sink.end(), b"".join(pieces))


def test_a_chunk_larger_than_any_growth_step() -> None:
    large = random.Random(1).randbytes(8 * MIB)
    sink = started("head")
    assert sink.write(large) == len(large)
    sink.write("tail")
    check_same(sink.end(), b"head" + large + b"tail")


def test_a_sink_written_to_itself_doubles_or_refuses_to_grow() -> None:
    sink = started("ab")
    doublings = 0

    def double_for_ever() -> None:
        nonlocal doublings
        while doublings < 20:
            assert sink.write(sink) == 2 << doublings
            doublings += 1

    with pytest.raises(BufferError, match="cannot grow while a view"):
        double_for_ever()
    assert doublings > 0
    assert bytes(sink) == b"ab" * (1 << doublings)
    sink.write("c")  # the failed write holds no view
    assert sink.end() == b"ab" * (1 << doublings) + b"c"


def test_a_view_of_the_sink_written_to_it() -> None:
    sink = started("0123456789", high_water_mark=KIB)
    with memoryview(sink) as view:
        assert sink.write(view[2:5]) == 3
    assert sink.end() == b"0123456789234"


# ── start, flush, end ──────────────────────────────────────────────────────────────────────────


def test_a_new_sink_is_started_with_the_defaults() -> None:
    new, begun = BufferSink(), BufferSink()
    begun.start()
    for sink in (new, begun):
        assert sink.write("abc") == 3
        assert sink.flush() == 3
        assert len(sink) == 3
        assert sink.end() == b"abc"


def test_the_constructor_takes_nothing() -> None:
    construct: Any = BufferSink
    with pytest.raises(TypeError):
        construct(b"content")
    with pytest.raises(TypeError):
        construct(stream=True)


@pytest.mark.parametrize("as_bytes", [False, True])
def test_without_stream_flush_counts_and_keeps(as_bytes: bool) -> None:
    sink = started(as_bytes=as_bytes)
    assert sink.flush() == 0
    sink.write("abc")
    sink.write("de")
    assert sink.flush() == 5
    assert sink.flush() == 0
    sink.write("ü")
    assert sink.flush() == 2
    content = sink.end()
    assert type(content) is (bytes if as_bytes else bytearray)
    assert content == "abcdeü".encode()


@pytest.mark.parametrize("as_bytes", [False, True])
def test_with_stream_flush_hands_over_and_begins_again(as_bytes: bool) -> None:
    kind = bytes if as_bytes else bytearray
    sink = started(stream=True, as_bytes=as_bytes)
    results: list[Any] = [sink.flush()]
    sink.write("abc")
    results += [sink.flush(), sink.flush()]
    assert len(sink) == 0
    sink.write("de")
    sink.write("f")
    results.append(sink.flush())
    sink.write("rest")
    results.append(sink.end())
    assert results == [b"", b"abc", b"", b"def", b"rest"]
    assert {type(result) for result in results} == {kind}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_after_end_only_start_brings_a_sink_back(stream: bool, as_bytes: bool) -> None:
    kind = bytes if as_bytes else bytearray
    sink = started("abc", stream=stream, as_bytes=as_bytes)
    assert sink.end() == b"abc"
    for chunk in ("more", b"more", bytearray(b"more"), ""):
        with pytest.raises(ValueError, match="ended"):
            sink.write(chunk)
    for _ in range(2):
        again = sink.end()
        assert again == b""
        assert type(again) is kind
    flushed = sink.flush()
    assert (type(flushed), flushed) == ((kind, b"") if stream else (int, 0))
    assert len(sink) == 0
    assert bytes(sink) == b""
    sink.start()
    sink.write("again")
    assert sink.end() == bytearray(b"again")


def test_start_drops_the_content_and_sets_all_options_anew() -> None:
    sink = started("dropped", stream=True, high_water_mark=5, as_bytes=True)
    sink.start()
    assert len(sink) == 0
    assert sink.flush() == 0
    sink.write("kept")
    assert sink.flush() == 4
    content = sink.end()
    assert (type(content), content) == (bytearray, b"kept")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"stream": 1}, TypeError, "stream: must be True or False, not int"),
        ({"stream": None}, TypeError, "stream: must be True or False, not None"),
        ({"as_bytes": "x"}, TypeError, "as_bytes: must be True or False, not str"),
        ({"as_bytes": 0}, TypeError, "as_bytes: must be True or False, not int"),
        ({"high_water_mark": True}, TypeError, "high_water_mark: must be an int .*, not bool"),
        ({"high_water_mark": 1.0}, TypeError, "high_water_mark: must be an int .*, not float"),
        ({"high_water_mark": "1"}, TypeError, "high_water_mark: must be an int .*, not str"),
        ({"high_water_mark": -1}, ValueError, "high_water_mark: must be an int .*, not -1"),
    ],
)
def test_a_wrong_option_is_named_and_changes_nothing(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    sink = started("kept", stream=True, as_bytes=True)
    with pytest.raises(error, match=f"^{text}$"):
        sink.start(**{"stream": False, "as_bytes": False} | options)
    assert sink.flush() == b"kept"
    assert type(sink.end()) is bytes


@pytest.mark.parametrize("hint", [None, 0, 1, 2, 5000, 1 << 40, 10**30])
def test_high_water_mark_limits_nothing(hint: int | None) -> None:
    sink = started(high_water_mark=hint, stream=True)
    for _ in range(100):
        sink.write(b"0123456789")
    assert sink.flush() == b"0123456789" * 100


def test_high_water_mark_is_allocated_at_the_first_write_and_kept() -> None:
    with traced() as allocated:
        sink = started(high_water_mark=MIB)
        assert allocated()[0] < 4 * KIB
        sink.write(b"x")
        full = allocated()[0]
        assert full >= MIB
        sink.write(bytes(MIB - 1))
        assert allocated()[0] < full + 4 * KIB
        assert sink.flush_to(Peer()) == MIB
        assert allocated()[0] >= MIB
        with memoryview(sink):  # no growth, so no BufferError
            sink.write(bytes(MIB))
        sink.start()
        assert allocated()[0] < 64 * KIB


# ── Handing over ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("take", ["flush", "end"])
def test_what_was_handed_over_is_the_callers_own(take: str) -> None:
    sink = started("first content", stream=True)
    content: Any = getattr(sink, take)()
    assert type(content) is bytearray
    sink.start(stream=True)
    sink.write("OTHER CONTENT, AND MORE OF IT")
    assert content == b"first content"
    content += b" grown" * 1000
    del content[:6]
    content[:7] = b""
    content.clear()
    assert bytes(sink) == b"OTHER CONTENT, AND MORE OF IT"
    assert sink.flush() == b"OTHER CONTENT, AND MORE OF IT"


@pytest.mark.parametrize("take", ["flush", "end"])
@pytest.mark.parametrize("sent", [0, 5])
def test_handing_over_copies_nothing(take: str, sent: int) -> None:
    """Also not what is left after the socket took a little from the front."""
    sink = started(bytes(range(256)) * (16 * KIB), stream=True)
    assert sink.flush_to(Peer(sent)) == sent
    with traced() as allocated:
        content: Any = getattr(sink, take)()
        assert allocated()[1] < 64 * KIB
    check_same(content, (bytes(range(256)) * (16 * KIB))[sent:])


def test_handing_over_leaves_no_hidden_reserve() -> None:
    sink = started(b"x", stream=True, high_water_mark=MIB)
    content: Any = sink.flush()
    assert sys.getsizeof(content) < KIB


def test_content_can_be_handed_over_after_the_front_was_sent() -> None:
    data = random.Random(2).randbytes(100 * KIB)
    for room in (1, 1000, 60 * KIB, 100 * KIB - 1):
        for as_bytes in (False, True):
            sink = started(data, stream=True, as_bytes=as_bytes)
            assert sink.flush_to(Peer(room)) == room
            content: Any = sink.flush()
            check_same(content, data[room:])
            if not as_bytes:
                content.append(1)
                check_same(content, data[room:] + b"\x01")


def emptied_by_flush(sink: BufferSink) -> None:
    assert len(sink.flush()) == 4 * MIB  # type: ignore[arg-type]


def emptied_by_end(sink: BufferSink) -> None:
    assert len(sink.end()) == 4 * MIB


def emptied_by_flush_to(sink: BufferSink) -> None:
    def taken(data: memoryview) -> int:
        return len(data)

    assert sink.flush_to(Scripted(taken)) == 4 * MIB


def emptied_by_start(sink: BufferSink) -> None:
    sink.start()


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize(
    "empty", [emptied_by_flush, emptied_by_end, emptied_by_flush_to, emptied_by_start]
)
def test_an_emptied_sink_gives_its_memory_back(
    empty: Callable[[BufferSink], None], as_bytes: bool
) -> None:
    with traced() as allocated:
        sink = BufferSink()
        sink.start(stream=True, as_bytes=as_bytes)
        for _ in range(64):
            sink.write(bytes(64 * KIB))
        assert allocated()[0] >= 4 * MIB
        empty(sink)
        assert allocated()[0] < 64 * KIB
        assert len(sink) == 0


def test_a_sink_that_never_empties_does_not_grow() -> None:
    peer = Peer(1000)
    with traced() as allocated:
        sink = started(bytes(256 * KIB))
        for _ in range(5000):
            assert sink.write(bytes(1000)) == 1000
            assert sink.flush_to(peer) == 1000
            peer.received.clear()
            peer.views.clear()
        assert len(sink) == 256 * KIB
        assert allocated()[1] < 2 * MIB


def test_a_full_sink_does_not_move_its_content_for_every_write() -> None:
    sink = started(bytes(4 * KIB), high_water_mark=4 * KIB)
    peer = Peer(1)
    moves = 0
    for _ in range(2000):
        before = address(sink)
        assert sink.flush_to(peer) == 1
        sink.write("x")
        moves += address(sink) != before + 1
    assert moves <= 1
    assert bytes(sink) == bytes(2096) + b"x" * 2000


# ── Looking at the content ─────────────────────────────────────────────────────────────────────


def test_a_view_shows_the_content_read_only() -> None:
    sink = started("content")
    with memoryview(sink) as view:
        assert (view.tobytes(), view.format, view.nbytes, view.ndim) == (b"content", "B", 7, 1)
        assert view.c_contiguous
        assert view.readonly
        assert view.obj is sink
    with pytest.raises(TypeError, match="writable|read-write"):
        (ctypes.c_char * 7).from_buffer(sink)
    assert bytes(sink) == b"content"
    assert b"".join([b"<", sink, b">"]) == b"<content>"
    assert sink.end() == b"content"


def test_a_view_costs_no_copy() -> None:
    sink = started(bytes(4 * MIB))
    with traced() as allocated, memoryview(sink) as view:
        assert len(view) == 4 * MIB
        assert allocated()[1] < 64 * KIB


@pytest.mark.parametrize("content", [b"", b"content"])
def test_a_view_outlives_the_sink(content: bytes) -> None:
    view = memoryview(started(content))
    assert view.tobytes() == content
    view.release()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("content", [b"", b"content"])
@pytest.mark.parametrize(
    "operation",
    [BufferSink.flush, BufferSink.end, BufferSink.start, lambda sink: sink.flush_to(Peer())],
    ids=["flush", "end", "start", "flush_to"],
)
def test_nothing_is_lost_by_an_operation_under_a_view(
    operation: Callable[[BufferSink], object], content: bytes, stream: bool, as_bytes: bool
) -> None:
    sink = started(content, stream=stream, as_bytes=as_bytes)
    views = [memoryview(sink), memoryview(sink)]
    for view in views:
        with pytest.raises(BufferError, match="view of its content is held"):
            operation(sink)
        assert view.tobytes() == content
        view.release()
    sink.write("!")  # it has not ended
    content += b"!"
    assert sink.flush() == (content if stream else len(content))
    assert sink.end() == (b"" if stream else content)


def test_a_view_blocks_growth_and_nothing_else() -> None:
    sink = started("content")
    view = memoryview(sink)
    written = bytearray(b"content")

    def write_on() -> None:
        for n in range(100_000):
            sink.write(piece := b"%d " % n)
            written.extend(piece)

    with pytest.raises(BufferError, match="cannot grow while a view"):
        write_on()
    assert view.tobytes() == b"content"
    check_same(sink, written)
    view.release()
    sink.write("more")
    check_same(sink.end(), written + b"more")


def test_a_view_of_an_empty_sink_blocks_its_first_memory() -> None:
    sink = BufferSink()
    assert address(sink) != 0  # as a bytearray's: a null pointer is an error to some C functions
    with memoryview(sink) as view:
        assert view.tobytes() == b""
        with pytest.raises(BufferError):
            sink.write("x")
        assert sink.write("") == 0
    assert sink.write("x") == 1


def test_slices_count_until_the_last_one_is_gone() -> None:
    sink = started("0123456789")
    view = memoryview(sink)
    part = view[2:5]
    view.release()
    with pytest.raises(BufferError):
        sink.end()
    del part
    assert sink.end() == b"0123456789"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="__buffer__ came with Python 3.12")
def test_making_the_buffer_of_a_chunk_can_end_the_sink() -> None:
    sink = started("content")
    contents: list[object] = []

    class Chunk:
        def __buffer__(self, flags: int) -> memoryview:
            contents.append(sink.end())
            return memoryview(b"late")

    with pytest.raises(ValueError, match="ended"):
        sink.write(Chunk())
    assert contents == [b"content"]
    assert len(sink) == 0


# ── flush_to ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", [{}, {"stream": True}, {"stream": True, "as_bytes": True}])
def test_flush_to_keeps_what_the_socket_does_not_take(options: dict[str, Any]) -> None:
    sink = started("0123456789", **options)
    peer = Peer(4)
    assert sink.flush_to(peer) == 4
    assert bytes(sink) == b"456789"
    sink.write("ab")
    assert sink.flush_to(peer) == 4
    peer.room = 0
    assert sink.flush_to(peer) == 0
    assert bytes(sink) == b"89ab"
    peer.room = 100
    assert sink.flush_to(peer) == 4
    assert peer.received == b"0123456789ab"
    assert peer.sizes == [10, 8, 4, 4]
    assert len(sink) == 0
    sink.write("next")
    assert sink.end() == b"next"


def test_flush_to_shows_the_content_without_a_copy() -> None:
    sizes: list[int] = []

    def write(data: memoryview) -> int:
        sizes.append(len(data))
        return len(data) // 2

    with traced() as allocated:
        sink = started(high_water_mark=4 * MIB)
        for _ in range(64):
            sink.write(bytes(64 * KIB))
        before = allocated()[1]
        for _ in range(10):
            sink.flush_to(Scripted(write))
        assert allocated()[1] - before < 64 * KIB
    assert sizes == [(4 * MIB) >> n for n in range(10)]


def test_a_closed_socket_takes_nothing_and_loses_nothing() -> None:
    closed = Peer(-1)
    sink = started("content", stream=True)
    assert sink.flush_to(closed) == -1
    assert closed.sizes == [7]
    assert sink.flush() == b"content"


def test_an_empty_sink_asks_the_socket_whether_it_is_closed() -> None:
    peer, closed = Peer(), Peer(-1)
    ended = started("x")
    ended.end()
    for sink in (BufferSink(), ended):
        assert sink.flush_to(peer) == 0
        assert sink.flush_to(closed) == -1
    assert peer.sizes == closed.sizes == [0, 0]


def test_flush_counts_only_what_flush_to_has_not_sent() -> None:
    sink = started("0123456789")
    assert sink.flush_to(Peer(4)) == 4
    assert sink.flush() == 6
    assert sink.flush() == 0
    sink.write("abc")
    assert sink.flush_to(Peer(2)) == 2  # bytes that were counted already
    assert sink.flush() == 3
    sink.write("de")
    assert sink.flush_to(Peer(-1)) == -1
    assert sink.flush() == 2
    sink.write("fgh")
    assert sink.flush_to(Peer(10)) == 10
    assert sink.flush() == 2
    assert bytes(sink) == b"gh"
    assert sink.flush_to(Peer()) == 2
    assert sink.flush() == 0
    sink.write("i")
    assert sink.flush() == 1


def test_flush_counts_across_moves_of_the_memory() -> None:
    sink = started(bytes(400))
    assert sink.flush() == 400
    sink.write(bytes(100))
    assert sink.flush_to(Peer(390)) == 390
    sink.write(bytes(300))  # the 110 bytes held move to the front to make room
    assert sink.flush() == 400
    sink.write(bytes(10_000))
    assert sink.flush() == 10_000
    assert len(sink) == 10_410


@pytest.mark.parametrize("error", [ValueError, ConnectionResetError, KeyboardInterrupt])
def test_a_socket_that_raises_loses_nothing(error: type[BaseException]) -> None:
    raised = error("from write")
    views: list[memoryview] = []

    def write(data: memoryview) -> int:
        views.append(data)
        raise raised

    sink = started("content")
    with pytest.raises(error) as caught:
        sink.flush_to(Scripted(write))
    assert caught.value is raised
    # The traceback still refers to the view, and that must not block the sink.
    with pytest.raises(ValueError, match="released"):
        views[0].tobytes()
    assert sink.end() == b"content"


@pytest.mark.parametrize(
    ("result", "error"),
    [
        (None, TypeError),
        (True, TypeError),
        (False, TypeError),
        ("3", TypeError),
        (3.0, TypeError),
        (-2, ValueError),
        (8, ValueError),
        (10**30, ValueError),
        (-(10**30), ValueError),
        (10**5000, ValueError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value)[:5]
    if not isinstance(value, int) or value < 10**100 else "huge",
)  # fmt: skip
def test_a_wrong_count_is_refused_and_loses_nothing(result: Any, error: type[Exception]) -> None:
    sink = started("content")
    with pytest.raises(error, match=r"^socket: must be an object whose write\(\) returns "):
        sink.flush_to(Scripted(lambda data: result))
    assert sink.end() == b"content"


def test_a_count_may_be_of_a_subclass_of_int() -> None:
    count = enum.IntEnum("count", {"THREE": 3})
    sink = started("content")
    assert sink.flush_to(Scripted(lambda data: count.THREE)) == 3
    assert bytes(sink) == b"tent"


@pytest.mark.parametrize(
    "socket", [None, 5, "text", object(), Scripted(None), Scripted(3)],  # type: ignore[arg-type]
)  # fmt: skip
def test_what_cannot_be_written_to_is_no_socket(socket: Any) -> None:
    sink = started("content")
    with pytest.raises(TypeError, match="^socket: must be an object with write"):
        sink.flush_to(socket)
    assert sink.end() == b"content"


def test_the_view_is_released_after_the_call() -> None:
    peer = Peer(3)
    sink = started("content")
    sink.flush_to(peer)
    with pytest.raises(ValueError, match="released"):
        peer.views[0].tobytes()
    assert sink.end() == b"tent"


@pytest.mark.parametrize(
    "keep", [lambda view: view[:3], pickle.PickleBuffer], ids=["view", "buffer"]
)
@pytest.mark.parametrize("taken", [4, 7])
def test_what_the_socket_keeps_of_the_view_stays_valid(
    keep: Callable[[memoryview], Any], taken: int
) -> None:
    kept: list[Any] = []

    def write(data: memoryview) -> int:
        kept.append(keep(data))
        return taken

    sink = started("content", stream=True)
    assert sink.flush_to(Scripted(write)) == taken
    shown = bytes(kept[0])
    assert b"content".startswith(shown)
    sink.write("OTHER")
    assert bytes(kept[0]) == shown
    with pytest.raises(BufferError):
        sink.flush()
    with pytest.raises(BufferError):
        sink.write(bytes(MIB))
    kept.pop().release()
    sink.write(bytes(MIB))
    check_same(sink.flush(), b"content"[taken:] + b"OTHER" + bytes(MIB))


def test_a_socket_may_write_to_the_sink_meanwhile() -> None:
    sink = started("0123456789", high_water_mark=KIB)

    def write(data: memoryview) -> int:
        assert sink.write("later") == 5
        assert data.tobytes() == b"0123456789"
        return 4

    assert sink.flush_to(Scripted(write)) == 4
    assert bytes(sink) == b"456789later"
    assert sink.flush() == 11


def test_a_socket_that_makes_the_sink_grow_gets_an_error_and_may_go_on() -> None:
    sink = started("0123456789")

    def write(data: memoryview) -> int:
        for operation in (
            lambda: sink.write(bytes(MIB)),
            sink.flush,
            sink.end,
            sink.start,
            lambda: sink.flush_to(Peer()),
        ):
            with pytest.raises(BufferError):
                operation()
        assert len(sink) == 10
        return 10

    assert sink.flush_to(Scripted(write)) == 10
    assert len(sink) == 0
    sink.write(bytes(MIB))
    assert len(sink.end()) == MIB


def test_finding_out_how_to_write_may_change_the_sink() -> None:
    sink = started("0123456789")
    peer = Peer()

    class Socket:
        @property
        def write(self) -> Callable[[memoryview], int]:
            sink.start()
            sink.write("abc")
            return peer.write

    assert sink.flush_to(Socket()) == 3
    assert peer.received == b"abc"


def test_a_sink_flushed_to_itself_keeps_its_content() -> None:
    sink = started("content")
    assert sink.flush_to(sink) == 7
    assert sink.end() == b"content"


@pytest.mark.parametrize("cork", [True, False])
async def test_flush_to_a_socket_sends_everything_in_order(wire: Wire, cork: bool) -> None:
    """The whole dance: write, `flush_to`, and `flush_to` again at each `drain`."""
    payload = random.Random(3).randbytes(8 * MIB)
    sink = BufferSink()
    counts: list[int] = []
    left: list[int] = []

    def opened(socket: uvsock.Socket[Any]) -> None:
        for start in range(0, len(payload), 100_000):
            sink.write(payload[start : start + 100_000])
        drain(socket)

    def drain(socket: uvsock.Socket[Any]) -> None:
        counts.append(sink.flush_to(socket))
        left.append(len(sink))
        if not len(sink):
            socket.end()

    def closed(socket: uvsock.Socket[Any], error: OSError | None) -> None:
        sink.write("kept")
        counts.append(sink.flush_to(socket))

    table = {"open": opened, "drain": drain, "close": closed}
    listener = await wire.listen(table, cork=cork)
    # A limit that the reader never reaches: when it pauses, uvloop's own TLS drops what it has not
    # decrypted yet as soon as close_notify and FIN arrive.
    reader, writer = await wire.streams(listener, limit=2 * len(payload))
    check_same(await soon(reader.read(-1), 30), payload)
    writer.close()
    await writer.wait_closed()
    await until(lambda: counts[-1] == -1)
    assert sum(counts[:-1]) == len(payload)
    assert left == sorted(left, reverse=True)
    assert left[0] > 0, "the socket took all at once: nothing was tested"
    assert bytes(sink) == b"kept"
    listener.stop(True)
    await soon(listener.wait_closed())


# ── The object ─────────────────────────────────────────────────────────────────────────────────


def test_length_and_truth() -> None:
    sink = BufferSink()
    assert len(sink) == 0
    assert not sink
    sink.write("üü")
    assert len(sink) == 4
    assert sink


def test_repr_tells_how_much_and_in_which_state() -> None:
    sink = started("abc")
    assert repr(sink) == "<BufferSink 3 bytes>"
    sink.start(stream=True)
    assert repr(sink) == "<BufferSink 0 bytes stream>"
    sink.end()
    assert repr(sink) == "<BufferSink 0 bytes stream ended>"


def test_a_sink_is_not_copied_by_accident() -> None:
    sink = started("content")
    with pytest.raises(TypeError, match="pickle"):
        copy.copy(sink)
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(sink)


def test_subclasses_work() -> None:
    class Counting(BufferSink):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            self.calls = 0

        def write(self, chunk: Any) -> int:
            self.calls += 1
            return super().write(chunk)

    sink = Counting("mine")
    sink.write("abc")
    assert (sink.name, sink.calls, bytes(sink)) == ("mine", 1, b"abc")
    assert repr(sink) == "<Counting 3 bytes>"
    assert sink.flush_to(Peer(1)) == 1
    assert sink.end() == b"bc"


# ── Numbers ────────────────────────────────────────────────────────────────────────────────────


def leb128(value: int) -> bytes:
    """A varint, as the specification of Protocol Buffers says it."""
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + leb128(rest) if rest else bytes([low])


@pytest.mark.parametrize("byteorder", ["big", "little"])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_numbers(width: int, byteorder: Any) -> None:
    sink = BufferSink()
    write = getattr(sink, f"write_u{8 * width}")
    arguments: Any = () if width == 1 else (byteorder,)
    values = [0, 1, (1 << 8 * width) - 1, 0x0102030405060708 % (1 << 8 * width)]
    for value in values:
        assert write(value, *arguments) == width
    assert sink.end() == b"".join(value.to_bytes(width, byteorder) for value in values)


def test_numbers_are_big_endian_by_default() -> None:
    sink = BufferSink()
    sink.write_u16(1)
    sink.write_u32(2)
    sink.write_u64(3)
    assert sink.end() == bytes.fromhex("0001 00000002 0000000000000003")


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 16383, 16384, 2**32, 2**63, 2**64 - 1])
def test_varint(value: int) -> None:
    sink = BufferSink()
    assert sink.write_varint(value) == len(leb128(value))
    assert sink.end() == leb128(value)


@pytest.mark.parametrize("name", ["write_u8", "write_u16", "write_u32", "write_u64"])
def test_numbers_out_of_range(name: str) -> None:
    sink = started("kept")
    limit = 1 << int(name.removeprefix("write_u"))
    for value in (-1, limit, limit << 70, -limit):
        with pytest.raises(ValueError, match=f"^value: must be an int from 0 to {limit - 1}"):
            getattr(sink, name)(value)
    for wrong in (True, 1.0, "1", None):
        with pytest.raises(TypeError, match="^value: must be"):
            getattr(sink, name)(wrong)
    assert sink.end() == b"kept"


def test_varint_out_of_range() -> None:
    sink = BufferSink()
    for value in (-1, 2**64):
        with pytest.raises(ValueError, match="^value: must be"):
            sink.write_varint(value)
    assert len(sink) == 0


@pytest.mark.parametrize("wrong", ["BIG", "", None, 1])
def test_byteorder_that_is_none(wrong: Any) -> None:
    sink = BufferSink()
    with pytest.raises((TypeError, ValueError), match="^byteorder: must be 'big' or 'little'"):
        sink.write_u32(1, wrong)
    assert sink.write_u16(1, "".join(["lit", "tle"])) == 2  # type: ignore[arg-type]
    assert sink.end() == b"\1\0"


def test_length_written_later() -> None:
    sink = started("before")
    at = sink.reserve(4)
    assert at == 6
    sink.write("a message")
    assert sink.write_u32(len(sink) - at - 4, at=at) == 4
    assert sink.end() == b"before\0\0\0\x09a message"


def test_reserved_bytes_are_zero() -> None:
    sink = started(b"\xff" * 100)
    sink.flush_to(Peer(100))
    assert sink.reserve(50) == 0
    assert sink.end() == bytes(50)


@pytest.mark.parametrize("at", [-1, 3, 1 << 70])
def test_position_outside(at: int) -> None:
    sink = started("kept")
    with pytest.raises(ValueError, match="^at: must be"):
        sink.write_u16(1, at=at)
    with pytest.raises(TypeError, match="^at: must be"):
        sink.write_u16(1, at="0")  # type: ignore[arg-type]
    assert sink.end() == b"kept"


def test_reserve_too_much() -> None:
    sink = started("kept")
    for n in (-1, sys.maxsize):
        with pytest.raises(ValueError, match="^n: must be"):
            sink.reserve(n)
    with pytest.raises(MemoryError):
        sink.reserve(sys.maxsize // 2)
    assert sink.end() == b"kept"


def test_numbers_under_a_view() -> None:
    sink = started("kept")
    with memoryview(sink) as view:
        with pytest.raises(BufferError):
            sink.write_u16(1, at=0)
        with pytest.raises(BufferError):
            sink.reserve(1 << 20)
        assert view == b"kept"
    assert sink.end() == b"kept"


def test_numbers_after_the_end() -> None:
    sink = BufferSink()
    sink.end()
    for write in (sink.write_u8, sink.write_u64, sink.write_varint, sink.reserve):
        with pytest.raises(ValueError, match="ended"):
            write(1)


# ── Against a model ────────────────────────────────────────────────────────────────────────────

CHUNKS = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=20),
    st.integers(0, 3000).map(bytes),
    st.binary(max_size=40).map(bytearray),
    st.binary(max_size=40).map(lambda data: memoryview(data)),
    st.binary(max_size=400).map(lambda data: data * 50),
)
ROOMS = st.one_of(st.just(-1), st.integers(0, 50), st.integers(0, 20_000), st.just(sys.maxsize))


class Model(RuleBasedStateMachine):
    """A sink, and beside it a plain bytearray that says what the sink must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = BufferSink()
        self.content = bytearray()
        self.uncounted = 0
        self.stream = self.as_bytes = self.ended = False
        self.views: list[tuple[memoryview, bytes]] = []
        self.handed: list[tuple[Any, bytes]] = []

    def check_taken(self, taken: Any) -> None:
        assert type(taken) is (bytes if self.as_bytes else bytearray)
        assert taken == self.content
        self.handed.append((taken, bytes(taken)))
        self.content.clear()
        self.uncounted = 0

    @rule(chunk=CHUNKS)
    def write(self, chunk: Any) -> None:
        data = chunk.encode() if isinstance(chunk, str) else bytes(chunk)
        if self.ended:
            with pytest.raises(ValueError, match="ended"):
                self.sink.write(chunk)
            return
        try:
            assert self.sink.write(chunk) == len(data)
        except BufferError:
            assert self.views, "refused to grow without a view"
            return
        self.content += data
        self.uncounted += len(data)

    @precondition(lambda self: not self.ended)
    @rule(
        width=st.sampled_from([1, 2, 4, 8]),
        byteorder=st.sampled_from(["big", "little"]),
        value=st.integers(0, 2**64 - 1),
        data=st.data(),
    )
    def write_number(
        self, width: int, byteorder: Any, value: int, data: st.DataObject
    ) -> None:  # fmt: skip
        value %= 1 << 8 * width
        room = len(self.content) - width
        at = data.draw(st.none() | st.integers(0, room)) if room >= 0 else None
        arguments: Any = {} if width == 1 else {"byteorder": byteorder}
        try:
            assert getattr(self.sink, f"write_u{8 * width}")(value, **arguments, at=at) == width
        except BufferError:
            assert self.views, "refused without a view"
            return
        if at is None:
            self.content += value.to_bytes(width, byteorder)
            self.uncounted += width
        else:
            self.content[at : at + width] = value.to_bytes(width, byteorder)

    @precondition(lambda self: not self.ended)
    @rule(n=st.integers(0, 600))
    def reserve(self, n: int) -> None:
        try:
            assert self.sink.reserve(n) == len(self.content)
        except BufferError:
            assert self.views, "refused to grow without a view"
            return
        self.content += bytes(n)
        self.uncounted += n

    @precondition(lambda self: not self.ended)
    @rule()
    def write_itself(self) -> None:
        before = bytes(self.content)
        if len(before) > 20_000:
            return
        try:
            assert self.sink.write(self.sink) == len(before)
        except BufferError:
            return  # no room, and the chunk itself is a view
        self.content += before
        self.uncounted += len(before)

    @rule()
    def flush(self) -> None:
        if self.views:
            with pytest.raises(BufferError):
                self.sink.flush()
        elif self.stream:
            self.check_taken(self.sink.flush())
        else:
            assert self.sink.flush() == self.uncounted
            self.uncounted = 0

    @rule()
    def end(self) -> None:
        if self.views:
            with pytest.raises(BufferError):
                self.sink.end()
        else:
            self.check_taken(self.sink.end())
            self.ended = True

    @rule(
        stream=st.booleans(),
        as_bytes=st.booleans(),
        high_water_mark=st.none() | st.integers(0, 20_000),
    )
    def start(self, stream: bool, as_bytes: bool, high_water_mark: int | None) -> None:
        options: Any = {
            "stream": stream, "as_bytes": as_bytes, "high_water_mark": high_water_mark
        }  # fmt: skip
        if self.views:
            with pytest.raises(BufferError):
                self.sink.start(**options)
            return
        self.sink.start(**options)
        self.stream, self.as_bytes, self.ended = stream, as_bytes, False
        self.content.clear()
        self.uncounted = 0

    @rule(room=ROOMS, fails=st.booleans(), meanwhile=st.binary(max_size=30), keep=st.booleans())
    def flush_to(self, room: int, fails: bool, meanwhile: bytes, keep: bool) -> None:
        if self.views:
            with pytest.raises(BufferError):
                self.sink.flush_to(Peer())
            return
        peer = Peer(room)
        held = bytes(self.content)

        def write(data: memoryview) -> int:
            assert data == held
            if not self.ended:
                self.write(meanwhile_chunk)
            if keep:
                kept = data[: len(data) // 2]
                self.views.append((kept, bytes(kept)))
            if fails:
                raise ConnectionResetError
            return peer.write(data)

        # The write in the middle is refused like any other under a view.
        self.views.append((memoryview(b""), b""))
        meanwhile_chunk = meanwhile
        try:
            taken = self.sink.flush_to(Scripted(write))
        except ConnectionResetError:
            assert fails
            return
        finally:
            del self.views[0]
        assert taken == (-1 if room < 0 else min(room, len(held)))
        assert peer.received == held[: max(taken, 0)]
        del self.content[: max(taken, 0)]
        self.uncounted = min(self.uncounted, len(self.content))

    @precondition(lambda self: len(self.views) < 4)
    @rule()
    def look(self) -> None:
        self.views.append((memoryview(self.sink), bytes(self.content)))

    @precondition(lambda self: self.views)
    @rule(data=st.data())
    def look_away(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.views) - 1))
        self.views.pop(index)[0].release()

    @precondition(lambda self: self.handed)
    @rule(extra=st.binary(max_size=50))
    def change_what_was_handed_over(self, extra: bytes) -> None:
        taken, _ = self.handed.pop()
        if isinstance(taken, bytearray):
            taken += extra
            del taken[: len(taken) // 2]
            taken[:] = b"\xff" * len(taken)

    @invariant()
    def agrees(self) -> None:
        assert len(self.sink) == len(self.content)
        assert bytes(self.sink) == self.content
        assert ("ended" in repr(self.sink)) is self.ended
        for view, shown in self.views:
            assert view == shown
        for taken, was in self.handed:
            assert taken == was

    def teardown(self) -> None:
        for view, _ in self.views:
            view.release()
        self.views.clear()
        self.check_taken(self.sink.end())


@pytest.mark.timeout(240)
def test_against_a_model() -> None:
    run_state_machine_as_test(
        Model,
        settings=settings(
            max_examples=200, stateful_step_count=40, deadline=None, database=None
        ),
    )  # fmt: skip
