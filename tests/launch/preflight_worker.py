"""One rank of the preflight tests: `preflight_worker.py RANK FOLDER FAULT:PORT...`.

Runs a preflight of two ranks for each fault; rank 1 is the odd one. Prints what each raised, as JSON by fault.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist

from dovetail.errors import ConfigError, LaunchError
from dovetail.launch import preflight
from dovetail.launch.inputs import Inputs

ADD_UP = dist.all_reduce


def add_too_much(tensor: torch.Tensor) -> None:
    tensor += 4
    ADD_UP(tensor)


@contextmanager
def oddness(fault: str, folder: str) -> Iterator[str]:
    """The folder to use while this rank is odd in one respect."""
    match fault:
        case "version":
            with patch.object(preflight.dovetail, "__version__", "0.0.7"):
                yield folder
        case "sum":
            with patch.object(dist, "all_reduce", add_too_much):
                yield folder
        case "folder":
            yield f"{folder}-elsewhere"
        case _:
            yield folder


def inputs(fault: str) -> Inputs:
    settings = {"ppo.gamma": "0.9" if fault == "setting" else "1.0", "seed": "7"}
    files = {"pairs.jsonl": "12 bytes, hash ab" if fault == "data" else "12 bytes, hash cd"}
    return Inputs(settings, None if fault == "joined" else files)


def outcome(fault: str, folder: str, rank: str) -> str:
    if fault == "missing" and rank == "1":
        return "stayed away"
    if fault == "file":
        folder = f"{folder}-file"
    if fault == "joined":
        dist.init_process_group("gloo")
    with oddness(fault if rank == "1" else "none", folder) as seen:
        try:
            preflight.preflight(seen, inputs(fault if rank == "1" else "none"), device="cpu", patience_s=0.5)
        except (ConfigError, LaunchError) as error:
            return error.message
    joined = "still joined" if dist.is_initialized() else "left"
    if joined == "left":  # and now comes the run
        dist.init_process_group("gloo")
    dist.barrier()
    dist.destroy_process_group()
    return f"ok, {joined}"


def main(rank: str, folder: str, *cases: str) -> None:
    os.environ |= {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
    told = {}
    for case in cases:
        fault, os.environ["MASTER_PORT"] = case.split(":")
        preflight.TIMEOUT_S = 2 if fault == "missing" else 60
        told[fault] = outcome(fault, folder, rank)
    sys.stdout.write(json.dumps(told))


main(*sys.argv[1:])
