"""Both servers over HTTPS, with a certificate that openssl made for them."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from dovetail.errors import ConfigError
from dovetail.model.save import save_model
from dovetail.serving.http.listening import Certificate, listen
from tests.fakes import byte_tokenizer, tiny_model

pytestmark = pytest.mark.system

SCRIPT = "import sys; from dovetail.cli.main import main; main(sys.argv[1:])"


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cert.pem and key.pem, two of each, in a folder."""
    openssl = shutil.which("openssl")
    assert openssl, "no openssl: make test-system installs it"
    folder = tmp_path_factory.mktemp("pems")
    for name in ("", "other-"):
        files = ["-keyout", str(folder / f"{name}key.pem"), "-out", str(folder / f"{name}cert.pem")]
        kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        subject = ["-subj", "/CN=dovetail test", "-addext", "subjectAltName=IP:127.0.0.1"]
        subprocess.run([openssl, "req", "-x509", *kind, *files, *subject], check=True, capture_output=True)
    return folder


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command of ours, until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line_with(process: subprocess.Popen[str], words: str) -> str:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if words in line:
            return line
    raise AssertionError("".join(seen))


def test_the_model_server_speaks_https_alone(pems: Path, tmp_path: Path) -> None:
    save_model(tiny_model(), byte_tokenizer(), tmp_path / "tiny")
    flags = ["--tls-certificate", str(pems / "cert.pem"), "--tls-key", str(pems / "key.pem")]
    with running("serve", str(tmp_path / "tiny"), "--port", "0", "--device", "cpu", *flags) as process:
        url = line_with(process, "listening on https://").split("listening on ")[1].split()[0]
        trusted = ssl.create_default_context(cafile=str(pems / "cert.pem"))
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        with httpx.Client(verify=trusted, timeout=60) as client:
            assert client.post(f"{url}/v1/chat/completions", json=body).status_code == 200
        with (
            httpx.Client() as distrustful,
            pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"),
        ):
            distrustful.get(f"{url}/health")
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"{url.replace('https', 'http')}/health")


def test_the_labelling_server_s_cookie_is_for_https_alone(pems: Path, tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes((pems / "cert.pem").read_bytes() + (pems / "key.pem").read_bytes())
    store = f"sqlite:///{tmp_path / 'labels.db'}"
    with running("label", "--store", store, "--port", "0", "--tls-certificate", str(both)) as process:
        link = line_with(process, "admin: https://").split()[1]
        url, _, token = link.partition("/label/#token=")
        trusted = ssl.create_default_context(cafile=str(pems / "cert.pem"))
        with httpx.Client(verify=trusted, timeout=60) as client:
            cookie = client.post(f"{url}/label/api/login", json={"token": token}).headers["set-cookie"]
            assert "Secure" in cookie
            assert client.get(f"{url}/label/api/me").json()["name"] == "admin"


def test_a_key_of_another_certificate_is_refused_at_once(pems: Path) -> None:
    mixed = Certificate(pems / "cert.pem", pems / "other-key.pem")
    with (
        pytest.raises(ConfigError, match=r"--tls-key .*other-key\.pem cannot be used"),
        listen("127.0.0.1", 0, mixed),
    ):
        raise AssertionError
    openssl = ["openssl", "pkey", "-in", str(pems / "key.pem"), "-aes256", "-passout", "pass:x"]
    locked = pems / "locked.pem"
    locked.write_bytes(subprocess.run(openssl, check=True, capture_output=True).stdout)
    wrong = pytest.raises(ConfigError, match="locked with a passphrase")
    with wrong, listen("127.0.0.1", 0, Certificate(pems / "cert.pem", locked)):
        raise AssertionError
