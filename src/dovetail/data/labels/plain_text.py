"""Refuse texts that a database cannot store.

Responsible for: the few characters that fail. Not responsible for: the content of a text; SQL and HTML are text too.
"""

from dovetail.errors import LabelError


def is_storable(text: str) -> bool:
    """Return whether UTF-8 can encode the text and PostgreSQL can store it, which takes no NUL."""
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


def expect_text(what: str, text: str) -> str:
    """Return the text. Raises LabelError if it cannot be stored."""
    if is_storable(text):
        return text
    raise LabelError(
        f"{what} holds a NUL character or half a surrogate pair, which is not text",
        hint="remove it and send the rest",
    )
