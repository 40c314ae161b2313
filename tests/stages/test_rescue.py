"""An error of the user's ends a stage: every finished step is kept, and the run goes on bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dovetail.config.run import RunConfig
from dovetail.errors import ConfigError, DataError, DovetailError, ModelError, TrainingStopped
from dovetail.parallel.world import ALONE, World
from dovetail.rlhf import attempts
from dovetail.runs.checkpoint import Checkpoints
from dovetail.stages import pipeline, supervised
from dovetail.stages.rescue import Place, saved_on_error
from tests.stages.runs import tiny_run

JUDGE = """
import os
calls = 0

def ask(answers):
    raise TimeoutError("no answer within 30 s")

def score(answers):
    global calls
    calls += 1
    if {call} <= calls < {until} and not os.environ.get("JUDGE_UP"):
        {failure}
    return [float(len(answer.text) % 7) for answer in answers]

def lazily(answers):
    yield from score(answers)
"""
FAILURES = {
    "score": ("ask(answers)", r"score raised TimeoutError: no answer within 30 s \(.*judge\.py line 6\)"),
    "lazily": ("ask(answers)", r"lazily raised TimeoutError: no answer within 30 s \(.*judge\.py line 6\)"),
    "score ": ("import sys; sys.exit('gone')", r"score raised SystemExit: gone \(.*judge\.py line 12\)"),
    "score  ": ("json.loads('')", r"score raised NameError: .* \(.*judge\.py line 12\)"),
}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "PAUSES", (0.0, 0.0))


def judged_run(
    folder: Path, function: str = "score", *, call: int, until: int = 10**6, failure: str = "ask(answers)"
) -> RunConfig:
    """PPO of five rollouts without held-out prompts; the reward function fails in its calls from `call` to `until`."""
    folder.mkdir(exist_ok=True)
    (folder / "judge.py").write_text(JUDGE.format(call=call, until=until, failure=failure))
    config = tiny_run(
        folder,
        stages=("ppo",),
        ppo={"reward_function": f"{folder}/judge.py:{function}", "save_every": 100, "max_steps": 5},
    )
    blend = [source for source in config.data.blend if not source.held_out]
    return config.model_copy(update={"data": config.data.model_copy(update={"blend": tuple(blend)})})


@pytest.mark.parametrize("name", FAILURES)
def test_a_reward_function_that_is_lost_is_named_and_costs_no_rollout(tmp_path: Path, name: str) -> None:
    failure, message = FAILURES[name]
    with pytest.raises(ConfigError, match=f"{message}; no answer of 3 batches in a row has a score"):
        pipeline.run(judged_run(tmp_path, name.strip(), call=3, failure=failure))
    assert [path.name for path in (tmp_path / "run/ppo/checkpoints").glob("step-*")] == ["step-00000004"]


@pytest.mark.parametrize("name", FAILURES)
def test_a_function_that_fails_in_its_first_batch_is_named_at_once(tmp_path: Path, name: str) -> None:
    failure, message = FAILURES[name]
    with pytest.raises(ConfigError, match=rf"{message}\nhint: "):
        pipeline.run(judged_run(tmp_path, name.strip(), call=1, failure=failure))


@pytest.mark.parametrize(("until", "failures"), [(4, 0.0), (6, 4.0)])
def test_a_function_that_fails_once_is_asked_again_and_a_lost_batch_is_counted(
    tmp_path: Path, until: int, failures: float
) -> None:
    pipeline.run(judged_run(tmp_path, call=3, until=until))
    lines = (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "reward/score_failures" in row]
    assert [row["reward/score_failures"] for row in rows] == [0.0, 0.0, failures, 0.0, 0.0]
    if failures:  # the mean of the batch before, so that nothing moves
        assert rows[2]["reward/score_mean"] == pytest.approx(rows[1]["reward/score_mean"])


def test_the_same_command_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = judged_run(tmp_path / "a", call=3)
    with pytest.raises(ConfigError):
        pipeline.run(config)
    assert (
        "ppo: the state after step 4 is saved; the same command goes on from there" in capsys.readouterr().err
    )
    monkeypatch.setenv("JUDGE_UP", "1")
    pipeline.run(config)
    monkeypatch.delenv("JUDGE_UP")
    pipeline.run(judged_run(tmp_path / "b", call=3, until=3 + 2 * 3))  # down for two batches of three tries
    one, other = _weights(tmp_path / "a"), _weights(tmp_path / "b")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run/ppo/model/model.safetensors")


def test_an_error_in_the_first_rollout_leaves_nothing_to_go_on_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="TimeoutError"):
        pipeline.run(judged_run(tmp_path, call=1))
    assert not list((tmp_path / "run/ppo").glob("checkpoints/step-*"))


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_an_error_in_a_supervised_step_keeps_the_steps_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    whole, steps = supervised.gradient_step, []

    def failing(*given: Any, **named: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            raise TrainingStopped("the loss is not finite")
        return whole(*given, **named)

    monkeypatch.setattr(supervised, "gradient_step", failing)
    with pytest.raises(TrainingStopped):
        pipeline.run(tiny_run(tmp_path, stages=(stage,), **{stage: {"save_every": 100}}))
    assert [path.name for path in (tmp_path / "run" / stage / "checkpoints").glob("step-*")] == [
        "step-00000002"
    ]


def saved(
    folder: Path, error: DovetailError, done: int | None, *, start: int = 1, world: World = ALONE
) -> list[str]:
    """The checkpoints after a loop that had come to `done` when the error was raised."""

    def loop(place: Place) -> None:
        place.done = done
        raise error

    checkpoints = Checkpoints(folder / "sft" / "checkpoints")
    with (
        pytest.raises(type(error)),
        checkpoints,
        saved_on_error(checkpoints, dict, start=start, world=world) as place,
    ):
        loop(place)
    return [path.name for path in checkpoints.folder.glob("step-*")]


@pytest.mark.parametrize("kind", [ConfigError, DataError, ModelError, TrainingStopped])
def test_any_error_of_the_user_s_saves_the_last_whole_step(tmp_path: Path, kind: type[DovetailError]) -> None:
    assert saved(tmp_path, kind("wrong"), 5) == ["step-00000005"]


def test_a_step_that_is_on_disk_or_half_done_is_not_saved(tmp_path: Path) -> None:
    assert saved(tmp_path, DataError("wrong"), None) == []
    assert saved(tmp_path, DataError("wrong"), 1, start=1) == []


def test_of_several_processes_only_an_error_of_all_is_answered(tmp_path: Path) -> None:
    several = World(size=2)
    assert saved(tmp_path, DataError("wrong"), 5, world=several) == []
    error = DataError("wrong")
    error.is_everywhere = True
    assert saved(tmp_path, error, 5, world=several) == ["step-00000005"]
