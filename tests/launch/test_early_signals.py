"""A signal in the seconds before a run can answer it is neither lost nor fatal to what is half imported."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import pytest

from dovetail.cli.main import main
from dovetail.config.load import dump
from dovetail.launch.early_signals import STOPS, Stopped, signals_kept, stopped_by_signals
from tests.stages.runs import tiny_run


def interrupt(
    block: Callable[[], AbstractContextManager[None]], number: signal.Signals, after: list[str]
) -> None:
    """Send a signal within the block, in code that swallows every error, as an import may."""
    with block():
        with suppress(Exception):
            os.kill(os.getpid(), number)
            after.append("went on")
        after.append("left the import")


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_during_imports_is_answered_when_they_are_done(number: signal.Signals) -> None:
    before, after = signal.getsignal(number), list[str]()
    with pytest.raises(Stopped, match=number.name) as stopped:
        interrupt(signals_kept, number, after)
    assert stopped.value.number == number
    assert after == ["went on", "left the import"]
    assert signal.getsignal(number) is before


def test_a_signal_during_checks_ends_them_at_once() -> None:
    before, after = signal.getsignal(signal.SIGTERM), list[str]()

    def check() -> None:
        with stopped_by_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            after.append("went on")

    with pytest.raises(Stopped, match="SIGTERM"):
        check()
    assert after == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        after: list[str] = []
        interrupt(signals_kept, signal.SIGHUP, after)
        interrupt(stopped_by_signals, signal.SIGHUP, after)
        assert after == ["went on", "left the import"] * 2
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class SignalledImport(MetaPathFinder):
    """Sends SIGTERM when a module is looked for, and would swallow what it raised."""

    def __init__(self, module: str) -> None:
        self.module = module

    def find_spec(self, name: str, *_: Any) -> None:
        if name == self.module:
            with suppress(Exception):
                os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("module", ["dovetail.stages.checks", "dovetail.launch.start"])
def test_a_launcher_that_is_told_to_end_while_it_imports_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(tiny_run(tmp_path)))
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [SignalledImport(module), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        main(["train", str(recipe), "--num-gpus", "2"])
    assert ended.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
