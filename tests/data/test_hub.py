from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from dovetail.config.data import SourceConfig
from dovetail.data.hub import hub_rows, is_saved, saved_rows
from dovetail.errors import DataError
from tests.data.files import questions


def rows(placed: Any) -> list[Any]:
    return [row for _, row in placed]


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    datasets.Dataset.from_list(questions(3)).save_to_disk(tmp_path / "one")
    assert is_saved(tmp_path / "one")
    assert rows(saved_rows(tmp_path / "one", "train")) == questions(3)


def test_a_saved_dictionary_is_read_by_split(tmp_path: Path) -> None:
    both = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list(questions(3)),
            "test": datasets.Dataset.from_list(questions(2, "t")),
        }
    )
    both.save_to_disk(tmp_path / "two")
    assert rows(saved_rows(tmp_path / "two", "test")) == questions(2, "t")
    with pytest.raises(DataError, match="there is no split dev; it has train, test"):
        saved_rows(tmp_path / "two", "dev")


def test_a_damaged_saved_data_set_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({}), encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read as a saved data set"):
        saved_rows(tmp_path, "train")


def test_a_hub_name_without_network_says_what_to_do() -> None:
    with pytest.raises(DataError) as caught:
        hub_rows(SourceConfig(path="no-such/set"))
    assert caught.value.message.startswith("no-such/set: cannot be loaded from the hub: ")
    assert caught.value.hint is not None
    assert "without network" in caught.value.hint


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (ValueError("Unknown split \"train\". Should be one of ['test']."), "set split to one that a/b has"),
        (
            ValueError("Config name is missing. Please pick one among the available configs: ['x']"),
            "set name to one of these configurations",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported, but found b.py"),
            "set revision: refs/convert",
        ),
        (ConnectionError("Couldn't reach the Hub"), "check the name"),
    ],
)
def test_what_the_library_says_becomes_a_hint(
    error: Exception, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError) as caught:
        hub_rows(SourceConfig(path="a/b"))
    assert hint in str(caught.value.hint)


def test_all_settings_of_a_hub_source_reach_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **options: Any) -> list[dict[str, str]]:
        asked.append((args, options))
        return questions(1)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert rows(hub_rows(SourceConfig(path="a/b", name="c", split="dev", revision="main"))) == questions(1)
    assert asked == [(("a/b", "c"), {"split": "dev", "revision": "main"})]
