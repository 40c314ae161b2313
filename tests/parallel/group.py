"""Groups of processes on this machine, for tests.

Responsible for: starting them as torchrun does, which keeps the store where they meet; waiting, and showing what they
said if one fails.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import TCPStore

from dovetail.config.run import RunConfig

ROOT = Path(__file__).parents[2]

LONGEST = 1800.0
"""Seconds that a group may take."""

Case = tuple[RunConfig, tuple[str, int] | None]
"""A run, and the stage and step after whose checkpoint it is stopped."""


def run_all(cases: Sequence[Case], *, size: int) -> list[str]:
    """Run the cases one after the other on `size` processes; returns what each process printed."""
    # As torchrun does, a store for each time that the processes meet.
    stores = [new_store() for _ in cases]
    described = [
        {"config": config.model_dump(mode="json"), "stop": stop, "port": store.port}
        for (config, stop), store in zip(cases, stores, strict=True)
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(described, file)
        file.flush()
        codes, said = run_group(["tests.parallel.worker", file.name], size=size)
    failed = [f"process {rank} ended with {code}:\n{said[rank]}" for rank, code in enumerate(codes) if code]
    assert not failed, "\n".join(failed)
    return said


def run_group(arguments: Sequence[str], *, size: int) -> tuple[list[int], list[str]]:
    """(exit codes, what each printed) of `python -m arguments` as a group; none is left behind.

    When one has failed the others get a minute to notice.
    """
    store = new_store()
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / f"rank-{rank}.log" for rank in range(size)]
        processes = [_start(rank, size, arguments, store.port, said[rank]) for rank in range(size)]
        try:
            deadline = time.monotonic() + LONGEST
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                time.sleep(0.05)
                if any(process.poll() for process in processes):
                    deadline = min(deadline, time.monotonic() + 60.0)
        finally:
            for process in processes:
                process.kill()
        return [process.wait() for process in processes], [path.read_text() for path in said]


def new_store() -> TCPStore:
    """Where processes meet; lives in this process."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _start(rank: int, size: int, arguments: Sequence[str], port: int, log: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
