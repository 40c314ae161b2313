"""Turn one command into all the processes of a run, or print the command to type on each machine.

Responsible for: deciding whether this process is the whole run, one of its ranks, or the launcher.
Not responsible for: starting and watching (launch/), the work itself.
"""

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from dovetail.config.run import RunConfig
from dovetail.errors import RunInterrupted
from dovetail.launch.early_signals import Stopped, signals_kept
from dovetail.launch.topology import (
    LaunchFlags,
    Topology,
    expect_enough_gpus,
    expect_enough_work,
    is_rank,
    topology_of,
)

MACHINES = "Several processes or machines"

NumNodes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Number of machines. Without --node-rank the command for each is printed and nothing runs.",
        rich_help_panel=MACHINES,
        show_default=False,
    ),
]
NodeRank = Annotated[
    int | None,
    typer.Option(min=0, help="Number of this machine, from 0.", rich_help_panel=MACHINES, show_default=False),
]
MasterAddr = Annotated[
    str | None,
    typer.Option(
        help="Name or address of machine 0; by default the first of --hostfile.",
        rich_help_panel=MACHINES,
        show_default=False,
    ),
]
MasterPort = Annotated[
    int, typer.Option(min=1, max=65535, help="Port where machines meet.", rich_help_panel=MACHINES)
]
RdzvId = Annotated[
    str | None,
    typer.Option(
        help="Name under which the machines meet; by default the name of the output folder.",
        rich_help_panel=MACHINES,
        show_default=False,
    ),
]
RdzvTimeout = Annotated[
    int, typer.Option(min=1, help="Seconds to wait for the other machines.", rich_help_panel=MACHINES)
]
Hostfile = Annotated[
    str | None,
    typer.Option(
        help="File with lines such as: worker-0 slots=8", rich_help_panel=MACHINES, show_default=False
    ),
]
MaxRestarts = Annotated[
    int,
    typer.Option(
        min=0,
        help="Number of times that all processes are restarted after one was lost.",
        rich_help_panel=MACHINES,
    ),
]
_GOES_ON = "the same command continues from the last checkpoint"
_VALUED = {f"--{field.name.replace('_', '-')}" for field in fields(LaunchFlags)}


def carry_out_everywhere(
    config: RunConfig,
    flags: LaunchFlags,
    arguments: Sequence[str],
    work: Callable[[], None],
    check: Callable[[Topology], None] = lambda _: None,
) -> bool:
    """Do `work` in as many processes as flags and configuration ask for.

    arguments: those of this command, which every process gets too. check: raises the errors that can be found before
    processes are started; a process that does the work alone finds them itself. Returns whether the work is done and
    this process may tell the user what comes next. Raises DovetailError, and typer.Exit after a signal.
    """
    try:
        return _carry_out(config, flags, arguments, work, check)
    except RunInterrupted as end:
        typer.echo(f"\n{end.message}; {end.hint}", err=True)
        raise typer.Exit(end.exit_code) from None
    except Stopped as stopped:
        typer.echo(f"\nstopped by {stopped}; {_GOES_ON}", err=True)
        raise typer.Exit(128 + stopped.number) from None
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; {_GOES_ON}", err=True)
        raise typer.Exit(130) from None


def _carry_out(
    config: RunConfig,
    flags: LaunchFlags,
    arguments: Sequence[str],
    work: Callable[[], None],
    check: Callable[[Topology], None],
) -> bool:
    if is_rank():
        _as_rank(config, work)
        return False
    topology = topology_for(config, flags)
    if topology.node_rank is None:
        typer.echo("\n".join(commands(topology, arguments)))
        return False
    if topology.size == 1 and not config.offload.models and not topology.max_restarts:
        work()
    else:
        with _quiet_stores():  # before torch is imported
            check(topology)
            with signals_kept():
                from dovetail.launch.start import start  # here and not above: it imports torch
        start(topology, _command(topology, arguments), config.output_dir)
    return topology.node_rank == 0


def topology_for(config: RunConfig, flags: LaunchFlags) -> Topology:
    """Return the checked topology of a run. Raises ConfigError."""
    name = Path(config.output_dir).absolute().name or "dovetail"
    topology = topology_of(flags, num_gpus=config.num_gpus, run_name=name, count_gpus=_count_gpus)
    _expect_possible(config, topology.size, topology.num_gpus)
    return topology


def commands(topology: Topology, arguments: Sequence[str]) -> Iterator[str]:
    """Yield the command for each machine, under a line that names the machine."""
    if topology.master_addr is None:
        yield "# replace NODE0 by a name of node 0 that the others can reach"
    for rank in range(topology.num_nodes):
        flags = {
            "--num-gpus": topology.num_gpus,
            "--num-nodes": topology.num_nodes,
            "--node-rank": rank,
            "--master-addr": topology.master_addr or "NODE0",
            "--master-port": topology.master_port,
            "--rdzv-id": topology.rdzv_id,
            "--rdzv-timeout": topology.rdzv_timeout,
            "--max-restarts": topology.max_restarts,
        }
        words = [str(word) for flag in flags.items() for word in flag]
        yield f"# on {topology.hosts[rank] if topology.hosts else f'node {rank}'}"
        yield shlex.join(["dovetail", *without_launch_flags(arguments), *words])


def without_launch_flags(arguments: Sequence[str]) -> list[str]:
    """Return the arguments that say what to run, without those that say where."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, _ = word.partition("=")
        if name not in _VALUED:
            kept.append(word)
        elif not equals:
            next(words, None)
    return kept


def expect_gpus(config: RunConfig, topology: Topology) -> None:
    """Raise ConfigError if this machine has GPUs, but fewer than it has processes of the run."""
    if config.device != "cpu":
        expect_enough_gpus(topology.num_gpus, _count_gpus())


def _as_rank(config: RunConfig, work: Callable[[], None]) -> None:
    from dovetail.launch.rank import as_rank

    with as_rank():
        # here and not above: it imports torch
        from dovetail.parallel.world import described_world, shared_store

        world = described_world()
        _expect_possible(config, world.size, world.local_size)
        if world.size == 1:
            work()
            return
        from dovetail.launch.inputs import inputs_of
        from dovetail.launch.preflight import preflight
        from dovetail.launch.stuck import watched

        preflight(config.output_dir, inputs_of(config), device=config.device)
        with watched(shared_store()):
            work()


def _command(topology: Topology, arguments: Sequence[str]) -> list[str]:
    program = [sys.executable, "-u", "-X", "faulthandler", "-m", "dovetail"]
    return [*program, *without_launch_flags(arguments), "--num-gpus", str(topology.num_gpus)]


@contextmanager
def _quiet_stores() -> Iterator[None]:
    """Hide warnings of torch's C++ code in the launcher, if torch is imported in the block.

    Torch reads its log level then. It warns with stack traces when another machine is gone; the processes of the run
    still write such warnings to their logs.
    """
    given = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        yield
    finally:
        if given is None:
            del os.environ["TORCH_CPP_LOG_LEVEL"]


def _expect_possible(config: RunConfig, world_size: int, per_machine: int) -> None:
    expect_enough_work(
        {f"{stage}.batch_size": getattr(config, stage).batch_size for stage in config.stages},
        max(1, world_size // config.tensor_parallel.training),
    )
    config.zero_stage.shard_size(processes=world_size, per_machine=per_machine)


def _count_gpus() -> int:
    import torch  # here and not above: --help must not wait for it

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
