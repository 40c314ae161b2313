"""Define the tables of human preferences.

Responsible for: the columns, and the constraints that the database enforces. Not responsible for: opening it
(database.py), creating the tables (migrations/), the rules for annotators (queue.py, labels.py).

    Project 1 - n Task 1 - n Answer
                  Task 1 - n Assignment n - 1 Annotator 1 - n Token
                             Assignment 1 - n Label 1 - 0..1 Void

Labels and voids are only ever added. Times are Unix seconds.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Double,
    ForeignKey,
    MetaData,
    String,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from dovetail.text.message import Message

_NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


class Table(DeclarativeBase):
    """The base of all tables, which names their constraints."""

    metadata = MetaData(naming_convention=_NAMES)


class Project(Table):
    """A set of tasks that are labelled under the same guidelines."""

    __tablename__ = "projects"
    __table_args__ = (CheckConstraint("overlap >= 1", name="overlap"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(200), unique=True)
    overlap: Mapped[int]
    """The number of annotators that label each task."""
    guidelines: Mapped[str]
    created_at: Mapped[float] = mapped_column(Double)


class Task(Table):
    """A prompt with two or more answers to compare."""

    __tablename__ = "tasks"
    __table_args__ = (UniqueConstraint("project_id", "key"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"), index=True)
    key: Mapped[str] = mapped_column(String(64))
    """The hash of the prompt and its answers."""
    prompt_key: Mapped[str] = mapped_column(String(64), index=True)
    """The hash of the prompt alone."""
    messages: Mapped[list[Message]] = mapped_column(JSON)
    margin: Mapped[float | None] = mapped_column(Double)
    """The distance between the two best scores of a reward model; the smallest come first. None: not scored."""
    created_at: Mapped[float] = mapped_column(Double)
    answers: Mapped[list[Answer]] = relationship(order_by="Answer.position", back_populates="task")
    project: Mapped[Project] = relationship()


class Answer(Table):
    """One sampled answer and its origin."""

    __tablename__ = "answers"
    __table_args__ = (UniqueConstraint("task_id", "position"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    task_id: Mapped[int] = mapped_column(ForeignKey("tasks.id"))
    position: Mapped[int]
    """The number of the answer, 0, 1, ...; not the place at which an annotator sees it."""
    text: Mapped[str]
    model: Mapped[str]
    seed: Mapped[int] = mapped_column(BigInteger)
    sampling: Mapped[dict[str, Any]] = mapped_column(JSON)
    score: Mapped[float | None] = mapped_column(Double)
    task: Mapped[Task] = relationship(back_populates="answers")


class Annotator(Table):
    """A person who labels, or who administers the labelling."""

    __tablename__ = "annotators"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    is_admin: Mapped[bool]
    created_at: Mapped[float] = mapped_column(Double)


class Token(Table):
    """An invitation. Only its hash is stored, so a copy of the database does not allow a login."""

    __tablename__ = "tokens"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    annotator_id: Mapped[int] = mapped_column(ForeignKey("annotators.id"), index=True)
    created_at: Mapped[float] = mapped_column(Double)
    expires_at: Mapped[float | None] = mapped_column(Double)
    """The time at which it expires; None: it stays valid until it is revoked."""


class Login(Table):
    """A browser that is logged in. Only the hash of its secret is stored."""

    __tablename__ = "logins"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    annotator_id: Mapped[int] = mapped_column(ForeignKey("annotators.id"), index=True)
    expires_at: Mapped[float] = mapped_column(Double)


class Assignment(Table):
    """A task that an annotator got; each annotator gets it at most once."""

    __tablename__ = "assignments"
    __table_args__ = (
        UniqueConstraint("task_id", "annotator_id"),
        CheckConstraint("state IN ('open', 'labelled', 'skipped', 'voided')", name="state"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    task_id: Mapped[int] = mapped_column(ForeignKey("tasks.id"))
    annotator_id: Mapped[int] = mapped_column(ForeignKey("annotators.id"), index=True)
    shown_order: Mapped[list[int]] = mapped_column(JSON)
    """The positions of the answers in the order shown."""
    state: Mapped[str] = mapped_column(String(10))
    """open, labelled, skipped or voided. It takes a place of its task while labelled, and while open until the lease
    ends."""
    leased_until: Mapped[float] = mapped_column(Double)
    """The end of the lease; an open assignment keeps its place until then."""
    created_at: Mapped[float] = mapped_column(Double)
    task: Mapped[Task] = relationship()
    annotator: Mapped[Annotator] = relationship()


class Label(Table):
    """An annotator's judgement of a task. It is never changed; see Void."""

    __tablename__ = "labels"
    __table_args__ = (
        CheckConstraint("verdict IN ('answer', 'tie', 'both_bad')", name="verdict"),
        CheckConstraint("(verdict = 'answer') = (chosen IS NOT NULL)", name="chosen"),
        CheckConstraint("seconds >= 0", name="seconds"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    assignment_id: Mapped[int] = mapped_column(ForeignKey("assignments.id"), index=True)
    verdict: Mapped[str] = mapped_column(String(10))
    """answer, tie (equally good) or both_bad (all of them)."""
    chosen: Mapped[int | None]
    """The position of the better answer, if the verdict names one."""
    ratings: Mapped[list[int | None]] = mapped_column(JSON)
    """The rating of each answer by position, 1 (bad) to 5 (excellent), or None."""
    edited: Mapped[str | None]
    """An answer by the annotator that is better than all shown."""
    note: Mapped[str | None]
    seconds: Mapped[float] = mapped_column(Double)
    """The time that the annotator took."""
    shown_order: Mapped[list[int]] = mapped_column(JSON)
    created_at: Mapped[float] = mapped_column(Double)
    assignment: Mapped[Assignment] = relationship()
    void: Mapped[Void | None] = relationship(back_populates="label")


class Void(Table):
    """The mark of a label that no longer counts: undone by its annotator, or voided by an admin."""

    __tablename__ = "voids"
    label_id: Mapped[int] = mapped_column(ForeignKey("labels.id"), primary_key=True)
    annotator_id: Mapped[int] = mapped_column(ForeignKey("annotators.id"))
    """The annotator or admin who made it."""
    reason: Mapped[str]
    created_at: Mapped[float] = mapped_column(Double)
    label: Mapped[Label] = relationship(back_populates="void")
