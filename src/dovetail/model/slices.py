"""Tensors that are slices of a whole one: what a process of a tensor-parallel group holds.

Responsible for: the note on a tensor that says which part of which whole it is, and where its numbers lie there.
Not responsible for: who holds what (parallel/tensor_plan.py), sharding of a slice by rows (shards.py).

The note is an attribute of the tensor object; what is made from it (a moment, an average, a tensor to save) gets it by
`noted`. A tensor without a note is whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.model.shards import bounds, is_shard

Pieces = tuple[tuple[int, int], ...]
"""(start, length) of each, in one dimension of the whole, end to end in the slice."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Which part of a whole a tensor is."""

    shape: torch.Size
    """Of the whole."""
    dim: int
    pieces: Pieces
    everybodys: tuple[Pieces, ...] | None
    """The pieces of each process of the group; None: all have the whole."""
    is_first: bool
    """Of the processes that hold the same numbers, one is the first: the one that writes them."""

    def joined(self, slices: Sequence[Tensor]) -> Tensor:
        """The whole, from the slices of all."""
        assert self.everybodys is not None
        whole = slices[0].new_empty(self.shape)
        for held, pieces in zip(slices, self.everybodys, strict=True):
            at = 0
            for start, length in pieces:
                whole.narrow(self.dim, start, length).copy_(held.narrow(self.dim, at, length))
                at += length
        return whole


def slice_of(tensor: Tensor) -> Slice | None:
    """The note; None on a whole tensor."""
    return getattr(tensor, "dovetail_slice", None)


def note(tensor: Tensor, note: Slice | None) -> Tensor:
    """The tensor itself, with the note."""
    if note is not None:
        tensor.dovetail_slice = note  # type: ignore[attr-defined]
    return tensor


def noted(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor itself, as the same part of a whole as `like`."""
    return note(tensor, slice_of(like))


def is_part(tensor: Tensor) -> bool:
    """Whether this process holds a shard or a slice of the whole, or knows who writes it."""
    return is_shard(tensor) or slice_of(tensor) is not None


def whole_shape(tensor: Tensor) -> torch.Size:
    """Of the whole that the tensor is part of."""
    found = slice_of(tensor)
    return tensor.shape if found is None else found.shape


Span = tuple[int, int, int]
"""(start in the whole, start here, length)."""
Box = tuple[Span, Span | None]
"""A rectangle of a whole tensor that is here: rows, and columns (None: all, or there are none)."""


def boxes(tensor: Tensor) -> list[Box]:
    """Where in the whole the numbers lie that this process has of a tensor: whole, shard, slice or shard of a slice."""
    first, end = bounds(tensor)
    found = slice_of(tensor)
    if found is None:
        return [((first, 0, end - first), None)]
    spans, at = [], 0
    for start, length in found.pieces:
        spans.append((start, at, length))
        at += length
    if found.dim == 1:
        return [((first, 0, end - first), span) for span in spans]
    rows = [(start, at - first, length) for start, at, length in (_within(s, first, end) for s in spans)]
    return [(span, None) for span in rows if span[2] > 0]


def _within(span: Span, first: int, end: int) -> Span:
    """The part of a span whose places here are from `first` to before `end`."""
    start, at, length = span
    low, high = max(at, first), min(at + length, end)
    return start + low - at, low, max(0, high - low)
