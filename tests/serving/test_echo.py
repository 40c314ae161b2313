"""A prompt's own log-probabilities, against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dovetail.serving.inference.loading import LoadedChat
from dovetail.serving.served_model import ServedModel, load_models
from dovetail.text.chat_format import ChatFormat
from tests.fakes import byte_tokenizer, tiny_model
from tests.serving.live import CPU, Live, live, tiny_served
from tests.text.tokenizers import CHATML, sentence_piece

SP = sentence_piece(CHATML)


def sp_model() -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=len(SP), max_position_embeddings=128, initializer_range=0.2, **shape)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    loaded = LoadedChat("sp", sp_model(), ChatFormat(SP), torch.device("cpu"))
    with live([tiny_served(), ServedModel("sp", loaded, CPU)]) as running:
        yield running


def expected(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [T - 1, V] of what follows each token, by transformers in float64."""
    with torch.no_grad():
        return model.double()(torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)


def completion(server: Live, **asked: Any) -> dict[str, Any]:
    response = server.post("/v1/completions", **{"max_tokens": 1, "temperature": 0, **asked})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize("name", ["tiny", "sp"])
@pytest.mark.parametrize("as_ids", [False, True])
def test_echo_lists_the_prompt_s_tokens_with_transformers_numbers(
    server: Live, name: str, as_ids: bool
) -> None:
    prompt = "hello there friend, what"
    tokenizer, model = (byte_tokenizer(), tiny_model()) if name == "tiny" else (SP, sp_model())
    ids = list(tokenizer(prompt)["input_ids"])
    answer = completion(
        server, model=name, prompt=ids if as_ids else prompt, echo=True, logprobs=2, max_tokens=3
    )
    choice = answer["choices"][0]
    listed, text = choice["logprobs"], choice["text"]
    assert text.startswith(tokenizer.decode(ids) if as_ids else prompt)
    assert "".join(listed["tokens"][: len(ids)]) == (tokenizer.decode(ids) if as_ids else prompt)
    assert len(listed["tokens"]) == answer["usage"]["total_tokens"]
    for token, offset in zip(listed["tokens"], listed["text_offset"], strict=True):
        assert text[offset : offset + len(token)] == token or token == "\ufffd"
    assert listed["token_logprobs"][0] is None
    assert listed["top_logprobs"][0] is None
    logprobs = expected(model, ids)
    own = [float(row[i]) for row, i in zip(logprobs, ids[1:], strict=True)]
    assert listed["token_logprobs"][1 : len(ids)] == pytest.approx(own, rel=1e-4, abs=1e-5)
    for row, mine, top in zip(logprobs, own, listed["top_logprobs"][1:], strict=False):
        assert max(top.values()) == pytest.approx(float(row.max()), rel=1e-4, abs=1e-5)
        assert (max(top.values()) in listed["token_logprobs"]) == (mine == float(row.max()))


def test_settings_of_the_draw_do_not_change_the_prompt_s_numbers(server: Live) -> None:
    def numbers(**more: Any) -> Any:
        answer = completion(server, model="tiny", prompt="abcabc", echo=True, logprobs=0, **more)
        return answer["choices"][0]["logprobs"]["token_logprobs"][:6]

    plain = numbers()
    for more in ({"temperature": 0.3}, {"top_k": 1}, {"repetition_penalty": 2.0}):
        assert numbers(**more)[1:] == pytest.approx(plain[1:], rel=1e-5)


def test_the_token_that_ends_the_answer_is_listed_behind_a_repeated_prompt(tmp_path: Path) -> None:
    """lm-evaluation-harness takes the last entry for the one token that it asked for."""
    model, ids = tiny_model(), byte_tokenizer()("abc")["input_ids"]
    greedy = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [256, greedy]
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with live(load_models([f"tiny={tmp_path}"], CPU)) as server:
        choice = completion(server, model="tiny", prompt="abc", echo=True, logprobs=1)["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("abc", "stop")
        assert choice["logprobs"]["tokens"] == ["a", "b", "c", ""]
        without = completion(server, model="tiny", prompt="abc", logprobs=1)["choices"][0]
        assert without["logprobs"]["tokens"] == []


@pytest.mark.parametrize("is_stream", [False, True])
def test_every_answer_to_every_prompt_is_behind_its_own(server: Live, is_stream: bool) -> None:
    asked = {"model": "tiny", "prompt": ["abc", "what"], "n": 2, "max_tokens": 4, "seed": 1, "logprobs": 0}
    plain = server.post("/v1/completions", **asked).json()["choices"]
    if is_stream:
        texts = {index: "" for index in range(4)}
        logprobs: dict[int, list[Any]] = {index: [] for index in range(4)}
        for event in events(server.post("/v1/completions", **asked, echo=True, stream=True)):
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
                logprobs[choice["index"]] += choice["logprobs"]["token_logprobs"]
    else:
        choices = server.post("/v1/completions", **asked, echo=True).json()["choices"]
        texts = {choice["index"]: choice["text"] for choice in choices}
        logprobs = {choice["index"]: choice["logprobs"]["token_logprobs"] for choice in choices}
    for index, prompt in enumerate(["abc", "abc", "what", "what"]):
        assert texts[index] == prompt + plain[index]["text"]
        drawn = plain[index]["logprobs"]["token_logprobs"]
        assert logprobs[index][len(prompt) :][: len(drawn)] == pytest.approx(drawn, rel=1e-4)


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [httpx.Response(200, text=line).json() for line in lines[:-1]]


def test_echo_without_logprobs_repeats_the_prompt(server: Live) -> None:
    plain = completion(server, model="sp", prompt="hello there", max_tokens=4)["choices"][0]
    choice = completion(server, model="sp", prompt="hello there", max_tokens=4, echo=True)["choices"][0]
    assert choice == {**plain, "text": "hello there" + plain["text"]}


@pytest.mark.parametrize("is_chat", [False, True])
def test_prompt_logprobs_are_by_token_id(server: Live, is_chat: bool) -> None:
    if is_chat:
        answer = server.chat(prompt_logprobs=2, max_tokens=2).json()
        ids, found = ChatFormat(byte_tokenizer()).prompt_ids([{"role": "user", "content": "hello"}]), answer
    else:
        ids = list(byte_tokenizer()("hello")["input_ids"])
        found = completion(server, model="tiny", prompt="hello", prompt_logprobs=2)["choices"][0]
    first, *others = found["prompt_logprobs"]
    assert first is None
    for row, own, entry in zip(expected(tiny_model(), ids), ids[1:], others, strict=True):
        top = row.topk(2).indices.tolist()
        assert set(entry) == {str(i) for i in (*top, own)}
        for i in (*top, own):
            said = entry[str(i)]
            assert said["logprob"] == pytest.approx(float(row[i]), rel=1e-4, abs=1e-5)
            assert said["rank"] == int((row > row[i]).sum()) + 1
            assert said["decoded_token"] == byte_tokenizer().decode([i])


def test_prompt_logprobs_do_not_go_with_a_stream(server: Live) -> None:
    response = server.chat(prompt_logprobs=1, stream=True)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt_logprobs"


def test_a_text_is_cut_where_the_context_ends(server: Live) -> None:
    answer = completion(server, model="sp", prompt=list(range(40, 160)), max_tokens=256)
    assert answer["usage"]["total_tokens"] <= 128
    assert answer["choices"][0]["finish_reason"] in ("length", "stop")
    refused = server.post("/v1/completions", model="sp", prompt=[40] * 128, max_tokens=256)
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_a_prompt_whose_scoring_fails_takes_nobody_along(
    server: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **_options: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("dovetail.engine.hybrid.prompt_scores", fail)
    response = server.post("/v1/completions", model="tiny", prompt="abc", echo=True, logprobs=1)
    assert response.status_code == 503
    assert "could not be scored: out of memory" in response.json()["error"]["message"]
    assert server.chat().status_code == 200
