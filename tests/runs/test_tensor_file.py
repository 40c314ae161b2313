import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from dovetail.model.slices import Pieces, Slice, boxes, note
from dovetail.runs.tensor_file import TensorFiles, num_bytes, place, write_tensors

EVERY_KIND = {
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "turned": torch.arange(12.0).reshape(3, 4).T,
    "slice": torch.arange(10)[::3],
    "bool": torch.tensor([True, False, True]),
    "generator": torch.Generator().manual_seed(1).get_state(),
    **{
        str(dtype).removeprefix("torch."): torch.tensor([1, 2, 100], dtype=dtype)
        for dtype in (
            torch.float64,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
        )
    },
}


def test_the_library_reads_every_kind_of_tensor_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    with path.open("wb") as file:
        write_tensors(file, EVERY_KIND)
    files = TensorFiles(tmp_path, [path.name], {})
    for found in ({name: files.read(name) for name in EVERY_KIND}, load(path.read_bytes())):
        assert found.keys() == EVERY_KIND.keys()
        for name, tensor in EVERY_KIND.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
    with safe_open(path, framework="pt") as opened:
        assert set(opened.keys()) == set(EVERY_KIND)


def test_parameters_can_be_written(tmp_path: Path) -> None:
    file = io.BytesIO()
    write_tensors(file, {"weight": torch.nn.Parameter(torch.ones(2, 2))})
    assert torch.equal(load(file.getvalue())["weight"], torch.ones(2, 2))


def test_no_tensors_make_a_valid_file() -> None:
    file = io.BytesIO()
    write_tensors(file, {})
    assert load(file.getvalue()) == {}


@pytest.mark.parametrize(("tensor", "size"), [(torch.zeros(3, 5).bfloat16(), 30), (torch.zeros(()), 4)])
def test_sizes_are_those_of_the_elements(tensor: torch.Tensor, size: int) -> None:
    assert num_bytes(tensor) == size


def test_rows_are_read_across_files(tmp_path: Path) -> None:
    whole = torch.arange(30).reshape(10, 3)
    bounds = {"a": (0, 4), "b": (4, 8), "c": (8, 10), "d": (10, 10)}
    for name, (start, end) in bounds.items():
        with (tmp_path / name).open("wb") as file:
            write_tensors(file, {"cut": whole[start:end]} | ({"uncut": whole + 1} if name == "a" else {}))
    files = TensorFiles(tmp_path, list(bounds), {"cut": bounds})
    assert files.shape("cut") == files.shape("uncut") == whole.shape
    assert torch.equal(files.read("cut"), whole)
    for start in range(11):
        for end in range(start, 11):
            assert torch.equal(files.read("cut", start, end), whole[start:end])
            assert torch.equal(files.read("uncut", start, end), whole[start:end] + 1)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("num_dims", [1, 2])
def test_slices_are_read_from_other_slices_rows_and_wholes(tmp_path: Path, dim: int, num_dims: int) -> None:
    """Each of two processes holds two pieces of 12 rows or columns; another division has three, of other lengths."""
    if dim >= num_dims:
        return
    whole = torch.randn([12, 12][:num_dims], generator=torch.Generator().manual_seed(0))
    twos: tuple[Pieces, ...] = (((0, 3), (6, 2)), ((3, 3), (8, 4)))
    threes: tuple[Pieces, ...] = (((0, 5),), ((5, 1), (11, 1)), ((6, 5),))
    places: dict[str, dict[str, Any]] = {"twos": {}, "rows": {"a": (0, 7), "b": (7, 12)}}
    for file, pieces in zip("ab", twos, strict=True):
        part = sliced(whole, dim, pieces)
        places["twos"][file] = json.loads(json.dumps(place(part)))
        rows = whole[slice(*places["rows"][file])]
        with (tmp_path / file).open("wb") as opened:
            write_tensors(opened, {"twos": part, "rows": rows} | ({"whole": whole} if file == "a" else {}))
    files = TensorFiles(tmp_path, ["a", "b"], places)
    for name in ("twos", "rows", "whole"):
        assert files.shape(name) == whole.shape
        assert torch.equal(files.read(name), whole)
        assert torch.equal(files.read(name, 4, 9), whole[4:9])
        for pieces in threes:
            wanted = sliced(whole, dim, pieces)
            assert torch.equal(files.read_boxes(name, boxes(wanted), wanted.shape), wanted)


def sliced(whole: torch.Tensor, dim: int, pieces: Pieces) -> torch.Tensor:
    """The pieces end to end, as a process would hold them."""
    part = torch.cat([whole.narrow(dim, start, length) for start, length in pieces], dim)
    return note(part, Slice(whole.shape, dim, pieces, all_pieces=(pieces,), is_first=True))
