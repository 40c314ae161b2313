"""The data sets that are known by name, here or in a file of LLaMA-Factory.

Responsible for: turning a registered name (registry.yaml), or a name in `dataset_info.json`, into the source it stands
for. Not responsible for: reading them (sources.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from dovetail.config.data import SourceConfig
from dovetail.errors import DataError

_DESCRIBED = re.compile(r"dataset_info[^/:]*\.json:")
"""The path of a set that a file of LLaMA-Factory describes: FILE:NAME."""


@cache
def registry() -> dict[str, dict[str, Any]]:
    """Return every entry under each of its names."""
    text = resources.files("dovetail.data").joinpath("registry.yaml").read_text(encoding="utf-8")
    entries: dict[str, dict[str, Any]] = yaml.safe_load(text)
    named = dict(entries)
    for entry in entries.values():
        named.update(dict.fromkeys(entry["names"], entry))
    return named


def short_names() -> tuple[str, ...]:
    """Return the names to show people, one for each entry."""
    return tuple(name for name, entry in registry().items() if name not in entry["names"])


def resolve(source: SourceConfig) -> tuple[SourceConfig, ...]:
    """Return the sources that a registered name stands for; any other source as it is.

    The user's settings win. An entry with rows of its own for evaluation gives two sources, one of them held
    out whole, unless the user chose a split or what to hold out.
    """
    if _DESCRIBED.search(source.path):
        return (_from_dataset_info(source),)
    entry = registry().get(source.path)
    if entry is None or Path(source.path).exists():
        return (source,)
    given = {name: getattr(source, name) for name in source.model_fields_set - {"path"}}
    columns: dict[str, Any] = {} if source.names_columns() else entry["columns"]
    train = SourceConfig(**{**entry["table"], **columns, **given})
    evaluation = entry.get("evaluation")
    if evaluation is None or {"split", "held_out"} & given.keys():
        return (train,)
    held_out = train.model_copy(update={**evaluation, "held_out": True, "weight": None})
    return (train.model_copy(update={"held_out": False}), held_out)


def _from_dataset_info(source: SourceConfig) -> SourceConfig:
    """Return the source that LLaMA-Factory's `dataset_info.json:NAME` describes; the user's settings win.

    Raises DataError if the file has no such name, or describes what cannot be learnt from.
    """
    file, _, name = source.path.partition(".json:")
    path = Path(f"{file}.json").expanduser()
    try:
        sets = json.loads(path.read_text(encoding="utf-8"))
        entry = sets[name]
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read: {error}", hint="give LLaMA-Factory's dataset_info.json"
        ) from error
    except (KeyError, TypeError):
        known = ", ".join(sets) if isinstance(sets, dict) else "no names"
        raise DataError(f"{path}: describes no set {name}; it has {known}", hint="write FILE:NAME") from None
    given = {key: getattr(source, key) for key in source.model_fields_set - {"path"}}
    columns = {} if source.names_columns() else _columns_of(entry, f"{path}: {name}")
    return SourceConfig(**{**_table_of(entry, path, name), **columns, **given})


def _table_of(entry: Mapping[str, Any], path: Path, name: str) -> dict[str, Any]:
    """Return where the rows of a described set are."""
    table: dict[str, Any] = {"limit": entry.get("num_samples"), "split": entry.get("split", "train")}
    if "file_name" in entry:
        return table | {"path": str(path.parent / entry["file_name"])}
    if "hf_hub_url" in entry:
        return table | {"path": entry["hf_hub_url"], "name": entry.get("subset")}
    raise DataError(
        f"{path}: {name} has neither file_name nor hf_hub_url",
        hint="download the set, and name the file as file_name",
    )


def _columns_of(entry: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the columns of a described set as a source names them."""
    named = entry.get("columns", {})
    if "kto_tag" in named:
        raise DataError(
            f"{place} has the column kto_tag: single answers with a verdict make no pairs",
            hint="pair them, as chosen and rejected, or leave the set out",
        )
    is_ranked, columns = entry.get("ranking", False), {"system": named.get("system")}
    if entry.get("formatting", "alpaca") == "sharegpt":
        turns = named.get("messages", "conversations")
        columns |= {"prompt": turns} if is_ranked else {"messages": turns}
    elif set(named) <= {"prompt"} and "prompt" in named and not is_ranked:
        return {"text": named["prompt"]}  # a set for pretraining
    else:
        asked = [named.get("prompt", "instruction"), f"{named.get('query', 'input')}?"]
        columns |= {"prompt": tuple(asked), "history": named.get("history")}
        columns |= {} if is_ranked else {"response": named.get("response", "output")}
    if is_ranked:
        columns |= {side: named.get(side, side) for side in ("chosen", "rejected")}
    return columns
