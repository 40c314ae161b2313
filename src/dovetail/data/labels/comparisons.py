"""Turn labels into comparisons for training.

Responsible for: the pairs that follow from a label, and their origin; reading the newest state of a database.
Not responsible for: records of the data layer (data/forms.py), files (serving/labelling/export.py).

    verdict answer        the chosen answer is better than each other one
    tie, both bad         nothing (they are counted)
    an edited answer      is better than every answer that was shown, whatever the verdict
    voided and undone     nothing
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import select

from dovetail.data.labels.database import Store
from dovetail.data.labels.labels import counting_labels
from dovetail.data.labels.schema import Answer, Label, Project
from dovetail.errors import LabelError

HUMAN = "human"
"""The model name of an answer that an annotator wrote."""


def comparison_rows(store: Store, project: str | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (label id, row) for each pair, oldest label first, of one project or of all.

    A row has `prompt` (messages), `chosen` and `rejected`, and their origin: project, label, annotator, models,
    seeds, ratings, note, seconds, created_at (Unix seconds).
    """
    with store.reading() as session:
        project_id = (
            None if project is None else session.scalar(select(Project.id).where(Project.name == project))
        )
        if project is not None and project_id is None:
            names = ", ".join(session.scalars(select(Project.name).order_by(Project.name))) or "none"
            raise LabelError(f"there is no project {project!r}", hint=f"the database has: {names}")
        labels = counting_labels(session, project_id)
        rows = [(label.id, row) for label in labels for row in _rows(label)]
    yield from rows


def _rows(label: Label) -> Iterator[dict[str, Any]]:
    task = label.assignment.task
    described = [_described(answer, label) for answer in task.answers]
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    if label.edited is not None:
        written = {"text": label.edited, "model": HUMAN, "seed": None, "rating": None}
        pairs += [(written, answer) for answer in described]
    if label.chosen is not None:
        best = described[label.chosen]
        pairs += [(best, answer) for answer in described if answer is not best]
    for better, worse in pairs:
        yield {
            "prompt": task.messages,
            "chosen": better["text"],
            "rejected": worse["text"],
            "project": task.project.name,
            "label": label.id,
            "annotator": label.assignment.annotator.name,
            **{f"chosen_{what}": better[what] for what in ("model", "seed", "rating")},
            **{f"rejected_{what}": worse[what] for what in ("model", "seed", "rating")},
            "note": label.note,
            "seconds": label.seconds,
            "created_at": label.created_at,
        }


def _described(answer: Answer, label: Label) -> dict[str, Any]:
    return {
        "text": answer.text,
        "model": answer.model,
        "seed": answer.seed,
        "rating": label.ratings[answer.position],
    }
