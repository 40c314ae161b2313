"""The rows of a static batch: who has which, what a step is told of them, and that they stay close together."""

import random

import torch
from torch import Tensor

from dovetail.engine.row_table import Column, RowTable, sampling_columns, size_for
from dovetail.engine.sampling import Sampling, SamplingRows, sample_next
from dovetail.engine.scheduler import Answer

CPU = torch.device("cpu")
SETTINGS = [
    Sampling(max_new_tokens=9),
    Sampling(max_new_tokens=9, temperature=0.0),
    Sampling(max_new_tokens=9, temperature=0.7, top_k=5, min_p=0.01),
    Sampling(max_new_tokens=9, temperature=1.3, top_p=0.8, repetition_penalty=1.2),
]


def answer(index: int, *, pages: int = 1, sampling: Sampling = SETTINGS[0], tokens: int = 0) -> Answer:
    return Answer(
        index,
        (5, 6, 7),
        sampling,
        seed=100 + index,
        max_new_tokens=9,
        token_ids=[8] * tokens,
        pages=[*range(pages)],
    )


def state_of(table: RowTable, answers: list[Answer]) -> Tensor:
    rows = table.rows_of(answers)
    return table.fill(answers, rows)[rows]


def test_random_arrivals_and_departures_keep_one_row_an_answer_and_the_rows_close() -> None:
    rng = random.Random(3)
    table, here = RowTable(16, 2), list[Answer]()
    for index in range(300):
        if len(here) < 16 and (not here or rng.random() < 0.55):
            here.append(answer(index, tokens=rng.randrange(4)))
            assert table.add(here[-1:]) == table.rows_of(here[-1:])
        else:
            table.remove([here.pop(rng.randrange(len(here)))])
        if not here:
            continue
        before = dict(zip(table.rows_of(here), here, strict=True))
        sources, targets = table.close_ranks()
        moved = {**dict(zip(before, before, strict=True)), **dict(zip(sources, targets, strict=True))}
        assert table.rows_of(here) == [moved[row] for row in before]
        rows = table.rows_of(here)
        assert len(set(rows)) == len(here)
        assert size_for(max(rows) + 1) == size_for(len(here))
        state = table.fill(here, rows)
        assert state[rows, Column.LENGTH].tolist() == [a.num_tokens - 1 for a in here]
        assert (state[:, Column.LENGTH] >= 0).sum() == len(here)


def test_a_table_has_room_for_what_it_was_made_for_and_a_little_more() -> None:
    table = RowTable(5, 3)
    assert len(table) == 8
    assert table.has_room(8, 4)
    assert not table.has_room(9, 1)
    assert not table.has_room(1, 5)


def test_columns_of_the_table_draw_what_the_settings_themselves_draw() -> None:
    answers = [answer(i, sampling=sampling, tokens=i) for i, sampling in enumerate(SETTINGS)]
    table = RowTable(4, 1)
    table.add(answers)
    seen_SV = torch.zeros(4, 50, dtype=torch.bool)
    seen_SV[:, 5:9] = True
    columns = sampling_columns(state_of(table, answers), seen_SV, truncates=True, num_likeliest=0)
    rows = SamplingRows.of(
        [a.sampling for a in answers], [a.seed for a in answers], [a.num_drawn for a in answers], device=CPU
    )
    rows.remember([[5, 6, 7, 8]] * 4, 50)
    logits_SV = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).double() * 3
    wanted_S, wanted_logprobs_S = sample_next(logits_SV, rows)
    found_S, logprobs_S = sample_next(logits_SV, columns)
    assert torch.equal(found_S, wanted_S)
    torch.testing.assert_close(logprobs_S, wanted_logprobs_S, atol=1e-6, rtol=1e-6)
