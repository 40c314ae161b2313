"""Run a program against tests in a process of its own that can be ended.

Responsible for: one process for each program, with an own empty folder, an empty environment and a time limit.
Not responsible for: the limits inside the process and what they do not protect from (code_child.py).
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

SECONDS = 10
"""The time limit of a program with all its tests."""

_CHILD = Path(__file__).with_name("code_child.py")


def passes_tests(code: str, tests: Sequence[str], *, seconds: int = SECONDS) -> bool:
    """Return whether the program runs, and every test after it, within the limits.

    tests: Python code, such as assertions, that sees the names of the program.
    """
    word = secrets.token_hex(16)
    orders = _block({"code": code, "seconds": seconds}) + _block({"tests": list(tests), "word": word})
    with tempfile.TemporaryDirectory(prefix="dovetail-") as folder, _started(folder) as process:
        timer = threading.Timer(seconds, _end, [process.pid])
        timer.start()
        try:
            return _answer(process, orders, len(word)) == word.encode()
        finally:
            timer.cancel()
            timer.join()
            _end(process.pid)


def _started(folder: str) -> "subprocess.Popen[bytes]":
    """Start the process: no environment (-I), no packages (-S), nothing of the current folder."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(_CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={"LANG": "C.UTF-8", "HOME": folder},
        start_new_session=True,
    )


def _answer(process: "subprocess.Popen[bytes]", orders: bytes, size: int) -> bytes:
    """Send the orders and return what the process reports, at most a byte more than is expected."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(OSError):  # it ended before it had read them
        process.stdin.write(orders)
        process.stdin.flush()
    return process.stdout.read(size + 1)


def _end(process_id: int) -> None:
    """End the process with all that belong to its group. It is not yet waited for, so the id is still its own."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process_id, signal.SIGKILL)


def _block(content: object) -> bytes:
    encoded = json.dumps(content).encode()
    return len(encoded).to_bytes(8, "big") + encoded
