"""`~` in every path that is typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from dovetail.cli.main import main
from dovetail.cli.user_paths import path
from dovetail.data.labels.database import open_store
from dovetail.serving.keys import read_keys
from tests.serving.labelling.work import new_project, task


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert not stopped.value.code


def test_a_tilde_at_the_beginning_is_the_home_folder(home: Path) -> None:
    assert path("~/a b") == home / "a b"
    assert [path(other) for other in ("a~", "./~", "/~")] == [Path("a~"), Path("./~"), Path("/~")]


def test_a_key_file_and_labels_go_there(home: Path, tmp_path: Path) -> None:
    run("api-key", "~/keys.txt", "alice")
    assert read_keys(home / "keys.txt").has("alice")
    store = open_store("sqlite:///~/labels.db")
    new_project(store, task(1))
    store.close()
    run("label", "export", "--store", "sqlite:///~/labels.db", "--output=~/pairs.jsonl")
    assert sorted(file.name for file in home.iterdir()) == ["keys.txt", "labels.db", "pairs.jsonl"]
    assert list((tmp_path / "here").iterdir()) == []
