"""The processes of each start meet in a store that is there before them, and in which nothing lies."""

import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from threading import Timer

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousInfo
from torch.distributed.launcher.api import LaunchConfig

from dovetail.launch.meeting import Meeting


@pytest.fixture
def meeting() -> Iterator[Meeting]:
    alone = Meeting(
        LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=2,
            run_id="run",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            rdzv_configs={"is_host": True},
            local_addr="localhost",
        )
    )
    yield alone
    alone.shutdown()


def joined(met: RendezvousInfo) -> TCPStore:
    """As any process does, that of rank 0 included."""
    place = met.bootstrap_store_info
    assert place is not None
    return TCPStore(place.master_addr, place.master_port, is_master=False)


def test_nobody_can_take_the_port_before_the_processes_come(meeting: Meeting) -> None:
    place = meeting.next_rendezvous().bootstrap_store_info
    assert place is not None
    assert meeting.use_agent_store
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", place.master_port))


def test_a_restart_finds_nothing_of_the_start_before(meeting: Meeting) -> None:
    first = meeting.next_rendezvous()
    joined(first).set("address", "of one that died")
    again = meeting.next_rendezvous()
    assert not joined(again).check(["address"])
    assert first.bootstrap_store_info is not None
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("localhost", first.bootstrap_store_info.master_port))


def test_a_machine_that_leaves_has_no_thread_left_and_does_not_end_the_run(meeting: Meeting) -> None:
    def heartbeats() -> list[str]:
        return [thread.name for thread in threading.enumerate() if "KeepAlive" in thread.name]

    meeting.next_rendezvous()
    assert heartbeats()
    meeting.leave()
    assert not heartbeats()
    assert not meeting.is_closed()


def test_a_store_whose_peer_ends_prints_nothing_of_torch_s(capfd: pytest.CaptureFixture[str]) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    client = TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=30))
    held = [store]
    del store
    end = Timer(0.05, held.clear)
    end.start()
    with pytest.raises(dist.DistNetworkError):
        client.get("never set")
    end.join()
    assert capfd.readouterr().err == ""
