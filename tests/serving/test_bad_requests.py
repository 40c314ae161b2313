"""Every way a request can be wrong: the right status, OpenAI's form, and a message that says what to do."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from dovetail.serving.gate import RequestLimits
from tests.serving.live import Live, live

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    limits = RequestLimits(max_body_bytes=20_000, max_new_tokens=400, max_prompt_tokens=450)
    with live(limits=limits) as running:
        yield running


def problem(response: httpx.Response) -> dict[str, Any]:
    """The error object, which has all four fields and no other."""
    error: dict[str, Any] = response.json()["error"]
    assert list(response.json()) == ["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    return error


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 10**400}, "max_tokens", "2147483648"),
        ({"n": -5}, "n", "greater than or equal to 1"),
        ({"n": 17}, "n", "17 answers, and one request may ask for 16"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
        ({"seed": 2**64}, "seed", "less than"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'user'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "valid string"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content", "surrogate"),
        ({"model": "\ud800"}, "model", "surrogate"),
        ({"\ud800": 1}, None, "unicode"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            None,
            "'text'",
        ),
        ({"tools": [{"type": "function"}]}, "tools", "no such parameter"),
        ({"tool_choice": "required"}, "tool_choice", "no such parameter"),
        ({"store": True}, "store", "no such parameter"),
        ({"store": 0}, "store", "no such parameter"),
        ({"metadata": {"a": "b"}}, "metadata", "no such parameter"),
        ({"service_tier": "priority"}, "service_tier", "no such parameter"),
        ({"best_of": 2}, "best_of", "no such parameter"),
        ({"best_of": True}, "best_of", "no such parameter"),
        ({"ignore_eos": True}, "ignore_eos", "no such parameter"),
        ({"skip_special_tokens": False}, "skip_special_tokens", "no such parameter"),
        ({"modalities": ["text", "audio"]}, "modalities", "no such parameter"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs", "no such parameter"),
        ({"anything": False}, "anything", "no such parameter"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"top_k": True}, "top_k", "valid integer"),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": "b"}]}]},
            "messages.0.tool_calls",
            "no such parameter",
        ),
        ({"messages": [{"role": "user", "content": "a", "name": 5}]}, "messages.0.name", "valid string"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "no such parameter",
        ),
        ({"presence_penalty": 0.5}, "presence_penalty", "repetition_penalty instead"),
        ({"logit_bias": {"5": 3}}, "logit_bias", "cannot bias"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "'text'"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "greater than or equal to 0"),
        ({"top_logprobs": 0}, "top_logprobs", "needs logprobs = true"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only with stream = true"),
        ({"max_completion_tokens": 5}, "max_tokens", "not both"),
        ({"max_tokens": 401}, "max_tokens", "401, and this server gives 400"),
    ],
)
def test_a_wrong_parameter_is_named(
    server: Live, change: dict[str, Any], param: str | None, says: str
) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 4, **change}
    response = httpx.post(f"{server.url}/v1/chat/completions", content=json.dumps(body), headers=JSON)
    assert response.status_code == 400
    error = problem(response)
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("body", [{}, {"prompt": "abc"}, {"model": "tiny"}])
def test_a_missing_parameter_is_named(server: Live, body: dict[str, Any]) -> None:
    response = server.post("/v1/completions", **body)
    assert response.status_code == 400
    assert "Field required" in problem(response)["message"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"logprobs": 6}, "less than or equal to 5"),
        ({"logprobs": -1}, "greater than or equal to 0"),
        ({"prompt": []}, "empty list"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": [-1]}, "greater than or equal to 0"),
        ({"prompt": [300]}, "prompt token 300 is not in the model's vocabulary of 258"),
        ({"suffix": "x"}, "no such parameter"),
        ({"best_of": 3}, "no such parameter"),
    ],
)
def test_a_wrong_text_completion_is_refused(server: Live, change: dict[str, Any], says: str) -> None:
    response = server.post("/v1/completions", **{"model": "tiny", "prompt": "a", "max_tokens": 2, **change})
    assert response.status_code == 400
    assert says in problem(response)["message"]


def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(server: Live) -> None:
    with live() as unlimited:
        error = problem(unlimited.chat("x" * 600))
    assert error["code"] == "context_length_exceeded"
    assert error["message"] == "the model's context is 512 tokens; the prompt has 621 and 8 new ones"
    error = problem(server.chat("x" * 300, max_tokens=200))
    assert error["message"] == "the model's context is 512 tokens; the prompt has 321 and 200 new ones"
    error = problem(server.chat("x" * 430))
    assert (error["code"], error["message"]) == (
        "prompt_too_long",
        "the prompt has 451 tokens, and this server takes 450",
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "not valid JSON"),
        (b"", "required"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\xff"}]}', "parsing the body"),
        (b"[" * 9_000, ""),
        (b'{"model": "tiny", "temperature": NaN, "messages": [{"role": "user", "content": "a"}]}', "finite"),
    ],
)
def test_a_body_that_is_no_request_is_refused(server: Live, content: bytes, says: str) -> None:
    response = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=JSON)
    assert response.status_code == 400
    assert says in problem(response)["message"]


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_beyond_the_limit_is_413(server: Live, is_chunked: bool) -> None:
    content: Any = (b"x" * 1000 for _ in range(30)) if is_chunked else b"x" * 30_000
    response = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=JSON)
    assert response.status_code == 413
    assert problem(response)["message"] == "the body is larger than 20000 bytes"


def test_an_unknown_model_is_404_and_the_known_ones_are_told(server: Live) -> None:
    error = problem(server.chat(model="gpt-9"))
    assert (error["code"], error["message"]) == ("model_not_found", "no model 'gpt-9' here; there are: tiny")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-9")
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="tiny", messages=HELLO, n=0)


def test_other_paths_and_methods_are_404_and_405(server: Live) -> None:
    assert httpx.get(f"{server.url}/v1/embeddings").status_code == 404
    assert (
        problem(httpx.get(f"{server.url}/v1/embeddings"))["message"] == "there is nothing at /v1/embeddings"
    )
    response = httpx.get(f"{server.url}/v1/chat/completions")
    assert response.status_code == 405
    assert problem(response)["message"] == "GET is not for this path"


@pytest.mark.parametrize(
    "path",
    [
        "/web/../keys.py",
        "/web/%2e%2e/keys.py",
        "/web/..%2f..%2fapp.py",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/v1/models/../../etc/passwd",
        "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    ],
)
def test_no_path_leads_to_a_file(server: Live, path: str) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port))  # sends the path as it is
    connection.request("GET", path)
    response = connection.getresponse()
    assert response.status == 404
    assert json.loads(response.read())["error"]["type"] == "invalid_request_error"
    connection.close()


def test_a_script_in_a_conversation_comes_back_as_json_text(server: Live) -> None:
    script = "<script>alert(1)</script>"
    response = server.chat(script)
    assert response.headers["content-type"] == "application/json"
    error = server.chat(model=script)
    assert error.headers["content-type"] == "application/json"
    assert script in problem(error)["message"]
