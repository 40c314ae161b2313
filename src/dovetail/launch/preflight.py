"""Check that all processes fit together before they load weights, because loading may take minutes.

Responsible for: equal versions, settings and input files, one shared output folder, a GPU for every process, one
correct all-reduce. Not responsible for: which settings and files are compared (inputs.py), ports and missing machines
(rendezvous.py), the run's own process group.
"""

import os
import platform
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

import dovetail
from dovetail.errors import ConfigError, LaunchError
from dovetail.launch.inputs import Inputs
from dovetail.parallel.world import shared_store

TIMEOUT_S = 300
"""Seconds for which processes wait for one another."""


def preflight(
    output_dir: str | Path, inputs: Inputs, *, device: str = "auto", patience_s: float = 10
) -> None:
    """Check that the processes fit together; all of them call it, and all raise the same LaunchError or ConfigError.

    It uses the process group if this process has joined one, else a group of its own during the checks.
    device: cpu, cuda or auto, as in the recipe. patience_s: seconds until the other ranks must see a file of rank 0,
    which takes time on network file systems.
    """
    on_gpu = device != "cpu" and torch.cuda.is_available()
    with _group(on_gpu) as where:
        _expect_equal_versions(_gathered(_versions()))
        _expect_equal_inputs(_gathered((inputs, socket.gethostname())))
        _expect_shared(Path(output_dir), patience_s)
        _expect_right_sum(where)


@contextmanager
def _group(on_gpu: bool) -> Iterator[torch.device]:
    device = _device() if on_gpu else torch.device("cpu")
    if dist.is_initialized():
        yield device
        return
    timeout = timedelta(seconds=TIMEOUT_S)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            # The prefix keeps the keys apart from those of the run's own group, which has the same name.
            store=PrefixStore("preflight", shared_store(timeout)),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"this process could not join the others at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} within {TIMEOUT_S} s: {_first_line(error)}",
            hint="the machines must reach each other on all ports; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name "
            "the network interface when a machine has several",
        ) from error
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _device() -> torch.device:
    local_rank, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= found:
        raise LaunchError(
            f"rank {os.environ.get('RANK')} is process {local_rank} (from 0) of {socket.gethostname()}, which has "
            f"{found} GPU{'s' if found > 1 else ''}",
            hint=f"start at most {found} processes there; see CUDA_VISIBLE_DEVICES if there should be more",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _versions() -> dict[str, str]:
    try:
        transformers = version("transformers")
    except PackageNotFoundError:
        transformers = "missing"
    return {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers,
        "dovetail": dovetail.__version__,
        "host": socket.gethostname(),
    }


def _expect_equal_versions(of_ranks: Sequence[dict[str, str]]) -> None:
    first = of_ranks[0]
    for rank, versions in enumerate(of_ranks):
        wrong = [name for name in first if name != "host" and versions[name] != first[name]]
        if wrong:
            found = ", ".join(f"{name} {versions[name]} (rank 0: {first[name]})" for name in wrong)
            raise LaunchError(
                f"rank {rank} on {versions['host']} has {found}; rank 0 is on {first['host']}",
                hint="install the same versions on all machines; `dovetail doctor` prints them",
            )


def _expect_equal_inputs(of_ranks: Sequence[tuple[Inputs, str]]) -> None:
    first, host_of_first = of_ranks[0]
    for rank, (inputs, host) in enumerate(of_ranks):
        if difference := inputs.difference(first):
            raise ConfigError(
                f"rank {rank} on {host} has {difference}; rank 0 is on {host_of_first}",
                hint="give the same command, recipe and files on all machines",
            )


def _expect_shared(folder: Path, patience_s: float) -> None:
    """Raise LaunchError unless all ranks see a file that rank 0 writes into the folder."""
    token = folder.absolute() / f".preflight-{uuid.uuid4().hex}"
    problem = _write(token) if dist.get_rank() == 0 else None
    name, problem, writer = _gathered((token.name, problem, socket.gethostname()))[0]
    if problem is not None:
        raise LaunchError(
            f"rank 0 on {writer} cannot write to {folder}: {problem}",
            hint="give an output_dir that can be written to",
        )
    seen = _appears(folder.absolute() / name, patience_s)
    places = _gathered((seen, socket.gethostname(), str(folder.absolute())))
    if dist.get_rank() == 0:
        token.unlink(missing_ok=True)
    for rank, (is_seen, host, place) in enumerate(places):
        if not is_seen:
            raise LaunchError(
                f"rank {rank} on {host} does not see what rank 0 on {places[0][1]} wrote to {places[0][2]}"
                + (f": its output_dir is {place}" if place != places[0][2] else ""),
                hint="output_dir must be on a file system that all machines share, under the same path",
            )


def _write(token: Path) -> str | None:
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_text("dovetail", encoding="utf-8")
    except OSError as error:
        return error.strerror or str(error)
    return None


def _appears(file: Path, patience_s: float) -> bool:
    end = time.monotonic() + patience_s
    while not file.is_file():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _expect_right_sum(device: torch.device) -> None:
    """Raise LaunchError unless an all-reduce of 1, 2, ... n is right on the device that training will use."""
    number = torch.tensor([float(dist.get_rank() + 1)], device=device)
    try:
        dist.all_reduce(number)
        found = float(number.item())
    except RuntimeError as error:
        raise LaunchError(
            f"rank {dist.get_rank()} on {socket.gethostname()} could not all-reduce a number on {device}: "
            f"{_first_line(error)}",
            hint="NCCL_DEBUG=INFO in the environment makes NCCL say what it tries",
        ) from error
    expected = dist.get_world_size() * (dist.get_world_size() + 1) / 2
    if found != expected:
        raise LaunchError(
            f"the all-reduce of 1 to {dist.get_world_size()} on {device} gave {found:g} and not {expected:g}",
            hint="do not train on this: check the GPUs, their links and the NCCL version",
        )


def _gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
