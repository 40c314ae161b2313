"""Two machines, each a network namespace: one is lost during PPO and comes back; nothing of it is in the weights.

Where no namespace can be made (only root may), both are this machine, and a warning says so.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dovetail.config.run import RunConfig
from tests.launch.training import expect_end, expect_same_weights, launched, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.system,
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and network namespaces"),
    pytest.mark.filterwarnings("default:no network namespaces"),
]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = "29512"


@dataclass
class Node:
    """A machine: what starts a command on it, and which processes are its own."""

    rank: int
    master: str
    namespace: str | None
    started: list[int] = field(default_factory=list)

    def launch(self, config: RunConfig) -> AbstractContextManager[subprocess.Popen[str]]:
        """One process of a run of two; every start of a machine is the same command."""
        where = ("--num-nodes", "2", "--node-rank", str(self.rank), "--master-addr", self.master)
        flags = ("--num-gpus", "1", *where, "--master-port", PORT, "--max-restarts", "2")
        within = ("nsenter", f"--net=/run/netns/{self.namespace}") if self.namespace else ()
        return launched(config, *flags, within=within)

    def kill(self, launcher: int) -> None:
        """All its processes at once, as when its power fails."""
        for pid in self._processes(launcher):
            os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + 30
        while self.namespace and self._processes(launcher):
            assert time.monotonic() < end
            time.sleep(0.05)

    def _processes(self, launcher: int) -> list[int]:
        if self.namespace:
            return [int(pid) for pid in ip("netns", "pids", self.namespace).split()]
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        return [launcher, *map(int, children)]


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def connect(names: Sequence[str]) -> None:
    """Namespaces with one cable between them."""
    for name in names:
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
    first, second = names
    ip("-n", first, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", second)
    for name, address in zip(names, ADDRESSES, strict=True):
        ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
        ip("-n", name, "link", "set", "cable", "up")


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    names = [f"dovetail-{os.getpid()}-{number}" for number in (0, 1)]
    try:
        connect(names)
    except (OSError, subprocess.CalledProcessError) as error:
        warnings.warn(f"no network namespaces: both nodes are this machine ({error})", stacklevel=1)
        yield Node(0, "127.0.0.2", None), Node(1, "127.0.0.2", None)
    else:
        yield Node(0, ADDRESSES[0], names[0]), Node(1, ADDRESSES[0], names[1])
    finally:
        if shutil.which("ip"):
            for name in names:
                subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.fixture
def both(alone: RunConfig, tmp_path: Path) -> RunConfig:
    """The run of one process, for two machines."""
    return alone.model_copy(update={"output_dir": str(tmp_path / "both")})


def test_a_machine_that_is_lost_in_ppo_and_comes_back_is_not_in_the_weights(
    alone: RunConfig, both: RunConfig, nodes: tuple[Node, Node]
) -> None:
    first, second = nodes
    with first.launch(both) as stays:
        with second.launch(both) as lost:
            wait_for(Path(both.output_dir, "ppo", "checkpoints"), stays, "step-*")
            second.kill(lost.pid)
        assert not Path(both.output_dir, "ppo", "model").exists()
        with second.launch(both) as again:
            said = expect_end(stays, both, 0)
            expect_end(again, both, 0)
    assert "restart 1: a process was lost" in said
    expect_same_weights(both, alone)
