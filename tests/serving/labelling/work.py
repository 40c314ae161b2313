"""Projects, tasks and annotators for tests."""

from dovetail.data.labels.annotators import invite, person_of
from dovetail.data.labels.database import Store
from dovetail.data.labels.tasks import NewTask, Sampled, add_tasks, open_project
from dovetail.text.message import message


def task(number: int, *texts: str, scores: tuple[float, ...] | None = None) -> NewTask:
    """A task with the given answers, else two, from two models."""
    texts = texts or (f"good {number}", f"bad {number}")
    return NewTask(
        messages=(message("user", f"Question {number}?"),),
        answers=[
            Sampled(
                text=text,
                model=f"model-{position}",
                seed=100 * number + position,
                sampling={"temperature": 0.5},
                score=None if scores is None else scores[position],
            )
            for position, text in enumerate(texts)
        ],
    )


def new_project(store: Store, *tasks: NewTask, overlap: int = 1, name: str = "test") -> int:
    """A project with these tasks."""
    project_id = open_project(store, name, overlap=overlap)
    assert add_tasks(store, project_id, tasks) == len(tasks)
    return project_id


def annotator(store: Store, name: str, *, is_admin: bool = False) -> int:
    """The id of a new annotator."""
    person = person_of(store, invite(store, name, is_admin=is_admin))
    assert person is not None
    return person.id


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now
