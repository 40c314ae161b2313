from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.data.labels.agreement import cohen_kappa, fleiss_kappa

FLEISS_1971 = """
0 0 0 6 0 | 0 3 0 0 3 | 0 1 4 0 1 | 0 0 0 0 6 | 0 3 0 3 0 | 2 0 4 0 0 | 0 0 4 0 2 | 2 0 3 1 0 | 2 0 0 4 0 | 0 0 0 0 6
1 0 0 5 0 | 1 1 0 4 0 | 0 3 3 0 0 | 1 0 0 5 0 | 0 2 0 3 1 | 0 0 5 0 1 | 3 0 0 1 2 | 5 1 0 0 0 | 0 2 0 4 0 | 1 0 2 0 3
0 0 0 0 6 | 0 1 0 5 0 | 0 2 0 1 3 | 2 0 0 4 0 | 1 0 0 4 1 | 0 5 0 1 0 | 4 0 0 0 2 | 0 2 0 4 0 | 1 0 5 0 0 | 0 0 0 0 6
"""
"""30 patients, 6 psychiatrists: depression, personality disorder, schizophrenia, neurosis, other."""


def test_fleiss_example_of_1971() -> None:
    patients = [
        [int(n) for n in cell.split()] for row in FLEISS_1971.strip().splitlines() for cell in row.split("|")
    ]
    assert [len(patients), *{sum(patient) for patient in patients}] == [30, 6]
    # The paper's table 1: shares .144 .144 .167 .306 .239 of the 180 diagnoses, so P_e = .2199; P = .5556.
    totals = [sum(column) for column in zip(*patients, strict=True)]
    assert totals == [26, 26, 30, 55, 43]
    # Of the 30 x 30 ordered pairs of psychiatrists 500 agree: sum n^2 = 680 over all cells, less the 180 diagnoses.
    assert sum(n * n for patient in patients for n in patient) == 680
    observed = Fraction(500, 900)
    expected = Fraction(26**2 + 26**2 + 30**2 + 55**2 + 43**2, 180**2)
    kappa = fleiss_kappa([dict(zip("abcde", patient, strict=True)) for patient in patients])
    assert kappa == (observed - expected) / (1 - expected)
    assert kappa is not None
    assert round(float(kappa), 3) == 0.430  # as published


def both(table: list[list[int]]) -> tuple[list[int], list[int]]:
    """The categories of two annotators from their table of counts."""
    cells = [(i, j) for i, row in enumerate(table) for j, n in enumerate(row) for _ in range(n)]
    return [i for i, _ in cells], [j for _, j in cells]


@pytest.mark.parametrize(
    ("table", "kappa"),
    [
        # Fleiss, Levin and Paik 2003, table 18.1, 100 patients, published .68. Agreed 75 + 4 + 10 = .89;
        # by chance .80 x .80 + .10 x .05 + .10 x .15 = .66; (.89 - .66) / .34.
        ([[75, 1, 4], [5, 4, 1], [0, 0, 10]], Fraction(23, 34)),
        # 50 proposals, read twice: agreed .7, by chance .5 x .6 + .5 x .4 = .5.
        ([[20, 5], [10, 15]], Fraction(2, 5)),
        ([[3, 0], [0, 4]], Fraction(1)),
        ([[0, 2], [2, 0]], Fraction(-1)),
        ([[1, 1], [1, 1]], Fraction(0)),
    ],
)
def test_cohen_examples(table: list[list[int]], kappa: Fraction) -> None:
    assert cohen_kappa(*both(table)) == kappa


def test_what_is_undefined_is_none() -> None:
    assert cohen_kappa([], []) is None
    assert cohen_kappa(["a", "a"], ["a", "a"]) is None
    assert fleiss_kappa([]) is None
    assert fleiss_kappa([{"a": 3}, {"a": 2}]) is None
    assert fleiss_kappa([{"a": 1}, {"b": 1}]) is None


def test_items_must_be_the_same() -> None:
    with pytest.raises(ValueError, match="2 and 1 categories"):
        cohen_kappa(["a", "b"], ["a"])


def fleiss_by_definition(items: list[list[str]]) -> Fraction | None:
    """From single annotators' choices: pairs of them that agree, and two choices drawn with replacement."""
    shares = []
    for choices in items:
        pairs = list(combinations(choices, 2))
        shares.append(Fraction(sum(a == b for a, b in pairs), len(pairs)))
    pool = [choice for choices in items for choice in choices]
    chance = Fraction(sum(a == b for a in pool for b in pool), len(pool) ** 2)
    return None if chance == 1 else (sum(shares, Fraction(0)) / len(shares) - chance) / (1 - chance)


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=2, max_size=5), min_size=1, max_size=8))
def test_fleiss_kappa_is_its_definition(items: list[list[str]]) -> None:
    counts = [{c: choices.count(c) for c in "abc"} for choices in items]
    assert fleiss_kappa(counts) == fleiss_by_definition(items)
    assert fleiss_kappa([*counts, {"a": 1}, {}]) == fleiss_by_definition(items)
