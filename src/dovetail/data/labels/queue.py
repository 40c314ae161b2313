"""Serve tasks to annotators.

Responsible for: leases, so that no task has more labels and open leases than its project's overlap, and no annotator
gets a task twice; skipping. Not responsible for: labels (labels.py), transactions (database.py).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import Session

from dovetail.data.labels.database import ConflictError, NotFoundError, Store
from dovetail.data.labels.schema import Assignment, Project, Task
from dovetail.text.message import Message

LEASE_SECONDS = 1800.0
"""The time after which an annotator's place in a task can go to another one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assigned:
    """A task as its annotator sees it: without models, and with the answers in an order of its own."""

    id: int
    messages: tuple[Message, ...]
    answers: tuple[str, ...]
    """The answers in the order shown; the first is on the left or on top."""
    leased_until: float


def next_task(
    store: Store, project_id: int, annotator_id: int, *, lease_seconds: float = LEASE_SECONDS
) -> Assigned | None:
    """Lease the annotator's open task, or else a free one, and return it; None if there is none.

    Tasks with a small margin come first and those without one last; equal ones come in the order of their creation.
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
    """Skip a task without a label. The annotator does not get it again."""
    with store.writing(project_id) as session:
        assignment = own_assignment(session, project_id, annotator_id, assignment_id)
        expect_open(assignment)
        assignment.state = "skipped"


def as_shown(assignment: Assignment) -> Assigned:
    """Return the part of an assignment that its annotator may see."""
    task = assignment.task
    return Assigned(
        id=assignment.id,
        messages=tuple(task.messages),
        answers=tuple(task.answers[position].text for position in assignment.shown_order),
        leased_until=assignment.leased_until,
    )


def own_assignment(session: Session, project_id: int, annotator_id: int, assignment_id: int) -> Assignment:
    """Return an assignment of this annotator. Raises NotFoundError if it is missing or belongs to another one."""
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
    """Raise ConflictError unless the assignment is open."""
    if assignment.state != "open":
        raise ConflictError(f"this task is already {assignment.state}", hint="ask for the next one")


def has_place(session: Session, assignment: Assignment, now: float) -> bool:
    """Return whether an open assignment may still be labelled: its lease lasts, or its place is still free."""
    if assignment.leased_until > now:
        return True
    taken = session.scalar(select(num_taken(now)).where(Task.id == assignment.task_id)) or 0
    return taken < assignment.task.project.overlap


def num_taken(now: float) -> ColumnElement[int]:
    """Return the SQL expression for the number of a task's places that labels or lasting leases take."""
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
    """Return the open assignment with the latest lease that may still be labelled; after an undo, the undone one."""
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
