"""Answers in Python, and of a file, against the engine and the server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dovetail import ChatModel, Sampling
from dovetail.cli.main import main
from dovetail.engine import HybridEngine
from dovetail.errors import DataError, GenerationError
from dovetail.inference.chat_model import Reply
from dovetail.inference.prompt_file import AnswerFile, read_prompts
from dovetail.model.load import save_model
from dovetail.text.chat_format import ChatFormat
from dovetail.text.message import Message
from tests.fakes import byte_tokenizer, tiny_model

SHORT = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(tiny_model(), byte_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> ChatModel:
    return ChatModel(str(folder), device="cpu")


def drawn(messages: list[Message], seed: int, max_new_tokens: int = 12) -> str:
    """The answer by the engine itself."""
    chat = ChatFormat(byte_tokenizer())
    sampling = Sampling(max_new_tokens=max_new_tokens, stop_token_ids=chat.stop_token_ids)
    with HybridEngine(tiny_model()).generating() as generate:
        (answer,) = generate([chat.prompt_ids(messages)], sampling, seeds=[seed])
    return chat.decode(answer.token_ids)


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


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def written(file: Path, *lines: Any) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def generate(folder: Path, prompts: Path, output: Path) -> int:
    arguments = ["generate", str(folder), "--prompts", str(prompts), "--output", str(output), "--top-p", "1"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--temperature", "1", "--max-new-tokens", "12", "--seed", "7", "--device", "cpu"])
    return int(stopped.value.code or 0)


def test_a_file_is_answered_in_order_and_resumed_to_the_same_answers(folder: Path, tmp_path: Path) -> None:
    prompts = written(
        tmp_path / "in.jsonl",
        *({"id": f"row {number}", "prompt": f"a\u2028 {number}"} for number in range(6)),
        {"messages": [{"role": "user", "content": "b"}], "id": "last"},
    )
    output = tmp_path / "new" / "out.jsonl"
    assert generate(folder, prompts, output) == 0
    whole = rows(output)
    assert [row["id"] for row in whole] == [*(f"row {number}" for number in range(6)), "last"]
    for index, row in enumerate(whole):
        messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        assert row["answer"] == drawn(messages, 7 + index)
        assert row["finish_reason"] in ("stop", "length")
    content = output.read_bytes()
    torn = content[: content.index(b"\n", len(content) // 2) + 9]  # some lines, and the beginning of another
    output.write_bytes(torn)
    assert generate(folder, prompts, output) == 0
    assert output.read_bytes() == content
    assert generate(folder, prompts, output) == 0
    assert output.read_bytes() == content


def test_answers_to_other_prompts_are_not_added_to(folder: Path, tmp_path: Path) -> None:
    prompts = written(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"})
    output = written(tmp_path / "out.jsonl", {"prompt": "c", "answer": "d", "finish_reason": "stop"})
    with pytest.raises(DataError, match="line 1: no answer to prompt 1") as caught:
        AnswerFile(output, read_prompts(prompts))
    assert "another --output" in str(caught.value.hint)
    written(output, *({"prompt": "a"} for _ in range(3)))
    with pytest.raises(DataError, match="has 3 answers, and there are 2 prompts"):
        AnswerFile(output, read_prompts(prompts))


def test_lines_are_written_when_those_before_them_are(tmp_path: Path) -> None:
    prompts = read_prompts(written(tmp_path / "in.jsonl", *({"prompt": str(number)} for number in range(3))))
    output = tmp_path / "out.jsonl"
    with AnswerFile(output, prompts) as answers:
        answers.add(1, "one", "stop")
        assert rows(output) == []
        answers.add(0, "zero", "stop")
        assert [row["answer"] for row in rows(output)] == ["zero", "one"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "no JSON"),
        ("[]", "dictionary"),
        ('{"id": 1}', "neither `prompt` nor `messages`"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "both `prompt` and `messages`"),
        ('{"messages": [{"role": "robot", "content": "b"}]}', "'user'"),
        ('{"messages": []}', "at least 1"),
        ('{"prompt": "a", "answer": "b"}', "has a column `answer` already"),
        ('{"prompt": "a", "finish_reason": "stop"}', "has a column `finish_reason` already"),
        (r'{"prompt": "a", "id": "\ud800"}', "half a surrogate pair"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(DataError) as caught:
        read_prompts(file)
    assert f"{file}, line 2: " in caught.value.message
    assert says in caught.value.message


def test_a_file_without_prompts_or_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for name, says in (("empty", "has no prompts"), ("none", "cannot be read")):
        with pytest.raises(DataError, match=says):
            read_prompts(tmp_path / name)
