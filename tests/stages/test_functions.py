"""The stages as functions of Python values do what a configuration with the same rows in files does."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file

from dovetail import Trained, train_dpo, train_ppo, train_reward, train_sft
from dovetail.config.load import load
from dovetail.errors import CheckpointError, ConfigError, DataError
from dovetail.stages import pipeline
from dovetail.stages.functions import _name_of
from tests.stages.runs import save_tiny_model, write_rows

WORDS = ["red", "a dog", "seven", "over there", "no", "tea", "the sea", "why not", "once", "it is"]
DEMONSTRATIONS = [{"prompt": f"Say {word}", "response": f"{word}!"} for word in WORDS]
COMPARISONS = [{"prompt": f"Say {word}", "chosen": f"{word}!", "rejected": "um"} for word in WORDS]
PROMPTS = [{"prompt": f"Say {word}", "answer": word} for word in WORDS]
STAGE = {"batch_size": 4, "max_steps": 2, "eval_every": 2}


def quick(stage: str, **more: Any) -> dict[str, Any]:
    """Return settings with which a stage takes a second."""
    settings = {f"{stage}.{name}": value for name, value in STAGE.items()}
    return (
        settings
        | {"device": "cpu", "precision": "fp32", "tracking.tensorboard": False, "data.max_tokens": 64}
        | more
    )


PPO = quick(
    "ppo",
    **{"data.max_prompt_tokens": 32, "ppo.sampling.max_new_tokens": 8, "ppo.cut_off_answers": "keep_score"},
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def letters(completions: list[str], **columns: Any) -> list[float]:
    """A reward function in TRL's form, which this module has."""
    return [float(len(set(text))) for text in completions]


def test_rows_in_python_train_what_the_same_rows_in_a_file_train(model: Path, tmp_path: Path) -> None:
    trained = train_sft(model, DEMONSTRATIONS, output_dir=tmp_path / "mine", settings=quick("sft"))
    file = write_rows(tmp_path / "rows.jsonl", DEMONSTRATIONS)
    flags = {**quick("sft"), "actor.path": str(model), "data.blend": [str(file)], "data.stage_split": None}
    flags |= {"stages": ["sft"], "output_dir": str(tmp_path / "theirs")}
    pipeline.run(load("opt-125m", flags={name: ("test", value) for name, value in flags.items()}))
    ours, theirs = weights(trained.path), weights(tmp_path / "theirs/sft/model")
    start = weights(model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(not torch.equal(ours[name], start[name]) for name in start)


def test_a_dataset_is_rows(model: Path, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(DEMONSTRATIONS)
    one = train_sft(model, rows, output_dir=tmp_path / "one", settings=quick("sft"))
    other = train_sft(model, DEMONSTRATIONS, output_dir=tmp_path / "other", settings=quick("sft"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(one.path).values(), weights(other.path).values(), strict=True)
    )


def test_three_stages_one_after_the_other_and_their_models_load(model: Path, tmp_path: Path) -> None:
    sft = train_sft(model, DEMONSTRATIONS, output_dir=tmp_path / "sft", settings=quick("sft"))
    reward = train_reward(sft, COMPARISONS, output_dir=tmp_path / "reward", settings=quick("reward"))
    actor = train_ppo(sft, PROMPTS, reward=reward, output_dir=tmp_path / "ppo", settings=PPO)
    assert reward.model.config.num_labels == 1
    ids = actor.tokenizer("Say tea", return_tensors="pt")
    assert (
        actor.model.generate(**ids, max_new_tokens=2, do_sample=False).shape[1] == ids.input_ids.shape[1] + 2
    )
    assert actor.results["steps"] == 2
    actor.save_pretrained(tmp_path / "mine")
    copied, own = weights(tmp_path / "mine"), weights(actor.path)
    assert all(torch.equal(copied[name].to(own[name].dtype), own[name]) for name in own)


def test_functions_of_any_kind_are_rewards(model: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def local(completion: str, answer: str) -> float:
        seen.append(answer)
        return float(answer in completion)

    rewards = {letters: 0.5, local: 2.0, (lambda answers: [0.0] * len(answers)): 1.0, "exact": 1.0}
    trained = train_ppo(
        model, PROMPTS, reward=rewards, algorithm="rloo", output_dir=tmp_path / "run", settings=PPO
    )
    assert trained.path.is_dir()
    assert set(seen) <= set(WORDS)
    assert seen
    terms = load(str(tmp_path / "run/config.yaml")).ppo.reward_function
    assert [term.weight for term in terms] == [0.5, 2.0, 1.0, 1.0]
    assert terms[0].function == f"{__name__}:letters"
    assert terms[3].function == "exact"


def test_two_lambdas_have_two_names() -> None:
    assert _name_of(lambda answers: [1.0]) != _name_of(lambda answers: [2.0])


def test_two_functions_of_one_name_are_refused(model: Path, tmp_path: Path) -> None:
    def made(value: float) -> Any:
        def score(answers: list[Any]) -> list[float]:
            return [value] * len(answers)

        return score

    with pytest.raises(ConfigError, match="two reward functions are called score"):
        train_ppo(model, PROMPTS, reward=[made(1.0), made(2.0)], output_dir=tmp_path / "run", settings=PPO)


def test_comparisons_are_learnt_from_directly(model: Path, tmp_path: Path) -> None:
    settings = quick("dpo", **{"dpo.loss": "ipo"})
    trained = train_dpo(model, COMPARISONS, output_dir=tmp_path / "run", settings=settings)
    assert trained == Trained(tmp_path / "run", "dpo")
    assert trained.path.is_dir()


def test_several_sources_and_their_columns(model: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "more.jsonl", DEMONSTRATIONS[:3])
    odd = [{"q": row["prompt"], "a": row["response"]} for row in DEMONSTRATIONS[3:]]
    sources = [str(file), {"path": odd, "prompt": "q", "response": "a"}]
    train_sft(model, sources, output_dir=tmp_path / "run", settings=quick("sft"))
    blend = load(str(tmp_path / "run/config.yaml")).data.blend
    assert [source.prompt for source in blend] == [None, "q"]


def test_the_same_call_again_returns_at_once_and_other_rows_are_another_run(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        train_sft(model, DEMONSTRATIONS, output_dir=tmp_path / "run", settings=quick("sft"))
    assert "finished before, skipped" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"data\.blend"):
        train_sft(model, DEMONSTRATIONS[:5], output_dir=tmp_path / "run", settings=quick("sft"))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "the data has no rows"),
        ([{"prompt": "a", "response": "b"}, {"prompt": {1, 2}}], "row 1 of the data, column prompt: "),
        ([[1, 2]], "row 0 of the data is int, not a dictionary"),
    ],
)
def test_rows_that_are_none_are_named(model: Path, tmp_path: Path, rows: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        train_sft(model, rows, output_dir=tmp_path / "run", settings=quick("sft"))
    assert not (tmp_path / "run").exists()


def test_a_setting_that_is_none_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sft\.epoch"):
        train_sft(model, DEMONSTRATIONS, output_dir=tmp_path / "run", settings={"sft.epoch": 2})
    with pytest.raises(ConfigError, match="trains in this process alone"):
        train_sft(model, DEMONSTRATIONS, output_dir=tmp_path / "run", settings={"num_gpus": 2})
