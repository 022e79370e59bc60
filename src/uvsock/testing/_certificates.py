"""Certificates that exist for one test run."""

from __future__ import annotations

import functools
import ssl
from typing import TYPE_CHECKING

from uvsock._contexts import TLS

if TYPE_CHECKING:
    import trustme


class Certificates:
    """An authority made for the tests, and TLS options for both ends whose certificates it signed.

    Attributes:
        server: for ``listen(tls=)``. Valid for ``localhost``, 127.0.0.1, ::1 and ``hostnames``.
        client: for ``connect(tls=)``. Trusts the authority alone, verifies ``localhost`` whatever
            address is connected to, and has a certificate for a server that asks for one.
        ca: the authority, PEM.
        cert, key: the server's certificate chain and private key, PEM, for programs of others.

    Args:
        hostnames: more names and addresses for the server's certificate.

    Raises:
        ModuleNotFoundError: trustme is not installed.
    """

    def __init__(self, *hostnames: str) -> None:
        try:
            import trustme
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "certificates for tests are made by trustme: pip install 'uvsock[testing]'",
                name=error.name,
            ) from error
        authority = trustme.CA()
        server = authority.issue_cert("localhost", "127.0.0.1", "::1", *hostnames)
        client = authority.issue_cert("client@localhost")
        self.ca: bytes = authority.cert_pem.bytes()
        self.key, self.cert = _pem(server)
        self.server = TLS(key=self.key, cert=self.cert, ca=self.ca)
        key, cert = _pem(client)
        self.client = TLS(key=key, cert=cert, ca=self.ca, server_name="localhost")

    def client_context(self) -> ssl.SSLContext:
        """A context of the standard library that trusts the authority, for clients of others."""
        return ssl.create_default_context(cadata=self.ca.decode())


def _pem(leaf: trustme.LeafCert) -> tuple[bytes, bytes]:
    chain = b"".join(pem.bytes() for pem in leaf.cert_chain_pems)
    return leaf.private_key_pem.bytes(), chain


_made = functools.cache(Certificates)


def default_certificates() -> Certificates:
    """Those of this process, where it does not matter which."""
    return _made()
