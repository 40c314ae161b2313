"""In the processes of a launcher test: the stages are replaced by one deed, given as DEED=WHAT:RANK.

Python imports this module by itself at its start when its folder is on PYTHONPATH. The deed is done by that
rank; the others wait, as if in a collective.
"""

import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from dovetail.cli import processes
from dovetail.errors import DataError, RunInterrupted
from dovetail.launch.topology import expect_enough_work


def run(config: Any, *, is_checked: bool) -> None:
    rank, deed, doer = os.environ["RANK"], *os.environ["DEED"].split(":")
    if "PREFLIGHT" in os.environ:  # the run's own group follows on the preflight's
        import torch.distributed as dist

        dist.init_process_group("gloo")
        dist.barrier()
    sys.stdout.write(f"rank {rank} of {os.environ['WORLD_SIZE']}\n")
    folder = Path(config.output_dir)
    if deed == "finish" or (folder / "died").exists():
        return
    if deed in ANSWERS:
        signal.signal(signal.SIGTERM, ANSWERS[deed])
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    if doer == rank:
        while len(list(folder.glob("pid-*"))) < int(os.environ["WORLD_SIZE"]):
            time.sleep(0.05)  # all must be there to see it
        do(deed, folder)
    time.sleep(600)


def save_and_end(*_: object) -> None:
    raise RunInterrupted("ppo: ended by SIGTERM after step 3 of 9, which is saved")


def save_late(*_: object) -> None:
    time.sleep(3)
    save_and_end()


ANSWERS: dict[str, Any] = {"save": save_and_end, "save late": save_late, "refuse": signal.SIG_IGN}
"""What all do on SIGTERM."""


def do(deed: str, folder: Path) -> None:
    match deed:
        case "error":
            raise DataError("pairs.jsonl line 7: not JSON", hint="repair the line")
        case "bug":
            raise ZeroDivisionError("a mistake of ours")
        case "die":
            (folder / "died").touch()  # once: the next start ends well
            os.kill(os.getpid(), signal.SIGKILL)
        case "leave":
            sys.stdout.write("half a sentence\n")
            os._exit(7)


def described_world() -> Any:
    """What the real one, which imports torch, tells."""
    return SimpleNamespace(
        size=int(os.environ["WORLD_SIZE"]), local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    )


def expect_possible(config: Any, world_size: int, *_: int) -> None:
    expect_enough_work({"sft.batch_size": config.sft.batch_size}, world_size)


if "DEED" in os.environ:
    pipeline = ModuleType("dovetail.stages.pipeline")
    pipeline.run = run  # type: ignore[attr-defined]
    sys.modules["dovetail.stages.pipeline"] = pipeline
    checks = ModuleType("dovetail.stages.checks")
    checks.refuse = lambda *_: None  # type: ignore[attr-defined]
    sys.modules["dovetail.stages.checks"] = checks
    processes._expect_possible = expect_possible
    if "PREFLIGHT" not in os.environ:
        preflight = ModuleType("dovetail.launch.preflight")
        preflight.preflight = lambda *_, **__: None  # type: ignore[attr-defined]
        sys.modules["dovetail.launch.preflight"] = preflight
        world = ModuleType("dovetail.parallel.world")
        world.shared_store = lambda: None  # type: ignore[attr-defined]
        world.described_world = described_world  # type: ignore[attr-defined]
        world.World = SimpleNamespace  # type: ignore[attr-defined]
        sys.modules["dovetail.parallel.world"] = world
        stuck = ModuleType("dovetail.launch.stuck")
        stuck.watched = nullcontext  # type: ignore[attr-defined]
        sys.modules["dovetail.launch.stuck"] = stuck
