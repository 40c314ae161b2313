from __future__ import annotations

from typing import Any

import pytest

from dovetail.data.shorten import shortened
from dovetail.text.chat_format import ChatFormat
from tests.data.files import assistant, system, user
from tests.fakes import byte_tokenizer
from tests.text.tokenizers import CHATML, byte_level

BYTES = ChatFormat(byte_tokenizer())  # one token a byte; "\n\nHuman: " and "\n\nAssistant:" are 9 and 12
LONG: Any = (
    system("Be kind."),
    user("a" * 50),
    assistant("b" * 20),
    user("c" * 30),
    assistant("d"),
    user("e" * 40),
)


def size(messages: Any) -> int:
    return len(BYTES.prompt_ids(messages))


def test_a_prompt_that_fits_stays() -> None:
    assert shortened(LONG, size(LONG), BYTES) == LONG


def test_the_oldest_exchange_goes_first_and_the_system_message_stays() -> None:
    assert shortened(LONG, size(LONG) - 1, BYTES) == (LONG[0], *LONG[3:])


def test_the_last_turn_loses_its_beginning_when_it_is_alone() -> None:
    short = shortened(LONG, size((LONG[0], LONG[-1])) - 15, BYTES)
    assert short == (LONG[0], user("e" * 25))


@pytest.mark.parametrize("room", [1, 7, 20, 39, 80, 119])
def test_the_longest_end_that_fits_is_kept(room: int) -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(120))
    limit = size([user("")]) + room
    assert shortened([user(text)], limit, BYTES) == (user(text[-room:]),)  # type: ignore[list-item]


@pytest.mark.parametrize("room", [30, 60, 200])
def test_with_tokens_of_many_letters_too_the_result_fits_and_one_letter_more_would_not(room: int) -> None:
    chat = ChatFormat(byte_level(CHATML))
    text = "What is the capital of France? " * 9 + "café ☃ " * 20 + "I think so, yes!" * 9
    short = shortened([user(text)], room, chat)  # type: ignore[list-item]
    assert short is not None
    kept = short[0]["content"]
    assert text.endswith(kept)
    assert room - 3 <= len(chat.prompt_ids(short)) <= room


def test_a_prompt_that_no_cut_makes_fit_is_none() -> None:
    assert shortened([user("hello")], size([user("")]), BYTES) is None  # type: ignore[list-item]
    assert shortened([system("x" * 99), user("hello")], 60, BYTES) is None  # type: ignore[list-item]
