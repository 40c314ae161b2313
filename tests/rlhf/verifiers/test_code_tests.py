"""Programs against tests: verdicts, limits, and the ways out that programs try."""

import os
import socket
from pathlib import Path

import pytest

from dovetail.rlhf.verifiers.code_tests import passes_tests

SQUARE = "def f(x):\n    return x * x\n"
TESTS = ["assert f(2) == 4", "assert f(-3) == 9"]


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        (SQUARE, True),
        ("f = lambda x: x ** 2", True),
        ("def f(x):\n    return 4\n", False),  # passes the first test alone
        ("def g(x):\n    return x * x\n", False),
        ("def f(x) return x", False),
        ("", False),
        (f"print('x' * 10**6)\n{SQUARE}", True),
        (f"{SQUARE}if __name__ == '__main__':\n    f(input())\n", True),
    ],
)
def test_a_program_passes_if_every_test_does(code: str, verdict: bool) -> None:
    assert passes_tests(code, TESTS) is verdict


def test_a_program_may_use_the_standard_library_and_its_own_folder() -> None:
    code = """
import bisect, collections, dataclasses, datetime, decimal, enum, fractions, functools, heapq, itertools, json, math
import operator, random, re, statistics, string, typing, unicodedata, zlib
Point = collections.namedtuple("Point", "x y")
class Colour(enum.Enum):
    RED = 1
@dataclasses.dataclass
class Pair:
    a: int = 1
Names = typing.NamedTuple("Names", [("a", int)])
with open("note", "w") as note:
    note.write("9")
def f(x):
    return x * x if open("note").read() == "9" else None
"""
    assert passes_tests(code, TESTS)


STANDARD = """
abc argparse array ast base64 bisect calendar cmath collections concurrent.futures contextlib copy csv
dataclasses datetime decimal difflib enum fractions functools graphlib hashlib heapq html inspect io
itertools json linecache logging math numbers operator pathlib pickle pprint queue random re secrets shlex
statistics string struct tempfile textwrap threading time timeit tokenize traceback types typing unicodedata
unittest uuid warnings weakref xml.etree.ElementTree zlib zoneinfo
""".split()  # noqa: SIM905


def test_modules_that_reach_for_nothing_can_be_imported() -> None:
    imports = "".join(f"import {module}\n" for module in STANDARD)
    assert passes_tests(f"{imports}{SQUARE}", TESTS)


WAYS_OUT = {
    "ends well before the tests": "import os; os._exit(0)",
    "exits": "raise SystemExit(0)",
    "loops": "while True: pass",
    "sleeps": "import time; time.sleep(60)",
    "takes memory": "x = bytearray(3 << 30)",
    "opens many files": "files = [open(str(i), 'w') for i in range(100)]",
    "fills the disk": "import os\nwith open('x', 'wb') as x:\n    for _ in range(40): x.write(bytes(1 << 20))",
    "forks": "import os; os.fork()",
    "forks without end": "import os\nwhile True: os.fork()",
    "starts a process": "import subprocess; subprocess.run(['true'])",
    "starts one below subprocess": "import _posixsubprocess",
    "spawns": "import os; os.posix_spawn('/bin/true', ['true'], {})",
    "becomes another": "import os; os.execv('/bin/true', ['true'])",
    "calls a shell": "import os; os.system('true')",
    "uses multiprocessing": "import multiprocessing; multiprocessing.Process(target=print).start()",
    "kills its parent": "import os; os.kill(os.getppid(), 9)",
    "opens a socket": "import socket; socket.socket()",
    "opens a socket below socket": "import _socket; _socket.socket()",
    "opens a page": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
    "makes a database": "import sqlite3; sqlite3.connect('/tmp/x.db')",
    "opens a file in C": "import _dbm; _dbm.open('/tmp/x', 'c')",
    "writes a log in C": "import syslog; syslog.syslog('x')",
    "starts an interpreter without the hook": "import _xxsubinterpreters",
    "loads a compiled module by its file": (
        "import _imp, importlib.util as u; _imp.create_dynamic(u.find_spec('_ctypes'))"
    ),
    "sends a signal by descriptor": "import os, signal; signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)",
    "makes a pipe with a name": "import os; os.mkfifo('/tmp/x')",
    "loads libc": "import ctypes; ctypes.CDLL(None).system(b'true')",
    "reads a file": "open('/etc/passwd').read()",
    "reads a file below open": "import os; os.open('/etc/passwd', os.O_RDONLY)",
    "reads upwards": "open('../../etc/passwd').read()",
    "reads upwards from Python's own folder": "import os; open(os.__file__ + '/../../../../../../etc/passwd')",
    "reads its parent": "import os; open(f'/proc/{os.getppid()}/environ').read()",
    "lists a folder": "import os; os.listdir('/')",
    "reads a secret": "import os; os.environ['REWARD_TEST_SECRET']",
    "removes a file": "import os; os.remove('/etc/passwd')",
    "leaves its folder": "import os; os.chdir('/')",
    "links out": "import os; os.symlink('/etc', 'etc')",
    "raises its limits": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
    "walks the frames": "import sys; sys._getframe(1).f_globals",
    "walks the frames of an error": "try:\n    1 / 0\nexcept Exception as e:\n    e.__traceback__.tb_frame.f_back",
    "walks the frames of a generator": "g = (i for i in [1]); g.gi_frame.f_back",
    "walks all objects": "import gc; gc.get_objects()",
    "traces": "import sys; sys.settrace(print)",
    "reaches for the runner": "import __main__; __main__.guard_of",
    "replaces what the runner uses": "import builtins; builtins.isinstance = lambda *a: True; open('/etc/passwd')",
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_ways_out_lead_nowhere(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TEST_SECRET", "x")
    assert passes_tests(f"{SQUARE}{WAYS_OUT[way]}\n", TESTS, seconds=1) is False


ENDED = {
    "ends well before the tests",
    "loops",
    "sleeps",
    "forks without end",
    "replaces what the runner uses",
}
"""Ways that no refusal can be caught on."""


@pytest.mark.parametrize("way", sorted(WAYS_OUT.keys() - ENDED))
def test_a_refusal_that_is_caught_leaves_an_honest_verdict(way: str) -> None:
    """The program goes on where it can be refused without ending it; nothing that it tried has happened."""
    caught = "".join(f"    {line}\n" for line in WAYS_OUT[way].splitlines())
    code = f"try:\n{caught}except BaseException:\n    pass\n{SQUARE}"
    assert passes_tests(code, TESTS, seconds=2)


def test_nothing_is_written_outside(tmp_path: Path) -> None:
    target = tmp_path / "escaped"
    for act in (
        f"open({str(target)!r}, 'w').write('x')",
        f"import os; os.mkdir({str(target)!r})",
        f"import os; os.close(os.open({str(target)!r}, os.O_CREAT | os.O_WRONLY))",
        f"import pathlib; pathlib.Path({str(target)!r}).write_text('x')",
        f"import os; open('x', 'w').close(); os.rename('x', {str(target)!r})",
        f"import os; os.mkfifo({str(target)!r})",
    ):
        passes_tests(f"{SQUARE}{act}\n", TESTS)
    assert list(tmp_path.iterdir()) == []


def test_no_connection_arrives() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        for act in (
            f"import socket; socket.create_connection(('127.0.0.1', {port}))",
            f"import http.client; http.client.HTTPConnection('127.0.0.1', {port}).request('GET', '/')",
            f"import asyncio; asyncio.run(asyncio.open_connection('127.0.0.1', {port}))",
        ):
            assert not passes_tests(f"{SQUARE}{act}\n", TESTS)
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize(
    "act",
    [
        "print('passed'); raise SystemExit",
        "import sys; sys.stdout.write('a' * 32); sys.stdout.flush(); raise SystemExit",
        "import os\nfor n in range(20):\n    try: os.write(n, b'a' * 32)\n    except OSError: pass\nos._exit(0)",
        "import os\nfor n in range(20):\n    try: os.close(n)\n    except OSError: pass",
        "import builtins; builtins.exec = lambda *a: None; builtins.compile = lambda *a: None; raise KeyboardInterrupt",
    ],
)
def test_a_program_cannot_print_its_verdict(act: str) -> None:
    assert passes_tests(f"def f(x): return 0\n{act}\n", TESTS, seconds=2) is False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_no_process_is_left_behind() -> None:
    before = set(_children())
    passes_tests("import time; time.sleep(60)", [], seconds=1)
    passes_tests("import os; os._exit(3)", [])
    assert set(_children()) <= before


def _children() -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == os.getpid():
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return found


def test_deep_recursion_and_strange_text_end_in_a_verdict() -> None:
    assert not passes_tests("def f(x): return f(x)", TESTS)
    assert not passes_tests("\x00", TESTS)
    assert not passes_tests("(" * 100_000, TESTS)
    assert passes_tests(f"# {chr(0x1F600)} {'x' * 300_000}\n{SQUARE}", TESTS)
