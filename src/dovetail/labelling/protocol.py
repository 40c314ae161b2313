"""What the labelling pages and the server say to each other.

Responsible for: the shape and range of each body. Not responsible for: what is done with it (router.py).

Answers are counted as they are shown, from 0; models, seeds and scores never leave the server here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictInt, StrictStr

from dovetail.config.frozen import FrozenModel

Id = Annotated[StrictInt, Field(ge=1, le=2**31 - 1)]
Text = Annotated[StrictStr, Field(max_length=100_000)]


class Problem(FrozenModel):
    """What went wrong, and what to do."""

    message: str
    hint: str | None


class Refusal(FrozenModel):
    """Every response that is an error."""

    error: Problem


class Login(FrozenModel):
    """The token of an invitation."""

    token: Annotated[StrictStr, Field(min_length=1, max_length=200)]


class Skip(FrozenModel):
    """A task to give back."""

    assignment_id: Id


class NewLabel(FrozenModel):
    """What an annotator says of a task: see `preferences.labels.Submission`."""

    assignment_id: Id
    verdict: Literal["answer", "tie", "both_bad"]
    chosen: Annotated[StrictInt, Field(ge=0, le=1000)] | None = None
    ratings: Annotated[
        tuple[Annotated[StrictInt, Field(ge=1, le=5)] | None, ...], Field(max_length=1000)
    ] = ()
    edited: Text | None = None
    note: Text | None = None
    seconds: Annotated[float, Field(ge=0, le=1e7, allow_inf_nan=False)]


class Reason(FrozenModel):
    """Why a label is voided."""

    reason: Annotated[StrictStr, Field(min_length=1, max_length=1000)]


class Invitation(FrozenModel):
    """Who is to be invited, or is to be invited no more."""

    name: Annotated[StrictStr, Field(min_length=1, max_length=100)]


class Invited(FrozenModel):
    """A new annotator's token, shown this once."""

    name: str
    token: str


class Revoked(FrozenModel):
    """How many invitations have ended."""

    links: int


class Progress(FrozenModel):
    """What is done: by oneself, by all, and what is wanted of the tasks there are."""

    own_labels: int
    labels: int
    wanted: int


class Me(FrozenModel):
    """Who is logged in, and to what."""

    name: str
    is_admin: bool
    write_token: str
    """To be sent as X-Dovetail-Token with every request that changes something."""
    project: str
    guidelines: str
    progress: Progress


class Turn(FrozenModel):
    """One message of the prompt."""

    role: str
    content: str


class ShownTask(FrozenModel):
    """A task as its annotator sees it."""

    assignment_id: int
    messages: tuple[Turn, ...]
    answers: tuple[str, ...]
    seconds_left: float
    """Until somebody else may be given it."""


class Next(FrozenModel):
    """The next task, if there is one."""

    task: ShownTask | None
    is_waiting: bool = False
    """Answers are being sampled: ask again."""
    problem: str | None = None
    """Why no more answers are sampled."""
    progress: Progress


class Kept(FrozenModel):
    """A label that is on the disk."""

    label_id: int


class Line(FrozenModel):
    """A label in a list: see `preferences.labels.LabelLine`."""

    id: int
    task_id: int
    annotator: str
    prompt: str
    verdict: str
    chosen: str | None
    edited: str | None
    note: str | None
    seconds: float
    created_at: float
    void: str | None


class PairLine(FrozenModel):
    """Two annotators beside each other: see `preferences.statistics.Pair`."""

    first: str
    second: str
    tasks: int
    agreement: float
    kappa: float | None


class SpeedLine(FrozenModel):
    """One annotator's work: see `preferences.statistics.Speed`."""

    name: str
    is_admin: bool
    labels: int
    median_seconds: float | None
    links: int


class Overview(FrozenModel):
    """The admin's figures: see `preferences.statistics.Statistics`."""

    progress: Progress
    verdicts: dict[str, int]
    shared_tasks: int
    fleiss: float | None
    pairs: tuple[PairLine, ...]
    speeds: tuple[SpeedLine, ...]


class Done(FrozenModel):
    """It is done, and there is nothing to say of it."""

    done: Literal[True] = True
