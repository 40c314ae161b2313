from __future__ import annotations

from typing import Any

import pytest

from dovetail.data.columns import BadRowError
from dovetail.data.conversations import (
    answer_from_transcript,
    begins_with_a_name,
    messages_from,
    transcript_from,
)
from tests.data.files import assistant, system, user

VICUNA = ("USER", "ASSISTANT")


def test_a_transcript_becomes_turns() -> None:
    text = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how?\n\nAssistant: so.\n\nSecond paragraph."
    assert transcript_from(text, "c") == [
        user("hi"), assistant("hello"), user("how?"), assistant("so.\n\nSecond paragraph.")
    ]  # fmt: skip


def test_an_open_answer_at_the_end_is_left_out() -> None:
    assert transcript_from("\n\nHuman: hi\n\nAssistant:", "c") == [user("hi")]


def test_a_name_inside_a_line_begins_no_turn() -> None:
    text = "\n\nHuman: write a play\nHuman: he says Assistant: no\n\nAssistant: ok"
    assert transcript_from(text, "c") == [
        user("write a play\nHuman: he says Assistant: no"), assistant("ok")
    ]  # fmt: skip


def test_turns_of_one_speaker_become_one() -> None:
    assert transcript_from("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "c") == [
        user("a\n\nb"),
        assistant("c"),
    ]


def test_text_before_the_first_name_is_a_system_message() -> None:
    assert transcript_from("Be kind.\n\nHuman: a", "c") == [system("Be kind."), user("a")]


def test_other_names_stand_behind_any_white_space() -> None:
    text = "USER: hi ASSISTANT: hello</s>USER: how? ASSISTANT:"
    assert transcript_from(text, "c", VICUNA) == [user("hi"), assistant("hello"), user("how?")]


def test_text_without_names_is_no_transcript() -> None:
    with pytest.raises(BadRowError, match='c has no turn that begins with "Human:" or "Assistant:"'):
        transcript_from("just text", "c")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Paris.", "Paris."),
        ("Assistant: Paris.", "Paris."),
        ("\n\nAssistant: Paris.", "Paris."),
        (" Paris.\n\nHuman: thanks\n\nAssistant: welcome", "Paris."),
        ("", ""),
    ],
)
def test_an_answer_apart_from_its_prompt_loses_name_and_later_turns(text: str, answer: str) -> None:
    assert answer_from_transcript(text) == answer


def test_transcripts_are_recognised_by_their_first_name() -> None:
    assert begins_with_a_name("\n\nHuman: hi")
    assert not begins_with_a_name("The Human: a story")


@pytest.mark.parametrize(
    "items",
    [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]',
        [{"role": "User", "content": [{"type": "text", "text": "a"}]}, {"role": "model", "text": "b"}],
        ({"role": "prompter", "content": "a"}, {"role": "assistant", "content": "b"}),
    ],
)
def test_messages_are_read_in_the_common_spellings(items: Any) -> None:
    assert messages_from(items, "m") == [user("a"), assistant("b")]


@pytest.mark.parametrize(
    ("items", "reason"),
    [
        ("hello", "m should be a list of messages, but is the text 'hello'"),
        ([], "m should be a list of messages"),
        (["hello"], r"m\[0\] should be a message with role and content, but is the text"),
        ([{"role": "tool", "content": "a"}], r"m\[0\] has the role 'tool'"),
        ([{"content": "a"}], r"m\[0\] has the role None"),
        ([{"role": "user", "content": None}], r"the content of m\[0\] should be text, but is None"),
        ([{"role": "user", "content": "a \ud83d"}], r"m\[0\] holds half a surrogate pair"),
        ([{"role": "user", "content": [{"text": "\ud83d"}]}], r"m\[0\] holds half a surrogate pair"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"the content of m\[0\] should be text"),
    ],
)
def test_what_is_no_message_is_named_with_its_place(items: Any, reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        messages_from(items, "m")


@pytest.mark.parametrize(
    "mark",
    [{"weight": 0}, {"train": False}, {"loss": False}, {"training": 0.0}, {"masked": True}, {"loss_mask": 0}],
)
def test_a_turn_may_be_marked_as_not_to_be_learnt(mark: dict[str, Any]) -> None:
    turns = messages_from([user("a"), {**assistant("b"), **mark}, user("c"), assistant("d")], "m")
    assert [turn.get("learnt") for turn in turns] == [None, False, None, None]


@pytest.mark.parametrize(
    "mark",
    [
        {"weight": 1},
        {"train": True},
        {"loss": None},
        {"masked": False},
        {"tool_calls": []},
        {"refusal": None},
    ],
)
def test_marks_that_change_nothing_leave_the_turn_as_it_is(mark: dict[str, Any]) -> None:
    assert messages_from([user("a"), {**assistant("b"), **mark}], "m") == [user("a"), assistant("b")]
    off = {key: value for key, value in mark.items() if value in (0, None)}
    assert messages_from([{**user("a"), **off}], "m") == [user("a")]


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({**assistant("b"), "weight": 0.5}, r"m\[0\].weight is float 0.5"),
        ({**assistant("b"), "loss": "no"}, r"m\[0\].loss is the text 'no'"),
        ({**user("b"), "train": True}, r"m\[0\].train is True, but only turns of the assistant are learnt"),
        ({**assistant("b"), "tool_calls": [{"id": 1}]}, r"m\[0\] has tool_calls beside its content"),
        ({**assistant("b"), "reasoning_content": "hm"}, r"m\[0\] has reasoning_content beside its content"),
        ({**user("b"), "images": ["a.png"]}, r"m\[0\] has images beside its content"),
    ],
)
def test_what_a_message_says_beside_its_content_is_refused(item: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        messages_from([item], "m")


def test_a_learnt_turn_is_not_joined_with_one_that_is_not() -> None:
    with pytest.raises(BadRowError, match="one is learnt, and one is not"):
        messages_from([user("a"), assistant("b"), {**assistant("c"), "weight": 0}], "m")
