"""Bring the machines of a run together before any process is started on them.

Responsible for: the port on node 0, connecting to it from the others, naming the machines that did not arrive, and
the interface by which they talk. Not responsible for: the processes (start.py), torch's own rendezvous, which uses the
same store afterwards (meeting.py).
"""

import errno
import json
import queue
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from dovetail.errors import LaunchError
from dovetail.launch.network import address_towards, interface_towards
from dovetail.launch.topology import Topology
from dovetail.telemetry.log import say

_PAUSE = 0.2  # seconds between two attempts
_LEAVES_S = 3.0
"""Seconds to wait for a thread inside a call, which would turn the interpreter's end into an abort()."""


def roll_call(topology: Topology) -> Store:
    """Wait until every machine has reported at node 0; the store must be kept while the run lives.

    Node 0 hosts the store at `topology.endpoint`. A machine that comes back after a failure reports again and
    finds the others' reports still there. Raises LaunchError if the port is in use, node 0 is out of reach, another
    program answers there, or some machine is missing after `topology.rdzv_timeout` seconds.
    """
    assert topology.node_rank is not None
    deadline = time.monotonic() + topology.rdzv_timeout
    if topology.node_rank == 0:
        expect_port_free(topology.master_port)
    else:
        _reach_node_0(topology, deadline)
    store = _store(topology, deadline)
    roll = _roll(store, topology)
    report = {
        "host": socket.gethostname(),
        "gpus": topology.num_gpus,
        "address": local_address(topology),
    }
    if roll.check([f"node-{topology.node_rank}"]):
        say(
            f"another machine was node {topology.node_rank} before; this one takes its place once the other has left"
        )
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
            reason = "in use" if error.errno == errno.EADDRINUSE else f"not available ({error.strerror})"
            raise LaunchError(
                f"port {port} of this machine is {reason}",
                hint=f"stop what uses it (ss -ltnp 'sport = :{port}'), or give all nodes another --master-port",
            ) from error


def local_address(topology: Topology) -> str:
    """Return an address by which the others reach this machine: the given one on node 0, else one on the way there."""
    if topology.node_rank == 0:  # many systems resolve a machine's own name to a loopback address
        return str(topology.master_addr)
    return address_towards(str(topology.master_addr), topology.master_port)


def interface(topology: Topology, store: Store) -> str | None:
    """Return the network interface by which this machine reaches node 0; on node 0, the one by which it reaches node 1.

    store: the store of the roll call.
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


def _store(topology: Topology, deadline: float) -> Store:
    """Open the store at node 0 in a thread: without an answer, torch may wait forever and ignores Ctrl-C."""
    opened: queue.SimpleQueue[Store | dist.DistError] = queue.SimpleQueue()

    def open_store() -> None:
        try:
            opened.put(
                TCPStore(
                    str(topology.master_addr),
                    topology.master_port,
                    is_master=topology.node_rank == 0,
                    timeout=timedelta(seconds=topology.rdzv_timeout),
                    wait_for_workers=False,
                    multi_tenant=True,  # torch's rendezvous opens the same port here and gets this server
                )
            )
        except dist.DistError as error:
            opened.put(error)

    thread = threading.Thread(target=open_store, daemon=True)
    thread.start()
    try:
        found = opened.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        raise _no_store(topology) from None
    finally:
        thread.join(_LEAVES_S)
    if isinstance(found, dist.DistError):
        raise _no_store(topology) from found
    return found


def _no_store(topology: Topology) -> LaunchError:
    if topology.node_rank == 0:
        return LaunchError(
            f"node 0 does not reach itself at {topology.endpoint} within {topology.rdzv_timeout} s",
            hint="set --master-addr to a name or address of this machine that all others can reach",
        )
    return LaunchError(
        f"the program at {topology.endpoint} did not answer as node 0 of a run within {topology.rdzv_timeout} s",
        hint="check that this is node 0; if another program uses the port, give all nodes another --master-port",
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
        while not roll.check([f"node-{rank}"]):  # not wait(), which prints when time is up
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
                f"node {rank} ({report['host']}) takes {report['gpus']} processes, but this node "
                f"({topology.node_rank}) takes {topology.num_gpus}",
                hint="give the same --num-gpus on all machines",
            )


def _reports(roll: Store, topology: Topology) -> Iterator[tuple[int, dict[str, str | int]]]:
    for rank in range(topology.num_nodes):
        key = f"node-{rank}"
        if roll.check([key]):
            yield rank, json.loads(roll.get(key))
