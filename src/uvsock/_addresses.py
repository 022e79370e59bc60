"""From host names to addresses of the system's."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, TypeAlias

# The family, and what bind(2) and connect(2) take in Python's form.
Address: TypeAlias = tuple[int, tuple[Any, ...]]


async def resolve(hostname: str, port: int, *, passive: bool = False) -> list[Address]:
    """Every address of a name, in the resolver's order.

    Args:
        passive: for listening (AI_PASSIVE).

    Raises:
        socket.gaierror: with the name in its text.
    """
    flags = socket.AI_PASSIVE if passive else 0
    kind = socket.SOCK_STREAM
    try:
        # What is an address already needs no thread; and uvloop would drop its scope (%eth0).
        infos = socket.getaddrinfo(hostname, port, type=kind, flags=flags | socket.AI_NUMERICHOST)
    except socket.gaierror:
        try:
            loop = asyncio.get_running_loop()
            infos = await loop.getaddrinfo(hostname, port, type=kind, flags=flags)
        except socket.gaierror as error:
            raise socket.gaierror(
                error.errno, f"cannot resolve {hostname!r}: {error.strerror}"
            ) from None
    return list(dict.fromkeys((int(family), address) for family, _, _, _, address in infos))
