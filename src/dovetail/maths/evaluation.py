"""The figures by which finished models are judged, each from its definition.

Responsible for: the interval of a win rate, pass@k, distinct n-grams, and how well calibrated the probabilities of a
reward model are. Not responsible for: where answers, verdicts and scores come from (rlhf/).

Shapes: P preference pairs.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Z_95 = 1.959964
"""The quantile of the normal distribution that 2.5 % lie above."""


def wilson_interval(wins: float, trials: int) -> tuple[float, float]:
    """Return the shares p with |wins / n - p| <= z sqrt(p (1 - p) / n): an interval of 95 %.

    Wilson 1927, as Brown, Cai and DasGupta 2001 recommend it. wins may count half for a tie, which makes the interval
    a little too wide and never too narrow.
    """
    share, z2 = wins / trials, Z_95**2
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    reach = Z_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of n samples, c of them right, hold a right one.

    Chen et al. 2021 (arXiv:2107.03374), eq. 1; unbiased for every k up to n.
    """
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def distinct_ngrams(texts: Iterable[Sequence[int]], n: int) -> float:
    """Return the number of different n-grams over that of all; 0 where there is none.

    Li et al. 2016 (arXiv:1510.03055), section 5: near 0 where all answers are one stock phrase.
    """
    found = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(found)) / len(found) if found else 0.0


def brier_score(won_P: Tensor, weight_P: Tensor) -> Tensor:
    """sum_p w_p (1 - p_p)^2 / sum_p w_p, with p the probability that the chosen answer was given.

    Brier 1950. A model that says 1/2 of every pair has 0.25.
    """
    return (weight_P * (1.0 - won_P).square()).sum() / weight_P.sum()


def calibration_error(won_P: Tensor, weight_P: Tensor, *, bins: int = 10) -> Tensor:
    """sum_b w_b / w |accuracy_b - confidence_b| over equal bins of the confidence max(p, 1 - p) in [1/2, 1].

    Expected calibration error, Guo et al. 2017 (arXiv:1706.04599), eq. 3. won_P: the probability that the chosen
    answer was given; p = 1/2 is right by half.
    """
    confidence_P = torch.maximum(won_P, 1.0 - won_P)
    right_P = torch.where(won_P == 0.5, 0.5, (won_P > 0.5).to(won_P.dtype))
    bin_P = ((confidence_P - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps_B = won_P.new_zeros(bins).index_add_(0, bin_P, weight_P * (right_P - confidence_P))
    return gaps_B.abs().sum() / weight_P.sum()
