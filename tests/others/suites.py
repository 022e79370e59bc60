"""The suites: where each comes from, what it needs, and which tests are run. This is data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Suite:
    name: str
    about: str
    # A requirement of which the source archive holds the tests, and what is unpacked of it. Never
    # the package itself: it would hide the one that is installed, with its compiled modules.
    archive: str | None
    unpacked: tuple[str, ...]
    needs: tuple[str, ...]
    files: tuple[str, ...]
    # How the chosen tests begin; none: all of the files, but for what `options` choose.
    only: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    why: str = ""  # the others are not chosen
    # Its own file of settings for pytest.
    settings: str | None = None


SUITES = (
    Suite(
        "cpython",
        "CPython's tests of asyncio, from the interpreter that runs this",
        None,
        (),
        (),
        (
            "test_buffered_proto.py",
            "test_events.py",
            "test_sendfile.py",
            "test_server.py",
            "test_sock_lowlevel.py",
            "test_ssl.py",
            "test_sslproto.py",
            "test_streams.py",
            "test_unix_events.py",
        ),
        only=(
            "test_buffered_proto.py::BufferedProtocolSelectorTests*",
            "test_events.py::EPollEventLoopTests*",
            "test_sendfile.py::EPollEventLoopTests*",
            "test_server.py::SelectorStartServerTests*",
            "test_server.py::TestServer2*",
            "test_server.py::UnixServerCleanupTests*",
            "test_sock_lowlevel.py::EPollEventLoopTests*",
            "test_ssl.py::TestSSL*",
            "test_sslproto.py::SelectorStartTLSTests*",
            "test_streams.py::StreamTests*",
            "test_unix_events.py::TestFunctional*",
        ),
        why="the same for other selectors and for Windows, or tests of parts of asyncio's own loop",
    ),
    Suite(
        "cpython_streams",
        "CPython's tests of asyncio's streams, on uvsock's",
        None,
        (),
        (),
        ("test_streams.py",),
    ),
    Suite(
        "uvloop",
        "uvloop's own tests",
        "uvloop",  # the version that is installed
        ("tests",),
        ("aiohttp==3.14.5", "pyOpenSSL==26.4.0"),
        (
            "tests/test_tcp.py",
            "tests/test_unix.py",
            "tests/test_sockets.py",
            "tests/test_context.py",
            "tests/test_aiohttp.py",
            "tests/test_regr1.py",
            "tests/test_dealloc.py",
        ),
        only=(
            "test_aiohttp.py::Test_UV_AioHTTP*",
            "test_context.py::Test_UV_Context*",
            "test_dealloc.py*",
            "test_regr1.py*",
            "test_sockets.py::TestUVSockets*",
            "test_tcp.py::Test_UV_TCP*",
            "test_unix.py::Test_UV_Unix*",
        ),
        why="their twins, which are for asyncio's loop",
    ),
    Suite(
        "aiosmtpd",
        "an SMTP server, which puts the standard library's SSLProtocol on our transport",
        "aiosmtpd==1.4.6",
        # A package of pure Python, whose tests are inside.
        ("aiosmtpd", "pytest.ini"),
        ("atpublic==9.0.0", "attrs==26.1.0", "pytest-mock==3.17.0", "setuptools==75.8.2"),
        (
            "aiosmtpd/tests/test_lmtp.py",
            "aiosmtpd/tests/test_server.py",
            "aiosmtpd/tests/test_smtp.py",
            "aiosmtpd/tests/test_smtps.py",
            "aiosmtpd/tests/test_starttls.py",
        ),
        # It leaves loops and threads behind, and what they say at their end meets any other test.
        options=(
            *("-o", "asyncio_default_fixture_loop_scope=function"),
            *("-W", "ignore::pytest.PytestUnraisableExceptionWarning"),
            *("-W", "ignore::pytest.PytestUnhandledThreadExceptionWarning"),
        ),
        settings="pytest.ini",
    ),
    Suite(
        "anyio",
        "anyio's sockets and TLS streams on its asyncio back end",
        "anyio==4.16.0",
        ("tests", "pyproject.toml"),
        ("anyio==4.16.0", "psutil==7.2.2", "pytest-mock==3.17.0", "truststore==0.10.5"),
        ("tests/test_sockets.py", "tests/streams/test_tls.py"),
        options=(
            *("-p", "no:asyncio"),
            *("-k", "asyncio and not (uvloop or eager or ipv6 or UDP or UNIXDatagram)"),
        ),
        why="for other back ends and loops that are named, UDP, and IPv6, which a machine may lack",
        settings="pyproject.toml",
    ),
    Suite(
        "uvicorn",
        "an HTTP and WebSocket server",
        "uvicorn==0.54.0",
        ("tests", "pyproject.toml"),
        (
            "uvicorn==0.54.0",
            "httptools==0.9.0",
            "httpx2==2.16.2",
            "websockets==17.4",
            "wsproto==1.3.2",
            "a2wsgi==1.10.10",
            "pytest-mock==3.17.0",
        ),
        (
            "tests/protocols/test_http.py",
            "tests/protocols/test_websocket.py",
            "tests/test_main.py",
            "tests/test_server.py",
            "tests/test_ssl.py",
        ),
        options=("-p", "no:asyncio", "-k", "not (wsproto or h11 or zttp)"),
        why="the same with other parsers of HTTP and WebSocket, which see nothing of the loop",
        settings="pyproject.toml",
    ),
    Suite(
        "aiohttp",
        "aiohttp, server and client",
        "aiohttp==3.14.5",
        ("tests", "pytest.ini", "README.rst"),
        # Its pytest.ini names a class of coverage's.
        ("aiohttp==3.14.5", "coverage==7.17.5", "pytest-mock==3.17.0"),
        (
            "tests/test_client_functional.py",
            "tests/test_client_ws_functional.py",
            "tests/test_web_functional.py",
            "tests/test_web_runner.py",
            "tests/test_web_sendfile_functional.py",
            "tests/test_web_server.py",
            "tests/test_web_websocket_functional.py",
        ),
        options=("-p", "no:asyncio"),
        settings="pytest.ini",
    ),
    Suite(
        "aiofastnet",
        "another drop-in's, without it: what a transport promises, TLS in TLS, errors of protocols",
        "aiofastnet==1.2.0",
        ("tests", "pyproject.toml"),
        ("aiofastnet==1.2.0", "async-timeout==5.0.1"),
        ("tests/test_api_streams.py", "tests/test_protocol_error.py", "tests/test_smoke.py"),
        options=("-k", "not (uvloop or udp or datagram or pipe or ktls)"),
        why="for a loop that is named, datagrams and pipes, and TLS in the kernel",
        settings="pyproject.toml",
    ),
    Suite(
        "aiosmtplib",
        "an SMTP client, which upgrades to TLS; its server is aiosmtpd",
        "aiosmtplib==5.1.3",
        ("tests", "pyproject.toml"),
        ("aiosmtplib==5.1.3", "aiosmtpd==1.4.6"),
        (
            "tests/test_api.py",
            "tests/test_asyncio.py",
            "tests/test_commands.py",
            "tests/test_connect.py",
            "tests/test_protocol.py",
            "tests/test_sendmail.py",
            "tests/test_sync.py",
            "tests/test_timeouts.py",
            "tests/test_tls.py",
        ),
        settings="pyproject.toml",
    ),
    Suite(
        "asyncssh",
        "SSH: connections, channels, forwarding, and connections in connections",
        "asyncssh==2.24.1",
        ("tests", "tox.ini"),
        ("asyncssh==2.24.1", "bcrypt==5.0.0"),
        (
            "tests/test_channel.py",
            "tests/test_connection.py",
            "tests/test_forward.py",
            "tests/test_stream.py",
        ),
        options=("-p", "no:asyncio"),
        settings="tox.ini",
    ),
    # The source archives of websockets hold none of its tests that open a connection.
    Suite(
        "picows",
        "WebSocket in Cython, which writes to a transport's descriptor itself when nothing is held",
        "picows==2.3.1",
        ("tests", "pyproject.toml"),
        ("picows==2.3.1", "async-timeout==5.0.1"),
        ("tests/test_autoping.py", "tests/test_basics.py"),
        options=("-k", "not (uvloop or aiofastnet)"),
        why="for a loop that is named, and on another drop-in",
        settings="pyproject.toml",
    ),
)
