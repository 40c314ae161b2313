from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dovetail.config.data import DataConfig, SourceConfig
from dovetail.data.blend import load_stage
from dovetail.data.preview import preview
from dovetail.data.report import DataReport
from dovetail.data.tokenize import fitting_prompts, tokenize_comparisons, tokenize_demonstrations
from dovetail.errors import DataError
from dovetail.text.chat_format import ChatFormat
from tests.data.files import assistant, config, system, user, write_jsonl
from tests.text.tokenizers import INST, byte_level

CHAT = ChatFormat(byte_level(INST, bos=True))
GOOD = [user("hello"), assistant("hello friend")]
REFUSED = {
    "the assistant begins": [assistant("hello"), *GOOD],
    "a system message in the middle": [*GOOD, system("Be brief."), user("and you?"), assistant("so")],
}
TOKENIZED: dict[str, Any] = {
    "sft": tokenize_demonstrations, "reward": tokenize_comparisons, "ppo": fitting_prompts
}  # fmt: skip


def row(stage: str, turns: list[dict[str, str]]) -> dict[str, Any]:
    if stage == "sft":
        return {"messages": turns}
    if stage == "ppo":
        return {"prompt": turns[:-1]}
    return {"chosen": turns, "rejected": [*turns[:-1], assistant("go away")]}


def data(tmp_path: Path, stage: str, conversations: list[list[dict[str, str]]], bad_rows: str) -> DataConfig:
    path = write_jsonl(tmp_path / "a.jsonl", [row(stage, turns) for turns in conversations])
    source = SourceConfig(path=path, stages=(stage,), held_out=False)
    return config(tmp_path, source, bad_rows=bad_rows)


def tokenized(settings: DataConfig, stage: Any) -> Any:
    return TOKENIZED[stage](load_stage(settings, stage, "train"), CHAT, settings)


@pytest.mark.parametrize("stage", TOKENIZED)
@pytest.mark.parametrize("reason", REFUSED)
def test_a_row_that_the_template_refuses_is_a_bad_row(stage: str, reason: str, tmp_path: Path) -> None:
    conversations = [GOOD, REFUSED[reason], [user("yes"), assistant("four")]]
    expected = f"{tmp_path}/a.jsonl line 2: the chat template refuses a conversation of the turns"
    with pytest.raises(DataError) as caught:
        tokenized(data(tmp_path, stage, conversations, "strict"), stage)
    assert caught.value.message.startswith(expected)
    assert "data.bad_rows=skip" in str(caught.value.hint)
    forgiving = data(tmp_path, stage, conversations, "skip")
    for _ in range(2):  # tokenised, and from the cache
        rows = tokenized(forgiving, stage)
        assert len(rows) == 2
        report: DataReport = rows.report
        assert report.used == 2
        assert report.lines()[0].count("3 rows read, 1 bad (skipped), 2 for this stage, read as {") == 1
        assert report.lines()[1].strip().startswith(f"skipped: {expected}")
    plain = data(tmp_path, stage, [conversations[0], conversations[2]], "strict")
    assert list(tokenized(plain, stage)) == list(rows)


@pytest.mark.parametrize("stage", TOKENIZED)
def test_to_skip_is_not_proposed_where_the_template_refuses_every_row(stage: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1: the chat template refuses") as caught:
        tokenized(data(tmp_path, stage, list(REFUSED.values()), "strict"), stage)
    assert "bad_rows" not in str(caught.value.hint)


def test_a_preview_leaves_refused_rows_out_and_tells_of_them(tmp_path: Path) -> None:
    conversations = [GOOD, *REFUSED.values()]
    report, *shown = preview(data(tmp_path, "sft", conversations, "skip"), CHAT, "sft")
    assert "3 rows read, 2 bad (skipped), 1 for this stage" in str(report)
    assert len(shown) == 1
    with pytest.raises(DataError, match=r"a\.jsonl line [23]: the chat template refuses"):
        preview(data(tmp_path, "sft", conversations, "strict"), CHAT, "sft")
