import json
from pathlib import Path
from typing import Any

import pytest

from dovetail.cli.run_settings import Flags, resolve
from dovetail.errors import ConfigError


def test_a_model_alone_gets_a_recipe_and_a_folder_of_its_own() -> None:
    resolved = resolve(None, (), Flags(actor_model="facebook/opt-iml-1.3b"))
    assert resolved.config.actor.path == "facebook/opt-iml-1.3b"
    assert resolved.config.output_dir == "runs/opt-iml-1.3b"
    assert resolved.config.reward_model is not None
    assert resolved.config.reward_model.path == "facebook/opt-350m"
    assert resolved.notes == [
        "recipe opt-1.3b for facebook/opt-iml-1.3b: same family, nearest in size to 1.3 B parameters; it trains all "
        "weights of the actor (learning rates: SFT 9.65e-06, reward model 5e-05, PPO 9.65e-06); the reward model "
        "starts from facebook/opt-350m"
    ]


def folder_of_shape(folder: Path, **shape: Any) -> str:
    """A model folder that has no more than a config."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape))
    return str(folder)


def test_a_tiny_model_of_a_large_family_trains_all_its_weights(tmp_path: Path) -> None:
    shape = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 2000}
    model = folder_of_shape(tmp_path / "tiny-llama", **shape)
    resolved = resolve(None, (), Flags(actor_model=model))
    assert resolved.config.actor.lora is None
    (note,) = resolved.notes
    assert "no recipe of its family is about as large, nearest in size to 0.0886 M parameters" in note
    assert "trains all weights" in note
    assert note.endswith(f"the reward model starts from {model}")


def test_adapters_that_a_recipe_brings_are_said() -> None:
    (note,) = resolve(None, (), Flags(actor_model="Qwen/Qwen3-14B")).notes
    assert "it trains adapters of rank 64 of the actor (learning rates: SFT 0.0002" in note


@pytest.mark.parametrize(
    "actor",
    [
        "bigscience/bloom-1b7",
        "google/gemma-2-2b",
        "mistralai/Mistral-7B-v0.1",
        "Qwen/Qwen2-0.5B",
        "meta-llama/Llama-2-7b",
    ],
)
@pytest.mark.parametrize("recipe", [None, "qwen3-8b", "opt-1.3b", "llama-3.1-8b"])
def test_a_reward_model_of_another_family_gives_way_to_the_actor_s_own_start(
    actor: str, recipe: str | None
) -> None:
    config = resolve(recipe, (), Flags(actor_model=actor)).config
    assert config.reward_model is None
    assert config.reward_start() == config.actor
    assert resolve(recipe, (f"actor.path={actor}",), Flags(actor_model="gpt2")).config.reward_model is None


def test_a_local_qwen2_is_not_judged_by_a_qwen3_of_the_hub(tmp_path: Path) -> None:
    shape = {"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "vocab_size": 151936}
    model = folder_of_shape(tmp_path / "mine", **shape)
    resolved = resolve(None, (), Flags(actor_model=model))
    assert "recipe qwen3-0.6b" in resolved.notes[0]
    assert resolved.config.reward_start().path == model


@pytest.mark.parametrize(
    ("actor", "reward_model"),
    [
        ("facebook/opt-iml-30b", "facebook/opt-350m"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Llama-3.2-1B"),
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-1.7B-Base"),
    ],
)
def test_a_reward_model_of_the_same_family_and_generation_stays(actor: str, reward_model: str) -> None:
    assert resolve(None, (), Flags(actor_model=actor)).config.reward_start().path == reward_model


def test_a_reward_model_that_was_given_stays_whatever_its_family(tmp_path: Path) -> None:
    flags = Flags(actor_model="google/gemma-2-2b", reward_model="350m")
    assert resolve(None, (), flags).config.reward_start().path == "facebook/opt-350m"
    override = "reward_model.path=facebook/opt-125m"
    assert (
        resolve("opt-1.3b", (override,), Flags(actor_model="gpt2"))
        .config.reward_start()
        .path.endswith("125m")
    )
    mine = tmp_path / "mine.yaml"
    mine.write_text("actor: {path: gpt2}\nreward_model: {path: facebook/opt-350m}\noutput_dir: a\n")
    config = resolve(str(mine), (), Flags(actor_model="google/gemma-2-2b")).config
    assert config.reward_start().path == "facebook/opt-350m"


def test_what_else_was_said_of_the_reward_model_is_kept() -> None:
    config = resolve("opt-1.3b", ("reward_model.lora.rank=8",), Flags(actor_model="google/gemma-2-2b")).config
    assert config.reward_model is not None
    assert (config.reward_model.path, config.reward_model.lora and config.reward_model.lora.rank) == (
        "google/gemma-2-2b",
        8,
    )


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


def test_data_of_one_s_own_is_not_split_as_the_picked_recipe_splits_its_own(tmp_path: Path) -> None:
    flags = Flags(actor_model="facebook/opt-1.3b", data=["rows.jsonl"], step=["1"])
    assert resolve(None, (), flags).config.data_of_stages().shares == (1, 0, 0)
    assert resolve(None, ["data.stage_split=[1,1,1]"], flags).config.data_of_stages().shares == (1, 1, 1)
    assert resolve("opt-1.3b", (), flags).config.data_of_stages().shares == (2, 4, 4)
    (tmp_path / "data.yaml").write_text("blend: [a.jsonl]\nstage_split: [1, 2, 3]\n", encoding="utf-8")
    own = Flags(actor_model="facebook/opt-1.3b", data=[str(tmp_path / "data.yaml")], step=["1"])
    assert resolve(None, (), own).config.data_of_stages().shares == (1, 2, 3)
