"""Measure how far annotators agree beyond chance.

Responsible for: Cohen's kappa of two annotators, Fleiss' kappa of any number.
Not responsible for: the choice of labels (statistics.py).

The functions compute exact fractions from counts, so nothing is rounded.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from fractions import Fraction


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> Fraction | None:
    """Return (p_o - p_e) / (1 - p_e) of two annotators' categories for the same items.  Cohen 1960, eq. 1.

    p_o: share of items with equal categories; p_e: the share expected of independent annotators with these marginals.
    Returns None where it is undefined: without items, or if both always chose one and the same category.
    """
    count = len(first)
    if count != len(second):
        raise ValueError(f"{count} and {len(second)} categories are not for the same items")
    if count == 0:
        return None
    observed = Fraction(sum(a == b for a, b in zip(first, second, strict=True)), count)
    of_first, of_second = Counter(first), Counter(second)
    expected = Fraction(sum(of_first[c] * of_second[c] for c in of_first), count**2)
    return _beyond_chance(observed, expected)


def fleiss_kappa(items: Sequence[Mapping[str, int]]) -> Fraction | None:
    """Return (P - P_e) / (1 - P_e) of items, each category -> number of annotators that chose it.  Fleiss 1971, eq. 7.

    P: the mean over items of the share of agreeing pairs of annotators; P_e: the sum of squares of the
    categories' shares in all choices. Fleiss has n annotators for every item. Here their
    number may differ, and all items have equal weight in P; items with fewer than two annotators are left out.
    Returns None where it is undefined: without items, or if only one category was ever chosen.
    """
    judged = [item for item in items if sum(item.values()) >= 2]
    if not judged:
        return None
    agreeing = sum((_agreeing_pairs(list(item.values())) for item in judged), Fraction(0))
    totals: Counter[str] = Counter()
    for item in judged:
        totals.update(item)
    expected = Fraction(sum(n * n for n in totals.values()), sum(totals.values()) ** 2)
    return _beyond_chance(agreeing / len(judged), expected)


def _agreeing_pairs(counts: Sequence[int]) -> Fraction:
    annotators = sum(counts)
    return Fraction(sum(n * (n - 1) for n in counts), annotators * (annotators - 1))


def _beyond_chance(observed: Fraction, expected: Fraction) -> Fraction | None:
    return None if expected == 1 else (observed - expected) / (1 - expected)
