"""The data sets that are known by name.

Responsible for: turning a registered name into the source it stands for. The entries are in registry.yaml.
Not responsible for: reading them (sources.py).
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from dovetail.config.data import SourceConfig


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
