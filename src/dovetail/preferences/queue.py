"""Who gets which task.

Responsible for: leases, so that no task has more labels and open leases than its project's overlap, and none
is served twice to one annotator; skipping. Not responsible for: labels (labels.py), transactions (database.py).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import Session

from dovetail.preferences.database import ConflictError, NotFoundError, Store
from dovetail.preferences.schema import Assignment, Project, Task
from dovetail.text.message import Message

LEASE_SECONDS = 1800.0
"""How long an annotator may look at a task before somebody else can be given the place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assigned:
    """A task as its annotator sees it: without models, in an order of its own."""

    id: int
    messages: tuple[Message, ...]
    answers: tuple[str, ...]
    """As shown: the first is on the left or on top."""
    leased_until: float


def next_task(
    store: Store, project_id: int, annotator_id: int, *, lease_seconds: float = LEASE_SECONDS
) -> Assigned | None:
    """The task that the annotator has open, else a free one, leased; None if there is none.

    Tasks with a small margin come first, those without one last, each in the order they were made.
    """
    with store.writing(project_id) as session:
        now = store.clock()
        assignment = _own_open(session, project_id, annotator_id, now) or _new(
            session, project_id, annotator_id, now
        )
        if assignment is None:
            return None
        assignment.leased_until = now + lease_seconds
        session.flush()
        return as_shown(assignment)


def skip(store: Store, project_id: int, annotator_id: int, assignment_id: int) -> None:
    """Give a task back unlabelled; its annotator is not asked again."""
    with store.writing(project_id) as session:
        assignment = own_assignment(session, project_id, annotator_id, assignment_id)
        expect_open(assignment)
        assignment.state = "skipped"


def as_shown(assignment: Assignment) -> Assigned:
    """What of an assignment may be shown to its annotator."""
    task = assignment.task
    return Assigned(
        id=assignment.id,
        messages=tuple(task.messages),
        answers=tuple(task.answers[position].text for position in assignment.shown_order),
        leased_until=assignment.leased_until,
    )


def own_assignment(session: Session, project_id: int, annotator_id: int, assignment_id: int) -> Assignment:
    """An assignment of this annotator; NotFoundError if it is not theirs, as if it were not there."""
    found = session.scalar(
        select(Assignment)
        .join(Task)
        .where(
            Assignment.id == assignment_id,
            Assignment.annotator_id == annotator_id,
            Task.project_id == project_id,
        )
    )
    if found is None:
        raise NotFoundError(f"you have no task {assignment_id}", hint="ask for the next one")
    return found


def expect_open(assignment: Assignment) -> None:
    """ConflictError if it was labelled or given back."""
    if assignment.state != "open":
        raise ConflictError(f"this task was {assignment.state} before", hint="ask for the next one")


def has_place(session: Session, assignment: Assignment, now: float) -> bool:
    """Whether an open assignment may still be labelled: its lease lasts, or nobody else took its place."""
    if assignment.leased_until > now:
        return True
    taken = session.scalar(select(num_taken(now)).where(Task.id == assignment.task_id)) or 0
    return taken < assignment.task.project.overlap


def num_taken(now: float) -> ColumnElement[int]:
    """SQL: how many places of a task are taken, by labels or by leases that last."""
    holds = or_(
        Assignment.state == "labelled", and_(Assignment.state == "open", Assignment.leased_until > now)
    )
    return (
        select(func.count(Assignment.id))
        .where(Assignment.task_id == Task.id, holds)
        .correlate(Task)
        .scalar_subquery()
    )


def _own_open(session: Session, project_id: int, annotator_id: int, now: float) -> Assignment | None:
    """The one leased longest of those that can still be labelled; after an undo that is the undone one."""
    found = session.scalars(
        select(Assignment)
        .join(Task)
        .where(
            Task.project_id == project_id,
            Assignment.annotator_id == annotator_id,
            Assignment.state == "open",
        )
        .order_by(Assignment.leased_until.desc(), Assignment.id.desc())
    )
    return next((one for one in found if has_place(session, one, now)), None)


def _new(session: Session, project_id: int, annotator_id: int, now: float) -> Assignment | None:
    served = select(Assignment.id).where(
        Assignment.task_id == Task.id, Assignment.annotator_id == annotator_id
    )
    task = session.scalar(
        select(Task)
        .join(Project)
        .where(Task.project_id == project_id, num_taken(now) < Project.overlap, ~served.exists())
        .order_by(Task.margin.is_(None), Task.margin, Task.id)
        .limit(1)
    )
    if task is None:
        return None
    order = list(range(len(task.answers)))
    random.Random(f"{task.key} {annotator_id}").shuffle(order)
    assignment = Assignment(
        task=task,
        annotator_id=annotator_id,
        shown_order=order,
        state="open",
        leased_until=now,
        created_at=now,
    )
    session.add(assignment)
    return assignment
