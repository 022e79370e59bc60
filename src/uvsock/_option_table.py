"""The options that ``listen`` and ``connect`` hand on to their sockets, a row for each.

From the rows come the checks, what ``inspect.signature``, ``help`` and the reference say, and the
attributes of a ``Listener``. A new option is its row, its type in the class of keywords beside it,
and the field of ``Group`` that connections read.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import (
    Any,
    Final,
    Generic,
    Literal,
    Never,
    NoReturn,
    Self,
    TypeAlias,
    TypedDict,
    TypeVar,
    overload,
)

from uvsock._framing import Framer, as_framer
from uvsock._options import (
    check_flag,
    check_int,
    check_keep_alive,
    check_one_of,
    check_seconds,
    wrong_type,
)

_T = TypeVar("_T")
_Function = TypeVar("_Function", bound=Callable[..., Any])

# In the order of the enum Delivery, which the field holds.
BINARY_TYPES: Final = ("bytes", "bytearray", "memoryview")


class Option(Generic[_T]):
    """A row of the table, and the attribute of a ``Listener`` that shows the option's value.

    Args:
        default: what it is when it is not given.
        check: is called with the name and a value. Returns what the field holds for it, or raises
            an error that names the option.
        meaning: its text in a list of arguments.
        shown: the values that the field stands for by a number of its own, by that number.
        field: of the ``Group``; None for the one of the option's name.
    """

    def __init__(
        self,
        default: _T,
        check: Callable[[str, Any], Any],
        meaning: str,
        *,
        shown: Mapping[Any, _T] | None = None,
        field: str | None = None,
    ) -> None:
        self.default = default
        self.check = check
        self.__doc__ = meaning
        self._shown = shown
        self._field = field

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        self.field = self._field or name
        self.unset = self.check(name, self.default)

    @overload
    def __get__(self, listener: None, owner: type) -> Self: ...
    @overload
    def __get__(self, listener: object, owner: type) -> _T: ...
    def __get__(self, listener: Any, owner: type) -> Self | _T:
        if listener is None:
            return self
        held: _T = getattr(listener._group, self.field)
        return held if self._shown is None else self._shown.get(held, held)

    def __set__(self, listener: object, value: Never) -> NoReturn:
        raise AttributeError(f"{self.name!r} of a listener cannot be changed")


# ── What the fields hold ───────────────────────────────────────────────────────────────────────


def _factory(name: str, value: Any) -> Callable[[], Any] | None:
    if value is not None and not callable(value):
        raise wrong_type(name, "callable", value)
    return value  # type: ignore[no-any-return]


def _delivery(name: str, value: Any) -> int:
    return BINARY_TYPES.index(check_one_of(name, value, BINARY_TYPES))


def _framing(name: str, value: Any) -> Framer | None:
    return as_framer(value)


def _probes(name: str, value: Any) -> float:
    delay = check_keep_alive(name, value)
    return -1.0 if delay is None else delay


def _seconds_or_never(name: str, value: Any) -> float:
    return check_seconds(name, value, allow_none=True) or 0.0


# ── The rows, and their types as keywords ──────────────────────────────────────────────────────


class SocketRows:
    """Options of ``listen`` and ``connect``."""

    allow_half_open: Option[bool] = Option(
        False, check_flag, "keep the own side open after the peer has ended its own."
    )
    binary_type: Option[Literal["bytes", "bytearray", "memoryview"]] = Option(
        "bytes",
        _delivery,
        'what ``data`` is called with: ``"bytes"``, ``"bytearray"`` or ``"memoryview"``\n'
        "(borrowed: valid until the handler returns).",
        shown=dict(enumerate(BINARY_TYPES)),
        field="delivery",
    )
    framing: Option[Framer | None] = Option(
        None,
        _framing,
        "a ``Framer``, such as ``Lines()``, that cuts what arrives into frames: ``data`` is\n"
        "called once per frame. None to deliver what arrives as it comes.",
    )
    cork: Option[bool] = Option(
        True, check_flag, "gather writes into one send(2); False for one send per write."
    )
    high_water_mark: Option[int] = Option(
        65536,
        # The core counts in a signed machine word.
        partial(check_int, low=1, high=sys.maxsize),
        "the most that is held per socket, in bytes.",
    )
    no_delay: Option[bool] = Option(True, check_flag, "send small segments at once (TCP_NODELAY).")
    keep_alive: Option[bool | float | None] = Option(
        None,
        _probes,
        "probe idle peers: True, or the idle seconds before the first probe.",
        shown={-1.0: None, 0.0: True},
    )
    idle_timeout: Option[float | None] = Option(
        None,
        _seconds_or_never,
        "seconds without traffic until ``timeout`` is called; None for never.",
        shown={0.0: None},
    )
    linger_timeout: Option[float] = Option(
        30.0,
        partial(check_seconds, allow_zero=True),
        "seconds that ``close()`` may take to deliver what was accepted.",
    )


class SocketOptions(TypedDict, total=False):
    """The types of ``SocketRows`` as keywords."""

    allow_half_open: bool
    binary_type: Literal["bytes", "bytearray", "memoryview"]
    framing: Framer | None
    cork: bool
    high_water_mark: int
    no_delay: bool
    keep_alive: bool | float | None
    idle_timeout: float | None
    linger_timeout: float


class ListenRows(SocketRows):
    """Options of ``listen``; these are of no use to one connection."""

    data_factory: Option[Callable[[], Any] | None] = Option(
        None,
        _factory,
        "called without arguments for each connection, to make its ``socket.data``.",
    )


class ListenOptions(SocketOptions, total=False):
    """The types of ``ListenRows`` as keywords."""

    data_factory: Callable[[], Any] | None


# ── What is made of them ───────────────────────────────────────────────────────────────────────

# Where the rows go in a docstring.
_PLACE: Final = re.compile(r"^( *)\*\*options: .*$", re.MULTILINE)

Table: TypeAlias = Mapping[str, Option[Any]]


def _rows(of: type) -> Table:
    return {
        name: row
        for owner in of.__mro__
        for name, row in vars(owner).items()
        if isinstance(row, Option)
    }


LISTEN: Final = _rows(ListenRows)
CONNECT: Final = _rows(SocketRows)


def check_options(table: Table, function: str, given: Mapping[str, object]) -> dict[str, Any]:
    """What the fields of a ``Group`` hold with these options.

    Raises:
        TypeError, ValueError: naming the option.
    """
    for name in given:
        if name not in table:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    return {
        row.field: row.check(name, given[name]) if name in given else row.unset
        for name, row in table.items()
    }


def _described(table: Table, place: re.Match[str]) -> str:
    indent = place[1]
    lines = (f"{indent}{name}: {row.__doc__}" for name, row in table.items())
    return "\n".join(line.replace("\n", f"\n{indent}    ") for line in lines)


def takes(table: Table, keywords: type) -> Callable[[_Function], _Function]:
    """Decorate a function of ``**options``: it shows the rows in their place.

    Its docstring has a line for ``**options``, where those of the rows go.
    """

    def show(function: _Function) -> _Function:
        types = keywords.__annotations__
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        parameters += [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=row.default,
                annotation=types[name].__forward_arg__,  # a str, as of the others
            )
            for name, row in table.items()
        ]
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        hints = function.__annotations__ | types
        del hints["options"]
        # Assigned: changed in place, __annotate__ of Python 3.14 would still tell the old ones.
        function.__annotations__ = hints
        if function.__doc__ is not None:  # as it is with -OO
            function.__doc__ = _PLACE.sub(partial(_described, table), function.__doc__)
        return function

    return show
