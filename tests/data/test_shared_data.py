"""Real public data, through column mappings alone. Skipped where it is not beside the project."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from dovetail.config.data import SourceConfig
from dovetail.data.blend import load_stage
from dovetail.data.records import Comparison, Demonstration
from dovetail.data.sources import read_source
from dovetail.data.tokenize import tokenize_comparisons
from dovetail.text.chat_format import ChatFormat
from tests.data.files import SHARED, config
from tests.fakes import byte_tokenizer

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the public data in ../shared/data")

HARMLESS = SourceConfig(
    path=str(SHARED / "hh_harmless.jsonl.gz"), chosen="chosen", rejected="rejected", transcript=True
)
ALPACA = SourceConfig(
    path=str(SHARED / "alpacaeval_pairs.jsonl.gz"),
    prompt="instruction", answers=("output_1", "output_2"), preference="preference",
)  # fmt: skip
GSM8K = SourceConfig(path=str(SHARED / "gsm8k.jsonl.gz"), prompt="question", response="answer")


def test_transcripts_come_out_whole() -> None:
    records = list(read_source(HARMLESS))
    assert len(records) == 1_800
    for record in records:
        assert isinstance(record, Comparison)
        roles = [turn["role"] for turn in record.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert not any("\n\nHuman:" in turn["content"] for turn in record.messages)


def test_judged_pairs_come_out_with_their_winner() -> None:
    records = list(read_source(ALPACA))
    winners = Counter(
        r.better_than[0][0] if r.better_than else None for r in records if isinstance(r, Comparison)
    )
    assert sum(winners.values()) == 1_608
    assert winners[None] == 1  # one draw
    assert winners[1] > winners[0] > 700


def test_questions_and_answers_come_out() -> None:
    records = list(read_source(GSM8K))
    assert len(records) == 7_473
    assert all(isinstance(record, Demonstration) and len(record.messages) == 2 for record in records)


def test_the_three_blend_and_tokenise(tmp_path: Path) -> None:
    sources = (HARMLESS, ALPACA.model_copy(update={"weight": 2.0}), GSM8K)
    data = config(tmp_path, *sources, max_tokens=4_000, too_long="truncate_left")
    rows = tokenize_comparisons(load_stage(data, "reward", "train"), ChatFormat(byte_tokenizer()), data)
    shares = Counter(rows.columns["sources"][rows.order].tolist())
    assert abs(shares[1] / len(rows) - 2 / 3) < 0.01
    assert max(len(ids) for answers, _ in rows for ids in answers) <= 4_000
    assert all(pairs for _, pairs in rows)
