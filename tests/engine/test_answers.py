"""When an answer ends, and which requests are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from dovetail.engine.sampling import Sampling
from dovetail.engine.scheduler import Answer, Listener, expect_usable
from dovetail.errors import GenerationError


def feed(ids: Sequence[int], listener: Listener, *, max_new_tokens: int = 10, **settings: Any) -> Answer:
    """An answer after these draws, or after those of them it took."""
    answer = Answer(3, (1, 2), Sampling(max_new_tokens=10, **settings), 0, max_new_tokens)
    for token_id in ids:
        if answer.finish_reason is None:
            answer.accept(token_id, -0.5, listener)
    return answer


def test_a_stop_token_ends_the_answer_and_belongs_to_it() -> None:
    answer = feed([5, 9, 6], Listener(), stop_token_ids=(8, 9))
    assert answer.completion().token_ids == (5, 9)
    assert answer.completion().logprobs == (-0.5, -0.5)
    assert answer.finish_reason == "stop"


def test_the_token_limit_ends_the_answer_and_a_stop_token_in_the_last_place_is_a_stop() -> None:
    assert feed([5] * 5, Listener(), max_new_tokens=3).completion().token_ids == (5, 5, 5)
    assert feed([5] * 5, Listener(), max_new_tokens=3).finish_reason == "length"
    assert feed([5, 5, 9], Listener(), max_new_tokens=3, stop_token_ids=(9,)).finish_reason == "stop"


def test_the_callback_hears_every_token_and_may_cancel() -> None:
    heard: list[tuple[int, int, float]] = []

    def on_token(index: int, token_id: int, logprob: float) -> bool:
        heard.append((index, token_id, logprob))
        return token_id == 6

    answer = feed([5, 6, 7], Listener(on_token=on_token))
    assert heard == [(3, 5, -0.5), (3, 6, -0.5)]
    assert answer.finish_reason == "cancelled"
    assert answer.token_ids == [5, 6]


def decode_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["well. Human: no", "é" * 30 + "Human: no", "Human: no"])
def test_a_stop_string_that_straddles_tokens_keeps_the_ids_up_to_the_one_that_completes_it(text: str) -> None:
    listener = Listener(decode_text=decode_bytes)
    answer = feed(list(text.encode()), listener, max_new_tokens=200, stop_strings=("END", "Human:"))
    assert decode_bytes(answer.token_ids) == text[: text.index("Human:") + len("Human:")]
    assert answer.finish_reason == "stop"


def test_a_stop_string_of_four_byte_characters_is_found() -> None:
    listener = Listener(decode_text=decode_bytes)
    text = "ok 🙂🙂 go on"
    answer = feed(list(text.encode()), listener, max_new_tokens=200, stop_strings=("🙂🙂",))
    assert decode_bytes(answer.token_ids) == "ok 🙂🙂"


@pytest.mark.parametrize(
    ("prompt", "settings", "words"),
    [
        ((), {}, "request 7: the prompt is empty"),
        ((1,) * 16, {}, "the prompt has 16 tokens, the model's context is 16"),
        ((1, 99), {}, "prompt token 99 is not in the model's vocabulary of 50"),
        ((1, -1), {}, "prompt token -1"),
        ((1,), {"stop_token_ids": (3, 50)}, "stop token 50"),
        ((1,), {"stop_strings": ("x",)}, "decode_text"),
    ],
)
def test_unusable_requests_are_refused_with_the_reason(
    prompt: tuple[int, ...], settings: dict[str, Any], words: str
) -> None:
    answer = Answer(7, prompt, Sampling(max_new_tokens=4, **settings), 0, 4)
    with pytest.raises(GenerationError, match=words) as raised:
        expect_usable(answer, vocabulary=50, context=16, listener=Listener())
    assert raised.value.hint


def test_usable_requests_pass() -> None:
    answer = Answer(0, (1,) * 15, Sampling(max_new_tokens=4, stop_strings=("x",), stop_token_ids=(49,)), 0, 4)
    expect_usable(answer, vocabulary=50, context=16, listener=Listener(decode_text=decode_bytes))
    expect_usable(answer, vocabulary=50, context=None, listener=Listener(decode_text=decode_bytes))
