"""Tensors in a safetensors file, written one after another.

Responsible for: the file format (https://huggingface.co/docs/safetensors), so that any tool can read it and
no pickle is ever loaded. Written here rather than by the library because the library wants all tensors in
host memory at once, reports a full disk as text, and cannot hash what it writes; read by the library.
Not responsible for: names and structure of a state (checkpoint.py).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

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


class TensorFiles:
    """Tensors in the files of one folder, read on the CPU when asked for; a tensor's rows may lie in several files.

    rows: for tensors cut by rows, name -> file, in the order of the rows -> (first row, one after the last).
    """

    def __init__(
        self, folder: Path, names: Sequence[str], rows: Mapping[str, Mapping[str, Sequence[int]]]
    ) -> None:
        self._files: dict[str, Any] = {name: safe_open(folder / name, framework="pt") for name in names}
        self._rows = rows
        self._file_of = {key: file for file in self._files.values() for key in file.keys()}  # noqa: SIM118

    def shape(self, name: str) -> torch.Size:
        """Of the whole tensor. Raises KeyError if no file has it."""
        shape = self._file_of[name].get_slice(name).get_shape()
        if name in self._rows:
            shape[0] = max(end for _, end in self._rows[name].values())
        return torch.Size(shape)

    def read(self, name: str, start: int | None = None, end: int | None = None) -> Tensor:
        """The tensor, or its rows from `start` to before `end`. Raises KeyError if no file has it."""
        if start is None and name not in self._rows:
            tensor: Tensor = self._file_of[name].get_tensor(name)
            return tensor
        if name not in self._rows:
            rows: Tensor = self._file_of[name].get_slice(name)[start:end]
            return rows
        pieces = [self._piece(name, file, start or 0, end) for file in self._rows[name]]
        return torch.cat(pieces)

    def _piece(self, name: str, file: str, start: int, end: int | None) -> Tensor:
        """What a file has of the rows from `start` to before `end`; perhaps none."""
        begin, stop = self._rows[name][file]
        low = max(start, begin) - begin
        high = (stop if end is None else min(stop, end)) - begin
        piece: Tensor = self._files[file].get_slice(name)[low : max(low, high)]
        return piece


def num_bytes(tensor: Tensor) -> int:
    """Size of the tensor's own elements."""
    return tensor.numel() * tensor.element_size()
