"""A real `dovetail label` in a process of its own, and people who use it over HTTP."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

_COMMAND = "from dovetail.cli.main import main; main()"


@dataclass(frozen=True, slots=True)
class Served:
    """A running server."""

    process: "subprocess.Popen[str]"
    base: str
    """http://127.0.0.1:PORT"""
    tokens: dict[str, str]
    """Of the admin and of everybody invited."""

    def kill(self) -> None:
        """As the system does when memory runs out: nothing is flushed, nothing cleaned up."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @contextmanager
    def client(self, name: str) -> Iterator[httpx.Client]:
        """A browser of somebody, logged in."""
        with httpx.Client(base_url=f"{self.base}/label/api/", timeout=60) as client:
            client.post("login", json={"token": self.tokens[name]}).raise_for_status()
            client.headers["X-Dovetail-Token"] = client.get("me").json()["write_token"]
            yield client


@contextmanager
def served(url: str, names: Sequence[str], *more: str) -> Iterator[Served]:
    """`dovetail label` over a database, at a free port, until the block ends."""
    invitations = [argument for name in names for argument in ("--invite", name)]
    arguments = ["label", *more, "--store", url, "--port", "0", "--project", "test", *invitations]
    process = subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        links = dict(process.stdout.readline().strip().split(": ", 1) for _ in (*names, "admin"))
        base = urlsplit(links["admin"])
        tokens = {name: link.partition("token=")[2] for name, link in links.items()}
        yield Served(process, f"{base.scheme}://{base.netloc}", tokens)
    finally:
        process.terminate()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def a_label(task: dict[str, Any], note: str) -> dict[str, Any]:
    """What somebody says who takes the first answer."""
    return {
        "assignment_id": task["assignment_id"],
        "verdict": "answer",
        "chosen": 0,
        "seconds": 1,
        "note": note,
    }
