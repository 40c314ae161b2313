"""Listen at an address, plain or with TLS.

Responsible for: opening the socket, checking the certificate before anything slow begins, and the URL that people open.
Not responsible for: the answers (serving/, serving/labelling/), the names that are answered to (host_names.py).
"""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from dovetail.errors import ConfigError
from dovetail.serving.http.connections import PatientProtocol, is_worth_telling


@dataclass(frozen=True, slots=True)
class Certificate:
    """The PEM files with which a server proves who it is."""

    chain: Path
    """The certificate, and the certificates that signed it."""
    key: Path | None = None
    """Its private key; None if it is in the file of the chain."""


@dataclass(frozen=True, slots=True)
class Listening:
    """An open socket."""

    socket: socket.socket
    certificate: Certificate | None

    @property
    def url(self) -> str:
        """The URL at which a browser of this machine finds it."""
        host, port = self.socket.getsockname()[:2]
        named = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        scheme = "https" if self.certificate else "http"
        return f"{scheme}://[{named}]:{port}" if ":" in named else f"{scheme}://{named}:{port}"

    def config(self, app: Any, **options: Any) -> uvicorn.Config:
        """Make uvicorn's settings for an application behind this socket."""
        if self.certificate is not None:
            options |= {"ssl_certfile": self.certificate.chain, "ssl_keyfile": self.certificate.key}
        return server_config(app, **options)


def server_config(app: Any, **options: Any) -> uvicorn.Config:
    """Make the settings that both servers give uvicorn."""
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        **options,
    )
    logging.getLogger("uvicorn.error").addFilter(is_worth_telling)
    return config


@contextmanager
def listen(host: str, port: int, certificate: Certificate | None = None) -> Iterator[Listening]:
    """Listen until the block ends; port 0 takes a free one.

    Raises ConfigError if the address cannot be had or the certificate cannot be used.
    """
    if certificate is not None:
        _expect_usable(certificate)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        opened = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}",
            hint="choose another --port or --host, or stop the program that listens there",
        ) from error
    with opened:
        yield Listening(opened, certificate)


def certificate_of(chain: Path | None, key: Path | None) -> Certificate | None:
    """Make a Certificate from two flags; None if neither is set. Raises ConfigError for a key without a certificate."""
    if chain is None:
        if key is not None:
            raise ConfigError(
                f"--tls-key {key} has no certificate", hint="give the certificate too: --tls-certificate FILE"
            )
        return None
    return Certificate(chain, key)


def _expect_usable(certificate: Certificate) -> None:
    shown = f"--tls-certificate {certificate.chain}"
    if certificate.key is not None:
        shown += f" with --tls-key {certificate.key}"

    def refuse_to_ask() -> str:
        raise ConfigError(
            f"{shown}: the key is locked with a passphrase",
            hint="give a key without one: openssl pkey -in KEY -out PLAIN",
        )

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate.chain, certificate.key, password=refuse_to_ask)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"{shown} cannot be used: {error.strerror or error}",
            hint="give PEM files: the certificate, the certificates that signed it, and its key",
        ) from error
