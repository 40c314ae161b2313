"""Every example of docs/data.md is read: its recipe from the rows that stand beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dovetail.config.load import check
from dovetail.config.yaml_source import read_yaml
from dovetail.data.blend import load_stage
from dovetail.data.records import Comparison, Record, kinds_of
from dovetail.data.registry import registry, resolve, short_names
from dovetail.data.sources import read_source

GUIDE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
TABLES = re.findall(r"^```(?:jsonl|csv) (\S+)\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
RECIPES = re.findall(r"^```yaml\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tables of the guide, where its recipes look for them."""
    monkeypatch.chdir(tmp_path)
    for name, content in TABLES:
        (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_source_of_the_guide_gives_records(recipe: str) -> None:
    data = check(read_yaml(recipe, "docs/data.md").values).data
    for source in (*data.blend, *data.pretraining):
        if source.path in registry():
            assert resolve(source)[0].path != source.path
            continue
        records: list[Record] = list(read_source(source))
        assert len(records) == len((Path(source.path)).read_text(encoding="utf-8").splitlines()) - (
            source.path.endswith(".csv")
        )


@pytest.mark.usefixtures("folder")
def test_the_guide_s_forms_serve_what_it_says() -> None:
    served: dict[str, set[tuple[str, ...]]] = {}
    for recipe in RECIPES:
        data = check(read_yaml(recipe, "docs/data.md").values).data
        for source in data.blend:
            if source.path not in registry():
                served.setdefault(source.path, set()).update(map(kinds_of, read_source(source)))
    assert served["chats.jsonl"] == served["questions.jsonl"] == {("sft", "ppo")}
    assert served["prompts.jsonl"] == {("ppo",)}
    comparisons = {"judged.jsonl", "transcripts.jsonl", "lists.jsonl", "arena.jsonl", "graded.jsonl",
                   "ranked.jsonl", "nested.jsonl", "columns.csv", "my_pairs.jsonl"}  # fmt: skip
    assert all(served[name] == {("sft", "reward", "ppo")} for name in comparisons)


@pytest.mark.usefixtures("folder")
def test_the_guide_s_ranking_learns_from_all_pairs_that_differ() -> None:
    recipe = next(recipe for recipe in RECIPES if "ranked.jsonl" in recipe)
    source = check(read_yaml(recipe, "docs/data.md").values).data.blend[0]
    (record,) = read_source(source)
    assert isinstance(record, Comparison)
    assert {(better, worse) for better, worse, _ in record.better_than} == {(0, 1), (0, 2)}


@pytest.mark.usefixtures("folder")
def test_the_guide_s_mixture_reads_its_text() -> None:
    recipe = next(recipe for recipe in RECIPES if "pretraining" in recipe)
    data = check(read_yaml(recipe, "docs/data.md").values).data
    assert [row.text for row in load_stage(data, "text", "train")] == ["It was a dark and stormy night."]


def test_the_guide_lists_the_registry() -> None:
    rows = dict(re.findall(r"^\| `(\S+)` \| `(\S+)` \| (?:comparisons|demonstrations)", GUIDE, re.MULTILINE))
    assert rows == {name: registry()[name]["names"][0] for name in short_names()}
