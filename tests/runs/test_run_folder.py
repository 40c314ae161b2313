import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dovetail.errors import CheckpointError
from dovetail.runs.run_folder import RunFolder

CONFIG: dict[str, Any] = {"actor": {"path": "gpt2"}, "output_dir": "a", "seed": 0}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_new_folder_gets_the_configuration_and_can_be_opened_again(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "runs" / "a", CONFIG) as folder:
        assert "gpt2" in folder.config.read_text()
    with RunFolder.open(str(tmp_path / "runs" / "a"), {**CONFIG, "output_dir": "moved"}) as folder:
        assert "moved" in folder.config.read_text()  # what may change is kept up to date


def test_a_folder_of_another_configuration_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, CONFIG) as folder:
        folder.update_summary({"gold.base": 0.5})
        (folder.checkpoints("sft") / "step-00000001").mkdir(parents=True)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="seed: 0 in the folder, 1 now"):
        RunFolder.open(tmp_path, {**CONFIG, "seed": 1})
    after = contents(tmp_path)
    assert {name: data for name, data in after.items() if name != ".lock"} == {
        name: data for name, data in before.items() if name != ".lock"
    }
    RunFolder.open(tmp_path, CONFIG).close()  # the refused attempt holds no lock


@pytest.mark.parametrize("saved", ["base/checkpoints/step-00000003", "reward/done"])
def test_a_checkpoint_or_a_finished_stage_keeps_the_folder_for_its_configuration(
    tmp_path: Path, saved: str
) -> None:
    RunFolder.open(tmp_path, CONFIG).close()
    (tmp_path / saved).mkdir(parents=True)
    for refused in (RunFolder(tmp_path).expect_usable, partial(RunFolder.open, tmp_path)):
        with pytest.raises(CheckpointError, match="seed: 0 in the folder, 1 now"):
            refused({**CONFIG, "seed": 1})


@pytest.mark.parametrize("left", ["metrics.jsonl", "logs/rank-0.log", "sft/checkpoints/.partial-step-1"])
def test_a_folder_whose_run_saved_nothing_is_free_for_any_configuration(tmp_path: Path, left: str) -> None:
    RunFolder.open(tmp_path, {**CONFIG, "actor": {"path": "a-typo"}}).close()
    (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / left).touch()
    (
        tmp_path / "config.yaml"
    ).write_text(  # a first failure may have been answered by an edit of the wrong file
        (tmp_path / "config.yaml").read_text().replace("a-typo", "another-typo")
    )
    RunFolder(tmp_path).expect_usable(CONFIG)
    with RunFolder.open(tmp_path, CONFIG) as folder:
        assert "gpt2" in folder.config.read_text()


def test_a_config_of_another_program_is_never_free(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: theirs\n")
    with pytest.raises(CheckpointError, match="was edited"):
        RunFolder.open(tmp_path, CONFIG)
    assert (tmp_path / "config.yaml").read_text() == "model: theirs\n"


def test_a_parent_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)  # root may write everywhere
    with pytest.raises(CheckpointError, match=f"you may not write to {tmp_path}"):
        RunFolder(tmp_path / "runs" / "a").expect_usable(CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_named_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    with pytest.raises(CheckpointError, match=f"this is a file: {tmp_path}/notes"):
        RunFolder(tmp_path / "notes" / "a").expect_usable(CONFIG)


def test_a_folder_that_is_not_a_run_is_refused_and_nothing_is_written_to_it(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    (tmp_path / "data").mkdir()
    with pytest.raises(CheckpointError, match=r"is not a run: .* holds data and 1 more"):
        RunFolder.open(tmp_path, CONFIG)
    assert contents(tmp_path) == {"thesis.tex": b"precious"}


def test_a_log_that_the_shell_put_there_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "training.log").touch()
    (tmp_path / ".gitignore").touch()
    RunFolder.open(tmp_path, CONFIG).close()


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(CheckpointError, match="a is a file"):
        RunFolder.open(tmp_path / "a", CONFIG)
    with pytest.raises(CheckpointError, match="cannot write"):
        RunFolder.open(tmp_path / "a" / "b", CONFIG)


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, CONFIG):
        with pytest.raises(CheckpointError, match="in use by process"):
            RunFolder.open(tmp_path, CONFIG)
        assert RunFolder(tmp_path).read_summary() == {}  # but anybody may read
    RunFolder.open(tmp_path, CONFIG).close()


def test_files_lie_where_the_documentation_says(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    found = {
        "config.yaml": folder.config,
        "metrics.jsonl": folder.metrics,
        "summary.json": folder.summary,
        "tensorboard": folder.tensorboard,
        "sft/model": folder.model("sft"),
        "reward/model": folder.model("reward"),
        "ppo/model": folder.model("ppo"),
        "ppo/model_ema": folder.model("ema"),
        "ppo/best": folder.model("best"),
        "ppo/samples.jsonl": folder.samples,
        "sft/checkpoints": folder.checkpoints("sft"),
    }
    assert {name: tmp_path / name for name in found} == found


def test_a_stage_is_done_when_it_is_marked_and_its_model_is_there(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.model("sft").mkdir(parents=True)
    assert not folder.is_done("sft")
    folder.mark_done("sft")
    assert folder.is_done("sft")
    assert not folder.is_done("ppo")
    folder.model("sft").rmdir()
    assert not folder.is_done("sft")


def test_the_summary_grows_and_mappings_are_merged(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.update_summary({"sft": {"steps": 3, "loss": 2.0}, "seconds.sft": 1.5})
    folder.update_summary({"sft": {"loss": 1.0}, "gold.sft": 0.7})
    assert json.loads(folder.summary.read_text()) == {
        "sft": {"steps": 3, "loss": 1.0},
        "seconds.sft": 1.5,
        "gold.sft": 0.7,
    }


def test_a_summary_that_is_no_json_is_written_anew_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path)
    folder.summary.write_text("{")
    folder.update_summary({"a": 1})
    assert folder.read_summary() == {"a": 1}
    assert "is not JSON" in capsys.readouterr().err
