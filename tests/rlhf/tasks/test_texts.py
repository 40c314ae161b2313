"""Perplexity of plain text against the loss of transformers itself."""

import math
from pathlib import Path

import pytest
import torch

from dovetail.errors import DataError
from dovetail.rlhf.tasks import texts
from dovetail.rlhf.tasks.named import load_task, parse_task
from dovetail.rlhf.tasks.subject import Drawing
from tests.fakes import tiny_model
from tests.rlhf.tasks.asked import subject

TEXTS = ["A dovetail joint holds without glue.", "Él", "one two three four five six seven"]


@torch.no_grad()
def nats_by_transformers(piece: list[int]) -> float:
    ids = torch.tensor([piece])
    loss = tiny_model(dtype=torch.float64)(input_ids=ids, labels=ids).loss
    return float(loss) * (len(piece) - 1)


@pytest.mark.parametrize("longest", [2048, 9])
def test_perplexity_is_that_of_transformers_own_loss(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where texts are longer than what is read at once, each piece is a text of its own."""
    monkeypatch.setattr(texts, "MOST_TOKENS", longest)
    chat = subject().chat
    ids = [[*chat.tokenizer(text)["input_ids"], 256] for text in TEXTS]
    pieces = [own[i : i + longest] for own in ids for i in range(0, len(own), longest)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    nats, count = sum(map(nats_by_transformers, pieces)), sum(len(piece) - 1 for piece in pieces)
    found = texts.Texts("t", TEXTS)(subject(tiny_model(dtype=torch.float64)))
    assert found["nats_per_token"] == pytest.approx(nats / count)
    assert found["perplexity"] == pytest.approx(math.exp(nats / count))
    assert found["bits_per_byte"] == pytest.approx(
        nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    )


def test_a_file_without_text_says_which_column_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"prompt": "Hello"}\n')
    with pytest.raises(DataError, match="names no column of plain text"):
        load_task(parse_task(f"text={file}"), Drawing(max_new_tokens=9), limit=10)
