"""Attention over pages against attention by definition, one sequence and one head at a time."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from dovetail.engine.forward import DecodeLayout, LoneLayout, PageMap
from dovetail.engine.kv_cache import PAGE_TOKENS, KVArena, KVShape, pages_for
from dovetail.model.attention import AttentionCall

CPU = torch.device("cpu")


def attention_by_definition(
    query: Tensor, keys: Tensor, values: Tensor, *, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """softmax(q k) v for one head and the last token: query [K], keys and values [L, K]."""
    first = 0 if window is None else max(0, len(keys) - window)
    scores = [scaling * float(query @ key) for key in keys[first:]]
    if softcap is not None:
        scores = [softcap * math.tanh(score / softcap) for score in scores]
    weights = [math.exp(score - max(scores)) for score in scores]
    return sum(
        (w / sum(weights) * v for w, v in zip(weights, values[first:], strict=True)), torch.zeros_like(query)
    )


terms = pytest.mark.parametrize(
    ("groups", "window", "softcap"),
    [(1, None, None), (3, None, None), (2, 70, None), (2, 5, 2.0), (1, None, 1.5)],
)


@pytest.mark.parametrize("lengths", [[1], [64], [200], [3, 40, 64], [65, 1, 300, 64, 130]])
@pytest.mark.parametrize("shuffled", [False, True])
@terms
def test_paged_attention_is_attention(
    lengths: list[int], shuffled: bool, groups: int, window: int | None, softcap: float | None
) -> None:
    generator = torch.Generator().manual_seed(1)
    num_heads, width = 2, 8
    num_pages = sum(pages_for(length) for length in lengths)
    arena = KVArena(KVShape(1, num_heads, width, torch.float64), num_pages + 2, CPU)
    arena.clear(list(range(num_pages + 2)))
    order = list(range(num_pages))
    if shuffled:
        random.Random(2).shuffle(order)
    tables = [[order.pop(0) for _ in range(pages_for(length))] for length in lengths]
    history = [torch.randn(2, num_heads, length, width, generator=generator).double() for length in lengths]
    for table, past in zip(tables, history, strict=True):
        place = torch.arange(past.shape[2] - 1)
        rows = arena.rows_of(torch.tensor(table)[place // PAGE_TOKENS], place % PAGE_TOKENS)
        arena.write(0, past[0][None, :, :-1], past[1][None, :, :-1], rows)
    last = torch.tensor(lengths) - 1
    pages = torch.tensor([table[-1] for table in tables])
    layout = DecodeLayout(
        arena, PageMap(tables, CPU), arena.rows_of(pages, last % PAGE_TOKENS), torch.tensor(lengths)
    )
    query = torch.randn(1, num_heads * groups, len(lengths), width, generator=generator).double()
    new = torch.stack([past[:, :, -1] for past in history], dim=2)
    out = layout.attend(query, new[0][None], new[1][None], AttentionCall(0, 0.7, window, softcap))
    assert out.shape == (1, len(lengths), num_heads * groups, width)
    for row, past in enumerate(history):
        for head in range(num_heads * groups):
            expected = attention_by_definition(
                query[0, head, row],
                past[0, head // groups],
                past[1, head // groups],
                scaling=0.7,
                window=window,
                softcap=softcap,
            )
            torch.testing.assert_close(out[0, row, head], expected)


@pytest.mark.parametrize("length", [1, 64, 200])
@terms
def test_a_lone_sequence_s_attention_is_attention_whatever_lies_behind_it(
    length: int, groups: int, window: int | None, softcap: float | None
) -> None:
    generator = torch.Generator().manual_seed(1)
    arena = KVArena(KVShape(1, 2, 8, torch.float64), 5, CPU, lone=True)
    for layer in arena._storage:
        layer.fill_(torch.nan)
    keys, values = torch.randn(2, 2, length, 8, generator=generator).double()
    rows = [
        arena.rows_of(torch.tensor([t // PAGE_TOKENS]), torch.tensor([t % PAGE_TOKENS]))
        for t in range(length)
    ]
    for place in range(length - 1):
        arena.write(0, keys[None, :, place], values[None, :, place], rows[place])
    query = torch.randn(1, 2 * groups, 1, 8, generator=generator).double()
    out = LoneLayout(arena, rows[-1], length).attend(
        query, keys[None, :, -1:], values[None, :, -1:], AttentionCall(0, 0.7, window, softcap)
    )
    assert out.shape == (1, 1, 2 * groups, 8)
    for head in range(2 * groups):
        expected = attention_by_definition(
            query[0, head, 0], keys[head // groups], values[head // groups], scaling=0.7, window=window,
            softcap=softcap,
        )  # fmt: skip
        torch.testing.assert_close(out[0, 0, head], expected)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(
    "rows",
    [
        [([0, 1, 5], 140), ([0, 1, 3], 150), ([4], 60), ([0, 2], 100)],
        [([3, 1], 100), ([5], 60)],  # the pages between belong to prompts that are still being read
        [([4, 2], 100)],
        [([3], 60)],
    ],
)
def test_sequences_that_share_pages_attend_as_if_each_had_its_own(
    rows: list[tuple[list[int], int]], groups: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    tables, lengths = zip(*rows, strict=True)
    arena = KVArena(KVShape(1, 2, 8, torch.float64), 7, CPU)
    for layer in arena._storage:
        layer.copy_(torch.randn(layer.shape, generator=generator))
    query = torch.randn(1, 2 * groups, len(rows), 8, generator=generator).double()
    new = torch.randn(2, 1, 2, len(rows), 8, generator=generator).double()
    last = torch.tensor(lengths) - 1
    places = arena.rows_of(torch.tensor([table[-1] for table in tables]), last % PAGE_TOKENS)
    layout = DecodeLayout(arena, PageMap(tables, CPU), places, torch.tensor(lengths))
    out = layout.attend(query, new[0], new[1], AttentionCall(scaling=0.7))
    keys, values = arena._storage[0]
    for b, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        for head in range(2 * groups):
            own = [
                torch.cat([pages[page, head // groups] for page in table])[:length]
                for pages in (keys, values)
            ]
            expected = attention_by_definition(
                query[0, head, b], *own, scaling=0.7, window=None, softcap=None
            )
            torch.testing.assert_close(out[0, b, head], expected)


def test_what_lies_in_free_pages_and_beyond_the_last_token_cannot_matter() -> None:
    def attend(garbage: float) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        arena = KVArena(KVShape(1, 1, 4, torch.float32), 3, CPU)
        arena.clear([0, 1])
        arena.tiles(0, 3)[0][2].fill_(float("nan"))
        arena.tiles(0, 3)[1][2].fill_(float("nan"))
        arena.tiles(0, 3)[0][1, 7:].fill_(garbage)
        arena.tiles(0, 3)[1][1, 7:].fill_(garbage)
        rows = arena.rows_of(torch.tensor([1]), torch.tensor([6]))
        layout = DecodeLayout(arena, PageMap([[0, 1]], CPU), rows, torch.tensor([71]))
        query, key, value = torch.randn(3, 1, 1, 1, 4, generator=generator)
        return layout.attend(query, key, value, AttentionCall())

    assert torch.equal(attend(0.0), attend(1e4))
    assert attend(0.0).isfinite().all()


def test_half_precision_scores_are_softmaxed_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    arena = KVArena(KVShape(1, 1, 16, torch.bfloat16), 1, CPU)
    arena.clear([0])
    past = torch.randn(2, 1, 40, 16, generator=generator).bfloat16()
    place = torch.arange(40)
    arena.write(0, past[:1], past[1:], arena.rows_of(torch.zeros_like(place), place))
    layout = DecodeLayout(
        arena, PageMap([[0]], CPU), arena.rows_of(place[:1], place[39:]), torch.tensor([40])
    )
    query = torch.randn(1, 1, 1, 16, generator=generator).bfloat16()
    out = layout.attend(query, past[:1, :, 39:], past[1:, :, 39:], AttentionCall())
    assert out.dtype == torch.bfloat16
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.double(), past[:1].double(), past[1:].double()
    )
    step = torch.finfo(torch.bfloat16).eps  # of the weights, which are below 1
    torch.testing.assert_close(out[0], exact[0].bfloat16(), atol=step, rtol=step)
