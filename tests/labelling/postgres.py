"""A PostgreSQL server of the tests' own, without a network port."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _program(name: str) -> str:
    """On the path, or where Debian keeps it."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
    found = shutil.which(name) or next(map(str, places), None)
    assert found is not None, f"{name} is not installed: apt-get install postgresql"
    return found


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of a running server, up to the database's name; `{}` stands for that."""
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # a socket's path may have 107 bytes: tmp_path is too deep
    owner = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}  # it refuses to run as root
    if owner:
        shutil.chown(folder, **owner)

    def run(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True, cwd=folder, **owner)

    data = str(folder / "data")
    control = _program("pg_ctl")
    try:
        run(_program("initdb"), "-D", data, "-U", "tests", "-A", "trust", "-E", "UTF8", "--locale=C")
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c max_connections=100"
        run(control, "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "start")
        try:
            yield f"postgresql://tests@/{{}}?host={folder}"
        finally:
            run(control, "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)
