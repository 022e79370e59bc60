"""A module whose functions are handlers."""

from __future__ import annotations

import uvsock


def data(socket: uvsock.Socket[int], data: bytes) -> None:
    socket.data += len(data)


async def close(socket: uvsock.Socket[int], error: OSError | None) -> None: ...
