import json
from pathlib import Path

import pytest

from dovetail.config.data import DataConfig, SourceConfig
from dovetail.data.blend import load_stage
from dovetail.data.labels.comparisons import comparison_rows
from dovetail.data.labels.database import Store
from dovetail.data.labels.labels import Submission, submit, undo, void
from dovetail.data.labels.queue import next_task
from dovetail.data.records import Comparison
from dovetail.data.sources import label_of, read_source
from dovetail.errors import LabelError
from dovetail.serving.labelling.export import export
from tests.serving.labelling.work import annotator, new_project, task


def say(store: Store, project: int, person: int, best: str | None, **changes: object) -> int:
    """Label the next task: the answer `best`, or a tie."""
    assigned = next_task(store, project, person)
    assert assigned is not None
    said: dict[str, object] = {"verdict": "tie", "seconds": 1.5}
    if best is not None:
        said |= {"verdict": "answer", "chosen": assigned.answers.index(best)}
    if "ratings" in changes:
        by_text: dict[str, int] = changes.pop("ratings")  # type: ignore[assignment]
        said["ratings"] = [by_text[answer] for answer in assigned.answers]
    return submit(store, project, person, Submission(assignment_id=assigned.id, **{**said, **changes}))  # type: ignore[arg-type]


def test_each_verdict_says_its_pairs(store: Store) -> None:
    project = new_project(store, task(1), task(2), task(3), task(4, "a", "b", "c"), task(5), task(6))
    ann, boss = annotator(store, "ann"), annotator(store, "boss")
    say(store, project, ann, "bad 1", ratings={"good 1": 2, "bad 1": 5}, note="odd")
    say(store, project, ann, None)
    say(store, project, ann, None, verdict="both_bad", edited="mine 3")
    say(store, project, ann, "b", edited="mine 4")
    void(store, project, boss, say(store, project, ann, "good 5"), "mistaken")
    say(store, project, ann, "good 6")
    undo(store, project, ann)
    rows = list(comparison_rows(store))
    assert [(label, row["chosen"], row["rejected"]) for label, row in rows] == [
        (1, "bad 1", "good 1"),
        (3, "mine 3", "good 3"),
        (3, "mine 3", "bad 3"),
        (4, "mine 4", "a"),
        (4, "mine 4", "b"),
        (4, "mine 4", "c"),
        (4, "b", "a"),
        (4, "b", "c"),
    ]
    created = rows[0][1].pop("created_at")
    assert isinstance(created, float)
    assert rows[0][1] == {
        "prompt": [{"role": "user", "content": "Question 1?"}],
        "chosen": "bad 1", "rejected": "good 1", "project": "test", "label": 1, "annotator": "ann",
        "chosen_model": "model-1", "chosen_seed": 101, "chosen_rating": 5,
        "rejected_model": "model-0", "rejected_seed": 100, "rejected_rating": 2,
        "note": "odd", "seconds": 1.5,
    }  # fmt: skip
    assert (rows[1][1]["chosen_model"], rows[1][1]["chosen_seed"]) == ("human", None)


def test_the_file_and_the_database_are_the_same_source(store: Store, url: str, tmp_path: Path) -> None:
    project = new_project(store, task(1), task(2))
    other = new_project(store, task(3), name="other")
    ann = annotator(store, "ann")
    for where, best in ((project, "good 1"), (project, "bad 2"), (other, "good 3")):
        say(store, where, ann, best)
    file = tmp_path / "pairs.jsonl"
    assert export(store, file) == 3
    from_file = list(read_source(SourceConfig(path=str(file))))
    from_store = list(read_source(SourceConfig(path=f"labels:{url}")))
    assert [type(record) for record in from_store] == [Comparison] * 3
    assert [record.row_id for record in from_store] == [record.row_id for record in from_file]
    first = from_store[0]
    assert isinstance(first, Comparison)
    assert (first.answers, first.better_than) == (("good 1", "bad 1"), ((0, 1, 0.0),))
    (only,) = read_source(SourceConfig(path=f"labels:{url}", name="other"))
    assert only.row_id == from_store[2].row_id
    assert export(store, file, "other") == 1
    assert [json.loads(line)["chosen"] for line in file.read_text().splitlines()] == ["good 3"]
    config = DataConfig.model_validate(
        {"blend": [f"labels:{url}"], "stage_split": [0, 1, 0], "held_out_fraction": 0}
    )
    assert len(load_stage(config, "reward", "train")) == 3


def test_sources_and_files_that_cannot_be_are_explained(store: Store, url: str, tmp_path: Path) -> None:
    new_project(store)
    with pytest.raises(LabelError, match="no project 'nope'") as raised:
        list(read_source(SourceConfig(path=f"labels:{url}", name="nope")))
    assert raised.value.hint == "the database has: test"
    with pytest.raises(LabelError, match="there is no file"):
        list(read_source(SourceConfig(path=f"labels:sqlite:///{tmp_path}/none.db")))
    with pytest.raises(LabelError, match="not the URL of a database"):
        list(read_source(SourceConfig(path="labels:")))
    with pytest.raises(LabelError, match="cannot be written"):
        export(store, tmp_path / "no" / "folder.jsonl")


def test_reports_show_no_password() -> None:
    source = SourceConfig.model_validate("labels:postgresql://me:secret@host:5432/db")
    assert label_of(source) == "labels:postgresql://me:***@host:5432/db"
    weighted = SourceConfig.model_validate("labels:sqlite:///labels.db:0.5")
    assert (weighted.path, weighted.weight) == ("labels:sqlite:///labels.db", 0.5)
