"""A thread's own line, and the collective it called there, read off a stack of functions from the files of torch."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch

from dovetail.telemetry.stack import frames_of, own_line

TORCH = Path(torch.__file__).parent

Seen = list[tuple[FrameType | None, str | None]]


def called_from(place: str, then: Callable[[], None]) -> Callable[[], None]:
    """A function `file.py:name` of torch that calls the next one."""
    file, name = place.split(":")
    names: dict[str, Callable[[], None]] = {"then": then}
    exec(compile(f"def {name}(): then()", str(TORCH / file), "exec"), names)
    return names[name]


@pytest.mark.parametrize(
    ("stack", "collective"),
    [
        ([], None),
        (["nn/modules/linear.py:forward"], None),
        (["distributed/c10d_logger.py:wrapper", "distributed/distributed_c10d.py:all_reduce"], "all_reduce"),
        (["autograd/graph.py:run", "distributed/fsdp/_fully_shard/_fsdp_param_group.py:unshard"], "unshard"),
        # A sharded tensor that computes, and one that needs the others for it.
        (["distributed/tensor/_dispatch.py:dispatch", "nn/functional.py:linear"], None),
        (
            [
                "distributed/tensor/_dispatch.py:dispatch",
                "distributed/_functional_collectives.py:wait_tensor",
            ],
            "wait_tensor",
        ),
    ],
)
def test_the_line_that_called_torch_and_whether_it_waits_there(
    stack: list[str], collective: str | None
) -> None:
    seen: Seen = []

    def look() -> None:  # as from another thread, but without this function and the two below it
        frames = (f for f in frames_of(threading.main_thread()) if f.f_code is not look.__code__)
        seen.append(
            own_line(f for f in frames if f.f_code.co_name not in ("<genexpr>", "frames_of", "own_line"))
        )

    call = look
    for place in reversed(stack):
        call = called_from(place, call)
    call()
    [(frame, found)] = seen
    assert found == collective
    assert frame is not None
    assert Path(frame.f_code.co_filename) == Path(__file__)


def test_a_thread_that_has_ended_has_no_line() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    assert list(frames_of(thread)) == []
    assert own_line(frames_of(thread)) == (None, None)
