from __future__ import annotations

import hashlib
from collections import Counter

from dovetail.demo.families import KINDS, all_tasks
from dovetail.demo.tasks import Task, is_held_out_key


def test_every_task_is_a_conversation_that_the_user_opens_and_closes() -> None:
    for task in all_tasks():
        assert len(task.turns) % 2 == 1
        roles = [turn["role"] for turn in task.messages()]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


def test_no_two_tasks_ask_the_same_words() -> None:
    counts = Counter(task.turns for task in all_tasks())
    assert max(counts.values()) == 1


def test_no_wrong_answer_is_also_accepted() -> None:
    for task in all_tasks():
        accepted = {*task.answers, *task.bare_answers}
        assert task.wrong_answers
        assert not accepted & set(task.wrong_answers), task.key


def test_answers_agree_with_a_plain_reading_of_the_question() -> None:
    for task in all_tasks():
        if task.family == "larger":
            numbers = [
                int(word.strip(",.?")) for word in task.turns[0].split() if word.strip(",.?").isdigit()
            ]
            assert task.bare_answers == (f"{max(numbers)}.",)
        elif task.family == "count":
            assert f"There are {task.turns[0].count(',') + 1} words." in task.answers
        elif task.family == "told":
            name, _, _, colour, thing, _, _, animal, *_ = task.turns[0].replace(".", "").split()
            assert f"{name} has a {colour} {thing} and a {animal}." in task.turns[0]
            asked = {"What": colour, "Who": name, "Which": animal}[task.turns[0].split(". ")[1].split()[0]]
            assert task.bare_answers == (f"{asked}.",)
        elif task.family == "yes or no":
            kind = task.turns[0].split()[3]
            present = set(task.turns[0].rstrip("?").split(": ")[1].split(", ")) & set(KINDS[kind])
            assert task.bare_answers == (("Yes.",) if present else ("No.",))


def test_yes_and_no_are_about_equally_often_right() -> None:
    answers = [task.bare_answers[0] for task in all_tasks() if task.family == "yes or no"]
    assert 0.4 < answers.count("Yes.") / len(answers) < 0.6


def test_about_an_eighth_of_each_kind_is_held_out_and_no_kind_is_left_without_either_part() -> None:
    tasks = all_tasks()
    share = sum(task.is_held_out for task in tasks) / len(tasks)
    assert 0.09 < share < 0.15
    for family in {task.family for task in tasks}:
        own = [task for task in tasks if task.family == family]
        assert any(task.is_held_out for task in own)
        assert any(task.is_trainable for task in own)


def test_what_is_held_out_follows_from_the_key_alone() -> None:
    for key in ("larger/3/7", "greet/0/Tom", "told/Tom/red/cup/dog"):
        number = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16)
        assert is_held_out_key(key) == (number % 100 < 12)


def test_a_task_whose_earlier_turns_give_away_a_held_out_question_is_not_trained_on() -> None:
    held_out = {task.turns[0] for task in all_tasks() if task.family == "greet" and task.is_held_out}
    assert held_out
    for task in all_tasks():
        if task.is_trainable:
            assert not held_out & set(task.turns)


def test_a_prefix_opens_the_first_turn_only() -> None:
    task = Task(family="f", key="k", turns=("A?", "B.", "C?"), answers=("D.",), wrong_answers=("E.",))
    assert [turn["content"] for turn in task.messages("Hi! ")] == ["Hi! A?", "B.", "C?"]
