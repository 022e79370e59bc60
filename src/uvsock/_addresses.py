"""From host names to addresses of the system's, for sockets and for the event loop alike."""

from __future__ import annotations

import asyncio
import socket
from itertools import chain, zip_longest
from typing import Any, TypeAlias

# As getaddrinfo() has it: family, type, protocol, canonical name, and what bind(2) and connect(2)
# take in Python's form.
AddressInfo: TypeAlias = tuple[int, int, int, str, tuple[Any, ...]]


async def resolve(
    loop: asyncio.AbstractEventLoop,
    address: tuple[Any, ...],
    *,
    family: int = 0,
    kind: int = socket.SOCK_STREAM,
    proto: int = 0,
    flags: int = 0,
) -> list[AddressInfo]:
    """Every address of a name, in the resolver's order.

    Args:
        loop: whose ``getaddrinfo`` is asked for what is a name.
        address: host and port, and with IPv6 perhaps flow label and scope. The host is a name, an
            address, perhaps with a zone (RFC 4007, 11), or None for all interfaces; the port a
            number or a service's name.
        family, kind, proto, flags: as for ``socket.getaddrinfo``.

    Raises:
        OverflowError: a port that there is not, which getaddrinfo(3) would cut to 16 bits.
        socket.gaierror: there is no such name, with the name in its text.
    """
    host, port = address[:2]
    if (number := _port_number(port)) is not None and not 0 <= number <= 65535:
        raise OverflowError(f"port must be 0-65535, not {number}")
    found: Any = None
    if host is not None:
        found = await _resolve_literal(loop, host, port, number is None, family, kind, proto, flags)
    if found is None:
        try:
            found = await loop.getaddrinfo(
                host, port, family=family, type=kind, proto=proto, flags=flags
            )
        except socket.gaierror as error:
            text = f"cannot resolve {host!r}: {error.strerror}"
            raise socket.gaierror(error.errno, text) from None
    unique: list[AddressInfo] = list(dict.fromkeys(map(tuple, found)))
    return [_with_scope(info, *address[2:]) for info in unique] if address[2:] else unique


def _port_number(port: Any) -> int | None:
    """The port if it is a number, 0 for none, None for a service's name."""
    if port is None or port in ("", b""):
        return 0
    try:
        return int(port)
    except (TypeError, ValueError):
        return None


async def _resolve_literal(
    loop: asyncio.AbstractEventLoop,
    host: Any,
    port: Any,
    named_port: bool,
    family: int,
    kind: int,
    proto: int,
    flags: int,
) -> list[AddressInfo] | None:
    """What a host that is an address stands for; None if it is a name."""

    def look_up(port: Any) -> list[AddressInfo]:
        # Not by the loop: uvloop drops a zone (%eth0).
        found = socket.getaddrinfo(host, port, family, kind, proto, flags | socket.AI_NUMERICHOST)
        return found  # type: ignore[return-value]

    try:
        found = look_up(0 if named_port else port)
    except (socket.gaierror, UnicodeError):
        return None  # a name, or an address of another family, of which the resolver says that
    if named_port:
        found = await loop.run_in_executor(None, look_up, port)  # it reads a file
    return found


def _with_scope(info: AddressInfo, flow: int = 0, scope: int = 0) -> AddressInfo:
    """The same with the flow label and the scope that the caller gave beside the name."""
    family, kind, proto, name, address = info
    if family != socket.AF_INET6:
        return info
    address = (*address[:2], flow or address[2], scope or address[3])
    return family, kind, proto, name, address


def interleave(infos: list[AddressInfo], first: int = 1) -> list[AddressInfo]:
    """In the resolver's order, but with the families taking turns (RFC 8305, 4).

    Args:
        infos: from ``resolve``.
        first: how many of the first family come before another has its turn.
    """
    families: dict[int, list[AddressInfo]] = {}
    for info in infos:
        families.setdefault(info[0], []).append(info)
    if not families:
        return []
    leading, *others = families.values()
    turns = zip_longest(leading[first - 1 :], *others)
    return leading[: first - 1] + [info for info in chain.from_iterable(turns) if info is not None]
