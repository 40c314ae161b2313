"""Which texts every database takes.

Responsible for: refusing the few it does not. Not responsible for: what a text says: SQL and HTML are text.
"""

from dovetail.errors import LabelError


def is_storable(text: str) -> bool:
    """Whether UTF-8 can write it and PostgreSQL can hold it, which has no NUL."""
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


def expect_text(what: str, text: str) -> str:
    """The text; LabelError if it cannot be stored."""
    if is_storable(text):
        return text
    raise LabelError(
        f"{what} holds a NUL character or half a surrogate pair, which is no text",
        hint="remove it and send the rest",
    )
