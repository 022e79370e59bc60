"""Who is measured: how a peer is found, and how its server is started."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from benchmarks.workloads import Workload

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "benchmarks"
SERVERS = HERE / "servers"


class Missing(Exception):
    """A peer, or a tool, is not on this machine. The text says what is."""


@dataclass(frozen=True)
class Peer:
    name: str
    label: str
    # The command of a server, without the behaviour. Raises Missing.
    command: Callable[[], list[str]]
    # Puts the file with the key and the certificate into the command; None: no TLS.
    tls: Callable[[str], list[str]] | None
    # Where it differs from its sibling in nothing else than how it reads.
    only: Callable[[Workload], bool] = lambda workload: True

    def takes_part(self, workload: Workload) -> bool:
        return (
            (workload.peers is None or self.name in workload.peers)
            and (self.tls is not None or not workload.tls)
            and self.only(workload)
        )

    def server(self, workload: Workload, certificate: str | None) -> list[str]:
        command = [*self.command(), workload.behaviour]
        if workload.environment:
            command = ["env", *workload.environment, *command]
        if workload.tls:
            assert self.tls is not None
            assert certificate is not None
            command += self.tls(certificate)
        return command


# Makes an extension module of a .pyx, in a directory for modules, C and objects.
COMPILE = """
import sys
from pathlib import Path
from Cython.Build import cythonize
from setuptools import Extension, setup

source, build = sys.argv[1:]
setup(
    ext_modules=cythonize(
        [Extension(Path(source).stem, [source])], build_dir=build, force=True, language_level=3
    ),
    script_args=["--quiet", "build_ext", "--build-lib", build, "--build-temp", build],
)
"""


# --- what has to be compiled ------------------------------------------------------------------


def compiler() -> str:
    found = shutil.which(os.environ.get("CC", "cc"))
    if found is None:
        raise Missing("no C compiler")
    return found


def compiled(name: str, *flags: str) -> Path:
    """The program of ``name.c``, compiled if it is not there or older than its source."""
    source = HERE / f"{name}.c"
    program = BUILD / "-".join((name, *(flag.strip("-") for flag in flags if flag[:2] == "-D")))
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        BUILD.mkdir(parents=True, exist_ok=True)
        # Under another name first: two runs may compile at the same time.
        fresh = program.with_suffix(f".{os.getpid()}")
        command = [compiler(), "-O2", "-Wall", "-Wextra", str(source), "-o", str(fresh), *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Missing(f"{source.name} does not compile: {done.stderr.strip()}")
        fresh.replace(program)
    return program


@cache
def handlers() -> str:
    """Compiles servers/compiled.pyx if that is not done. Returns the directory of the module."""
    source = HERE / "servers" / "compiled.pyx"
    module = BUILD / f"compiled{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    package = find_spec("uvsock")
    assert package is not None
    assert package.origin is not None
    # Also when a class that it is derived from has changed.
    sources = [source, *Path(package.origin).parent.glob("*.pxd")]
    if not module.exists() or module.stat().st_mtime < max(s.stat().st_mtime for s in sources):
        path = os.pathsep.join(
            (str(Path(package.origin).parent.parent), os.environ.get("PYTHONPATH", ""))
        )
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, str(source), str(BUILD)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        if done.returncode:
            raise Missing(f"{source.name} does not compile: {done.stderr.strip()}")
    return str(BUILD)


@cache
def load() -> tuple[Path, str | None]:
    """The load generator, and why it has no TLS (None: it has)."""
    try:
        return compiled("load", "-DTLS", "-lssl", "-lcrypto"), None
    except Missing as error:
        if "openssl/" not in str(error) and "ssl" not in str(error):
            raise
        return compiled("load"), "OpenSSL's headers are missing (Debian: libssl-dev)"


@cache
def certificate(directory: str) -> str:
    """A file with a fresh P-256 key and its certificate, for 127.0.0.1."""
    openssl = shutil.which("openssl")
    if openssl is None:
        raise Missing("no openssl command to make a certificate with")
    key, file = Path(directory, "key.pem"), Path(directory, "server.pem")
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-nodes", "-days", "2", "-newkey", "ec"),
            *("-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", "/CN=benchmark"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(file)),
        ],
        check=True,
        capture_output=True,
    )
    file.write_text(key.read_text() + file.read_text())
    return str(file)


# --- the peers --------------------------------------------------------------------------------


def _floor() -> list[str]:
    return [str(compiled("floor"))]


def bun() -> str:
    places = [
        os.environ.get("UVSOCK_BUN"),
        shutil.which("bun"),
        str(HERE.parent / "build/npm/node_modules/bun/bin/bun.exe"),
    ]
    for place in places:
        if place and Path(place).exists():
            return place
    raise Missing("no bun (npm install bun, then UVSOCK_BUN=node_modules/bun/bin/bun.exe)")


def _bun() -> list[str]:
    return [bun(), str(SERVERS / "server.ts")]


def node() -> str:
    found = shutil.which("node")
    if found is None:
        raise Missing("no node")
    return found


def _node() -> list[str]:
    return [node(), "--expose-gc", str(SERVERS / "server.js")]


def _python(module: str, *arguments: str, needs: str | None = None) -> Callable[[], list[str]]:
    def command() -> list[str]:
        if needs is not None:
            version(needs)
        return [sys.executable, "-m", f"benchmarks.servers.{module}", *arguments]

    return command


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise Missing(f"{package} is not installed") from None


def require(name: str) -> None:
    """A Python package, or a program on the PATH. Raises Missing."""
    if shutil.which(name) is None:
        version(name)


def _compiled_handlers() -> list[str]:
    version("cython")
    return [*_python("uvsock_server")(), "--compiled", handlers()]


def redis(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise Missing(f"no {program}")
    return found


def _redis_server() -> list[str]:
    return [*_python("redis_server")(), redis("redis-server")]


def _asyncio(loop: str, style: str) -> Callable[[], list[str]]:
    needs = None if loop == "asyncio" else loop
    return _python("asyncio_server", "--loop", loop, "--style", style, needs=needs)


def _app(loop: str) -> Callable[[], list[str]]:
    return _python("app_server", "--loop", loop, needs=loop)


def _positional(file: str) -> list[str]:
    return [file]


def _option(file: str) -> list[str]:
    return ["--tls", file]


def _named(workload: Workload) -> bool:
    """Where it is one of those that the workload is for."""
    return workload.peers is not None


def _reads(workload: Workload) -> bool:
    return workload.behaviour in {"echo", "receive"}


def _reads_much(workload: Workload) -> bool:
    return _reads(workload) and workload.large


def _framed(workload: Workload) -> bool:
    return workload.behaviour in {"lines", "length_prefixed"}


def _is_redis(workload: Workload) -> bool:
    return workload.behaviour == "redis"


def _joins(workload: Workload) -> bool:
    return _framed(workload) or _is_redis(workload)


PEERS = (
    Peer("c", "C, epoll", _floor, None),
    Peer("uvsock", "uvsock", _python("uvsock_server"), _option),
    Peer(
        "uvsock-memoryview",
        "uvsock, memoryview",
        _python("uvsock_server", "--binary-type", "memoryview"),
        _option,
        _reads_much,
    ),
    Peer("uvsock-streams", "uvsock, streams", _asyncio("uvsock", "streams"), _option),
    Peer("uvsock-compiled", "uvsock, Cython", _compiled_handlers, None, _framed),
    Peer("bun", "Bun", _bun, _positional),
    Peer("uvloop", "uvloop, Protocol", _asyncio("uvloop", "protocol"), _option),
    Peer("uvloop-joined", "uvloop, joined", _asyncio("uvloop", "joined"), None, _joins),
    Peer("uvloop-buffered", "uvloop, Buffered", _asyncio("uvloop", "buffered"), _option, _reads),
    Peer("uvloop-streams", "uvloop, streams", _asyncio("uvloop", "streams"), _option),
    Peer("aiofastnet", "aiofastnet, Protocol", _asyncio("aiofastnet", "protocol"), _option),
    Peer(
        "aiofastnet-buffered",
        "aiofastnet, Buffered",
        _asyncio("aiofastnet", "buffered"),
        _option,
        _reads,
    ),
    Peer("asyncio", "asyncio, Protocol", _asyncio("asyncio", "protocol"), _option),
    Peer("asyncio-streams", "asyncio, streams", _asyncio("asyncio", "streams"), _option),
    Peer("node", "Node", _node, _positional),
    Peer(
        "uvsock-protocol", "uvsock.Loop, Protocol", _asyncio("uvsock", "protocol"), _option, _named
    ),
    Peer(
        "uvsock-loop-streams",
        "uvsock.Loop, asyncio's streams",
        _asyncio("uvsock", "asyncio-streams"),
        _option,
        _named,
    ),
    Peer("uvloop-app", "on uvloop", _app("uvloop"), _option, _named),
    Peer(
        "uvsock-app", "on uvsock.Loop", _python("app_server", "--loop", "uvsock"), _option, _named
    ),
    Peer("redis-server", "redis-server", _redis_server, None, _is_redis),
)
LABELS = {peer.name: peer.label for peer in PEERS}


def chosen(names: list[str]) -> tuple[list[Peer], dict[str, str]]:
    """The peers that are here, and why the others are not."""
    if unknown := set(names) - LABELS.keys():
        raise SystemExit(f"--peer: {', '.join(sorted(unknown))}: not one of {', '.join(LABELS)}")
    here, missing = [], {}
    for peer in PEERS:
        if names and peer.name not in names:
            continue
        try:
            peer.command()
        except Missing as error:
            missing[peer.name] = str(error).splitlines()[0]
        else:
            here.append(peer)
    return here, missing


# --- where and with what ----------------------------------------------------------------------


def _output(*command: str, cwd: Path | None = None) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _or_none(find: Callable[[], str | None]) -> str | None:
    try:
        return find()
    except Missing:
        return None


def versions() -> dict[str, str | None]:
    import ssl

    packages = ("uvsock", "uvloop", "aiofastnet", "cython")
    programs = ("uvicorn", "httptools", "aiohttp", "websockets", "redis")
    found = {
        name: _or_none(lambda name=name: version(name))  # type: ignore[misc]
        for name in (*packages, *programs)
    }
    return {
        "python": platform.python_version(),
        **found,
        "openssl": ssl.OPENSSL_VERSION,
        "bun": _or_none(lambda: _output(bun(), "--version")),
        "node": _or_none(lambda: _output(node(), "--version")),
        "compiler": (_output(compiler(), "--version") or "").partition("\n")[0],
        "kernel": platform.release(),
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def commit() -> str | None:
    """The commit of the source that is measured; ``+`` says that it has been changed since."""
    found = find_spec("uvsock")
    if found is None or found.origin is None:
        raise SystemExit("uvsock is not installed: pip install .")
    source = Path(found.origin).resolve().parent
    head = _output("git", "rev-parse", "--short=12", "HEAD", cwd=source)
    if head is None:
        return None
    return head + "+" if _output("git", "status", "--porcelain", "--", ".", cwd=source) else head
