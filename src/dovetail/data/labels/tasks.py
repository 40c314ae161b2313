"""Open projects, and add tasks to them.

Responsible for: projects and new tasks. Not responsible for: sampling answers (serving/labelling/supply.py), serving
tasks to annotators (queue.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from dovetail.data.labels.database import NotFoundError, Store
from dovetail.data.labels.plain_text import expect_text, is_storable
from dovetail.data.labels.queue import num_taken
from dovetail.data.labels.schema import Answer, Assignment, Project, Task
from dovetail.errors import LabelError
from dovetail.text.content_hash import content_hash
from dovetail.text.message import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One answer and its origin."""

    text: str
    model: str
    seed: int
    sampling: Mapping[str, Any]
    """The settings that the answer was sampled with."""
    score: float | None = None
    """The score of a reward model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTask:
    """A prompt with the answers to compare."""

    messages: Sequence[Message]
    answers: Sequence[Sampled]

    def is_comparable(self) -> bool:
        """Return whether there are two or more answers, all different, that a database can store."""
        texts = [answer.text for answer in self.answers]
        return len(set(texts)) == len(texts) >= 2 and all(map(is_storable, texts))

    def margin(self) -> float | None:
        """Return the distance between the two best scores, or None unless all answers are scored."""
        scores = sorted(answer.score for answer in self.answers if answer.score is not None)
        return scores[-1] - scores[-2] if len(scores) == len(self.answers) else None


def open_project(
    store: Store, name: str, *, overlap: int | None = None, guidelines: str | None = None
) -> int:
    """Return the id of a project, made if missing. Overlap (1 for a new one) and guidelines are set if given."""
    if not 1 <= len(expect_text("the project's name", name).strip()) <= 200:
        raise LabelError(f"{name!r} is not a valid project name", hint="give 1 to 200 characters")
    if overlap is not None and overlap < 1:
        raise LabelError(f"overlap = {overlap}", hint="each pair is labelled by 1 annotator or more")
    with store.writing() as session:
        project = session.scalar(select(Project).where(Project.name == name))
        if project is None:
            project = Project(
                name=name, overlap=overlap or 1, guidelines=guidelines or "", created_at=store.clock()
            )
            session.add(project)
        project.overlap = overlap or project.overlap
        project.guidelines = (
            project.guidelines if guidelines is None else expect_text("guidelines", guidelines)
        )
        session.flush()
        return project.id


def project_of(session: Session, project_id: int) -> Project:
    """Return the project. Raises NotFoundError if there is none."""
    project = session.get(Project, project_id)
    if project is None:
        raise NotFoundError(f"there is no project {project_id}", hint="open it by name")
    return project


def add_tasks(store: Store, project_id: int, tasks: Sequence[NewTask]) -> int:
    """Add the tasks that can be compared and are new, and return their number."""
    added = 0
    with store.writing(project_id) as session:
        for task in tasks:
            key = content_hash(task.messages, [answer.text for answer in task.answers])
            known = select(Task.id).where(Task.project_id == project_id, Task.key == key)
            if task.is_comparable() and session.scalar(known) is None:
                session.add(_row(task, key, project_id, store.clock()))
                session.flush()
                added += 1
    return added


def num_ready(store: Store, project_id: int) -> int:
    """Return the number of tasks that each annotator can still get.

    It is the number of tasks with a free place, less those of them that the busiest annotator has already got.
    """
    with store.reading() as session:
        free = num_taken(store.clock()) < project_of(session, project_id).overlap
        here = select(func.count()).select_from(Task).where(Task.project_id == project_id, free)
        served = here.join(Assignment, Assignment.task_id == Task.id).group_by(Assignment.annotator_id)
        return (session.scalar(here) or 0) - max(session.scalars(served), default=0)


def used_prompts(store: Store, project_id: int) -> frozenset[str]:
    """Return the keys (see `prompt_key`) of all prompts that have a task."""
    with store.reading() as session:
        return frozenset(session.scalars(select(Task.prompt_key).where(Task.project_id == project_id)))


def prompt_key(messages: Sequence[Message]) -> str:
    """Return the hash of a prompt."""
    return content_hash(messages)


def _row(task: NewTask, key: str, project_id: int, now: float) -> Task:
    margin = task.margin()
    return Task(
        project_id=project_id,
        key=key,
        prompt_key=prompt_key(task.messages),
        messages=[dict(turn) for turn in task.messages],
        margin=margin if margin is not None and math.isfinite(margin) else None,
        created_at=now,
        answers=[
            Answer(
                position=position,
                text=answer.text,
                model=answer.model,
                seed=answer.seed,
                sampling=dict(answer.sampling),
                score=answer.score,
            )
            for position, answer in enumerate(task.answers)
        ],
    )
