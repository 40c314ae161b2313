from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from dovetail.config.model import ModelConfig
from dovetail.config.run import RunConfig
from dovetail.errors import CheckpointError
from dovetail.runs.run_identity import (
    begun_at,
    differences,
    expect_same_identity,
    fingerprint,
    write_identity,
)


def config(**changes: Any) -> dict[str, Any]:
    settings = {"actor": {"path": "gpt2"}, "output_dir": "runs/a", **changes}
    return RunConfig.model_validate(settings).model_dump(mode="json")


def test_the_file_is_a_configuration_that_can_be_given_again(tmp_path: Path) -> None:
    write_identity(tmp_path / "config.yaml", config())
    loaded = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert RunConfig.model_validate(loaded) == RunConfig(actor=ModelConfig(path="gpt2"), output_dir="runs/a")


def test_the_file_keeps_when_the_run_began(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    assert begun_at(file) is None
    write_identity(file, config())
    first = begun_at(file)
    assert first is not None
    file.write_text(file.read_text().replace(first.isoformat(), "2020-02-29T12:00:00"))
    write_identity(file, config(device="cpu"))
    assert begun_at(file) == datetime(2020, 2, 29, 12)
    expect_same_identity(file, config())


def test_the_same_configuration_is_accepted(tmp_path: Path) -> None:
    write_identity(tmp_path / "config.yaml", config())
    expect_same_identity(tmp_path / "config.yaml", config())


def test_what_does_not_change_the_result_may_change(tmp_path: Path) -> None:
    write_identity(tmp_path / "config.yaml", config())
    stage = {"micro_batch_tokens": 64, "save_every": 7, "keep_checkpoints": 5}
    other = config(
        output_dir="elsewhere",
        device="cuda",
        stages=["ppo"],
        tracking={"tensorboard": False, "wandb_project": "p", "print_every": 3},
        data={"cache_dir": "/cache"},
        sft=stage,
        reward=stage,
        ppo={**stage, "print_samples_every": 2},
    )
    expect_same_identity(tmp_path / "config.yaml", other)


def test_another_configuration_is_refused_with_the_settings_that_differ(tmp_path: Path) -> None:
    write_identity(
        tmp_path / "config.yaml", config(ppo={"gamma": 1.0}, data={"blend": [{"path": "a.jsonl"}]})
    )
    other = config(ppo={"gamma": 0.9}, data={"blend": [{"path": "b.jsonl"}]}, seed=3)
    with pytest.raises(CheckpointError) as caught:
        expect_same_identity(tmp_path / "config.yaml", other)
    for line in (
        "\n  ppo.gamma: 1.0 in the folder, 0.9 now",
        '\n  data.blend[0].path: "a.jsonl" in the folder, "b.jsonl" now',
        "\n  seed: 0 in the folder, 3 now",
    ):
        assert line in caught.value.message
    assert "output_dir" in str(caught.value.hint)


def finished_run(folder: Path, *stages: str, **changes: Any) -> Path:
    """The config.yaml of a run in which these stages are done."""
    for stage in stages:
        (folder / stage / "model").mkdir(parents=True)
        (folder / stage / "done").touch()
    write_identity(folder / "config.yaml", config(**changes))
    return folder / "config.yaml"


def hint_for(path: Path, **changes: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        expect_same_identity(path, config(**changes))
    return str(caught.value.hint)


def test_other_settings_of_ppo_are_told_the_way_to_the_same_models(tmp_path: Path) -> None:
    path = finished_run(tmp_path, "sft", "reward")
    models = f"--actor-model {tmp_path}/sft/model --reward-model {tmp_path}/reward/model"
    assert f"dovetail ppo {path} {models} --output-dir" in hint_for(path, ppo={"gamma": 0.9})
    command = f"dovetail train {path} --actor-model {tmp_path}/sft/model --step 2 3 --output-dir"
    assert command in hint_for(path, reward={"epochs": 2.0}, ppo={"gamma": 0.9})


def test_other_settings_of_dpo_are_told_the_way_to_the_same_sft_model(tmp_path: Path) -> None:
    path = finished_run(tmp_path, "sft", algorithm="dpo")
    command = f"dovetail train {path} --actor-model {tmp_path}/sft/model --step dpo --output-dir"
    assert command in hint_for(path, algorithm="dpo", dpo={"loss": "ipo"})


@pytest.mark.parametrize(
    ("done", "changes"),
    [
        (("sft",), {"ppo": {"gamma": 0.9}, "seed": 1}),
        (("sft", "reward"), {"sft": {"epochs": 2.0}}),
        ((), {"ppo": {"gamma": 0.9}}),
    ],
)
def test_no_way_is_told_that_leads_to_other_models(
    tmp_path: Path, done: tuple[str, ...], changes: dict[str, Any]
) -> None:
    assert "dovetail" not in hint_for(finished_run(tmp_path, *done), **changes)


def test_many_differences_are_counted_not_listed(tmp_path: Path) -> None:
    write_identity(tmp_path / "config.yaml", {f"s{i}": i for i in range(20)})
    with pytest.raises(CheckpointError, match="and 12 more"):
        expect_same_identity(tmp_path / "config.yaml", {f"s{i}": -1 - i for i in range(20)})


def test_a_setting_on_one_side_only_is_a_difference() -> None:
    assert differences({"a": 1}, {"a": 1, "b": [1, 2]}) == ["b: not set in the folder, [1, 2] now"]
    assert differences({"a": {}}, {"a": None}) == ["a: {} in the folder, null now"]


def test_an_edited_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_identity(path, config())
    path.write_text(path.read_text().replace("gamma: 1.0", "gamma: 0.9"))
    with pytest.raises(CheckpointError, match="was edited"):
        expect_same_identity(path, config(ppo={"gamma": 0.9}))


@pytest.mark.parametrize("text", ["[unclosed", "just text", ""])
def test_a_file_of_other_origin_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.yaml (cannot be read|was edited)"):
        expect_same_identity(tmp_path / "config.yaml", config())


def test_the_fingerprint_does_not_depend_on_order_or_on_tuples() -> None:
    assert fingerprint({"a": 1, "b": {"c": (1, 2), "d": 3}}) == fingerprint(
        {"b": {"d": 3, "c": [1, 2]}, "a": 1}
    )
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
