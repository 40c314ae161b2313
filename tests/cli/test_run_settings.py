from pathlib import Path

import pytest

from dovetail.cli.run_settings import Flags, resolve
from dovetail.errors import ConfigError


def test_a_model_alone_gets_a_recipe_and_a_folder_of_its_own() -> None:
    resolved = resolve(None, (), Flags(actor_model="facebook/opt-iml-1.3b"))
    assert resolved.config.actor.path == "facebook/opt-iml-1.3b"
    assert resolved.config.output_dir == "runs/opt-iml-1.3b"
    assert resolved.config.reward_model is not None
    assert resolved.config.reward_model.path == "facebook/opt-350m"
    assert resolved.notes == ["recipe opt-1.3b for facebook/opt-iml-1.3b: same family, nearest in size"]


def test_the_short_names_of_deepspeed_chat_mean_opt_models() -> None:
    config = resolve(None, (), Flags(actor_model="1.3b", reward_model="350m")).config
    assert config.actor.path == "facebook/opt-1.3b"
    assert config.reward_model is not None
    assert config.reward_model.path == "facebook/opt-350m"


def test_flags_become_settings_and_overrides_win() -> None:
    flags = Flags(output_dir="runs/mine", step=("1", "ppo"), seed=4, num_gpus=1)
    config = resolve("opt-125m", ["seed=5"], flags).config
    assert config.output_dir == "runs/mine"
    assert config.stages == ("sft", "ppo")
    assert config.seed == 5


def test_an_override_in_the_place_of_the_recipe_is_an_override() -> None:
    config = resolve("sft.epochs=3", ["seed=1"], Flags(actor_model="facebook/opt-125m")).config
    assert (config.sft.epochs, config.seed) == (3, 1)


def test_an_override_may_be_longer_than_a_file_name() -> None:
    files = ", ".join(f"my_{i}.jsonl" for i in range(100))
    config = resolve(f"data.blend=[{files}]", (), Flags(actor_model="gpt2")).config
    assert len(config.data.blend) == 100


def test_data_are_names_files_weights_and_mappings(tmp_path: Path) -> None:
    sources = tmp_path / "sources.yaml"
    sources.write_text("- rm-static\n- {path: b.csv, chosen: x, rejected: y, weight: 3}\n")
    items = ("a.jsonl:2", "{path: c.parquet, text: body}", str(sources))
    blend = resolve("opt-125m", (), Flags(data=items)).config.data.blend
    assert [source.path for source in blend] == ["a.jsonl", "c.parquet", "rm-static", "b.csv"]
    assert [source.weight for source in blend] == [2, None, None, 3]
    assert (blend[1].text, blend[3].chosen) == ("body", "x")


def test_a_data_file_may_hold_all_data_settings(tmp_path: Path) -> None:
    file = tmp_path / "data.yaml"
    file.write_text("blend: [a.jsonl]\nstage_split: [1, 1, 1]\nheld_out_fraction: 0.1\n")
    data = resolve("opt-125m", (), Flags(data=(str(file),))).config.data
    assert [source.path for source in data.blend] == ["a.jsonl"]
    assert (data.stage_split, data.held_out_fraction, data.max_tokens) == ((1, 1, 1), 0.1, 512)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (Flags(), "neither a recipe nor a model was given"),
        (Flags(actor_model="350m", step=("4",)), "--step 4: no such stage"),
        (Flags(actor_model="350m", data=("none.yaml",)), "--data none.yaml: no such file"),
        (Flags(actor_model="350m", data=("n" * 300 + ".yaml",)), "n.yaml: no such file"),
        (Flags(actor_model="350m", data=("{path: x",)), "not valid YAML"),
    ],
)
def test_what_cannot_be_is_said_plainly(flags: Flags, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(None, (), flags)


def test_zero_stages_become_settings() -> None:
    config = resolve(None, (), Flags(actor_model="350m", actor_zero_stage=0, reward_zero_stage=3)).config
    assert (config.zero_stage.actor, config.zero_stage.critic) == (0, 3)
    given = resolve(None, ("zero_stage.actor=2",), Flags(actor_model="350m", actor_zero_stage=3)).config
    assert given.zero_stage.actor == 2
