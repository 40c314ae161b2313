"""Where the agents of all machines agree on who has which ranks, and the store by which their processes then meet.

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
    """Torch's rendezvous, but the agent of rank 0 opens the processes' store itself, anew for each start.

    Torch has two ways. Its agents keep one store over all restarts: processes then find the addresses of the dead in
    it, and a machine that joins again waits for one that is told only once. Or an agent looks for a free port, closes
    it and leaves it to rank 0 to open: any connection may have taken it by then.
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
        """Whether also the process of rank 0 joins a store that an agent hosts."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for all machines; the store of the last start goes, and with it its port."""
        self._store = None
        met = self._agents.next_rendezvous()
        port = 0
        if met.rank == 0:
            self._store = TCPStore(str(self._address), 0, is_master=True, wait_for_workers=False)
            port = self._store.port
        # Apart from torch's keys of the same names, which say where it would have had the store.
        told = PrefixStore("dovetail", met.store)
        place = RendezvousStoreInfo.build(met.rank, told, self._address, server_port=port)
        return RendezvousInfo(met.store, met.rank, met.world_size, place)

    def get_backend(self) -> str:
        """Of torch's rendezvous."""
        return self._agents.get_backend()

    def get_run_id(self) -> str:
        """Of this run."""
        return self._agents.get_run_id()

    def is_closed(self) -> bool:
        """Whether the run has ended on some machine."""
        return self._agents.is_closed()

    def set_closed(self) -> None:
        """The run has ended."""
        self._agents.set_closed()  # type: ignore[no-untyped-call]

    def num_nodes_waiting(self) -> int:
        """Machines that came back and wait for the next start."""
        return self._agents.num_nodes_waiting()

    def leave(self) -> None:
        """This machine goes, and the run may go on: the others are told nothing.

        Ends the thread by which the others know that this machine is there: found in the midst of a call at the end of
        the interpreter, it would make that an abort().
        """
        self._agents._stop_heartbeats()  # type: ignore[attr-defined]

    def shutdown(self) -> bool:
        """The run has ended, and this machine leaves."""
        return self._agents.shutdown()
