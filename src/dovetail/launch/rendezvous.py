"""Machines of a run find one another before anything is started on them.

Responsible for: the port on node 0, reaching it from the others, saying by number which machine did not arrive, and
by which interface they talk. Not responsible for: the processes (start.py); torch's own rendezvous uses the same store
afterwards (meeting.py).
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
from dovetail.launch.network import address_towards, interface_towards
from dovetail.launch.topology import Topology

_PAUSE = 0.2  # seconds between two looks


def roll_call(topology: Topology) -> Store:
    """Wait until every machine has reported at node 0; the store must be kept while the run lives.

    Node 0 hosts the store at `topology.endpoint`. A machine that comes back after a failure reports again and
    finds the others' reports still there. Raises LaunchError: the port is in use, node 0 is out of reach, or
    after `topology.rdzv_timeout` seconds some machine is missing.
    """
    assert topology.node_rank is not None
    assert topology.master_addr is not None
    deadline = time.monotonic() + topology.rdzv_timeout
    is_host = topology.node_rank == 0
    if is_host:
        expect_port_free(topology.master_port)
    else:
        _reach_node_0(topology, deadline)
    store = TCPStore(
        topology.master_addr,
        topology.master_port,
        is_master=is_host,
        timeout=timedelta(seconds=topology.rdzv_timeout),
        wait_for_workers=False,
        multi_tenant=True,  # torch's rendezvous opens the same port in this process and is given this server
    )
    roll = _roll(store, topology)
    report = {
        "host": socket.gethostname(),
        "gpus": topology.num_gpus,
        "address": local_address(topology),
    }
    roll.set(f"node-{topology.node_rank}", json.dumps(report))
    _expect_all_present(roll, topology, deadline)
    _expect_equal_counts(roll, topology)
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


def local_address(topology: Topology) -> str:
    """An address by which the others reach this machine: of node 0 the given one, else that on the way there."""
    if topology.node_rank == 0:  # many systems resolve a machine's own name to a loopback address
        return str(topology.master_addr)
    return address_towards(str(topology.master_addr), topology.master_port)


def interface(topology: Topology, store: Store) -> str | None:
    """The network interface by which this machine reaches the others: on the way to node 0, from there to node 1.

    store: of the roll call.
    """
    peer = str(topology.master_addr)
    if topology.node_rank == 0:
        peer = json.loads(_roll(store, topology).get("node-1"))["address"]
    return interface_towards(peer, topology.master_port)


def _roll(store: Store, topology: Topology) -> Store:
    return PrefixStore(f"dovetail/{topology.rdzv_id}", store)


def _reach_node_0(topology: Topology, deadline: float) -> None:
    assert topology.master_addr is not None
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((topology.master_addr, topology.master_port), timeout=left).close()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
        else:
            return
        time.sleep(_PAUSE)
    raise LaunchError(
        f"node 0 of {topology.num_nodes} did not answer at {topology.endpoint} within {topology.rdzv_timeout} s: "
        f"{reason}",
        hint="start the command of node 0 too; check the name, the port and the firewall between the machines",
    )


def _expect_all_present(roll: Store, topology: Topology, deadline: float) -> None:
    missing = [rank for rank in range(topology.num_nodes) if not _arrives(roll, rank, topology, deadline)]
    if missing:
        numbers = ", ".join(map(str, missing))
        present = "; ".join(f"node {rank} is {report['host']}" for rank, report in _reports(roll, topology))
        raise LaunchError(
            f"node{'s' if len(missing) > 1 else ''} {numbers} of {topology.num_nodes} did not arrive at "
            f"{topology.endpoint} within {topology.rdzv_timeout} s: {present}",
            hint=f"start the command with --node-rank {missing[0]} and --rdzv-id {topology.rdzv_id} there; "
            "--rdzv-timeout SECONDS waits longer",
        )


def _arrives(roll: Store, rank: int, topology: Topology, deadline: float) -> bool:
    try:
        while not roll.check([f"node-{rank}"]):  # and not wait(), which writes to the screen when time is up
            if time.monotonic() > deadline:
                return False
            time.sleep(_PAUSE)
    except dist.DistError as error:
        raise LaunchError(
            f"node 0 of {topology.num_nodes} has left {topology.endpoint}",
            hint="its own output says why; start all nodes again",
        ) from error
    return True


def _expect_equal_counts(roll: Store, topology: Topology) -> None:
    for rank, report in _reports(roll, topology):
        if report["gpus"] != topology.num_gpus:
            raise LaunchError(
                f"node {rank} ({report['host']}) takes {report['gpus']} processes, this node "
                f"({topology.node_rank}) {topology.num_gpus}",
                hint="give the same --num-gpus on all machines",
            )


def _reports(roll: Store, topology: Topology) -> Iterator[tuple[int, dict[str, str | int]]]:
    for rank in range(topology.num_nodes):
        key = f"node-{rank}"
        if roll.check([key]):
            yield rank, json.loads(roll.get(key))
