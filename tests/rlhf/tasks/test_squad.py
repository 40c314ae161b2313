"""SQuAD's figures against the official script's own definitions, written out here."""

import collections
import re
import string
from pathlib import Path
from typing import Any

import pytest

from dovetail.errors import DataError
from dovetail.rlhf.tasks.named import load_task, parse_task
from dovetail.rlhf.tasks.squad import INSTRUCTION, claimed, exact_match, f1_score, question_of
from dovetail.rlhf.tasks.subject import Drawing
from tests.rlhf.tasks.asked import prompt, say_instead, subject


def official_normalise(s: str) -> str:
    def remove_articles(text: str) -> str:
        return re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text)

    def white_space_fix(text: str) -> str:
        return " ".join(text.split())

    def remove_punc(text: str) -> str:
        return "".join(ch for ch in text if ch not in set(string.punctuation))

    return white_space_fix(remove_articles(remove_punc(s.lower())))


def official_f1(a_gold: str, a_pred: str) -> float:
    gold, pred = official_normalise(a_gold).split(), official_normalise(a_pred).split()
    num_same = sum((collections.Counter(gold) & collections.Counter(pred)).values())
    if len(gold) == 0 or len(pred) == 0:
        return float(gold == pred)
    if num_same == 0:
        return 0.0
    precision, recall = num_same / len(pred), num_same / len(gold)
    return (2 * precision * recall) / (precision + recall)


WORDINGS = [
    "The Normans",
    "a Norman's castle!",
    "in the 10th and 11th centuries",
    "10th century",
    "",
    "the",
    "U.S.",
    "us the",
    "théâtre  an",
]


@pytest.mark.parametrize("said", WORDINGS)
def test_exact_match_and_f1_are_the_official_ones(said: str) -> None:
    for one in WORDINGS:
        for other in WORDINGS:
            golds = [text for text in (one, other) if official_normalise(text)]
            expected = golds or [""]
            exact = max(float(official_normalise(gold) == official_normalise(said)) for gold in expected)
            assert exact_match(said, golds) == exact
            assert f1_score(said, golds) == pytest.approx(max(official_f1(gold, said) for gold in expected))


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("Not in background.", ""),
        (" not in the background\nQ: next", ""),
        ("\n\n France \nGermany", "France"),
        ("", ""),
        ("Not in France", "Not in France"),
    ],
)
def test_the_first_line_is_the_answer_unless_it_says_that_there_is_none(reply: str, answer: str) -> None:
    assert claimed(reply) == answer


@pytest.mark.parametrize("answers", [["x", "y"], {"text": ["x", "y"]}, [{"text": "x"}, {"text": "y"}]])
def test_answers_come_in_three_forms(answers: Any) -> None:
    question = question_of(prompt("Q?", context="C.", answers=answers, is_impossible=False))
    assert question.answers == ("x", "y")
    assert question.prompt.messages[0]["content"] == f"{INSTRUCTION}\n\nBackground: C.\n\nQ: Q?\n\nA:"


def test_an_impossible_question_has_no_answer_whatever_the_column_holds() -> None:
    assert question_of(prompt("Q?", context="C.", answers=["x"], is_impossible=True)).answers == ()
    assert question_of(prompt("Q?", context="C.", answers=[], is_impossible=False)).answers == ()


@pytest.mark.parametrize(("row", "column"), [({"answers": ["x"]}, "context"), ({"context": "C."}, "answers")])
def test_a_row_without_a_column_is_named(row: dict[str, Any], column: str) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl line 3: the column {column} "):
        question_of(prompt("Q?", **row))


def test_questions_with_and_without_an_answer_are_also_counted_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "dev.jsonl"
    file.write_text(
        '{"question": "1", "context": "c", "answers": ["red fox"], "is_impossible": false}\n'
        '{"question": "2", "context": "c", "answers": ["blue"], "is_impossible": false}\n'
        '{"question": "3", "context": "c", "answers": [], "is_impossible": true}\n'
    )
    task = load_task(parse_task(f"squad={file}"), Drawing(max_new_tokens=5), limit=10)
    replies = {"1": "The fox", "2": "Blue.", "3": "blue"}
    draws = say_instead(monkeypatch, lambda _, text: replies[text.split("Q: ")[1][0]])
    found = task(subject())
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert (found["exact_match_has_answer"], found["exact_match_no_answer"]) == (0.5, 0.0)
    assert found["f1_has_answer"] == pytest.approx((2 / 3 + 1) / 2)
    assert draws[0].temperature == 0.0
