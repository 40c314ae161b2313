"""Tensors in a safetensors file, written one after another.

Responsible for: the file format (https://huggingface.co/docs/safetensors), so that any tool can read it and
no pickle is ever loaded. Written here rather than by the library because the library wants all tensors in
host memory at once, reports a full disk as text, and cannot hash what it writes; read by the library.
Not responsible for: names and structure of a state (checkpoint.py).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import load_file
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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors, on the CPU."""
    return load_file(path)


def num_bytes(tensor: Tensor) -> int:
    """Size of the tensor's own elements."""
    return tensor.numel() * tensor.element_size()
