"""Chat and text completions through the official client, against the engine asked directly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch

from dovetail.engine import HybridEngine, Sampling
from dovetail.text.chat_format import ChatFormat
from tests.fakes import byte_tokenizer, tiny_model
from tests.serving.live import Live, live, tiny_served

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live([tiny_served("tiny"), tiny_served("other", seed=1)]) as running:
        yield running


@pytest.fixture
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def ids_of(text: str) -> list[int]:
    return list(byte_tokenizer()(text)["input_ids"])


def drawn(
    messages: list[Any] | str, *, seed: int = 0, model_seed: int = 0, **sampling: Any
) -> tuple[str, list[int], list[float], str]:
    """Text, ids, log-probabilities and ending by the engine itself."""
    chat = ChatFormat(byte_tokenizer())
    ids = ids_of(messages) if isinstance(messages, str) else chat.prompt_ids(messages)
    settings = Sampling(stop_token_ids=chat.stop_token_ids, **{"max_new_tokens": 12, **sampling})
    with HybridEngine(tiny_model(seed=model_seed)).generating() as generate:
        (answer,) = generate([ids], settings, seeds=[seed], decode_text=chat.decode)
    return chat.decode(answer.token_ids), list(answer.token_ids), list(answer.logprobs), answer.finish_reason


def test_an_answer_is_the_engine_s_own_for_the_same_seed(client: openai.OpenAI) -> None:
    for seed in (3, 4):
        answer = client.chat.completions.create(
            model="tiny", messages=HELLO, seed=seed, max_tokens=12, temperature=0.8, top_p=0.9
        )
        text, ids, _, ending = drawn(HELLO, seed=seed, temperature=0.8, top_p=0.9)
        assert answer.choices[0].message.content == text
        assert answer.choices[0].finish_reason == ending
        assert answer.usage is not None
        assert answer.usage.completion_tokens == len(ids)
        assert answer.usage.prompt_tokens == len("\n\nHuman: hello\n\nAssistant:")
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(ids)


def test_two_turns_by_stream_are_the_engine_s_own(client: openai.OpenAI) -> None:
    messages = list(HELLO)
    for seed in (1, 2):
        stream = client.chat.completions.create(
            model="tiny",
            messages=messages,
            seed=seed,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        expected, ids, _, ending = drawn(messages, seed=seed)
        assert text == expected
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason == ending
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == len(ids)
        assert all(chunk.usage is None for chunk in chunks[:-1])
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "and?"}]


def test_each_model_answers_by_its_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "other"]
    assert client.models.retrieve("other").id == "other"
    answer = client.chat.completions.create(model="other", messages=HELLO, seed=3, max_tokens=12)
    assert answer.choices[0].message.content == drawn(HELLO, seed=3, model_seed=1)[0]


def test_several_answers_are_independent_and_the_first_is_the_seed_s(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, seed=3, max_tokens=12, n=3)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert texts[0] == drawn(HELLO, seed=3)[0]
    assert len(set(texts)) == 3


def test_without_a_seed_answers_differ(client: openai.OpenAI) -> None:
    answers = {
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12).choices[0].message.content
        for _ in range(3)
    }
    assert len(answers) == 3


def test_logprobs_are_those_of_the_tokens_drawn(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, seed=3, max_tokens=12, logprobs=True, temperature=0.7
    )
    _, ids, logprobs, _ = drawn(HELLO, seed=3, temperature=0.7)
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content or []
    assert [entry.logprob for entry in entries] == pytest.approx(logprobs, rel=1e-4)
    for entry, token_id in zip(entries, ids, strict=True):
        assert entry.token == byte_tokenizer().decode([token_id])
        assert entry.bytes == (None if entry.token == "\ufffd" else list(entry.token.encode()))


def likeliest(
    text: list[int] | str, answer_ids: list[int], temperature: float
) -> list[list[tuple[str, float]]]:
    """Every token at each place of an answer, as text, the likeliest first, by transformers."""
    ids = [*(ids_of(text) if isinstance(text, str) else text), *answer_ids]
    with torch.no_grad():
        logits = tiny_model()(torch.tensor([ids]), use_cache=False).logits[0]
    places = logits[len(ids) - len(answer_ids) - 1 : -1] / temperature
    tops = [place.log_softmax(-1).sort(descending=True) for place in places]
    return [
        [
            (byte_tokenizer().decode([i]), x)
            for i, x in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        for top in tops
    ]


@pytest.mark.parametrize("is_stream", [False, True])
def test_top_logprobs_are_the_likeliest_tokens_at_each_place(client: openai.OpenAI, is_stream: bool) -> None:
    answer: Any = client.chat.completions.create(
        model="tiny", messages=HELLO, seed=3, max_tokens=12, logprobs=True, top_logprobs=4, temperature=0.7,
        stream=is_stream,
    )  # fmt: skip
    choices = [chunk.choices[0] for chunk in answer] if is_stream else [answer.choices[0]]
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content or []]
    ids = drawn(HELLO, seed=3, temperature=0.7)[1]
    expected = likeliest(ChatFormat(byte_tokenizer()).prompt_ids(HELLO), ids, 0.7)
    for entry, token_id, top in zip(entries, ids, expected, strict=True):
        assert [other.token for other in entry.top_logprobs] == [text for text, _ in top[:4]]
        assert [other.logprob for other in entry.top_logprobs] == pytest.approx(
            [x for _, x in top[:4]], rel=1e-4
        )
        assert entry.token == byte_tokenizer().decode([token_id])


def test_a_text_s_top_logprobs_are_by_token_and_hold_the_drawn_one(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="abc", seed=3, max_tokens=12, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.token_logprobs is not None
    expected = likeliest("abc", drawn("abc", seed=3)[1], 1.0)
    for token, logprob, top, full in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, expected, strict=True
    ):
        wanted = dict(reversed([*full[:2], (token, logprob)]))
        assert top == pytest.approx(wanted, rel=1e-4)
    without = client.completions.create(model="tiny", prompt="abc", seed=3, max_tokens=12, logprobs=0)
    assert without.choices[0].logprobs is not None
    assert without.choices[0].logprobs.top_logprobs is None
    assert without.choices[0].logprobs.token_logprobs == pytest.approx(logprobs.token_logprobs, rel=1e-4)


def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(client: openai.OpenAI) -> None:
    free = drawn("abc", seed=5, max_new_tokens=60)[0]
    stop = next(free[i : i + 2] for i in range(10, len(free) - 5) if free[i : i + 2].isalnum())
    answer = client.completions.create(
        model="tiny", prompt="abc", seed=5, max_tokens=60, stop=[stop, "never"]
    )
    assert answer.choices[0].text == free[: free.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    stream = client.completions.create(
        model="tiny", prompt="abc", seed=5, max_tokens=60, stop=stop, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == free[: free.index(stop)]


def test_text_completions_take_texts_tokens_and_several_of_either(client: openai.OpenAI) -> None:
    whole, _, logprobs, _ = drawn("abc", seed=3)
    for prompt in ("abc", ids_of("abc"), ["abc"], [ids_of("abc")]):
        answer = client.completions.create(model="tiny", prompt=prompt, seed=3, max_tokens=12, logprobs=0)
        assert answer.choices[0].text == whole
        assert answer.choices[0].logprobs is not None
        assert answer.choices[0].logprobs.token_logprobs == pytest.approx(logprobs, rel=1e-4)
    both = client.completions.create(model="tiny", prompt=["abc", "xyz"], seed=3, max_tokens=12, n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[2].text == drawn("xyz", seed=3 + 2 * 1_000_003)[0]
    assert both.usage is not None
    assert both.usage.prompt_tokens == 6


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_text_completion_keeps_the_space_that_it_begins_with(
    client: openai.OpenAI, is_stream: bool
) -> None:
    # So far below 1 the penalty is a reward: the prompt's tokens come again.
    answer: Any = client.completions.create(
        model="tiny", prompt="  ", temperature=0, max_tokens=4, logprobs=0, stream=is_stream,
        extra_body={"repetition_penalty": 0.01},
    )  # fmt: skip
    choices = [chunk.choices[0] for chunk in answer] if is_stream else answer.choices
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    assert tokens[0] == " "
    assert "".join(choice.text for choice in choices) == "".join(tokens)


def test_the_stream_is_server_sent_events_to_the_letter(server: Live) -> None:
    text = server.chat(stream=True, seed=3).text
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    parsed = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert {event["object"] for event in parsed} == {"chat.completion.chunk"}
    assert len({event["id"] for event in parsed}) == 1
    assert [event["choices"][0]["finish_reason"] for event in parsed][-1] in ("stop", "length")


def test_content_may_come_in_parts_and_from_a_developer(server: Live) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    for role, plain in (("user", "user"), ("developer", "system")):
        messages = [{"role": role, "content": parts}, *HELLO][: 2 if role == "developer" else 1]
        expected = [{"role": plain, "content": "hello"}, *HELLO][: len(messages)]
        answer = server.post(model="tiny", messages=messages, seed=1, max_tokens=12).json()
        assert answer["choices"][0]["message"]["content"] == drawn(expected, seed=1)[0]


def test_without_a_limit_an_answer_may_fill_the_context(server: Live) -> None:
    answer = server.post("/v1/completions", model="tiny", prompt="abc", seed=5).json()
    ended_early = answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["total_tokens"] == 512 or ended_early


def test_the_models_list_says_how_long_a_conversation_may_be(server: Live) -> None:
    assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["max_model_len"] == 512


def test_a_temperature_near_zero_is_greedy(server: Live) -> None:
    texts = [
        server.chat(temperature=temperature, logprobs=True, repetition_penalty=penalty).json()["choices"][0]
        for temperature, penalty in ((0, 1), (1e-300, 1), (1e-9, 1), (1e-300, 0.01), (0, 0.01))
    ]
    assert [choice["message"]["content"] for choice in texts[:3]] == [
        drawn(HELLO, temperature=0, max_new_tokens=8)[0]
    ] * 3
    assert texts[3] == texts[4]
    assert all(entry["logprob"] <= 0 for choice in texts for entry in choice["logprobs"]["content"])


def test_a_top_p_of_zero_is_greedy(server: Live) -> None:
    answer = server.chat(top_p=0, temperature=1, seed=3).json()
    expected = drawn(HELLO, temperature=0, max_new_tokens=8)[0]
    assert answer["choices"][0]["message"]["content"] == expected
