"""Answers in Python against the engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dovetail import ChatModel, Sampling
from dovetail.errors import DovetailError, GenerationError
from dovetail.model.load import save_model
from dovetail.serving.inference.chat_model import Reply
from dovetail.text.message import Message
from tests.fakes import byte_tokenizer, tiny_model
from tests.serving.inference.drawing import drawn

SHORT = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(tiny_model(), byte_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> ChatModel:
    return ChatModel(str(folder), device="cpu")


def test_importing_dovetail_imports_nothing_heavy() -> None:
    script = (
        "import sys, dovetail; print([m for m in ('torch', 'fastapi', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_answer_is_the_engine_s_and_so_are_its_pieces(model: ChatModel) -> None:
    for seed in (1, 2):
        expected = drawn([{"role": "user", "content": "hello"}], seed)
        pieces = list(model.stream("hello", sampling=SHORT, seed=seed))
        assert "".join(pieces) == expected == model.chat("hello", sampling=SHORT, seed=seed)
        assert len(pieces) > 3


def test_a_conversation_may_be_turns_and_a_system_prompt_stands_before_those_without(folder: Path) -> None:
    kind = ChatModel(str(folder), device="cpu", system="be kind")
    system: Message = {"role": "system", "content": "be kind"}
    turns: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    turns.append({"role": "user", "content": "c"})
    assert kind.chat(turns, sampling=SHORT, seed=1) == drawn([system, *turns], 1)
    other: Message = {"role": "system", "content": "be brief"}
    assert kind.chat([other, *turns], sampling=SHORT, seed=1) == drawn([other, *turns], 1)


def test_many_are_each_what_they_are_alone_and_told_as_they_finish(model: ChatModel) -> None:
    questions = [f"question {number}" for number in range(100)]
    replies: list[Reply] = []
    texts = model.chat_many(questions, sampling=SHORT, seeds=range(100), on_reply=replies.append)
    for index in (0, 63, 64, 99):
        assert texts[index] == drawn([{"role": "user", "content": questions[index]}], index)
    assert sorted(reply.index for reply in replies) == list(range(100))
    assert all(reply.text == texts[reply.index] for reply in replies)


def test_leaving_a_stream_ends_it_and_the_next_call_works(model: ChatModel) -> None:
    for _piece in model.stream("hello", sampling=Sampling(max_new_tokens=400), seed=1):
        break
    assert model.chat("hello", sampling=SHORT, seed=1) == drawn([{"role": "user", "content": "hello"}], 1)


def test_models_that_keep_their_own_attention_answer_too(tmp_path: Path) -> None:
    save_model(tiny_model("bloom"), byte_tokenizer(), tmp_path / "bloom")
    bloom = ChatModel(str(tmp_path / "bloom"), device="cpu")
    with pytest.warns(UserWarning, match="padded"):
        texts = bloom.chat_many(["a", "b"], sampling=SHORT, seeds=[1, 2])
    with pytest.warns(UserWarning, match="padded"):
        assert texts[0] == bloom.chat("a", sampling=SHORT, seed=1)
    assert texts[1] == bloom.chat("b", sampling=SHORT, seed=2)


def test_a_prompt_without_room_for_an_answer_is_refused(model: ChatModel) -> None:
    for ask in (model.chat, lambda text: model.chat_many(["a", text])):
        with pytest.raises(GenerationError, match="the prompt has 621 tokens"):
            ask("x" * 600)


def test_a_padded_prompt_without_room_is_refused_before_any_answer(tmp_path: Path) -> None:
    bloom = tiny_model("bloom")
    bloom.config.max_position_embeddings = 128
    save_model(bloom, byte_tokenizer(), tmp_path / "bloom")
    padded = ChatModel(str(tmp_path / "bloom"), device="cpu")
    replies: list[Reply] = []
    with (
        pytest.warns(UserWarning, match="padded"),
        pytest.raises(GenerationError, match="request 32: the prompt has 621 tokens"),
    ):
        padded.chat_many([*"a" * 32, "x" * 600], sampling=SHORT, on_reply=replies.append)
    assert not replies


def test_refused_conversations_are_told_of_and_the_others_are_answered(model: ChatModel) -> None:
    refused: dict[int, DovetailError] = {}
    texts = model.chat_many(
        ["a", "x" * 600, "b"], sampling=SHORT, seeds=[1, 2, 3], on_refusal=refused.__setitem__
    )
    assert list(refused) == [1]
    assert "the prompt has 621 tokens" in refused[1].message
    assert texts == [
        drawn([{"role": "user", "content": "a"}], 1),
        "",
        drawn([{"role": "user", "content": "b"}], 3),
    ]


@pytest.mark.parametrize("changed", ["weights", "template"])
def test_a_fingerprint_tells_models_apart_and_not_where_they_lie(
    folder: Path, model: ChatModel, tmp_path: Path, changed: str
) -> None:
    other, tokenizer = tiny_model(), byte_tokenizer()
    save_model(other, tokenizer, tmp_path / "copy")
    assert ChatModel(str(tmp_path / "copy"), device="cpu").fingerprint() == model.fingerprint()
    if changed == "weights":
        other.lm_head.weight.data *= 1.001
    else:
        tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content + '<|end|>' }}{% endfor %}")
    save_model(other, tokenizer, tmp_path / "changed")
    assert ChatModel(str(tmp_path / "changed"), device="cpu").fingerprint() != model.fingerprint()


def test_an_answer_ends_where_the_model_says_that_it_does(tmp_path: Path) -> None:
    whole = drawn([{"role": "user", "content": "hello"}], 1)
    letter = next(letter for letter in whole[3:] if letter.isascii())
    end = byte_tokenizer()(letter)["input_ids"][0]
    ending = tiny_model()
    assert ending.generation_config is not None
    ending.generation_config.eos_token_id = [256, end]
    ending.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model = ChatModel(str(tmp_path), device="cpu")
    expected = whole[: whole.index(letter)]
    assert model.chat("hello", sampling=SHORT, seed=1) == expected
    assert model.chat_many(["hello"], sampling=SHORT, seeds=[1]) == [expected]
