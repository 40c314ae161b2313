"""Finished models compared: the answers and scores of transformers itself, a run's own rows, a judge."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from dovetail.errors import ConfigError, ModelError
from dovetail.model.load import save_model
from dovetail.rlhf.judge import Referee
from dovetail.rlhf.tasks.named import parse_task
from dovetail.rlhf.tasks.subject import Drawing
from dovetail.serving.inference.comparison import Result, compare, contestants
from tests.fakes import byte_tokenizer, tiny_model
from tests.rlhf.test_judge import Endpoint, endpoint  # noqa: F401 (fixture)
from tests.rlhf.tiny import tiny_reward_model

DRAWING = Drawing(max_new_tokens=6)
QUESTIONS = ["Hi", "Why?", "Name a colour.", "What is two plus two?"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two language models, a copy of the first, and a reward model."""
    place = tmp_path_factory.mktemp("models")
    for name, seed in (("one", 0), ("two", 1), ("copy", 0)):
        save_model(tiny_model(seed=seed), byte_tokenizer(), place / name)
    save_model(tiny_reward_model("llama"), byte_tokenizer(), place / "reward")
    lines = [json.dumps({"prompt": question, "answer": "4"}) + "\n" for question in QUESTIONS]
    (place / "prompts.jsonl").write_text("".join(lines))
    pairs = [{"prompt": q, "chosen": "Yes, 4.", "rejected": "No" * (i + 1)} for i, q in enumerate(QUESTIONS)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return {file.name: str(file) for file in place.iterdir()}


def compared(paths: Sequence[str], *tasks: str, **more: Any) -> list[Result]:
    names = [parse_task(text) for text in tasks]
    return compare(contestants(paths), names, DRAWING, limit=100, device="cpu", **more)


def test_models_are_compared_with_the_first(folders: dict[str, str]) -> None:
    paths = [folders[name] for name in ("one", "two", "copy", "reward")]
    (result,) = compared(paths, folders["prompts.jsonl"])
    one, two, copy = (result.figures[path] for path in paths[:3])
    assert (result.num_rows, len(result.figures)) == (4, 3)
    assert "kl_nats_per_answer" not in one
    assert copy["kl_nats_per_answer"] == pytest.approx(0.0, abs=1e-5)
    assert (copy["reward_wins"], copy["reward"]) == (0.5, pytest.approx(one["reward"]))
    assert two["kl_nats_per_answer"] > 0.1
    (swapped,) = compared([paths[1], paths[0], paths[3]], folders["prompts.jsonl"])
    assert two["reward_wins"] == 1.0 - swapped.figures[paths[0]]["reward_wins"]
    assert two["reward_wins"] != 0.5
    assert 0.0 <= two["reward_wins_low"] <= two["reward_wins"] < two["reward_wins_high"] <= 1.0


def test_the_first_model_may_be_alone_and_the_tasks_of_language_need_no_reward(
    folders: dict[str, str],
) -> None:
    prompts, number = compared(
        [folders["one"]], folders["prompts.jsonl"], f"number={folders['prompts.jsonl']}"
    )
    assert set(number.figures[folders["one"]]) == {"accuracy", "accuracy_low", "accuracy_high"}
    assert prompts.figures[folders["one"]]["answer_tokens"] <= 6


@torch.no_grad()
def test_reward_models_are_judged_by_pairs_without_any_language_model(folders: dict[str, str]) -> None:
    (result,) = compared([folders["reward"]], f"pairs={folders['pairs.jsonl']}")
    found = result.figures["reward"]
    model = AutoModelForSequenceClassification.from_pretrained(folders["reward"])
    tokenizer = byte_tokenizer()
    right = []
    for index, question in enumerate(QUESTIONS):
        texts = [
            f"\n\nHuman: {question}\n\nAssistant: {answer}" for answer in ("Yes, 4.", "No" * (index + 1))
        ]
        ids = [torch.tensor([[*tokenizer(text)["input_ids"], 256]]) for text in texts]
        chosen, rejected = (float(model(input_ids=one).logits[0, 0]) for one in ids)
        right.append(float(chosen > rejected))
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))
    assert found["longer_is_chosen"] == 0.75
    assert {"calibration_error", "brier_score", "accuracy_stderr", "loss"} <= found.keys()


def test_another_vocabulary_is_told_and_gives_no_kl(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = byte_tokenizer()
    other.add_tokens(["<|more|>"])
    model = tiny_model()
    model.resize_token_embeddings(259, mean_resizing=False)
    save_model(model, other, tmp_path / "other")
    paths = [folders["one"], str(tmp_path / "other"), folders["reward"]]
    (result,) = compared(paths, folders["prompts.jsonl"])
    assert "has another vocabulary than the first model" in capsys.readouterr().err
    figures = result.figures[paths[1]]
    assert "kl_nats_per_answer" not in figures
    assert "reward_wins" in figures


def test_a_judge_that_always_takes_the_first_makes_ties(
    folders: dict[str, str],
    endpoint: Endpoint,  # noqa: F811
) -> None:
    endpoint.reply = lambda text: (200, "A")
    referee = Referee(url=endpoint.url, model="m")
    (result,) = compared([folders["one"], folders["two"]], folders["prompts.jsonl"], judge=referee)
    assert result.figures[folders["two"]]["judge_wins"] == 0.5
    assert len(endpoint.requests) == 2 * len(QUESTIONS)


def test_a_judge_sees_both_orders_and_one_that_likes_one_answer_decides(
    folders: dict[str, str],
    endpoint: Endpoint,  # noqa: F811
) -> None:
    (alone,) = compared([folders["one"], folders["two"]], folders["prompts.jsonl"])
    assert "judge_wins" not in alone.figures[folders["two"]]
    texts: set[str] = set()

    def longer(text: str) -> tuple[int, str]:
        texts.add(text)
        first, second = (
            text.split(f"<response {name}>\n")[1].split(f"\n</response {name}>")[0] for name in "AB"
        )
        return 200, "tie" if len(first) == len(second) else "**A**" if len(first) > len(second) else "B."

    endpoint.reply = longer
    referee = Referee(url=endpoint.url, model="m")
    (result,) = compared([folders["one"], folders["two"]], folders["prompts.jsonl"], judge=referee)
    (swapped,) = compared([folders["two"], folders["one"]], folders["prompts.jsonl"], judge=referee)
    share = result.figures[folders["two"]]["judge_wins"]
    assert share + swapped.figures[folders["one"]]["judge_wins"] == pytest.approx(1.0)
    assert len(texts) == 2 * len(QUESTIONS)


@pytest.mark.parametrize(("status", "reply"), [(500, "A"), (200, "both are fine")])
def test_a_judge_that_gives_no_verdict_ends_the_comparison(
    folders: dict[str, str],
    endpoint: Endpoint,  # noqa: F811
    status: int,
    reply: str,
) -> None:
    endpoint.reply = lambda text: (status, reply)
    referee = Referee(url=endpoint.url, model="m")
    with pytest.raises(
        ConfigError, match=f"the judge m at {endpoint.url} gives no verdict: it raised"
    ) as caught:
        compared([folders["one"], folders["two"]], folders["prompts.jsonl"], judge=referee)
    assert ".py line" not in caught.value.message


def test_without_a_task_or_a_run_there_is_nothing_to_compare_on(folders: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="no --task is given") as caught:
        compared([folders["one"], folders["two"]])
    assert "--task prompts.jsonl" in str(caught.value.hint)


def test_a_path_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ModelError):
        contestants([str(tmp_path / "nothing")])
