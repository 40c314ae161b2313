"""Addresses and certificates: what cannot be used is said before anything slow begins."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from dovetail.errors import ConfigError
from dovetail.serving.http.listening import Certificate, certificate_of, listen


def test_port_0_is_a_free_one_and_the_url_leads_there() -> None:
    with listen("127.0.0.1", 0) as listening:
        host, port = listening.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))):
            assert host == "127.0.0.1"


@pytest.mark.parametrize(("host", "shown"), [("0.0.0.0", "http://127.0.0.1:"), ("::1", "http://[::1]:")])
def test_the_url_is_one_that_a_browser_can_open(host: str, shown: str) -> None:
    with listen(host, 0) as listening:
        assert listening.url.startswith(shown)


def test_an_address_that_cannot_be_had_is_explained() -> None:
    with listen("127.0.0.1", 0) as listening:
        port = listening.socket.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}") as caught,
            listen("127.0.0.1", port),
        ):
            raise AssertionError
    assert "choose another --port" in str(caught.value.hint)


def test_a_certificate_that_cannot_be_used_is_explained(tmp_path: Path) -> None:
    (tmp_path / "text.pem").write_text("no certificate")
    for name in ("none.pem", "text.pem"):
        certificate = Certificate(tmp_path / name)
        wrong = pytest.raises(ConfigError, match=f"--tls-certificate .*{name} cannot be used")
        with wrong, listen("127.0.0.1", 0, certificate):
            raise AssertionError


def test_a_key_needs_its_certificate() -> None:
    assert certificate_of(None, None) is None
    assert certificate_of(Path("a"), Path("b")) == Certificate(Path("a"), Path("b"))
    with pytest.raises(ConfigError, match="--tls-key b has no certificate") as caught:
        certificate_of(None, Path("b"))
    assert "--tls-certificate" in str(caught.value.hint)
