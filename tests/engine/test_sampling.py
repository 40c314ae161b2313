"""The draw against exact distributions, transformers' own filters, and plain Python."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dovetail.engine.sampling import Sampling, SamplingRows, keep_likely, random_keys, sample_next, uniforms
from dovetail.errors import GenerationError

CPU = torch.device("cpu")


def chi_square(observed: Counter[int], expected: dict[int, float], num_draws: int) -> float:
    return sum((observed[k] - num_draws * p) ** 2 / (num_draws * p) for k, p in expected.items())


def limit(degrees: int) -> float:
    """Exceeded with a probability of about 1e-6 (Wilson and Hilferty's cube approximation)."""
    return degrees * (1 - 2 / (9 * degrees) + 4.75 * math.sqrt(2 / (9 * degrees))) ** 3


def rows_of(num: int, *, seeds: list[int] | None = None, position: int = 0, **settings: Any) -> SamplingRows:
    sampling = Sampling(max_new_tokens=8, **settings)
    return SamplingRows.of([sampling] * num, seeds or list(range(num)), [position] * num, device=CPU)


def some_logits(num_tokens: int = 12) -> Tensor:
    return 2 * torch.randn(num_tokens, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_frequencies_follow_the_softmax(temperature: float) -> None:
    logits, num = some_logits(), 40_000
    ids, logprobs = sample_next(logits.expand(num, -1), rows_of(num, temperature=temperature))
    weights = [math.exp(x / temperature) for x in logits.tolist()]
    exact = {i: w / sum(weights) for i, w in enumerate(weights)}
    assert chi_square(Counter(ids.tolist()), exact, num) < limit(len(exact) - 1)
    for i, logprob in zip(ids[:100].tolist(), logprobs[:100].tolist(), strict=True):
        assert logprob == pytest.approx(math.log(exact[i]), abs=1e-9)


@pytest.mark.parametrize(
    ("settings", "filters"),
    [
        ({"top_k": 4}, [TopKLogitsWarper(4)]),
        ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        (
            {"temperature": 1.7, "top_k": 9, "top_p": 0.9, "min_p": 0.1},
            [TemperatureLogitsWarper(1.7), TopKLogitsWarper(9), TopPLogitsWarper(0.9), MinPLogitsWarper(0.1)],
        ),
    ],
)
def test_truncated_sampling_follows_what_the_filters_of_transformers_keep(
    settings: dict[str, Any], filters: list[Any]
) -> None:
    logits, num = some_logits(), 20_000
    kept = logits[None]
    for each in filters:
        kept = each(None, kept)
    exact = {i: p for i, p in enumerate(kept[0].softmax(-1).tolist()) if p > 0}
    assert 1 < len(exact) < logits.numel()
    ids, logprobs = sample_next(logits.expand(num, -1), rows_of(num, **settings))
    assert set(ids.tolist()) <= set(exact)
    assert chi_square(Counter(ids.tolist()), exact, num) < limit(len(exact) - 1)
    # The reported log-probability is that of the truncated distribution, which was the one drawn from.
    expected = torch.tensor([math.log(exact[i]) for i in ids.tolist()], dtype=torch.float64)
    torch.testing.assert_close(logprobs, expected)


def test_greedy_takes_the_likeliest_and_reports_its_logprob_at_temperature_one() -> None:
    logits = torch.stack([some_logits(), -some_logits()])
    ids, logprobs = sample_next(logits, rows_of(2, temperature=0.0))
    assert ids.tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1))


def test_rows_keep_their_own_settings_in_a_mixed_batch() -> None:
    logits = some_logits()
    settings = [
        Sampling(max_new_tokens=1, temperature=0.0),
        Sampling(max_new_tokens=1, temperature=1.0),
        Sampling(max_new_tokens=1, temperature=0.5, top_k=3),
        Sampling(max_new_tokens=1, temperature=2.0, repetition_penalty=1.5),
    ]
    seeds, seen = [5, 6, 7, 8], [[0, 3], [1], [2], [4, 5, 6]]
    together = SamplingRows.of(settings, seeds, [0] * 4, device=CPU)
    together.remember(seen, logits.numel())
    ids, logprobs = sample_next(logits.expand(4, -1), together)
    for row in range(4):
        alone = SamplingRows.of(settings[row : row + 1], seeds[row : row + 1], [0], device=CPU)
        alone.remember(seen[row : row + 1], logits.numel())
        own_id, own_logprob = sample_next(logits[None], alone)
        assert own_id.item() == ids[row].item()
        torch.testing.assert_close(own_logprob[0], logprobs[row])


@pytest.mark.parametrize("top_p", [None, 1.0])
def test_a_row_that_is_not_truncated_keeps_every_token_beside_one_that_is(top_p: float | None) -> None:
    settings = [Sampling(max_new_tokens=1, top_p=top_p), Sampling(max_new_tokens=1, top_k=5)]
    rows = SamplingRows.of(settings, [0, 1], [0, 0], device=CPU)
    for seed in range(3):
        drawn_V = torch.randn(128_256, generator=torch.Generator().manual_seed(seed))
        logits_SV = ((1 + seed) * drawn_V).expand(2, -1)
        kept_SV = keep_likely(logits_SV, rows)
        assert torch.equal(kept_SV[0], logits_SV[0])
        assert kept_SV[1].isfinite().sum() == 5


def test_the_repetition_penalty_is_that_of_transformers_and_learns_drawn_tokens() -> None:
    logits = some_logits()
    rows = rows_of(1, temperature=0.0, repetition_penalty=3.0)
    rows.remember([[1, 2]], logits.numel())
    seen = [1, 2]
    for _ in range(5):
        expected = RepetitionPenaltyLogitsProcessor(3.0)(torch.tensor([seen]), logits[None])
        ids, _ = sample_next(logits[None], rows)
        assert ids.item() == expected.argmax().item()
        rows.advance(ids)
        seen.append(int(ids.item()))


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.full((20_000, 5), -torch.inf)
    logits[:, 2] = 0.0
    ids, logprobs = sample_next(logits, rows_of(20_000))
    assert set(ids.tolist()) == {2}
    assert logprobs.abs().max() == 0


def test_half_precision_logits_get_a_float32_logprob() -> None:
    logits = some_logits().bfloat16()[None]
    ids, logprobs = sample_next(logits, rows_of(1))
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs[0], logits.double().log_softmax(-1)[0, ids[0]].float())


@pytest.mark.parametrize("along", ["seeds", "positions"])
def test_random_numbers_are_uniform_and_uncorrelated_along_seeds_and_positions(along: str) -> None:
    num = 40_000
    counting, fixed = torch.arange(num), torch.full((num,), 11)
    seeds, positions = (counting, fixed) if along == "seeds" else (fixed, counting)
    drawn = uniforms(random_keys(seeds), positions)
    assert drawn.min() > 0
    assert drawn.max() < 1
    buckets = Counter((drawn * 100).long().tolist())
    assert chi_square(buckets, dict.fromkeys(range(100), 0.01), num) < limit(99)
    pairs = Counter(((drawn[:-1] * 10).long() * 10 + (drawn[1:] * 10).long()).tolist())
    assert chi_square(pairs, dict.fromkeys(range(100), 0.01), num - 1) < limit(99) * 1.2  # overlapping pairs


def test_each_draw_has_the_random_number_of_its_position_wherever_the_rows_began() -> None:
    seeds, firsts = [3, 2**40, 7], [0, 5, 90]
    rows = SamplingRows.of([Sampling(max_new_tokens=1)] * 3, seeds, firsts, device=CPU)
    for draw in range(40):
        for row, (seed, first) in enumerate(zip(seeds, firsts, strict=True)):
            expected = uniforms(random_keys(torch.tensor([seed])), torch.tensor([first + draw]))
            assert rows.uniforms_S()[row] == expected
        rows.advance(torch.zeros(3, dtype=torch.long))


def test_seeds_that_differ_only_above_32_bits_differ() -> None:
    keys = random_keys(torch.tensor([5, 5 + 2**32, 5 + 2**50]))
    assert len(set(keys.tolist())) == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("stop_strings", ("",)),
    ],
)
def test_impossible_settings_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(GenerationError, match=name):
        Sampling(**{"max_new_tokens": 4, name: value})  # type: ignore[arg-type]
