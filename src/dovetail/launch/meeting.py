"""Let the agents of all machines agree on the ranks, and open the store through which their processes then meet.

Responsible for: torch's dynamic rendezvous, with a store of its own for the processes of each start. Not responsible
for: machines that do not arrive at all (rendezvous.py), starting and watching (start.py).
"""

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    registry,
)
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo
from torch.distributed.launcher.api import LaunchConfig


class Meeting(RendezvousHandler):
    """Torch's rendezvous, but the agent of rank 0 opens the processes' store itself, a new one for each start.

    Torch offers two ways. In one, its agents keep one store over all restarts: processes then find the addresses of
    dead processes in it, and a machine that joins again waits for an address that is published only once. In the other,
    an agent looks for a free port, closes it and lets rank 0 open it: a connection may have taken it by then.
    """

    def __init__(self, settings: LaunchConfig) -> None:
        self._agents = registry.get_rendezvous_handler(
            RendezvousParameters(
                backend=settings.rdzv_backend,
                endpoint=settings.rdzv_endpoint,
                run_id=settings.run_id,
                min_nodes=settings.min_nodes,
                max_nodes=settings.max_nodes,
                local_addr=settings.local_addr,
                **settings.rdzv_configs,
            )
        )
        self._address = settings.local_addr
        self._store: TCPStore | None = None

    @property
    def use_agent_store(self) -> bool:
        """Return whether an agent hosts the store, which the process of rank 0 then only joins."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Close the store of the last start with its port, and wait for all machines."""
        self._store = None
        met = self._agents.next_rendezvous()
        port = 0
        if met.rank == 0:
            self._store = TCPStore(str(self._address), 0, is_master=True, wait_for_workers=False)
            port = self._store.port
        # The prefix keeps these keys apart from torch's of the same names, which give its own address of the store.
        keys = PrefixStore("dovetail", met.store)
        place = RendezvousStoreInfo.build(met.rank, keys, self._address, server_port=port)
        return RendezvousInfo(met.store, met.rank, met.world_size, place)

    def get_backend(self) -> str:
        """Return the backend of torch's rendezvous."""
        return self._agents.get_backend()

    def get_run_id(self) -> str:
        """Return the id of this run."""
        return self._agents.get_run_id()

    def is_closed(self) -> bool:
        """Return whether the run has ended on some machine."""
        return self._agents.is_closed()

    def set_closed(self) -> None:
        """Mark the run as ended."""
        self._agents.set_closed()  # type: ignore[no-untyped-call]

    def num_nodes_waiting(self) -> int:
        """Return the number of machines that came back and wait for the next start."""
        return self._agents.num_nodes_waiting()

    def leave(self) -> None:
        """Leave a run that may go on: the other machines get no message.

        It ends the heartbeat thread, by which the others know that this machine is there. A thread that is inside a
        call when the interpreter ends would turn the end into an abort().
        """
        self._agents._stop_heartbeats()  # type: ignore[attr-defined]

    def shutdown(self) -> bool:
        """Mark the run as ended, and leave it."""
        return self._agents.shutdown()
