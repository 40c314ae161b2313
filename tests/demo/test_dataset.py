from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from dovetail.demo.dataset import Dataset, Sizes, dataset
from dovetail.demo.lookup import task_of

SIZES = Sizes(documents=300, demonstrations=2_000, reward_prompts=500, ppo_prompts=500)


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return dataset(0, SIZES)


def test_there_are_as_many_rows_as_asked(rows: Dataset) -> None:
    assert len(rows.documents) == 300
    assert len(rows.demonstrations) == 2_000
    assert (len(rows.reward_prompts), len(rows.ppo_prompts)) == (500, 500)
    assert (len(rows.test), len(rows.dev), len(rows.held_out_documents)) == (200, 200, 200)


def test_no_held_out_question_is_ever_trained_on(rows: Dataset) -> None:
    trained = {row.prompt.task.key for row in rows.demonstrations}
    trained |= {prompt.task.key for prompt in (*rows.reward_prompts, *rows.ppo_prompts)}
    assert not trained & {prompt.task.key for prompt in (*rows.test, *rows.dev)}


def test_no_held_out_question_occurs_in_the_plain_text(rows: Dataset) -> None:
    text = "\n".join(rows.documents)
    for prompt in (*rows.test, *rows.dev):
        if len(prompt.task.turns) == 1:
            assert f": {prompt.task.turns[0]}\n" not in text


def test_the_held_out_prompts_are_distinct_and_the_same_for_every_seed(rows: Dataset) -> None:
    other = dataset(7, SIZES)
    assert other.test == rows.test
    assert other.dev == rows.dev
    assert other.demonstrations != rows.demonstrations
    assert len({str(prompt.messages) for prompt in (*rows.test, *rows.dev)}) == 400


def test_held_out_documents_are_not_among_the_trained_ones(rows: Dataset) -> None:
    assert not set(rows.held_out_documents) & set(rows.documents)


def test_the_same_seed_gives_the_same_rows(rows: Dataset) -> None:
    assert dataset(0, SIZES) == rows


def test_one_size_does_not_change_the_other_rows(rows: Dataset) -> None:
    fewer = dataset(0, replace(SIZES, documents=10, demonstrations=20))
    assert fewer.reward_prompts == rows.reward_prompts
    assert fewer.ppo_prompts == rows.ppo_prompts
    assert fewer.test == rows.test


def test_every_family_is_met_often(rows: Dataset) -> None:
    counts = Counter(row.prompt.task.family for row in rows.demonstrations)
    assert min(counts.values()) > 2_000 / len(counts) / 3
    tested = Counter(prompt.task.family for prompt in rows.test)
    assert set(tested) == set(counts)


def test_prompts_lead_back_to_their_task(rows: Dataset) -> None:
    for prompt in (*rows.test, *rows.ppo_prompts):
        assert task_of(prompt.messages) is prompt.task


def test_written_files_hold_the_rows(rows: Dataset, tmp_path: Path) -> None:
    paths = rows.write(tmp_path / "data")
    lines = paths["demonstrations"].read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2_000
    assert json.loads(lines[0])["messages"] == rows.demonstrations[0].messages
    assert json.loads(paths["test"].read_text().splitlines()[3])["prompt"] == rows.test[3].messages
    assert json.loads(paths["documents"].read_text().splitlines()[1])["text"] == rows.documents[1]
