"""The command line, as a user runs it: processes, pipes, files, a terminal, signals."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import uvsock
from conftest import Authority, without_slowness

LIMIT = 20.0  # seconds for any single thing to happen
BULK = bytes(range(256)) * 16384  # 4 MiB, more than the kernel holds for a socket


class Programs:
    """The processes of one test. None outlives it."""

    def __init__(self) -> None:
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, *words: object, **options: Any) -> subprocess.Popen[bytes]:
        options = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | options
        command = [sys.executable, "-m", "uvsock", *map(str, words)]
        program = subprocess.Popen(command, **options)
        self.running.append(program)
        return program

    def run(self, *words: object, data: bytes = b"") -> tuple[int, bytes, str]:
        """Exit status, standard output and standard error of a program that ends by itself."""
        program = self.start(*words)
        output, errors = program.communicate(data, timeout=LIMIT)
        return program.returncode, output, without_slowness(errors.decode())

    def echo(self, *words: object) -> tuple[subprocess.Popen[bytes], str]:
        """A running echo server and the address that it says it listens on."""
        server = self.start("echo", *words, stdin=subprocess.DEVNULL)
        assert server.stdout is not None
        line = server.stdout.readline().decode()
        match = re.fullmatch(r"listening on (.+?)( \(TLS\))?\n", line)
        assert match is not None, line + self.stop(server)[1]
        return server, match[1]

    @staticmethod
    def stop(program: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit status and standard error of a server that is told to stop."""
        program.send_signal(number)
        _, errors = program.communicate(timeout=LIMIT)
        return program.returncode, without_slowness(errors.decode())


@pytest.fixture
def programs() -> Iterator[Programs]:
    programs = Programs()
    yield programs
    for program in programs.running:
        if program.poll() is None:
            program.kill()
        program.wait(LIMIT)
        for stream in (program.stdin, program.stdout, program.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # input that was never read
                    stream.close()


@pytest.fixture
def directory() -> Iterator[Path]:
    # Not tmp_path: a Unix socket's path has room for about 100 bytes.
    with tempfile.TemporaryDirectory(prefix="uvs") as name:
        yield Path(name)


@pytest.fixture
def certificate(directory: Path, authority: Authority) -> dict[str, Path]:
    """Files with the test server's certificate and key, and those of its authority."""
    options = authority.server_options
    contents = {"cert": options["cert"], "key": options["key"], "ca": authority.ca_pem}
    for name, content in contents.items():
        (directory / f"{name}.pem").write_bytes(content)
    return {name: directory / f"{name}.pem" for name in contents}


@contextlib.contextmanager
def peer(serve: Callable[[socket.socket], None], context: ssl.SSLContext | None = None) -> Any:
    """A standard-library server of one connection; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(LIMIT)
        failures: list[BaseException] = []

        def work() -> None:
            try:
                connection, _ = server.accept()
                connection.settimeout(LIMIT)
                if context is not None:
                    connection = context.wrap_socket(connection, server_side=True)
                with connection:
                    serve(connection)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            thread.join(LIMIT)
        assert not thread.is_alive()
        assert not failures, failures


def dial(where: str, context: ssl.SSLContext | None = None) -> socket.socket:
    if where.startswith("/"):
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(LIMIT)
        client.connect(where)
        return client
    hostname, _, port = where.rpartition(":")
    client = socket.create_connection((hostname.strip("[]"), int(port)), timeout=LIMIT)
    if context is not None:
        client = context.wrap_socket(client, server_hostname=hostname)
    return client


def receive_all(connection: socket.socket) -> bytes:
    received = bytearray()
    while data := connection.recv(65536):
        received += data
    return bytes(received)


def reset_is_expected(connection: socket.socket) -> None:
    with contextlib.suppress(ConnectionResetError):
        assert receive_all(connection) == b""


# --version and wrong arguments


def test_version_names_all_that_matters(programs: Programs) -> None:
    import uvloop

    status, output, errors = programs.run("--version")
    assert (status, errors) == (0, "")
    assert output.decode().splitlines() == [
        f"uvsock {uvsock.__version__}",
        f"uvloop {uvloop.__version__}",
        "CPython " + sys.version.split()[0],
        ssl.OPENSSL_VERSION,
    ]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "COMMAND"),
        (["listen"], "invalid choice: 'listen'"),
        (["echo", "--port", "70000"], "--port: invalid port number value: '70000'"),
        (["echo", "--port", "http"], "--port: invalid port number value: 'http'"),
        (["echo", "--unix", "/tmp/x", "--port", "0"], "--unix does not go with --host or --port"),
        (["echo", "--tls-cert", "x.pem"], "--tls-cert and --tls-key go together"),
        (["connect"], "give HOST and PORT, or --unix PATH"),
        (["connect", "localhost"], "give HOST and PORT, or --unix PATH"),
        (["connect", "localhost", "-1"], "invalid port number value"),
        (["connect", "localhost", "80", "--unix", "/tmp/x"], "--unix does not go with HOST"),
        (["connect", "--unix", "/tmp/x", "--tls"], "--unix does not go with --tls"),
    ],
)
def test_wrong_arguments_are_named(programs: Programs, words: list[str], complaint: str) -> None:
    status, output, errors = programs.run(*words)
    assert (status, output) == (2, b"")
    assert errors.startswith("usage: ")
    assert complaint in errors


# echo


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_echo_sends_back_and_stops_in_order(programs: Programs, number: int) -> None:
    server, where = programs.echo("--port", 0)
    assert where.startswith("127.0.0.1:")
    with dial(where) as client, dial(where) as idle:
        client.sendall(b"one")
        assert client.recv(16) == b"one"
        client.sendall(b"two")
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b"two"
        status, errors = programs.stop(server, number)
        assert receive_all(idle) == b""
    assert (status, errors) == (0, "")


def test_echo_on_ipv6_prints_an_address_that_can_be_used(programs: Programs) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback address")
    _, where = programs.echo("--host", "::1", "--port", 0)
    assert where.startswith("[::1]:")
    with dial(where) as client:
        client.sendall(b"six")
        assert client.recv(16) == b"six"


def test_echo_on_a_unix_socket_removes_its_file(programs: Programs, directory: Path) -> None:
    path = directory / "echo"
    server, where = programs.echo("--unix", path)
    assert where == str(path)
    with dial(where) as client:
        client.sendall(b"unix")
        assert client.recv(16) == b"unix"
    assert programs.stop(server) == (0, "")
    assert not path.exists()


def test_echo_over_tls_survives_a_peer_that_does_not_speak_it(
    programs: Programs, authority: Authority, certificate: dict[str, Path]
) -> None:
    server, where = programs.echo(
        "--port", 0, "--tls-cert", certificate["cert"], "--tls-key", certificate["key"]
    )
    with dial(where) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            receive_all(stranger)
    with dial(where, authority.client_context()) as client:
        client.sendall(b"secret")
        assert client.recv(16) == b"secret"
    status, errors = programs.stop(server)
    assert status == 0
    assert re.fullmatch(r"uvsock: TLS handshake failed: .+\n", errors)


@pytest.mark.parametrize("wire", ["plain", "tls"])
def test_echo_stops_reading_from_a_peer_that_does_not_read(
    programs: Programs, authority: Authority, certificate: dict[str, Path], wire: str
) -> None:
    words, context = ["--port", "0"], None
    if wire == "tls":
        words += ["--tls-cert", certificate["cert"], "--tls-key", certificate["key"]]
        context = authority.client_context()
    server, where = programs.echo(*words)
    with dial(where, context) as client:
        block = BULK[: 1 << 20]
        client.settimeout(0.5)
        sent = bytearray()
        with contextlib.suppress(TimeoutError, ssl.SSLWantWriteError):
            while len(sent) < 1 << 28:
                sent += block[: client.send(block)]
        assert len(sent) < 1 << 26, "the server reads on although nobody takes its answers"
        client.settimeout(LIMIT)
        received = bytearray()
        if context is None:  # a TLS record of which a part is sent would have to be sent again
            while len(received) < len(sent):
                received += client.recv(1 << 20)
            assert received == sent
            client.sendall(b"more")
            assert client.recv(16) == b"more"
    assert programs.stop(server)[0] == 0


def test_echo_returns_every_byte_to_a_slow_reader(programs: Programs) -> None:
    _, where = programs.echo("--port", 0)
    with dial(where) as client:
        sender = threading.Thread(
            target=lambda: (client.sendall(BULK), client.shutdown(socket.SHUT_WR))
        )
        sender.start()
        received = bytearray()
        while data := client.recv(200_000):
            received += data
            time.sleep(0.001)
        sender.join(LIMIT)
    assert received == BULK


def test_echo_says_in_one_line_why_it_cannot_listen(
    programs: Programs, certificate: dict[str, Path], directory: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, output, errors = programs.run("echo", "--port", port)
    assert (status, output) == (1, b"")
    assert re.fullmatch(rf"uvsock: .*127\.0\.0\.1.*{port}.*\n", errors)

    missing = directory / "missing.pem"
    status, output, errors = programs.run(
        "echo", "--port", 0, "--tls-cert", missing, "--tls-key", certificate["key"]
    )
    assert (status, output) == (1, b"")
    assert re.fullmatch(r"uvsock: .*missing\.pem.*\n", errors)

    status, output, errors = programs.run(
        "echo", "--port", 0, "--tls-cert", certificate["ca"], "--tls-key", certificate["key"]
    )
    assert (status, output) == (1, b"")
    assert re.fullmatch(r"uvsock: .+\n", errors)


# connect


def test_connect_prints_the_answer_to_all_of_its_input(programs: Programs) -> None:
    def serve(connection: socket.socket) -> None:
        question = receive_all(connection)  # returns at our end of input, before we answer
        connection.sendall(b"got %d bytes: " % len(question) + question[-3:])

    with peer(serve) as port:
        status, output, errors = programs.run("connect", "127.0.0.1", port, data=BULK + b"end")
    assert (status, errors) == (0, "")
    assert output == b"got %d bytes: end" % (len(BULK) + 3)


def test_connect_reads_a_file(programs: Programs, directory: Path) -> None:
    received = bytearray()
    (directory / "input").write_bytes(BULK)
    with (
        peer(lambda connection: received.extend(receive_all(connection))) as port,
        (directory / "input").open("rb") as file,
    ):
        program = programs.start("connect", "127.0.0.1", port, stdin=file)
        assert program.wait(LIMIT) == 0
    assert received == BULK


def test_connect_reads_a_terminal(programs: Programs) -> None:
    def serve(connection: socket.socket) -> None:
        assert connection.recv(16) == b"typed\n"
        connection.sendall(b"answer")
        assert connection.recv(16) == b""  # Ctrl-D

    master, slave = pty.openpty()
    try:
        with peer(serve) as port:
            program = programs.start("connect", "127.0.0.1", port, stdin=slave)
            os.write(master, b"typed\n")
            assert program.stdout is not None
            assert program.stdout.read(6) == b"answer"
            os.write(master, b"\x04")
            assert program.wait(LIMIT) == 0
    finally:
        os.close(master)
        os.close(slave)


def test_connect_ends_when_the_peer_does_although_input_is_open(programs: Programs) -> None:
    with peer(lambda connection: connection.sendall(b"bye")) as port:
        program = programs.start("connect", "127.0.0.1", port)
        assert program.wait(LIMIT) == 0
        assert program.stdout is not None
        assert program.stdout.read() == b"bye"


def test_connect_gets_everything_through_a_slow_reader_of_its_output(programs: Programs) -> None:
    with peer(lambda connection: connection.sendall(BULK)) as port:
        program = programs.start("connect", "127.0.0.1", port)
        assert program.stdout is not None
        output = bytearray()
        while data := os.read(program.stdout.fileno(), 65536):
            output += data
            time.sleep(0.001)
        assert program.wait(LIMIT) == 0
    assert output == BULK


def test_connect_stops_reading_input_that_the_peer_does_not_take(programs: Programs) -> None:
    release = threading.Event()
    with peer(lambda connection: (release.wait(LIMIT), receive_all(connection))) as port:
        try:
            program = programs.start("connect", "127.0.0.1", port)
            assert program.stdin is not None
            pipe = program.stdin.fileno()
            os.set_blocking(pipe, False)
            taken = 0
            while select.select([], [pipe], [], 0.5)[1] and taken < 1 << 28:
                taken += os.write(pipe, BULK[:4096])
            assert taken < 1 << 26, "input is read although the peer takes nothing"
        finally:
            release.set()
        program.stdin.close()
        assert program.wait(LIMIT) == 0


def test_connect_reports_a_reset(programs: Programs) -> None:
    def serve(connection: socket.socket) -> None:
        connection.recv(16)
        # Lingering for no time at all makes close send RST.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with peer(serve) as port:
        program = programs.start("connect", "127.0.0.1", port)
        assert program.stdin is not None
        program.stdin.write(b"x")
        program.stdin.flush()
        assert program.wait(LIMIT) == 1
        assert program.stderr is not None
        assert re.fullmatch(rb"uvsock: .*[Cc]onnection reset.*\n", program.stderr.read())


def test_connect_says_in_one_line_why_it_cannot_connect(
    programs: Programs, directory: Path
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        status, output, errors = programs.run("connect", "127.0.0.1", nobody.getsockname()[1])
    assert (status, output) == (1, b"")
    assert re.fullmatch(r"uvsock: .*refused.*\n", errors)

    status, output, errors = programs.run("connect", "--unix", directory / "nothing")
    assert (status, output) == (1, b"")
    assert re.fullmatch(r"uvsock: .*nothing.*\n", errors)


def test_connect_verifies_the_server(
    programs: Programs, authority: Authority, certificate: dict[str, Path]
) -> None:
    def serve(connection: socket.socket) -> None:
        connection.sendall(b"echo " + connection.recv(16))
        connection.unwrap()  # type: ignore[attr-defined]

    with peer(serve, authority.server_context()) as port:
        words = ("connect", "127.0.0.1", port, "--tls-ca", certificate["ca"])
        assert programs.run(*words, data=b"hi") == (0, b"echo hi", "")

    def refuse(connection: socket.socket) -> None:
        context = authority.server_context()
        with pytest.raises(ssl.SSLError):
            context.wrap_socket(connection, server_side=True)

    with peer(refuse) as port:
        status, output, errors = programs.run("connect", "127.0.0.1", port, "--tls", data=b"hi")
    assert (status, output) == (1, b"")
    assert re.fullmatch(r"uvsock: .*CERTIFICATE_VERIFY_FAILED.*\n", errors)


def test_connect_reports_a_tls_stream_that_was_cut(
    programs: Programs, authority: Authority, certificate: dict[str, Path]
) -> None:
    def serve(connection: socket.socket) -> None:
        connection.sendall(b"half of it")
        connection.shutdown(socket.SHUT_WR)  # FIN without close_notify
        receive_all(connection)  # what is not read makes a reset of a close

    with peer(serve, authority.server_context()) as port:
        status, output, errors = programs.run(
            "connect", "127.0.0.1", port, "--tls-ca", certificate["ca"]
        )
    assert (status, output) == (1, b"half of it")
    assert re.fullmatch(r"uvsock: .*close_notify.*\n", errors)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_connect_stops_at_a_signal_with_input_open(programs: Programs, number: int) -> None:
    with peer(lambda connection: (connection.sendall(b"up"), receive_all(connection))) as port:
        program = programs.start("connect", "127.0.0.1", port)
        assert program.stdout is not None
        assert program.stdout.read(2) == b"up"
        program.send_signal(number)
        assert program.wait(LIMIT) == 128 + number
        assert program.stderr is not None
        assert without_slowness(program.stderr.read().decode()) == ""


def test_connect_stops_at_a_signal_while_it_is_connecting(programs: Programs) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(LIMIT)
        program = programs.start("connect", "127.0.0.1", silent.getsockname()[1], "--tls")
        connection, _ = silent.accept()  # and no answer to its ClientHello
        with connection:
            connection.settimeout(LIMIT)
            assert connection.recv(1) == b"\x16"
            status, errors = programs.stop(program, signal.SIGINT)
    assert (status, errors) == (128 + signal.SIGINT, "")


def test_connect_reports_input_that_cannot_be_read(programs: Programs, directory: Path) -> None:
    unreadable = os.open(directory / "output", os.O_WRONLY | os.O_CREAT)
    try:
        with peer(reset_is_expected) as port:
            program = programs.start("connect", "127.0.0.1", port, stdin=unreadable)
            assert program.wait(LIMIT) == 1
    finally:
        os.close(unreadable)
    assert program.stderr is not None
    assert re.fullmatch(rb"uvsock: .*[Bb]ad file descriptor.*\n", program.stderr.read())


def test_connect_ends_when_nobody_takes_its_output(programs: Programs) -> None:
    def serve(connection: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):
            connection.sendall(BULK)

    with peer(serve) as port:
        program = programs.start("connect", "127.0.0.1", port)
        assert program.stdout is not None
        assert program.stdout.read(1) == BULK[:1]
        program.stdout.close()
        assert program.wait(LIMIT) == 1
    assert program.stderr is not None
    assert re.fullmatch(rb"uvsock: .*[Bb]roken pipe.*\n", program.stderr.read())


@pytest.mark.parametrize("wire", ["tcp", "unix", "tls"])
def test_the_two_commands_talk_to_each_other(
    programs: Programs, certificate: dict[str, Path], directory: Path, wire: str
) -> None:
    """Both directions at once, with more than pipes and sockets hold."""
    if wire == "unix":
        server, where = programs.echo("--unix", directory / "s")
        words: tuple[object, ...] = ("--unix", where)
    elif wire == "tcp":
        server, where = programs.echo("--port", 0)
        words = tuple(where.split(":"))
    else:
        pair = ("--tls-cert", certificate["cert"], "--tls-key", certificate["key"])
        server, where = programs.echo("--port", 0, *pair)
        words = (*where.split(":"), "--tls-ca", certificate["ca"])
    assert programs.run("connect", *words, data=BULK) == (0, BULK, "")
    assert programs.stop(server) == (0, "")
