"""What an argument must be, and the one way to say that it is not.

Every error reads ``name: must be ..., not ...``. A wrong type is a ``TypeError``, a wrong value a
``ValueError``. Each check returns the value, in the one form that the rest of the library uses.
"""

from __future__ import annotations

import ipaddress
import math
import os
import socket
import sys
from collections.abc import Iterable
from typing import Final, Literal, TypeVar, overload

_T = TypeVar("_T", bound=str)

# Of a wrong value, in characters: what was passed may be a file's contents.
_MAX_SHOWN: Final = 200
# Linux refuses more (MAX_TCP_KEEPIDLE, tcp(7)); elsewhere nine hours do not hurt either.
_MAX_KEEP_ALIVE: Final = 32767
# A name of 255 octets on the wire (RFC 1035, 2.3.4) is 253 characters in print.
_MAX_HOSTNAME: Final = 253
# sizeof(sockaddr_un.sun_path): unix(7) on Linux and macOS. A path needs one byte for its NUL; an
# abstract name needs one for the NUL it begins with.
_SUN_PATH: Final = 108 if sys.platform == "linux" else 104


def wrong_type(name: str, what: str, value: object) -> TypeError:
    """The error for an argument of a type it cannot have. Never shows the value itself."""
    given = "None" if value is None else type(value).__name__
    return TypeError(f"{name}: must be {what}, not {given}")


def wrong_value(name: str, what: str, value: object) -> ValueError:
    """The error for an argument of the right type whose value is not allowed."""
    try:
        given = repr(value)
    except ValueError:  # an int of more digits than Python prints
        given = f"this {type(value).__name__}"
    if len(given) > _MAX_SHOWN:
        given = f"{given[:_MAX_SHOWN]}..."
    return ValueError(f"{name}: must be {what}, not {given}")


def check_flag(name: str, value: object) -> bool:
    """A ``bool``; 1, 0 and None are refused."""
    if not isinstance(value, bool):
        raise wrong_type(name, "True or False", value)
    return value


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """An ``int`` from ``low`` to ``high``, both included."""
    what = f"an int of at least {low}" if high is None else f"an int from {low} to {high}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise wrong_type(name, what, value)
    if value < low or (high is not None and value > high):
        raise wrong_value(name, what, value)
    return value


@overload
def check_seconds(
    name: str, value: object, *, allow_none: Literal[False] = False, allow_zero: bool = False
) -> float: ...
@overload
def check_seconds(
    name: str, value: object, *, allow_none: bool, allow_zero: bool = False
) -> float | None: ...
def check_seconds(
    name: str, value: object, *, allow_none: bool = False, allow_zero: bool = False
) -> float | None:
    """A time in seconds, as a finite ``float``."""
    what = f"a finite number of seconds {'of at least' if allow_zero else 'above'} 0"
    if allow_none:
        if value is None:
            return None
        what += " or None"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise wrong_type(name, what, value)
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds) or seconds < 0 or (seconds == 0 and not allow_zero):
        raise wrong_value(name, what, value)
    return seconds


def check_one_of(name: str, value: object, allowed: Iterable[_T]) -> _T:
    """One of a few strings."""
    names = tuple(allowed)
    what = f"{', '.join(map(repr, names[:-1]))} or {names[-1]!r}"
    if not isinstance(value, str):
        raise wrong_type(name, what, value)
    for found in names:
        if value == found:
            return found
    raise wrong_value(name, what, value)


def check_hostname(name: str, value: object) -> str:
    """A host name, or an IP address without brackets.

    A name has at most 253 characters and labels of 1 to 63 (RFC 1035, 2.3.4), counted after IDNA
    encoding (RFC 3490). Whether it exists is the resolver's business.
    """
    if not isinstance(value, str):
        raise wrong_type(name, "a host name or an IP address as str", value)
    if not value:
        raise wrong_value(name, "a host name or an IP address", value)
    if "\0" in value:
        raise wrong_value(name, "without null bytes", value)
    if value.startswith("["):
        raise wrong_value(name, "an IP address without brackets", value)
    if is_ip_address(value):
        return value
    what = f"a host name of labels of 1 to 63 characters, {_MAX_HOSTNAME} in all"
    # Asked before encoding, whose time grows with the square of the length.
    if len(value) > _MAX_HOSTNAME + 1:
        raise wrong_value(name, what, value)
    try:
        encoded = value.encode("idna")
    except UnicodeError as error:
        raise wrong_value(name, what, value) from error
    if len(encoded.removesuffix(b".")) > _MAX_HOSTNAME or encoded == b".":
        raise wrong_value(name, what, value)
    return value


def is_ip_address(value: str) -> bool:
    """Whether this is an IPv4 or IPv6 address, the latter perhaps with a scope (``fe80::1%lo``)."""
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return False
    return True


def check_port(value: object, low: int = 0, name: str = "port") -> int:
    """A TCP port from ``low`` (0 where the system may pick one, else 1) to 65535."""
    return check_int(name, value, low, 65535)


def check_unix_path(value: object) -> str | bytes:
    """The path of a Unix socket, or on Linux an abstract name, which begins with a NUL.

    Args:
        value: ``str``, ``bytes`` or ``os.PathLike``.

    Returns:
        The path as ``str`` or ``bytes``, as it was given.

    Raises:
        TypeError: it is none of these.
        ValueError: it is empty, holds a NUL elsewhere, or does not fit into ``sun_path``: 107 bytes
            on Linux, 103 on macOS (unix(7)).
    """
    if not isinstance(value, (str, bytes, os.PathLike)):
        raise wrong_type("unix", "a path as str, bytes or os.PathLike", value)
    path: str | bytes = os.fspath(value)
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError as error:
        raise wrong_value("unix", "a path in the file system's encoding", path) from error
    if not encoded:
        raise wrong_value("unix", "a path", path)
    abstract = encoded.startswith(b"\0")
    if abstract and sys.platform != "linux":
        raise wrong_value("unix", "a path (abstract names exist on Linux only)", path)
    if abstract and len(encoded) == 1:
        # To bind(2) this is a request for a name of the kernel's choice, to connect(2) an error.
        raise wrong_value("unix", "a name of at least 1 byte after the NUL", path)
    if b"\0" in encoded[1:]:
        raise wrong_value("unix", "without null bytes", path)
    kind, length = ("name after the NUL", len(encoded) - 1) if abstract else ("path", len(encoded))
    if length > _SUN_PATH - 1:
        raise ValueError(f"unix: must be a {kind} of at most {_SUN_PATH - 1} bytes, not {length}")
    return path


def check_sock(value: object, kind: Literal["bound", "connected"]) -> socket.socket:
    """An open TCP or Unix stream socket that is ``bound`` (to listen on) or ``connected``."""
    if not isinstance(value, socket.socket):
        raise wrong_type("sock", "a socket.socket", value)
    if hasattr(value, "do_handshake"):
        # Its records would be encrypted twice, or read past by the transport.
        raise wrong_type("sock", "a plain socket.socket (give tls= for TLS)", value)
    if value.fileno() < 0:
        raise wrong_value("sock", "an open socket", value)
    if value.type != socket.SOCK_STREAM:
        raise wrong_value("sock", "a stream socket (SOCK_STREAM)", value)
    if value.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
        raise wrong_value("sock", "an AF_INET, AF_INET6 or AF_UNIX socket", value)
    if kind == "connected":
        if not _has_peer(value):
            raise wrong_value("sock", "a connected socket", value)
    elif not _is_bound(value) or _has_peer(value):
        raise wrong_value("sock", "a bound or listening socket", value)
    return value


def _has_peer(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _is_bound(sock: socket.socket) -> bool:
    name = sock.getsockname()
    return bool(name) if sock.family == socket.AF_UNIX else name[1] != 0


def check_address(
    hostname: object, port: object, unix: object, sock: object
) -> Literal["tcp", "unix", "sock"]:
    """Which of the three ways to give an address was used; the parts are not checked here.

    Raises:
        TypeError: none was given, more than one, or only half of ``hostname`` and ``port``.
    """
    tcp = [name for name, value in (("hostname", hostname), ("port", port)) if value is not None]
    others = [name for name, value in (("unix", unix), ("sock", sock)) if value is not None]
    if not tcp and not others:
        raise TypeError("hostname: must be given, with port, or else unix or sock")
    if others and len(tcp + others) > 1:
        clash = (tcp + others)[-1]
        rest = " and ".join(name for name in tcp + others if name != clash)
        raise TypeError(f"{clash}: must not be given together with {rest}")
    if unix is not None:
        return "unix"
    if sock is not None:
        return "sock"
    if hostname is None:
        raise wrong_type("hostname", "given together with port", hostname)
    if port is None:
        raise wrong_type("port", "given together with hostname", port)
    return "tcp"


def check_keep_alive(name: str, value: object) -> float | None:
    """None for off, 0.0 for on with the system's delay, else the seconds before the first probe."""
    if value is None or value is False:
        return None
    if value is True:
        return 0.0
    what = f"True, False, None or a number of seconds above 0, at most {_MAX_KEEP_ALIVE}"
    if not isinstance(value, (int, float)):
        raise wrong_type(name, what, value)
    if not 0 < value <= _MAX_KEEP_ALIVE:
        raise wrong_value(name, what, value)
    return float(value)
