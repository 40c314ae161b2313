"""The decode kernels beside the plain torch code that says what they compute."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from dovetail.engine.forward import DecodeLayout, PageMap
from dovetail.engine.kv_cache import PAGE_TOKENS, KVArena, KVShape, pages_for
from dovetail.engine.sampling import Sampling, SamplingRows, invert_distribution, uniforms
from dovetail.model.attention import AttentionCall

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

LENGTHS = (1, 64, 200, 3, 65, 129, 700, 2)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("heads", "groups", "width", "window", "softcap"),
    [
        (4, 1, 64, None, None),
        (2, 4, 128, None, None),
        (3, 3, 8, 70, None),
        (2, 2, 80, 5, 2.0),
        (1, 8, 256, None, 1.5),
        (2, 1, 96, None, None),
    ],
)
@pytest.mark.parametrize("num_rows", [2, 8, 300])
def test_paged_attention_is_the_plain_one_and_stores_the_new_token(
    dtype: torch.dtype, heads: int, groups: int, width: int, window: int | None, softcap: float | None, num_rows: int
) -> None:  # fmt: skip
    from dovetail.engine.graphs import GraphLayout
    from dovetail.engine.row_table import Column

    device, generator = torch.device("cuda"), torch.Generator().manual_seed(3)
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(num_rows)]
    num_pages = sum(map(pages_for, lengths))
    order = list(range(num_pages))
    random.Random(2).shuffle(order)
    tables = [[order.pop() for _ in range(pages_for(length))] for length in lengths]
    exact = KVArena(KVShape(2, heads, width, torch.float64), num_pages, device)
    tested = KVArena(KVShape(2, heads, width, dtype), num_pages, device, dense=False)
    past = torch.randn(2, 2, num_pages, heads, PAGE_TOKENS, width, generator=generator).to(device, dtype)
    for arena in (exact, tested):
        for layer, values in zip(arena._storage, past, strict=True):
            layer.copy_(values)
    query, key, value = (
        torch.randn(1, count, num_rows, width, generator=generator).to(device, dtype)
        for count in (heads * groups, heads, heads)
    )
    last = torch.tensor(lengths, device=device) - 1
    pages = torch.tensor([table[-1] for table in tables], device=device)
    plain = DecodeLayout(exact, PageMap(tables, device), exact.rows_of(pages, last % PAGE_TOKENS), last + 1)
    call = AttentionCall(1, 0.3, window, softcap)
    expected = plain.attend(query.double(), key.double(), value.double(), call)
    state = torch.full((num_rows + 2, Column.PAGES + max(map(len, tables))), 10**6, dtype=torch.int32)
    state[:, Column.LENGTH] = -1  # the last two rows are empty: their page numbers must not be followed
    for row, table in enumerate(tables):
        state[row, Column.LENGTH] = lengths[row] - 1
        state[row, Column.PAGES : Column.PAGES + len(table)] = torch.tensor(table)
    wider = [torch.cat([x, torch.full_like(x[:, :, :2], 7.0)], dim=2) for x in (query, key, value)]
    out = GraphLayout(tested.bases().to(device), state.to(device)).attend(*wider, call)
    assert out.shape == (1, num_rows + 2, heads * groups, width)
    torch.testing.assert_close(
        out[:, :num_rows].double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )
    assert torch.equal(out[:, num_rows:], torch.zeros_like(out[:, num_rows:]))
    for found, wanted in zip(tested._storage, exact._storage, strict=True):
        assert torch.equal(found.double(), wanted)  # all else untouched, too


def drawn(
    logits: Tensor, temperatures: list[float], seeds: list[int], draws: list[int]
) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities by the kernel."""
    from dovetail.engine.kernels.sampling import draw_tokens
    from dovetail.engine.row_table import Column

    rows = SamplingRows.of(
        [Sampling(max_new_tokens=1, temperature=t) for t in temperatures], seeds, draws, device=logits.device
    )
    state = torch.zeros(len(logits), Column.PAGES + 3, dtype=torch.int32, device=logits.device)
    state[:, Column.DRAW] = rows.positions_S.int()
    state[:, Column.KEY] = rows.keys_S.int()
    state[:, Column.GREEDY] = rows.greedy_S.int()
    state[:, Column.TEMPERATURE] = rows.temperature_S.float().view(torch.int32)
    ids = torch.full((len(logits),), -1, device=logits.device)
    numbers = torch.full((2, len(logits)), torch.nan, dtype=torch.float64, device=logits.device)
    draw_tokens(
        logits, state, ids, numbers, draw=Column.DRAW, key=Column.KEY, temperature=Column.TEMPERATURE,
        greedy=Column.GREEDY,
    )  # fmt: skip
    assert torch.equal(ids, numbers[0].long())
    return ids, numbers[1]


@pytest.mark.parametrize("vocabulary", [17, 2048, 50272, 151936])
def test_tokens_are_those_of_the_inverted_distribution_by_the_same_random_numbers(vocabulary: int) -> None:
    device, num = torch.device("cuda"), 512
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(num, vocabulary, generator=generator)).to(device)
    logits[:, 3] = -torch.inf
    temperatures = [(0.0, 0.5, 1.0, 1.7)[i % 4] for i in range(num)]
    seeds, draws = list(range(1000, 1000 + num)), [i % 7 for i in range(num)]
    ids, logprobs = drawn(logits, temperatures, seeds, draws)
    divisor = torch.tensor([t or 1.0 for t in temperatures], device=device, dtype=torch.float64)[:, None]
    probs = (logits.double() / divisor).softmax(-1)
    rows = SamplingRows.of([Sampling(max_new_tokens=1)] * num, seeds, draws, device=device)
    expected = invert_distribution(probs, uniforms(rows.keys_S, rows.positions_S))
    greedy = torch.tensor([t == 0 for t in temperatures], device=device)
    expected = torch.where(greedy, logits.argmax(-1), expected)
    # A random number within float32's rounding of a border may fall to either side of it.
    assert (ids == expected).float().mean() > 0.985
    assert torch.equal(ids[greedy], expected[greedy])
    torch.testing.assert_close(logprobs, probs.gather(1, ids[:, None])[:, 0].log(), atol=2e-5, rtol=2e-5)


def test_drawn_frequencies_pass_a_chi_square_test() -> None:
    device, num, vocabulary = torch.device("cuda"), 40_000, 5000
    logits = 2 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(1))
    exact = (logits.double() / 0.7).softmax(-1)
    ids, _ = drawn(logits.to(device).expand(num, -1).contiguous(), [0.7] * num, list(range(num)), [4] * num)
    counts = torch.bincount(ids.cpu(), minlength=vocabulary).double()
    likely = exact * num > 10
    seen = torch.cat([counts[likely], counts[~likely].sum()[None]])
    wanted = torch.cat([exact[likely], exact[~likely].sum()[None]]) * num
    statistic, degrees = float(((seen - wanted) ** 2 / wanted).sum()), len(seen) - 1
    assert degrees > 100
    assert abs(statistic - degrees) < 5 * (2 * degrees) ** 0.5


def test_logits_that_are_no_numbers_still_name_a_token() -> None:
    logits = torch.full((4, 3000), torch.nan, device="cuda")
    ids, _ = drawn(logits, [1.0, 0.0, 1.0, 0.0], [1, 2, 3, 4], [0, 0, 0, 0])
    assert bool(((ids >= 0) & (ids < 3000)).all())
