"""The one place that says what an argument must be."""

from __future__ import annotations

import math
import re
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from uvsock import _options as options

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="abstract names are Linux's")
PATH_ROOM = 107 if sys.platform == "linux" else 103


class Index:
    """Looks like an integer, is none."""

    def __index__(self) -> int:
        return 1


def refused(error: type[Exception], text: str) -> AbstractContextManager[object]:
    """Exactly this class (not a subclass) with this whole text."""
    return pytest.raises(
        error, match=f"^{re.escape(text)}$", check=lambda caught: type(caught) is error
    )


# ── Flags, numbers, times, choices ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("value", [True, False])
def test_flag_is_returned(value: bool) -> None:
    assert options.check_flag("cork", value) is value


@pytest.mark.parametrize(
    ("value", "given"), [(1, "int"), (0, "int"), (None, "None"), ("", "str"), ("yes", "str")]
)
def test_flag_accepts_bool_only(value: object, given: str) -> None:
    with refused(TypeError, f"cork: must be True or False, not {given}"):
        options.check_flag("cork", value)


@pytest.mark.parametrize("value", [1, 2, 10])
def test_int_in_range(value: int) -> None:
    assert options.check_int("backlog", value, 1, 10) == value


@pytest.mark.parametrize("value", [0, 11, -(10**30), 10**30])
def test_int_out_of_range(value: int) -> None:
    with refused(ValueError, f"backlog: must be an int from 1 to 10, not {value}"):
        options.check_int("backlog", value, 1, 10)


def test_int_without_upper_bound() -> None:
    assert options.check_int("size", 10**30, 1) == 10**30
    with refused(ValueError, "size: must be an int of at least 1, not 0"):
        options.check_int("size", 0, 1)


@pytest.mark.parametrize(
    ("value", "given"),
    [(True, "bool"), (1.0, "float"), ("1", "str"), (None, "None"), (Index(), "Index")],
)
def test_int_of_another_type(value: object, given: str) -> None:
    with refused(TypeError, f"backlog: must be an int from 1 to 10, not {given}"):
        options.check_int("backlog", value, 1, 10)


def test_a_number_too_long_to_print_still_names_the_argument() -> None:
    with refused(ValueError, "port: must be an int from 0 to 65535, not this int"):
        options.check_port(10**10_000)


def test_a_long_value_is_cut_in_the_text() -> None:
    with pytest.raises(ValueError, match=r"^hostname: must be .*x\.\.\.$") as caught:
        options.check_hostname("hostname", "x" * 100_000)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", [0.5, 3, 1e9])
def test_seconds(value: float) -> None:
    seconds = options.check_seconds("timeout", value)
    assert seconds == value
    assert type(seconds) is float


def test_zero_and_none_seconds_where_they_are_allowed() -> None:
    assert options.check_seconds("timeout", 0, allow_zero=True) == 0.0
    assert options.check_seconds("timeout", None, allow_none=True) is None
    with refused(ValueError, "timeout: must be a finite number of seconds above 0, not 0"):
        options.check_seconds("timeout", 0)
    with refused(TypeError, "timeout: must be a finite number of seconds above 0, not None"):
        options.check_seconds("timeout", None)


@pytest.mark.parametrize("value", [-1, -0.001, math.nan, math.inf, -math.inf])
def test_seconds_of_a_wrong_value(value: float) -> None:
    text = f"timeout: must be a finite number of seconds of at least 0, not {value!r}"
    with refused(ValueError, text):
        options.check_seconds("timeout", value, allow_zero=True)


def test_seconds_too_many_for_a_float() -> None:
    text = f"timeout: must be a finite number of seconds above 0, not 1{'0' * 199}..."
    with refused(ValueError, text):
        options.check_seconds("timeout", 10**400)


@pytest.mark.parametrize(("value", "given"), [(True, "bool"), ("1", "str"), (1j, "complex")])
def test_seconds_of_another_type(value: object, given: str) -> None:
    text = f"timeout: must be a finite number of seconds above 0 or None, not {given}"
    with refused(TypeError, text):
        options.check_seconds("timeout", value, allow_none=True)


def test_one_of() -> None:
    assert options.check_one_of("mode", "b", ("a", "b")) == "b"
    with refused(ValueError, "mode: must be 'a', 'b' or 'c', not 'd'"):
        options.check_one_of("mode", "d", ("a", "b", "c"))
    with refused(TypeError, "mode: must be 'a' or 'b', not list"):
        options.check_one_of("mode", [], ("a", "b"))


# ── Addresses ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "value",
    [
        "localhost",
        "uvsock.test",
        "uvsock.test.",
        "_service.uvsock.test",
        "127.0.0.1",
        "::1",
        "fe80::1%lo",
        "münchen.test",
        ".".join(["a" * 63] * 3 + ["b" * 61]),
    ],
)
def test_hostname_is_returned_as_given(value: str) -> None:
    assert options.check_hostname("hostname", value) == value


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("", "a host name or an IP address"),
        ("uvsock\0.test", "without null bytes"),
        ("\0", "without null bytes"),
        ("[::1]", "an IP address without brackets"),
        ("[localhost]", "an IP address without brackets"),
        ("a..test", "a host name of labels of 1 to 63 characters, 253 in all"),
        (".test", "a host name of labels of 1 to 63 characters, 253 in all"),
        (".", "a host name of labels of 1 to 63 characters, 253 in all"),
        ("a" * 64, "a host name of labels of 1 to 63 characters, 253 in all"),
        ("ü" * 60, "a host name of labels of 1 to 63 characters, 253 in all"),
        ("\udcff.test", "a host name of labels of 1 to 63 characters, 253 in all"),
    ],
)
def test_hostname_of_a_wrong_value(value: str, what: str) -> None:
    with refused(ValueError, f"hostname: must be {what}, not {value!r}"):
        options.check_hostname("hostname", value)


def test_hostname_of_254_characters() -> None:
    value = ".".join(["a" * 63] * 3 + ["b" * 62])
    with pytest.raises(ValueError, match=r"^hostname: must be .* 253 in all, not "):
        options.check_hostname("hostname", value)


@pytest.mark.parametrize(("value", "given"), [(None, "None"), (b"localhost", "bytes"), (1, "int")])
def test_hostname_of_another_type(value: object, given: str) -> None:
    text = f"hostname: must be a host name or an IP address as str, not {given}"
    with refused(TypeError, text):
        options.check_hostname("hostname", value)


def test_port() -> None:
    assert options.check_port(0) == 0
    assert options.check_port(65535, 1) == 65535
    with refused(ValueError, "port: must be an int from 1 to 65535, not 0"):
        options.check_port(0, 1)
    with refused(ValueError, "port: must be an int from 0 to 65535, not 65536"):
        options.check_port(65536)
    with refused(TypeError, "port: must be an int from 0 to 65535, not bool"):
        options.check_port(True)
    with refused(TypeError, "port: must be an int from 0 to 65535, not str"):
        options.check_port("80")
    with refused(TypeError, "local_address[1]: must be an int from 0 to 65535, not None"):
        options.check_port(None, name="local_address[1]")


@pytest.mark.parametrize("value", ["/tmp/s", b"/tmp/s", "s" * PATH_ROOM, b"\xff\xfe"])
def test_unix_path_is_returned_as_given(value: str | bytes) -> None:
    assert options.check_unix_path(value) == value


def test_unix_path_of_a_path_object() -> None:
    assert options.check_unix_path(Path("/tmp/s")) == "/tmp/s"


@linux_only
@pytest.mark.parametrize("value", ["\0name", b"\0name", "\0" + "n" * 107])
def test_abstract_name(value: str | bytes) -> None:
    assert options.check_unix_path(value) == value


@pytest.mark.skipif(sys.platform == "linux", reason="Linux has abstract names")
def test_abstract_name_elsewhere() -> None:
    with pytest.raises(ValueError, match=r"^unix: must be a path \(abstract names"):
        options.check_unix_path("\0name")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("", "unix: must be a path, not ''"),
        (b"", "unix: must be a path, not b''"),
        ("/tmp/a\0b", "unix: must be without null bytes, not '/tmp/a\\x00b'"),
        (
            "s" * (PATH_ROOM + 1),
            f"unix: must be a path of at most {PATH_ROOM} bytes, not {PATH_ROOM + 1}",
        ),
        ("ü" * 54, f"unix: must be a path of at most {PATH_ROOM} bytes, not 108"),
        ("\ud800", "unix: must be a path in the file system's encoding, not '\\ud800'"),
    ],
)
def test_unix_path_of_a_wrong_value(value: str | bytes, text: str) -> None:
    with refused(ValueError, text):
        options.check_unix_path(value)


@linux_only
@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("\0", "unix: must be a name of at least 1 byte after the NUL, not '\\x00'"),
        (b"\0a\0b", "unix: must be without null bytes, not b'\\x00a\\x00b'"),
        (b"\0" + b"n" * 108, "unix: must be a name after the NUL of at most 107 bytes, not 108"),
    ],
)
def test_abstract_name_of_a_wrong_value(value: str | bytes, text: str) -> None:
    with refused(ValueError, text):
        options.check_unix_path(value)


@linux_only
@pytest.mark.parametrize("value", ["s" * 107, "\0" + "n" * 107])
def test_the_longest_unix_address_is_one_the_kernel_takes(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(options.check_unix_path(value))


@pytest.mark.parametrize(
    ("value", "given"), [(None, "None"), (3, "int"), (bytearray(b"s"), "bytearray")]
)
def test_unix_path_of_another_type(value: object, given: str) -> None:
    with refused(TypeError, f"unix: must be a path as str, bytes or os.PathLike, not {given}"):
        options.check_unix_path(value)


@pytest.fixture
def bound() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def test_bound_sock(bound: socket.socket) -> None:
    assert options.check_sock(bound, "bound") is bound


def test_connected_sock() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert options.check_sock(ours, "connected") is ours


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX])
def test_sock_that_is_not_bound(family: socket.AddressFamily) -> None:
    with socket.socket(family) as sock:
        text = f"sock: must be a bound or listening socket, not {sock!r}"
        with refused(ValueError, text):
            options.check_sock(sock, "bound")


def test_sock_in_the_wrong_state(bound: socket.socket) -> None:
    with pytest.raises(ValueError, match=r"^sock: must be a connected socket, not <socket"):
        options.check_sock(bound, "connected")
    with (
        socket.create_connection(bound.getsockname()) as connected,
        pytest.raises(ValueError, match=r"^sock: must be a bound or listening socket, not <socket"),
    ):
        options.check_sock(connected, "bound")


def test_closed_sock() -> None:
    sock = socket.socket()
    sock.close()
    with pytest.raises(ValueError, match=r"^sock: must be an open socket, not <socket"):
        options.check_sock(sock, "bound")


def test_datagram_sock() -> None:
    with (
        socket.socket(type=socket.SOCK_DGRAM) as sock,
        pytest.raises(ValueError, match=r"^sock: must be a stream socket \(SOCK_STREAM\), not "),
    ):
        options.check_sock(sock, "bound")


def test_sock_of_another_family() -> None:
    class Other(socket.socket):
        # Not every kernel makes stream sockets of another family.
        family = socket.AF_UNSPEC

    with (
        Other() as sock,
        pytest.raises(ValueError, match=r"^sock: must be an AF_INET, AF_INET6 or AF_UNIX socket, "),
    ):
        options.check_sock(sock, "bound")


def test_sock_that_is_encrypted_already() -> None:
    ours, theirs = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with (
        theirs,
        context.wrap_socket(ours, server_side=True, do_handshake_on_connect=False) as encrypted,
        refused(
            TypeError, "sock: must be a plain socket.socket (give tls= for TLS), not SSLSocket"
        ),
    ):
        options.check_sock(encrypted, "connected")


@pytest.mark.parametrize(("value", "given"), [(None, "None"), (0, "int"), ("socket", "str")])
def test_sock_of_another_type(value: object, given: str) -> None:
    with refused(TypeError, f"sock: must be a socket.socket, not {given}"):
        options.check_sock(value, "bound")


ABSENT: dict[str, Any] = {"hostname": None, "port": None, "unix": None, "sock": None}


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"hostname": "localhost", "port": 0}, "tcp"),
        ({"hostname": "", "port": 0}, "tcp"),  # wrong, but given: check_hostname says so
        ({"unix": ""}, "unix"),
        ({"sock": 0}, "sock"),
    ],
)
def test_address(given: dict[str, Any], kind: str) -> None:
    assert options.check_address(**{**ABSENT, **given}) == kind


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "hostname: must be given, with port, or else unix or sock"),
        ({"port": 0}, "hostname: must be given together with port, not None"),
        ({"hostname": "h"}, "port: must be given together with hostname, not None"),
        ({"unix": "u", "sock": "s"}, "sock: must not be given together with unix"),
        (
            {"hostname": "h", "port": 1, "unix": "u"},
            "unix: must not be given together with hostname and port",
        ),
        ({"port": 1, "sock": "s"}, "sock: must not be given together with port"),
    ],
)
def test_address_that_is_not_exactly_one(given: dict[str, Any], text: str) -> None:
    with refused(TypeError, text):
        options.check_address(**{**ABSENT, **given})
