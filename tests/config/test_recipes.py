import json
from pathlib import Path

import pytest

from dovetail.config.load import load
from dovetail.config.recipes import FOLDER, find_recipe, recipe_for, recipe_names
from dovetail.errors import ConfigError


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads(name: str) -> None:
    config = load(name)
    assert config.output_dir == f"runs/{name}"
    assert config.stages == ("sft", "reward", "ppo")
    assert config.data.blend


@pytest.mark.parametrize("name", recipe_names())
def test_a_full_weight_recipe_stays_at_full_weight_rates(name: str) -> None:
    config = load(name)
    highest = 3e-4 if config.actor.lora else 1e-4
    assert config.sft.optimizer.learning_rate <= highest
    assert config.sft.epochs <= 3
    assert config.ppo.actor_optimizer.learning_rate <= highest


@pytest.mark.parametrize("size", ["125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b", "175b"])
def test_each_opt_size_has_its_recipe_with_the_350m_reward_model(size: str) -> None:
    config = load(f"opt-{size}")
    assert config.actor.path == f"facebook/opt-{size}"
    assert config.reward_model is not None
    assert config.reward_model.path == "facebook/opt-350m"


def test_a_recipe_is_found_by_name_by_its_usual_path_and_as_a_file(tmp_path: Path) -> None:
    shipped = FOLDER / "opt-1.3b.yaml"
    for name in ("opt-1.3b", "opt-1.3b.yaml", "recipes/opt-1.3b.yaml", str(shipped)):
        assert find_recipe(name).samefile(shipped)
    mine = tmp_path / "opt-1.3b.yaml"
    mine.write_text("actor: {path: x}\n")
    assert find_recipe(str(mine)) == mine


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no such recipe") as caught:
        find_recipe("opt1.3b")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("did you mean opt-1.3b?")


def test_a_text_too_long_for_a_file_name_is_no_recipe() -> None:
    with pytest.raises(ConfigError, match="no such recipe"):
        find_recipe("opt" * 100)


def test_a_missing_file_elsewhere_is_not_taken_for_a_shipped_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such recipe"):
        find_recipe(str(tmp_path / "opt-1.3b.yaml"))


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        ("facebook/opt-1.3b", "opt-1.3b"),
        ("facebook/opt-iml-30b", "opt-30b"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
        ("weights/SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m"),
        ("meta-llama/Llama-2-7b-hf", "llama-3.1-8b"),
        ("Qwen/Qwen2.5-7B", "qwen3-8b"),
        ("EleutherAI/pythia-12b", "opt-13b"),
        ("gpt2", "opt-125m"),
        ("meta-llama/Llama-3.2-1B", "opt-1.3b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3.1-8b"),
        ("Qwen/Qwen2-1.5B", "qwen3-0.6b"),
        ("mistralai/Mixtral-8x7B-v0.1", "opt-66b"),
    ],
)
def test_a_model_gets_the_recipe_of_its_size_and_among_those_of_its_family(model: str, recipe: str) -> None:
    assert recipe_for(model).recipe == recipe


def test_a_folder_is_judged_by_its_shape(tmp_path: Path) -> None:
    shape = {"model_type": "opt", "hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 50272}
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape))
    assert recipe_for(str(folder)).recipe == "opt-1.3b"


@pytest.mark.parametrize(
    ("shape", "recipe"),
    [
        ({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}, "opt-125m"),
        (
            {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152},
            "smollm2-135m",
        ),
        (
            {"model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "vocab_size": 152064},
            "qwen3-8b",
        ),
        ({"model_type": "opt", "hidden_size": 12288, "num_hidden_layers": 96}, "opt-175b"),
    ],
)
def test_the_shape_of_a_folder_counts_for_more_than_its_name(
    tmp_path: Path, shape: dict[str, object], recipe: str
) -> None:
    folder = tmp_path / "llama-70b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape))
    assert recipe_for(str(folder)).recipe == recipe


def test_a_folder_of_experts_is_judged_by_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "moe-30b"
    folder.mkdir()
    shape = {"model_type": "mixtral", "hidden_size": 64, "num_hidden_layers": 2, "num_local_experts": 8}
    (folder / "config.json").write_text(json.dumps(shape))
    assert recipe_for(str(folder)).recipe == "opt-30b"


def test_a_broken_model_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        recipe_for(str(tmp_path))
