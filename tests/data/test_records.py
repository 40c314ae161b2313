from __future__ import annotations

import hashlib
from dataclasses import replace

from dovetail.data.records import (
    Comparison,
    Demonstration,
    Prompt,
    Text,
    as_demonstration,
    as_prompt,
    content_hash,
    kinds_of,
    prompt_key,
)
from tests.data.files import assistant, user

COMPARISON = Comparison(
    messages=(user("q"),),  # type: ignore[arg-type]
    answers=("a", "b", "c"),
    better_than=((1, 0, 0.0), (1, 2, 0.0), (2, 0, 0.0)),
    row_id="x",
    source="s",
)


def test_the_best_answer_has_the_most_wins() -> None:
    assert COMPARISON.best() == 1


def test_of_equals_the_first_is_best() -> None:
    assert replace(COMPARISON, better_than=()).best() == 0


def test_a_comparison_serves_fine_tuning_with_its_best_answer() -> None:
    demonstration = as_demonstration(COMPARISON)
    assert demonstration is not None
    assert demonstration.messages == (user("q"), assistant("b"))
    assert demonstration.row_id == COMPARISON.row_id


def test_an_empty_best_answer_is_nothing_to_imitate() -> None:
    assert as_demonstration(replace(COMPARISON, answers=("a", " ", "c"))) is None


def test_prompts_are_what_stands_before_the_last_answer() -> None:
    messages = (user("q"), assistant("a"), user("r"), assistant("b"))
    row = Demonstration(messages=messages, row_id="x", source="s")  # type: ignore[arg-type]
    prompt = as_prompt(row)
    assert prompt is not None
    assert prompt.messages == messages[:3]
    assert as_prompt(Text(text="t", row_id="x", source="s")) is None


def test_what_rows_can_serve() -> None:
    assert kinds_of(COMPARISON) == ("sft", "reward", "ppo")
    assert kinds_of(Prompt(messages=(), row_id="x", source="s")) == ("ppo",)
    assert kinds_of(Text(text="t", row_id="x", source="s")) == ("text",)


def test_the_hash_is_of_content_and_stays_the_same_over_versions() -> None:
    canonical = rb'["prompt",[{"content":"\u00e9","role":"user"}]]'
    expected = hashlib.sha256(canonical).hexdigest()[:32]
    assert content_hash("prompt", ({"role": "user", "content": "é"},)) == expected
    assert content_hash("a", "bc") != content_hash("ab", "c")


def test_rows_with_one_prompt_share_its_key() -> None:
    other = replace(COMPARISON, answers=("d", "e", "f"), row_id="y")
    assert prompt_key(other) == prompt_key(COMPARISON)
    assert prompt_key(replace(other, messages=(user("r"),))) != prompt_key(COMPARISON)  # type: ignore[arg-type]
