"""What a user meets when something is wrong: the right error, and nothing lost."""

import errno
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from dovetail.batches import SummedLoss
from dovetail.config.run import RunConfig
from dovetail.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DovetailError,
    ModelError,
    TrainingStopped,
)
from dovetail.model import forward
from dovetail.model.load import load_causal_lm
from dovetail.runs.checkpoint import Checkpoints
from dovetail.runs.disk import open_file
from dovetail.stages import context, pipeline, sft
from tests.stages.runs import tiny_run, write_rows

SFT = ("sft",)


def test_the_folder_of_another_configuration_is_refused_and_left_alone(tmp_path: Path) -> None:
    pipeline.run(tiny_run(tmp_path, stages=SFT))
    before = contents(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"sft\.batch_size: 4 in the folder, 2 now"):
        pipeline.run(tiny_run(tmp_path, stages=SFT, sft={"batch_size": 2}))
    assert contents(tmp_path / "run") == before


def test_a_folder_with_other_things_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("ten years of work")
    with pytest.raises(CheckpointError, match=r"thesis\.txt"):
        pipeline.run(tiny_run(tmp_path))
    assert contents(tmp_path / "run") == {"thesis.txt": b"ten years of work"}


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    config = with_source(tiny_run(tmp_path, stages=SFT), tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        pipeline.run(config)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_an_empty_data_file_is_named(tmp_path: Path, stage: str) -> None:
    empty = write_rows(tmp_path / "empty.jsonl", [])
    config = with_source(tiny_run(tmp_path, stages=(stage,), ppo=SCORED), empty)
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        pipeline.run(config)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_no_data_at_all_names_the_setting(tmp_path: Path, stage: str) -> None:
    with pytest.raises(DataError, match=r"data\.blend"):
        pipeline.run(tiny_run(tmp_path, stages=(stage,), data={"blend": []}, ppo=SCORED))


def test_a_row_that_is_no_json_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", \n')
    with pytest.raises(DataError, match=r"rows\.jsonl line 2"):
        pipeline.run(with_source(tiny_run(tmp_path, stages=SFT), file))


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no-such-model"):
        pipeline.run(tiny_run(tmp_path, stages=SFT, actor={"path": str(tmp_path / "no-such-model")}))


def test_ppo_without_anything_that_scores_says_so(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, stages=("ppo",)).model_copy(update={"reward_model": None})
    with pytest.raises(ConfigError, match="needs a reward model"):
        pipeline.run(config)


@pytest.mark.parametrize(
    "spec", ["nowhere.py:score", "no_such_module:score", "math:no_such_function", "score"]
)
def test_a_reward_function_that_is_not_there_is_named(tmp_path: Path, spec: str) -> None:
    with pytest.raises(ConfigError, match=r"ppo\.reward_function"):
        pipeline.run(tiny_run(tmp_path, stages=("ppo",), ppo={"reward_function": spec}))


def test_a_loss_that_stays_nan_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def bad(model: Any, micro: Any) -> SummedLoss:
        nonlocal calls
        calls += 1
        loss = forward.language_model_loss(model, micro)
        return SummedLoss(loss.total * math.nan, loss.count) if calls > 2 else loss

    monkeypatch.setattr(sft, "language_model_loss", bad)
    settings = {"max_steps": 30, "epochs": 20.0, "save_every": 2}
    config = tiny_run(tmp_path, stages=SFT, sft=settings)
    with pytest.raises(TrainingStopped, match="not finite"):
        pipeline.run(config)
    found = Checkpoints(tmp_path / "run/sft/checkpoints").latest()
    assert found is not None
    assert all(bool(t.isfinite().all()) for t in found[1]["model"].values())
    assert not (tmp_path / "run/sft/model").exists()
    monkeypatch.undo()
    pipeline.run(config)
    assert (tmp_path / "run/sft/model/model.safetensors").exists()


def test_a_single_bad_step_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def bad(model: Any, micro: Any) -> SummedLoss:
        nonlocal calls
        calls += 1
        loss = forward.language_model_loss(model, micro)
        return SummedLoss(loss.total * math.nan, loss.count) if calls == 2 else loss

    monkeypatch.setattr(sft, "language_model_loss", bad)
    pipeline.run(tiny_run(tmp_path, stages=SFT))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["sft/skipped"] for row in rows] == [0.0, 1.0, 0.0]
    model = load_causal_lm(tmp_path / "run/sft/model", dtype=torch.float32, device="cpu")
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_full_disk_costs_no_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    config = tiny_run(tmp_path, stages=(stage,), ppo=SCORED)
    with monkeypatch.context() as patch:
        patch.setattr(context, "Checkpoints", on_disk(full_from_step=2))
        with pytest.raises(CheckpointError, match="no room"):
            pipeline.run(config)
    folder = tmp_path / "run" / stage / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    found = Checkpoints(folder).latest()
    assert found is not None
    assert found[0] == 1
    pipeline.run(config)
    assert (tmp_path / "run" / stage / "done").exists()


def test_a_kl_run_away_stops_with_a_diagnosis_and_keeps_the_best_model(tmp_path: Path) -> None:
    wild = {"learning_rate": 0.3, "schedule": "constant"}
    changes = {**SCORED, "max_steps": 6, "kl_stop": 0.5, "kl_limit": 0.4, "actor_optimizer": wild}
    config = tiny_run(tmp_path, stages=("ppo",), ppo={**changes, "kl_coefficient": 0.0})
    with pytest.raises(TrainingStopped, match=r"ppo\.kl_stop = 0\.5 .*entropy") as stopped:
        pipeline.run(config)
    assert "ppo.kl_coefficient" in str(stopped.value.hint)
    assert (tmp_path / "run/ppo/best/model.safetensors").exists()
    assert not (tmp_path / "run/ppo/done").exists()


def test_a_run_whose_actor_learnt_from_nothing_does_not_end_well(tmp_path: Path) -> None:
    ppo = {**SCORED, "cut_off_answers": "leave_out", "sampling": {"max_new_tokens": 1}}
    with pytest.raises(
        TrainingStopped, match=r"ends with the actor as it began.*max_new_tokens = 1 "
    ) as stopped:
        pipeline.run(tiny_run(tmp_path, stages=("ppo",), ppo=ppo))
    assert "ppo.cut_off_answers=keep_score" in str(stopped.value.hint)
    assert not (tmp_path / "run/ppo/done").exists()


def test_scores_that_are_no_numbers_stop_the_run_and_are_never_the_best(tmp_path: Path) -> None:
    file = tmp_path / "judge.py"
    file.write_text("def score(answers):\n    return [float('nan') for answer in answers]\n")
    ppo = {"reward_function": f"{file}:score", "max_steps": 8}
    with pytest.raises(ConfigError, match=r"judge\.py:score gave 'nan' to answer 0, .*not a finite number"):
        pipeline.run(tiny_run(tmp_path, stages=("ppo",), ppo=ppo))
    assert not (tmp_path / "run/ppo/best").exists()


@pytest.mark.parametrize("too_long", ["drop", "truncate_left"])
def test_prompts_over_the_limit_are_left_out_or_cut(tmp_path: Path, too_long: str) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": f"{i}" * n} for i, n in enumerate((9, 99, 999, 12))]
    )
    config = tiny_run(
        tmp_path, stages=("ppo",), data={"max_prompt_tokens": 64, "too_long": too_long}, ppo=SCORED
    )
    pipeline.run(with_source(config, rows))
    assert (tmp_path / "run/ppo/done").exists()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_rows_longer_than_the_context_of_the_model_are_an_error_that_says_so(
    tmp_path: Path, stage: str, name: str
) -> None:
    words = "word " * 150
    row = {"prompt": words, "response": "yes", "chosen": "yes", "rejected": "no"}
    columns = {"sft": ("prompt", "response"), "reward": ("prompt", "chosen", "rejected"), "ppo": ("prompt",)}
    rows = write_rows(tmp_path / "rows.jsonl", [{k: row[k] for k in columns[stage]}] * 4)
    config = tiny_run(
        tmp_path, name, stages=(stage,), data={"max_prompt_tokens": 2000, "max_tokens": 2000}, ppo=SCORED
    )
    with pytest.raises(DovetailError, match="context"):
        pipeline.run(with_source(config, rows))


SCORED = {"reward_function": f"{Path(__file__)}:length_score"}


def length_score(answers: Any) -> list[float]:
    """A reward function."""
    return [float(len(answer.text)) for answer in answers]


def with_source(config: RunConfig, file: Path) -> RunConfig:
    """The run with this file as its only source."""
    source = config.data.blend[0].model_copy(update={"path": str(file), "stages": None, "held_out": False})
    source = source.model_copy(update={"stages": tuple(config.stages)})
    return config.model_copy(update={"data": config.data.model_copy(update={"blend": (source,)})})


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def on_disk(*, full_from_step: int) -> Callable[..., Checkpoints]:
    """Checkpoints on a disk that is full when the step of this number is saved."""

    def opened(path: Path) -> BinaryIO:
        if f"step-{full_from_step:08d}" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return open_file(path)

    return lambda folder, **options: Checkpoints(folder, open_file=opened, **options)
