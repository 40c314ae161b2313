"""The stage that sees a row, and the rows that are held out: a hash of the prompt alone decides both.

Responsible for: sending all rows of one prompt to one place, whatever their answers, order, file or other sources.
Not responsible for: reading rows (sources.py), or mixing sources (blend.py).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from dovetail.data.records import Kind

STAGES: tuple[Kind, ...] = ("sft", "reward", "ppo")


def stage_of(key: str, shares: Sequence[float], served: Sequence[Kind]) -> Kind | None:
    """Return the stage of a row with this key, drawn by the shares of the stages that the row can serve.

    Each stage draws a waiting time from the key, exponential with its share as the rate, and the stage with the
    shortest one takes the row. A row that cannot serve a stage leaves the others' times as they are: two rows
    with one key go to the same stage unless one of them cannot serve it. None where all shares are zero.
    """
    waits = [
        (-math.log1p(-unit_interval(key, f"stage {stage}")) / share, stage)
        for stage, share in zip(STAGES, shares, strict=True)
        if stage in served and share > 0
    ]
    return min(waits)[1] if waits else None


def is_held_out(key: str, fraction: float) -> bool:
    """Return whether rows with this key are kept from training."""
    return unit_interval(key, "held out") < fraction


def unit_interval(key: str, purpose: str) -> float:
    """Return a number in [0, 1) that looks random: a hash of the key, another one for each purpose."""
    digest = hashlib.sha256(f"{purpose}\0{key}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)
