"""Tensors in a safetensors file, written one after another.

Responsible for: the file format (https://huggingface.co/docs/safetensors), so that any tool can read it and
no pickle is ever loaded. Written here rather than by the library because the library wants all tensors in
host memory at once, reports a full disk as text, and cannot hash what it writes; read by the library.
Not responsible for: names and structure of a state (checkpoint.py).
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from dovetail.model.shards import bounds
from dovetail.model.slices import Box, Span, boxes, slice_of

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    """Write header and data. One tensor at a time is copied to host memory."""
    # wide types first, so that each tensor starts at a multiple of its element size
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {}
    offset = 0
    for name, tensor in ordered:
        end = offset + num_bytes(tensor)
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for _, tensor in ordered:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        file.write(flat.view(torch.uint8).numpy().data)


Place = Sequence[Any]
"""The part of a tensor in a file: (first row, one after the last), or `boxes` of model/slices.py."""


def place(tensor: Tensor) -> Place:
    """Return the part of a shard or slice that this rank writes."""
    return bounds(tensor) if slice_of(tensor) is None else boxes(tensor)


class TensorFiles:
    """Tensors in the files of one folder, read on the CPU when asked for; a tensor's parts may lie in several files.

    places: for tensors that are cut, name -> file, in the order of the rows -> what is in it.
    """

    def __init__(self, folder: Path, names: Sequence[str], places: Mapping[str, Mapping[str, Place]]) -> None:
        self._files: dict[str, Any] = {name: safe_open(folder / name, framework="pt") for name in names}
        self._boxes = {key: files for key, files in places.items() if _has_boxes(files)}
        self._rows = {key: files for key, files in places.items() if key not in self._boxes}
        self._file_of = {key: file for file in self._files.values() for key in file.keys()}  # noqa: SIM118

    def shape(self, name: str) -> torch.Size:
        """Return the shape of the whole tensor. Raises KeyError if no file has it."""
        shape = self._file_of[name].get_slice(name).get_shape()
        if name in self._rows:
            shape[0] = max(end for _, end in self._rows[name].values())
        for rows, columns in chain(*self._boxes.get(name, {}).values()):
            shape[0] = max(shape[0], rows[0] + rows[2])
            if columns is not None:
                shape[1] = max(shape[1], columns[0] + columns[2])
        return torch.Size(shape)

    def read(self, name: str, start: int | None = None, end: int | None = None) -> Tensor:
        """Read the tensor, or its rows from `start` to before `end`. Raises KeyError if no file has it."""
        if name in self._boxes:
            shape = self.shape(name)
            rows = (start or 0, 0, (shape[0] if end is None else end) - (start or 0))
            return self.read_boxes(name, [(rows, None)], torch.Size([rows[2], *shape[1:]]))
        if start is None and name not in self._rows:
            tensor: Tensor = self._file_of[name].get_tensor(name)
            return tensor
        if name not in self._rows:
            found: Tensor = self._file_of[name].get_slice(name)[start:end]
            return found
        pieces = [self._piece(name, file, start or 0, end) for file in self._rows[name]]
        return torch.cat(pieces)

    def read_boxes(self, name: str, wanted: Sequence[Box], shape: torch.Size) -> Tensor:
        """Read a tensor of this shape, made of boxes of the whole one. Raises KeyError if no file has it."""
        made: Tensor | None = None
        for file, there in self._sources(name):
            stored = file.get_slice(name)
            if made is None:
                made = torch.empty(shape, dtype=stored[0:0].dtype)
            for own, other in product(wanted, there):
                _copy_common(made, own, stored, other)
        assert made is not None
        return made

    def _sources(self, name: str) -> Iterator[tuple[Any, Sequence[Box]]]:
        """Each file that has something of a tensor, and what."""
        if name in self._boxes:
            for file, there in self._boxes[name].items():
                yield self._files[file], there
        elif name in self._rows:
            for file, (start, end) in self._rows[name].items():
                yield self._files[file], [((start, 0, end - start), None)]
        else:
            yield self._file_of[name], [((0, 0, self.shape(name)[0]), None)]

    def _piece(self, name: str, file: str, start: int, end: int | None) -> Tensor:
        """Return the rows from `start` to before `end` that a file has; perhaps none."""
        begin, stop = self._rows[name][file]
        low = max(start, begin) - begin
        high = (stop if end is None else min(stop, end)) - begin
        piece: Tensor = self._files[file].get_slice(name)[low : max(low, high)]
        return piece


def _has_boxes(places: Mapping[str, Place]) -> bool:
    return any(not isinstance(part, int) for where in places.values() for part in where)


def _copy_common(made: Tensor, own: Box, stored: Any, other: Box) -> None:
    """Into one box of a tensor, what it has in common with another box of the same whole, which is in a file."""
    pairs = [_common(mine, theirs) for mine, theirs in zip(own, other, strict=True)][: made.ndim]
    into, out_of = zip(*pairs, strict=True)
    if all(span.start is None or span.start < span.stop for span in into):
        made[into] = stored[out_of]


def _common(own: Span | None, other: Span | None) -> tuple[slice, slice]:
    """Locate the common part of two boxes in each of them, in one dimension."""
    if own is None and other is None:
        return slice(None), slice(None)
    first, at, length = own or (0, 0, sys.maxsize)
    other_first, other_at, other_length = other or (0, 0, sys.maxsize)
    low, high = max(first, other_first), min(first + length, other_first + other_length)
    return slice(low - first + at, high - first + at), slice(
        low - other_first + other_at, high - other_first + other_at
    )


def num_bytes(tensor: Tensor) -> int:
    """Size of the tensor's own elements."""
    return tensor.numel() * tensor.element_size()
