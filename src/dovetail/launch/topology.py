"""Decide how many processes a run has, on which machines, and where they meet.

Responsible for: making one `Topology` from flags, hostfile and recipe, and refusing counts that cannot work.
Not responsible for: starting processes (start.py), finding the other machines (rendezvous.py).
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dovetail.errors import ConfigError
from dovetail.launch.hostfile import Host, read_hostfile

DEFAULT_PORT = 29500
"""The port that torchrun and DeepSpeed use too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchFlags:
    """The values of the flags about processes and machines; None where one was left out."""

    num_gpus: int | None = None
    num_nodes: int | None = None
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int = DEFAULT_PORT
    rdzv_id: str | None = None
    rdzv_timeout: int = 300
    hostfile: str | None = None
    deployment_type: str | None = None
    max_restarts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The processes of a run: `num_gpus` on each of `num_nodes` machines.

    `node_rank` is this machine's number, None where it was not given; machine 0 is at
    `master_addr`. `rdzv_id` keeps two runs apart that meet at the same address; `rdzv_timeout` is in seconds.
    """

    num_gpus: int
    num_nodes: int = 1
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int = DEFAULT_PORT
    rdzv_id: str = "dovetail"
    rdzv_timeout: int = 300
    max_restarts: int = 0
    hosts: tuple[str, ...] = ()
    """Names of the machines, where a hostfile gave them."""

    @property
    def size(self) -> int:
        """The number of processes of the run."""
        return self.num_gpus * self.num_nodes

    @property
    def endpoint(self) -> str:
        """The address where the machines meet."""
        return f"{self.master_addr}:{self.master_port}"


def topology_of(
    flags: LaunchFlags, *, num_gpus: int, run_name: str, count_gpus: Callable[[], int]
) -> Topology:
    """Return the topology that flags and recipe describe.

    num_gpus: the recipe's, with the flag already applied, 1 if neither has it; run_name: the default rendezvous id;
    count_gpus: called only where the number of this machine's GPUs decides. Raises ConfigError.
    """
    hosts = _hosts(flags)
    num_nodes = flags.num_nodes or (len(hosts) if hosts else 1)
    if hosts and flags.num_gpus is None and num_gpus == 1:
        num_gpus = _equal_slots(hosts, str(flags.hostfile))
    _expect_slots(hosts, num_gpus, flags)
    num_gpus = _by_deployment_type(flags, num_gpus, num_nodes, count_gpus)
    _expect_node_rank(flags.node_rank, num_nodes)
    if flags.node_rank is not None and num_nodes > 1 and not (flags.master_addr or hosts):
        raise ConfigError(
            f"--node-rank {flags.node_rank}: the address of node 0 is missing",
            hint="give --master-addr HOST with the name of node 0 that all others can reach, or --hostfile FILE",
        )
    return Topology(
        num_gpus=num_gpus,
        num_nodes=num_nodes,
        node_rank=0 if num_nodes == 1 and not hosts else flags.node_rank,
        master_addr=flags.master_addr or (hosts[0].name if hosts else None),
        master_port=flags.master_port,
        rdzv_id=flags.rdzv_id or run_name,
        rdzv_timeout=flags.rdzv_timeout,
        max_restarts=flags.max_restarts,
        hosts=tuple(host.name for host in hosts),
    )


def is_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun or a similar launcher has started this process as one of a run."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= set(environment)


def expect_enough_work(batch_sizes: Mapping[str, int], world_size: int) -> None:
    """Raise ConfigError unless every batch has at least one row for each process."""
    for setting, batch_size in batch_sizes.items():
        if batch_size < world_size:
            raise ConfigError(
                f"{setting} = {batch_size} is smaller than the {world_size} processes: some would have nothing "
                "to do",
                hint=f"set {setting} to {world_size} or more, or use at most {batch_size} processes",
            )


def expect_enough_gpus(num_gpus: int, found: int) -> None:
    """Raise ConfigError if a machine with GPUs has fewer than the processes it is to take."""
    if 0 < found < num_gpus:
        raise ConfigError(
            f"--num-gpus {num_gpus}: this machine has {found} GPU{'s' if found > 1 else ''}",
            hint=f"use --num-gpus {found}; see nvidia-smi and CUDA_VISIBLE_DEVICES if there should be more",
        )


def _hosts(flags: LaunchFlags) -> list[Host]:
    if flags.hostfile is None:
        return []
    hosts = read_hostfile(flags.hostfile)
    if flags.num_nodes is not None and flags.num_nodes > len(hosts):
        raise ConfigError(
            f"--num-nodes {flags.num_nodes}: {flags.hostfile} has {len(hosts)} machines",
            hint="add machines to the hostfile, or lower --num-nodes",
        )
    return hosts[: flags.num_nodes]


def _expect_slots(hosts: list[Host], num_gpus: int, flags: LaunchFlags) -> None:
    asked = "num_gpus =" if flags.num_gpus is None else "--num-gpus"
    for host in hosts:
        if host.slots < num_gpus:
            raise ConfigError(
                f"{asked} {num_gpus}: {host.name} has slots={host.slots} in {flags.hostfile}",
                hint=f"set {asked} {host.slots} or less, or correct the slots",
            )


def _equal_slots(hosts: list[Host], file: str) -> int:
    fewest, most = (
        min(hosts, key=lambda host: host.slots),
        max(hosts, key=lambda host: host.slots),
    )
    if fewest.slots < most.slots:
        raise ConfigError(
            f"{file}: {fewest.name} has slots={fewest.slots} and {most.name} slots={most.slots}; machines of one "
            "run take the same number of processes",
            hint=f"add --num-gpus {fewest.slots}, which every machine has",
        )
    return most.slots


def _by_deployment_type(
    flags: LaunchFlags, num_gpus: int, num_nodes: int, count_gpus: Callable[[], int]
) -> int:
    """Return the number of processes per machine, by DeepSpeed-Chat's three deployment types."""
    match flags.deployment_type:
        case None:
            return num_gpus
        case "single_gpu" if num_gpus > 1 or num_nodes > 1:
            raise ConfigError(
                f"--deployment-type single_gpu, but {num_gpus * num_nodes} processes are asked for",
                hint="leave out --deployment-type: --num-gpus and --num-nodes are enough",
            )
        case "single_gpu":
            return 1
        case "single_node" if num_nodes > 1:
            raise ConfigError(
                f"--deployment-type single_node, but --num-nodes {num_nodes}",
                hint="use --deployment-type multi_node, or leave out one of the two",
            )
        case "multi_node" if num_nodes == 1:
            raise ConfigError(
                "--deployment-type multi_node, but nothing names more than one machine",
                hint="add --num-nodes N, or --hostfile FILE with the machines",
            )
        case "single_node" | "multi_node":
            return num_gpus if flags.num_gpus or flags.hostfile or num_gpus > 1 else _all_gpus(count_gpus)
    raise ConfigError(
        f"--deployment-type {flags.deployment_type}: no such type",
        hint="single_gpu, single_node or multi_node",
    )


def _all_gpus(count_gpus: Callable[[], int]) -> int:
    found = count_gpus()
    if found == 0:
        raise ConfigError(
            "--deployment-type takes all GPUs of a machine, and this one has none",
            hint="give the number of processes to run on the CPU: --num-gpus N",
        )
    return found


def _expect_node_rank(node_rank: int | None, num_nodes: int) -> None:
    if node_rank is not None and not 0 <= node_rank < num_nodes:
        raise ConfigError(
            f"--node-rank {node_rank}: with {num_nodes} node{'s' if num_nodes > 1 else ''} it is "
            + (f"0 to {num_nodes - 1}" if num_nodes > 1 else "0"),
            hint="number the machines from 0; --num-nodes says how many there are",
        )
