"""A PostgreSQL server of the tests' own, without a network port."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil


def _program(name: str) -> str:
    """On the path, or where Debian keeps it."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
    found = shutil.which(name) or next(map(str, places), None)
    assert found is not None, f"{name} is not installed: apt-get install postgresql"
    return found


@dataclass(frozen=True, slots=True)
class Postgres:
    """A running server with all it has in one folder."""

    folder: Path

    def url(self, database: str) -> str:
        """Of one of its databases."""
        return f"postgresql://tests@/{database}?host={self.folder}"

    def initialise(self) -> None:
        """Make the files of a server."""
        self._run(
            _program("initdb"), "-D", self._data, "-U", "tests", "-A", "trust", "-E", "UTF8", "--locale=C"
        )

    def start(self) -> None:
        """Start it, after a crash by way of its log, and wait until it answers."""
        options = f"-c listen_addresses='' -c unix_socket_directories={self.folder} -c max_connections=100"
        log = str(self.folder / "log")
        self._run(_program("pg_ctl"), "-D", self._data, "-o", options, "-l", log, "-w", "start")

    def stop(self) -> None:
        """Stop it without waiting for anybody."""
        self._run(_program("pg_ctl"), "-D", self._data, "-m", "immediate", "stop")

    def kill(self) -> None:
        """kill -9 of all its processes."""
        main = psutil.Process(int((self.folder / "data/postmaster.pid").read_text().split()[0]))
        processes = [main, *main.children()]
        for process in processes:
            process.kill()
        psutil.wait_procs(processes)

    @property
    def _data(self) -> str:
        return str(self.folder / "data")

    def _run(self, *command: str) -> None:
        subprocess.run(command, check=True, capture_output=True, cwd=self.folder, **unprivileged())


def unprivileged() -> dict[str, str]:
    """Who runs the server: it refuses to run as root."""
    return {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A server that runs until the block ends."""
    server = Postgres(
        Path(tempfile.mkdtemp(prefix="pg-"))
    )  # a socket's path may have 107 bytes: not tmp_path
    if unprivileged():
        shutil.chown(server.folder, **unprivileged())
    try:
        server.initialise()
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(server.folder)
