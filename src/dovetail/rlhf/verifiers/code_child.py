"""Run a program and its tests inside a process that has given up most of its rights.

Responsible for: limits on time, memory, open files and the size of files, and the refusal of everything that reaches
beyond the process and its own folder. Run as a script by code_tests.py, with the standard library alone.
Not responsible for: starting and ending the process (code_tests.py). The refusals are an audit hook of Python: they
stop programs that are careless or try the usual ways out, and are no wall against one that attacks the interpreter.
"""

import itertools
import json
import os
import posix
import resource
import signal
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

MEMORY_BYTES = 1 << 30
FILE_BYTES = 16 << 20
OPEN_FILES = 32

COMPILED_MODULES = frozenset([
    "_abc", "_ast", "_bisect", "_blake2", "_bz2", "_codecs", "_collections", "_contextvars", "_csv", "_datetime",
    "_decimal", "_elementtree", "_functools", "_hashlib", "_heapq", "_imp", "_io", "_json", "_locale", "_lzma", "_md5",
    "_opcode", "_operator", "_pickle", "_queue", "_random", "_sha1", "_sha2", "_sha256", "_sha3", "_sha512", "_signal",
    "_sre", "_stat", "_statistics", "_string", "_struct", "_suggestions", "_symtable", "_thread", "_tokenize",
    "_tracemalloc", "_typing", "_warnings", "_weakref", "_zoneinfo", "array", "atexit", "audioop", "binascii",
    "builtins", "cmath", "errno", "gc", "itertools", "marshal", "math", "posix", "pyexpat", "select", "sys", "time",
    "unicodedata", "zlib",
])  # fmt: skip
"""The modules in C that a program may load: none that opens files, sockets, processes or libraries by itself."""
REFUSED_EVENTS = frozenset([
    "code.__new__", "gc.get_objects", "gc.get_referents", "gc.get_referrers", "os.chdir", "os.chflags", "os.chmod",
    "os.chown", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.link", "os.mkdir", "os.remove", "os.removexattr",
    "os.rename", "os.rmdir", "os.setxattr", "os.symlink", "os.system", "os.truncate", "os.utime", "pty.spawn",
    "resource.prlimit", "resource.setrlimit", "signal.pthread_kill", "sys._current_exceptions", "sys._current_frames",
    "sys._getframe", "sys.addaudithook", "sys.setprofile", "sys.settrace",
])  # fmt: skip
REFUSED_FAMILIES = ("ctypes.", "os.exec", "os.posix_spawn", "os.spawn", "socket.", "subprocess.")
REMOVED_FUNCTIONS = ("mkfifo", "mknod", "pidfd_open", "pidfd_send_signal", "setpriority")
"""Functions that reach beyond the process and tell no audit hook of it."""
FRAMES = frozenset(["tb_frame", "gi_frame", "cr_frame", "ag_frame"])
"""Attributes that lead to the frames below the program, and with them to this module."""


class Refused(PermissionError, ValueError):
    """The error of a refused act; a ValueError too, which the standard library expects where frames are hidden."""


def limit_resources(seconds: int) -> None:
    """Set the limits that the system itself enforces; none of them can be raised again."""
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_NPROC, 0),  # not enforced for root, which the audit hook covers
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    signal.alarm(seconds + 1)  # ends a program that sleeps, even where its parent is gone


Guard = Callable[[str, tuple[Any, ...]], None]


def guard_of(own: str, readable: tuple[str, ...]) -> Guard:
    """Return the audit hook, which refuses what a program asks of Python beyond its own folder.

    All that the hook uses is bound here or in `opening_of`: a program may replace names in modules, and not these.
    """
    events, families, begins, refused, absent = (
        REFUSED_EVENTS, REFUSED_FAMILIES, str.startswith, Refused, ImportError
    )  # fmt: skip
    loadable, compiled, frames = COMPILED_MODULES, frozenset(sys.builtin_module_names), FRAMES
    may_open = opening_of(own, readable)
    judge_of: Callable[[str], Callable[[tuple[Any, ...]], bool] | None] = {
        "open": lambda given: may_open(given[0], given[2]),
        "os.listdir": lambda given: given[0] is None or may_open(given[0], 0),
        "os.scandir": lambda given: given[0] is None or may_open(given[0], 0),
        # A module in C is loaded by its name if it is part of Python, or with the path of its file.
        "import": lambda given: given[0] in loadable or (given[0] not in compiled and given[1] is None),
        "object.__getattr__": lambda given: given[1] not in frames,
    }.get

    def guard(event: str, given: tuple[Any, ...]) -> None:
        judge = judge_of(event)
        allowed = judge(given) if judge is not None else event not in events and not begins(event, families)
        if not allowed:
            # The standard library does without a module that it cannot import, and expects this error.
            raise (absent if event == "import" else refused)(f"{event} is refused here")

    return guard


def opening_of(own: str, readable: tuple[str, ...]) -> Callable[[Any, Any], bool]:
    """Return a function that says whether a path may be opened: to write in the own folder, to read in Python's too."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    kind_of, text, raw, number, split, begins = type, str, bytes, int, str.split, str.startswith
    home, places = f"{own}/", tuple(f"{place}/" for place in readable)

    def may_open(path: Any, flags: Any) -> bool:
        if kind_of(path) is number:
            return True
        name = raw.decode(path, "utf-8", "surrogateescape") if kind_of(path) is raw else path
        if kind_of(name) is not text or ".." in split(name, "/"):
            return False
        whole = f"{name if begins(name, '/') else home + name}/"
        return begins(whole, home) or (not flags & writing and begins(whole, places))

    return may_open


def read_block(descriptor: int) -> bytes:
    """Read one block: its length in eight bytes, then its content."""
    size = int.from_bytes(read_exactly(descriptor, 8), "big")
    return read_exactly(descriptor, size)


def read_exactly(descriptor: int, size: int) -> bytes:
    """Read so many bytes, however they arrive."""
    content = b""
    while len(content) < size:
        part = os.read(descriptor, size - len(content))
        if not part:
            raise EOFError
        content += part
    return content


def main() -> None:
    """Run the program, then its tests; write the word that stands behind the tests once all have passed.

    The word is read after the program ran, so that a program cannot print it instead of passing.
    """
    orders, report, nothing = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    start = json.loads(read_block(orders))
    limit_resources(start["seconds"])
    solution = ModuleType("solution")
    sys.modules["__main__"] = sys.modules["solution"] = solution
    for module, name in itertools.product((os, posix, signal, sys.modules["_signal"]), REMOVED_FUNCTIONS):
        vars(module).pop(name, None)
    readable = tuple({os.path.realpath(place) for place in sys.path} | {place for place in sys.path if place})
    sys.addaudithook(guard_of(os.path.realpath("."), readable))
    exec(compile(start["code"], "solution.py", "exec"), solution.__dict__)
    rest = json.loads(read_block(orders))
    for test in rest["tests"]:
        exec(compile(test, "test.py", "exec"), solution.__dict__)
    os.write(report, rest["word"].encode())


if __name__ == "__main__":
    try:
        main()
    finally:
        os._exit(0)  # without the program's own handlers of the end
