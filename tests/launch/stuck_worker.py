"""One rank of a stuck run: `stuck_worker.py RANK PORT HOW [DEVICE]`; rank 1 does not come to the second sum."""

import os
import signal
import sys
import time
from email.utils import parsedate_to_datetime as parse_date
from hashlib import pbkdf2_hmac

import torch
import torch.distributed as dist

from dovetail.launch.stuck import watched
from dovetail.parallel.world import shared_store


def load_rows(how: str) -> None:
    match how:
        case "asleep":
            time.sleep(600)
        case "frozen":
            time.sleep(1)  # the watch must have been seen
            os.kill(os.getpid(), signal.SIGSTOP)
        case "busy":
            end = time.monotonic() + 6
            while time.monotonic() < end:  # as of rows, each read in many lines of Python
                parse_date("Mon, 16 Nov 2009 13:32:02 +0100")
        case "native":
            begin = time.thread_time()
            work_in_one_call(rounds := 100_000)
            work_in_one_call(int(rounds * 6 / (time.thread_time() - begin)))


def work_in_one_call(rounds: int) -> None:
    """One call without a line of Python, during which other threads run."""
    pbkdf2_hmac("sha256", b"word", b"salt", rounds)


def main(rank: str, port: str, how: str, kind: str = "cpu") -> None:
    os.environ |= {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    device = torch.device("cuda", int(rank)) if kind == "cuda" else torch.device("cpu")
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    dist.all_reduce(number := torch.ones(1, device=device))
    with watched(shared_store(), stuck_after_s=2):
        if rank == "1":
            load_rows(how)
        dist.all_reduce(number)
        number.item()  # where a process waits for its GPU


main(*sys.argv[1:])
