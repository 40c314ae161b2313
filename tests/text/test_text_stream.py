"""Pieces of a stream against the text decoded at once."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.text.chat_format import ChatFormat
from dovetail.text.text_stream import TextStream
from tests.fakes import byte_tokenizer
from tests.text.test_chat_format import FORMATS
from tests.text.tokenizers import CHATML, byte_level


def decode(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


def streamed(data: bytes, stops: tuple[str, ...] = (), size: int = 1) -> list[str]:
    stream = TextStream(decode, stops=stops)
    pieces = [stream.add(data[start : start + size]) for start in range(0, len(data), size)]
    return [*pieces, stream.finish()]


@given(st.text(), st.integers(1, 5))
def test_the_pieces_are_the_text_decoded_at_once(text: str, size: int) -> None:
    assert "".join(streamed(text.encode(), size=size)) == text


@given(st.binary())
def test_broken_characters_are_those_of_the_text_decoded_at_once(data: bytes) -> None:
    assert "".join(streamed(data)) == decode(data)


def cut(text: str, stops: list[str]) -> str:
    """Letter by letter: up to where a stop string begins, as soon as one is there."""
    for end in range(len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return text[: min(text.find(other) for other in stops if other in text[:end])]
    return text


@given(st.text("abc"), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_the_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    assert "".join(streamed(text.encode(), tuple(stops))) == cut(text, stops)


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"])
def test_an_answer_of_a_chat_format_reads_in_pieces_as_at_once(template: str | None) -> None:
    chat = ChatFormat(byte_tokenizer(template))
    for answer in ("  two  blanks ", "naïve\n\n", " ", "x"):
        ids = chat.answer_ids(answer)
        stream = TextStream(chat.decode)
        assert "".join([*(stream.add([i]) for i in ids), stream.finish()]) == chat.decode(ids) == answer


LONG_LEAD = CHATML.replace("assistant\n'", "assistant'").replace("'\n' + message", "'\n\n\n' + message")
"""Three line breaks, of more than one token, between the generation prompt and the answer."""


@pytest.mark.parametrize("name", [*FORMATS, "long lead"])
def test_an_answer_of_any_template_reads_in_pieces_as_at_once(name: str) -> None:
    chat = ChatFormat(FORMATS[name]() if name in FORMATS else byte_level(LONG_LEAD))
    for answer in ("First.\n\nSecond. ", " \n\n\n I  think so\n", "café ☃ 東京", "hello", "", " "):
        for ids in (chat.answer_ids(answer), chat.text_ids(answer), chat.text_ids(answer) * 2):
            stream = chat.answer_stream()
            assert "".join([*(stream.add([i]) for i in ids), stream.finish()]) == chat.decode(ids)


def test_a_text_that_goes_on_keeps_its_white_space() -> None:
    for template in (None, CHATML, LONG_LEAD):
        chat = ChatFormat(byte_level(template))
        text = " there is \n\n\n time "
        stream = chat.text_stream()
        assert "".join([*(stream.add([i]) for i in chat.text_ids(text)), stream.finish()]) == text


@given(st.text(" \na", max_size=8), st.text(" \n", max_size=2), st.text(" \n", max_size=2), st.integers(1, 3))
def test_lead_and_end_are_taken_off_once(text: str, lead: str, before_end: str, size: int) -> None:
    stream = TextStream(decode, lead=lead, before_end=before_end)
    data = text.encode()
    pieces = [stream.add(data[start : start + size]) for start in range(0, len(data), size)]
    assert "".join([*pieces, stream.finish()]) == text.removeprefix(lead).removesuffix(before_end)


def test_a_stop_string_is_looked_for_behind_the_lead() -> None:
    stream = TextStream(decode, stops=["\n"], lead="\n")
    assert "".join(stream.add([i]) for i in b"\none\ntwo") == "one"
    assert stream.has_stopped


def test_reading_a_token_does_not_decode_the_whole_answer_again() -> None:
    longest = 0

    def counting(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    stream = TextStream(counting)
    assert "".join(stream.add([97]) for _ in range(200)) == "a" * 200
    assert longest == 2
