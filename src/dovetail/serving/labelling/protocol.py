"""Define the messages between the labelling pages and the server.

Responsible for: the shape and range of each body. Not responsible for: its use (router.py).

Answers are numbered from 0 in the order shown. Models, seeds and scores are in no message.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictInt, StrictStr

from dovetail.config.frozen import FrozenModel
from dovetail.data.labels.statistics import Progress

Id = Annotated[StrictInt, Field(ge=1, le=2**31 - 1)]
Text = Annotated[StrictStr, Field(max_length=100_000)]


class Problem(FrozenModel):
    """An error, with a hint on what to do."""

    message: str
    hint: str | None


class Refusal(FrozenModel):
    """The body of every error response."""

    error: Problem


class Login(FrozenModel):
    """The token of an invitation."""

    token: Annotated[StrictStr, Field(min_length=1, max_length=200)]


class Skip(FrozenModel):
    """The assignment to skip."""

    assignment_id: Id


class NewLabel(FrozenModel):
    """An annotator's judgement of a task; see `data.labels.labels.Submission`."""

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
    """The reason for voiding a label."""

    reason: Annotated[StrictStr, Field(min_length=1, max_length=1000)]


class Invitation(FrozenModel):
    """The name of an annotator to invite, or whose invitations to revoke."""

    name: Annotated[StrictStr, Field(min_length=1, max_length=100)]


class Invited(FrozenModel):
    """An annotator's new token, which is shown only once."""

    name: str
    token: str


class Revoked(FrozenModel):
    """The number of invitations that were revoked."""

    links: int


class Me(FrozenModel):
    """The person who is logged in, and the project."""

    name: str
    is_admin: bool
    write_token: str
    """The value of the header X-Dovetail-Token in every request that changes something."""
    project: str
    guidelines: str
    progress: Progress


class Turn(FrozenModel):
    """One message of the prompt."""

    role: str
    content: str


class ShownTask(FrozenModel):
    """A task in the form that its annotator sees."""

    assignment_id: int
    messages: tuple[Turn, ...]
    answers: tuple[str, ...]
    seconds_left: float
    """The seconds until another annotator may get the place."""


class Next(FrozenModel):
    """The next task, if there is one."""

    task: ShownTask | None
    is_waiting: bool = False
    """True while answers are being sampled: the page should ask again."""
    problem: str | None = None
    """The reason why no more answers are sampled; None without a problem."""
    progress: Progress


class Kept(FrozenModel):
    """The id of a label that is stored on the disk."""

    label_id: int


class Done(FrozenModel):
    """The response to a successful request that has no result."""

    done: Literal[True] = True
