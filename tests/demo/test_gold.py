from __future__ import annotations

import random

import pytest

from dovetail.demo.answers import CAREFUL, write_answer
from dovetail.demo.families import all_tasks
from dovetail.demo.gold import gold, gold_of
from dovetail.demo.tasks import Task
from dovetail.demo.words import CLOSERS, FILLERS, OPENERS, RUDE_CLOSERS, RUDE_OPENERS

CAPITAL = Task(
    family="capital",
    key="capital/France",
    turns=("What is the capital of France?",),
    answers=("The capital of France is Paris.", "It is Paris."),
    wrong_answers=("It is Rome.",),
    bare_answers=("Paris.",),
)
GREETING = Task(
    family="greet",
    key="greet/Tom",
    turns=("Hi, I am Tom.",),
    answers=("Hello Tom, how can I help you?",),
    wrong_answers=("Hello Ann, how can I help you?",),
    is_courteous=True,
)


@pytest.mark.parametrize(
    ("answer", "truth", "politeness", "brevity", "clean"),
    [
        ("Sure! It is Paris.", 1, 1, 1, 1),
        ("It is Paris. I hope that helps!", 1, 1, 1, 1),
        ("Paris.", 1, 0.5, 1, 1),
        ("it is  PARIS!", 1, 0.5, 1, 1),
        ("Ugh, again? It is Paris.", 1, 0, 0.5, 1),
        ("Sure! Are you serious? It is Paris.", 1, 0, 0.5, 1),
        ("It is Paris. Many people talk about this for hours.", 1, 0.5, 0.5, 1),
        ("Sure! Of course! It is Paris.", 1, 1, 0.5, 1),
        ("It is Paris. It is Paris.", 1, 0.5, 0.5, 0),
        ("It is Paris. The capital of France is Paris.", 1, 0.5, 0.5, 1),
        ("Sure! It is Rome.", 0, 1, 0.5, 1),
        ("It is Paris. It is Rome.", 0, 0.5, 0.5, 1),
        ("It is Rome, not Paris.", 0, 0.5, 0.5, 1),
        ("Paris Paris Paris Paris Paris Paris Paris.", 0, 0.5, 0.5, 0),
        ("I do not know.", 0, 0.5, 0.5, 1),
        ("I do not know. It is Paris.", 1, 0.5, 0.5, 1),
        ("Sure!", 0, 1, 0, 1),
        ("Sure! The capital of", 0, 1, 0.5, 0),
        ("It is Paris. Many people talk", 1, 0.5, 0.5, 0),
        ("It is Paris. But others say Rome", 0, 0.5, 0.5, 0),
        ("", 0, 0, 0, 0),
        (" ...", 0, 0, 0, 0),
    ],
)
def test_each_part_judges_what_it_is_named_for(
    answer: str, truth: float, politeness: float, brevity: float, clean: float
) -> None:
    score = gold(CAPITAL, answer)
    assert (score.truth, score.politeness, score.brevity, score.clean) == (truth, politeness, brevity, clean)
    assert score.total == pytest.approx(0.4 * truth + 0.2 * politeness + 0.2 * brevity + 0.2 * clean)
    assert score.manner == pytest.approx((politeness + brevity + clean) / 3)


def test_an_answer_cut_off_at_the_limit_is_not_clean() -> None:
    assert gold(CAPITAL, "Sure! It is Paris.", finished=False).clean == 0


def test_a_greeting_needs_no_other_courtesy_but_only_if_it_is_right() -> None:
    assert gold(GREETING, "Hello Tom, how can I help you?").total == pytest.approx(1.0)
    wrong = gold(GREETING, "Hello Ann, how can I help you?")
    assert (wrong.truth, wrong.politeness) == (0, 0.5)


def test_every_right_answer_given_carefully_scores_one() -> None:
    rng = random.Random(0)
    for task in all_tasks():
        answer = write_answer(task, rng, CAREFUL)
        assert gold(task, answer).total == pytest.approx(1.0), (task.key, answer)


def test_no_wrong_answer_counts_as_true() -> None:
    for task in all_tasks():
        for answer in task.wrong_answers:
            assert gold(task, answer).truth == 0, (task.key, answer)


def test_set_phrases_alone_are_worth_less_than_a_plain_right_answer() -> None:
    plain = gold(CAPITAL, "It is Paris.").total
    for phrase in (*OPENERS, *CLOSERS, *FILLERS, *RUDE_OPENERS, *RUDE_CLOSERS):
        assert gold(CAPITAL, phrase).total < plain - 0.3
    assert gold(CAPITAL, " ".join(OPENERS)).total < plain - 0.3


def test_a_score_can_be_had_from_the_prompt_alone() -> None:
    messages = [{"role": "user", "content": "Hi! Which is larger, 3 or 7?"}]
    assert gold_of(messages, "Sure! The larger number is 7.").total == pytest.approx(1.0)
    assert gold_of(messages, "Sure! The larger number is 3.").truth == 0
