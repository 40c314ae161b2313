"""Store the labels of annotators, with their history.

Responsible for: storing, undoing, voiding and listing labels. Nothing is overwritten: a label that no longer counts
has a Void. Not responsible for: serving tasks (queue.py), comparisons for training (comparisons.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session, joinedload, selectinload

from dovetail.data.labels.database import ConflictError, NotFoundError, Store
from dovetail.data.labels.plain_text import expect_text
from dovetail.data.labels.queue import (
    LEASE_SECONDS,
    Assigned,
    as_shown,
    expect_open,
    has_place,
    own_assignment,
)
from dovetail.data.labels.schema import Assignment, Label, Task, Void
from dovetail.errors import LabelError

Verdict = Literal["answer", "tie", "both_bad"]
UNDONE = "undone"
"""The reason in a Void of a label that its annotator has undone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """An annotator's judgement of an assignment. Its answers are numbered in the order in which they were shown."""

    assignment_id: int
    verdict: Verdict
    chosen: int | None = None
    """The index of the better answer as shown, only for the verdict `answer`."""
    ratings: Sequence[int | None] = ()
    """The rating of each answer as shown, 1 (bad) to 5 (excellent), or None; empty if there are no ratings."""
    edited: str | None = None
    """An answer by the annotator that is better than all shown."""
    note: str | None = None
    seconds: float = 0.0
    """The time that the annotator took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelLine:
    """A label in the form that lists show."""

    id: int
    task_id: int
    annotator: str
    prompt: str
    """The last message of the prompt."""
    verdict: str
    chosen: str | None
    """The text of the better answer."""
    edited: str | None
    note: str | None
    seconds: float
    created_at: float
    void: str | None
    """The reason why the label no longer counts; None if it counts."""


def submit(store: Store, project_id: int, annotator_id: int, said: Submission) -> int:
    """Store a label and return its id. When this returns, the label is on the disk.

    Raises LabelError for a submission with invalid values, NotFoundError for an assignment of another annotator,
    ConflictError if it is not open any more, or if its lease ended and other annotators took its place.
    """
    with store.writing(project_id) as session:
        assignment = own_assignment(session, project_id, annotator_id, said.assignment_id)
        expect_open(assignment)
        if not has_place(session, assignment, store.clock()):
            raise ConflictError(
                "your time for this task ran out, and another annotator has it now",
                hint="ask for the next one",
            )
        label = _label(said, assignment, store.clock())
        session.add(label)
        assignment.state = "labelled"
        session.flush()
        return label.id


def undo(store: Store, project_id: int, annotator_id: int) -> Assigned:
    """Undo the annotator's newest label, and open its assignment again. Raises ConflictError if there is none."""
    with store.writing(project_id) as session:
        label = session.scalar(
            _counting(project_id)
            .where(Assignment.annotator_id == annotator_id)
            .order_by(Label.id.desc())
            .limit(1)
        )
        if label is None:
            raise ConflictError("there is no label of yours to undo", hint="label something first")
        now = store.clock()
        session.add(Void(label_id=label.id, annotator_id=annotator_id, reason=UNDONE, created_at=now))
        label.assignment.state = "open"
        label.assignment.leased_until = now + LEASE_SECONDS
        session.flush()
        return as_shown(label.assignment)


def void(store: Store, project_id: int, admin_id: int, label_id: int, reason: str) -> None:
    """Void a label, which then no longer counts. Its task gets a free place, which goes to another annotator."""
    if not expect_text("the reason", reason).strip():
        raise LabelError("a label is voided for a reason", hint="say why, for those who read the history")
    with store.writing(project_id) as session:
        label = session.scalar(
            select(Label)
            .join(Assignment)
            .join(Task)
            .where(Label.id == label_id, Task.project_id == project_id)
        )
        if label is None:
            raise NotFoundError(f"there is no label {label_id}", hint="take an id from the list of labels")
        if label.void is not None:
            raise ConflictError(f"label {label_id} counts no more: {label.void.reason}", hint="nothing to do")
        session.add(Void(label_id=label_id, annotator_id=admin_id, reason=reason, created_at=store.clock()))
        label.assignment.state = "voided"


def list_labels(
    store: Store,
    project_id: int,
    *,
    annotator_id: int | None = None,
    limit: int = 100,
    before: int | None = None,
) -> list[LabelLine]:
    """List labels, newest first, void ones included; of one annotator, and older than `before`, if given."""
    query = (
        select(Label)
        .join(Assignment)
        .join(Task)
        .where(Task.project_id == project_id)
        .options(
            joinedload(Label.void),
            joinedload(Label.assignment).joinedload(Assignment.annotator),
            joinedload(Label.assignment).joinedload(Assignment.task).selectinload(Task.answers),
        )
        .order_by(Label.id.desc())
        .limit(limit)
    )
    if annotator_id is not None:
        query = query.where(Assignment.annotator_id == annotator_id)
    if before is not None:
        query = query.where(Label.id < before)
    with store.reading() as session:
        return [_line(label) for label in session.scalars(query)]


def counting_labels(session: Session, project_id: int | None) -> Sequence[Label]:
    """Return the labels that count, oldest first, with tasks and answers. project_id: None for all projects."""
    query = _counting(project_id).order_by(Label.id).options(
        joinedload(Label.assignment).joinedload(Assignment.annotator),
        joinedload(Label.assignment).joinedload(Assignment.task).options(
            selectinload(Task.answers), joinedload(Task.project)
        ),
    )  # fmt: skip
    return session.scalars(query).all()


def num_labels(session: Session, project_id: int, annotator_id: int | None = None) -> int:
    """Return the number of labels that count, of one annotator or of all."""
    query = select(func.count()).select_from(_counting(project_id).subquery())
    if annotator_id is not None:
        own = _counting(project_id).where(Assignment.annotator_id == annotator_id)
        query = select(func.count()).select_from(own.subquery())
    return session.scalar(query) or 0


def _counting(project_id: int | None) -> Select[Label]:
    query = select(Label).join(Assignment).join(Task).outerjoin(Void).where(Void.label_id.is_(None))
    return query if project_id is None else query.where(Task.project_id == project_id)


def _label(said: Submission, assignment: Assignment, now: float) -> Label:
    order = assignment.shown_order
    _expect_sense(said, len(order))
    by_position: list[int | None] = [None] * len(order)
    for shown, rating in enumerate(said.ratings):
        by_position[order[shown]] = rating
    edited = None if said.edited is None else expect_text("the edited answer", said.edited)
    if edited is not None and (not edited.strip() or edited in [a.text for a in assignment.task.answers]):
        raise LabelError(
            "the edited answer is empty, or the same as one that was shown",
            hint="change it, or leave it away",
        )
    return Label(
        assignment=assignment,
        verdict=said.verdict,
        chosen=None if said.chosen is None else order[said.chosen],
        ratings=by_position,
        edited=edited,
        note=None if not said.note else expect_text("the note", said.note),
        seconds=said.seconds,
        shown_order=order,
        created_at=now,
    )


def _expect_sense(said: Submission, num_answers: int) -> None:
    problems = (
        (said.verdict not in ("answer", "tie", "both_bad"), f"verdict = {said.verdict!r}", "answer, tie or both_bad"),
        (
            (said.verdict == "answer") != (said.chosen is not None),
            f"verdict {said.verdict} with chosen = {said.chosen}",
            "name the chosen answer if, and only if, the verdict is answer",
        ),
        (
            said.chosen is not None and not 0 <= said.chosen < num_answers,
            f"chosen = {said.chosen}",
            f"there are {num_answers} answers, counted from 0",
        ),
        (
            len(said.ratings) not in (0, num_answers) or any(r not in (None, 1, 2, 3, 4, 5) for r in said.ratings),
            f"ratings = {list(said.ratings)}",
            f"give {num_answers}, each null or 1 to 5",
        ),
        (
            not (math.isfinite(said.seconds) and said.seconds >= 0),
            f"seconds = {said.seconds}",
            "the time taken is 0 or more",
        ),
    )  # fmt: skip
    for is_wrong, problem, hint in problems:
        if is_wrong:
            raise LabelError(problem, hint=hint)


def _line(label: Label) -> LabelLine:
    task = label.assignment.task
    return LabelLine(
        id=label.id,
        task_id=task.id,
        annotator=label.assignment.annotator.name,
        prompt=task.messages[-1]["content"],
        verdict=label.verdict,
        chosen=None if label.chosen is None else task.answers[label.chosen].text,
        edited=label.edited,
        note=label.note,
        seconds=label.seconds,
        created_at=label.created_at,
        void=None if label.void is None else label.void.reason,
    )
