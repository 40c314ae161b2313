"""Machines of a run find one another before anything is started on them.

Responsible for: the port on node 0, reaching it from the others, and saying by number which machine did not
arrive. Not responsible for: the processes (start.py); torch's own rendezvous uses the same store afterwards.
"""

import errno
import json
import socket
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from dovetail.errors import LaunchError
from dovetail.launch.world import World

_PAUSE = 0.2  # seconds between two looks


def roll_call(world: World) -> Store:
    """Wait until every machine has reported at node 0; the store must be kept while the run lives.

    Node 0 hosts the store at `world.endpoint`. A machine that comes back after a failure reports again and
    finds the others' reports still there. Raises LaunchError: the port is in use, node 0 is out of reach, or
    after `world.rdzv_timeout` seconds some machine is missing.
    """
    assert world.node_rank is not None
    assert world.master_addr is not None
    deadline = time.monotonic() + world.rdzv_timeout
    is_host = world.node_rank == 0
    if is_host:
        expect_port_free(world.master_port)
    else:
        _reach_node_0(world, deadline)
    store = TCPStore(
        world.master_addr,
        world.master_port,
        is_master=is_host,
        timeout=timedelta(seconds=world.rdzv_timeout),
        wait_for_workers=False,
        multi_tenant=True,  # torch's rendezvous opens the same port in this process and is given this server
    )
    roll = PrefixStore(f"dovetail/{world.rdzv_id}", store)
    roll.set(f"node-{world.node_rank}", json.dumps({"host": socket.gethostname(), "gpus": world.num_gpus}))
    _expect_all_present(roll, world, deadline)
    _expect_equal_counts(roll, world)
    return store


def expect_port_free(port: int) -> None:
    """Raise LaunchError if another program listens on the port of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            reason = "in use" if error.errno == errno.EADDRINUSE else f"not to be had ({error.strerror})"
            raise LaunchError(
                f"port {port} of this machine is {reason}",
                hint=f"stop what uses it (ss -ltnp 'sport = :{port}'), or give all nodes another --master-port",
            ) from error


def local_address(world: World) -> str:
    """An address by which the others reach this machine: of node 0 the given one, else that on the way there."""
    if world.node_rank == 0:  # many systems resolve a machine's own name to a loopback address
        return str(world.master_addr)
    family, _, _, _, address = socket.getaddrinfo(
        world.master_addr, world.master_port, type=socket.SOCK_DGRAM
    )[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # a datagram socket sends nothing here: only the route is looked up
        return str(probe.getsockname()[0])


def _reach_node_0(world: World, deadline: float) -> None:
    assert world.master_addr is not None
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((world.master_addr, world.master_port), timeout=left).close()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
        else:
            return
        time.sleep(_PAUSE)
    raise LaunchError(
        f"node 0 of {world.num_nodes} did not answer at {world.endpoint} within {world.rdzv_timeout} s: {reason}",
        hint="start the command of node 0 too; check the name, the port and the firewall between the machines",
    )


def _expect_all_present(roll: Store, world: World, deadline: float) -> None:
    missing = [rank for rank in range(world.num_nodes) if not _arrives(roll, rank, world, deadline)]
    if missing:
        numbers = ", ".join(map(str, missing))
        present = "; ".join(f"node {rank} is {report['host']}" for rank, report in _reports(roll, world))
        raise LaunchError(
            f"node{'s' if len(missing) > 1 else ''} {numbers} of {world.num_nodes} did not arrive at "
            f"{world.endpoint} within {world.rdzv_timeout} s: {present}",
            hint=f"start the command with --node-rank {missing[0]} and --rdzv-id {world.rdzv_id} there; "
            "--rdzv-timeout SECONDS waits longer",
        )


def _arrives(roll: Store, rank: int, world: World, deadline: float) -> bool:
    try:
        while not roll.check([f"node-{rank}"]):  # and not wait(), which writes to the screen when time is up
            if time.monotonic() > deadline:
                return False
            time.sleep(_PAUSE)
    except dist.DistError as error:
        raise LaunchError(
            f"node 0 of {world.num_nodes} has left {world.endpoint}",
            hint="its own output says why; start all nodes again",
        ) from error
    return True


def _expect_equal_counts(roll: Store, world: World) -> None:
    for rank, report in _reports(roll, world):
        if report["gpus"] != world.num_gpus:
            raise LaunchError(
                f"node {rank} ({report['host']}) takes {report['gpus']} processes, this node "
                f"({world.node_rank}) {world.num_gpus}",
                hint="give the same --num-gpus on all machines",
            )


def _reports(roll: Store, world: World) -> Iterator[tuple[int, dict[str, str | int]]]:
    for rank in range(world.num_nodes):
        key = f"node-{rank}"
        if roll.check([key]):
            yield rank, json.loads(roll.get(key))
