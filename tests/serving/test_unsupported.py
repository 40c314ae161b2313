"""Parameters whose value asks for nothing change nothing, whatever client sends them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.serving.live import Live, live

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as running:
        yield running


@pytest.mark.parametrize(
    "more",
    [
        {"tools": None, "tool_choice": None, "parallel_tool_calls": None, "functions": None},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": False},
        {"tool_choice": "auto", "parallel_tool_calls": True},
        {"metadata": None, "service_tier": None, "store": None, "reasoning_effort": None},
        {"metadata": {}, "service_tier": "auto", "store": False, "modalities": ["text"]},
        {"best_of": 1, "use_beam_search": False, "length_penalty": 1.0, "min_tokens": 0},
        {"ignore_eos": False, "stop_token_ids": [], "skip_special_tokens": True, "bad_words": []},
        {"add_generation_prompt": True, "continue_final_message": False, "chat_template_kwargs": {}},
        {"top_k": -1},
        {"top_k": 0},
        {"max_completion_tokens": 8},
        {"user": "ann", "safety_identifier": "a", "prompt_cache_key": "b"},
        {
            "stream_options": None,
            "response_format": None,
            "guided_json": None,
            "a_parameter_of_tomorrow": None,
        },
    ],
)
def test_a_chat_parameter_that_asks_for_nothing_changes_nothing(server: Live, more: dict[str, Any]) -> None:
    plain = server.chat(seed=3).json()["choices"]
    response = server.chat(seed=3, **more)
    assert response.status_code == 200, response.text
    assert response.json()["choices"] == plain


@pytest.mark.parametrize(
    "more",
    [
        {"suffix": None, "best_of": None, "echo": None},
        {"suffix": "", "best_of": 1, "echo": False},
        {"add_special_tokens": True, "truncate_prompt_tokens": None, "logit_bias": {}, "metadata": {}},
    ],
)
def test_a_text_parameter_that_asks_for_nothing_changes_nothing(server: Live, more: dict[str, Any]) -> None:
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 8, "seed": 3}
    plain = server.post("/v1/completions", **asked).json()["choices"]
    response = server.post("/v1/completions", **asked, **more)
    assert response.status_code == 200, response.text
    assert response.json()["choices"] == plain


def test_stream_options_that_ask_for_nothing_change_nothing(server: Live) -> None:
    def content(options: Any) -> list[str]:
        lines = server.chat(seed=3, stream=True, stream_options=options).text.splitlines()
        return [line.partition('"choices":')[2] for line in lines]

    plain = content({"include_usage": True})
    more = {"continuous_usage_stats": False, "include_obfuscation": False, "another": None}
    assert content({"include_usage": True, **more}) == plain


@pytest.mark.parametrize("dumped", [lambda m: m, lambda m: m.model_dump(), lambda m: m.to_dict()])
def test_an_answer_goes_back_as_the_official_client_dumps_it(server: Live, dumped: Any) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

        def ask(messages: list[Any]) -> Any:
            return client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, seed=3)

        reply = ask(HELLO).choices[0].message
        plain = {"role": "assistant", "content": reply.content}
        more = [{"role": "user", "content": "and?", "name": "ann"}]
        second = ask([*HELLO, dumped(reply), *more])
        assert second.choices == ask([*HELLO, plain, {"role": "user", "content": "and?"}]).choices


def test_a_turn_of_another_server_goes_back_as_it_came(server: Live) -> None:
    nothing = {"reasoning_content": None, "tool_calls": [], "annotations": [], "audio": None, "refusal": None}
    turns = [*HELLO, {"role": "assistant", "content": "a"}, *HELLO]
    plain = server.post(model="tiny", messages=turns, max_tokens=8, seed=3).json()["choices"]
    turns[1] = {**turns[1], **nothing}
    assert server.post(model="tiny", messages=turns, max_tokens=8, seed=3).json()["choices"] == plain
