"""Distribute sequences over the ranks, balanced by tokens.

Responsible for: shares that every process computes alike from the same batch, and micro-batches of a share.
Not responsible for: what is done with them (training/step.py, rlhf/), packing (batches.py).

The processes must meet in the same collectives: with sharded weights each forward pass is one. So all run as many
micro-batches as the one with most; a process with fewer repeats a short sequence that counts for nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dovetail.batches import MicroBatchable, balanced_parts
from dovetail.parallel.world import World


@dataclass(frozen=True, slots=True)
class Part:
    """Units (sequences, groups of ranked answers) of one forward pass."""

    index: list[int]
    counts: bool = True
    """False for padding: the part makes all ranks run as many passes, and its result is left out."""


def balanced_shares(sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Return the indices of each rank, with sums of sizes as even as a greedy choice gives; a rank may get none.

    Longest first to the rank with least (Graham 1969: at most 4/3 of the best possible largest share).
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    used = [0] * num_ranks
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        target = min(range(num_ranks), key=lambda rank: (used[rank], len(shares[rank])))
        shares[target].append(i)
        used[target] += sizes[i]
    return [sorted(share) for share in shares]


def parts_of(sizes: Sequence[int], max_tokens: int, world: World) -> list[Part]:
    """Return this rank's share of the units, in parts of at most `max_tokens` tokens, as many parts as every rank has.

    Raises ValueError if there are no units.
    """
    if not sizes:
        raise ValueError("a batch without sequences cannot be shared")
    cut: list[list[list[int]]] = []
    for share in balanced_shares(sizes, world.size):
        own = [sizes[i] for i in share]
        cut.append([[share[i] for i in part] for part in balanced_parts(own, max_tokens)])
    most = max(map(len, cut))
    shortest = min(range(len(sizes)), key=sizes.__getitem__)
    mine = [Part(index) for index in cut[world.rank]]
    return mine + [Part([shortest], counts=False)] * (most - len(mine))


def shared_micro_batches(batch: MicroBatchable, max_tokens: int, world: World) -> list[tuple[Any, bool]]:
    """Return (micro-batch, whether it counts) for this rank's share of the units that have targets."""
    units = [i for i, targets in enumerate(batch.unit_targets) if targets]
    sizes = [batch.unit_tokens[i] for i in units]
    return [
        (batch.units([units[i] for i in part.index]), part.counts)
        for part in parts_of(sizes, max_tokens, world)
    ]
