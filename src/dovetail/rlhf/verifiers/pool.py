"""Ask a built-in verifier about many answers at once, in worker processes that can be ended.

Responsible for: a few workers for each batch, a time limit for each answer, and replies that name what went wrong.
Not responsible for: the verifiers (builtin.py), what a failure costs (reward_functions.py).

Mathematics and patterns can keep an interpreter busy for ever, and no thread of it could stop them.
"""

import importlib
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from dovetail.rlhf.verifiers import code_tests
from dovetail.rlhf.verifiers.builtin import NEEDS, VERIFIERS

SECONDS: Mapping[str, float] = {"code": code_tests.SECONDS + 10.0}
"""The time limit of one answer where it is not 5 s; the tests of a program have a smaller one of their own."""
STARTING_SECONDS = 120.0
MEMORY_BYTES = 4 << 30
MOST_WORKERS = 8

Request = tuple[str, Mapping[str, Any]]
"""An answer's text, and the columns of its row that the verifier reads."""


class VerifierError(Exception):
    """A verifier gave no verdict."""


def verdicts(
    name: str, requests: Sequence[Request], *, seconds: float | None = None
) -> list[float | VerifierError]:
    """Return the verdict of a verifier on each request, or why there is none; the workers share the requests."""
    limit = SECONDS.get(name, 5.0) if seconds is None else seconds
    num_workers = min(MOST_WORKERS, os.cpu_count() or 1, len(requests))
    found: list[float | VerifierError] = [VerifierError("was not asked")] * len(requests)
    waiting = iter(enumerate(requests))
    taking = threading.Lock()

    def work(_: int) -> None:
        with _Worker(name, limit) as worker:
            while True:
                with taking:
                    place, request = next(waiting, (-1, None))
                if request is None:
                    return
                found[place] = worker.ask(request)

    with ThreadPoolExecutor(max(1, num_workers)) as threads:
        list(threads.map(work, range(num_workers)))
    return found


class _Worker:
    """One process with one verifier; it is started when it is asked, and again after it had to be ended."""

    def __init__(self, name: str, seconds: float) -> None:
        self._name = name
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def ask(self, request: Request) -> float | VerifierError:
        """Return the verdict, or why there is none within the time limit."""
        if self._process is None:
            self._process = _started(self._name)
            if _line_within(STARTING_SECONDS, self._process) != "ready":
                self._stop()
                return VerifierError("could not be started")
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        reply = _line_within(self._seconds, self._process)
        if not reply:
            self._stop()
            return VerifierError(f"gave no verdict within {self._seconds:g} s, or ended its process")
        verdict = json.loads(reply)
        return VerifierError(verdict) if isinstance(verdict, str) else float(verdict)

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            with self._process:  # closes its pipes and waits for it
                self._process = None


def _started(name: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "dovetail.rlhf.verifiers.pool", name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    )


def _line_within(seconds: float, process: "subprocess.Popen[str]") -> str:
    """Return the next line of the process, which is ended if it takes longer; empty if there is none."""
    assert process.stdout is not None
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    line = process.stdout.readline()
    timer.cancel()
    timer.join()
    return line.strip()


def serve(name: str) -> None:
    """Answer requests from standard input, one a line, with a verdict or the text of an error, one a line."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    soft = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (soft, most))
    verify = VERIFIERS[name]
    for module in NEEDS.get(name, ()):
        importlib.import_module(module)
    _print("ready")
    for line in sys.stdin:
        completion, columns = json.loads(line)
        try:
            reply: float | str = verify(completion, **columns)
        except Exception as error:  # whatever a library makes of the answer
            reply = f"raised {type(error).__name__}: {error}"
        _print(json.dumps(reply))


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
