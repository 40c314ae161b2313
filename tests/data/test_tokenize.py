from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dovetail.config.data import DataConfig, SourceConfig
from dovetail.data import tokenize
from dovetail.data.blend import load_stage
from dovetail.data.tokenize import (
    fitting_prompts,
    tokenize_comparisons,
    tokenize_demonstrations,
    tokenize_texts,
)
from dovetail.errors import DataError
from dovetail.text.chat_format import ChatFormat
from tests.data.files import config, pairs, questions, write_jsonl
from tests.fakes import byte_tokenizer
from tests.text.tokenizers import CHATML, byte_level

CHAT = ChatFormat(byte_tokenizer())


def one_stage(tmp_path: Path, rows: list[dict[str, Any]], stage: str, **changes: Any) -> DataConfig:
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    return config(tmp_path, SourceConfig(path=path, stages=(stage,), held_out=False), **changes)


def demonstrations(data: DataConfig, chat: ChatFormat = CHAT) -> Any:
    return tokenize_demonstrations(load_stage(data, "sft", "train"), chat, data)


def test_demonstrations_are_their_conversations(tmp_path: Path) -> None:
    data = one_stage(tmp_path, questions(40), "sft")
    expected = [CHAT.conversation(row.messages) for row in load_stage(data, "sft", "train")]
    assert list(demonstrations(data)) == expected
    assert len(expected) == 40


def test_comparisons_are_prompt_and_answer_with_their_pairs(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"q{i}", "answers": ["a", "bb", "ccc"], "scores": [1, i, 2], "m": 0.5} for i in range(9)
    ]
    source = SourceConfig(
        path=write_jsonl(tmp_path / "rows.jsonl", rows),
        prompt="prompt", answers="answers", scores="scores", margin="m", stages=("reward",), held_out=False,
    )  # fmt: skip
    data = config(tmp_path, source)
    tokenized = tokenize_comparisons(load_stage(data, "reward", "train"), CHAT, data)
    assert len(tokenized) == 9
    for i, (answers, better) in enumerate(tokenized):
        prompt = CHAT.prompt_ids([{"role": "user", "content": f"q{i}"}])
        assert answers == [prompt + CHAT.answer_ids(text) for text in ("a", "bb", "ccc")]
        scores = [1, i, 2]
        assert set(better) == {(a, b, 0.5) for a in range(3) for b in range(3) if scores[a] > scores[b]}


def test_texts_are_cut_into_pieces_that_join_to_the_whole(tmp_path: Path) -> None:
    texts = ["short", "x" * 250, "y" * 99, "z" * 100]
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    data = config(tmp_path, pretraining=(SourceConfig(path=path, held_out=False),), max_tokens=100)
    rows = list(tokenize_texts(load_stage(data, "text", "train"), CHAT, data))
    assert max(len(ids) for ids, _ in rows) == 100
    assert all(all(mask) and len(mask) == len(ids) for ids, mask in rows)
    joined = [i for ids, _ in rows for i in ids]
    whole = [i for text in texts for i in CHAT.encode_texts([text])[0]]
    assert joined == whole[:-1]  # the end token after z * 100 would be a piece of its own: nothing to predict


def test_many_chunks_are_the_same_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = one_stage(tmp_path, questions(30), "sft")
    whole = list(demonstrations(data))
    monkeypatch.setattr(tokenize, "CHUNK_ROWS", 7)
    assert list(demonstrations(data.model_copy(update={"cache_dir": str(tmp_path / "other")}))) == whole


def rows_of_lengths(*lengths: int) -> list[dict[str, str]]:
    """Byte tokens: 9 + length + 12 for the prompt, 1 + 3 + 1 for the answer."""
    return [{"prompt": chr(ord("a") + i) * n, "response": "yes"} for i, n in enumerate(lengths)]


def test_rows_that_are_too_long_are_dropped_and_counted(tmp_path: Path) -> None:
    data = one_stage(tmp_path, rows_of_lengths(10, 74, 73, 200), "sft", max_tokens=100)
    rows = demonstrations(data)
    assert sorted(len(ids) for ids, _ in rows) == [36, 99, 100]
    assert rows.report.sources[0].too_long == 1
    assert "too long (left out)" in rows.report.lines()[0]


def test_prompts_are_cut_from_the_left_and_answers_never(tmp_path: Path) -> None:
    data = one_stage(tmp_path, rows_of_lengths(10, 300), "sft", max_tokens=100, too_long="truncate_left")
    rows = demonstrations(data)
    assert len(rows) == 2
    ids, mask = max(rows, key=lambda row: len(row[0]))
    assert len(ids) == 100
    assert [i for i, is_answer in zip(ids, mask, strict=True) if is_answer] == CHAT.answer_ids("yes")
    assert CHAT.tokenizer.decode(ids).startswith("\n\nHuman: bbb")
    assert (rows.report.sources[0].truncated, rows.report.sources[0].too_long) == (1, 0)


def test_an_answer_that_leaves_no_room_for_a_prompt_is_dropped(tmp_path: Path) -> None:
    rows = [{"prompt": "why?", "response": "because " * 30}, *questions(1)]
    data = one_stage(tmp_path, rows, "sft", max_tokens=100, too_long="truncate_left")
    tokenized = demonstrations(data)
    assert (len(tokenized), tokenized.report.sources[0].too_long) == (1, 1)


def test_comparisons_are_cut_for_their_longest_answer(tmp_path: Path) -> None:
    rows = [{"prompt": "q" * 200, "chosen": "x" * 10, "rejected": "y" * 30}]
    data = one_stage(tmp_path, rows, "reward", max_tokens=100, too_long="truncate_left")
    ((answers, _),) = tokenize_comparisons(load_stage(data, "reward", "train"), CHAT, data)
    assert [len(ids) for ids in answers] == [80, 100]
    assert answers[0][: 100 - 32] == answers[1][: 100 - 32]


def test_error_stops_at_a_row_that_is_too_long(tmp_path: Path) -> None:
    data = one_stage(tmp_path, rows_of_lengths(10, 300), "sft", max_tokens=100, too_long="error")
    with pytest.raises(DataError, match="a row has 326 tokens, more than max_tokens = 100; it begins 'bbb"):
        demonstrations(data)


def test_when_no_row_fits_the_counts_are_in_the_error(tmp_path: Path) -> None:
    data = one_stage(tmp_path, questions(5), "sft", max_tokens=10)
    with pytest.raises(DataError, match=r"no row of the stage sft fits max_tokens = 10: .*5 too long"):
        demonstrations(data)
    data = one_stage(tmp_path, questions(5), "ppo", max_prompt_tokens=10)
    with pytest.raises(DataError, match="no row of the stage ppo fits max_prompt_tokens = 10"):
        fitting_prompts(load_stage(data, "ppo", "train"), CHAT, data)


@pytest.mark.parametrize("too_long", ["drop", "truncate_left"])
def test_prompts_for_sampling_fit(too_long: str, tmp_path: Path) -> None:
    data = one_stage(
        tmp_path, rows_of_lengths(5, 29, 30, 200), "ppo", max_prompt_tokens=50, too_long=too_long
    )
    prompts = fitting_prompts(load_stage(data, "ppo", "train"), CHAT, data)
    assert all(len(CHAT.prompt_ids(prompt.messages)) <= 50 for prompt in prompts)
    assert all(prompt.row["response"] for prompt in prompts)
    counts = prompts.report.sources[0]
    assert (len(prompts), counts.too_long, counts.truncated) == (
        (2, 2, 0) if too_long == "drop" else (4, 0, 2)
    )


def test_weights_hold_after_rows_were_left_out(tmp_path: Path) -> None:
    short = write_jsonl(tmp_path / "s.jsonl", questions(100))
    long = write_jsonl(tmp_path / "l.jsonl", [*rows_of_lengths(*range(300, 325)), *questions(25, "r")])
    sources = [SourceConfig(path=path, weight=1, stages=("sft",), held_out=False) for path in (short, long)]
    data = config(tmp_path, *sources, max_tokens=100)
    rows = demonstrations(data)
    from_long = sum(" to r" in CHAT.tokenizer.decode(ids) for ids, _ in rows)
    assert (len(rows), from_long) in ((125, 62), (125, 63))


def test_the_second_time_nothing_is_tokenised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = one_stage(tmp_path, [*questions(20), *rows_of_lengths(900)], "sft")
    first = demonstrations(data)
    monkeypatch.setattr(ChatFormat, "encode_conversations", None)
    second = demonstrations(data)
    assert list(second) == list(first)
    assert second.report == first.report


@pytest.mark.parametrize("change", ["row", "template", "tokenizer", "limit", "policy", "stage"])
def test_whatever_changes_tokens_makes_them_anew(change: str, tmp_path: Path) -> None:
    rows = questions(5)
    data = one_stage(tmp_path, rows, "sft")
    demonstrations(data)
    chat = CHAT
    if change == "row":
        rows[2]["response"] += "!"
        data = one_stage(tmp_path, rows, "sft")
    elif change == "template":
        chat = ChatFormat(byte_tokenizer(), "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    elif change == "tokenizer":
        chat = ChatFormat(byte_level(CHATML))
    elif change == "stage":
        data = one_stage(tmp_path, pairs(5), "sft")
    else:
        data = data.model_copy(
            update={"max_tokens": 400} if change == "limit" else {"too_long": "truncate_left"}
        )
    demonstrations(data, chat)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_moving_a_file_or_renaming_columns_keeps_the_tokens(tmp_path: Path) -> None:
    demonstrations(one_stage(tmp_path, questions(5), "sft"))
    renamed = [{"q": row["prompt"], "a": row["response"]} for row in questions(5)]
    source = SourceConfig(
        path=write_jsonl(tmp_path / "moved.jsonl", renamed),
        prompt="q",
        response="a",
        stages=("sft",),
        held_out=False,
    )
    demonstrations(config(tmp_path, source))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_nothing_held_out_is_an_empty_sequence(tmp_path: Path) -> None:
    data = one_stage(tmp_path, questions(5), "sft")
    rows = tokenize_demonstrations(load_stage(data, "sft", "held_out"), CHAT, data)
    assert list(rows) == []
    assert len(rows) == 0
