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
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
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
PORT = "29512"


@dataclass(frozen=True)
class Network:
    """Namespaces with a cable each to a switch, which is a namespace too."""

    name: str

    def node(self, rank: int) -> str:
        return f"{self.name}-{rank}"

    def address(self, rank: int) -> str:
        return f"10.77.0.{rank + 1}"

    def switch_on(self) -> None:
        ip("netns", "add", self.name)
        ip("-n", self.name, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.name, "link", "set", "bridge", "up")

    def plug_in(self, rank: int) -> None:
        """A machine that has just been switched on: it knows of no connection."""
        node, port = self.node(rank), f"port{rank}"
        ip("netns", "add", node)
        ip("-n", node, "link", "set", "lo", "up")
        ip("-n", self.name, "link", "add", port, "type", "veth", "peer", "name", "cable", "netns", node)
        ip("-n", self.name, "link", "set", port, "master", "bridge", "up")
        ip("-n", node, "address", "add", f"{self.address(rank)}/24", "dev", "cable")
        ip("-n", node, "link", "set", "cable", "up")

    def unplug(self, rank: int) -> None:
        """From here on nothing that the machine sends arrives, not even that its connections are closed."""
        ip("-n", self.name, "link", "delete", f"port{rank}")

    def remove(self) -> None:
        for name in (self.node(0), self.node(1), self.name):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@dataclass(frozen=True)
class Node:
    """A machine: what starts a command on it, and which processes are its own."""

    rank: int
    network: Network | None

    def launch(self, config: RunConfig) -> AbstractContextManager[subprocess.Popen[str]]:
        """One process of a run of two; every start of a machine is the same command."""
        master = self.network.address(0) if self.network else "127.0.0.2"
        where = ("--num-nodes", "2", "--node-rank", str(self.rank), "--master-addr", master)
        flags = ("--num-gpus", "1", *where, "--master-port", PORT, "--max-restarts", "2")
        within = ("nsenter", f"--net=/run/netns/{self.network.node(self.rank)}") if self.network else ()
        return launched(config, *flags, within=within)

    def kill(self, launcher: int) -> None:
        """All its processes at once; the system closes their connections."""
        for pid in self._processes(launcher):
            os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + 30
        while self.network and self._processes(launcher):
            assert time.monotonic() < end
            time.sleep(0.05)

    def cut_off(self, launcher: int) -> None:
        """Its power fails, and it is switched on again."""
        assert self.network is not None
        self.network.unplug(self.rank)
        self.kill(launcher)
        ip("netns", "delete", self.network.node(self.rank))
        self.network.plug_in(self.rank)

    def _processes(self, launcher: int) -> list[int]:
        if self.network:
            return [int(pid) for pid in ip("netns", "pids", self.network.node(self.rank)).split()]
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        return [launcher, *map(int, children)]


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    network = Network(f"dovetail{os.getpid()}")
    try:
        network.switch_on()
        for rank in (0, 1):
            network.plug_in(rank)
    except (OSError, subprocess.CalledProcessError) as error:
        warnings.warn(f"no network namespaces: both nodes are this machine ({error})", stacklevel=1)
        yield Node(0, None), Node(1, None)
    else:
        yield Node(0, network), Node(1, network)
    finally:
        if shutil.which("ip"):
            network.remove()


@pytest.fixture
def both(alone: RunConfig, tmp_path: Path) -> RunConfig:
    """The run of one process, for two machines."""
    return alone.model_copy(update={"output_dir": str(tmp_path / "both")})


def wait_for_ppo(config: RunConfig, process: subprocess.Popen[str]) -> None:
    """Until PPO has written a checkpoint; there are steps left."""
    wait_for(Path(config.output_dir, "ppo", "checkpoints"), process, "step-*")


@pytest.mark.parametrize("how", ["killed", "cut off"])
def test_a_machine_that_is_lost_in_ppo_and_comes_back_is_not_in_the_weights(
    how: str, alone: RunConfig, both: RunConfig, nodes: tuple[Node, Node]
) -> None:
    first, second = nodes
    with first.launch(both) as stays:
        with second.launch(both) as lost:
            wait_for_ppo(both, stays)
            if how == "killed" or second.network is None:
                second.kill(lost.pid)
            else:
                second.cut_off(lost.pid)
        assert not Path(both.output_dir, "ppo", "model").exists()
        with second.launch(both) as again:
            said = expect_end(stays, both, 0)
            expect_end(again, both, 0)
    assert "restart 1: a process was lost" in said
    expect_same_weights(both, alone)


def test_without_the_first_machine_the_others_end_and_all_go_on_when_started_again(
    alone: RunConfig, both: RunConfig, nodes: tuple[Node, Node]
) -> None:
    first, second = nodes
    with second.launch(both) as left, first.launch(both) as lost:
        wait_for_ppo(both, lost)
        first.kill(lost.pid)
        said = expect_end(left, both, 3)
    assert "error: node 0 of 2 has left " in said
    assert not Path(both.output_dir, "ppo", "model").exists()
    with first.launch(both) as again, second.launch(both) as too:
        expect_end(again, both, 0)
        expect_end(too, both, 0)
    expect_same_weights(both, alone)
