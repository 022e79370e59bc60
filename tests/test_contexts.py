"""TLS options: what they may be, what is said when they are wrong, and what a handshake makes of
them. The handshakes run in memory, between a server's context and a client's."""

from __future__ import annotations

import contextlib
import datetime
import gc
import io
import os
import re
import ssl
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from uvsock import _contexts
from uvsock._contexts import TLS, TLSOptionError, client_context, server_context

NAME = "uvsock.test"
OTHER = "other.test"


class Leaf:
    """A certificate and its key, as PEM."""

    def __init__(self, leaf: trustme.LeafCert) -> None:
        self.key = leaf.private_key_pem.bytes()
        self.cert = b"".join(pem.bytes() for pem in leaf.cert_chain_pems)
        self.options: dict[str, Any] = {"key": self.key, "cert": self.cert}

    def key_encrypted(self, passphrase: bytes, *, pkcs8: bool = True) -> bytes:
        key = serialization.load_pem_private_key(self.key, None)
        assert isinstance(key, (rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey))
        formats = serialization.PrivateFormat
        return key.private_bytes(
            serialization.Encoding.PEM,
            formats.PKCS8 if pkcs8 else formats.TraditionalOpenSSL,
            serialization.BestAvailableEncryption(passphrase),
        )


CA = trustme.CA()
STRANGER = trustme.CA()
TRUST = CA.cert_pem.bytes()
LEAF = Leaf(CA.issue_cert(NAME, "127.0.0.1", key_type=trustme.KeyType.ECDSA))
LEAF_OTHER = Leaf(CA.issue_cert(OTHER, key_type=trustme.KeyType.ECDSA))
LEAF_RSA = Leaf(CA.issue_cert(NAME, key_type=trustme.KeyType.RSA))
CLIENT = Leaf(CA.issue_cert("client@uvsock.test"))
ROGUE = Leaf(STRANGER.issue_cert("rogue@uvsock.test"))
EXPIRED = Leaf(
    CA.issue_cert(
        NAME,
        not_before=datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
        not_after=datetime.datetime(2021, 1, 1, tzinfo=datetime.UTC),
    )
)
SECRET = b"correct horse"

PEM = "PEM contents as str or bytes, a pathlib.Path, an open file, or a list of those"
CHOICE = "a function that returns a TLS, an ssl.SSLContext, an alert or None"
ENCRYPTED = {"key": LEAF.key_encrypted(SECRET), "cert": LEAF.cert}


def server(tls: Any = MappingProxyType(LEAF.options), **options: Any) -> ssl.SSLContext:
    context = server_context({**tls, **options} if options else tls)
    assert context is not None
    return context


def client(tls: Any = MappingProxyType({"ca": TRUST}), **options: Any) -> ssl.SSLContext:
    found = client_context({**tls, **options} if options else tls)
    assert found is not None
    return found[0]


class Handshake:
    """The two ends of a handshake in memory."""

    def __init__(
        self, server: ssl.SSLContext, client: ssl.SSLContext, name: str | None = NAME
    ) -> None:
        self._to_server, self._to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.server = server.wrap_bio(self._to_server, self._to_client, server_side=True)
        self.client = client.wrap_bio(self._to_client, self._to_server, server_hostname=name)

    def run(self) -> Handshake:
        """To its end, or to the first error of either side."""
        waiting: list[Callable[[], object]] = [self.client.do_handshake, self.server.do_handshake]
        for _ in range(10):
            for step in list(waiting):
                with contextlib.suppress(ssl.SSLWantReadError):
                    step()
                    waiting.remove(step)
        assert not waiting
        return self

    @property
    def peer_name(self) -> str:
        """The first name in the certificate that the server showed."""
        return str(self.client.getpeercert()["subjectAltName"][0][1])  # type: ignore[index]

    @property
    def server_name(self) -> str | None:
        name: str | None = self.server._uvsock_server_name  # type: ignore[attr-defined]
        return name


def shake(server: ssl.SSLContext, client: ssl.SSLContext, name: str | None = NAME) -> Handshake:
    return Handshake(server, client, name).run()


def refused(error: type[Exception], text: str) -> AbstractContextManager[Any]:
    """Exactly this class (not a subclass) with this whole text."""
    return pytest.raises(
        error, match=f"^{re.escape(text)}$", check=lambda caught: type(caught) is error
    )


def refused_with_cause(text: str) -> AbstractContextManager[Any]:
    """OpenSSL's refusal: ``text`` is a regular expression, and its own error is the cause."""
    return pytest.raises(
        TLSOptionError, match=text, check=lambda caught: isinstance(caught.__cause__, ssl.SSLError)
    )


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd" if sys.platform == "linux" else "/dev/fd"))


@pytest.fixture(autouse=True)
def no_descriptor_is_left_open() -> Iterator[None]:
    before = descriptors()
    yield
    gc.collect()
    assert descriptors() == before


# ── What `tls` may be ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tls", [None, False])
def test_none_and_false_are_plain(tls: bool | None) -> None:
    assert server_context(tls) is None
    assert client_context(tls) is None


def test_true_verifies_the_servers_certificate_and_name() -> None:
    found = client_context(True)
    assert found is not None
    context, server_name = found
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert server_name is None
    # As many as the stdlib trusts on this machine, which may be none.
    assert context.cert_store_stats() == ssl.create_default_context().cert_store_stats()
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(server(), context)


def test_empty_options_are_the_defaults_on_a_client() -> None:
    context = client({})
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.cert_store_stats() == ssl.create_default_context().cert_store_stats()


def test_true_is_no_server() -> None:
    with refused(ValueError, "tls: must have cert and key on a server, True has none"):
        server_context(True)


@pytest.mark.parametrize("tls", [{}, TLS(), {"ca": TRUST}, {"server_name": NAME}])
def test_a_server_needs_a_certificate(tls: Any) -> None:
    with refused(ValueError, "tls: must have cert and key on a server"):
        server_context(tls)


@pytest.mark.parametrize("tls", [1, "tls", b"", ["key"], object, ssl.PROTOCOL_TLS_SERVER])
@pytest.mark.parametrize("make", [server_context, client_context])
def test_tls_of_another_type(make: Callable[[Any], object], tls: Any) -> None:
    what = "a TLS, an ssl.SSLContext, a mapping, a bool or None"
    with refused(TypeError, f"tls: must be {what}, not {type(tls).__name__}"):
        make(tls)


@pytest.mark.parametrize("make", [server_context, client_context])
def test_unknown_key(make: Callable[[Any], object]) -> None:
    text = (
        "tls: unknown key 'certt'; known are key, cert, ca, passphrase, server_name, "
        "alpn_protocols, request_cert, reject_unauthorized, ciphers, min_version, sni, "
        "sni_callback"
    )
    with refused(TypeError, text):
        make({"key": LEAF.key, "certt": LEAF.cert})
    with pytest.raises(TypeError, match="^tls: unknown key 1; known are key, "):
        make({1: LEAF.key})


def test_a_mapping_and_a_tls_mean_the_same() -> None:
    for tls in (LEAF.options, MappingProxyType(LEAF.options), TLS(**LEAF.options)):
        assert shake(server(tls), client()).peer_name == NAME


def test_a_context_is_used_as_it_is() -> None:
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    assert server_context(theirs) is theirs
    assert theirs.sni_callback is None
    ours = ssl.create_default_context()
    assert client_context(ours) == (ours, None)


def test_a_context_for_the_other_side() -> None:
    text = "tls: must be an ssl.SSLContext for the {} side, not for the {} side"
    with refused(ValueError, text.format("server", "client")):
        server_context(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    with refused(ValueError, text.format("client", "server")):
        client_context(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))


def test_one_tls_for_both_ends() -> None:
    tls = TLS(**LEAF.options, ca=TRUST, request_cert=True)
    done = shake(server(tls), client(tls))
    assert done.peer_name == NAME
    assert done.server.getpeercert()


# ── TLS itself ─────────────────────────────────────────────────────────────────────────────────


def test_tls_takes_keywords_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        TLS(LEAF.key)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="certt"):
        TLS(certt=LEAF.cert)  # type: ignore[call-arg]


def test_tls_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        TLS().ciphers = "ALL"  # type: ignore[misc]


def test_tls_can_be_replaced() -> None:
    tls = TLS(**LEAF_OTHER.options, min_version="TLSv1.3", alpn_protocols=["h2"])
    rotated = replace(tls, key=LEAF.key, cert=LEAF.cert)
    assert (rotated.min_version, rotated.alpn_protocols) == ("TLSv1.3", ("h2",))
    assert shake(server(rotated), client()).peer_name == NAME


def test_repr_shows_no_secret() -> None:
    tls = TLS(
        key=LEAF.key.decode(),
        cert=LEAF.cert,
        passphrase="open sesame",
        min_version="TLSv1.3",
        sni={OTHER: {"key": "hidden", "cert": LEAF_OTHER.cert}},
    )
    assert repr(tls) == (
        "TLS(key=..., cert=..., passphrase=..., min_version='TLSv1.3', "
        "sni={'other.test': TLS(key=..., cert=...)})"
    )
    assert repr(TLS()) == "TLS()"


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"request_cert": 1}, TypeError, "tls.request_cert: must be True or False, not int"),
        ({"request_cert": None}, TypeError, "tls.request_cert: must be True or False, not None"),
        (
            {"reject_unauthorized": "no"},
            TypeError,
            "tls.reject_unauthorized: must be True or False, not str",
        ),
        (
            {"server_name": b"a"},
            TypeError,
            "tls.server_name: must be a host name or an IP address as str, not bytes",
        ),
        (
            {"server_name": ""},
            ValueError,
            "tls.server_name: must be a host name or an IP address, not ''",
        ),
        (
            {"server_name": "a\0b"},
            ValueError,
            "tls.server_name: must be without null bytes, not 'a\\x00b'",
        ),
        ({"ciphers": ["AES"]}, TypeError, "tls.ciphers: must be a str, not list"),
        (
            {"min_version": 0x303},
            TypeError,
            "tls.min_version: must be 'TLSv1', 'TLSv1.1', 'TLSv1.2' or 'TLSv1.3', not int",
        ),
        (
            {"min_version": "TLSv1.4"},
            ValueError,
            "tls.min_version: must be 'TLSv1', 'TLSv1.1', 'TLSv1.2' or 'TLSv1.3', not 'TLSv1.4'",
        ),
        (
            {"alpn_protocols": "h2"},
            TypeError,
            "tls.alpn_protocols: must be a list of str or bytes, not str",
        ),
        (
            {"alpn_protocols": b"\x02h2"},
            TypeError,
            "tls.alpn_protocols: must be a list of str or bytes, not bytes",
        ),
        (
            {"alpn_protocols": ["h2", None]},
            TypeError,
            "tls.alpn_protocols: must be a list of str or bytes, not None",
        ),
        (
            {"alpn_protocols": [""]},
            ValueError,
            "tls.alpn_protocols: must be a list of ASCII names of 1 to 255 bytes, not ''",
        ),
        (
            {"alpn_protocols": ["ü"]},
            ValueError,
            "tls.alpn_protocols: must be a list of ASCII names of 1 to 255 bytes, not 'ü'",
        ),
        (
            {"alpn_protocols": [b"\xff"]},
            ValueError,
            "tls.alpn_protocols: must be a list of ASCII names of 1 to 255 bytes, not b'\\xff'",
        ),
        (
            {"passphrase": 1},
            TypeError,
            "tls.passphrase: must be str, bytes or a callable that returns one, not int",
        ),
        (
            {"passphrase": "\ud800"},
            ValueError,
            "tls.passphrase: must be a str that UTF-8 can encode",
        ),
        (
            {"passphrase": "x" * 1025},
            ValueError,
            "tls.passphrase: must be of at most 1024 bytes, not 1025",
        ),
        (
            {"key": 1},
            TypeError,
            f"tls.key: must be {PEM}, not int",
        ),
        (
            {"cert": [LEAF.cert, None]},
            TypeError,
            f"tls.cert[1]: must be {PEM}, not None",
        ),
        (
            {"sni": [OTHER]},
            TypeError,
            "tls.sni: must be a mapping of host names to TLS options, not list",
        ),
        (
            {"sni": {b"a": {}}},
            TypeError,
            "tls.sni: must be a mapping whose keys are host names as str, not bytes",
        ),
        ({"sni": {"": {}}}, ValueError, "tls.sni: must be a host name or an IP address, not ''"),
        ({"sni": {"*.": {}}}, ValueError, "tls.sni: must be a host name or an IP address, not ''"),
        (
            {"sni": {"*": {}}},
            ValueError,
            "tls.sni: must be a mapping of names, some with '*.' in front, not '*'",
        ),
        (
            {"sni": {"a.*.test": {}}},
            ValueError,
            "tls.sni: must be a mapping of names, some with '*.' in front, not 'a.*.test'",
        ),
        (
            {"sni": {"a.test": TLS(), "A.test.": TLS()}},
            ValueError,
            "tls.sni: must have 'A.test.' once only",
        ),
        (
            {"sni": {"a.test": None}},
            TypeError,
            "tls.sni['a.test']: must be a TLS, an ssl.SSLContext, a mapping, a bool or None, not "
            "None",
        ),
        (
            {"sni": {"a.test": {"key": 1}}},
            TypeError,
            f"tls.sni['a.test'].key: must be {PEM}, not int",
        ),
        (
            {"sni": {"a.test": {"ciphers": 1}}},
            TypeError,
            "tls.sni['a.test'].ciphers: must be a str, not int",
        ),
        (
            {"sni": {"a.test": {"min_version": "x"}}},
            ValueError,
            "tls.sni['a.test'].min_version: must be 'TLSv1', 'TLSv1.1', 'TLSv1.2' or 'TLSv1.3', "
            "not 'x'",
        ),
        (
            {"sni": {"a.test": {"sni_callback": print}}},
            ValueError,
            "tls.sni['a.test']: must be without sni and sni_callback of its own",
        ),
        (
            {"sni_callback": 1},
            TypeError,
            "tls.sni_callback: must be a callable that is not async, not int",
        ),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with refused(error, text):
        TLS(**options)
    with refused(error, text):
        server_context({**LEAF.options, **options})


def test_unknown_key_inside_sni() -> None:
    with pytest.raises(TypeError, match=r"^tls\.sni\['a\.test'\]: unknown key 'certt'; known"):
        TLS(sni={"a.test": {"certt": LEAF.cert}})


def test_async_sni_callback() -> None:
    async def choose(sslobj: Any, server_name: Any, context: Any) -> None: ...

    with refused(TypeError, "tls.sni_callback: must be a callable that is not async, not function"):
        TLS(sni_callback=choose)  # type: ignore[arg-type]


# ── Where PEM comes from ───────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("pem")
    contents = {"key": LEAF.key, "cert": LEAF.cert, "ca": TRUST}
    for name, pem in contents.items():
        (directory / name).write_bytes(pem)
    return {name: directory / name for name in contents}


FORMS: dict[str, Callable[[Path], Any]] = {
    "str": lambda path: path.read_text(),
    "bytes": lambda path: path.read_bytes(),
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "path": lambda path: path,
    "text file": lambda path: io.StringIO(path.read_text()),
    "binary file": lambda path: io.BytesIO(path.read_bytes()),
    "list": lambda path: [path.read_text()],
    "tuple": lambda path: (path,),
    "comment in front": lambda path: "# Müller's\n" + path.read_text(),
    "CRLF": lambda path: path.read_text().replace("\n", "\r\n"),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms_of_pem(files: dict[str, Path], form: Callable[[Path], Any]) -> None:
    context = server({"key": form(files["key"]), "cert": form(files["cert"])})
    assert shake(context, client({"ca": form(files["ca"])})).peer_name == NAME


def test_open_files_are_left_open_and_may_serve_twice(files: dict[str, Path]) -> None:
    with files["key"].open() as key, files["cert"].open("rb") as cert:
        tls = TLS(key=key, cert=cert)
        assert not key.closed
        assert not cert.closed
    for _ in range(2):
        assert shake(server(tls), client()).peer_name == NAME


def test_a_path_is_read_again_for_each_context(tmp_path: Path) -> None:
    key, cert = tmp_path / "key", tmp_path / "cert"
    tls = TLS(key=key, cert=cert)
    for leaf, name in ((LEAF, NAME), (LEAF_OTHER, OTHER)):
        key.write_bytes(leaf.key)
        cert.write_bytes(leaf.cert)
        assert shake(server(tls), client(), name).peer_name == name


def test_a_buffer_is_copied() -> None:
    key = bytearray(LEAF.key)
    tls = TLS(key=key, cert=LEAF.cert)
    key.clear()
    assert shake(server(tls), client()).peer_name == NAME


def test_key_and_certificate_in_one() -> None:
    for contents in (LEAF.key + LEAF.cert, LEAF.cert + LEAF.key):
        assert shake(server({"cert": contents}), client()).peer_name == NAME
        assert shake(server({"cert": contents, "key": contents}), client()).peer_name == NAME


def test_several_authorities() -> None:
    for ca in ([STRANGER.cert_pem.bytes(), TRUST], STRANGER.cert_pem.bytes() + TRUST):
        context = client({"ca": ca})
        assert context.cert_store_stats()["x509_ca"] == 2
        assert shake(server(), context).peer_name == NAME


def test_a_chain_is_sent_whole() -> None:
    intermediate = CA.create_child_ca()
    leaf = Leaf(intermediate.issue_cert(NAME))
    assert leaf.cert.count(b"BEGIN CERTIFICATE") == 2
    assert shake(server(leaf.options), client()).peer_name == NAME


def test_rsa_and_ecdsa_side_by_side() -> None:
    context = server({"key": [LEAF_RSA.key, LEAF.key], "cert": [LEAF_RSA.cert, LEAF.cert]})
    for kind in ("RSA", "ECDSA"):
        peer = client(ciphers=f"ECDHE+a{kind}")
        peer.maximum_version = ssl.TLSVersion.TLSv1_2  # where the cipher decides on the certificate
        cipher = shake(context, peer).client.cipher()
        assert cipher is not None
        assert f"-{kind}-" in cipher[0]


def test_of_two_certificates_of_one_type_the_last_counts() -> None:
    context = server({"key": [LEAF_OTHER.key, LEAF.key], "cert": [LEAF_OTHER.cert, LEAF.cert]})
    assert shake(context, client()).peer_name == NAME


def test_empty_lists_are_none() -> None:
    with refused(ValueError, "tls: must have cert and key on a server"):
        server({"key": [], "cert": []})
    assert client({"ca": []}).cert_store_stats() == client({}).cert_store_stats()


def test_contents_never_reach_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[str] = []
    with_file = _contexts._file_of

    @contextlib.contextmanager
    def noted(contents: bytes) -> Iterator[str]:
        with with_file(contents) as path:
            made.append(path)
            yield path

    monkeypatch.setattr(_contexts, "_file_of", noted)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    server()
    assert len(made) == 2
    if sys.platform == "linux":
        assert all(path.startswith("/proc/self/fd/") for path in made)
    assert not os.listdir(tmp_path)


def test_without_memory_files_a_private_one_is_used_and_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with _contexts._file_of(LEAF.key) as path:
        assert Path(path).parent == tmp_path
        assert Path(path).stat().st_mode & 0o777 == 0o600
        assert Path(path).read_bytes() == LEAF.key
    assert shake(server(), client()).peer_name == NAME
    with pytest.raises(TLSOptionError):
        server(key=LEAF_OTHER.key)
    assert not os.listdir(tmp_path)


# ── PEM that is wrong ──────────────────────────────────────────────────────────────────────────

DAMAGED_KEY = LEAF.key.replace(b"\nM", b"\nZ", 1)
DAMAGED_CERT = LEAF.cert.replace(b"\nMII", b"\nZZZ", 1)
assert LEAF.key != DAMAGED_KEY
assert LEAF.cert != DAMAGED_CERT


@pytest.mark.parametrize("name", ["key", "cert", "ca"])
@pytest.mark.parametrize("value", ["server.pem", "", b"", b"\x30\x82"])
@pytest.mark.parametrize("make", [server, client])
def test_what_is_no_pem_is_not_shown(
    make: Callable[..., ssl.SSLContext], name: str, value: str | bytes
) -> None:
    text = (
        f"tls.{name}: must be PEM contents, with '-----BEGIN' in them (for a file use "
        f"pathlib.Path), not these {len(value)} bytes"
    )
    with refused(TLSOptionError, text) as caught:
        make({**LEAF.options, name: value})
    assert isinstance(caught.value, ssl.SSLError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("make", [server, client])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"cert": LEAF.key, "key": LEAF.key},
            "tls.cert: is no PEM certificate, or not a complete one",
        ),
        (
            {"cert": LEAF.cert[:-30], "key": LEAF.key},
            "tls.cert: is no PEM certificate, or not a complete one",
        ),
        (
            {"cert": LEAF.cert + LEAF_OTHER.cert[:-30], "key": LEAF.key},
            "tls.cert: is no PEM certificate, or not a complete one",
        ),
        ({"cert": LEAF.cert, "key": LEAF.cert}, "tls.key: is no PEM private key"),
        ({**LEAF.options, "ca": LEAF.key}, "tls.ca: is no PEM certificate, or not a complete one"),
        (
            {**LEAF.options, "ca": TRUST + TRUST[:-30]},
            "tls.ca: is no PEM certificate, or not a complete one",
        ),
        (
            {**LEAF.options, "ca": [TRUST, LEAF.key]},
            "tls.ca[1]: is no PEM certificate, or not a complete one",
        ),
    ],
)
def test_pem_of_the_wrong_kind_or_cut_off(
    make: Callable[..., ssl.SSLContext], options: dict[str, Any], text: str
) -> None:
    with refused(TLSOptionError, text):
        make(options)


@pytest.mark.parametrize("make", [server, client])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cert": DAMAGED_CERT, "key": LEAF.key}, r"^tls\.cert: is no valid certificate(: .+)?$"),
        (
            {"cert": LEAF_OTHER.cert + DAMAGED_CERT, "key": LEAF_OTHER.key},
            r"^tls\.cert: is no valid certificate(: .+)?$",
        ),
        (
            {**LEAF.options, "ca": TRUST + DAMAGED_CERT},
            r"^tls\.ca: is no valid certificate(: .+)?$",
        ),
        ({"cert": LEAF.cert, "key": DAMAGED_KEY}, r"^tls\.key: is no valid private key(: .+)?$"),
        ({"cert": LEAF.cert, "key": LEAF.key[:-30]}, r"^tls\.key: is no valid private key(: .+)?$"),
        ({"cert": LEAF.cert, "key": LEAF_OTHER.key}, r"^tls\.key: does not fit tls\.cert$"),
        ({"cert": LEAF.cert, "key": LEAF_RSA.key}, r"^tls\.key: does not fit tls\.cert$"),
        ({"cert": LEAF_RSA.cert, "key": LEAF.key}, r"^tls\.key: does not fit tls\.cert$"),
        (
            {"cert": [LEAF_RSA.cert, LEAF.cert], "key": [LEAF_RSA.key, LEAF_OTHER.key]},
            r"^tls\.key\[1\]: does not fit tls\.cert\[1\]$",
        ),
        (
            {"cert": [LEAF_RSA.cert, LEAF.cert], "key": [LEAF.key, LEAF_RSA.key]},
            r"^tls\.key\[0\]: does not fit tls\.cert\[0\]$",
        ),
        (
            {"cert": [LEAF.cert, DAMAGED_CERT], "key": [LEAF.key, LEAF.key]},
            r"^tls\.cert\[1\]: is no valid certificate(: .+)?$",
        ),
        (
            {**LEAF.options, "ciphers": "NONSENSE"},
            r"^tls\.ciphers: must select a cipher, not 'NONSENSE'$",
        ),
    ],
)
def test_what_openssl_refuses(
    make: Callable[..., ssl.SSLContext], options: dict[str, Any], text: str
) -> None:
    with refused_with_cause(text) as caught:
        make(options)
    assert caught.value.reason == getattr(caught.value.__cause__, "reason", None)


def test_ciphers_with_a_null_byte() -> None:
    with pytest.raises(TLSOptionError, match=r"^tls\.ciphers: must select a cipher, not 'A\\x00'$"):
        client(ciphers="A\0")


def test_a_key_too_short_for_openssl() -> None:
    short = Leaf(CA.issue_cert(NAME, key_type=trustme.KeyType.RSA))
    # What the security level asks of 2048 bits, a higher level refuses.
    text = r"^tls\.cert: is too weak for OpenSSL's security level: ee key too small$"
    with refused_with_cause(text):
        server(short.options, ciphers="DEFAULT@SECLEVEL=5")


@pytest.mark.parametrize("make", [server, client])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"key": LEAF.key}, "tls.cert: must be given with key"),
        ({"cert": LEAF.cert}, "tls.key: must be given with cert, which has no private key in it"),
        (
            {"cert": [LEAF.cert + LEAF.key, LEAF_RSA.cert]},
            "tls.key[1]: must be given with cert, which has no private key in it",
        ),
        (
            {"key": LEAF.key, "cert": [LEAF.cert, TRUST]},
            "tls.key: must be as many as cert has (2), not 1; the certificates of one chain are "
            "one item",
        ),
    ],
)
def test_half_a_pair(
    make: Callable[..., ssl.SSLContext], options: dict[str, Any], text: str
) -> None:
    with refused(ValueError, text):
        make(options)


# ── Files that are wrong ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["key", "cert", "ca"])
def test_a_missing_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "missing.pem"
    with pytest.raises(FileNotFoundError) as caught:
        server(**{name: path})
    assert str(caught.value) == f"[Errno 2] tls.{name}: No such file or directory: {str(path)!r}"
    assert caught.value.filename == str(path)


def test_a_directory(tmp_path: Path) -> None:
    with refused(ValueError, f"tls.ca: must be a regular file, not {str(tmp_path)!r}"):
        client(ca=tmp_path)


@pytest.mark.timeout(10)
def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with refused(ValueError, f"tls.ca: must be a regular file, not {str(path)!r}"):
        client(ca=path)


def test_a_path_with_a_null_byte() -> None:
    with refused(ValueError, "tls.ca: must be a path without null bytes, not 'a\\x00b'"):
        client(ca=Path("a\0b"))


def test_a_file_without_pem(tmp_path: Path) -> None:
    path = tmp_path / "empty.pem"
    path.write_bytes(b"")
    with refused(
        TLSOptionError, f"tls.key: must be a PEM file, with '-----BEGIN' in it, not {str(path)!r}"
    ):
        server(key=path)


def test_a_closed_file(files: dict[str, Path]) -> None:
    with files["ca"].open() as file:
        pass
    with pytest.raises(ValueError, match=r"^tls\.ca: must be a file that can be read: I/O op"):
        TLS(ca=file)


def test_a_file_open_for_writing(tmp_path: Path) -> None:
    with (
        (tmp_path / "new").open("wb") as file,
        pytest.raises(ValueError, match=r"^tls\.ca: must be a file that can be read: "),
    ):
        TLS(ca=file)


def test_a_file_that_fails(files: dict[str, Path]) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match=r"^\[Errno 5\] tls\.ca: Input/output error"):
        TLS(ca=Broken())


def test_a_file_of_something_else() -> None:
    class Odd:
        def read(self) -> int:
            return 7

    with pytest.raises(TypeError, match=r"^tls\.ca: must be a file of str or bytes .* not int$"):
        TLS(ca=Odd())  # type: ignore[arg-type]


# ── Passphrases ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pkcs8", [True, False], ids=["PKCS8", "traditional"])
@pytest.mark.parametrize(
    "passphrase",
    [SECRET, SECRET.decode(), bytearray(SECRET), lambda: SECRET, lambda: SECRET.decode()],
    ids=["bytes", "str", "bytearray", "callable of bytes", "callable of str"],
)
def test_passphrase(passphrase: Any, pkcs8: bool) -> None:
    key = LEAF.key_encrypted(SECRET, pkcs8=pkcs8)
    context = server({"key": key, "cert": LEAF.cert, "passphrase": passphrase})
    assert shake(context, client()).peer_name == NAME


@pytest.mark.parametrize("pkcs8", [True, False], ids=["PKCS8", "traditional"])
@pytest.mark.parametrize("make", [server, client])
def test_wrong_passphrase(make: Callable[..., ssl.SSLContext], pkcs8: bool) -> None:
    key = LEAF.key_encrypted(SECRET, pkcs8=pkcs8)
    with refused_with_cause(r"^tls\.passphrase: does not decrypt tls\.key$") as caught:
        make({"key": key, "cert": LEAF.cert, "passphrase": "wrong"})
    assert "wrong" not in str(caught.value)


def test_a_wrong_passphrase_that_decrypts_to_nonsense_is_a_wrong_passphrase() -> None:
    # About one in 256 passes the check of the padding and fails later: each must say the same.
    for i in range(600):
        with refused_with_cause(r"^tls\.passphrase: does not decrypt tls\.key$"):
            server(
                {
                    "key": TRADITIONAL,
                    "cert": LEAF.cert,
                    "passphrase": f"wrong {i}",
                }
            )


TRADITIONAL = LEAF.key_encrypted(SECRET, pkcs8=False)


@pytest.mark.parametrize("make", [server, client])
def test_missing_and_empty_passphrase(make: Callable[..., ssl.SSLContext]) -> None:
    with refused(TLSOptionError, "tls.passphrase: must be given, tls.key is encrypted"):
        make(ENCRYPTED)
    for empty in ("", lambda: b""):
        with refused(TLSOptionError, "tls.passphrase: must not be empty, tls.key is encrypted"):
            make({**ENCRYPTED, "passphrase": empty})


def test_passphrase_for_a_key_inside_the_certificate() -> None:
    both = ENCRYPTED["cert"] + ENCRYPTED["key"]
    assert shake(server({"cert": both, "passphrase": SECRET}), client()).peer_name == NAME
    with refused(TLSOptionError, "tls.passphrase: must be given, tls.key is encrypted"):
        server({"cert": both})


def test_a_passphrase_nobody_asks_for_does_no_harm() -> None:
    for passphrase in ("", "unused", lambda: pytest.fail("called")):
        assert shake(server(passphrase=passphrase), client()).peer_name == NAME


def test_a_right_passphrase_and_a_key_that_does_not_fit() -> None:
    with refused_with_cause(r"^tls\.key: does not fit tls\.cert$"):
        server({**ENCRYPTED, "cert": LEAF_OTHER.cert, "passphrase": SECRET})


def test_a_callable_is_asked_once_for_each_encrypted_key() -> None:
    asked: list[int] = []

    def passphrase() -> bytes:
        asked.append(1)
        return SECRET

    server(
        {
            "key": [ENCRYPTED["key"], LEAF_RSA.key_encrypted(SECRET)],
            "cert": [LEAF.cert, LEAF_RSA.cert],
            "passphrase": passphrase,
        }
    )
    assert len(asked) == 2


@pytest.mark.parametrize("error", [LookupError("no vault"), ssl.SSLError(1, "vault's TLS failed")])
def test_a_callable_that_raises(error: Exception) -> None:
    def passphrase() -> bytes:
        raise error

    with pytest.raises(type(error)) as caught:
        server({**ENCRYPTED, "passphrase": passphrase})
    assert caught.value is error


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (
            None,
            TypeError,
            "tls.passphrase: must be str, bytes or a callable that returns one, not None",
        ),
        ("x" * 1025, ValueError, "tls.passphrase: must be of at most 1024 bytes, not 1025"),
    ],
)
def test_a_callable_that_returns_something_wrong(
    value: Any, error: type[Exception], text: str
) -> None:
    with refused(error, text):
        server({**ENCRYPTED, "passphrase": lambda: value})


def test_nothing_is_asked_on_the_terminal(tmp_path: Path) -> None:
    """In a process with a terminal of its own, where OpenSSL could ask."""
    (tmp_path / "key").write_bytes(ENCRYPTED["key"])
    (tmp_path / "cert").write_bytes(LEAF.cert)
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, sys\n"
        "from uvsock._contexts import server_context\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "try:\n"
        "    server_context({'key': here / 'key', 'cert': here / 'cert'})\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "import pty, sys; pty.spawn(sys.argv[1:])",
            sys.executable,
            str(script),
            str(tmp_path),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert found.stdout.strip() == "tls.passphrase: must be given, tls.key is encrypted"
    assert found.stderr == ""


# ── What a handshake makes of them ─────────────────────────────────────────────────────────────


def test_an_unknown_authority() -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        shake(server(), client({"ca": STRANGER.cert_pem.bytes()}))


def test_an_expired_certificate() -> None:
    context = server(EXPIRED.options)  # the server does not mind
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate has expired"):
        shake(context, client())


def test_a_wrong_name() -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake(server(), client(), "wrong.test")


@pytest.mark.parametrize("leaf", [LEAF, EXPIRED, ROGUE])
def test_a_client_that_rejects_nobody(leaf: Leaf) -> None:
    context = client({"reject_unauthorized": False})
    assert context.verify_mode is ssl.CERT_NONE
    assert not context.check_hostname
    done = shake(server(leaf.options), context, "wrong.test")
    assert done.client.getpeercert() == {}
    assert done.client.getpeercert(True)


def test_a_client_that_rejects_nobody_still_reads_its_ca() -> None:
    with pytest.raises(TLSOptionError, match=r"^tls\.ca: "):
        client(ca="nonsense", reject_unauthorized=False)


def test_server_name_goes_with_the_context() -> None:
    found = client_context({"ca": TRUST, "server_name": NAME})
    assert found is not None
    assert found[1] == NAME
    assert shake(server(), *found).server_name == NAME
    assert server_context({**LEAF.options, "server_name": NAME})  # not the server's business


def test_an_address_is_verified_and_not_asked_for() -> None:
    assert shake(server(), client(), "127.0.0.1").server_name is None


def test_an_international_name() -> None:
    leaf = Leaf(CA.issue_cert("xn--mnchen-3ya.test"))
    done = shake(server(sni={"München.test": leaf.options}), client(), "münchen.test")
    assert done.server_name == "xn--mnchen-3ya.test"
    assert done.peer_name == "xn--mnchen-3ya.test"


def test_mutual_tls() -> None:
    context = server(ca=TRUST, request_cert=True)
    assert context.verify_mode is ssl.CERT_REQUIRED
    done = shake(context, client(**CLIENT.options))
    found = done.server.getpeercert()
    assert found
    assert found["subjectAltName"] == (("email", "client@uvsock.test"),)
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        shake(context, client())
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        shake(context, client(**ROGUE.options))


def test_mutual_tls_without_rejecting_those_without_certificate() -> None:
    context = server(ca=TRUST, request_cert=True, reject_unauthorized=False)
    assert context.verify_mode is ssl.CERT_OPTIONAL
    assert shake(context, client()).server.getpeercert() is None
    assert shake(context, client(**CLIENT.options)).server.getpeercert()
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        shake(context, client(**ROGUE.options))


def test_ca_alone_asks_for_no_certificate() -> None:
    context = server(ca=TRUST)
    assert context.verify_mode is ssl.CERT_NONE
    assert shake(context, client(**CLIENT.options)).server.getpeercert() is None


def test_without_ca_clients_are_verified_by_the_systems() -> None:
    stats = server(request_cert=True).cert_store_stats()
    expected = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    expected.load_default_certs(ssl.Purpose.CLIENT_AUTH)
    assert stats == expected.cert_store_stats()


@pytest.mark.parametrize(
    ("ours", "theirs", "chosen"),
    [
        (["h2", "http/1.1"], ["http/1.1", "h2"], "h2"),
        ([b"echo"], ("echo",), "echo"),
        (["h2"], ["echo"], None),
        (["h2"], [], None),
        (None, ["h2"], None),
        (["x" * 255], ["x" * 255], "x" * 255),
    ],
)
def test_alpn(ours: Any, theirs: Any, chosen: str | None) -> None:
    done = shake(server(alpn_protocols=ours), client(alpn_protocols=theirs))
    assert done.server.selected_alpn_protocol() == chosen
    assert done.client.selected_alpn_protocol() == chosen


def test_min_version() -> None:
    old = client()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert shake(server(), old).client.version() == "TLSv1.2"
    assert shake(server(), client()).client.version() == "TLSv1.3"
    with pytest.raises(ssl.SSLError, match="UNSUPPORTED_PROTOCOL"):
        shake(server(min_version="TLSv1.3"), old)


@pytest.mark.parametrize("version", ["TLSv1", "TLSv1.1"])
def test_deprecated_versions_are_known(version: str) -> None:
    with pytest.warns(DeprecationWarning, match=r"ssl\.TLSVersion\.TLSv1"):
        context = server(min_version=version)
    assert context.minimum_version.name == version.replace(".", "_")


def test_ciphers() -> None:
    old = client()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    done = shake(server(ciphers="ECDHE-ECDSA-AES256-GCM-SHA384"), old)
    cipher = done.client.cipher()
    assert cipher is not None
    assert cipher[0] == "ECDHE-ECDSA-AES256-GCM-SHA384"
    with pytest.raises(ssl.SSLError, match="NO_SHARED_CIPHER"):
        shake(server(ciphers="ECDHE-RSA-AES256-GCM-SHA384"), old)


@pytest.mark.parametrize("make", [server, client])
def test_no_renegotiation(make: Callable[..., ssl.SSLContext]) -> None:
    assert make().options & ssl.OP_NO_RENEGOTIATION


@pytest.mark.parametrize("make", [server, client])
def test_certificates_are_verified_alike_on_all_pythons(
    make: Callable[..., ssl.SSLContext],
) -> None:
    assert not make().verify_flags & ssl.VERIFY_X509_STRICT


def test_keys_for_tools_that_decrypt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    shake(server(), client())
    assert "CLIENT_TRAFFIC_SECRET_0" in (tmp_path / "keys").read_text()


# ── Server names ───────────────────────────────────────────────────────────────────────────────


def test_the_name_is_noted() -> None:
    done = shake(server(), client())
    assert done.server_name == NAME
    nameless = client({"reject_unauthorized": False})
    assert shake(server(), nameless, None).server_name is None


@pytest.mark.parametrize(
    ("host", "asked"),
    [
        (OTHER, OTHER),
        ("OTHER.Test", OTHER),
        (OTHER, "Other.TEST"),
        (OTHER + ".", OTHER),
        ("*.other.test", "a.other.test"),
        ("*.Other.Test", "A.other.test"),
    ],
)
@pytest.mark.parametrize("form", [dict, lambda options: TLS(**options), server])
def test_sni(host: str, asked: str, form: Callable[[Any], Any]) -> None:
    leaf = Leaf(CA.issue_cert(OTHER, "*.other.test"))
    done = shake(server(sni={host: form(leaf.options)}), client(), asked)
    assert done.peer_name == OTHER
    assert done.server_name == asked


@pytest.mark.parametrize("asked", ["other.test", "a.b.other.test", "xother.test"])
def test_a_wildcard_stands_for_one_label(asked: str) -> None:
    lenient = client({"ca": TRUST})
    lenient.check_hostname = False
    context = server(sni={"*.other.test": LEAF_OTHER.options})
    assert shake(context, lenient, asked).peer_name == NAME


def test_an_exact_name_goes_before_a_wildcard() -> None:
    lenient = client({"ca": TRUST})
    lenient.check_hostname = False
    exact = Leaf(CA.issue_cert("exact.test"))
    context = server(sni={"*.other.test": LEAF_OTHER.options, "a.other.test": exact.options})
    assert shake(context, lenient, "a.other.test").peer_name == "exact.test"
    assert shake(context, lenient, "b.other.test").peer_name == OTHER


def test_names_not_in_the_table_get_the_options_outside() -> None:
    context = server(sni={OTHER: LEAF_OTHER.options})
    assert shake(context, client(), NAME).peer_name == NAME
    assert shake(context, client(), "127.0.0.1").peer_name == NAME


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_server_of_known_names_only(version: ssl.TLSVersion) -> None:
    context = server({"sni": {OTHER: LEAF_OTHER.options}})
    peer = client()
    peer.maximum_version = version
    assert shake(context, peer, OTHER).peer_name == OTHER
    with pytest.raises(ssl.SSLError, match="NO_SHARED_CIPHER|NO_SUITABLE_SIGNATURE_ALGORITHM"):
        shake(context, peer, NAME)


def test_alpn_and_ciphers_are_those_of_the_name() -> None:
    inside = {**LEAF_OTHER.options, "alpn_protocols": ["inside"], "ciphers": "ECDHE+AES256"}
    context = server(alpn_protocols=["outside"], ciphers="ECDHE+AES128", sni={OTHER: inside})
    peer = client(alpn_protocols=["outside", "inside"])
    peer.maximum_version = ssl.TLSVersion.TLSv1_2
    for name, protocol, cipher in ((OTHER, "inside", "AES256"), (NAME, "outside", "AES128")):
        done = shake(context, peer, name)
        assert done.client.selected_alpn_protocol() == protocol
        assert cipher in done.client.cipher()[0]  # type: ignore[index]


def test_client_certificates_are_asked_for_by_the_options_outside() -> None:
    context = server(ca=TRUST, request_cert=True, sni={OTHER: LEAF_OTHER.options})
    done = shake(context, client(**CLIENT.options), OTHER)
    assert done.peer_name == OTHER
    assert done.server.getpeercert()
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        shake(context, client(), OTHER)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(context, client(**ROGUE.options), OTHER)


def test_client_certificates_are_verified_by_the_authorities_of_the_name() -> None:
    inside = {**LEAF_OTHER.options, "ca": STRANGER.cert_pem.bytes()}
    context = server(ca=TRUST, request_cert=True, sni={OTHER: inside})
    assert shake(context, client(**ROGUE.options), OTHER).server.getpeercert()
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(context, client(**CLIENT.options), OTHER)


def strict_context() -> ssl.SSLContext:
    context = server(LEAF_OTHER.options)
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


@pytest.mark.parametrize(
    ("inside", "text"),
    [
        (
            {**LEAF_OTHER.options, "request_cert": True, "ca": TRUST},
            "tls.sni['other.test'].request_cert: must not ask for more than tls.request_cert",
        ),
        (
            strict_context(),
            "tls.sni['other.test']: must be a context whose verify_mode is CERT_NONE, as the "
            "options outside decide, not CERT_OPTIONAL",
        ),
        (
            {**LEAF_OTHER.options, "min_version": "TLSv1.3"},
            "tls.sni['other.test'].min_version: must not be above tls.min_version",
        ),
        (
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            "tls.sni['other.test']: must be an ssl.SSLContext for the server side, not for the "
            "client side",
        ),
        ({}, "tls.sni['other.test']: must have cert and key on a server"),
        ({"key": LEAF.key}, "tls.sni['other.test'].cert: must be given with key"),
    ],
)
def test_sni_that_could_not_be_kept(inside: Any, text: str) -> None:
    with refused(ValueError, text):
        server(sni={OTHER: inside})


def test_an_error_of_openssl_names_the_option_inside() -> None:
    with refused_with_cause(r"^tls\.sni\['other\.test'\]\.key: does not fit tls\.sni\['other\.tes"):
        server(sni={OTHER: {**LEAF_OTHER.options, "key": LEAF.key}})


Calls = list[tuple[object, object, object]]


def test_sni_callback_is_called_like_the_stdlibs() -> None:
    calls: Calls = []

    def choose(sslobj: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        calls.append((sslobj, name, context))

    context = server(sni_callback=choose)
    done = shake(context, client())
    assert calls == [(done.server, NAME, context)]
    shake(context, client(), "127.0.0.1")
    assert calls[-1][1] is None


@pytest.mark.parametrize(
    "choice", [TLS(**LEAF_OTHER.options), server(LEAF_OTHER.options)], ids=["TLS", "context"]
)
def test_sni_callback_chooses(choice: Any) -> None:
    context = server(sni_callback=lambda *_: choice)
    for _ in range(2):
        done = shake(context, client(), OTHER)
        assert done.peer_name == OTHER
        assert done.server_name == OTHER


def test_sni_callback_may_set_the_context_itself() -> None:
    other = server(LEAF_OTHER.options)

    def choose(sslobj: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        sslobj.context = other

    assert shake(server(sni_callback=choose), client(), OTHER).peer_name == OTHER


def test_the_table_goes_before_the_callback() -> None:
    asked: list[str | None] = []
    context = server(
        sni={OTHER: LEAF_OTHER.options}, sni_callback=lambda _, name, __: asked.append(name)
    )
    shake(context, client(), OTHER)
    assert asked == []
    shake(context, client(), NAME)
    assert asked == [NAME]


def test_a_server_that_only_has_a_callback() -> None:
    context = server({"sni_callback": lambda *_: TLS(**LEAF_OTHER.options)})
    assert shake(context, client(), OTHER).peer_name == OTHER


def test_sni_callback_refuses_with_an_alert() -> None:
    alert = ssl.AlertDescription.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
    pair = Handshake(server(sni_callback=lambda *_: alert), client())
    with pytest.raises(ssl.SSLError):
        pair.run()
    with pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
        pair.client.do_handshake()
    assert not hasattr(pair.server, "_uvsock_error")


class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [Boom("x"), KeyboardInterrupt(), SystemExit(1)])
def test_sni_callback_that_raises(
    error: BaseException, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(*_: object) -> None:
        raise error

    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    pair = Handshake(server(sni_callback=choose), client())
    with pytest.raises(ssl.SSLError):
        pair.run()
    assert pair.server._uvsock_error is error  # type: ignore[attr-defined]
    with pytest.raises(ssl.SSLError, match="INTERNAL_ERROR"):
        pair.client.do_handshake()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("result", "error", "text"),
    [
        (
            "x",
            TypeError,
            f"tls.sni_callback: must be {CHOICE}, not str",
        ),
        (
            True,
            TypeError,
            f"tls.sni_callback: must be {CHOICE}, not bool",
        ),
        (256, ValueError, "tls.sni_callback: must be an int from 0 to 255, not 256"),
        (TLS(), ValueError, "tls.sni_callback: must have cert and key on a server"),
        (
            TLS(**LEAF.options, request_cert=True, ca=TRUST),
            ValueError,
            "tls.sni_callback.request_cert: must not ask for more than tls.request_cert",
        ),
    ],
)
def test_sni_callback_that_returns_something_wrong(
    result: Any, error: type[Exception], text: str
) -> None:
    pair = Handshake(server(sni_callback=lambda *_: result), client())
    with pytest.raises(ssl.SSLError):
        pair.run()
    with refused(error, text):
        raise pair.server._uvsock_error  # type: ignore[attr-defined]


def test_the_context_of_a_returned_tls_is_kept_with_it() -> None:
    tls = TLS(**LEAF_OTHER.options)
    chosen = tls
    context = server(sni_callback=lambda *_: chosen)
    first, second = (shake(context, client(), OTHER).server.context for _ in range(2))
    assert first is second
    chosen = TLS(**LEAF_OTHER.options)
    assert shake(context, client(), OTHER).server.context is not first
    kept = weakref.ref(first)
    del tls, first, second
    assert kept() is None


@pytest.mark.parametrize("options", [{}, {"sni": {OTHER: LEAF_OTHER.options}}])
def test_reference_counting_frees_a_context(options: dict[str, Any]) -> None:
    gc.disable()
    try:
        context = server(**options)
        done = shake(context, client(), NAME)
        alive: list[weakref.ref[Any]] = [weakref.ref(context), weakref.ref(done.server)]
        del context, done
        assert [reference() for reference in alive] == [None, None]
    finally:
        gc.enable()


def test_many_contexts_leave_nothing_open() -> None:
    before = descriptors()
    for _ in range(50):
        server()
        with pytest.raises(TLSOptionError):
            server(key=LEAF_OTHER.key)
        with pytest.raises(TLSOptionError):
            server(ENCRYPTED)
    assert descriptors() == before
