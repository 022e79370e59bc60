"""The options of listen and connect, and the attributes of a listener that show them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, assert_type

import uvsock


def received(socket: uvsock.Socket[Any], data: bytes) -> None: ...


async def given() -> None:
    table = {"data": received}
    await uvsock.listen(table, "localhost", 0, keep_alive=60, idle_timeout=None, cork=False)
    await uvsock.listen(table, "localhost", 0, binary_type="memoryview", data_factory=dict)
    await uvsock.connect(table, "localhost", 1, high_water_mark=1, linger_timeout=0)
    await uvsock.listen(table, "localhost", 0, cork="no")  # type: ignore[arg-type]
    await uvsock.listen(table, "localhost", 0, binary_type="buffer")  # type: ignore[arg-type]
    await uvsock.listen(table, "localhost", 0, crok=True)  # type: ignore[call-arg]
    await uvsock.connect(table, "localhost", 1, linger_timeout=None)  # type: ignore[arg-type]
    await uvsock.connect(table, "localhost", 1, data_factory=dict)  # type: ignore[call-arg]


def shown(listener: uvsock.Listener) -> None:
    assert_type(listener.allow_half_open, bool)
    assert_type(listener.binary_type, Literal["bytes", "bytearray", "memoryview"])
    assert_type(listener.framing, uvsock.Framer | None)
    assert_type(listener.keep_alive, bool | float | None)
    assert_type(listener.idle_timeout, float | None)
    assert_type(listener.linger_timeout, float)
    assert_type(listener.high_water_mark, int)
    assert_type(listener.data_factory, Callable[[], Any] | None)
    listener.cork = False  # type: ignore[assignment]
