"""TLS options to ``ssl.SSLContext``: what ``tls=`` of ``listen``, ``connect`` and others takes."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import ssl
import stat
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import IO, TYPE_CHECKING, Any, Final, TypeAlias, cast

from uvsock._options import (
    check_flag,
    check_hostname,
    check_int,
    check_one_of,
    wrong_type,
    wrong_value,
)

# For typing.get_type_hints() each name in an annotation must be there when the program runs.
if TYPE_CHECKING:
    from typing_extensions import Buffer
elif sys.version_info >= (3, 12):
    from collections.abc import Buffer
else:
    Buffer = bytes | bytearray | memoryview

# PEM contents, or where they are.
Pem: TypeAlias = str | Buffer | os.PathLike[str] | IO[str] | IO[bytes]
Passphrase: TypeAlias = str | bytes | bytearray
_Sources: TypeAlias = tuple[bytes | os.PathLike[str], ...]

_VERSIONS: Final = {
    "TLSv1": ssl.TLSVersion.TLSv1,
    "TLSv1.1": ssl.TLSVersion.TLSv1_1,
    "TLSv1.2": ssl.TLSVersion.TLSv1_2,
    "TLSv1.3": ssl.TLSVersion.TLSv1_3,
}
_SIDES: Final[dict[int, str]] = {
    ssl.PROTOCOL_TLS_SERVER: "server",
    ssl.PROTOCOL_TLS_CLIENT: "client",
}
# PEM_BUFSIZE, the room that OpenSSL's password callback has.
_MAX_PASSPHRASE: Final = 1024
# OpenSSL's reasons for a pair that does not fit; the last is what a key of another type leads to.
_MISMATCH: Final = {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}
# And for a certificate that its security level forbids (SSL_CTX_set_security_level(3)).
_WEAK: Final = {"EE_KEY_TOO_SMALL", "CA_KEY_TOO_SMALL", "CA_MD_TOO_WEAK"}
# Only the certificates of a CA bundle go to OpenSSL: it refuses comments that are not ASCII.
_CERTIFICATE: Final = re.compile(
    rb"-----BEGIN ((?:X509 )?CERTIFICATE)-----[^-]*-----END \1-----", re.ASCII
)
_CERTIFICATE_BEGIN: Final = re.compile(rb"-----BEGIN (?:X509 )?CERTIFICATE-----")
_PRIVATE_KEY_BEGIN: Final = re.compile(rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----")


class TLSOptionError(ssl.SSLError, ValueError):
    """A TLS option that OpenSSL cannot use. The text begins with its name."""


@dataclass(frozen=True, kw_only=True, repr=False)
class TLS:
    """TLS options. Each end reads those that concern it, so one ``TLS`` may serve both.

    ``key``, ``cert`` and ``ca`` take PEM *contents* as ``str``, ``bytes`` or any buffer, a
    ``pathlib.Path``, an open file, or a list of those. Contents are copied and files read here, a
    file from where it stands; a path is read each time a context is made, so that giving the same
    ``TLS`` to ``reload_tls`` takes the new files.

    Args:
        key: the private key, or one per certificate. None: it is in ``cert``.
        cert: the certificate, followed by those of the authorities between it and the root. Or a
            list of such chains, of different key types (RSA and ECDSA side by side): of two with
            the same type the last counts.
        ca: the authorities to trust, instead of the system's.
        passphrase: what encrypts ``key``, or a callable without arguments that returns it, called
            for each encrypted key. Without it an encrypted key is an error; nothing is ever asked
            on the terminal.
        server_name: client: the name to ask for (SNI, RFC 6066) and to verify, instead of the host
            name that is connected to.
        alpn_protocols: names to agree on one of (ALPN, RFC 7301), the best first; ASCII, 1 to 255
            bytes each. Without one in common the connection goes on without.
        request_cert: server: ask the client for a certificate, verified by ``ca``.
        reject_unauthorized: client: False accepts any certificate and any name. Server with
            ``request_cert``: False accepts clients without a certificate; one that does not verify
            is refused all the same, as OpenSSL does by SSL_VERIFY_PEER.
        ciphers: OpenSSL's cipher list, ciphers(1). It does not concern TLS 1.3.
        min_version: ``"TLSv1.2"`` or ``"TLSv1.3"``; ``"TLSv1"`` and ``"TLSv1.1"`` are known, but
            deprecated (RFC 8996) and refused by most builds of OpenSSL.
        sni: server: other options by the name the client asks for. A name is matched without regard
            to case; ``"*.example.org"`` stands for one label. Such options decide on certificate,
            ALPN and ciphers. Whether the client is asked for a certificate, and the versions, are
            those of the options outside, from which ``ca`` is taken too if there is none inside; an
            ``ssl.SSLContext`` must have the same ``verify_mode``.
        sni_callback: server: called as ``sni_callback(sslobj, server_name, context)``, like
            ``ssl.SSLContext.sni_callback``, when ``sni`` has no match; the name is None if the
            client sent none. It returns None to go on, a ``TLS`` or ``ssl.SSLContext`` to go on
            with that, or an alert (``ssl.AlertDescription``) to refuse. The context of a ``TLS`` is
            kept as long as the ``TLS``. If it raises, the handshake fails with that error as cause.

    Contexts made of these options write their secrets to the file that the environment variable
    ``SSLKEYLOGFILE`` names, as those of ``ssl.create_default_context`` do. None renegotiates.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option has a wrong value. What takes OpenSSL or the file system to find out,
            bad PEM among it, is raised by ``listen``, ``connect`` and the others that take ``tls``,
            as an ``ssl.SSLError`` that is a ``ValueError`` too.
        OSError: a file cannot be read.
    """

    key: Pem | Sequence[Pem] | None = None
    cert: Pem | Sequence[Pem] | None = None
    ca: Pem | Sequence[Pem] | None = None
    passphrase: Passphrase | Callable[[], Passphrase] | None = None
    server_name: str | None = None
    alpn_protocols: Sequence[str | bytes] | None = None
    request_cert: bool = False
    reject_unauthorized: bool = True
    ciphers: str | None = None
    min_version: str = "TLSv1.2"
    sni: Mapping[str, TLS | ssl.SSLContext | Mapping[str, Any]] | None = None
    sni_callback: SNICallback | None = None

    def __post_init__(self) -> None:
        def keep(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name in ("key", "cert", "ca"):
            keep(name, _check_pem(f"tls.{name}", getattr(self, name)))
        if self.passphrase is not None and not callable(self.passphrase):
            keep("passphrase", _check_passphrase(self.passphrase))
        if self.server_name is not None:
            check_hostname("tls.server_name", self.server_name)
        keep("alpn_protocols", _check_alpn(self.alpn_protocols))
        check_flag("tls.request_cert", self.request_cert)
        check_flag("tls.reject_unauthorized", self.reject_unauthorized)
        if self.ciphers is not None and not isinstance(self.ciphers, str):
            raise wrong_type("tls.ciphers", "a str", self.ciphers)
        check_one_of("tls.min_version", self.min_version, _VERSIONS)
        keep("sni", _check_sni(self.sni))
        if self.sni_callback is not None:
            what = "a callable that is not async"
            if not callable(self.sni_callback) or inspect.iscoroutinefunction(self.sni_callback):
                raise wrong_type("tls.sni_callback", what, self.sni_callback)

    def __hash__(self) -> int:
        # Of what can always be hashed: a table of names and a path of another library cannot.
        return hash((self.server_name, self.alpn_protocols, self.ciphers, self.min_version))

    def __repr__(self) -> str:
        secret = {"key", "cert", "ca", "passphrase"}
        given = [
            f"{field.name}={'...' if field.name in secret else repr(getattr(self, field.name))}"
            for field in fields(self)
            if getattr(self, field.name) not in (field.default, (), {})
        ]
        return f"TLS({', '.join(given)})"


# Behind the class, because whoever uses these has no name TLS to look up.
SNICallback: TypeAlias = Callable[
    [ssl.SSLObject, str | None, ssl.SSLContext], TLS | ssl.SSLContext | int | None
]
TLSLike: TypeAlias = TLS | ssl.SSLContext | Mapping[str, Any] | bool | None

_OPTIONS: Final = tuple(field.name for field in fields(TLS))


def server_context(tls: TLSLike) -> ssl.SSLContext | None:
    """The context of a server; None for plain connections (``tls`` None or False).

    Raises:
        TypeError, ValueError, OSError: see ``TLS``. ``ValueError`` too without a certificate.
    """
    if tls is None or tls is False:
        return None
    if tls is True:
        raise ValueError("tls: must have cert and key on a server, True has none")
    if isinstance(tls, ssl.SSLContext):
        return _check_context("tls", tls, ssl.PROTOCOL_TLS_SERVER)
    return _server_context("tls", _as_tls("tls", tls))


def client_context(tls: TLSLike) -> tuple[ssl.SSLContext, str | None] | None:
    """The context of a client and ``TLS(server_name=)``; None for plain (``tls`` None or False).

    Raises:
        TypeError, ValueError, OSError: see ``TLS``.
    """
    if tls is None or tls is False:
        return None
    if isinstance(tls, ssl.SSLContext):
        return _check_context("tls", tls, ssl.PROTOCOL_TLS_CLIENT), None
    options = TLS() if tls is True else _as_tls("tls", tls)
    context = _new_context("tls", options, ssl.PROTOCOL_TLS_CLIENT)
    if not options.reject_unauthorized:
        context.check_hostname = False  # before verify_mode, which CERT_NONE is refused for else
        context.verify_mode = ssl.CERT_NONE
    if options.ca or options.reject_unauthorized:
        _trust(context, "tls", options.ca, ssl.Purpose.SERVER_AUTH)
    return context, options.server_name


# ── What the options may be ────────────────────────────────────────────────────────────────────


def _as_tls(name: str, value: object) -> TLS:
    if isinstance(value, TLS):
        return value
    if not isinstance(value, Mapping):
        raise wrong_type(name, "a TLS, an ssl.SSLContext, a mapping, a bool or None", value)
    for key in value:
        if key not in _OPTIONS:
            raise TypeError(f"{name}: unknown key {key!r}; known are {', '.join(_OPTIONS)}")
    try:
        return TLS(**value)
    except (TypeError, ValueError) as error:
        if name == "tls":
            raise
        # The options of a name are told from those outside by theirs.
        text = str(error).replace("tls", name, 1)
        raise (TypeError if isinstance(error, TypeError) else ValueError)(text) from error


def _check_context(name: str, context: ssl.SSLContext, protocol: int) -> ssl.SSLContext:
    """A context of the user's own, used as it is. That of the other end never connects."""
    if context.protocol in _SIDES and context.protocol != protocol:
        raise ValueError(
            f"{name}: must be an ssl.SSLContext for the {_SIDES[protocol]} side, "
            f"not for the {_SIDES[context.protocol]} side"
        )
    return context


def _check_pem(name: str, value: object) -> _Sources:
    if value is None:
        return ()
    if isinstance(value, (list, tuple)):
        return tuple(_check_pem_item(f"{name}[{i}]", item) for i, item in enumerate(value))
    return (_check_pem_item(name, value),)


def _check_pem_item(name: str, value: object) -> bytes | os.PathLike[str]:
    what = "PEM contents as str or bytes, a pathlib.Path, an open file, or a list of those"
    if isinstance(value, os.PathLike):
        return value
    read = getattr(value, "read", None)
    if callable(read):
        try:
            value = read()
        except ValueError as error:  # closed, not open for reading, or text that is none
            raise ValueError(f"{name}: must be a file that can be read: {error}") from error
        except OSError as error:
            raise _cannot_read(name, error, error.filename) from error
        what = f"a file of str or bytes (what read() returned is {type(value).__name__})"
    if isinstance(value, str):
        # PEM itself is ASCII; what stands around it does not matter.
        return value.encode("ascii", "replace")
    try:
        return bytes(memoryview(cast("Buffer", value)))
    except TypeError:
        raise wrong_type(name, what, value) from None


def _check_passphrase(value: object) -> bytes:
    if isinstance(value, str):
        try:
            value = value.encode()
        except UnicodeEncodeError:  # whose text would show a part of it
            raise ValueError("tls.passphrase: must be a str that UTF-8 can encode") from None
    if not isinstance(value, (bytes, bytearray)):
        raise wrong_type("tls.passphrase", "str, bytes or a callable that returns one", value)
    if len(value) > _MAX_PASSPHRASE:
        raise ValueError(
            f"tls.passphrase: must be of at most {_MAX_PASSPHRASE} bytes, not {len(value)}"
        )
    return bytes(value)


def _check_alpn(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise wrong_type("tls.alpn_protocols", "a list of str or bytes", value)
    names = []
    for item in value:
        what = "a list of ASCII names of 1 to 255 bytes"
        if not isinstance(item, (str, bytes)):
            raise wrong_type("tls.alpn_protocols", "a list of str or bytes", item)
        try:
            name = item if isinstance(item, str) else item.decode("ascii")
            length = len(name.encode("ascii"))
        except UnicodeError as error:
            raise wrong_value("tls.alpn_protocols", what, item) from error
        if not 1 <= length <= 255:
            raise wrong_value("tls.alpn_protocols", what, item)
        names.append(name)
    return tuple(names)


def _check_sni(value: object) -> dict[str, TLS | ssl.SSLContext]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise wrong_type("tls.sni", "a mapping of host names to TLS options", value)
    table: dict[str, TLS | ssl.SSLContext] = {}
    for host, options in value.items():
        if not isinstance(host, str):
            raise wrong_type("tls.sni", "a mapping whose keys are host names as str", host)
        if "*" in check_hostname("tls.sni", host.removeprefix("*.")):
            raise wrong_value("tls.sni", "a mapping of names, some with '*.' in front", host)
        key = _plain_name(host)
        if key in table:
            raise ValueError(f"tls.sni: must have {host!r} once only")
        name = f"tls.sni[{host!r}]"
        if not isinstance(options, ssl.SSLContext):
            options = _as_tls(name, options)
            if options.sni or options.sni_callback:
                # OpenSSL asks once: what is in there would never be looked at.
                raise ValueError(f"{name}: must be without sni and sni_callback of its own")
        table[key] = options
    return table


def _plain_name(host: str) -> str:
    """A host name as clients send it: RFC 6066 section 3, ASCII and without a final dot."""
    return host.encode("idna").decode("ascii").lower().removesuffix(".")


# ── The contexts ───────────────────────────────────────────────────────────────────────────────


def _server_context(name: str, tls: TLS, outer: _Outer | None = None) -> ssl.SSLContext:
    """A server's context; with ``outer``, one to switch to from a handshake that began there."""
    if not tls.cert and not tls.key and (outer is not None or not (tls.sni or tls.sni_callback)):
        raise ValueError(f"{name}: must have cert and key on a server")
    context = _new_context(name, tls, ssl.PROTOCOL_TLS_SERVER)
    if tls.request_cert:
        context.verify_mode = ssl.CERT_REQUIRED if tls.reject_unauthorized else ssl.CERT_OPTIONAL
    ca = tls.ca
    if outer is None:
        verifies = tls.request_cert
        context.sni_callback = _ServerNames(name, tls, context)
    else:
        if context.verify_mode > outer.verify_mode:
            raise ValueError(f"{name}.request_cert: must not ask for more than tls.request_cert")
        # What is asked for is asked outside; getpeercert() looks here whether it was verified.
        context.verify_mode = outer.verify_mode
        verifies = outer.verify_mode != ssl.CERT_NONE
        ca = ca or outer.ca
    if ca or verifies:
        _trust(context, name, ca, ssl.Purpose.CLIENT_AUTH)
    return context


def _new_context(name: str, tls: TLS, protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    # A renegotiation would have to read in the middle of a write, and it is a way to exhaust a
    # server (CVE-2011-1473). TLS 1.3 has none.
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.minimum_version = _VERSIONS[tls.min_version]
    if tls.ciphers is not None:  # before certificates: it can set the security level for them
        try:
            context.set_ciphers(tls.ciphers)
        except (ssl.SSLError, ValueError) as error:
            what = f"must select a cipher, not {tls.ciphers!r}"
            raise _refused(f"{name}.ciphers", what, error) from error
    if tls.alpn_protocols:
        context.set_alpn_protocols(cast("Sequence[str]", tls.alpn_protocols))
    _load_pairs(context, name, tls)
    # The stdlib's contexts do it too: with the keys, tools can show what is inside the TLS.
    keylog = os.environ.get("SSLKEYLOGFILE")
    if keylog and not sys.flags.ignore_environment:
        context.keylog_filename = keylog
    return context


def _trust(context: ssl.SSLContext, name: str, ca: object, purpose: ssl.Purpose) -> None:
    if not ca:
        context.load_default_certs(purpose)
    for item, source in _numbered(f"{name}.ca", cast(_Sources, ca)):
        _load_certificates(context, item, _contents(item, source))


def _load_certificates(context: ssl.SSLContext, name: str, contents: bytes) -> None:
    """Trust all certificates in these contents; refuse contents with none, or with half a one."""
    blocks = [match[0] for match in _CERTIFICATE.finditer(contents)]
    if not blocks or len(blocks) != len(_CERTIFICATE_BEGIN.findall(contents)):
        raise _refused(name, "is no PEM certificate, or not a complete one")
    try:
        context.load_verify_locations(cadata=b"\n".join(blocks).decode("ascii", "replace"))
    except ssl.SSLError as error:
        raise _refused(name, f"is no valid certificate{_why(error)}", error) from error


def _load_pairs(context: ssl.SSLContext, name: str, tls: TLS) -> None:
    keys, certs = cast(_Sources, tls.key), cast(_Sources, tls.cert)
    if keys and not certs:
        raise ValueError(f"{name}.cert: must be given with key")
    if keys and len(keys) != len(certs):
        raise ValueError(
            f"{name}.key: must be as many as cert has ({len(certs)}), not {len(keys)}; "
            f"the certificates of one chain are one item"
        )
    for i, (cert_name, source) in enumerate(_numbered(f"{name}.cert", certs)):
        chain = _contents(cert_name, source)
        # Into a context of no use, because the error of load_cert_chain does not tell which of
        # the two files was wrong.
        _load_certificates(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), cert_name, chain)
        key_name = f"{name}.key" + cert_name.removeprefix(f"{name}.cert")
        if keys:
            key = _contents(key_name, keys[i])
            if not _PRIVATE_KEY_BEGIN.search(key):
                raise _refused(key_name, "is no PEM private key")
        elif _PRIVATE_KEY_BEGIN.search(chain):
            key = chain
        else:
            raise ValueError(f"{key_name}: must be given with cert, which has no private key in it")
        _load_pair(context, name, (cert_name, chain), (key_name, key), tls.passphrase)


def _load_pair(
    context: ssl.SSLContext,
    name: str,
    cert: tuple[str, bytes],
    key: tuple[str, bytes],
    passphrase: Passphrase | Callable[[], Passphrase] | None,
) -> None:
    cert_name, key_name = cert[0], key[0]
    asked: bool | None = False  # None: in the middle of it

    # Always given: without one OpenSSL asks on the terminal.
    def password() -> bytes:
        nonlocal asked
        asked = None
        if passphrase is None:
            raise _refused(f"{name}.passphrase", f"must be given, {key_name} is encrypted")
        secret = _check_passphrase(passphrase() if callable(passphrase) else passphrase)
        if not secret:
            raise _refused(f"{name}.passphrase", f"must not be empty, {key_name} is encrypted")
        asked = True
        return secret

    with _file_of(cert[1]) as cert_path, _file_of(key[1]) as key_path:
        try:
            context.load_cert_chain(cert_path, key_path, password)
        except ssl.SSLError as error:
            if asked is None:
                raise  # by the function above, not by OpenSSL
            if error.reason in _MISMATCH:
                raise _refused(key_name, f"does not fit {cert_name}", error) from error
            if error.reason in _WEAK:
                what = f"is too weak for OpenSSL's security level{_why(error)}"
                raise _refused(cert_name, what, error) from error
            if asked:
                # Padding that is right by chance makes it an error of the key's contents.
                what = f"does not decrypt {key_name}"
                raise _refused(f"{name}.passphrase", what, error) from error
            raise _refused(key_name, f"is no valid private key{_why(error)}", error) from error


@contextlib.contextmanager
def _file_of(contents: bytes) -> Iterator[str]:
    """A path that reads as these contents during the block: OpenSSL takes keys from files only."""
    memfd_create = getattr(os, "memfd_create", None)
    if memfd_create is not None and os.path.isdir("/proc/self/fd"):
        with open(memfd_create("uvsock"), "wb", buffering=0) as memory:
            view = memoryview(contents)
            while view:
                view = view[memory.write(view) :]
            yield f"/proc/self/fd/{memory.fileno()}"
        return
    import tempfile  # here: above, each `import uvsock` pays for what only this system needs

    with tempfile.NamedTemporaryFile(prefix="uvsock-") as file:  # mode 0600
        file.write(contents)
        file.flush()
        yield file.name


def _contents(name: str, source: bytes | os.PathLike[str]) -> bytes:
    """PEM contents of an option."""
    if isinstance(source, bytes):
        if b"-----BEGIN " not in source:
            # Not shown: it may be a key without its frame.
            raise _refused(
                name,
                "must be PEM contents, with '-----BEGIN' in them (for a file use pathlib.Path), "
                f"not these {len(source)} bytes",
            )
        return source
    path = os.fspath(source)
    try:
        # O_NONBLOCK: opening a FIFO would wait for a writer, and the loop with it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _cannot_read(name, error, path) from error
    except ValueError as error:
        raise wrong_value(name, "a path without null bytes", path) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise wrong_value(name, "a regular file", path)
        with open(descriptor, "rb", closefd=False) as file:
            contents = file.read()
    finally:
        os.close(descriptor)
    if b"-----BEGIN " not in contents:
        raise _refused(name, f"must be a PEM file, with '-----BEGIN' in it, not {path!r}")
    return contents


def _numbered(name: str, items: _Sources) -> list[tuple[str, bytes | os.PathLike[str]]]:
    """Each with its name in errors: ``tls.cert``, or ``tls.cert[0]`` if there are several."""
    if len(items) == 1:
        return [(name, items[0])]
    return [(f"{name}[{i}]", item) for i, item in enumerate(items)]


def _why(error: ssl.SSLError) -> str:
    """OpenSSL's reason, to be appended. Without one its text only names a part of OpenSSL."""
    reason = getattr(error, "reason", None)
    return f": {reason.replace('_', ' ').lower()}" if reason else ""


def _refused(name: str, what: str, cause: Exception | None = None) -> TLSOptionError:
    error = TLSOptionError(ssl.SSL_ERROR_SSL, f"{name}: {what}")
    for attribute in ("library", "reason"):  # which not every SSLError has
        setattr(error, attribute, getattr(cause, attribute, None))
    return error


def _cannot_read(name: str, error: OSError, path: str | None) -> OSError:
    """The same error, of the same class, with the option's name in its text."""
    return OSError(error.errno, f"{name}: {error.strerror}", path)


# ── Server names ───────────────────────────────────────────────────────────────────────────────


class _Outer:
    """What a context that a handshake began with decides, whatever it goes on with."""

    __slots__ = ("ca", "minimum_version", "verify_mode")

    def __init__(self, tls: TLS, context: ssl.SSLContext) -> None:
        self.ca = tls.ca
        self.verify_mode = context.verify_mode
        self.minimum_version = context.minimum_version

    def admit(self, name: str, options: TLS | ssl.SSLContext) -> ssl.SSLContext:
        """The context of options for a name; ValueError for those that would have no effect.

        OpenSSL has taken these from the first context by the time it tells the name, so a stricter
        setting here would be one that is not kept.
        """
        if isinstance(options, ssl.SSLContext):
            context = _check_context(name, options, ssl.PROTOCOL_TLS_SERVER)
            if context.verify_mode != self.verify_mode:
                raise ValueError(
                    f"{name}: must be a context whose verify_mode is {self.verify_mode.name}, as "
                    f"the options outside decide, not {context.verify_mode.name}"
                )
        else:
            context = _server_context(name, options, self)
        if context.minimum_version > self.minimum_version:
            raise ValueError(f"{name}.min_version: must not be above tls.min_version")
        return context


class _ServerNames:
    """The ``sni_callback`` of a server's context: notes the name and chooses the context."""

    __slots__ = ("_built", "_callback", "_outer", "_table")

    def __init__(self, name: str, tls: TLS, context: ssl.SSLContext) -> None:
        sni = cast("dict[str, TLS | ssl.SSLContext]", tls.sni)
        self._outer = _Outer(tls, context)
        self._table = {
            host: self._outer.admit(f"{name}.sni[{host!r}]", options)
            for host, options in sni.items()
        }
        self._callback = tls.sni_callback
        # A callback that always returns the same TLS does not make a context for each connection.
        # By id(), because another that is equal reads its files anew.
        self._built: dict[int, ssl.SSLContext] = {}

    def __call__(self, sslobj: Any, server_name: str | None, context: ssl.SSLContext) -> int | None:
        sslobj._uvsock_server_name = server_name
        try:
            found = self._find(server_name)
            if found is None and self._callback is not None:
                result = self._callback(sslobj, server_name, context)
                if isinstance(result, int) and not isinstance(result, bool):
                    return check_int("tls.sni_callback", result, 0, 255)
                found = self._context_of(result)
            if found is not None:
                sslobj.context = found
        except BaseException as error:
            # From here it could only be printed; the socket hands it on.
            sslobj._uvsock_error = error
            return int(ssl.ALERT_DESCRIPTION_INTERNAL_ERROR)
        return None

    def _find(self, server_name: str | None) -> ssl.SSLContext | None:
        if server_name is None or not self._table:
            return None
        host = server_name.lower().removesuffix(".")
        return self._table.get(host) or self._table.get(f"*.{host.partition('.')[2]}")

    def _context_of(self, result: object) -> ssl.SSLContext | None:
        name = "tls.sni_callback"
        if result is None:
            return None
        if isinstance(result, ssl.SSLContext):
            return self._outer.admit(name, result)
        if not isinstance(result, TLS):
            what = "a function that returns a TLS, an ssl.SSLContext, an alert or None"
            raise wrong_type(name, what, result)
        found = self._built.get(id(result))
        if found is None:
            found = self._built[id(result)] = self._outer.admit(name, result)
            weakref.finalize(result, self._built.pop, id(result)).atexit = False
        return found
