"""Which stage sees a row, and whether it is held out: by a hash of its content alone.

Responsible for: the same row going to the same place whatever its order, its file, or the other sources.
Not responsible for: reading rows (sources.py), or mixing sources (blend.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from dovetail.data.records import Kind

STAGES: tuple[Kind, ...] = ("sft", "reward", "ppo")


def stage_of(key: str, shares: Sequence[float], served: Sequence[Kind]) -> Kind | None:
    """The stage of a row with this hash: by the shares of the stages that its source can serve.

    A source without comparisons gives none to the reward model; its rows go to the other two by their shares.
    None where those shares are zero.
    """
    able = [
        (stage, share) for stage, share in zip(STAGES, shares, strict=True) if stage in served and share > 0
    ]
    point = unit_interval(key, "stage") * sum(share for _, share in able)
    for stage, share in able:
        if point < share:
            return stage
        point -= share
    return able[-1][0] if able else None


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a row with this hash is kept from training."""
    return unit_interval(key, "held out") < fraction


def unit_interval(key: str, purpose: str) -> float:
    """A number in [0, 1) that looks random: a hash of the key, another one for each purpose."""
    digest = hashlib.sha256(f"{purpose}\0{key}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)
