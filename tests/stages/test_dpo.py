"""The stage of direct preference optimisation: it learns, resumes to the bit, and refuses what it cannot use."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dovetail.config.run import RunConfig
from dovetail.errors import DataError
from dovetail.runs.run_models import chat_models
from dovetail.stages import dpo, pipeline
from tests.parallel.worker import run_to
from tests.stages.runs import tiny_run, write_rows

STAGE = {
    "batch_size": 4,
    "max_steps": 3,
    "save_every": 1,
    "eval_every": 2,
    "epochs": 2.0,
    "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0, "eps": 1e-3},
}
LOSSES = ("sigmoid", "ipo", "kto", "simpo", "orpo")


def run_of(folder: Path, *, name: str = "run", lora: bool = False, **settings: Any) -> RunConfig:
    return tiny_run(
        folder,
        algorithm="dpo",
        output_dir=str(folder / name),
        actor={"lora": {"rank": 4, "alpha": 8.0} if lora else None},
        dpo={**STAGE, **settings},
    )


def results_of(config: RunConfig) -> dict[str, Any]:
    return json.loads((Path(config.output_dir) / "summary.json").read_text())["dpo"]


def model_of(config: RunConfig) -> bytes:
    return (Path(config.output_dir) / "dpo/model/model.safetensors").read_bytes()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_learns_to_prefer_what_was_chosen(loss: str, tmp_path: Path) -> None:
    optimizer = {**STAGE["optimizer"], "learning_rate": 1e-2}
    config = run_of(tmp_path, loss=loss, max_steps=20, epochs=8.0, save_every=20, optimizer=optimizer)
    pipeline.run(config)
    results = results_of(config)
    assert results["accuracy"] == 1.0
    assert results["held_out_pairs"] == 4
    assert results["reward_margin"] > 0
    rows = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    losses = [row["dpo/loss"] for row in rows if "dpo/loss" in row]
    assert losses[-1] < losses[0]
    assert rows[-1]["dpo/train_accuracy"] == 1.0


def test_the_run_ends_with_a_chat_model_and_no_reward_model(tmp_path: Path) -> None:
    config = run_of(tmp_path)
    pipeline.run(config)
    assert list(chat_models(config.output_dir)) == ["dpo", "sft"]
    assert not (Path(config.output_dir) / "reward").exists()


@pytest.mark.parametrize(("loss", "lora"), [("sigmoid", False), ("sigmoid", True), ("kto", False)])
def test_a_stopped_run_ends_with_the_same_bytes(loss: str, lora: bool, tmp_path: Path) -> None:
    undisturbed = run_of(tmp_path, loss=loss, lora=lora)
    stopped = run_of(tmp_path, name="stopped", loss=loss, lora=lora)
    pipeline.run(undisturbed)
    run_to(("dpo", 2), stopped)
    pipeline.run(stopped)
    assert model_of(stopped) == model_of(undisturbed)
    assert results_of(stopped) == results_of(undisturbed)


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_a_loss_without_a_reference_asks_the_start_model_nothing(
    loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the start model was asked")

    config = run_of(tmp_path, loss=loss)
    made = []
    honest = dpo.Preferences.__init__

    def preferences(self: Any, rows: Any, settings: Any, score: Any) -> None:
        honest(self, rows, settings, fail)
        made.append(self.batch([0]).reference_logprobs_S)

    monkeypatch.setattr(dpo.Preferences, "__init__", preferences)
    monkeypatch.setattr(dpo, "preference_quality", lambda *_: {})
    pipeline.run(config)
    assert made == [None, None]


def test_before_the_first_step_the_policy_is_the_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optimizer = {**STAGE["optimizer"], "learning_rate": 0.0}
    config = run_of(tmp_path, lora=True, optimizer=optimizer)
    pipeline.run(config)
    results = results_of(config)
    assert results["accuracy"] == 0.5
    assert results["reward_margin"] == results["chosen_reward"] == 0.0
    assert "accuracy 0.500 on 4 held-out pairs is not to be told from guessing" in capsys.readouterr().err


def test_rows_with_equal_answers_alone_end_in_an_error(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {i}", "chosen": "yes", "rejected": "yes"} for i in range(4)]
    file = write_rows(tmp_path / "equal.jsonl", rows)
    config = tiny_run(tmp_path, algorithm="dpo", stages=("dpo",))
    data = config.data.model_copy(update={"blend": (type(config.data.blend[0])(path=str(file)),)})
    with pytest.raises(DataError, match=r"no row is left to train the stage reward on: .*"):
        pipeline.run(config.model_copy(update={"data": data}))


def test_kto_refuses_a_single_row(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "one.jsonl", [{"prompt": "Say", "chosen": "yes", "rejected": "no"}])
    config = tiny_run(tmp_path, algorithm="dpo", stages=("dpo",), dpo={"loss": "kto"})
    source = type(config.data.blend[0])(path=str(file), held_out=False)
    data = config.data.model_copy(update={"blend": (source,)})
    with pytest.raises(DataError, match="only one row"):
        pipeline.run(config.model_copy(update={"data": data}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dpo": {"beta": 0}}, "greater than 0"),
        ({"dpo": {"beta": -0.1}}, "greater than 0"),
        ({"dpo": {"label_smoothing": 0.5}}, "less than 0.5"),
        ({"dpo": {"label_smoothing": 0.1, "loss": "ipo"}}, "only the loss sigmoid has it"),
        ({"stages": ("sft", "reward")}, "algorithm = dpo has no stage reward"),
        ({"algorithm": "ppo", "stages": ("dpo",)}, "algorithm = ppo has no stage dpo"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny_run(tmp_path, **{"algorithm": "dpo", **settings})
