from __future__ import annotations

from pathlib import Path

from dovetail.config.data import DataConfig
from dovetail.data.blend import load_stage
from dovetail.data.labels.database import open_store
from dovetail.data.labels.labels import Submission, submit
from dovetail.data.labels.queue import next_task
from tests.data.files import config
from tests.serving.labelling.work import annotator, new_project, task


def labelled(tmp_path: Path, prompts: int) -> str:
    """A source in which each prompt has one label of four answers."""
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    store = open_store(url)
    project = new_project(store, *(task(number, "a", "b", "c", "d") for number in range(prompts)))
    person = annotator(store, "ann")
    for _ in range(prompts):
        given = next_task(store, project, person)
        assert given is not None
        chosen = given.answers.index("a")
        submit(store, project, person, Submission(assignment_id=given.id, verdict="answer", chosen=chosen))
    store.close()
    return f"labels:{url}"


def prompts_of(data: DataConfig, part: str) -> list[str]:
    rows = load_stage(data, "reward", part)  # type: ignore[call-overload]
    return [row.messages[0]["content"] for row in rows]


def test_the_rows_of_one_label_are_all_learnt_from_or_all_held_out(tmp_path: Path) -> None:
    source = labelled(tmp_path, 20)
    data = config(tmp_path, source, stage_split=(0, 1, 0), held_out_fraction=0.4)
    train, held_out = prompts_of(data, "train"), prompts_of(data, "held_out")
    assert len(train) + len(held_out) == 60
    assert train
    assert held_out
    assert not set(train) & set(held_out)
