"""A signal reaches the processes also where nobody can be told of it."""

import os
import signal
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.agent.server.api import WorkerState

from dovetail.launch.agent import Agent
from dovetail.parallel.world import World
from dovetail.stages.stopping import stop_request


@pytest.fixture
def broken_screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As of a terminal that has gone, or a program that read and has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as screen:
        monkeypatch.setattr(sys, "__stderr__", screen)
        yield
        monkeypatch.undo()


@pytest.mark.usefixtures("broken_screen")
def test_a_launcher_that_cannot_write_passes_a_signal_on() -> None:
    sent: list[int] = []
    process = SimpleNamespace(send_signal=sent.append)
    agent: Any = SimpleNamespace(
        asked=None,
        _worker_group=SimpleNamespace(state=WorkerState.HEALTHY),
        _processes=lambda: [process, process],
    )
    Agent._pass_on(agent, signal.SIGTERM, None)
    assert sent == [signal.SIGTERM] * 2


@pytest.mark.usefixtures("broken_screen")
def test_a_process_that_cannot_write_is_asked_all_the_same() -> None:
    with stop_request(World()) as request:
        signal.raise_signal(signal.SIGTERM)
        assert request.asked() == "SIGTERM"


def test_without_a_screen_nothing_is_written_where_it_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("its number may be another file's")

    monkeypatch.setattr(sys, "__stderr__", None)
    monkeypatch.setattr(os, "write", fail)
    with stop_request(World()) as request:
        signal.raise_signal(signal.SIGTERM)
        assert request.asked() == "SIGTERM"
