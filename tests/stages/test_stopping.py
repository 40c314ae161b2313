"""A signal ends a run after the step it is in, and the same command goes on as if nothing had been."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dovetail.errors import RunInterrupted
from dovetail.parallel.world import ALONE, World
from dovetail.stages import pipeline
from dovetail.stages.stopping import SIGNALS, stop_request
from dovetail.telemetry.metrics import Metrics
from tests.stages.runs import tiny_run

MODELS = ("sft/model", "ppo/model", "ppo/model_ema", "ppo/best")
SELDOM: dict[str, Any] = {stage: {"save_every": 100} for stage in ("sft", "ppo")}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


def signal_at(stage: str, step: int, number: int, patch: pytest.MonkeyPatch) -> None:
    """The process is sent the signal while that step is under way."""
    record = Metrics.record

    def record_and_signal(metrics: Metrics, at: int, values: Any) -> None:
        record(metrics, at, values)
        if at == step and any(name.startswith(f"{stage}/") for name in values):
            os.kill(os.getpid(), number)

    patch.setattr(Metrics, "record", record_and_signal)


def test_a_run_stopped_by_signals_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text("def score(answers):\n    return [float(len(answer.text)) for answer in answers]\n")
    changes = SELDOM | {"stages": ("sft", "ppo")}
    changes["ppo"] = changes["ppo"] | {"reward_function": f"{judge}:score"}
    whole, stopped = (tiny_run(tmp_path, output_dir=str(tmp_path / name), **changes) for name in ("a", "b"))
    pipeline.run(whole)
    for stage, step, name in (("sft", 2, "SIGTERM"), ("ppo", 1, "SIGINT")):
        with monkeypatch.context() as patch:
            signal_at(stage, step, signal.Signals[name], patch)
            with pytest.raises(RunInterrupted) as end:
                pipeline.run(stopped)
        assert end.value.message == f"{stage}: ended by {name} after step {step} of 3, which is saved"
        assert (tmp_path / "b" / stage / "checkpoints" / f"step-0000000{step}").is_dir()
        assert f"{name}: the run saves a checkpoint after this step and ends" in capfd.readouterr().err
    pipeline.run(stopped)
    for model in MODELS:
        found, wanted = ((tmp_path / run / model / "model.safetensors").read_bytes() for run in "ba")
        assert found == wanted, model


def test_a_signal_between_two_stages_ends_the_run_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tmp_path, stages=("sft", "reward"), sft={"max_steps": 1})
    signal_at("sft", 1, signal.SIGTERM, monkeypatch)
    with pytest.raises(RunInterrupted, match="ended by SIGTERM before stage 2"):
        pipeline.run(config)
    assert (tmp_path / "run" / "sft" / "done").exists()
    assert not (tmp_path / "run" / "reward").exists()


def test_alone_the_second_signal_ends_the_process(capfd: pytest.CaptureFixture[str]) -> None:
    with stop_request(ALONE) as request:
        assert request.asked() is None
        os.kill(os.getpid(), signal.SIGINT)
        assert request.asked() == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert "SIGINT: the run saves" in capfd.readouterr().err


def test_one_of_several_takes_no_notice_of_more(capfd: pytest.CaptureFixture[str]) -> None:
    with stop_request(World(is_group=True)) as request:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert request.asked() == "SIGINT"
    assert capfd.readouterr().err == ""


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # as of a command that a shell put in the background
    try:
        with stop_request(ALONE) as request:
            os.kill(os.getpid(), signal.SIGINT)
            assert request.asked() is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_than_the_main_one_nothing_changes() -> None:
    asked: list[str | None] = []

    def run() -> None:
        with stop_request(ALONE) as request:
            asked.append(request.asked())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert asked == [None]
