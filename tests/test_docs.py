"""Every Python block of README.md and docs/ runs, links lead somewhere, the reference is fresh.

The ``python`` blocks of a page run in order, in one namespace and one process of their own:

- A block with ``await`` outside a function runs on the page's uvloop loop, like a cell of a
  notebook. What it leaves open lives on while the next blocks run. Any other block runs outside a
  loop, so it may call ``uvsock.run``.
- A ``text`` block right after a ``python`` block is what that block prints.
- A comment ``<!-- test: ... -->`` is code that readers do not see. ``@meanwhile`` there runs a
  function in a thread beside the next block, ``dial()`` connects to that block's server, ``stop()``
  sends the process SIGTERM, as the user does who stops a program.
- The port 8080 stands for a free one. The working directory holds ``cert.pem`` and ``key.pem`` for
  localhost, ``other-cert.pem`` and ``other-key.pem`` for other.example, ``client-cert.pem`` and
  ``client-key.pem``, all signed by ``ca.pem``.

Blocks in other languages do not run: ``sh`` and ``console`` show commands, ``py`` signatures.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PORT = "8080"
FENCE = re.compile(r"( *)(`{3,})([\w{}]*)[^`]*")
HIDDEN = re.compile(r"<!-- test: *(.*)")
# Each connects, so it stays below what a page may take altogether.
PATIENCE = 10.0


@dataclass
class Block:
    """A fenced block, or a hidden one (language ``hidden``), of a page."""

    language: str
    line: int  # of its first line of text, from 1
    text: str
    follows: bool  # nothing but blank lines between it and the block before


def blocks(page: str) -> Iterator[Block]:
    lines = iter(enumerate(page.split("\n"), 1))
    follows = False
    for number, line in lines:
        fence, hidden = FENCE.fullmatch(line), HIDDEN.fullmatch(line)
        if fence:
            indent, ticks, language = fence.groups()
            body = []
            for _, inner in lines:
                if inner.strip() == ticks:
                    break
                body.append(inner.removeprefix(indent))
            else:
                raise ValueError(f"line {number}: the block does not end")
            yield Block(language, number + 1, "\n".join(body) + "\n", follows)
            follows = True
        elif hidden:
            body = [hidden[1]]
            while not body[-1].endswith("-->"):
                body.append(next(lines)[1])
            body[-1] = body[-1].removesuffix("-->")
            yield Block("hidden", number, "\n".join(body) + "\n", follows)
        elif line.strip():
            follows = False


class Page:
    """The process that a page's blocks run in."""

    def __init__(self, path: Path, port: int) -> None:
        self.path = path
        self.port = port
        self.threads: list[threading.Thread] = []
        self.failures: list[BaseException] = []
        self.names: dict[str, Any] = {
            "__name__": "__main__",
            "dial": self.dial,
            "meanwhile": self.meanwhile,
            "stop": self.stop,
        }

    def dial(self) -> socket.socket:
        """A connection to the server on port 8080, once it is there."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return socket.create_connection(("localhost", self.port), timeout=PATIENCE)
            except ConnectionRefusedError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    @staticmethod
    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def meanwhile(self, function: Callable[[], None]) -> None:
        def work() -> None:
            try:
                function()
            except BaseException as error:
                self.failures.append(error)
                self.stop()

        thread = threading.Thread(target=work, daemon=True)
        self.threads.append(thread)
        thread.start()

    def run(self) -> None:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            try:
                self.run_blocks(runner)
                runner.run(self.clean_up())
            except BaseException:
                # What is still open would keep the loop from closing.
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)

    def run_blocks(self, runner: asyncio.Runner) -> None:
        found = list(blocks(self.path.read_text()))
        for block, following in zip(found, [*found[1:], None], strict=True):
            if block.language not in ("python", "hidden"):
                continue
            printed = self.run_block(runner, block)
            if following is not None and following.language == "text" and following.follows:
                text = following.text.replace(PORT, str(self.port))
                where = f"{self.path.name}:{following.line}"
                assert printed == text, f"{where}: expected\n{text}but the block printed\n{printed}"

    def run_block(self, runner: asyncio.Runner, block: Block) -> str:
        # The blank lines give the lines of a traceback the numbers that they have in the page.
        source = "\n" * (block.line - 1) + block.text.replace(PORT, str(self.port))
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile(source, str(self.path), "exec", flags=flags, dont_inherit=True)
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            if code.co_flags & inspect.CO_COROUTINE:
                runner.run(self.soon(eval(code, self.names)))
            else:
                exec(code, self.names)
            if block.language == "python":
                for thread in self.threads:
                    thread.join(PATIENCE)
                    if thread.is_alive():
                        raise SystemExit(f"{self.path.name}:{block.line}: its client still runs")
                self.threads.clear()
        if self.failures:
            raise self.failures[0]
        return output.getvalue()

    @staticmethod
    async def soon(block: Coroutine[Any, Any, None]) -> None:
        async with asyncio.timeout(PATIENCE):  # its traceback shows where the block waits
            await block

    @staticmethod
    async def clean_up() -> None:
        """Close what the page has left open, as the end of a program would."""
        from uvsock._socket import live_sockets
        from uvsock._stream import state_of

        loop = asyncio.get_running_loop()
        for listener in list(state_of(loop).listeners):
            listener.stop(True)
        for left in live_sockets(loop):
            left.terminate()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        for _ in range(10):  # `close` is called in a later iteration
            await asyncio.sleep(0)


if __name__ == "__main__":
    Page(Path(sys.argv[1]), int(sys.argv[2])).run()
    raise SystemExit

import pytest  # noqa: E402
import trustme  # noqa: E402

import uvsock  # noqa: E402
from conftest import Authority, run_python, unused_port  # noqa: E402

PAGES = sorted(
    [ROOT / "README.md", *(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)]
)
RUNNABLE = [page for page in PAGES if "```python" in page.read_text()]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def directory(authority: Authority, tmp_path: Path) -> Path:
    def write(prefix: str, leaf: trustme.LeafCert) -> None:
        pair = authority.pair(leaf)
        (tmp_path / f"{prefix}cert.pem").write_bytes(pair["cert"])
        (tmp_path / f"{prefix}key.pem").write_bytes(pair["key"])

    (tmp_path / "ca.pem").write_bytes(authority.ca_pem)
    write("", authority.server)
    write("client-", authority.client)
    write("other-", authority.ca.issue_cert("other.example"))
    return tmp_path


@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_the_code_of_a_page_runs_and_prints_what_the_page_says(page: Path, directory: Path) -> None:
    # The same uvsock as here, also where the path to it is relative.
    environment = os.environ | {"PYTHONPATH": str(Path(uvsock.__file__).parent.parent)}
    run_python(__file__, str(page), str(unused_port()), cwd=directory, env=environment, timeout=50)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_say_what_they_are_so_that_none_escapes_the_tests(page: Path) -> None:
    known = {"python", "hidden", "text", "sh", "console", "typescript", "cython", "{toctree}"}
    if page.name == "reference.md":
        known.add("py")
    if page.name == "compiled.md":
        known |= {"py", "toml"}  # the files of a project, which test_compiled.py builds
    assert {block.language for block in blocks(page.read_text())} <= known


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    text = re.sub(r"^ *(`{3,}).*?^ *\1$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        count = sum(other == slug or other.startswith(f"{slug}-") for other in found)
        found.add(f"{slug}-{count}" if slug in found else slug)
    return found


@pytest.mark.parametrize(
    "page",
    [*PAGES, *(ROOT / f"{n}.md" for n in ("CHANGELOG", "CONTRIBUTING", "SECURITY"))],
    ids=name_of,
)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^ *(`{3,}).*?^ *\1$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_every_page_of_docs_is_in_a_table_of_contents() -> None:
    listed = set()
    for page in PAGES:
        for toc in re.findall(r"^```\{toctree\}\n(.*?)^```$", page.read_text(), re.M | re.S):
            for entry in toc.split("\n"):
                if entry and not entry.startswith(":"):
                    listed.add((page.parent / entry).resolve().with_suffix(".md"))
    pages = {page for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert listed == pages - {ROOT / "docs" / "index.md"}


def test_the_reference_is_what_the_stubs_and_docstrings_say(tmp_path: Path) -> None:
    made = tmp_path / "reference.md"
    command = [sys.executable, str(ROOT / "docs" / "make_reference.py"), str(made)]
    subprocess.run(command, check=True, timeout=30)
    committed = (ROOT / "docs" / "reference.md").read_text()
    assert made.read_text() == committed, "run: python docs/make_reference.py"


def test_the_page_on_bun_accounts_for_every_behaviour_on_the_list() -> None:
    page = (ROOT / "docs" / "guides" / "from_bun.md").read_text()
    counted: list[int] = []
    for first, last in re.findall(r"\bB(\d+)(?:[-\u2013]B?(\d+))?", page):
        counted += range(int(first), int(last or first) + 1)
    assert set(counted) == set(range(1, 237))


@pytest.mark.skipif(find_spec("sphinx") is None, reason="the docs extra is not installed")
def test_sphinx_has_nothing_to_complain_about(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E"]
    command += ["-d", str(tmp_path / "trees"), str(ROOT / "docs"), str(tmp_path / "html")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
