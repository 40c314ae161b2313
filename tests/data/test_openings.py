from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dovetail.config.data import SourceConfig
from dovetail.data.blend import load_stage
from dovetail.data.preview import preview
from dovetail.data.tokenize import tokenize_comparisons, tokenize_demonstrations
from dovetail.text.chat_format import ChatFormat
from tests.data.files import config, write_jsonl
from tests.text.tokenizers import CHATML, byte_level

THINK = CHATML.replace(
    "'<|im_start|>assistant\n' }}{% endif %}", "'<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
TOKENIZED: dict[Any, Any] = {"sft": tokenize_demonstrations, "reward": tokenize_comparisons}
ANSWERS = ["<think>\ntwo</think>4", "two</think>4", "4"]


@pytest.mark.parametrize("stage", TOKENIZED)
def test_answers_that_do_not_go_on_from_the_open_block_are_told(stage: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"q {i}", "chosen": answer, "rejected": "</think>5"} for i, answer in enumerate(ANSWERS)
    ]
    source = SourceConfig(path=write_jsonl(tmp_path / "a.jsonl", rows), stages=(stage,), held_out=False)
    data = config(tmp_path, source)
    chat = ChatFormat(byte_level(THINK))
    for _ in range(2):  # tokenised, and from the cache
        repeated, unclosed = TOKENIZED[stage](load_stage(data, stage, "train"), chat, data).report.notes
        assert repeated.startswith("1 answers begin with <think>")
        assert unclosed.startswith("1 answers lack </think>")
    assert repeated in str(preview(data, chat, stage)[0])
    assert (
        TOKENIZED[stage](load_stage(data, stage, "train"), ChatFormat(byte_level(CHATML)), data).report.notes
        == ()
    )
