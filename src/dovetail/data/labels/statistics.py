"""Report the progress, agreement and speed of the labelling.

Responsible for: the labels that the figures count. Not responsible for: kappa itself (agreement.py).

Annotators agree on a task when they chose the same answer, both said tie, or both said that all are bad.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

from sqlalchemy import func, or_, select

from dovetail.data.labels.agreement import cohen_kappa, fleiss_kappa
from dovetail.data.labels.database import Store
from dovetail.data.labels.labels import counting_labels, num_labels
from dovetail.data.labels.schema import Annotator, Label, Task, Token
from dovetail.data.labels.tasks import project_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The numbers of labels that exist and that are wanted."""

    own_labels: int
    labels: int
    """The number of labels of all annotators."""
    wanted: int
    """The number of tasks so far times overlap; more tasks may come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The agreement of two annotators on the tasks that both labelled."""

    first: str
    second: str
    tasks: int
    agreement: float
    """The share of these tasks with the same verdict."""
    kappa: float | None
    """Cohen's kappa; None where it is undefined."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """One annotator's work."""

    name: str
    is_admin: bool
    labels: int
    median_seconds: float | None
    links: int
    """The number of invitations that are valid for a login."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """The figures that an admin sees."""

    progress: Progress
    verdicts: dict[str, int]
    shared_tasks: int
    """The number of tasks with two labels or more."""
    fleiss: float | None
    """Fleiss' kappa over the shared tasks; None where it is undefined."""
    pairs: tuple[Pair, ...]
    speeds: tuple[Speed, ...]


def progress(store: Store, project_id: int, annotator_id: int) -> Progress:
    """Return the figures that an annotator may see."""
    with store.reading() as session:
        project = project_of(session, project_id)
        tasks = session.scalar(select(func.count(Task.id)).where(Task.project_id == project_id)) or 0
        return Progress(
            own_labels=num_labels(session, project_id, annotator_id),
            labels=num_labels(session, project_id),
            wanted=tasks * project.overlap,
        )


def statistics(store: Store, project_id: int, annotator_id: int) -> Statistics:
    """Return the figures that an admin may see; `annotator_id` is the admin's."""
    with store.reading() as session:
        labels = counting_labels(session, project_id)
        people = session.scalars(select(Annotator).order_by(Annotator.name)).all()
        is_good = or_(Token.expires_at.is_(None), Token.expires_at > store.clock())
        links = Counter(session.scalars(select(Token.annotator_id).where(is_good)))
        speeds = tuple(_speed(person, labels, links[person.id]) for person in people)
    by_task: dict[int, dict[str, str]] = defaultdict(dict)
    for label in labels:
        by_task[label.assignment.task_id][label.assignment.annotator.name] = category(label)
    shared = [said for said in by_task.values() if len(said) >= 2]
    overall = fleiss_kappa([Counter(said.values()) for said in shared])
    return Statistics(
        progress=progress(store, project_id, annotator_id),
        verdicts=dict(Counter(label.verdict for label in labels)),
        shared_tasks=len(shared),
        fleiss=None if overall is None else float(overall),
        pairs=_pairs(shared),
        speeds=speeds,
    )


def category(label: Label) -> str:
    """Return the verdict for comparing annotators. It names the chosen answer itself, not its place on the screen."""
    return label.verdict if label.chosen is None else f"answer {label.chosen}"


def _pairs(shared: Sequence[dict[str, str]]) -> tuple[Pair, ...]:
    names = sorted({name for said in shared for name in said})
    found = []
    for first, second in combinations(names, 2):
        both = [(said[first], said[second]) for said in shared if first in said and second in said]
        if both:
            kappa = cohen_kappa([a for a, _ in both], [b for _, b in both])
            agreement = sum(a == b for a, b in both) / len(both)
            found.append(
                Pair(
                    first=first,
                    second=second,
                    tasks=len(both),
                    agreement=agreement,
                    kappa=None if kappa is None else float(kappa),
                )
            )
    return tuple(found)


def _speed(person: Annotator, labels: Sequence[Label], links: int) -> Speed:
    seconds = [label.seconds for label in labels if label.assignment.annotator_id == person.id]
    return Speed(
        name=person.name,
        is_admin=person.is_admin,
        labels=len(seconds),
        median_seconds=median(seconds) if seconds else None,
        links=links,
    )
