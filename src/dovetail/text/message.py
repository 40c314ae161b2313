"""One turn of a conversation.

Responsible for: the type that everything above text shares. Not responsible for: what it looks like in tokens.
"""

from __future__ import annotations

from typing import Literal, TypedDict

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """A chat message, as Hugging Face's templates take it."""

    role: Role
    content: str


def message(role: Role, content: str) -> Message:
    """A chat message."""
    return {"role": role, "content": content}
