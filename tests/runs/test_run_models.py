from pathlib import Path

import pytest

from dovetail.errors import ModelError
from dovetail.runs.run_models import model_folder


def finish(run: Path, *stages: str) -> None:
    for stage in stages:
        (run / stage / "model").mkdir(parents=True)
        (run / stage / "model" / "config.json").write_text("{}")


def test_a_run_means_its_ppo_model_else_its_sft_model(tmp_path: Path) -> None:
    finish(tmp_path, "sft", "reward")
    assert model_folder(str(tmp_path)) == str(tmp_path / "sft/model")
    finish(tmp_path, "ppo")
    assert model_folder(str(tmp_path)) == str(tmp_path / "ppo/model")


def test_a_run_of_dpo_means_its_dpo_model(tmp_path: Path) -> None:
    finish(tmp_path, "sft", "dpo")
    assert model_folder(str(tmp_path)) == str(tmp_path / "dpo/model")


def test_models_names_and_files_mean_themselves(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in (str(tmp_path), "facebook/opt-1.3b", "x/model.gguf"):
        assert model_folder(name) == name


def test_a_folder_with_one_gguf_file_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("")
    assert model_folder(str(tmp_path)) == str(tmp_path)


def test_an_unfinished_run_says_how_to_finish_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ModelError, match="neither a model nor a run") as caught:
        model_folder(str(tmp_path))
    assert caught.value.hint == f"finish its training first: dovetail train {tmp_path}/config.yaml"


def test_another_folder_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        model_folder(str(tmp_path))
    assert "config.json" in str(caught.value.hint)
