"""The tokens listed beside a text are the text, joined, whatever the tokenizer writes and a stop string takes away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from dovetail.engine.prompt_scores import TokenScore
from dovetail.serving.answer_text import AnswerText, Echo
from dovetail.serving.engine_thread import Progress
from dovetail.serving.token_listing import ListedToken
from dovetail.text.chat_format import ChatFormat
from tests.text.tokenizers import CHATML, GEMMA, INST, LLAMA3, byte_level, sentence_piece

TOKENIZERS = {
    "sentence piece": lambda: sentence_piece(CHATML),
    "sentence piece, a space before answers": lambda: sentence_piece(INST),
    "sentence piece, Human and Assistant": sentence_piece,
    "byte level": lambda: byte_level(LLAMA3, bos=True),
    "byte level, a space before texts": lambda: byte_level(GEMMA, bos=True, prefix_space=True),
    "byte level, Human and Assistant": byte_level,
}
ANSWER = "hello there, what is the  capital of France?\n\nI think so"
STOPS = ["there", "e,", " is", "  ", "ance", "?\n", "\n\nI", "h", "never"]


@pytest.fixture(params=TOKENIZERS.values(), ids=TOKENIZERS, scope="module")
def chat(request: pytest.FixtureRequest) -> ChatFormat:
    return ChatFormat(request.param())


def read(
    text: AnswerText, ids: Sequence[int], size: int, ending: Any = "length"
) -> tuple[str, list[ListedToken]]:
    """Text and tokens of an answer that comes in steps of `size` tokens; the i-th token has the logprob -i."""
    shown, listed = "", []
    for start in range(0, len(ids), size):
        part = ids[start : start + size]
        is_last = start + size >= len(ids)
        numbers = [-float(start + i) for i in range(len(part))]
        new, tokens = text.read(Progress(part, numbers, finish_reason=ending if is_last else None))
        shown += new
        listed += tokens
        covered = sum(len(token.text) for token in listed if "\ufffd" not in token.text)
        assert covered <= len(shown), "no token is listed before its text"
    return shown, listed


def expect_laid_out(shown: str, listed: Sequence[ListedToken]) -> None:
    assert "".join(token.text for token in listed) == shown
    for token in listed:
        assert shown[token.offset : token.offset + len(token.text)] == token.text


@pytest.mark.parametrize("size", [1, 3, 100])
def test_the_tokens_of_a_chat_answer_are_its_text(chat: ChatFormat, size: int) -> None:
    ids = chat.answer_ids(ANSWER)
    text = AnswerText(chat, chat.answer_stream(), num_top=0)
    shown, listed = read(text, ids, size, "stop")
    assert shown == ANSWER
    expect_laid_out(shown, listed)
    assert [token.logprob for token in listed] == [-float(i) for i in range(len(listed))]
    assert len(listed) >= len(ids) - 3, "all but what the template puts around an answer"


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("stop", STOPS)
def test_tokens_of_a_stop_string_are_not_listed(chat: ChatFormat, stop: str, size: int) -> None:
    text = AnswerText(chat, chat.answer_stream([stop]), num_top=0)
    shown, listed = read(text, chat.answer_ids(ANSWER), size, "stop")
    assert shown == ANSWER.partition(stop)[0]
    expect_laid_out(shown, listed)
    assert all(token.text for token in listed[1:])


@pytest.mark.parametrize("size", [1, 100])
@pytest.mark.parametrize("prompt", ["hello there", "what is", "<s>", "hello there, what"])
def test_a_text_goes_on_where_its_prompt_ends(chat: ChatFormat, prompt: str, size: int) -> None:
    front = chat.text_ids(prompt)
    ids = chat.text_ids(f"{prompt} friend, yes")[len(front) :]
    text = AnswerText(chat, chat.text_stream(behind=front), behind=front, num_top=0)
    shown, listed = read(text, ids, size)
    assert prompt == "<s>" or shown == " friend, yes"
    expect_laid_out(shown, listed)


@pytest.mark.parametrize("prompt", ["hello there friend", "what is the  capital?", "é!", "<s>hello", "a"])
def test_a_prompt_that_is_repeated_is_listed_beside_its_text(chat: ChatFormat, prompt: str) -> None:
    ids = chat.text_ids(prompt)
    text = AnswerText(
        chat,
        chat.text_stream(["yes"], behind=ids),
        behind=ids,
        echo=Echo.of(prompt, ids, chat),
        num_top=0,
    )
    drawn = chat.text_ids("hello friend, yes")[-5:]
    scores = [TokenScore(-float(place), 1, [(i, 0.0)]) for place, i in enumerate(ids[1:], 1)]
    shown, listed = text.read(Progress(drawn[:2], [0.0] * 2, prompt_scores=scores))
    more, others = read(text, drawn[2:], 1, "stop")
    shown, listed = shown + more, listed + others
    is_changed = not chat.tokenizer.decode(ids).endswith(prompt)
    assert shown.startswith(chat.tokenizer.decode(ids) if is_changed else prompt)
    assert "yes" not in shown[len(prompt) :]
    assert len(listed) == len(ids) + len(drawn), "those of the stop string are listed too, as nothing"
    assert [token.logprob for token in listed[: len(ids)]] == [None, *(score.logprob for score in scores)]
    if "é" not in prompt:
        expect_laid_out(shown, listed)


def test_what_is_likeliest_reads_as_it_would_stand_there() -> None:
    chat = ChatFormat(sentence_piece(CHATML))
    ids = chat.answer_ids("hello there friend")
    text = AnswerText(chat, chat.answer_stream(), num_top=1)
    tops = [[(i, -1.0)] for i in ids]
    _, listed = text.read(Progress(ids, [0.0] * len(ids), tops, finish_reason="stop"))
    assert [token.top_logprobs[0][0] for token in listed] == [token.text for token in listed]


def test_parts_of_characters_are_listed_as_such() -> None:
    for tokenizer in (sentence_piece(CHATML), byte_level(CHATML)):
        chat = ChatFormat(tokenizer)
        shown, listed = read(
            AnswerText(chat, chat.answer_stream(), num_top=0), chat.answer_ids("so é ?"), 1, "stop"
        )
        assert shown == "so é ?"
        halves = [token for token in listed if token.text.strip() == "\ufffd"]
        assert len(halves) == 2, "é is two bytes"
        whole = [token for token in listed if token not in halves]
        assert "".join(token.text for token in whole) == shown.replace("é", "")
        for token in whole:
            assert shown[token.offset : token.offset + len(token.text)] == token.text
