"""The real command in real processes, with a stand-in for the stages (stand_in/sitecustomize.py)."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

STAND_IN = Path(__file__).parent / "stand_in"
SECONDS = 120  # none takes so long, unless it hangs


class Launched:
    """One `dovetail train` whose processes do a deed; `run` is its output folder. It hears the signals of a terminal,
    but for those that it is to ignore, whatever this process ignores."""

    def __init__(
        self, run: Path, deed: str, arguments: Sequence[str], ignores: Sequence[int], **environment: str
    ) -> None:
        def set_signals() -> None:
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN if number in ignores else signal.SIG_DFL)

        self.run = run
        as_a_user_has_it = {
            name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"
        }
        path = os.pathsep.join([str(STAND_IN), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dovetail", "train", "opt-125m", f"output_dir={run}", *arguments],
            env={**as_a_user_has_it, "PYTHONPATH": path, "DEED": deed, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=set_signals,
        )

    def ended(self) -> tuple[int, str, str]:
        """Exit code and what was on screen, once it ends by itself."""
        out, err = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, out, err

    def log(self, rank: int) -> str:
        return (self.run / "logs" / f"rank-{rank}.log").read_text()

    def pids(self, count: int) -> list[int]:
        """Process ids of the ranks, once all `count` are at work."""
        end = time.monotonic() + SECONDS
        files = [self.run / f"pid-{rank}" for rank in range(count)]
        while not all(file.exists() and file.read_text() for file in files):
            assert self.process.poll() is None, self.ended()
            assert time.monotonic() < end
            time.sleep(0.05)
        return [int(file.read_text()) for file in files]


@contextmanager
def launched(
    run: Path, deed: str, *arguments: str, ignores: Sequence[int] = (), **environment: str
) -> Iterator[Launched]:
    """A started command that is killed at the end, should it still be there."""
    command = Launched(run, deed, arguments, ignores, **environment)
    try:
        yield command
    finally:
        command.process.kill()
        command.process.communicate()


def expect_gone(pids: Sequence[int]) -> None:
    """No process is left behind; the kernel may take a moment to see to it."""
    end = time.monotonic() + 10
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists() and not is_zombie(pid)]:
        assert time.monotonic() < end, alive
        time.sleep(0.05)


def is_zombie(pid: int) -> bool:
    """Dead, and only not yet asked about by its parent."""
    try:
        return ") Z" in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
