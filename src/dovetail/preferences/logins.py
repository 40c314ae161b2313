"""Browsers that are logged in.

Responsible for: beginning and ending a login, and telling who is logged in. Not responsible for: invitations
(annotators.py), cookies (labelling/access.py).

A login has a secret of its own: it can end while the invitation that it came from stays good.
"""

from __future__ import annotations

import secrets

from sqlalchemy import delete

from dovetail.preferences.annotators import Person, digest_of, person_of, person_with
from dovetail.preferences.database import Store
from dovetail.preferences.schema import Login

LOGIN_SECONDS = 30 * 24 * 3600
"""A browser stays logged in so long."""


def begin_login(store: Store, token: str) -> str | None:
    """Log in with an invitation; returns the secret that the browser is to show, None for a token that is not good."""
    person = person_of(store, token)
    if person is None:
        return None
    secret, now = secrets.token_urlsafe(32), store.clock()
    with store.writing() as session:
        session.execute(delete(Login).where(Login.expires_at <= now))
        session.add(Login(digest=digest_of(secret), annotator_id=person.id, expires_at=now + LOGIN_SECONDS))
    return secret


def end_login(store: Store, secret: str) -> None:
    """Let nobody in any more who shows this secret."""
    with store.writing() as session:
        session.execute(delete(Login).where(Login.digest == digest_of(secret)))


def person_logged_in(store: Store, secret: str) -> Person | None:
    """Return who shows this secret; None if nobody is logged in with it."""
    return person_with(store, Login, secret)
