"""Machines meet over a real socket of this one; those that do not arrive are named."""

import re
import socket
import threading
from contextlib import suppress
from dataclasses import replace

import pytest

from dovetail.errors import LaunchError
from dovetail.launch.rendezvous import expect_port_free, interface, local_address, roll_call
from dovetail.launch.topology import Topology
from tests.launch.ports import free_port


@pytest.fixture
def topology() -> Topology:
    """Two machines, both of them this one, that meet at a port nobody uses."""
    return Topology(
        num_gpus=2,
        num_nodes=2,
        node_rank=0,
        master_addr="127.0.0.1",
        master_port=free_port(),
        rdzv_id="run",
        rdzv_timeout=60,
    )


@pytest.fixture
def deserted(topology: Topology) -> Topology:
    """Nobody will come there."""
    return replace(topology, rdzv_timeout=1)


def failure(topology: Topology) -> LaunchError:
    with pytest.raises(LaunchError) as caught:
        roll_call(topology)
    assert caught.value.hint
    return caught.value


def test_the_machine_that_did_not_arrive_is_named(deserted: Topology) -> None:
    assert failure(deserted).message == (
        f"node 1 of 2 did not arrive at {deserted.endpoint} within 1 s: node 0 is {socket.gethostname()}"
    )


def test_a_node_0_that_does_not_answer_is_named(deserted: Topology) -> None:
    message = failure(replace(deserted, node_rank=1)).message
    assert re.match(
        rf"node 0 of 2 did not answer at {deserted.endpoint} within 1 s: connection refused", message
    )


def test_a_port_in_use_is_named(topology: Topology) -> None:
    with socket.create_server(("127.0.0.1", topology.master_port)):
        assert failure(topology).message == f"port {topology.master_port} of this machine is in use"
    expect_port_free(topology.master_port)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.0 400 Bad Request\r\n\r\n"])
def test_another_program_at_the_port_of_node_0_is_not_waited_for(deserted: Topology, answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", deserted.master_port)) as other:

        def serve() -> None:
            with suppress(OSError):
                connections.append(other.accept()[0])  # node 0 is looked for
                connections.append(other.accept()[0])
                connections[-1].sendall(answer)

        connections: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        message = failure(replace(deserted, node_rank=1)).message
        for connection in connections:
            connection.close()
    assert message == (f"the program at {deserted.endpoint} did not answer as node 0 of a run within 1 s")


def test_a_node_0_that_is_elsewhere_is_told(deserted: Topology) -> None:
    there = replace(deserted, master_addr="no-such-name.invalid")
    assert failure(there).message == f"node 0 does not reach itself at {there.endpoint} within 1 s"


def both(first: Topology, second: Topology) -> list[str]:
    """What the second machine came to while the first hosts the meeting; it must end."""
    errors: list[str] = []

    def join() -> None:
        try:
            roll_call(second)
        except LaunchError as error:
            errors.append(error.message)

    other = threading.Thread(target=join)
    other.start()
    try:
        store = roll_call(first)
        other.join(120)
        del store
    except LaunchError as error:
        errors.append(error.message)
        other.join(120)
    assert not other.is_alive()
    return errors


def test_machines_that_are_all_there_go_on(topology: Topology) -> None:
    assert both(topology, replace(topology, node_rank=1)) == []


def test_a_second_machine_of_one_number_is_told_that_it_waits(
    topology: Topology, capsys: pytest.CaptureFixture[str]
) -> None:
    def join() -> None:
        for _ in range(2):
            roll_call(replace(topology, node_rank=1))

    other = threading.Thread(target=join)
    other.start()
    store = roll_call(topology)
    other.join(60)
    del store
    assert capsys.readouterr().err == (
        "another machine was node 1 before; this one takes its place once the other has left\n"
    )


def test_another_run_at_the_same_place_is_not_taken_for_this_one(deserted: Topology) -> None:
    told = both(deserted, replace(deserted, node_rank=1, rdzv_id="other"))
    assert any("node 1 of 2 did not arrive" in message for message in told)


def test_machines_with_different_numbers_of_processes_are_refused(topology: Topology) -> None:
    told = both(topology, replace(topology, node_rank=1, num_gpus=4))
    assert any("takes 4 processes, but this node (0) takes 2" in message for message in told)


def test_a_machine_is_known_by_its_address_on_the_way_to_node_0(topology: Topology) -> None:
    assert local_address(replace(topology, node_rank=1)) == "127.0.0.1"
    assert local_address(replace(topology, node_rank=1, master_addr="127.0.0.2")) != "127.0.0.2"
    assert local_address(replace(topology, master_addr="worker-0")) == "worker-0"


def test_node_0_knows_its_interface_by_the_address_of_another(topology: Topology) -> None:
    other = threading.Thread(target=roll_call, args=(replace(topology, node_rank=1),))
    other.start()
    store = roll_call(topology)
    other.join(120)
    assert interface(topology, store) == interface(replace(topology, node_rank=1), store) == "lo"
    # Its own name may mean a loopback address here, and the way to node 1 is what counts.
    assert interface(replace(topology, master_addr="no-such-name.invalid"), store) == "lo"
