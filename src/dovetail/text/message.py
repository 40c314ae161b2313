"""One turn of a conversation.

Responsible for: the type that everything above text shares. Not responsible for: what it looks like in tokens.
"""

from __future__ import annotations

from typing import Literal, TypedDict

Role = Literal["system", "user", "assistant"]


class _RoleAndContent(TypedDict):
    """The keys that every message has."""

    role: Role
    content: str


class Message(_RoleAndContent, total=False):
    """A chat message, as Hugging Face's templates take it."""

    learnt: bool
    """False for an assistant's turn that is only context in training; absent elsewhere."""


def message(role: Role, content: str) -> Message:
    """A chat message."""
    return {"role": role, "content": content}


def is_learnt(turn: Message) -> bool:
    """Return whether training may learn this turn; only the assistant's are learnt at all."""
    return turn.get("learnt", True)
