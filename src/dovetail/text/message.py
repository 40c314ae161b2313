"""One turn of a conversation.

Responsible for: the type that all packages above text share. Not responsible for: its tokens (chat_format.py).
"""

from __future__ import annotations

from typing import Literal, TypedDict

Role = Literal["system", "user", "assistant", "tool"]


class _RoleAndContent(TypedDict):
    """The keys that every message has."""

    role: Role
    content: str


class Message(_RoleAndContent, total=False):
    """A chat message, as Hugging Face's templates take it."""

    learnt: bool
    """The mark of an assistant's turn that is only context in training: False there, absent elsewhere."""
    name: str
    """The name of the tool whose result a message of the role `tool` is."""


def message(role: Role, content: str) -> Message:
    """Return a chat message."""
    return {"role": role, "content": content}


def is_learnt(turn: Message) -> bool:
    """Return whether training may learn this turn; only the assistant's turns are ever learnt."""
    return turn.get("learnt", True)
