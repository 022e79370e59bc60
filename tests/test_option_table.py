"""One table of options: what is checked, shown and typed comes from its rows."""

from __future__ import annotations

import inspect
import math
import os
import re
import socket
import sys
import typing
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

import uvsock
from conftest import Wire, run_python
from uvsock import _option_table as table
from uvsock._option_table import CONNECT, LISTEN, Option, check_options
from uvsock._socket import Group

ROOT = Path(__file__).resolve().parent.parent
HERE = ("127.0.0.1", 0)
FUNCTIONS: dict[str, Any] = {"listen": uvsock.listen, "connect": uvsock.connect}
TABLES = {"listen": LISTEN, "connect": CONNECT}
ROWS = {"listen": table.ListenRows, "connect": table.SocketRows}
KEYWORDS: dict[str, Any] = {"listen": table.ListenOptions, "connect": table.SocketOptions}
each_function = pytest.mark.parametrize("function", FUNCTIONS)


def refused(error: type[Exception], text: str) -> AbstractContextManager[object]:
    """Exactly this class (not a subclass) with this whole text."""
    return pytest.raises(
        error, match=f"^{re.escape(text)}$", check=lambda caught: type(caught) is error
    )


def fields(**given: Any) -> dict[str, Any]:
    return check_options(LISTEN, "listen", given)


def nothing(socket: Any, data: bytes) -> None: ...


# ── A row is all there is to write ─────────────────────────────────────────────────────────────


@each_function
def test_each_row_is_a_keyword_of_the_signature(function: str) -> None:
    found = inspect.signature(FUNCTIONS[function]).parameters
    hints = KEYWORDS[function].__annotations__
    last = [*found.values()][-len(TABLES[function]) :]
    assert [parameter.name for parameter in last] == [*TABLES[function]]
    for parameter in last:
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.default is TABLES[function][parameter.name].default
        assert parameter.annotation == hints[parameter.name].__forward_arg__
    assert "options" not in found


@each_function
def test_each_row_has_one_type_for_all_who_ask(function: str) -> None:
    keywords = typing.get_type_hints(KEYWORDS[function])
    assert keywords.keys() == TABLES[function].keys()
    assert {name: Option[hint] for name, hint in keywords.items()} == typing.get_type_hints(
        ROWS[function]
    )
    hints = typing.get_type_hints(FUNCTIONS[function])
    assert {name: hints[name] for name in keywords} == keywords
    assert hints.keys() == {*inspect.signature(FUNCTIONS[function]).parameters, "return"}


@each_function
def test_each_row_is_in_help_and_in_the_reference(function: str) -> None:
    reference = (ROOT / "docs" / "reference.md").read_text()
    (section,) = re.findall(rf"^## {function}\n(.*?)^## ", reference, re.M | re.S)
    text = inspect.getdoc(FUNCTIONS[function])
    assert text is not None
    assert "**options" not in text
    for name, row in TABLES[function].items():
        meaning = f"{name}: {row.__doc__}".replace("\n", "\n        ")
        assert f"\n    {meaning}\n" in text
        assert max(map(len, meaning.splitlines())) < 96
        assert f"\n- `{name}`: " in section
        assert f"\n    {name}: " in section


@pytest.mark.parametrize("row", LISTEN.values(), ids=LISTEN)
def test_each_row_has_a_field_that_is_read(row: Option[Any]) -> None:
    assert hasattr(Group, row.field)
    sources = "".join((ROOT / f"src/uvsock/{m}.pyx").read_text() for m in ("_socket", "_stream"))
    assert re.search(rf"\b(group|self)\.{row.field}\b(?! =[^=])", sources)


async def test_a_listener_shows_each_row_by_default() -> None:
    async with await uvsock.listen({"data": nothing}, *HERE) as listener:
        for name, row in LISTEN.items():
            found = getattr(listener, name)
            assert (found, type(found)) == (row.default, type(row.default))


@pytest.mark.parametrize(
    ("name", "given", "shown"),
    [
        ("allow_half_open", True, True),
        ("binary_type", "bytearray", "bytearray"),
        ("binary_type", "memoryview", "memoryview"),
        ("framing", uvsock.FixedSize(3), uvsock.FixedSize(3)),
        ("cork", False, False),
        ("high_water_mark", sys.maxsize, sys.maxsize),
        ("no_delay", False, False),
        ("keep_alive", False, None),
        ("keep_alive", True, True),
        ("keep_alive", 1, 1.0),
        ("idle_timeout", 5, 5.0),
        ("linger_timeout", 0, 0.0),
        ("data_factory", list, list),
    ],
)
async def test_a_listener_shows_what_it_was_given(name: str, given: Any, shown: Any) -> None:
    async with await uvsock.listen({"data": nothing}, *HERE, **{name: given}) as listener:
        found = getattr(listener, name)
        assert (found, type(found)) == (shown, type(shown))
        others = {other: row.default for other, row in LISTEN.items() if other != name}
        assert {other: getattr(listener, other) for other in others} == others


async def test_options_of_a_listener_are_to_look_at(tcp_wire: Wire) -> None:
    async with await tcp_wire.listen({"data": nothing}) as listener:
        for name in LISTEN:
            with pytest.raises(AttributeError, match=name):
                setattr(listener, name, getattr(listener, name))


@each_function
def test_an_unknown_option_is_the_error_of_any_wrong_keyword(function: str) -> None:
    """Before all else that is wrong, as where Python finds it."""
    call: Callable[..., Any] = FUNCTIONS[function]
    with refused(TypeError, f"{function}() got an unexpected keyword argument 'colour'"):
        call(None, colour=1, cork=1)


def test_what_only_a_listener_can_use_is_no_option_of_connect() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'data_factory'"):
        uvsock.connect({"data": nothing}, "localhost", 1, data_factory=list)  # type: ignore[call-arg]


def test_without_docstrings_it_works_as_well() -> None:
    program = "import uvsock; assert uvsock.listen.__doc__ is None; print('made')"
    assert run_python("-OO", "-c", program) == "made\n"


# ── What the checks say, and what the fields hold ──────────────────────────────────────────────


def test_socket_options_by_default() -> None:
    assert fields() == {
        "allow_half_open": False,
        "delivery": 0,
        "framing": None,
        "cork": True,
        "high_water_mark": 65536,
        "no_delay": True,
        "keep_alive": -1.0,
        "idle_timeout": 0.0,
        "linger_timeout": 30.0,
        "data_factory": None,
    }


@pytest.mark.parametrize(
    ("given", "kept"), [(None, -1.0), (False, -1.0), (True, 0.0), (60, 60.0), (0.5, 0.5)]
)
def test_keep_alive(given: Any, kept: float) -> None:
    found = fields(keep_alive=given)["keep_alive"]
    assert found == kept
    assert type(found) is type(kept)


def test_times_become_floats() -> None:
    found = fields(idle_timeout=5, linger_timeout=0)
    assert (found["idle_timeout"], found["linger_timeout"]) == (5.0, 0.0)
    assert type(found["idle_timeout"]) is type(found["linger_timeout"]) is float


@pytest.mark.parametrize("name", ["allow_half_open", "cork", "no_delay"])
@pytest.mark.parametrize("value", [0, 1, None, "no"])
def test_socket_flags(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name}: must be True or False, not "):
        fields(**{name: value})


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (
            {"binary_type": "buffer"},
            ValueError,
            "binary_type: must be 'bytes', 'bytearray' or 'memoryview', not 'buffer'",
        ),
        (
            {"binary_type": bytes},
            TypeError,
            "binary_type: must be 'bytes', 'bytearray' or 'memoryview', not type",
        ),
        (
            {"binary_type": []},
            TypeError,
            "binary_type: must be 'bytes', 'bytearray' or 'memoryview', not list",
        ),
        (
            {"high_water_mark": 0},
            ValueError,
            f"high_water_mark: must be an int from 1 to {sys.maxsize}, not 0",
        ),
        (
            {"high_water_mark": 1e5},
            TypeError,
            f"high_water_mark: must be an int from 1 to {sys.maxsize}, not float",
        ),
        (
            {"idle_timeout": 0},
            ValueError,
            "idle_timeout: must be a finite number of seconds above 0 or None, not 0",
        ),
        (
            {"idle_timeout": False},
            TypeError,
            "idle_timeout: must be a finite number of seconds above 0 or None, not bool",
        ),
        (
            {"linger_timeout": None},
            TypeError,
            "linger_timeout: must be a finite number of seconds of at least 0, not None",
        ),
        (
            {"linger_timeout": math.inf},
            ValueError,
            "linger_timeout: must be a finite number of seconds of at least 0, not inf",
        ),
        (
            {"keep_alive": 0},
            ValueError,
            "keep_alive: must be True, False, None or a number of seconds above 0, at most 32767, "
            "not 0",
        ),
        (
            {"keep_alive": math.nan},
            ValueError,
            "keep_alive: must be True, False, None or a number of seconds above 0, at most 32767, "
            "not nan",
        ),
        (
            {"keep_alive": 32768},
            ValueError,
            "keep_alive: must be True, False, None or a number of seconds above 0, at most 32767, "
            "not 32768",
        ),
        (
            {"keep_alive": "60"},
            TypeError,
            "keep_alive: must be True, False, None or a number of seconds above 0, at most 32767, "
            "not str",
        ),
        (
            {"framing": b"--"},
            TypeError,
            "framing: must be a Framer, such as Lines(), or None, not bytes",
        ),
        ({"data_factory": 5}, TypeError, "data_factory: must be callable, not int"),
    ],
)
def test_socket_options_that_are_wrong(
    given: dict[str, Any], error: type[Exception], text: str
) -> None:
    with refused(error, text):
        fields(**given)


@pytest.mark.skipif(sys.platform != "linux", reason="what Linux takes")
def test_the_longest_keep_alive_is_one_the_kernel_takes() -> None:
    keep_alive = fields(keep_alive=32767)["keep_alive"]
    with socket.socket() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, int(keep_alive))
        with pytest.raises(OSError, match=re.escape(os.strerror(22))):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, int(keep_alive) + 1)
