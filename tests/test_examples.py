"""The servers in examples, each in a process of its own, and programs of others as clients."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import uvsock
from conftest import SERVER_NAME, Authority, without_slowness

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PATIENCE = 10.0


def missing(what: str) -> Any:
    if os.environ.get("CI"):
        pytest.fail(f"{what} is not installed")
    pytest.skip(f"{what} is not installed")


def program(name: str) -> str:
    """The path of a program; without it the test is skipped, or fails where CI says so."""
    return shutil.which(name) or missing(name)


def output_of(*command: object, given: str | None = None) -> str:
    """What a program prints; it has to succeed."""
    result = subprocess.run(
        [str(word) for word in command], input=given, capture_output=True, text=True, timeout=30
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


class Server:
    """An example that runs."""

    def __init__(self, name: str, *words: object, tls: Files | None = None) -> None:
        command = [sys.executable, "-W", "error", str(EXAMPLES / name), "--port", "0"]
        if tls is not None:
            command += ["--tls-cert", str(tls.cert), "--tls-key", str(tls.key)]
        path = [str(Path(uvsock.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        self.tls = tls
        self.process = subprocess.Popen(
            [*command, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.port = int(line.split()[-1]) if line.startswith("listening on ") else 0
        if not self.port:
            self.stop()

    def stop(self) -> None:
        """End it in order: it may have printed no complaint."""
        self.process.terminate()
        try:
            _, complaints = self.process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            _, complaints = self.process.communicate()
            pytest.fail(f"the server did not stop: {complaints}")
        assert without_slowness(complaints) == ""

    def dial(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE)

    def exchange(self, *parts: bytes) -> bytes:
        """What the server sends until it closes, given these parts and then the end."""
        received = bytearray()
        with self.dial() as sock, contextlib.suppress(ConnectionError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(OSError):
                for part in parts:
                    sock.sendall(part)
                sock.shutdown(socket.SHUT_WR)
            while data := sock.recv(65536):
                received += data
        return bytes(received)

    def memory(self) -> int:
        """Its resident memory in bytes."""
        text = Path(f"/proc/{self.process.pid}/statm").read_text()
        return int(text.split()[1]) * resource.getpagesize()


class Files:
    """Certificate files of the tests' authority."""

    def __init__(self, authority: Authority, directory: Path) -> None:
        options = authority.server_options
        self.ca, self.cert, self.key = (directory / f"{n}.pem" for n in ("ca", "cert", "key"))
        self.ca.write_bytes(authority.ca_pem)
        self.cert.write_bytes(options["cert"])
        self.key.write_bytes(options["key"])


@pytest.fixture(scope="module")
def files(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(authority, tmp_path_factory.mktemp("certificates"))


@contextlib.contextmanager
def running(name: str, *words: object, tls: Files | None = None) -> Iterator[Server]:
    server = Server(name, *words, tls=tls)
    assert server.port
    try:
        yield server
    finally:
        server.stop()


needs_memory_figures = pytest.mark.skipif(
    sys.platform != "linux" or os.environ.get("UVSOCK_TEST_BUILD") == "sanitize",
    reason="memory is looked up in /proc, and a sanitizer keeps what was freed",
)
# Streams of bytes against one server of a module. A property's examples share it.
fuzzed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def pieces(stream: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(stream) + 1) for cut in cuts})
    return [stream[a:b] for a, b in zip([0, *places], [*places, len(stream)], strict=True)]


def garbage(*fragments: bytes) -> st.SearchStrategy[bytes]:
    """Streams of any bytes, mixed with what the protocol is made of."""
    part = st.sampled_from(fragments) | st.binary(max_size=12)
    return st.lists(part, max_size=25).map(b"".join)


CUTS = st.lists(st.integers(0, 10_000), max_size=6)


# ── Redis ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def redis_port() -> Iterator[Server]:
    with running("redis_server.py") as server:
        yield server


def test_redis_cli_talks_to_the_redis_server(redis_port: Server) -> None:
    cli = [program("redis-cli"), "-p", redis_port.port]
    assert output_of(*cli, "ping") == "PONG\n"
    assert output_of(*cli, "set", "greeting", "hello") == "OK\n"
    assert output_of(*cli, "get", "greeting") == "hello\n"
    assert output_of(*cli, "set", "greeting", "other", "NX") == "\n"
    assert output_of(*cli, "exists", "greeting", "nothing") == "1\n"
    assert output_of(*cli, "del", "greeting", "nothing") == "1\n"
    assert output_of(*cli, "get", "greeting") == "\n"
    assert output_of(*cli, "incr", "count") == "1\n"
    assert output_of(*cli, "incr", "count") == "2\n"
    assert output_of(*cli, "config", "get", "save") == "save\n\n"
    assert "redis_version" in output_of(*cli, "info")
    assert "unknown command 'nonsense'" in output_of(*cli, "nonsense")
    assert "wrong number of arguments for 'get'" in output_of(*cli, "get")
    assert "not an integer" in output_of(*cli, given="set word x\nincr word\n")


def test_redis_benchmark_pipelines_to_the_redis_server(redis_port: Server) -> None:
    command = [program("redis-benchmark"), "-p", redis_port.port, "-P", 16, "-n", 20000, "-q"]
    printed = output_of(*command, "-t", "ping,set,get,incr", "-d", 100)
    assert printed.count("requests per second") == 5  # PING two ways


@pytest.mark.parametrize("protocol", [2, 3])
def test_redis_py_talks_to_the_redis_server(redis_port: Server, protocol: int) -> None:
    if find_spec("redis") is None:
        missing("redis")
    import redis

    with redis.Redis(port=redis_port.port, protocol=protocol) as client:
        assert client.ping()
        assert client.set("k", b"\0\r\n" * 100_000)
        assert client.get("k") == b"\0\r\n" * 100_000
        with client.pipeline(transaction=False) as pipeline:
            for number in range(1000):
                pipeline.set(f"k{number}", number).get(f"k{number}")
            assert pipeline.execute()[-1] == b"999"
        assert client.delete("k") == 1
        assert client.get("k") is None
        assert client.info()["redis_version"] == "7.0.0"
        assert client.config_get("save", "appendonly") == {"save": "", "appendonly": "no"}


def test_redis_over_tls(files: Files) -> None:
    with running("redis_server.py", tls=files) as server:
        words = ["--tls", "--cacert", files.ca, "--sni", SERVER_NAME]
        cli = [program("redis-cli"), "-p", server.port, *words]
        assert output_of(*cli, "ping") == "PONG\n"


def resp(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in words)


@needs_memory_figures
def test_a_client_that_does_not_read_costs_the_redis_server_little(redis_port: Server) -> None:
    value = bytes(1_000_000)
    redis_port.exchange(resp(b"SET", b"big", value))
    before = redis_port.memory()
    with redis_port.dial() as sock:
        sock.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            sock.sendall(resp(b"GET", b"big") * 2000)
        time.sleep(0.2)
        assert redis_port.memory() - before < 30_000_000
    count = 20
    asked = resp(b"GET", b"big") * count + resp(b"PING")
    assert len(redis_port.exchange(asked)) == count * (len(value) + 12) + 7


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(b"*1\r\n$-1\r\n", id="negative length"),
        pytest.param(b"*1\r\n$99999999999\r\n", id="huge length"),
        pytest.param(b"*99999999999\r\n", id="huge count"),
        pytest.param(b"*1\r\n:1\r\n", id="not a bulk string"),
        pytest.param(b"*1\r\n$1\r\nabc", id="longer than its length"),
        pytest.param(b"*" + b"1" * 5000 + b"\r\n", id="digits"),
        pytest.param(b"x" * 100_000, id="endless line"),
    ],
)
def test_requests_that_are_none_end_their_redis_connection(
    redis_port: Server, stream: bytes
) -> None:
    assert redis_port.exchange(b"PING\r\n" + stream).startswith(b"+PONG\r\n-ERR Protocol error")


@fuzzed
@given(
    garbage(b"*1\r\n", b"*2\r\n", b"$4\r\n", b"PING\r\n", b"\r\n", resp(b"ECHO", b"x"), b"GET x\n"),
    CUTS,
)
def test_the_redis_server_answers_a_stream_the_same_in_any_pieces(
    redis_port: Server, stream: bytes, cuts: list[int]
) -> None:
    assert redis_port.exchange(*pieces(stream, cuts)) == redis_port.exchange(stream)
    assert redis_port.exchange(b"PING\r\n") == b"+PONG\r\n"


# ── HTTP ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def http_port() -> Iterator[Server]:
    if find_spec("httptools") is None:
        missing("httptools")
    with running("http_server.py") as server:
        yield server


def test_curl_talks_to_the_http_server(http_port: Server) -> None:
    curl, url = program("curl"), f"http://127.0.0.1:{http_port.port}"
    # Two requests on one connection.
    printed = output_of(curl, "-s", "-w", "%{num_connects} ", f"{url}/", f"{url}/?q=1")
    assert printed.replace("\n", "") == "Hello, world!1 Hello, world!0 "
    assert output_of(curl, "-s", f"{url}/other", "-w", "%{http_code}") == "Not Found\n404"
    assert output_of(curl, "-s", "-X", "PUT", url, "-w", "%{http_code}").endswith("405")
    assert "Content-Length: 14" in output_of(curl, "-sI", url)
    assert output_of(curl, "-s", "--http2", url) == "Hello, world!\n"
    body = "x" * 3_000_000  # so large that curl asks first whether it may
    assert output_of(curl, "-s", url, "--data-binary", "@-", given=body) == "Hello, world!\n"


def test_curl_over_tls(files: Files) -> None:
    if find_spec("httptools") is None:
        missing("httptools")
    with running("http_server.py", tls=files) as server:
        url = f"https://localhost:{server.port}/"
        assert output_of(program("curl"), "-s", "--cacert", files.ca, url) == "Hello, world!\n"


def test_wrk_finds_no_error_in_the_http_server(http_port: Server) -> None:
    url = f"http://127.0.0.1:{http_port.port}/"
    printed = output_of(program("wrk"), "-d", "1", "-c", "20", "-t", "1", url)
    assert "Requests/sec" in printed
    assert "Non-2xx" not in printed
    assert "Socket errors" not in printed


GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def test_http_requests_may_be_pipelined(http_port: Server) -> None:
    assert http_port.exchange(GET * 3000).count(b"Hello, world!") == 3000
    last = GET.replace(b"Host: x", b"Connection: close")
    assert http_port.exchange(last + GET).count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    ("stream", "status"),
    [
        pytest.param(b"nonsense\r\n\r\n", b"400", id="nonsense"),
        pytest.param(b"GET / HTTP/1.1\r\nx: " + b"y" * 200_000, b"431", id="endless header"),
        pytest.param(b"GET /" + b"y" * 200_000, b"431", id="endless path"),
        pytest.param(
            b"POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n" + bytes(17 * 1024 * 1024),
            b"413",
            id="endless body",
        ),
    ],
)
def test_requests_that_are_none_end_their_http_connection(
    http_port: Server, stream: bytes, status: bytes
) -> None:
    received = http_port.exchange(GET + stream)
    assert received.count(b"HTTP/1.1 ") == 2
    assert b"HTTP/1.1 " + status in received


@fuzzed
@given(
    garbage(GET, b"GET / HTTP/1.1\r\n", b"\r\n", b"POST / HTTP/1.1\r\n", b"Content-Length: 3\r\n",
            b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b"Upgrade: x\r\n",
            b"Connection: upgrade\r\n", b"abc", b"0\r\n\r\n"),
    CUTS,
)  # fmt: skip
def test_the_http_server_survives_any_stream(
    http_port: Server, stream: bytes, cuts: list[int]
) -> None:
    assert http_port.exchange(*pieces(stream, cuts)) == http_port.exchange(stream)
    assert b"Hello" in http_port.exchange(GET)


# ── The proxy ──────────────────────────────────────────────────────────────────────────────────


class Peer:
    """A server in a thread: each connection is given to a function."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self.serve = serve
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    def work(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                connection.settimeout(PATIENCE)
                with connection, contextlib.suppress(OSError):
                    self.serve(connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(PATIENCE)


def proxy_to(port: int) -> contextlib.AbstractContextManager[Server]:
    return running("tcp_proxy.py", "--target", f"127.0.0.1:{port}")


def is_reset(server: Server, stream: bytes = b"") -> bool:
    """Whether the server resets a connection that sends this and waits."""
    try:
        with server.dial() as sock:  # a connection with a timeout can see the reset already here
            sock.sendall(stream)
            read_all(sock)
    except ConnectionResetError:
        return True
    return False


def read_all(sock: socket.socket) -> bytes:
    received = bytearray()
    while data := sock.recv(65536):
        received += data
    return bytes(received)


def test_the_proxy_passes_each_end_by_itself() -> None:
    def count(connection: socket.socket) -> None:
        length = len(read_all(connection))  # until the client's end
        connection.sendall(b"%d\n" % length + bytes(length))

    with (
        Peer(count) as peer,
        proxy_to(peer.port) as proxy,
    ):
        message = os.urandom(5_000_000)
        received = proxy.exchange(message)
        assert received == b"5000000\n" + bytes(len(message))


@needs_memory_figures
def test_the_proxy_slows_a_sender_down_whose_peer_does_not_read() -> None:
    go_on = threading.Event()

    def wait(connection: socket.socket) -> None:
        go_on.wait(PATIENCE)
        connection.sendall(b"%d" % len(read_all(connection)))

    with Peer(wait) as peer, proxy_to(peer.port) as proxy:
        before = proxy.memory()
        with proxy.dial() as sock:
            sock.settimeout(0.5)
            sent = 0
            with contextlib.suppress(TimeoutError):
                while sent < 100_000_000:
                    sent += sock.send(bytes(65536))
            assert sent < 50_000_000
            assert proxy.memory() - before < 10_000_000
            go_on.set()
            sock.settimeout(PATIENCE)
            sock.shutdown(socket.SHUT_WR)
            assert int(read_all(sock)) == sent


def test_the_proxy_speaks_tls_on_both_sides(files: Files, authority: Authority) -> None:
    if find_spec("httptools") is None:
        missing("httptools")
    with running("http_server.py", tls=files) as server:
        target = ["--target", f"localhost:{server.port}", "--target-ca", files.ca]
        with running("tcp_proxy.py", *target, tls=files) as proxy, proxy.dial() as sock:
            context = authority.client_context()
            with context.wrap_socket(sock, server_hostname=SERVER_NAME) as secure:
                secure.sendall(GET.replace(b"Host: x", b"Connection: close"))
                assert b"Hello, world!" in read_all(secure)


def test_the_proxy_passes_resets_and_refusals_on() -> None:
    def reset(connection: socket.socket) -> None:
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with Peer(reset) as peer, proxy_to(peer.port) as proxy:
        assert is_reset(proxy, b"?")
    with proxy_to(peer.port) as proxy:
        assert is_reset(proxy)


def test_the_proxy_verifies_its_target(files: Files) -> None:
    if find_spec("httptools") is None:
        missing("httptools")
    with running("http_server.py", tls=files) as server:
        target = ["--target", f"localhost:{server.port}", "--target-tls"]  # the system's CAs
        with running("tcp_proxy.py", *target) as proxy:
            assert is_reset(proxy)


@fuzzed
@given(st.binary(max_size=5000), CUTS)
def test_the_proxy_changes_no_byte(echo_proxy: Server, stream: bytes, cuts: list[int]) -> None:
    assert echo_proxy.exchange(*pieces(stream, cuts)) == stream


@pytest.fixture(scope="module")
def echo_proxy() -> Iterator[Server]:
    def echo(connection: socket.socket) -> None:
        while data := connection.recv(65536):
            connection.sendall(data)

    with Peer(echo) as peer, proxy_to(peer.port) as proxy:
        yield proxy


# ── Chat ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def chat_port() -> Iterator[Server]:
    with running("chat_server.py") as server:
        yield server


class Person:
    def __init__(self, server: Server) -> None:
        self.socket = server.dial()
        self.lines = self.socket.makefile("r")
        self.name = self.lines.readline().split()[3].removesuffix(";")

    def say(self, text: str) -> None:
        self.socket.sendall(text.encode() + b"\n")

    def hear(self) -> str:
        return self.lines.readline()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.lines.close()
        self.socket.close()


def test_people_chat(chat_port: Server) -> None:
    with Person(chat_port) as ann, Person(chat_port) as bob:
        assert ann.hear() == f"* {bob.name} is here\n"
        ann.say("/nick Ann")
        assert ann.hear() == "* you are Ann\n"
        assert bob.hear().endswith("is Ann now\n")
        bob.say("/nick Ann")
        assert bob.hear() == "* Ann is somebody else\n"
        bob.say(f"/nick {bob.name}0")
        assert "is somebody else" in bob.hear()
        ann.say("hello\x1b[2J \N{SNOWMAN}\r")
        while not (heard := bob.hear()).startswith("Ann"):
            pass
        assert heard == "Ann: hello[2J \N{SNOWMAN}\n"
        bob.say("/who")
        assert bob.hear() == f"* Ann, {bob.name}\n"
        ann.say("/quit")
        assert ann.hear() == "* bye\n"
        assert ann.hear() == ""
        assert bob.hear() == "* Ann has left\n"


def test_a_chat_line_without_an_end_ends_its_connection(chat_port: Server) -> None:
    assert b"at most 1024 bytes" in chat_port.exchange(b"x" * 100_000)
    assert b"at most 1024 bytes" in chat_port.exchange(b"x" * 5000 + b"\n")


def test_who_does_not_read_is_dropped_from_the_chat(chat_port: Server) -> None:
    with chat_port.dial() as silent, Person(chat_port) as ann:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for _ in range(20_000):
            ann.say("x" * 1000)
        ann.say("/who")
        heard = ann.hear()
        while not heard.startswith("* " + ann.name):
            heard = ann.hear()
        assert heard == f"* {ann.name}\n"


@fuzzed
@given(garbage(b"/nick ", b"a", b"\n", b"/who\n", b"/quit\n", b"/", b"x" * 600, b"\xff"), CUTS)
def test_the_chat_server_survives_any_stream(
    chat_port: Server, stream: bytes, cuts: list[int]
) -> None:
    assert chat_port.exchange(*pieces(stream, cuts)).startswith(b"* you are")


# ── DNS ────────────────────────────────────────────────────────────────────────────────────────

LONG = "y" * 300
ZONE = [
    *("--record", "www.example.test", "A", "192.0.2.1"),
    *("--record", "www.example.test", "A", "192.0.2.2"),
    *("--record", "www.example.test", "AAAA", "2001:db8::1"),
    *("--record", "example.test", "TXT", LONG),
]


@pytest.fixture(scope="module")
def dns_port() -> Iterator[Server]:
    with running("dns_tcp_server.py", *ZONE) as server:
        yield server


def test_kdig_talks_to_the_dns_server(dns_port: Server) -> None:
    kdig = [program("kdig"), "+tcp", "+short", "@127.0.0.1", "-p", dns_port.port]
    assert output_of(*kdig, "www.example.test").split() == ["192.0.2.1", "192.0.2.2"]
    assert output_of(*kdig, "WWW.example.TEST", "AAAA") == "2001:db8::1\n"
    texts = output_of(*kdig, "example.test", "TXT").replace('"', "").replace(" ", "")
    assert texts == LONG + "\n"
    assert output_of(*kdig, "example.test", "A") == ""
    kdig.remove("+short")
    assert "NXDOMAIN" in output_of(*kdig, "nothing.test")
    assert "NOERROR" in output_of(*kdig, "example.test", "A")
    kept = output_of(*kdig, "+keepopen", "www.example.test", "nothing.test")
    assert "192.0.2.1" in kept
    assert "NXDOMAIN" in kept


def test_kdig_over_tls(files: Files) -> None:
    with running("dns_tcp_server.py", *ZONE, tls=files) as server:
        words = ["+tls", f"+tls-ca={files.ca}", f"+tls-hostname={SERVER_NAME}", "+short"]
        printed = output_of(
            program("kdig"), *words, "@127.0.0.1", "-p", server.port, "www.example.test", "AAAA"
        )
        assert printed == "2001:db8::1\n"


def header(length: int, questions: int, number: int = 7, flags: int = 0x100) -> bytes:
    return length.to_bytes(2) + struct.pack("!6H", number, flags, questions, 0, 0, 0)


def query(name: bytes, kind: int = 1, flags: int = 0x100) -> bytes:
    labels = b"".join(bytes([len(label)]) + label for label in name.split(b"."))
    question = labels + b"\0" + struct.pack("!HH", kind, 1)
    return header(12 + len(question), 1, flags=flags) + question


def test_dns_queries_may_be_pipelined(dns_port: Server) -> None:
    asked = query(b"example.test", 16)
    one = dns_port.exchange(asked)
    with dns_port.dial() as sock, sock.makefile("rb") as responses:
        sending = threading.Thread(target=sock.sendall, args=[asked * 50_000])
        sending.start()
        time.sleep(0.1)  # more is answered than the kernel holds
        received = responses.read(len(one) * 50_000)
        sending.join()
    assert received == one * 50_000


@pytest.mark.parametrize(
    ("message", "code"),
    [
        pytest.param(query(b"a.test", flags=0x2800), 4, id="an update"),
        pytest.param(query(b"a.test")[:-1] + b"\x03", 5, id="another class"),
        pytest.param(header(16, 1) + b"\xc0\x0c\0\1", 1, id="pointer"),
        pytest.param(header(12, 0), 1, id="no question"),
        pytest.param(header(14, 1) + b"\x05a", 1, id="cut off"),
    ],
)
def test_dns_queries_that_cannot_be_answered_are_told_so(
    dns_port: Server, message: bytes, code: int
) -> None:
    received = dns_port.exchange(message)
    assert received[5] & 15 == code
    assert received[4] & 0x80


def test_dns_messages_that_are_no_queries_end_their_connection(dns_port: Server) -> None:
    assert dns_port.exchange(b"\0\x03abc" + query(b"a.test")) == b""
    assert dns_port.exchange(query(b"a.test", flags=0x8000) + query(b"a.test")) == b""


@fuzzed
@given(garbage(query(b"www.example.test"), query(b"a.b"), b"\0\x0c", b"\0\0", b"\xc0"), CUTS)
def test_the_dns_server_answers_a_stream_the_same_in_any_pieces(
    dns_port: Server, stream: bytes, cuts: list[int]
) -> None:
    whole, split = dns_port.exchange(stream), dns_port.exchange(*pieces(stream, cuts))
    # A stream that ends in a reset may lose what was answered before.
    assert whole.startswith(split) or split.startswith(whole)
    assert dns_port.exchange(query(b"a.test"))


# ── MQTT ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def mqtt_port() -> Iterator[Server]:
    with running("mqtt_broker.py") as server:
        yield server


@contextlib.contextmanager
def subscriber(server: Server, *words: object, count: int) -> Iterator[subprocess.Popen[str]]:
    """mosquitto_sub, subscribed; it ends by itself after so many messages."""
    # Its output has to come line by line, or the line that says that it is subscribed comes last.
    command = [
        program("stdbuf"),
        "-oL",
        program("mosquitto_sub"),
        "-d",
        "-v",
        "-p",
        server.port,
        "-C",
        count,
        "-W",
        10,
    ]
    process = subprocess.Popen(
        [str(word) for word in (*command, *words)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while "Subscribed" not in (line := process.stdout.readline()):
        assert line
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def heard(process: subprocess.Popen[str]) -> list[str]:
    printed, _ = process.communicate(timeout=PATIENCE)
    return [line for line in printed.splitlines() if not line.startswith("Client ")]


def test_mosquitto_clients_talk_through_the_broker(mqtt_port: Server) -> None:
    publish = [program("mosquitto_pub"), "-p", mqtt_port.port]
    words = ["-t", "rooms/+/light", "-t", "all/#"]
    with subscriber(mqtt_port, *words, count=4) as process:
        output_of(*publish, "-t", "rooms/kitchen/light", "-m", "on")
        output_of(*publish, "-t", "rooms/kitchen/heat", "-m", "never")
        output_of(*publish, "-t", "$rooms/kitchen/light", "-m", "never")
        output_of(*publish, "-t", "all", "-m", "1")
        output_of(*publish, "-t", "all/a/b", "-m", "2", "-q", "1")
        output_of(*publish, "-t", "all/many", "-l", given="3\n")
        assert heard(process) == ["rooms/kitchen/light on", "all 1", "all/a/b 2", "all/many 3"]


def test_mosquitto_over_tls(files: Files) -> None:
    with running("mqtt_broker.py", tls=files) as server:
        words = ["--cafile", files.ca, "-h", "localhost"]
        with subscriber(server, *words, "-t", "#", count=1) as process:
            output_of(program("mosquitto_pub"), "-p", server.port, *words, "-t", "a", "-m", "b")
            assert heard(process) == ["a b"]


def test_a_will_is_published_when_its_client_is_gone(mqtt_port: Server) -> None:
    with subscriber(mqtt_port, "-t", "wills/#", count=1) as process:
        will = b"\0\x07wills/x\0\x04gone"
        connect = b"\0\x04MQTT\x04\x06\0\x3c\0\x01w" + will
        mqtt_port.exchange(b"\x10" + bytes([len(connect)]) + connect)
        assert heard(process) == ["wills/x gone"]


CONNECT = b"\x10\x0d\0\x04MQTT\x04\x02\0\x3c\0\x01c"
ACCEPTED = b"\x20\x02\0\0"


def test_a_second_client_of_the_same_name_replaces_the_first(mqtt_port: Server) -> None:
    with mqtt_port.dial() as first:
        first.sendall(CONNECT)
        assert first.recv(100) == ACCEPTED
        assert mqtt_port.exchange(CONNECT) == ACCEPTED
        with pytest.raises(ConnectionResetError):
            first.recv(1)


def test_a_client_that_is_silent_for_too_long_is_dropped(mqtt_port: Server) -> None:
    with mqtt_port.dial() as sock:
        sock.sendall(CONNECT.replace(b"\0\x3c", b"\0\x01"))
        assert sock.recv(100) == ACCEPTED
        start = time.monotonic()
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        assert 1.4 < time.monotonic() - start < 5


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(b"\xc0\0", id="a ping before CONNECT"),
        pytest.param(CONNECT + CONNECT, id="CONNECT twice"),
        pytest.param(CONNECT + b"\x30\xff\xff\xff\x7f", id="a huge packet"),
        pytest.param(CONNECT + b"\x30\xff\xff\xff\xff\x7f", id="a length without an end"),
        pytest.param(CONNECT + b"\x30\x03\0\x01#", id="a topic with a wildcard"),
        pytest.param(CONNECT + b"\x82\x08\0\x01\0\x03a#b\0", id="a wrong filter"),
        pytest.param(CONNECT + b"\x82\x02\0\x01", id="nothing to subscribe to"),
        pytest.param(CONNECT + b"\x34\x05\0\x01a\0\x01", id="QoS 2"),
        pytest.param(CONNECT + b"\x30\x03\0\x01\xff", id="not UTF-8"),
    ],
)
def test_packets_that_are_not_allowed_end_their_connection(
    mqtt_port: Server, stream: bytes
) -> None:
    assert is_reset(mqtt_port, stream)


def test_another_version_of_mqtt_is_refused(mqtt_port: Server) -> None:
    assert mqtt_port.exchange(CONNECT.replace(b"MQTT\x04", b"MQTT\x05")) == b"\x20\x02\0\x01"


@fuzzed
@given(
    garbage(CONNECT, b"\xc0\0", b"\x30\x04\0\x01ab", b"\x82\x06\0\x01\0\x01#\0", b"\xe0\0", b"\0"),
    CUTS,
)
def test_the_broker_survives_any_stream(mqtt_port: Server, stream: bytes, cuts: list[int]) -> None:
    mqtt_port.exchange(*pieces(CONNECT + stream, cuts))
    mqtt_port.exchange(*pieces(stream, cuts))
    assert mqtt_port.exchange(CONNECT) == ACCEPTED


# ── All of them ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["chat_server.py", "redis_server.py", "mqtt_broker.py"])
def test_an_example_speaks_tls_and_plain_text_ends_its_handshake(
    name: str, files: Files, authority: Authority
) -> None:
    with running(name, tls=files) as server:
        server.exchange(b"plain text\r\n")
        context = authority.client_context()
        with context.wrap_socket(server.dial(), server_hostname=SERVER_NAME) as sock:
            assert sock.version() in ("TLSv1.2", "TLSv1.3")


# What begins a message that never ends, and more bytes than the longest message may have.
ENDLESS = {
    "redis_server.py": (b"", 1_000_000),
    "http_server.py": (b"GET / HTTP/1.1\r\nx: ", 1_000_000),
    "chat_server.py": (b"", 100_000),
    "dns_tcp_server.py": (b"\xff\xff", 100_000),
    "mqtt_broker.py": (CONNECT + b"\x30\xff\xff\x0f", 400_000),
}


@needs_memory_figures
@pytest.mark.parametrize("name", ENDLESS)
def test_endless_messages_cost_an_example_little(name: str) -> None:
    if name == "http_server.py" and find_spec("httptools") is None:
        missing("httptools")
    start, size = ENDLESS[name]
    with running(name) as server:
        server.exchange(start)
        before = server.memory()
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                sock = stack.enter_context(server.dial())
                sock.settimeout(0.2)
                with contextlib.suppress(OSError):
                    sock.sendall(start)
                    for _ in range(size // 1000):
                        sock.sendall(b"x" * 1000)
            time.sleep(0.2)
            assert server.memory() - before < 12_000_000
