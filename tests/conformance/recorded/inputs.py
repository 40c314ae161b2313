"""The fixed numbers on which other frameworks' losses were recorded, and on which ours are compared with them.

Responsible for: twelve answers, four to each of three prompts, with three policies' log-probabilities of their tokens;
four preference pairs; writing and reading what a framework says of them.
Not responsible for: torch, so that the scripts run in an environment that has that framework and nothing of ours.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GROUP_SIZE, LIMIT = 4, 9
LENGTHS = (3, 9, 1, 5, 4, 2, 7, 6, 8, 3, 5, 2)
"""Tokens of each answer; one has LIMIT."""
REWARDS = (1.0, -0.5, 0.25, 2.0, 0.5, 0.5, 0.5, 0.5, 0.0, 1.0, 0.0, 0.375)
"""The second prompt's answers are all worth the same."""
BETA = 0.04
"""The weight of the KL to the reference."""

_RNG = random.Random(7)


def _near(rows: list[list[float]], spread: float) -> list[list[float]]:
    return [[x + _RNG.uniform(-spread, spread) for x in row] for row in rows]


NEW = [[_RNG.uniform(-3.0, -0.2) for _ in range(length)] for length in LENGTHS]
"""Log-probabilities under the policy that learns."""
OLD = _near(NEW, 0.5)
"""Under the policy where the update began; ratios lie on both sides of every bound."""
REFERENCE = _near(NEW, 0.7)
for _row in (1, 6, 8, 9):  # ratios of about 9 and 1/9: beyond the bounds of a clipped weight
    OLD[_row][-1] = NEW[_row][-1] - 2.2
    OLD[_row][0] = NEW[_row][0] + 2.2
VALUES = [[_RNG.uniform(-1.0, 1.0) for _ in range(length)] for length in LENGTHS]
"""The critic's, when the answers were drawn."""
NEW_VALUES = _near(VALUES, 0.5)
GAMMA, LAMBDA = 0.95, 0.9
CLIP, CLIP_HIGH, DUAL_CLIP, VALUE_CLIP = 0.2, 0.28, 3.0, 0.2

CHOSEN, REJECTED = (-4.0, -12.5, -3.25, -30.0), (-6.0, -9.0, -3.5, -45.0)
"""Log-probabilities of the answers of four pairs."""
REFERENCE_CHOSEN, REFERENCE_REJECTED = (-5.0, -11.0, -3.25, -38.0), (-5.5, -9.75, -3.0, -40.0)
CHOSEN_TOKENS, REJECTED_TOKENS = (3, 7, 1, 20), (4, 5, 2, 25)
OTHERS, REFERENCE_OTHERS = (-8.0, -7.0, -20.0, -6.5), (-9.0, -7.5, -18.75, -9.0)
"""Answers to other prompts, for KTO's estimate of the KL."""
PAIR_BETA, SIMPO_GAMMA, SMOOTHING, MARGIN = 0.3, 0.7, 0.2, 0.5


def padded(rows: list[list[float]]) -> list[list[float]]:
    """Return the rows with zeros up to LIMIT."""
    return [row + [0.0] * (LIMIT - len(row)) for row in rows]


def cut(rows: list[list[float]]) -> list[list[float]]:
    """Return padded rows at their lengths."""
    return [row[:length] for row, length in zip(rows, LENGTHS, strict=True)]


def write(script: str, made_with: Mapping[str, str], cases: Mapping[str, Any]) -> None:
    """Write what a framework said beside the script that asked it."""
    text = json.dumps({"made_with": made_with, "cases": cases}, indent=1)
    Path(script).with_suffix(".json").write_text(text + "\n", encoding="utf-8")


def read(name: str) -> dict[str, Any]:
    """Return the cases recorded from a framework, by name."""
    cases: dict[str, Any] = json.loads(Path(__file__).with_name(f"{name}.json").read_text(encoding="utf-8"))
    return cases["cases"]
