"""Invite annotators by token, and find the annotator of a token.

Responsible for: invitations, revoking them, and identifying annotators.
Not responsible for: cookies (serving/labelling/access.py).

A token is 256 random bits, too many to try, so a fast hash protects it as well as a slow one.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass

from sqlalchemy import delete, or_, select

from dovetail.data.labels.database import NotFoundError, Store
from dovetail.data.labels.plain_text import expect_text
from dovetail.data.labels.schema import Annotator, Login, Token
from dovetail.errors import LabelError

_LONGEST_NAME = 100


@dataclass(frozen=True, slots=True)
class Person:
    """An annotator, identified by a token or login."""

    id: int
    name: str
    is_admin: bool


def invite(store: Store, name: str, *, is_admin: bool = False, lasts_seconds: float | None = None) -> str:
    """Make a token for the annotator of this name, who is added if missing. The token cannot be shown again.

    lasts_seconds: the time after which the token expires; None: it stays valid until it is revoked. Earlier tokens stay
    valid. Raises LabelError for a bad name, or if the annotator exists and `is_admin` differs.
    """
    name = expect_text("name", name).strip()
    if not 1 <= len(name) <= _LONGEST_NAME:
        raise LabelError(
            f"the name has {len(name)} characters", hint=f"give a name of 1 to {_LONGEST_NAME} characters"
        )
    token = secrets.token_urlsafe(32)
    now = store.clock()
    with store.writing() as session:
        annotator = session.scalar(select(Annotator).where(Annotator.name == name))
        if annotator is None:
            annotator = Annotator(name=name, is_admin=is_admin, created_at=now)
            session.add(annotator)
            session.flush()
        elif annotator.is_admin != is_admin:
            role = "an admin" if annotator.is_admin else "no admin"
            raise LabelError(f"{name} is there already, as {role}", hint="invite under another name")
        session.execute(delete(Token).where(Token.expires_at <= now))
        expires_at = None if lasts_seconds is None else now + lasts_seconds
        session.add(
            Token(
                digest=digest_of(token),
                annotator_id=annotator.id,
                created_at=now,
                expires_at=expires_at,
            )
        )
    return token


def revoke(store: Store, name: str) -> int:
    """End all tokens and logins of an annotator, and return the number of tokens. Labels stay.

    Raises NotFoundError if there is no annotator of that name.
    """
    with store.writing() as session:
        annotator = session.scalar(select(Annotator).where(Annotator.name == name.strip()))
        if annotator is None:
            known = ", ".join(session.scalars(select(Annotator.name).order_by(Annotator.name))) or "none"
            raise NotFoundError(f"there is no annotator {name!r}", hint=f"there are: {known}")
        session.execute(delete(Login).where(Login.annotator_id == annotator.id))
        tokens = session.scalars(
            delete(Token).where(Token.annotator_id == annotator.id).returning(Token.digest)
        )
        return len(tokens.all())


def person_of(store: Store, token: str) -> Person | None:
    """Return the annotator of a token, or None if it is unknown or has expired."""
    return person_with(store, Token, token)


def person_with(store: Store, table: type[Token] | type[Login], secret: str) -> Person | None:
    """Return the annotator of a secret in this table, or None if it is unknown or has expired."""
    digest = digest_of(secret)
    is_good = or_(table.expires_at.is_(None), table.expires_at > store.clock())
    with store.reading() as session:
        found = session.execute(
            select(table.digest, Annotator).join(Annotator, Annotator.id == table.annotator_id)
            .where(table.digest == digest, is_good)
        ).first()  # fmt: skip
        if found is None or not hmac.compare_digest(found[0], digest):
            return None
        return Person(found[1].id, found[1].name, found[1].is_admin)


def digest_of(token: str) -> str:
    """Return the hash under which a token is stored."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
