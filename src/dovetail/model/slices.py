"""Tensors that are slices of a whole one, as the processes of a tensor-parallel group hold them.

Responsible for: the note on a tensor that says which part of which whole it is, and where its numbers lie there.
Not responsible for: which process holds what (parallel/tensor_plan.py), sharding of a slice by rows (shards.py).

The note is an attribute of the tensor object; what is made from it (a moment, an average, a tensor to save) gets it by
`noted`. A tensor without a note is whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.model.shards import bounds, is_shard

Pieces = tuple[tuple[int, int], ...]
"""The (start, length) of each piece in one dimension of the whole; they lie end to end in the slice."""


@dataclass(frozen=True, slots=True)
class Slice:
    """The part of a whole that a tensor is."""

    shape: torch.Size
    """The shape of the whole."""
    dim: int
    pieces: Pieces
    all_pieces: tuple[Pieces, ...] | None
    """The pieces of each process of the group; None where all have the whole."""
    is_first: bool
    """True if this process is the first of those that hold the same numbers, the one that writes them."""

    def joined(self, slices: Sequence[Tensor]) -> Tensor:
        """Return the whole, joined from the slices of all processes."""
        assert self.all_pieces is not None
        whole = slices[0].new_empty(self.shape)
        for held, pieces in zip(slices, self.all_pieces, strict=True):
            at = 0
            for start, length in pieces:
                whole.narrow(self.dim, start, length).copy_(held.narrow(self.dim, at, length))
                at += length
        return whole


def slice_of(tensor: Tensor) -> Slice | None:
    """Return the note; None for a whole tensor."""
    return getattr(tensor, "dovetail_slice", None)


def note(tensor: Tensor, note: Slice | None) -> Tensor:
    """Put the note on the tensor, and return the tensor."""
    if note is not None:
        tensor.dovetail_slice = note  # type: ignore[attr-defined]
    return tensor


def noted(tensor: Tensor, like: Tensor) -> Tensor:
    """Mark the tensor as the same part of a whole as `like`, and return it."""
    return note(tensor, slice_of(like))


def is_part(tensor: Tensor) -> bool:
    """Return whether the tensor is a shard, or has a note, which also says which process writes it."""
    return is_shard(tensor) or slice_of(tensor) is not None


def whole_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of the whole that the tensor is part of."""
    found = slice_of(tensor)
    return tensor.shape if found is None else found.shape


Span = tuple[int, int, int]
"""The triple (start in the whole, start here, length)."""
Box = tuple[Span, Span | None]
"""A rectangle of a whole tensor that is here: rows, and columns (None: all, or there are none)."""


def boxes(tensor: Tensor) -> list[Box]:
    """Return the boxes of the whole that this process holds of a tensor: whole, shard, slice or shard of a slice."""
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
    """Return the part of a span whose local places are from `first` to before `end`."""
    start, at, length = span
    low, high = max(at, first), min(at + length, end)
    return start + low - at, low, max(0, high - low)
