"""Writes docs/reference.md: signatures from the stubs, descriptions from the docstrings.

python docs/make_reference.py [FILE]
"""

from __future__ import annotations

import ast
import asyncio
import enum
import inspect
import re
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import uvsock
import uvsock.testing
from uvsock._option_table import Option

PACKAGE = Path(uvsock.__file__).parent
# What readers look for first; other names follow in alphabetical order.
ORDER = ("run", "listen", "connect", "Handlers", "Socket", "ReadyState", "Listener", "TLS")
# Methods that a transport calls; they are no part of a socket's interface.
FOR_UVLOOP = {*dir(asyncio.BufferedProtocol), *dir(asyncio.Protocol)}
# What is a field of a C structure has no docstring.
FIELDS = {
    "bytes_read": "Bytes received; plain text for TLS.",
    "bytes_written": "The sum of what `write` and the like have accepted; plain text for TLS.",
    "data": "Any object of yours. It begins as `data=`, or as what `data_factory=` returns.",
}
GIVEN = "And the options of `listen` that its sockets are made with, to look at:"
HEAD = """# Reference

<!-- Made by docs/make_reference.py. Change the stubs and docstrings instead. -->

Every public name of `uvsock`, and at the end those of `uvsock.testing`. Sizes are in bytes and
times in seconds, unless it says otherwise.

- `HandlersLike` is a `Handlers`, a mapping with its keys, or an object with its attributes.
- `TLSLike` is a `TLS`, a mapping with its keys, an `ssl.SSLContext`, a `bool` or `None`.
- `Buffer` is any object with the buffer protocol: `bytes`, `bytearray`, `memoryview`, `array`..."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


def definition(value: Any) -> Any:
    """What the stub says of a class or function, or its source where it is Python."""
    source = PACKAGE.joinpath(*value.__module__.split(".")[1:]).with_suffix(".py")
    stub = source.with_suffix(".pyi")
    tree = ast.parse((stub if stub.exists() else source).read_text())
    (found,) = (node for node in tree.body if getattr(node, "name", None) == value.__name__)
    return found


def description(value: Any) -> str:
    """A docstring as Markdown: its sections become bold words and lists."""
    text = inspect.getdoc(value) or ""
    # Cython puts the signature into the first line.
    text = re.sub(rf"^{getattr(value, '__name__', '')}\(.*\n\n?", "", text)
    parts = re.split(
        r"^(Args|Attributes|Returns|Raises):$", text.replace("``", "`"), flags=re.MULTILINE
    )
    result = [parts[0].strip()]
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        inside, _, after = re.sub(r"\n\n(?=\S)", "\0", body).partition("\0")
        result.append(f"**{title.replace('Args', 'Arguments')}**")
        if title == "Returns":
            result.append(inspect.cleandoc(inside))
        else:
            items = re.split(r"\n    (?=\S)", inside.rstrip())[1:]
            result.append("\n".join(item(" ".join(text.split())) for text in items))
        result.append(after.strip())
    return "\n\n".join(part for part in result if part)


def item(text: str) -> str:
    names, _, meaning = text.partition(": ")
    return f"- {', '.join(f'`{name}`' for name in names.split(', '))}: {meaning}"


def argument(name: str, annotation: ast.expr | None, default: ast.expr | None) -> str:
    text = name if annotation is None else f"{name}: {ast.unparse(annotation)}"
    return text if default is None else f"{text} = {ast.unparse(default)}"


def options(value: Any) -> list[str]:
    """What the made signature of a function has in the place of ``**options``."""
    made = getattr(value, "__signature__", None)
    return [
        f"{p.name}: {p.annotation} = {p.default!r}"
        for p in (made.parameters.values() if made else ())
        if p.kind is p.KEYWORD_ONLY and p.name not in value.__kwdefaults__
    ]


def signature(name: str, node: Function, *, bound: bool, value: Any = None) -> str:
    given = node.args
    before = [None] * (len(given.args) - len(given.defaults))
    both = zip(given.args, [*before, *given.defaults], strict=True)
    parts = [argument(a.arg, a.annotation, d) for a, d in both]
    parts = parts[1:] if bound else parts
    # `*args: Never` in a stub says that there are none.
    several = given.vararg if "Never" not in ast.dump(given) else None
    if several is not None:
        parts.append(argument(f"*{several.arg}", several.annotation, None))
    if given.kwonlyargs:
        if several is None:
            parts.append("*")
        named = zip(given.kwonlyargs, given.kw_defaults, strict=True)
        parts += [argument(a.arg, a.annotation, d) for a, d in named]
    if given.kwarg is not None:
        rest = argument(f"**{given.kwarg.arg}", given.kwarg.annotation, None)
        parts += options(value) or [rest]
    return call(name, parts, node)


def call(name: str, parts: list[str], node: Function | None = None) -> str:
    result = "" if node is None or node.returns is None else f" -> {ast.unparse(node.returns)}"
    result = result.removesuffix(" -> None")
    start = "await " if isinstance(node, ast.AsyncFunctionDef) else ""
    text = f"{start}{name}({', '.join(parts)}){result}"
    if len(text) > 88:
        text = f"{start}{name}(\n    " + ",\n    ".join(parts) + f",\n){result}"
    return text


def block(*signatures: str) -> str:
    return "```py\n" + "\n".join(signatures) + "\n```"


def members(node: ast.ClassDef, value: type) -> dict[str, list[Any]]:
    """The public members, those of private bases first; overloads come together."""
    found: dict[str, list[Any]] = {}
    for base in value.__bases__:
        if base.__module__.startswith("uvsock") and base.__name__ not in uvsock.__all__:
            inherited = members(definition(base), base)
            found |= {k: v for k, v in inherited.items() if k not in FOR_UVLOOP}
    for child in node.body:
        name: str = getattr(child, "name", "") or getattr(getattr(child, "target", None), "id", "_")
        decorators = [ast.unparse(d) for d in getattr(child, "decorator_list", [])]
        if not name.startswith("_") and f"{name}.setter" not in decorators:
            found.setdefault(name, []).append(child)
    return found


def is_attribute(node: Any) -> bool:
    return not isinstance(node, Function) or any(
        ast.unparse(d) == "property" for d in node.decorator_list
    )


def attribute(name: str, node: Any, value: type, body: list[Any]) -> str:
    annotation = node.returns if isinstance(node, Function) else node.annotation
    text = FIELDS.get(name, "") if value is uvsock.Socket else ""
    if isinstance(node, Function):
        text = text or description(getattr(value, name))
    elif node in body[:-1]:  # a string after an annotation is its description
        following = body[body.index(node) + 1]
        if isinstance(following, ast.Expr):
            text = ast.literal_eval(following.value)
    parts = [f"- `{argument(name, annotation, None)}`", " ".join(text.split())]
    return ": ".join(part for part in parts if part)


def constructor(name: str, node: ast.ClassDef, value: type) -> tuple[list[str], set[str]]:
    """The signature, as a block if there is one, and the names of its arguments."""
    if is_dataclass(value):
        made: list[Any] = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        parts = [argument(n.target.id, n.annotation, n.value) for n in made]
        return [block(call(name, ["*", *parts]))], {n.target.id for n in made}
    for child in node.body:
        if isinstance(child, Function) and child.name == "__init__":
            text = signature(name, child, bound=True)
            # Some classes are made by functions only.
            raises = isinstance(child.body[0], ast.Raise) or "NoReturn" in text
            return [] if raises else [block(text)], {a.arg for a in child.args.kwonlyargs}
    return [], set()


def render_class(name: str, value: type) -> list[str]:
    node = definition(value)
    made, arguments = constructor(name, node, value)
    parts = [f"## {name}", *made, description(value)]
    if issubclass(value, Exception):
        return [*parts, f"A subclass of `{value.__bases__[0].__name__}`."]
    if issubclass(value, enum.IntEnum):
        return [*parts, "\n".join(f"- `{member.name}` = {member.value}" for member in value)]
    public = members(node, value)
    attributes = {n: found[0] for n, found in public.items() if is_attribute(found[0])}
    # Of an Option[T], T.
    rows = {
        n: found.annotation.slice
        for n, found in attributes.items()
        if isinstance(getattr(value, n, None), Option)
    }
    if attributes.keys() - arguments:
        listed = [
            attribute(n, found, value, node.body)
            for n, found in attributes.items()
            if n not in rows
        ]
        parts += [f"### Attributes of {name}", "\n".join(listed)]
        if rows:
            parts += [GIVEN, "\n".join(f"- `{argument(n, rows[n], None)}`" for n in rows)]
    for method, found in public.items():
        if method not in attributes:
            signatures = [signature(method, f, bound=True) for f in found]
            parts += [f"### {name}.{method}", block(*signatures)]
            parts.append(description(getattr(value, method)))
    return parts


def render() -> str:
    names = [name for name in uvsock.__all__ if not name.startswith("_")]
    names.sort(key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n))
    values = {name: getattr(uvsock, name) for name in names}
    values |= {f"testing.{name}": getattr(uvsock.testing, name) for name in uvsock.testing.__all__}
    parts = [HEAD]
    for name, value in values.items():
        if isinstance(value, type):
            parts += render_class(name, value)
        else:
            parts += [
                f"## {name}",
                block(signature(name, definition(value), bound=False, value=value)),
            ]
            parts.append(description(value))
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("reference.md")
    target.write_text(render())
