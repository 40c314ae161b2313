"""Figures of finished models against their definitions, written in plain Python."""

import itertools
import math
import random

import pytest
import torch

from dovetail.maths.evaluation import (
    brier_score,
    calibration_error,
    distinct_ngrams,
    pass_at_k,
    wilson_interval,
)


def binomial(n: int, k: int, p: float) -> float:
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


@pytest.mark.parametrize(("wins", "trials"), [(0, 5), (3, 7), (40, 64), (12.5, 20), (9, 9)])
def test_the_interval_holds_the_shares_that_the_normal_test_does_not_reject(wins: float, trials: int) -> None:
    low, high = wilson_interval(wins, trials)

    def is_rejected(p: float) -> bool:
        return abs(wins / trials - p) > 1.959964 * math.sqrt(p * (1 - p) / trials)

    for bound, outside, inside in ((low, low - 1e-6, low + 1e-6), (high, high + 1e-6, high - 1e-6)):
        assert not 0 <= outside <= 1 or is_rejected(outside)
        assert not is_rejected(inside)
        assert 0 <= bound <= 1


@pytest.mark.parametrize("trials", [20, 50, 200])
def test_the_interval_covers_the_true_share_in_about_95_of_100_cases(trials: int) -> None:
    intervals = [wilson_interval(wins, trials) for wins in range(trials + 1)]
    covered = []
    for p in (i / 100 for i in range(2, 99)):
        hits = [binomial(trials, k, p) for k, (low, high) in enumerate(intervals) if low <= p <= high]
        covered.append(sum(hits))
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.01)
    assert min(covered) > 0.83


def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_right_answer() -> None:
    for samples in range(1, 8):
        for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
            verdicts = [True] * right + [False] * (samples - right)
            subsets = [any(chosen) for chosen in itertools.combinations(verdicts, k)]
            assert pass_at_k(samples, right, k) == pytest.approx(sum(subsets) / len(subsets))


def test_distinct_ngrams_are_counted_within_texts() -> None:
    texts = [[1, 2, 1, 2], [2, 1], [7], []]
    assert distinct_ngrams(texts, 1) == 3 / 7
    assert distinct_ngrams(texts, 2) == 2 / 4
    assert distinct_ngrams(texts, 5) == 0.0


def calibration_by_definition(won: list[float], weights: list[float]) -> float:
    total = 0.0
    for low in range(10):
        own = [
            (w, max(p, 1 - p), 0.5 if p == 0.5 else float(p > 0.5))
            for p, w in zip(won, weights, strict=True)
            if min(9, math.floor((max(p, 1 - p) - 0.5) * 20)) == low
        ]
        mass = sum(w for w, _, _ in own)
        if mass:
            accuracy = sum(w * right for w, _, right in own) / mass
            confidence = sum(w * c for w, c, _ in own) / mass
            total += mass * abs(accuracy - confidence)
    return total / sum(weights)


def test_calibration_is_its_definition_and_sees_weights() -> None:
    rng = random.Random(3)
    won = [rng.random() for _ in range(200)] + [0.5, 1.0, 0.0]
    weights = [rng.choice([0.25, 1.0]) for _ in won]
    tensors = (torch.tensor(won, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64))
    assert float(calibration_error(*tensors)) == pytest.approx(calibration_by_definition(won, weights))
    brier = sum(w * (1 - p) ** 2 for p, w in zip(won, weights, strict=True)) / sum(weights)
    assert float(brier_score(*tensors)) == pytest.approx(brier)


def test_a_model_that_knows_what_it_does_not_know_is_calibrated() -> None:
    """Of pairs given 0.75, three of four are right: no error of calibration, a Brier score of 3/16."""
    won_P = torch.tensor([0.75, 0.75, 0.75, 0.25], dtype=torch.float64)
    assert float(calibration_error(won_P, torch.ones(4).double())) == pytest.approx(0.0)
    assert float(brier_score(won_P, torch.ones(4).double())) == pytest.approx(3 / 16)
    assert float(calibration_error(torch.full((4,), 0.5), torch.ones(4))) == 0.0
