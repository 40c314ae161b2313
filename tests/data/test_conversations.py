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
