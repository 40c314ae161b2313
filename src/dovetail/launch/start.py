"""Start the processes of this machine under torch's elastic agent, and wait until they end.

Responsible for: the agent's settings, restarts, and one error for every kind of failure.
Not responsible for: the number of processes (topology.py), the signals that they get (agent.py), their work.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous.api import (
    RendezvousConnectionError,
    RendezvousError,
    RendezvousTimeoutError,
)
from torch.distributed.launcher.api import LaunchConfig

from dovetail.errors import DovetailError, LaunchError
from dovetail.launch.agent import SAVED, Agent
from dovetail.launch.early_signals import Stopped, handle_stops, stop
from dovetail.launch.failures import first_failure, interruption, read_report
from dovetail.launch.logs import RankLogs, send_agent_log_to
from dovetail.launch.meeting import Meeting
from dovetail.launch.rank import LAUNCHER
from dovetail.launch.rendezvous import interface, local_address, roll_call
from dovetail.launch.topology import Topology
from dovetail.runs.lock import FolderLock
from dovetail.telemetry.log import say

# Each process has one stream, so that the lines of its log are in order; exec keeps the process id.
_ONE_STREAM = ("/bin/sh", "-c", 'exec "$@" 2>&1', "sh")


def start(topology: Topology, command: Sequence[str], output_dir: str | Path) -> None:
    """Run `command` in every process of this machine; returns when all have ended without an error.

    Each process finds RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in its environment. The first SIGTERM
    or Ctrl-C is passed on to all processes, the second kills them; before they run, the first one ends the command.
    Raises LaunchError (the machines did not meet), ProcessFailed (the first failure, after `topology.max_restarts`
    restarts), RunInterrupted (a signal came, and all saved), CheckpointError (another launcher uses the folder),
    Stopped.
    """
    folder = Path(output_dir) / "logs"
    with _claimed(folder, topology):
        log = folder / f"launcher-{topology.node_rank}.log"
        send_agent_log_to(log)
        handle_stops(stop)  # until the processes run (agent.py)
        os.environ[LAUNCHER] = str(os.getpid())
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # each start has its own store: meeting.py
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // topology.num_gpus)))
        try:
            _meet_and_run(topology, command, folder)
        except (RendezvousError, dist.DistError) as error:
            raise _not_met(error, topology, log) from error


@contextmanager
def _claimed(folder: Path, topology: Topology) -> Iterator[None]:
    """Keep other launchers from renaming the logs of a run while the block runs.

    Raises CheckpointError if another launcher uses them. With several machines, the port of node 0 keeps other
    launchers out: the lock of a lost machine might remain on a shared file system and keep out its replacement.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder / ".lock") if topology.num_nodes == 1 else None
    except OSError as error:
        raise LaunchError(
            f"{folder} cannot be used: {error.strerror}", hint="give another output_dir"
        ) from error
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _meet_and_run(topology: Topology, command: Sequence[str], folder: Path) -> None:
    logs = RankLogs(folder, before_restart=lambda ranks, number: _say_restart(logs, ranks, number))
    store = _meet(topology) if topology.num_nodes > 1 else None  # kept while the run lives
    here = f"{topology.num_gpus} process{'es' if topology.num_gpus > 1 else ''} on this machine"
    everywhere = f", {topology.size} on {topology.num_nodes}" if store is not None else ""
    say(f"{here}{everywhere}; the output of each is in {folder}")
    _run(_settings(topology, logs), command, logs)


def _meet(topology: Topology) -> Store:
    store = roll_call(topology)
    if name := interface(topology, store):
        # Gloo takes the interface of the machine's own name, which many systems resolve to a loopback address.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    return store


def _run(settings: LaunchConfig, command: Sequence[str], logs: RankLogs) -> None:
    meeting = Meeting(settings)
    agent = _agent(settings, meeting, [*_ONE_STREAM, *command])
    try:
        result = agent.run()
    except SignalException as error:
        meeting.leave()  # the run stays open, because the other machines may go on
        raise Stopped(agent.asked or error.sigval) from None
    except Stopped:
        meeting.leave()
        raise
    except BaseException:
        meeting.shutdown()
        raise
    meeting.shutdown()
    if result is None:  # this machine waited for a free place until the run ended
        raise LaunchError(
            "the run has ended on the other machines, which were enough without this one",
            hint="check whether two machines have the same --node-rank",
        )
    if result.is_failed():
        raise _ending(agent, {rank: failure.exitcode for rank, failure in result.failures.items()}, logs)


def _ending(agent: Agent, exit_codes: Mapping[int, int], logs: RankLogs) -> DovetailError | Stopped:
    """Return the error to raise when some processes did not end with 0."""
    if SAVED in exit_codes.values():
        return interruption(logs)
    if agent.asked and not any(read_report(logs.error_file(rank)) for rank in exit_codes):
        return Stopped(agent.asked)  # the signal came before anything could be saved
    return first_failure(exit_codes, logs)


def _not_met(error: RendezvousError | dist.DistError, topology: Topology, log: Path) -> LaunchError:
    if isinstance(error, RendezvousTimeoutError | dist.DistStoreError):
        return LaunchError(
            f"a node was lost and did not come back to {topology.endpoint} within {topology.rdzv_timeout} s",
            hint=f"start its command again within that time; --rdzv-timeout SECONDS waits longer; see {log}",
        )
    if isinstance(error, RendezvousConnectionError | dist.DistError):
        return LaunchError(
            f"node 0 of {topology.num_nodes} has left {topology.endpoint}",
            hint=f"its own output says why; start all nodes again; see {log}",
        )
    return LaunchError(
        f"the {topology.num_nodes} nodes did not meet at {topology.endpoint}: {type(error).__name__} {error}",
        hint=f"the run may have ended on another node: see the output there, and {log}",
    )


def _settings(topology: Topology, logs: RankLogs) -> LaunchConfig:
    several = topology.num_nodes > 1
    return LaunchConfig(
        min_nodes=topology.num_nodes,
        max_nodes=topology.num_nodes,
        nproc_per_node=topology.num_gpus,
        logs_specs=logs,
        run_id=topology.rdzv_id,
        role="",  # shown before each line; one kind of process needs no name
        rdzv_backend="c10d",
        rdzv_endpoint=topology.endpoint if several else "localhost:0",
        rdzv_configs={
            "is_host": topology.node_rank == 0,
            "join_timeout": topology.rdzv_timeout,
            "read_timeout": topology.rdzv_timeout,
        },
        max_restarts=topology.max_restarts,
        log_line_prefix_template="rank ${rank}: " if several else "${role_name}",
        local_addr=local_address(topology) if several else "localhost",
    )


def _agent(settings: LaunchConfig, meeting: Meeting, command: Sequence[str]) -> Agent:
    program, *arguments = command
    spec = WorkerSpec(
        role=settings.role,
        local_world_size=settings.nproc_per_node,
        entrypoint=program,
        args=tuple(arguments),
        rdzv_handler=meeting,
        max_restarts=settings.max_restarts,
        local_addr=settings.local_addr,
        numa_options=settings.numa_options,
    )
    assert settings.logs_specs is not None
    return Agent(spec, settings.logs_specs, log_line_prefix_template=settings.log_line_prefix_template)


def _say_restart(logs: RankLogs, ranks: dict[int, int], number: int) -> None:
    reports = {rank: read_report(logs.error_file(rank)) for rank in ranks.values()}
    causes = "; ".join(
        f"rank {rank}: {report['message']['message']}" for rank, report in reports.items() if report
    )
    say(f"restart {number}: a process was lost{f' ({causes})' if causes else ''}")
