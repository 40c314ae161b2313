"""Data sets that the `datasets` library keeps: saved folders and hub names.

Responsible for: opening them, and errors that say what to do. Not responsible for: plain files (tables.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dovetail.config.data import SourceConfig
from dovetail.data.tables import Placed
from dovetail.errors import DataError


def is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote this folder."""
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def saved_rows(folder: Path, split: str) -> Iterator[Placed]:
    """Yield the rows of a folder that `save_to_disk` wrote."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever a damaged folder makes it raise
        raise DataError(
            f"{folder}: cannot be read as a saved data set: {_first_line(error)}",
            hint="save it again with save_to_disk",
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(
                f"{folder}: there is no split {split}; it has {', '.join(loaded)}",
                hint=f"set split: {next(iter(loaded), split)}",
            )
        loaded = loaded[split]
    return _placed(loaded)


def hub_rows(source: SourceConfig) -> Iterator[Placed]:
    """Yield the rows of a data set on the hub, or in its cache on this machine."""
    import datasets

    try:
        loaded = datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except Exception as error:  # network, names, splits, scripts: dozens of kinds
        raise DataError(
            f"{source.path}: cannot be loaded from the hub: {_first_line(error)}", hint=_hint(source, error)
        ) from error
    return _placed(loaded)


def _hint(source: SourceConfig, error: Exception) -> str:
    text = f"{type(error).__name__} {error}".lower()
    if "split" in text:
        return f"set split to one that {source.path} has"
    if "config" in text and "available" in text:
        return "set name to one of these configurations"
    if "script" in text:
        return "the set comes with a script, which is not run; set revision: refs/convert/parquet"
    return (
        "check the name on https://huggingface.co/datasets; without network, give a folder or files that were "
        "downloaded elsewhere as path; for a gated set, log in with `hf auth login`"
    )


def _placed(rows: Any) -> Iterator[Placed]:
    for number, row in enumerate(rows, start=1):
        yield Placed(f"row {number}", row)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
